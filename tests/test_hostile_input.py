"""Damaged and malicious files: each either loads as something valid or ends in one cli.UserError.

There must never be another exception (a traceback for the user), a warning (a second line), pickled code that is run,
or memory taken because a header says so. Every test with random cases draws HOSTILE_CASES of them; with 150 there are
over 1,000 in all:

  HOSTILE_CASES=150 python -m pytest tests/test_hostile_input.py
"""

import io
import json
import os
import pickle
import resource
import shutil
import struct
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import arrays_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cli
import dataset
import mamba_model
import markov_circles_timeseries as generator
import masked_model_gpu_mamba_next as training
import optimal_filter
import run_files

CASES = int(os.environ.get("HOSTILE_CASES", 12))
hostile = settings(max_examples=CASES, deadline=None, derandomize="HOSTILE_CASES" not in os.environ, database=None,
                   suppress_health_check=list(HealthCheck))
MEMORY = 1 << 30  # bytes beyond what is in use already; loading an undamaged file takes a few megabytes
SIZES = ["--d-model", "16", "--n-layers", "1", "--d-state", "2", "--d-ff", "8", "--seq-len", "64", "--stride", "256",
         "--epochs", "1", "--warmup-epochs", "1", "--no-train-eval", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def little_memory():
    """Let no test reserve more than MEMORY, and check that less than half of it was ever filled."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        in_use = int(file.read().split()[0]) * resource.getpagesize()
    filled = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, old)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - filled < MEMORY >> 11  # KiB: half of MEMORY


@pytest.fixture(autouse=True)
def strict(tmp_path, monkeypatch):
    """A warning is an error; and no pickled call to `touch` may have been made in the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="hypothesis")
        yield
    assert not sentinel(tmp_path).exists(), "pickled code was run"


def sentinel(folder):
    return folder / "code_was_run"


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, folder):
        self.path = str(sentinel(folder))

    def __reduce__(self):
        return (open, (self.path, "w"))


def valid_or_refused(load, *args):
    """What load(*args) returns, or None when it raises a UserError with a short message."""
    try:
        return load(*args)
    except cli.UserError as error:
        message = str(error)
        assert message and len(message) < 2000, message
        return None


# ---- damage


@st.composite
def damaged(draw, content):
    """The bytes with some bits flipped, or some bytes replaced, cut off, repeated or set to zero."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "replace", "cut", "repeat", "zero"]))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "replace":
            new = draw(st.binary(min_size=1, max_size=8))
            content[at:at + len(new)] = new
        elif kind == "cut":
            del content[at:]
        elif kind == "repeat":
            content[at:at] = content[at:at + draw(st.integers(1, 64))]
        else:
            content[at:at + 16] = bytes(len(content[at:at + 16]))
    return bytes(content)


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def zipped(content, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, member in content.items():
            archive.writestr(name, member)
    return file.getvalue()


@st.composite
def damaged_member(draw, content, near_the_start=256):
    """An archive in which one member is damaged, mostly near its start, and the checksum fits the damage."""
    name = draw(st.sampled_from(sorted(content)))
    member = content[name]
    head = draw(st.sampled_from([near_the_start, near_the_start, len(member)]))
    new = draw(damaged(member[:head])) + member[head:]
    return zipped({**content, name: new}, draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])))


@st.composite
def lying(draw, archive):
    """An archive that lies: fields of one entry, in the directory or in the member's own header, have other values."""
    raw = bytearray(archive)
    entries = [i for i in range(len(raw) - 4) if raw[i:i + 4] in (b"PK\1\2", b"PK\3\4")]
    at = draw(st.sampled_from(entries))
    fields = {8: "H", 10: "H", 16: "I", 20: "I", 24: "I", 28: "H", 30: "H", 42: "I"} if raw[at + 2] == 1 else {
        6: "H", 8: "H", 14: "I", 18: "I", 22: "I", 26: "H", 28: "H"}
    for offset in draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3, unique=True)):
        size = struct.calcsize(fields[offset])
        value = draw(st.one_of(st.sampled_from([0, 1, 8, 12, 14, 93, 99, 2**(8 * size) - 1, 2**(8 * size) - 2]),
                               st.integers(0, 2**(8 * size) - 1)))
        struct.pack_into("<" + fields[offset], raw, at + offset, value)
    return bytes(raw)


