"""The data: one loader that checks it, sliding windows, and a validation split that leaks nothing.

Everything that reads a series goes through `load_series`: the generator's `data/data.npz` and `data/config.json`, and
recordings of the user's own. A file written with
--uncompressed is mapped, not loaded. Code that walks through a long series takes it in `blocks`, takes windows by
`gather` or rows by `pick`: these give the pages of a mapped array back, so that memory never holds more of it than one
block or batch. torch is imported only by what needs it, since scripts without a model read data too.
"""

import fnmatch
import json
import math
import mmap
import os
import shutil
import signal
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from circle_process import LARGEST_VALUE, LONGEST_PERIOD, Process, draw_series
from cli import STOP_SIGNALS, WINDOW_DEFAULTS, UserError, count, n_cores, one_line, reads_data
from text_tables import read_table

MISSING = "make it with: python markov_circles_timeseries.py --data-dir {}; or name your own recordings by --data FILE"
REMEDY = "mend it, or name other data by --data-dir or --data"
ARRAYS = ("X", "states", "thetas", "transition_matrix", "radii", "entry_angles", "periods", "planes")
LONG_ARRAYS = ("X", "states", "thetas")  # one row per time step; the others describe the process
RECORDING_SUFFIXES = (".npy", ".npz", ".csv", ".tsv")
MOST_LABELS = 1000
SHOWN_NAMES = 20  # of arrays or labels in a message
# The numbers of config.json that other modules compute with, and how large each may be.
CONFIG_NUMBERS = {"noise_std": LARGEST_VALUE, "center_walk_std": LARGEST_VALUE, "dwell_mean": 1.7e308,
                  "dwell_std": 1.7e308}
FULL_CIRCLE = 2 * np.pi + 1e-3  # radians; as a float32, 2π itself is a little larger
BLOCK_BYTES = 1 << 22  # values looked at in one go: few enough to stay in the cache
PAGES_AROUND = 1 << 21  # bytes, aligned, that the system may map at a time when one of them is touched: a huge page
ROWS_PICKED = 256  # rows between two releases of memory; each row may bring PAGES_AROUND bytes into it
SHARED_MEMORY = "/dev/shm"
# Series of --fresh that are drawn ahead, at most: a GPU may train on one in a third of the time that drawing it takes.
MOST_AHEAD, BYTES_AHEAD = 4, 1 << 30
LOCAL_HEADER = 30  # bytes of a zip member's own header, before its name and its extra field


@dataclass
class Series:
    """A series, and the process that made it where that is known.

    X (n_steps, feature_dim) float32; states (n_steps,) int64, the circle of each step; thetas (n_steps,) float64,
    radians in [0, 2π); process: a circle_process.Process, without planes in older files; config: the generator's
    flags; folder: where data.npz lies, None for a series that no file holds; source: what the user named. X, states
    and thetas are read-only views of the file where it was written with --uncompressed.

    Of a user's own recordings only X is sure: states, then labels 0…K-1, thetas and process may be None, and config is
    empty. Several recordings lie in X one behind the other; lengths: their numbers of steps, () for a single one.
    """

    X: np.ndarray
    states: np.ndarray | None = None
    thetas: np.ndarray | None = None
    process: Process | None = None
    config: dict = field(default_factory=dict)
    folder: Path | None = None
    source: Path | None = None
    lengths: tuple = ()

    @property
    def n_steps(self):
        return len(self.X)

    @property
    def feature_dim(self):
        return self.X.shape[1]

    @property
    def n_circles(self):
        """How many circles, or different labels, there are; None without either."""
        if self.process is not None:
            return self.process.n_circles
        return None if self.states is None else int(self.states.max()) + 1

    @property
    def recordings(self):
        """The first step of each recording and the step behind its last one: (n_recordings, 2) int64."""
        ends = np.cumsum(self.lengths or (self.n_steps,), dtype=np.int64)
        return np.stack([ends - (self.lengths or (self.n_steps,)), ends], axis=1)


def load_series(source):
    """Read and check a series; returns a Series. source: what --data-dir or --data names.

    A folder with a data.npz: that file and config.json, as the generator writes them, or X alone. Otherwise recordings
    of the user's own: a file of RECORDING_SUFFIXES, where FILE.npz:NAME,NAME picks arrays, or a folder of such files.

    The long arrays X, states and thetas of a file written with --uncompressed are mapped: memory holds only what is
    used of them. Raises UserError when a file is missing or damaged, or when an array is missing, has the wrong shape
    or type, holds NaN or leaves its range. Nothing is unpickled.
    """
    source = Path(source)
    reads_data(source)
    series = read_series(source)
    series.source = source
    return series


