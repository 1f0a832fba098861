"""Loading, checking and splitting the data."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch

import cli
import dataset


def test_loads_what_the_generator_wrote(shared_data):
    series = dataset.load_series(shared_data)
    assert series.X.shape == (3000, 6) and series.X.dtype == np.float32
    assert series.planes.shape == (4, 2, 6) and series.n_circles == 4
    assert series.config["noise_std"] == 2.83


def test_older_files_without_planes_or_config_load(rewrite_data):
    folder = rewrite_data(planes=None)
    (folder / "config.json").unlink()
    series = dataset.load_series(folder)
    assert series.planes is None and series.config == {}


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
    assert max(seen) < boundary <= min(validated) and max(validated) < n_steps


def test_jitter_reaches_every_offset():
    starts = torch.zeros(5000, dtype=torch.long)
    moved = dataset.jittered(starts, 10_000, 10, 8, torch.Generator().manual_seed(1))
    assert set(moved.tolist()) == set(range(8))


def test_gather_is_slicing():
    X = torch.randn(50, 3)
    starts = torch.tensor([0, 7, 40])
    windows = dataset.gather(X, starts, 10)
    assert torch.equal(windows, torch.stack([X[s:s + 10] for s in starts]))


@pytest.mark.parametrize("workers", [0, 1])
def test_host_batches_equal_gather(workers):
    X = np.random.default_rng(0).standard_normal((60, 2)).astype(np.float32)
    batches = [[0, 5], [50, 3]]
    got = list(dataset.host_batches(X, batches, 10, torch.device("cpu"), workers))
    for windows, starts in zip(got, batches, strict=True):
        assert torch.equal(windows, dataset.gather(torch.from_numpy(X), torch.tensor(starts), 10))


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


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(rewrite_data, shared_data, value):
    X = dataset.load_series(shared_data).X.copy()
    X[1234, 5] = value
    with pytest.raises(cli.UserError, match="X holds NaN or infinity"):
        dataset.load_series(rewrite_data(X=X))


@pytest.mark.parametrize("arrays, message", [
    ({"X": np.zeros(5, np.float32)}, "X must be"),
    ({"X": np.zeros((5, 6), np.int64)}, "X must be"),
    ({"states": np.zeros(7, np.int64)}, "states must have shape"),
    ({"states": np.full(3000, 9)}, "states must lie in"),
    ({"states": np.zeros(3000)}, "whole numbers"),
    ({"periods": np.zeros(4, np.int64)}, "periods must be"),
    ({"transition_matrix": np.eye(4) * 2}, "sum to 1"),
    ({"planes": np.zeros((4, 2, 5))}, "planes must have shape"),
    ({"radii": np.array(["a", "b", "c", "d"])}, "damaged .*not numbers"),
])
def test_wrong_shapes_and_types(rewrite_data, arrays, message):
    with pytest.raises(cli.UserError, match=message):
        dataset.load_series(rewrite_data(**arrays))


def test_pickled_objects_are_never_read(data_dir):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("pickled code was run",))

    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    with zipfile.ZipFile(data_dir / "data.npz", "w") as archive:
        archive.writestr("X.npy", member.getvalue() + pickle.dumps(Bomb()))
    with pytest.raises(cli.UserError, match="pickled objects"):
        dataset.load_series(data_dir)


def test_a_header_cannot_take_memory(data_dir):
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 20)})
    with zipfile.ZipFile(data_dir / "data.npz", "w") as archive:
        archive.writestr("X.npy", member.getvalue())
    with pytest.raises(cli.UserError, match="declares the shape"):
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


def test_windows_that_do_not_fit():
    with pytest.raises(cli.UserError, match="longer than the series"):
        dataset.split_windows(100, 101, 10, 0.1)
    with pytest.raises(cli.UserError, match="validation part has 10 steps"):
        dataset.split_windows(100, 20, 10, 0.1)