# ---- one flipped bit, a cut, a lie: in every member of every kind of file


def zip_regions(content):
    """The bytes of a zip file: ([range of each member's data], [range of each header, the directory last])."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries, directory = archive.infolist(), archive.start_dir
    data, headers = [], []
    for entry in entries:
        name, extra = struct.unpack_from("<HH", content, entry.header_offset + 26)
        first = entry.header_offset + 30 + name + extra
        headers.append(range(entry.header_offset, first))
        data.append(range(first, first + entry.compress_size))
    return data, [*headers, range(directory, len(content))]


def spread(places, n):
    """At most n of the places: the first, the last and what lies evenly between."""
    return [places[i] for i in sorted(set(np.linspace(0, len(places) - 1, n).astype(int)))] if places else []


def flipped(content, place, bit):
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1:]


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory):
    """The bytes of a checkpoint with few members."""
    path = tmp_path_factory.mktemp("small") / "small.pt"
    torch.manual_seed(0)
    model = mamba_model.CausalTimeSeriesMamba(3, d_model=16, n_layers=1, d_state=2, d_ff=8)
    mamba_model.save_checkpoint(path, 1, model.state_dict(), {}, 1.0, 1.0, {"seq_len": 64, "dropout": 0.1})
    return path.read_bytes()


@pytest.fixture(params=["checkpoint", "compressed", "uncompressed"])
def file(request, tmp_path, shared_data, small_checkpoint):
    """A good file of each kind: its path, its content, load(), which gives all that it holds as one dict, and how many
    places in a header are tried."""
    if request.param == "checkpoint":
        path, content = tmp_path / "small.pt", small_checkpoint

        def load():
            model, args = mamba_model.load_checkpoint(path, "cpu")
            return {**{key: value.numpy() for key, value in model.state_dict().items()}, "args": str(args)}
    else:
        path = tmp_path / "data.npz"
        shutil.copy(shared_data / "config.json", tmp_path)
        if request.param == "uncompressed":
            content = request.getfixturevalue("uncompressed")
        else:
            content = zipped(request.getfixturevalue("arrays"), zipfile.ZIP_DEFLATED)

        def load():
            return arrays_of(dataset.load_series(tmp_path))
    path.write_bytes(content)
    return SimpleNamespace(path=path, content=content, load=load, compressed=request.param == "compressed",
                           n_places=6 if request.param == "checkpoint" else 60)


def loads_the_same(file, content, expected):
    """Whether the file with this content loads; what loads must be what was written, or the test fails."""
    file.path.write_bytes(content)
    loaded = valid_or_refused(file.load)
    if loaded is not None:
        assert loaded.keys() == expected.keys()
        for name, value in loaded.items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
    return loaded is not None


def test_every_flipped_bit_of_data_is_refused(file):
    expected = file.load()
    data, _ = zip_regions(file.content)
    assert len(data) >= 8
    for member in data:
        # No value depends on some bits at both ends of a compressed stream: the last-block flag, the end-of-block code.
        inner = member[1:-4] if file.compressed else member
        for bit, place in enumerate(spread(inner, 5)):
            assert not loads_the_same(file, flipped(file.content, place, bit), expected), (member, place)


def test_every_flipped_bit_of_a_header_is_refused_or_changes_nothing(file):
    expected = file.load()
    _, headers = zip_regions(file.content)
    places = [place for header in headers[:-1] for place in spread(header, file.n_places)]
    places += spread(headers[-1], 300)
    refused = sum(not loads_the_same(file, flipped(file.content, place, place % 8), expected) for place in places)
    assert refused > len(places) / 4


def test_every_cut_is_refused(file):
    expected, n = file.load(), len(file.content)
    for length in [*spread(range(n), 40), *range(n - 30, n)]:
        assert not loads_the_same(file, file.content[:length], expected), length


def test_sizes_that_lie_are_refused_or_change_nothing(file):
    """Every size and offset of every member, in the directory and in the member's own header."""
    expected = file.load()
    entries = [i for i in range(len(file.content) - 4) if file.content[i:i + 4] in (b"PK\1\2", b"PK\3\4")]
    for at in spread(entries, 18):
        fields = (20, 24, 42) if file.content[at + 2] == 1 else (18, 22)
        for field in fields:
            for value in (0, 1, len(file.content), 2**31 - 1, 2**32 - 2):
                lie = bytearray(file.content)
                struct.pack_into("<I", lie, at + field, value)
                loads_the_same(file, bytes(lie), expected)