def read_series(source):
    """`load_series` without the note of where the series comes from."""
    path, names = split_names(source)
    if path.is_file() and path.suffix.lower() in RECORDING_SUFFIXES:
        return load_recordings(source, [path], names)
    if path.is_file():
        raise UserError(f"{path} is no recording that can be read; give a {', '.join(RECORDING_SUFFIXES)} file")
    if names or path.suffix.lower() in RECORDING_SUFFIXES:
        raise UserError(f"{path} not found; check the name")
    if (path / "data.npz").is_file():
        return checked_series(path / "data.npz", read_npz(path / "data.npz", ARRAYS))
    files = sorted(file for file in path.glob("*") if file.suffix.lower() in RECORDING_SUFFIXES and file.is_file()
                   and not file.name.startswith("."))
    if not files:
        raise UserError(f"{path / 'data.npz'} not found; {MISSING.format(path)}")
    return load_recordings(source, files, None)


def checked_series(path, arrays):
    """The Series of the arrays {name: array} of the npz at `path`. Raises UserError where they are wrong."""
    problem = find_problem(arrays)
    if problem:
        raise UserError(f"{path}: {problem}; {REMEDY}")
    X = np.ascontiguousarray(arrays.pop("X"), dtype=np.float32)
    states, thetas = arrays.pop("states", None), arrays.pop("thetas", None)
    thetas = None if thetas is None else thetas.astype(np.float64, copy=False)
    if not arrays:
        return Series(X, None if states is None else numbered(states), thetas)
    for name in arrays:
        arrays[name] = arrays[name].astype(np.int64 if name == "periods" else np.float64)
    config = load_config(path.parent)
    process = Process(**arrays, noise_std=config.get("noise_std"))
    return Series(X, states.astype(np.int64, copy=False), thetas, process, config, path.parent)


def load_config(data_dir):
    """`config.json` as a dict; empty when the file isn't there (older data). Raises UserError when damaged."""
    path = Path(data_dir) / "config.json"
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); {REMEDY}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a JSON object; {REMEDY}")
    for name, largest in CONFIG_NUMBERS.items():
        value = config.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= largest:
            raise UserError(f"{path}: {name} must be a number from 0 to {largest:g}; {REMEDY}")
    return config


def read_npz(path, choose):
    """Arrays of an npz, {name: array}, in the order of the file; the others are not read.

    choose: the names wanted, or a function of the list of all names in the file that gives them. Raises UserError when
    the file is damaged or doesn't fit in memory.
    """
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            members = {}
            check_directory(archive, file)
            for info in archive.infolist():
                archive.open(info).close()  # raises an error if the member's own header has another name
                members[info.filename.removesuffix(".npy")] = info
            wanted = choose(list(members)) if callable(choose) else choose
            return {name: read_array(archive, file, info) for name, info in members.items() if name in wanted}
    except UserError:
        raise
    except Exception as error:  # zipfile and numpy let out whatever they stumble over in a hostile file
        raise unreadable(path, error) from None


def check_directory(archive, file):
    """Raise ValueError unless the directory of the open zip file lists as many members as its end record counts.

    zipfile doesn't compare the two: a damaged length can hide the entries behind it, and an array that is missing may
    be one that the user's own recordings never have.
    """
    file.seek(-len(archive.comment) - 12, os.SEEK_END)  # the count of members, in a record of 22 bytes at the end
    counted = int.from_bytes(file.read(2), "little")
    if counted not in (len(archive.infolist()), 0xFFFF):  # 0xFFFF: counted elsewhere, in files of very many members
        raise ValueError(f"its directory lists {len(archive.infolist())} of {counted} members")


def unreadable(path, error):
    """The UserError for a file of arrays whose reading ended in `error`."""
    if "allow_pickle" in str(error):
        return UserError(f"{path} is damaged or holds Python objects, which are never unpickled; save each recording "
                         "as an array of numbers of its own, as np.savez(FILE, *recordings) does")
    wrong = "does not fit in memory" if isinstance(error, MemoryError) else "is damaged"
    return UserError(f"{path} {wrong} ({one_line(error)[:200] or type(error).__name__}); {REMEDY}")


# ---------------------------------------------------------------------------------------------- the user's own files


def split_names(source):
    """FILE.npz:NAME,NAME as (the path of the file, [names]); (the path, None) where no array is named."""
    path, colon, names = str(source).rpartition(":")
    if colon and path.lower().endswith(".npz") and not source.exists():
        return Path(path), names.split(",")
    return source, None


