"""Loading, checking and splitting the data."""

import io
import itertools
import json
import pickle
import re
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_DATA, arrays_of

import cli
import dataset
import markov_circles_timeseries as generator

ARRAYS = ("X", "states", "thetas", "transition_matrix", "radii", "entry_angles", "periods", "planes")
LONG = ("X", "states", "thetas")


def test_loads_what_the_generator_wrote(shared_data):
    series = dataset.load_series(shared_data)
    assert series.X.shape == (3000, 6) and series.X.dtype == np.float32
    assert series.process.planes.shape == (4, 2, 6) and series.n_circles == 4
    assert series.config["noise_std"] == series.process.noise_std == 2.83
    with np.load(shared_data / "data.npz") as file:
        for name, values in arrays_of(series).items():
            np.testing.assert_array_equal(values, file[name])
            assert values.dtype == {"X": "f4", "states": "i8", "periods": "i8"}.get(name, "f8")


def test_older_files_without_planes_or_config_load(rewrite_data):
    folder = rewrite_data(planes=None)
    (folder / "config.json").unlink()
    series = dataset.load_series(folder)
    assert series.process.planes is None and series.config == {}


@pytest.mark.parametrize("n_steps, seq_len, stride, val_fraction",
                         [(1000, 100, 30, 0.2), (777, 64, 64, 0.1), (512, 128, 1, 0.3), (300, 20, 50, 0.07)])
def test_no_time_step_is_in_training_and_validation(n_steps, seq_len, stride, val_fraction):
    train, val, boundary = dataset.split_windows(n_steps, seq_len, stride, val_fraction)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(200):
        starts = dataset.jittered(torch.from_numpy(train), boundary, seq_len, stride, generator)
        for start in starts.tolist():
            seen.update(range(start, start + seq_len))
    validated = {t for start in val.tolist() for t in range(start, start + seq_len)}
    assert not seen & validated
    assert seen == set(range(boundary)) and boundary == min(validated) and max(validated) < n_steps


@pytest.mark.parametrize("n_steps, seq_len, stride, val_fraction, boundary", [
    (1000, 100, 50, 0.1, 900),  # the only validation window ends with the series
    (1000, 100, 50, 0.2, 800), (1003, 100, 7, 0.25, 752), (777, 64, 64, 0.1, 699), (20, 3, 1, 0.3, 14)])
def test_windows_are_all_that_fit_on_their_side(n_steps, seq_len, stride, val_fraction, boundary):
    train, val, first = dataset.split_windows(n_steps, seq_len, stride, val_fraction)
    assert first == boundary == dataset.first_validation_step(n_steps, val_fraction)
    assert train.tolist() == [s for s in range(n_steps) if s % stride == 0 and s + seq_len <= boundary]
    assert val.tolist() == [
        s for s in range(boundary, n_steps) if (s - boundary) % stride == 0 and s + seq_len <= n_steps]
    assert train.dtype == val.dtype == np.int64
    np.testing.assert_array_equal(dataset.window_starts(boundary, n_steps, seq_len, stride), val)


def test_jitter_is_uniform_below_a_stride_and_stops_at_the_end():
    starts = torch.arange(0, 50_000, 10)
    moved = dataset.jittered(starts, 60_000, 10, 8, torch.Generator().manual_seed(1))
    counts = torch.bincount(moved - starts, minlength=8)
    assert len(counts) == 8 and counts.min() > 5000 / 8 * 0.85
    assert torch.equal(moved, dataset.jittered(starts, 60_000, 10, 8, torch.Generator().manual_seed(1)))
    late = dataset.jittered(torch.full((1000,), 85), 100, 10, 20, torch.Generator().manual_seed(1))
    assert set(late.tolist()) == {85, 86, 87, 88, 89, 90}  # the last window is steps 90 to 99
    assert (late == 90).sum() > 600


def test_gather_is_slicing():
    X = torch.randn(50, 3)
    starts = torch.tensor([0, 7, 40])
    expected = torch.stack([X[s:s + 10] for s in starts])
    assert torch.equal(dataset.gather(X, starts, 10), expected)
    for given in (starts, starts.numpy(), starts.tolist()):
        assert torch.equal(dataset.gather(X.numpy(), given, 10), expected)