# ---- data.npz and config.json


@pytest.fixture(scope="module")
def arrays(shared_data):
    """The arrays of a short good series, as {member name: npy bytes}."""
    content = {}
    with np.load(shared_data / "data.npz") as file:
        for name in file.files:
            member = io.BytesIO()
            np.save(member, file[name][:400] if name in ("X", "states", "thetas") else file[name])
            content[f"{name}.npy"] = member.getvalue()
    return content


@pytest.fixture(scope="module")
def uncompressed(shared_data, tmp_path_factory):
    """The bytes of a data.npz that is mapped in place of being read."""
    folder = tmp_path_factory.mktemp("uncompressed")
    config = json.loads((shared_data / "config.json").read_text())
    generator.save_uncompressed({**config, "n_steps": 400}, folder)
    assert dataset.mapping_of(dataset.load_series(folder).X) is not None
    return (folder / "data.npz").read_bytes()


@pytest.fixture
def folder(tmp_path, arrays, shared_data):
    (tmp_path / "data.npz").write_bytes(zipped(arrays))
    shutil.copy(shared_data / "config.json", tmp_path)
    return tmp_path


def check_series(folder):
    """Load the series, if it loads, and check what every user of a Series relies on."""
    series = valid_or_refused(dataset.load_series, folder)
    if series is None:
        return None
    K, (n, dim) = series.n_circles, series.X.shape
    assert series.X.dtype == np.float32 and np.isfinite(series.X).all()
    assert series.states.shape == (n,) and series.states.dtype == np.int64
    assert series.states.min() >= 0 and series.states.max() < K
    assert series.thetas.shape == (n,) and np.isfinite(series.thetas).all() and series.thetas.dtype == np.float64
    process = series.process
    assert process.transition_matrix.shape == (K, K) and process.periods.shape == (K,) and process.periods.min() >= 1
    assert process.planes is None or process.planes.shape == (K, 2, dim)
    return series


def use_filter(series):
    """The exact filter on the start of a series, when it takes it."""
    process = valid_or_refused(optimal_filter.process_from_series, series)
    if process is not None:
        optimal_filter.window_floors(process, series, np.array([0]), min(30, series.n_steps), (1,))


@hostile
@given(data=st.data())
def test_damaged_data(folder, arrays, data):
    (folder / "data.npz").write_bytes(data.draw(damaged(zipped(arrays, zipfile.ZIP_DEFLATED))))
    check_series(folder)


@hostile
@given(data=st.data())
def test_damaged_arrays(folder, arrays, data):
    (folder / "data.npz").write_bytes(data.draw(damaged_member(arrays)))
    check_series(folder)


@hostile
@given(data=st.data())
def test_lying_archives(folder, arrays, data):
    compression = data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    (folder / "data.npz").write_bytes(data.draw(lying(zipped(arrays, compression))))
    check_series(folder)


@hostile
@given(data=st.data())
def test_damaged_mapped_data(folder, uncompressed, data):
    (folder / "data.npz").write_bytes(data.draw(st.one_of(damaged(uncompressed), lying(uncompressed))))
    series = check_series(folder)
    if series is not None:
        use_filter(series)


WHOLE = st.one_of(st.integers(0, 9), st.sampled_from([-1, -2**63, 2**31, 2**40, 2**63, 2**64, 10**12, 10**30, True]))
DESCR = st.one_of(
    st.sampled_from(["'<f4'", "'<f8'", "'|O'", "'<U1000000000'", "'(1000000,)f4'", "()", "[]", "('<f4',)", "{'a': 1}",
                     "[('a', '<f4', (10**9,))]", "[('a', '|O')]", "'<f16'", "'<c8'", "'|V0'", "'>i2'", "'<M8[s]'", "''",
                     "None", "('<f4', (2, -1))", "1", "'<f4,<f4'"]),
    st.text(max_size=8).map(repr))
HEADERS = st.one_of(
    st.builds("{{'descr': {}, 'fortran_order': {}, 'shape': {}, }}".format, DESCR,
              st.sampled_from(["True", "False", "1", "None"]),
              st.one_of(st.lists(WHOLE, max_size=40).map(tuple).map(repr), st.just("5"), st.just("('x',)"))),
    st.sampled_from(["(" * 5000, "{" * 3000, "[" * 200 + "]" * 200, "-" * 9000 + "1", "'", "\0", "{'descr': '<f4'}",
                     "  x\n y", "1L", "{1: 2, **3}", "9" * 6000, "f'{0}'"]),
    st.text(max_size=40))