def load_recordings(source, files, names):
    """The Series of one or several recordings. source: as the user named them; files: the paths of all files; names:
    of the arrays wanted of an npz, or None. Prints what was read."""
    recordings = []
    for path in files:
        arrays = read_recording(path, names)
        if len(files) == 1 and set(arrays) & set(ARRAYS) - set(LONG_ARRAYS) and not names:
            return checked_series(path, arrays)  # the generator's own data.npz, named as a file
        labels = {name: arrays.pop(name) for name in ("states",) if name in arrays and "X" in arrays}
        for name, X in arrays.items():
            if not names and name in ARRAYS and name != "X":
                continue
            where = f"{path}:{name}" if path.suffix.lower() == ".npz" else str(path)
            recordings.append((where, checked_recording(where, X, labels.get("states"))))
    first, (X, _) = recordings[0]
    for where, (other, _) in recordings:
        if other.shape[1] != X.shape[1]:
            raise UserError(f"{where} has {other.shape[1]} features and {first} has {X.shape[1]}; all recordings need "
                            "the same features")
    lengths = tuple(len(X) for _, (X, _) in recordings)
    print(f"{source}: " + (f"{len(lengths)} recordings of {shortened(f'{n:,}' for n in lengths)} steps"
                           if len(lengths) > 1 else count(lengths[0], "step")) + f", {count(X.shape[1], 'feature')}")
    if sum(lengths) < 2:
        raise UserError(f"{source} has a single time step; a series needs two or more")
    states = [states for _, (_, states) in recordings]
    return Series(X if len(lengths) == 1 else np.concatenate([X for _, (X, _) in recordings]),
                  None if any(row is None for row in states) else numbered(np.concatenate(states)), lengths=lengths)


def read_recording(path, names):
    """The arrays of one file, {name: array}. Of an npz: those that `names` names (with * and ? for any characters);
    without names X and what belongs to it, or else the only array there is."""
    if path.suffix.lower() in (".csv", ".tsv"):
        return {"X": read_table(path)}
    if path.suffix.lower() == ".npy":
        try:
            return {"X": np.load(path, allow_pickle=False)}
        except Exception as error:  # as in read_npz
            raise unreadable(path, error) from None

    def choose(present):
        if names:
            for name in names:
                if not fnmatch.filter(present, name):
                    raise UserError(f"{path} has no array {name}; it holds {shortened(present)}")
            return [name for name in present if any(fnmatch.fnmatchcase(name, wanted) for wanted in names)]
        if "X" in present:
            return ARRAYS
        if len(present) != 1:
            raise UserError(f"{path} holds {f'the arrays {shortened(present)}' if present else 'no array'}; name the "
                            f"recording, or several with commas, as in --data {path}:{(present or ['NAME'])[0]}")
        return present

    return read_npz(path, choose)


def checked_recording(where, X, states):
    """(X (n_steps, feature_dim) float32, states (n_steps,) or None) of one recording; an X of one dimension is one
    feature. Raises UserError, which begins with `where`, when either makes no recording."""
    X = X[:, None] if X.ndim == 1 else X
    if X.ndim != 2 or 0 in X.shape:
        raise UserError(f"{where} must have shape (n_steps, n_features), not {X.shape}: one row per time step")
    problem = find_problem({"X": X} | ({} if states is None else {"states": states}), least_steps=1)
    if problem:
        raise UserError(f"{where}: {problem}; {REMEDY}")
    return np.ascontiguousarray(X, dtype=np.float32), states


def numbered(states):
    """Labels (n_steps,), numbers or text, as int64 0…K-1 in their order; prints which is which unless they are that."""
    labels, numbers = np.unique(states, return_inverse=True)
    if labels.dtype.kind not in "iu" or not np.array_equal(labels, np.arange(len(labels))):
        print("labels: " + shortened(f"{number} is {label}" for number, label in enumerate(labels)))
    return numbers.reshape(-1).astype(np.int64)


def shortened(names):
    """Names with commas, only the first SHOWN_NAMES of them."""
    names = list(map(str, names))
    return ", ".join(names[:SHOWN_NAMES]) + (f", … ({len(names)} in all)" if len(names) > SHOWN_NAMES else "")


def read_array(archive, file, info):
    """One array of an npz. An uncompressed one is mapped read-only in place of being read.

    archive: the zipfile.ZipFile of the open `file`; info: the array's entry in its directory. Raises an error unless
    the bytes are those that were written. Memory is filled with bytes that are really there, whatever headers say.
    """
    if info.compress_type == zipfile.ZIP_STORED:
        return map_array(file, info)
    if info.compress_type != zipfile.ZIP_DEFLATED:
        raise ValueError(f"{info.filename} is compressed in a way that NumPy does not use")
    with archive.open(info) as member:
        array = np.lib.format.read_array(member, allow_pickle=False)
        if member.read(1):  # zipfile checks the CRC where the member ends
            raise ValueError(f"{info.filename} is longer than its array")
    return array