@pytest.mark.parametrize("form", ["in memory", "mapped"])
@pytest.mark.parametrize("workers", [0, 1])
def test_windows_of_a_series(shared_data, shared_uncompressed, form, workers):
    X = dataset.load_series(shared_data if form == "in memory" else shared_uncompressed).X
    windows = dataset.Windows(X, 30, "cpu")
    assert windows.on_device == isinstance(windows.X, torch.Tensor) == (form == "in memory")
    assert windows.seq_len == 30 and windows.device == windows.starts_device == torch.device("cpu")
    batches = [[0, 2970], [17, 3, 17]]
    expected = [torch.from_numpy(np.stack([X[s:s + 30] for s in starts])) for starts in batches]
    for starts, wanted in zip(batches, expected, strict=True):
        assert torch.equal(windows.at(torch.tensor(starts)), wanted)
    if form == "mapped":
        for found, wanted in zip(windows.loader(batches, workers), expected, strict=True):
            assert torch.equal(found, wanted)


def test_a_series_goes_to_a_gpu_when_it_takes_less_than_a_third_of_the_free_memory(monkeypatch):
    X = np.zeros((25, 4), np.float32)  # 400 bytes
    gpu = torch.device("cuda", 0)
    for free, fits in ((1201, True), (1200, False), (900, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        assert dataset.fits_on(gpu, X) == fits
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (900, 10**9))
    windows = dataset.Windows(X, 5, gpu)
    assert not windows.on_device and windows.starts_device.type == "cpu" and windows.device == gpu


def test_visits_are_the_runs_of_equal_states(monkeypatch):
    states = np.random.default_rng(0).integers(0, 3, 2000)
    expected = [(state, sum(1 for _ in group)) for state, group in itertools.groupby(states.tolist())]
    for block_bytes in (1 << 22, 80):
        monkeypatch.setattr(dataset.blocks, "__defaults__", (block_bytes,))
        circles, starts, lengths = dataset.visits(states)
        assert list(zip(circles.tolist(), lengths.tolist(), strict=True)) == expected
        assert starts.tolist() == np.cumsum([0, *lengths[:-1]]).tolist()


def test_crc32_is_that_of_the_bytes(monkeypatch):
    X = np.random.default_rng(0).standard_normal((1001, 7)).astype(np.float32)
    for block_bytes in (1 << 22, 100):
        monkeypatch.setattr(dataset.blocks, "__defaults__", (block_bytes,))
        assert dataset.crc32(X) == zlib.crc32(X.tobytes())


def test_a_model_of_another_number_of_features_is_refused(shared_data):
    series = dataset.load_series(shared_data)
    dataset.check_fits_model(series, SimpleNamespace(feature_dim=6), "m.pt")
    with pytest.raises(cli.UserError, match=r"m\.pt predicts 7 features but the data have 6; give the --data-dir"):
        dataset.check_fits_model(series, SimpleNamespace(feature_dim=7), "m.pt")


@pytest.mark.parametrize("name, largest", [("noise_std", 1e30), ("center_walk_std", 1e30), ("dwell_mean", 1.7e308),
                                           ("dwell_std", 1.7e308)])
def test_numbers_of_config_outside_their_range_are_refused(rewrite_data, name, largest):
    for value in (0, largest):
        assert dataset.load_series(rewrite_data({name: value})).config[name] == value
    for value in (-1e-9, float("nan"), float("inf"), "1", True, None, [1]):
        message = re.escape(f"config.json: {name} must be a number from 0 to {largest:g};")
        with pytest.raises(cli.UserError, match=message):
            dataset.load_series(rewrite_data({name: value}))


def test_missing_file(tmp_path):
    with pytest.raises(cli.UserError, match=r"data.npz not found; .*markov_circles_timeseries.py --data-dir"):
        dataset.load_series(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_damaged_file(data_dir, damage):
    path = data_dir / "data.npz"
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 3] ^= 0xFF
    path.write_bytes({"truncated": content[:len(content) // 2], "flipped": content, "empty": b"",
                      "text": b"no numbers"}[damage])
    with pytest.raises(cli.UserError, match="damaged"):
        dataset.load_series(data_dir)


@pytest.mark.parametrize("name", ["X", "states", "thetas", "transition_matrix", "radii", "entry_angles", "periods"])
def test_missing_array(rewrite_data, name):
    with pytest.raises(cli.UserError, match=f"lacks the array {name};"):
        dataset.load_series(rewrite_data(**{name: None}))


WRONG_SHAPES = {"X": (3000,), "states": (2999,), "thetas": (3000, 1), "transition_matrix": (4, 3), "radii": (4, 1),
                "entry_angles": (5,), "periods": (3,), "planes": (4, 2, 5)}
WRONG_TYPES = {"X": "c16", "states": "f8", "thetas": "c16", "transition_matrix": "c8", "radii": "U2",
               "entry_angles": "?", "periods": "f4", "planes": "M8[s]"}
WRONG_VALUES = {  # beside NaN and infinity: values just outside the range and far outside it
    "X": (1.1e30, -3e38), "states": (-1, 4, 2**62), "thetas": (6.3, -6.3, 1e300), "transition_matrix": (-1e-3, 1.01),
    "radii": (0.0, -1.0, 1e-31, 1.1e30), "entry_angles": (6.3, -6.3, 1e300), "periods": (0, -5, 2**40 + 1),
    "planes": (1.002, -1.002, 1e300)}


@pytest.mark.parametrize("name", ARRAYS)
def test_every_array_of_a_wrong_shape_is_refused(rewrite_data, name):
    dtype = np.int64 if name in ("states", "periods") else np.float64
    with pytest.raises(cli.UserError, match=rf"data\.npz: {name} must have shape .*, not \("):
        dataset.load_series(rewrite_data(**{name: np.ones(WRONG_SHAPES[name], dtype)}))


@pytest.mark.parametrize("name", ARRAYS)
def test_every_array_of_a_wrong_type_is_refused(rewrite_data, shared_data, name):
    shape = arrays_of(dataset.load_series(shared_data))[name].shape
    with pytest.raises(cli.UserError, match=rf"data\.npz: {name} must hold .*numbers, not "):
        dataset.load_series(rewrite_data(**{name: np.ones(shape).astype(WRONG_TYPES[name])}))


@pytest.mark.parametrize("name, value", [
    (name, value) for name in ARRAYS
    for value in (*WRONG_VALUES[name], *((np.nan, np.inf, -np.inf) if name not in ("states", "periods") else ()))])
@pytest.mark.parametrize("place", [0, -1])
def test_every_array_with_one_wrong_value_is_refused(rewrite_data, shared_data, name, value, place):
    values = arrays_of(dataset.load_series(shared_data))[name].copy()
    values = values.astype(np.float64) if name == "X" else values
    values.ravel()[place] = value
    is_gap = name == "X" and not np.isfinite(value)
    found = "1 NaN or infinite value, the first in row" if is_gap else "NaN or values outside"
    with pytest.raises(cli.UserError, match=rf"data\.npz: {name} holds {found} "):
        dataset.load_series(rewrite_data(**{name: values}))


def test_the_edges_of_every_range_are_allowed(rewrite_data, shared_data):
    series = dataset.load_series(shared_data)
    X, thetas, radii, periods = (arrays_of(series)[name].copy() for name in ("X", "thetas", "radii", "periods"))
    X[0, :2], thetas[:2], radii[:2], periods[:2] = (-9e29, 9e29), (0, 2 * np.pi), (1e-30, 1e30), (1, 2**40)
    changed = {"X": X, "thetas": thetas.astype("f4"), "radii": radii, "periods": periods}
    loaded = dataset.load_series(rewrite_data(**changed))
    np.testing.assert_array_equal(loaded.X, X)
    for name, values in changed.items():
        np.testing.assert_array_equal(arrays_of(loaded)[name], values)


@pytest.mark.parametrize("arrays, message", [
    ({"X": np.zeros((1, 6))}, "X must have shape"), ({"X": np.zeros((3000, 0))}, "X must have shape"),
    ({"radii": np.zeros(0)}, "radii must have shape"),
    ({"transition_matrix": np.eye(4) * 0.9}, "rows of transition_matrix must sum to 1"),
    ({"transition_matrix": np.full((4, 4), 0.25) + np.eye(4) * 1e-4}, "rows of transition_matrix must sum to 1"),
    ({"planes": np.zeros((4, 2, 6))}, "pairs of orthogonal unit vectors"),
    ({"planes": np.tile(np.eye(6)[0], (4, 2, 1))}, "pairs of orthogonal unit vectors"),
    ({"planes": np.tile(0.99 * np.eye(2, 6), (4, 1, 1))}, "pairs of orthogonal unit vectors")])
def test_what_single_values_do_not_show(rewrite_data, arrays, message):
    with pytest.raises(cli.UserError, match=rf"data\.npz: .*{message}"):
        dataset.load_series(rewrite_data(**arrays))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_pickled_objects_are_never_read(data_dir, compression):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("pickled code was run",))

    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    with zipfile.ZipFile(data_dir / "data.npz", "w", compression) as archive:
        archive.writestr("X.npy", member.getvalue() + pickle.dumps(Bomb()))
    with pytest.raises(cli.UserError, match=r"data\.npz is damaged"):
        dataset.load_series(data_dir)


@pytest.mark.parametrize("shape", [(10**12, 20), (10**5, 20)])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_header_cannot_take_memory(data_dir, shape, compression):
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(data_dir / "data.npz", "w", compression) as archive:
        archive.writestr("X.npy", member.getvalue() + bytes(100))
    with pytest.raises(cli.UserError, match=r"data\.npz (is damaged|does not fit in memory)"):
        dataset.load_series(data_dir)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_bytes_behind_an_array_are_refused(data_dir, compression):
    with np.load(data_dir / "data.npz") as file:
        content = {name: file[name] for name in file.files}
    with zipfile.ZipFile(data_dir / "data.npz", "w", compression) as archive:
        for name, values in content.items():
            member = io.BytesIO()
            np.save(member, values)
            archive.writestr(f"{name}.npy", member.getvalue() + bytes(values.itemsize))
    with pytest.raises(cli.UserError, match=r"data\.npz is damaged"):
        dataset.load_series(data_dir)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(data_dir, compression):
    with zipfile.ZipFile(data_dir / "data.npz") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(data_dir / "data.npz", "w", compression) as archive:
        for name, member in content.items():
            archive.writestr(name, member)
    with pytest.raises(cli.UserError, match="is compressed in a way"):
        dataset.load_series(data_dir)


@pytest.mark.parametrize("text", ["{", "[1]", "\ufeff{}", '{"a": NaN'])
def test_damaged_config(data_dir, text):
    (data_dir / "config.json").write_text(text)
    with pytest.raises(cli.UserError, match=r"config\.json"):
        dataset.load_series(data_dir)


def test_big_endian_and_fortran_order_load(rewrite_data, shared_data):
    X = dataset.load_series(shared_data).X
    series = dataset.load_series(rewrite_data(X=np.asfortranarray(X.astype(">f8"))))
    assert series.X.dtype == np.float32 and np.array_equal(series.X, X)
    assert json.loads((rewrite_data() / "config.json").read_text())["n_steps"] == 3000


@pytest.mark.parametrize("states, message", [
    (np.arange(1000), None), (np.zeros(1000, bool), None), (np.full(1000, b"a"), None), (np.full(1000, "a"), None),
    (np.arange(1001), "1,001 different labels"), (np.zeros(1000), "not float64"),
    (np.zeros(1000, "c16"), "not complex"), (np.zeros(1000, "M8[s]"), "not datetime"),
    (np.zeros((1000, 1), int), "must have shape"), (np.zeros(999, int), "must have shape"),
    (np.zeros((), int), "must have shape")])
def test_labels_are_one_name_per_step(states, message):
    problem = dataset.find_label_problem(states, 1001 if states.shape == (1001,) else 1000)
    assert problem is None if message is None else message in problem


def test_windows_that_do_not_fit():
    assert [part.tolist() for part in dataset.split_windows(20, 10, 10, 0.5)[:2]] == [[0], [10]]
    with pytest.raises(cli.UserError, match="training part has 9 steps"):
        dataset.split_windows(20, 10, 10, 0.55)
    assert len(dataset.split_windows(100, 10, 10, 0.1)[1]) == 1
    tens = np.array([[0, 10], [10, 20], [20, 30]])
    assert [part.tolist() for part in dataset.split_windows(30, 10, 10, 1 / 3, tens)[:2]] == [[0, 10], [20]]
    with pytest.raises(cli.UserError, match=r"longer than every recording \(at most 10 steps\)"):
        dataset.split_windows(30, 11, 10, 1 / 3, tens)
    with pytest.raises(cli.UserError, match="longer than the series"):
        dataset.split_windows(100, 101, 10, 0.1)
    with pytest.raises(cli.UserError, match="validation part has 10 steps"):
        dataset.split_windows(100, 20, 10, 0.1)


# ---- mapped from an uncompressed file


@pytest.fixture(scope="session")
def shared_uncompressed(tmp_path_factory):
    """The series of shared_data in an uncompressed file; tests must not write to it."""
    folder = tmp_path_factory.mktemp("uncompressed")
    generator.main(generator.parse_args([*TINY_DATA, "--uncompressed", "--data-dir", str(folder)]))
    return folder


@pytest.fixture
def uncompressed(shared_uncompressed, tmp_path):
    """A test's own copy of shared_uncompressed."""
    folder = tmp_path / "uncompressed"
    folder.mkdir()
    for name in ("data.npz", "config.json"):
        (folder / name).write_bytes((shared_uncompressed / name).read_bytes())
    return folder


def test_both_forms_hold_the_same_series(shared_data, shared_uncompressed):
    compressed, mapped = dataset.load_series(shared_data), dataset.load_series(shared_uncompressed)
    for name in ARRAYS:
        a, b = arrays_of(compressed)[name], arrays_of(mapped)[name]
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        assert dataset.mapping_of(a) is None and (dataset.mapping_of(b) is not None) == (name in LONG)
    assert compressed.config == mapped.config
    assert dataset.crc32(compressed.X) == dataset.crc32(mapped.X)
    with np.load(shared_uncompressed / "data.npz", allow_pickle=False) as file:  # NumPy reads it as well
        for name in ARRAYS:
            np.testing.assert_array_equal(file[name], arrays_of(compressed)[name])
    with pytest.raises(ValueError, match="read-only"):
        mapped.X[0] = 0


def test_a_mapped_series_survives_its_file_being_replaced(uncompressed, shared_data):
    series = dataset.load_series(uncompressed)
    other = [*TINY_DATA, "--seed", "8", "--uncompressed", "--data-dir", str(uncompressed)]
    generator.save_uncompressed(generator.config_of(generator.parse_args(other)), uncompressed)
    np.testing.assert_array_equal(series.X, dataset.load_series(shared_data).X)


def test_uncompressed_files_of_numpy_load(rewrite_data, shared_data):
    series, expected = dataset.load_series(rewrite_data()), dataset.load_series(shared_data)
    for name in ARRAYS:
        np.testing.assert_array_equal(arrays_of(series)[name], arrays_of(expected)[name])


@pytest.mark.parametrize("shift", [0, 1, 4])
def test_values_that_lie_unaligned_in_the_file_are_read_into_memory(data_dir, shift):
    with np.load(data_dir / "data.npz") as file:
        content = {name: file[name] for name in file.files}
    with zipfile.ZipFile(data_dir / "data.npz", "w") as archive:
        for name, values in content.items():
            member = io.BytesIO()
            np.save(member, values)  # 128 bytes of header, then the values
            header = 30 + len(f"{name}.npy") + archive.fp.tell()
            info = zipfile.ZipInfo(f"{name}.npy")
            padding = (shift - header - 4) % 64  # an extra field of four bytes and this many puts them at 64 n + shift
            info.extra = b"\xff\xff" + padding.to_bytes(2, "little") + bytes(padding)
            archive.writestr(info, member.getvalue())
    series = dataset.load_series(data_dir)
    for name, values in arrays_of(series).items():
        np.testing.assert_array_equal(values, content[name])
        assert values.flags.aligned
    assert [dataset.mapping_of(values) is not None for values in (series.X, series.states)] == [
        shift in (0, 4), shift == 0]


def test_blocks_are_the_array():
    for shape in ((1000, 3), (7,), (5, 10_000), (1, 1)):
        array = np.random.default_rng(0).standard_normal(shape)
        parts = list(dataset.blocks(array, 4096))
        np.testing.assert_array_equal(np.concatenate(parts), array)
        assert all(part.nbytes <= max(4096, array[0].nbytes) for part in parts)


def test_windows_and_rows_of_a_mapped_series(shared_data, shared_uncompressed):
    X, mapped = (dataset.load_series(folder).X for folder in (shared_data, shared_uncompressed))
    starts = torch.tensor([0, 2000, 17, 2900])
    expected = dataset.gather(torch.from_numpy(X), starts, 100)
    assert torch.equal(dataset.gather(mapped, starts, 100), expected)
    assert torch.equal(dataset.gather(mapped, starts.numpy(), 100), expected)
    cpu = torch.device("cpu")
    assert dataset.fits_on(cpu, X) and not dataset.fits_on(cpu, mapped)
    assert torch.equal(dataset.to_device(mapped, cpu), torch.from_numpy(X))
    rows = np.random.default_rng(0).integers(0, len(X), 1000)
    np.testing.assert_array_equal(dataset.pick(mapped, rows), X[rows])


def test_gaps_of_a_series_of_many_blocks_are_counted_and_placed():
    X = np.zeros((400_000, 3), np.float32)  # more than one block
    assert len(list(dataset.blocks(X))) > 1 and dataset.find_gap(X) is None
    X[399_990, 1], X[399_999] = np.inf, np.nan
    assert dataset.find_gap(X).startswith("X holds 4 NaN or infinite values, the first in row 399990, column 1 ")


def write_arrays(folder, arrays):
    """An uncompressed data.npz as the generator writes it, with any arrays."""
    with open(folder / "data.npz", "wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, values in arrays.items():
            generator.write_member(archive, file, name, values.shape, values.dtype, [values])


@pytest.mark.parametrize("name, value, message", [
    ("X", np.nan, "X holds 6 NaN or infinite values, the first in row 2999, column 0"),
    ("thetas", np.inf, "thetas holds NaN or"), ("states", 4, "values outside 0…3"),
    ("states", -1, "values outside 0…3")])
def test_bad_values_in_a_mapped_series(uncompressed, shared_data, name, value, message):
    series = dataset.load_series(shared_data)
    arrays = {key: values.copy() for key, values in arrays_of(series).items()}
    write_arrays(uncompressed, arrays)
    assert dataset.mapping_of(dataset.load_series(uncompressed).X) is not None
    arrays[name][-1] = value
    write_arrays(uncompressed, arrays)
    with pytest.raises(cli.UserError, match=message):
        dataset.load_series(uncompressed)


@pytest.mark.parametrize("field, value", [
    ("header_offset", 10**15), ("header_offset", 64), ("header_offset", 10**5), ("CRC", 1), ("file_size", 1000)])
@pytest.mark.parametrize("form", ["data_dir", "uncompressed"])
def test_a_directory_that_lies_is_refused(request, form, field, value):
    folder = request.getfixturevalue(form)
    archive = zipfile.ZipFile(folder / "data.npz", "a")
    setattr(archive.getinfo("states.npy"), field, value)
    archive._didModify = True  # close() writes the directory anew
    archive.close()
    with pytest.raises(cli.UserError, match="damaged"):
        dataset.load_series(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_a_long_series_takes_little_memory(tmp_path):
    """3 million steps x 16 features, 240 MB: drawn, checked, summed up and cut into every window in 64 MB more than
    a short series takes."""
    program = """
import sys
from pathlib import Path
import numpy as np
import torch
import dataset
import markov_circles_timeseries as mc

def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

def work(n_steps):
    folder = f"{sys.argv[1]}/{n_steps}"
    mc.main(mc.parse_args(["--no-umap", "--uncompressed", "--n-steps", str(n_steps), "--ambient-dim", "16",
                           "--data-dir", folder]))
    series = dataset.load_series(folder)
    dataset.crc32(series.X)
    dataset.pick(series.states, np.arange(0, n_steps, n_steps // 3000))
    batches = torch.arange(0, n_steps - 1000, 1000).split(8)
    return sum(float(w[0, 0, 0]) for w in dataset.Windows(series.X, 1000, "cpu").loader(batches, 0))

work(30_000)
before = peak()
work(3_000_000)
print("grown by", peak() - before, "MB")
"""
    result = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=300,
                            cwd=Path(dataset.__file__).parent)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "3000000" / "data.npz").stat().st_size > 240e6
    assert float(result.stdout.split("grown by")[1].split()[0]) < 64


def test_training_on_either_form_ends_the_same(script, shared_data, shared_uncompressed, tmp_path):
    flags = ["--d-model", 16, "--n-layers", 1, "--d-state", 4, "--d-ff", 16, "--seq-len", 64, "--stride", 128,
             "--batch-size", 8, "--epochs", 2, "--warmup-epochs", 1, "--device", "cpu"]
    runs = {"a": (shared_data, []), "b": (shared_uncompressed, []), "c": (shared_uncompressed, ["--num-workers", 1])}
    for name, (folder, more) in runs.items():
        result = script("masked_model_gpu_mamba_next", *flags, *more, "--data-dir", folder,
                        "--checkpoint", tmp_path / f"{name}.pt")
        assert result.code == 0 and result.err == ""
    a, *others = (torch.load(tmp_path / f"{name}_last.pt", weights_only=True) for name in runs)
    for other in others:
        assert a["data_crc32"] == other["data_crc32"] and a["val_loss"] == other["val_loss"]
        for name, weights in a["model_state_dict"].items():
            assert torch.equal(weights, other["model_state_dict"][name])
    for name in ("a", "b"):
        result = script("masked_model_gpu_mamba_next", "--eval", tmp_path / "a.pt", "--data-dir", runs[name][0],
                        "--device", "cpu")
        assert result.code == 0 and result.err == ""
        assert f"{a['val_loss']:.4f}" in result.out


def test_window_flags_that_an_older_checkpoint_lacks_are_the_defaults_and_are_named(capsys):
    assert dataset.window_settings({"seq_len": 64, "stride": 8, "val_fraction": 0.25}, "m.pt") == (64, 8, 0.25)
    assert capsys.readouterr().out == ""
    assert dataset.window_settings({"seq_len": 64, "stride": 8}, "old.pt") == (64, 8, 0.1)
    assert "old.pt doesn't name its val_fraction (taken: 0.1)" in capsys.readouterr().out


@pytest.mark.parametrize("good", [{"seq_len": 2}, {"seq_len": 2**40}, {"stride": 1}, {"stride": 2**40},
                                  {"val_fraction": 1e-9}, {"val_fraction": 0.999}])
def test_window_flags_at_their_bounds_are_taken(good):
    flags = {"seq_len": 64, "stride": 8, "val_fraction": 0.1} | good
    assert dataset.window_settings(flags, "m.pt") == tuple(flags.values())


@pytest.mark.parametrize("bad", [{"seq_len": 0}, {"seq_len": 1}, {"seq_len": "long"}, {"seq_len": 64.0},
                                 {"seq_len": 2**40 + 1}, {"seq_len": 10**5000}, {"stride": 0}, {"stride": -1},
                                 {"stride": 2**40 + 1}, {"stride": 2**63}, {"stride": 8.0}, {"stride": None},
                                 {"val_fraction": 1.5}, {"val_fraction": 1.0}, {"val_fraction": 0.0},
                                 {"val_fraction": -0.1}, {"val_fraction": float("nan")}, {"val_fraction": "0.1"},
                                 {"val_fraction": None}])
def test_senseless_window_flags_are_refused(bad):
    with pytest.raises(cli.UserError, match="make no windows"):
        dataset.window_settings({"seq_len": 64, "stride": 8, "val_fraction": 0.1} | bad, "m.pt")


def test_other_borders_are_other_data(tmp_path):
    X = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)

    def crc(*lengths):
        np.savez(tmp_path / "r.npz", *np.split(X, np.cumsum(lengths)[:-1]))
        return dataset.data_crc32(dataset.load_series(f"{tmp_path / 'r.npz'}:*"))

    assert crc(30) == dataset.crc32(X) == dataset.data_crc32(dataset.Series(X))  # as in every older checkpoint
    assert len({crc(30), crc(10, 20), crc(20, 10), crc(10, 10, 10)}) == 4