@hostile
@given(name=st.sampled_from(["X", "states", "periods", "planes"]), header=HEADERS,
       version=st.sampled_from([1, 2, 3, 9]), bomb=st.booleans())
def test_hostile_array_headers(folder, arrays, name, header, version, bomb):
    header = header.encode("latin1", "replace")[:60000]
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    body = pickle.dumps(Bomb(folder)) if bomb else bytes(200)
    member = b"\x93NUMPY" + bytes([version, 0]) + length + header + body
    (folder / "data.npz").write_bytes(zipped({**arrays, f"{name}.npy": member}))
    check_series(folder)


@hostile
@given(name=st.sampled_from(["X", "states", "thetas", "transition_matrix", "radii", "entry_angles", "periods",
                             "planes"]),
       dtype=st.sampled_from(["f2", "f4", "f8", "g", "i1", "u1", "i4", "i8", "u8", "?", "c8", "U2", "M8[s]", ">f4"]),
       shape=st.lists(st.sampled_from([0, 1, 2, 4, 6, 40]), max_size=3), right=st.booleans(),
       value=st.sampled_from([0, 1, 3, -1, 127, 1e30, 1e300, 2**63, 2**40, 10**9, float("nan"), float("inf"), 1e-300]))
def test_hostile_values(folder, arrays, name, dtype, shape, right, value):
    if right:  # the right shape, so that the values are what counts
        shape = np.load(io.BytesIO(arrays[f"{name}.npy"])).shape
    array = np.zeros(shape, dtype)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            array.ravel()[::2] = array.dtype.type(value)
        except (ValueError, OverflowError, TypeError):
            array = array.astype("f8")
    member = io.BytesIO()
    np.save(member, array)
    (folder / "data.npz").write_bytes(zipped({**arrays, f"{name}.npy": member.getvalue()}))
    series = check_series(folder)
    if series is not None:
        use_filter(series)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
              st.sampled_from([10**400, -10**400, 1e308, 1e-308, 1e30, 5e-324, "1", "nan", 2**63, 0, 0.0, -0.0])),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=3)


@hostile
@given(changes=st.dictionaries(
    st.sampled_from(["noise_std", "dwell_mean", "dwell_std", "drift", "center_walk_std", "n_circles", "seed"]), JSON,
    min_size=1, max_size=3))
def test_hostile_config(folder, changes):
    config = json.loads((folder / "config.json").read_text())
    path = folder / "other" / "config.json"
    path.parent.mkdir(exist_ok=True)
    shutil.copy(folder / "data.npz", path.parent)
    path.write_text(json.dumps({**config, **changes}))
    series = check_series(path.parent)
    if series is not None:
        use_filter(series)
        assert isinstance(series.config.get("noise_std", 0.0), int | float)
        valid_or_refused(optimal_filter.process_or_none, series, "no exact filter")


@hostile
@given(data=st.data())
def test_damaged_config(folder, shared_data, data):
    content = (shared_data / "config.json").read_bytes()
    (folder / "config.json").write_bytes(data.draw(st.one_of(
        damaged(content), st.binary(max_size=20), st.sampled_from([b"[" * 10**5, b'{"a":' * 10**5, b"9" * 10**5]))))
    series = check_series(folder)
    if series is not None:
        use_filter(series)


# ---- checkpoints


@pytest.fixture(scope="module")
def run_folder(shared_data, tmp_path_factory):
    """A finished run named a.pt, over the small series."""
    folder = tmp_path_factory.mktemp("run")
    argv = [*SIZES, "--data-dir", str(shared_data), "--checkpoint", str(folder / "a.pt")]
    training.main(training.parse_args(argv))
    return folder


@pytest.fixture
def run_copy(run_folder, tmp_path):
    for path in run_folder.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path


def check_checkpoint(path):
    """Load the checkpoint, if it loads; then its model must run and its args must be usable or refused."""
    loaded = valid_or_refused(mamba_model.load_checkpoint, path, "cpu")
    if loaded is None:
        return
    model, args = loaded
    with torch.no_grad():
        assert model(torch.zeros(1, 5, model.feature_dim))["1"].shape == (1, 5, model.feature_dim)
    window = valid_or_refused(dataset.window_settings, args, path)
    if window is not None:
        valid_or_refused(dataset.split_windows, 3000, *window)