# ---------------------------------------------------------------------------------------------- mapped from the file


def map_array(file, info):
    """The array of an uncompressed member of an npz, mapped read-only, or read where its values lie unaligned.

    The CRC is taken over the mapped bytes themselves, so what is used is what was checked.
    """
    # The values follow the member's own header, its name and an extra field; bytes 26 to 29 hold the lengths of both.
    whole = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    lengths = whole[info.header_offset + 26:info.header_offset + LOCAL_HEADER].view("<u2")
    first = info.header_offset + LOCAL_HEADER + int(lengths.sum())
    member = whole[first:first + info.file_size]
    if len(member) != info.file_size or crc32(member) != info.CRC:
        raise zipfile.BadZipFile(f"bad CRC-32 for {info.filename}")
    file.seek(first)
    np.lib.format.read_magic(file)
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("object arrays need allow_pickle")
    values = member[file.tell() - first:].view(dtype).reshape(shape, order="F" if fortran_order else "C")
    return np.require(values, requirements="A")  # the generator aligns the values in the file; np.savez does not


def mapping_of(array):
    """The mmap.mmap in which the values of an array lie, or None when they are in memory."""
    while isinstance(array, np.ndarray):
        array = array.base
    # np.frombuffer keeps its buffer as a memoryview.
    array = array.obj if isinstance(array, memoryview) else array
    return array if isinstance(array, mmap.mmap) else None


def release(array):
    """Give the memory back that the pages of a mapped array take in this process; they are read again when used again.

    array: a mapped array, or consecutive rows of one; an array in memory is left alone. The values stay in the
    system's file cache as long as there is room.
    """
    mapping = mapping_of(array)
    if mapping is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    first = array.ctypes.data - np.frombuffer(mapping, np.uint8, 1).ctypes.data
    last = first + array.nbytes + -(first + array.nbytes) % PAGES_AROUND
    first -= first % PAGES_AROUND
    mapping.madvise(mmap.MADV_DONTNEED, first, min(last, len(mapping)) - first)


def blocks(array, n_bytes=BLOCK_BYTES):
    """Yields the array in consecutive blocks of rows, about n_bytes each; releases a mapped block before the next."""
    rows = max(1, n_bytes * len(array) // max(array.nbytes, 1))
    for first in range(0, len(array), rows):
        block = array[first:first + rows]
        yield block
        release(block)


def pick(array, rows):
    """array[rows] for row numbers anywhere in a long array; the pages of a mapped one are released on the way."""
    picked = np.empty((len(rows), *array.shape[1:]), array.dtype)
    for first in range(0, len(rows), ROWS_PICKED):
        some = slice(first, first + ROWS_PICKED)
        picked[some] = array[rows[some]]
        release(array)
    return picked


def rows_of(values, steps):
    """values[steps], or None where there are no values: the labels of some steps, if there are labels."""
    return None if values is None else values[steps]


def crc32(array):
    """The CRC-32 of an array's values in C order: the same for a mapped and a compressed file."""
    value = 0
    for block in blocks(array):
        value = zlib.crc32(block, value)
    return value


def data_crc32(series):
    """A number that tells the data of two Series apart: their values, and where one recording ends and another begins.
    Of a single recording, the CRC-32 of X."""
    value = crc32(series.X)
    return zlib.crc32(np.array(series.lengths, np.int64), value) if len(series.lengths) > 1 else value


def find_problem(arrays, least_steps=2):
    """What is wrong with the arrays of a data.npz, {name: array}, in words, or None.

    It needs X alone; but where one array describes the process, all do, apart from the planes.
    """
    has_process = any(name in arrays for name in ARRAYS if name not in LONG_ARRAYS)
    lacking = [name for name in ARRAYS[:-1] if name not in arrays and (has_process or name == "X")]
    if lacking:
        return f"it lacks the array {lacking[0]}"
    X, radii = arrays["X"], arrays.get("radii", np.zeros(1))
    if X.ndim != 2 or X.shape[0] < least_steps or X.shape[1] < 1:
        return f"X must have shape (n_steps, n_features), not {X.shape}"
    if radii.ndim != 1 or len(radii) < 1:
        return f"radii must have shape (n_circles,), not {radii.shape}"
    if not has_process and "states" in arrays:
        problem = find_label_problem(arrays["states"], len(X))
        if problem:
            return problem
        arrays = {name: array for name, array in arrays.items() if name != "states"}
    (n_steps, dim), K = X.shape, len(radii)
    angle = -FULL_CIRCLE, FULL_CIRCLE
    rules = {  # shape, kinds of dtype, smallest and largest value
        "X": ((n_steps, dim), "fiu", -LARGEST_VALUE, LARGEST_VALUE),
        "states": ((n_steps,), "iu", 0, K - 1),
        "thetas": ((n_steps,), "fiu", *angle),
        "transition_matrix": ((K, K), "fiu", 0, 1 + 1e-6),
        "radii": ((K,), "fiu", 1 / LARGEST_VALUE, LARGEST_VALUE),
        "entry_angles": ((K,), "fiu", *angle),
        "periods": ((K,), "iu", 1, LONGEST_PERIOD),
        "planes": ((K, 2, dim), "fiu", -1.001, 1.001),
    }
    for name, array in arrays.items():
        shape, kinds, low, high = rules[name]
        if array.shape != shape:
            return f"{name} must have shape {shape}, not {array.shape}"
        if array.dtype.kind not in kinds:
            wanted = {"iu": "whole numbers", "fiu": "numbers"}[kinds]
            return f"{name} must hold {wanted}, not {array.dtype}"
        # Written so that NaN, which is the minimum and the maximum of a block that holds it, fails the comparison.
        if not all(low <= float(block.min()) and float(block.max()) <= high for block in blocks(array)):
            gap = find_gap(array) if name == "X" else None
            return gap or f"{name} holds NaN or values outside {low:g}…{high:g}"
    if has_process and not np.allclose(arrays["transition_matrix"].sum(axis=1), 1, atol=1e-6):
        return "the rows of transition_matrix must sum to 1"
    if "planes" in arrays and not np.allclose(gram(arrays["planes"]), np.eye(2), atol=2e-3):
        return "planes must be pairs of orthogonal unit vectors"
    return None


def find_gap(X):
    """How many NaN and infinite values X (n_steps, n_features) holds and where the first is, in words, or None."""
    n_gaps, first, step = 0, None, 0
    for block in blocks(X):
        rows, columns = np.nonzero(~np.isfinite(block))
        if len(rows) and first is None:
            first = step + rows[0], columns[0]
        n_gaps, step = n_gaps + len(rows), step + len(block)
    if first is None:
        return None
    return (f"X holds {count(n_gaps, 'NaN or infinite value')}, the first in row {first[0]}, column "
            f"{first[1]} (counted from 0): a recording with gaps is several recordings, each saved by itself")


def find_label_problem(states, n_steps):
    """What is wrong with the labels of a user's own recording, in words, or None."""
    if states.shape != (n_steps,):
        return f"states must have shape ({n_steps},), not {states.shape}: one label per time step"
    if states.dtype.kind not in "iubUS":
        return f"states must hold labels, whole numbers or text, not {states.dtype}"
    n_labels = len(np.unique(states))
    if n_labels > MOST_LABELS:
        return f"states holds {n_labels:,} different labels, and at most {MOST_LABELS:,} can be told apart"
    return None


def gram(planes):
    """The scalar products of the two vectors of each plane: (K, 2, dim) to (K, 2, 2)."""
    planes = planes.astype(np.float64)
    return planes @ planes.transpose(0, 2, 1)


def visits(states):
    """The visits of a state sequence (n_steps,): circles, first steps and lengths in steps, each (n_visits,)."""
    circles, starts, first, before = [], [], 0, -1
    for block in blocks(states):
        begins = np.flatnonzero(np.diff(block, prepend=before))
        circles.append(block[begins])
        starts.append(first + begins)
        first, before = first + len(block), block[-1]
    starts = np.concatenate(starts)
    return np.concatenate(circles), starts, np.diff(starts, append=first)


def check_fits_model(series, model, checkpoint):
    """Raise UserError when a model trained on another number of features meets this series."""
    if model.feature_dim != series.feature_dim:
        raise UserError(f"{checkpoint} predicts {model.feature_dim} features but the data have "
                        f"{series.feature_dim}; give the --data-dir or --data it was trained on")


def window_settings(args, checkpoint):
    """seq_len, stride and val_fraction that a model was trained with; args: the flags that its checkpoint holds.

    Older files don't name all of them: the training script's defaults take their place, and a line says so. Raises
    UserError when one makes no sense.
    """
    missing = [name for name in WINDOW_DEFAULTS if name not in args]
    if missing:
        print(f"{checkpoint} doesn't name its " + ", ".join(f"{name} (taken: {WINDOW_DEFAULTS[name]})"
                                                            for name in missing))
    seq_len, stride, val_fraction = (args.get(name, default) for name, default in WINDOW_DEFAULTS.items())
    if not (isinstance(seq_len, int) and 1 < seq_len <= LONGEST_PERIOD
            and isinstance(stride, int) and 0 < stride <= LONGEST_PERIOD
            and isinstance(val_fraction, float) and 0 < val_fraction < 1):
        raise UserError(f"the seq_len, stride and val_fraction that {checkpoint} names make no windows; give another "
                        "--checkpoint")
    return seq_len, stride, val_fraction


def first_validation_step(n_steps, val_fraction):
    """The first time step of validation: training sees the steps before it, validation those from it on."""
    return n_steps - round(n_steps * val_fraction)


def window_starts(first, last, seq_len, stride):
    """First steps of the windows of seq_len steps, every `stride` steps, that lie within [first, last)."""
    return np.arange(first, last - seq_len + 1, stride, dtype=np.int64)


def starts_in_recordings(recordings, first, last, seq_len, stride):
    """`window_starts` within [first, last) of every recording, one after the other: no window crosses a border.

    recordings: (n_recordings, 2), as Series.recordings.
    """
    return np.concatenate([window_starts(max(first, begin), min(last, end), seq_len, stride)
                           for begin, end in np.asarray(recordings).tolist()])


def split_windows(n_steps, seq_len, stride, val_fraction, recordings=None, held_back=0):
    """Window starts for training (n,) and for validation (m,), int64, and the first validation step.

    The windows of both kinds lie wholly on their side of that step, so that no time step is in both. recordings: as
    Series.recordings where there are several; a window lies in one of them. The split is one of the whole: validation
    has the last recordings, and the end of one that the step cuts; the last `held_back` steps are neither's. Raises
    UserError when either side has no window.
    """
    recordings = [(0, n_steps)] if recordings is None else recordings
    longest = int(np.diff(recordings).max())
    if seq_len > longest:
        what = (f"the series ({n_steps:,} steps)" if len(recordings) == 1 else
                f"every recording (at most {longest:,} steps)")
        raise UserError(f"--seq-len {seq_len} is longer than {what}; use a smaller one")
    boundary = first_validation_step(n_steps, val_fraction)
    train = starts_in_recordings(recordings, 0, boundary, seq_len, stride)
    val = starts_in_recordings(recordings, boundary, n_steps - held_back, seq_len, stride)
    for starts, name, length in ((train, "training", boundary), (val, "validation", n_steps - held_back - boundary)):
        if len(starts) == 0:
            fewer = "fewer than" if length < seq_len else "but none of its recordings has as many as"
            raise UserError(f"the {name} part has {count(length, 'step')}, {fewer} --seq-len {seq_len}; "
                            "use a smaller --seq-len, another --val-fraction or a longer series")
    return train, val, boundary


def training_ends(recordings, boundary):
    """The step behind the training part of each recording that has one: (n,) int64, ascending."""
    return np.minimum(recordings[recordings[:, 0] < boundary, 1], boundary)


def recordings_at(recordings, starts):
    """The recordings, rows (first, end) as of Series.recordings, in which the time steps `starts` (n,) lie: (n, 2)."""
    return recordings[np.searchsorted(recordings[:, 0], starts, side="right") - 1]


def into_recordings(starts, length, recordings):
    """Window starts (n,), each moved back to where a window of `length` steps lies in one recording.

    That is the recording of the start itself, or else the last one before it that is long enough, or the first one
    after it. Raises UserError when none is long enough.
    """
    begins, ends = recordings[np.diff(recordings, axis=1)[:, 0] >= length].T
    if len(begins) == 0:
        raise UserError(f"no recording has {length:,} steps; the longest has {int(np.diff(recordings).max()):,}")
    chosen = np.maximum(np.searchsorted(begins, starts, side="right") - 1, 0)
    return np.clip(starts, begins[chosen], ends[chosen] - length)


def jittered(starts, last, seq_len, stride, generator):
    """Training starts, each moved forward by 0…stride-1 random steps, but never so far that its window passes `last`.

    starts: (n,) int64 tensor; last: a step, or with several recordings `training_ends`, of which the first behind the
    start counts; generator: a torch.Generator on its device. So a step is seen at other positions in its window from
    epoch to epoch.
    """
    import torch

    shift = torch.randint(stride, starts.shape, generator=generator, device=starts.device)
    ends = torch.as_tensor(last, device=starts.device).reshape(-1)
    return torch.minimum(starts + shift, ends[torch.searchsorted(ends, starts, right=True)] - seq_len)


def epoch_batches(starts, last, seq_len, stride, batch_size, seed, epoch):
    """The window starts of an epoch, (steps, batch) int64: shuffled and jittered by the seed and the epoch alone.

    starts: (n,) training starts; last, seq_len, stride: as in `jittered`; batch_size: at most so many per step. All
    steps have the same size, so that one compiled or captured step serves them all; where the windows don't divide
    evenly, the last step is filled up with the epoch's first windows.
    """
    import torch

    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.from_numpy(starts)[torch.randperm(len(starts), generator=generator)]
    steps = math.ceil(len(order) / batch_size)
    size = math.ceil(len(order) / steps)
    order = order.repeat(math.ceil(steps * size / len(order)))[:steps * size]
    return jittered(order, last, seq_len, stride, generator).view(steps, size)


def unknown_of_process(series):
    """What isn't known, but must be to draw a new series of the process that made `series`: a list of names."""
    unknown = [name for name in ("dwell_mean", "dwell_std", "noise_std") if name not in series.config]
    return unknown or ([] if series.process is not None and series.process.planes is not None else ["planes"])


def check_drawable(series, windows, n_steps, n_epochs):
    """Say how many steps a run with a new series per epoch will see. Raises UserError when none can be drawn."""
    unknown = unknown_of_process(series)
    if unknown:
        raise UserError("--fresh draws new series of the process, and these data don't say what it is "
                        f"({', '.join(unknown)} missing); leave --fresh out")
    if not windows.on_device:
        raise UserError("--fresh needs room for the series on the device; use a shorter series or leave --fresh out")
    print(f"each epoch has a new series of {n_steps:,} steps: {n_steps * n_epochs:,} different steps in all")


def training_windows(args, series, n_steps, device):
    """(the Windows of a training run, its Scaling or None); args: the run's flags; n_steps: those of its training part.
    Raises UserError when --fresh can't be done."""
    scaling = scaling_of(series.X[:n_steps], args.mixture > 0) if args.normalise else None
    windows = Windows(series.X.copy() if args.fresh else series.X, args.seq_len, device, scaling)
    if args.fresh:
        check_drawable(series, windows, n_steps, args.epochs)
    return windows, scaling


class FreshParts:
    """A newly drawn series of n_steps steps per epoch, of the process that made `series`.

    Those of the next epochs are drawn in the background, as many at a time as cores and memory allow, so that training
    doesn't wait. An epoch's series depends on the seed and the epoch alone: a resumed run, and each of several ranks,
    sees the same one.
    """

    def __init__(self, series, n_steps, seed, n_epochs):
        self.series, self.n_steps, self.seed, self.n_epochs = series, n_steps, seed, n_epochs
        fit = BYTES_AHEAD // (n_steps * series.feature_dim * np.dtype(np.float32).itemsize)
        self.ahead = max(1, min(MOST_AHEAD, n_cores() - 1, fit))  # one core is left to training
        self.pool, self.drawn = ThreadPoolExecutor(self.ahead), {}

    def draw(self, epoch):
        # Three numbers: no series that the generator draws from its one seed is among these.
        seed = [self.seed, epoch, self.n_steps]
        return draw_series(self.series.process, self.series.config, self.n_steps, seed)[0]

    def part(self, epoch):
        """The series of an epoch, X (n_steps, feature_dim) float32."""
        wanted = range(epoch, min(epoch + self.ahead + 1, self.n_epochs))
        for other in set(self.drawn) - set(wanted):  # a run that is resumed has asked for the first epoch before
            self.drawn.pop(other).cancel()
        self.drawn |= {e: self.pool.submit(self.draw, e) for e in wanted if e not in self.drawn}
        return self.drawn.pop(epoch).result()


def gather(X, starts, seq_len):
    """The windows X[start : start + seq_len]: a tensor (n, seq_len, feature_dim).

    X (n_steps, feature_dim): a tensor, of which the windows are taken by one indexing call on its device, or an array,
    in memory or mapped, whose windows are copied into a tensor on the CPU. starts: (n,) int64; a tensor on the same
    device when X is a tensor.
    """
    import torch

    if isinstance(X, torch.Tensor):
        return X[starts[:, None] + torch.arange(seq_len, device=starts.device)]
    windows = [X[start:start + seq_len] for start in torch.as_tensor(starts).tolist()]
    copy = torch.from_numpy(np.stack(windows))
    for window in windows:
        release(window)
    return copy


def fits_on(device, X):
    """Whether the whole series X may lie on the device as a tensor.

    On a CPU it does already, unless it is mapped from its file. On a GPU it may take up to a third of the free memory.
    """
    import torch

    if device.type == "cpu":
        return mapping_of(X) is None
    return X.nbytes < torch.cuda.mem_get_info(device)[0] / 3


def to_device(X, device):
    """The series X as a tensor on the device; a mapped one travels block by block."""
    import torch

    if mapping_of(X) is None:
        return torch.from_numpy(X).to(device)
    tensor, first = torch.empty(X.shape, device=device), 0
    for block in blocks(X):
        tensor[first:first + len(block)] = torch.from_numpy(block.copy())
        first += len(block)
    return tensor


class Scaling(NamedTuple):
    """What --normalise takes away from each feature and divides it by: mean and std, (feature_dim,) float64 each."""

    mean: np.ndarray
    std: np.ndarray

    def tensors(self):
        """What a checkpoint holds of it."""
        import torch

        return {name: torch.from_numpy(values) for name, values in self._asdict().items()}


def scaling_of(X, one_std=False):
    """The Scaling of X (n_steps, feature_dim), to be taken over the training part. A feature that never changes has
    the std 1. one_std: one std for all features, the root of their mean variance."""
    mean = sum(block.sum(axis=0, dtype=np.float64) for block in blocks(X)) / len(X)
    variance = sum(np.square(block - mean).sum(axis=0) for block in blocks(X)) / len(X)
    if one_std:
        variance = np.full_like(variance, variance.mean())
    # Of a constant that float32 can't sum exactly a trace of variance is left.
    constant = variance <= (1e-7 * np.abs(mean))**2
    return Scaling(mean, np.where(constant, 1.0, np.sqrt(variance)))


def scaled(values, scaling):
    """values (…, feature_dim), arrays or tensors, through a pair (mean, std) of the same kind; None changes nothing."""
    return values if scaling is None else (values - scaling[0]) / scaling[1]


class Windows:
    """The windows of one series, cut out where the series lies and delivered on a device.

    X: (n_steps, feature_dim) float32 array, in memory or mapped. `on_device` says whether the whole series lies on the
    device as a tensor; otherwise `X` stays the array, and `loader` cuts windows out of it in other processes.
    `starts_device` is where the tensors of window starts that `at` gets should live. scaling: a Scaling that is applied
    to what is delivered, or None.
    """

    def __init__(self, X, seq_len, device, scaling=None):
        import torch

        self.scaling = None if scaling is None else [
            torch.tensor(values, dtype=torch.float32, device=device) for values in scaling]
        self.seq_len, self.device, self.through_pipes = seq_len, torch.device(device), None
        self.on_device = fits_on(self.device, X)
        self.X = to_device(X, self.device) if self.on_device else X
        self.starts_device = self.device if self.on_device else torch.device("cpu")

    def at(self, starts):
        """The windows that begin at the steps `starts`, (n,) int64 on `starts_device`: (n, seq_len, feature_dim)."""
        return scaled(self.cut(starts).to(self.device), self.scaling)

    def put(self, X):
        """Replace the first steps of the series, which is on the device, by those of X (n, feature_dim), an array."""
        import torch

        self.X[:len(X)].copy_(torch.from_numpy(X))  # in place: a captured CUDA graph reads from these addresses

    def loader(self, batches, num_workers):
        """Yields the windows of each batch in order, on the device, cut out by `num_workers` other processes (0: by
        this one). It is meant for a series that is not on the device; batches: a list of lists of window starts.
        """
        import torch
        from torch.utils.data import DataLoader

        cut = self.cut
        if num_workers and not self.shared_memory_suffices(len(batches[0]), num_workers):
            cut = self.cut_as_array
        loader = DataLoader(batches, batch_size=None, collate_fn=cut, num_workers=num_workers,
                            worker_init_fn=ignore_stop_signals, pin_memory=self.device.type == "cuda")
        for windows in loader:
            yield scaled(torch.as_tensor(windows).to(self.device, non_blocking=True), self.scaling)

    def shared_memory_suffices(self, batch_size, num_workers):
        """Whether the batches that `num_workers` processes cut out ahead find room in /dev/shm, where tensors pass from
        one process to another; a container often has 64 MB. A worker without room would be killed, or wait for ever.

        Arrays pass through pipes in place of that, which takes longer; the first time a line says so.
        """
        if self.through_pipes is None:
            try:
                free = shutil.disk_usage(SHARED_MEMORY).free
            except OSError:  # a system without such a folder
                free = math.inf
            # Two batches per worker are under way, and one is in use.
            wanted = (2 * num_workers + 1) * batch_size * self.seq_len * self.X.shape[1] * self.X.itemsize
            self.through_pipes = free < 1.1 * wanted
            if self.through_pipes:
                print(f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free, too little for the {wanted / 1e6:.0f} MB of "
                      f"batches of {num_workers} loader processes: they go through pipes, which is slower")
        return not self.through_pipes

    def cut(self, starts):
        """The windows that begin at the steps `starts`, where the series lies."""
        return gather(self.X, starts, self.seq_len)

    def cut_as_array(self, starts):
        return self.cut(starts).numpy()


def ignore_stop_signals(worker):
    """Make a loader process outlive the signals that end a run: a scheduler sends them to all processes of a job, and
    the run, which stops by itself, still needs the batches of its step. It ends its workers then."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