@hostile
@given(data=st.data(), which=st.sampled_from(["a.pt", "a_last.pt"]))
def test_damaged_checkpoints(run_copy, run_folder, data, which):
    path, content = run_copy / which, (run_folder / which).read_bytes()
    path.write_bytes(data.draw(damaged(content)))
    check_checkpoint(path)


@hostile
@given(data=st.data())
def test_damaged_pickles(run_copy, run_folder, data):
    content = members(run_folder / "a.pt")
    name = next(name for name in content if name.endswith("data.pkl"))
    (run_copy / "a.pt").write_bytes(zipped({**content, name: data.draw(damaged(content[name]))}))
    check_checkpoint(run_copy / "a.pt")


@pytest.mark.parametrize("offset", [20, 24])  # of the size in the file and of the size when read, in the directory
@pytest.mark.parametrize("value", [99, 101, 2**31])
def test_an_archive_whose_sizes_differ_is_refused_before_it_is_read(tmp_path, offset, value):
    raw = bytearray(zipped({"a/data.pkl": bytes(100)}))
    struct.pack_into("<I", raw, raw.index(b"PK\1\2") + offset, value)
    (tmp_path / "a.pt").write_bytes(raw)
    with pytest.raises(ValueError, match=r"a/data\.pkl is compressed"):
        mamba_model.check_archive(tmp_path / "a.pt")


@hostile
@given(data=st.data())
def test_lying_checkpoint_archives(run_copy, run_folder, data):
    (run_copy / "a.pt").write_bytes(data.draw(lying(zipped(members(run_folder / "a.pt")))))
    check_checkpoint(run_copy / "a.pt")


NUMBERS = [0, -1, 1, 10**12, 10**30, 2**63, 10**4000, True, None, 0.5, 1e300, float("nan"), float("inf"), "x", "64",
           "", "\ud800", [1], {}, {"a": [None]}]


def odd_tensors():
    return st.one_of(
        st.sampled_from([torch.zeros(()), torch.zeros(0), torch.zeros(0, 5), torch.ones(1).expand(10**9),
                         torch.ones(3, dtype=torch.int64), torch.ones(2, dtype=torch.complex64),
                         torch.ones(4).to_sparse(),
                         torch.full((3,), torch.nan), torch.zeros(3, device="meta"), torch.zeros(2, 3).t(),
                         torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.float8_e4m3fn),
                         torch.full((16,), 3e38), torch.ones(16, dtype=torch.float64) * 1e300]),
        st.lists(st.integers(1, 40), max_size=3).map(torch.ones))


@st.composite
def odd_changes(draw, checkpoint):
    """A checkpoint's dict with a few of its parts, on any level, replaced, removed or renamed."""
    def copy(value):
        return {key: copy(v) for key, v in value.items()} if isinstance(value, dict) else value

    new = copy(checkpoint)
    for _ in range(draw(st.integers(1, 3))):
        place = new
        key = draw(st.sampled_from(sorted(place, key=str)))
        while isinstance(place[key], dict) and place[key] and draw(st.integers(0, 9)):
            place = place[key]
            key = draw(st.sampled_from(sorted(place, key=str)))
        kind = draw(st.integers(0, 9))
        if kind == 0:
            del place[key]
        elif kind == 1:
            other = [1, "x", "output_heads.3.0.weight", "layers.7.norm.weight", "output_proj.0.weight",
                     "output_heads." + "9" * 400 + ".0.weight"]
            place[draw(st.sampled_from(other))] = place.pop(key)
        else:
            place[key] = draw(st.one_of(st.sampled_from(NUMBERS), odd_tensors()))
        if not new:
            break
    return new


@hostile
@given(data=st.data())
def test_odd_checkpoint_contents(run_copy, run_folder, data):
    checkpoint = torch.load(run_folder / "a.pt", weights_only=True)
    torch.save(data.draw(odd_changes(checkpoint)), run_copy / "a.pt")
    check_checkpoint(run_copy / "a.pt")


@hostile
@given(place=st.sampled_from(["args", "model_state_dict", "top", "whole"]), protocol=st.integers(2, 5),
       raw=st.booleans())
def test_pickled_code_in_checkpoints(run_copy, run_folder, place, protocol, raw):
    checkpoint = torch.load(run_folder / "a.pt", weights_only=True)
    if place == "whole":
        checkpoint = Bomb(run_copy)
    else:
        (checkpoint if place == "top" else checkpoint[place])["x"] = Bomb(run_copy)
    if raw:  # a plain pickle, as torch.load also takes
        (run_copy / "a.pt").write_bytes(pickle.dumps({"args": Bomb(run_copy)}, protocol))
    else:
        torch.save(checkpoint, run_copy / "a.pt", pickle_protocol=protocol)
    with pytest.raises(cli.UserError):
        mamba_model.load_checkpoint(run_copy / "a.pt", "cpu")


# ---- --resume and --eval


@pytest.fixture
def quick_end(monkeypatch):
    """The run's end without its figures, which take a second each."""
    monkeypatch.setattr(training, "finish", lambda args, files, rows, *rest: rows)
    monkeypatch.setattr(run_files, "floors", lambda *args: {})


def answered(result):
    """A script's end: well, or one line on stderr and exit code 2."""
    assert result.code in (0, 2), result
    assert result.err.count("\n") == (result.code == 2) and "Traceback" not in result.err, result.err


@hostile
@given(data=st.data())
def test_resume_from_odd_states(script, quick_end, run_copy, run_folder, data):
    checkpoint = torch.load(run_folder / "a_last.pt", weights_only=True)
    torch.save(data.draw(odd_changes(checkpoint)), run_copy / "a_last.pt")
    answered(script("masked_model_gpu_mamba_next", "--resume", "--checkpoint", run_copy / "a.pt"))


@hostile
@given(data=st.data())
def test_resume_with_an_odd_log(script, quick_end, run_copy, run_folder, data):
    shutil.copy(run_folder / "a_last.pt", run_copy)
    for name in ("a_log.csv", "a_run.json"):
        content = (run_folder / name).read_bytes()
        (run_copy / name).write_bytes(data.draw(st.one_of(damaged(content), st.binary(max_size=30), st.sampled_from(
            [b"epoch\n1\n", b"\0", "²,²\n".encode(), b"\xff\xfe", b'{"resumed": 3}', b'{"resumed": [3]}']))))
    answered(script("masked_model_gpu_mamba_next", "--resume", "--checkpoint", run_copy / "a.pt"))


@hostile
@given(data=st.data(), record=st.one_of(st.binary(max_size=20), st.sampled_from(
    [b"[" * 10**5, b"[1]", b'{"resumed": 3}', b'{"resumed": [3], "x": {"y": "\\ud800"}}', b'{"a\\nb": null}'])))
def test_eval_of_odd_checkpoints(script, quick_end, run_copy, run_folder, shared_data, data, record):
    checkpoint = torch.load(run_folder / "a.pt", weights_only=True)
    torch.save(data.draw(odd_changes(checkpoint)), run_copy / "a.pt")
    (run_copy / "a_run.json").write_bytes(record)
    answered(script("masked_model_gpu_mamba_next", "--eval", run_copy / "a.pt", "--data-dir", shared_data))


def test_resume_from_a_best_checkpoint(refused, run_copy):
    shutil.copy(run_copy / "a.pt", run_copy / "a_last.pt")
    assert "is no last state of a run" in refused("masked_model_gpu_mamba_next", "--resume", "--checkpoint",
                                                  run_copy / "a.pt")


@pytest.mark.parametrize("flag, value", [
    ("seq_len", 10**12), ("seq_len", "x"), ("batch_size", 0), ("stride", -1), ("val_fraction", 2.0),
    ("lr", float("nan"))])
def test_impossible_flags_in_a_checkpoint(refused, run_copy, shared_data, flag, value):
    for name in ("a.pt", "a_last.pt"):
        checkpoint = torch.load(run_copy / name, weights_only=True)
        checkpoint["args"][flag] = value
        torch.save(checkpoint, run_copy / name)
    assert flag.split("_")[0] in refused("masked_model_gpu_mamba_next", "--resume", "--checkpoint", run_copy / "a.pt")
    if flag != "lr":
        refused("masked_model_gpu_mamba_next", "--eval", run_copy / "a.pt", "--data-dir", shared_data)
