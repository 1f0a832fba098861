"""The data: one loader that checks it, sliding windows, and a validation split that leaks nothing.

Everything that reads `data/data.npz` and `data/config.json` goes through `load_series`. A file written with
--uncompressed is mapped, not loaded: what works on it passes through it in `blocks` or takes windows by `gather`, and
then never holds more of it in memory than one block or batch.
"""

import json
import mmap
import os
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from circle_process import LARGEST_VALUE, LONGEST_PERIOD
from cli import WINDOW_DEFAULTS, UserError, one_line

REMEDY = "make it anew with: python markov_circles_timeseries.py --data-dir {}"
DEFLATE_MAX_RATIO = 1032  # no DEFLATE stream expands by more (zlib's technical notes)
# The numbers of config.json that are used, and how large they may be.
CONFIG_NUMBERS = {"noise_std": LARGEST_VALUE, "center_walk_std": LARGEST_VALUE, "dwell_mean": 1.7e308,
                  "dwell_std": 1.7e308}
BLOCK_BYTES = 1 << 22  # values looked at in one go: few enough to stay in the cache
MAPPED = {"X.npy": "=f4", "states.npy": "=i8", "thetas.npy": "=f8"}  # as long as the series: the types they map as
PAGES_AROUND = 1 << 21  # bytes, aligned, that the system may map at a time when one of them is touched: a huge page
ROWS_PICKED = 256  # at a time; each may bring PAGES_AROUND into memory
LOCAL_HEADER = 30  # bytes of a zip member's own header, before its name and its extra field


@dataclass
class Series:
    """A series and the process that made it.

    X (n_steps, feature_dim) float32; states (n_steps,) int64, the circle of each step; thetas (n_steps,) float64,
    radians in [0, 2π); transition_matrix (K, K); radii (K,); entry_angles (K,) radians; periods (K,) int64, steps a
    revolution; planes (K, 2, feature_dim), orthonormal pairs, or None in older files; config: the generator's flags.
    X, states and thetas are read-only views of the file where it was written with --uncompressed.
    """

    X: np.ndarray
    states: np.ndarray
    thetas: np.ndarray
    transition_matrix: np.ndarray
    radii: np.ndarray
    entry_angles: np.ndarray
    periods: np.ndarray
    planes: np.ndarray | None = None
    config: dict = field(default_factory=dict)

    @property
    def n_steps(self):
        return len(self.X)

    @property
    def feature_dim(self):
        return self.X.shape[1]

    @property
    def n_circles(self):
        return len(self.radii)


def load_series(data_dir):
    """Read and check `data_dir/data.npz` and `data_dir/config.json`; returns a Series.

    X, states and thetas of a file written with --uncompressed are mapped: memory holds what is used of them. Raises
    UserError when a file is missing or damaged, an array is missing, has a wrong shape or type, or holds NaN or
    infinity. Nothing is unpickled.
    """
    data_dir = Path(data_dir)
    path, remedy = data_dir / "data.npz", REMEDY.format(data_dir)
    if not path.is_file():
        raise UserError(f"{path} not found; {remedy}")
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            arrays = {name: read_member(archive, file, name + ".npy") for name in
                      ("X", "states", "thetas", "transition_matrix", "radii", "entry_angles", "periods")}
            has_planes = "planes.npy" in archive.namelist()
            planes = read_member(archive, file, "planes.npy") if has_planes else None
    except KeyError as error:
        raise UserError(f"{path} lacks the array {one_line(error.args[0])}; {remedy}") from None
    except MemoryError:
        raise  # the sizes were checked: the data are that large
    except Exception as error:  # zipfile and numpy let out whatever they stumble over in a hostile file
        raise UserError(f"{path} is damaged ({one_line(error)[:200] or type(error).__name__}); {remedy}") from None
    series = Series(**arrays, planes=planes, config=load_config(data_dir))
    problem = find_problem(series)
    if problem:
        raise UserError(f"{path}: {problem}; {remedy}")
    series.X = np.ascontiguousarray(series.X, dtype=np.float32)
    series.states = series.states.astype(np.int64, copy=False)
    series.periods = series.periods.astype(np.int64)
    for name in ("thetas", "transition_matrix", "radii", "entry_angles"):
        setattr(series, name, getattr(series, name).astype(np.float64, copy=False))
    if planes is not None:
        series.planes = planes.astype(np.float64)
    return series


def load_config(data_dir):
    """`config.json` as a dict; empty when the file isn't there (older data). Raises UserError when damaged."""
    path = Path(data_dir) / "config.json"
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); {REMEDY.format(data_dir)}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a JSON object; {REMEDY.format(data_dir)}")
    for name, largest in CONFIG_NUMBERS.items():
        value = config.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= largest:
            raise UserError(f"{path}: {name} must be a number from 0 to {largest:g}; {REMEDY.format(data_dir)}")
    return config


def read_member(archive, file, name):
    """One array of an npz, its header checked against the bytes that are really there before memory is taken.

    archive: the zipfile.ZipFile of the open `file`. An array that is stored as it is used (see MAPPED) is mapped
    read-only in place of being read. Raises KeyError when it isn't there, ValueError or BadZipFile when the bytes
    can't be trusted.
    """
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise KeyError(name.removesuffix(".npy")) from None
    if info.file_size > max(info.compress_size, 1) * DEFLATE_MAX_RATIO:
        raise ValueError(f"{name} declares more bytes than it can hold")
    if info.header_offset + LOCAL_HEADER + info.compress_size > os.fstat(file.fileno()).st_size:
        raise ValueError(f"{name} declares more bytes than the file has")
    with archive.open(info) as member:
        shape, fortran_order, dtype = read_npy_header(member, name)
        count = 1
        for size in shape:
            count *= size
        header = member.tell()
        if header + count * dtype.itemsize != info.file_size:
            raise ValueError(f"{name} declares the shape {shape}, which its size does not fit")
        mappable = name in MAPPED and dtype == MAPPED[name] and not fortran_order
        if mappable and info.compress_type == zipfile.ZIP_STORED:
            values = map_values(file, info, header)
            if values.ctypes.data % dtype.itemsize == 0:  # as the generator writes it; np.savez leaves that to chance
                return values.view(dtype).reshape(shape)
        array = np.empty(count, dtype)
        target = memoryview(array.view(np.uint8))
        filled = 0
        while filled < len(target):
            got = member.readinto(target[filled:])
            if not got:
                raise EOFError(f"{name} ends early")
            filled += got
        member.read(1)  # reaches the member's end, where zipfile checks the CRC
    return array.reshape(shape, order="F" if fortran_order else "C")


def read_npy_header(member, name):
    """(shape, fortran_order, dtype) of an npy file open at its beginning. Raises ValueError for what isn't numbers."""
    version = np.lib.format.read_magic(member)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0,
                   (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read_header is None:
        raise ValueError(f"{name} has an unknown npy version {version}")
    try:
        shape, fortran_order, dtype = read_header(member)
    except Exception as error:  # a MemoryError too: Python's parser lets one out at deep nesting
        raise ValueError(f"{name} has a damaged header ({one_line(error)[:100]})") from None
    if dtype.hasobject:
        raise ValueError(f"{name} holds pickled objects, which are never read")
    if dtype.kind not in "fiu":
        raise ValueError(f"{name} holds {dtype}, not numbers")
    return shape, fortran_order, dtype


# ---------------------------------------------------------------------------------------------- mapped from the file


def map_values(file, info, header):
    """The bytes of a stored zip member from byte `header` on, mapped read-only: (n,) uint8.

    The CRC is taken over the mapped bytes themselves, so what is used is what was checked. Raises ValueError or
    BadZipFile where they aren't a whole member of the file.
    """
    if info.compress_size != info.file_size:
        raise ValueError(f"{info.filename} is stored, yet {info.file_size} bytes take {info.compress_size}")
    whole = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    local = whole[info.header_offset:info.header_offset + LOCAL_HEADER]
    lengths = local[26:30].view("<u2").tolist()  # of the name and of the extra field, which the values follow
    first = info.header_offset + LOCAL_HEADER + sum(lengths)
    member = whole[first:first + info.file_size]
    if len(member) != info.file_size or crc32(member) != info.CRC:
        raise zipfile.BadZipFile(f"bad CRC-32 for {info.filename}")
    return member[header:]


def mapping_of(array):
    """The mmap.mmap that the values of an array lie in, or None when they are in memory."""
    while isinstance(array, np.ndarray):
        array = array.base
    # np.frombuffer keeps its buffer as a memoryview.
    array = array.obj if isinstance(array, memoryview) else array
    return array if isinstance(array, mmap.mmap) else None


def release(array):
    """Take the pages of a mapped array out of this process's memory; they are read again when used again.

    array: whole rows of a mapped array; one in memory is left alone. The values stay in the system's file cache as
    long as there is room.
    """
    mapping = mapping_of(array)
    if mapping is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    first = array.ctypes.data - np.frombuffer(mapping, np.uint8, 1).ctypes.data
    last = first + array.nbytes + -(first + array.nbytes) % PAGES_AROUND
    first -= first % PAGES_AROUND
    mapping.madvise(mmap.MADV_DONTNEED, first, min(last, len(mapping)) - first)


def blocks(array, n_bytes=BLOCK_BYTES):
    """The array in consecutive blocks of rows, about n_bytes each; a mapped block leaves memory when the next comes."""
    rows = max(1, n_bytes * len(array) // max(array.nbytes, 1))
    for first in range(0, len(array), rows):
        block = array[first:first + rows]
        yield block
        release(block)


def pick(array, rows):
    """array[rows] for row numbers anywhere in a long array: a mapped one leaves memory again on the way."""
    picked = np.empty((len(rows), *array.shape[1:]), array.dtype)
    for first in range(0, len(rows), ROWS_PICKED):
        part = slice(first, first + ROWS_PICKED)
        picked[part] = array[rows[part]]
        release(array)
    return picked


def crc32(array):
    """The CRC-32 of an array's values in C order: the same for a mapped and a compressed file."""
    value = 0
    for block in blocks(array):
        value = zlib.crc32(block, value)
    return value


def all_finite(array):
    """Whether every value is finite; no mask as large as the array."""
    return all(np.isfinite(block).all() for block in blocks(array))


def find_problem(series):
    """What is wrong with the arrays of a series, in words, or None."""
    X, K = series.X, series.radii.shape[0] if series.radii.ndim == 1 else 0
    if X.ndim != 2 or X.dtype.kind != "f" or X.shape[0] < 2 or X.shape[1] < 1:
        return f"X must be (n_steps, ambient_dim) float, not {X.shape} {X.dtype}"
    if K < 1:
        return f"radii must be (n_circles,), not {series.radii.shape}"
    shapes = {"states": (len(X),), "thetas": (len(X),), "transition_matrix": (K, K), "entry_angles": (K,),
              "periods": (K,)}
    if series.planes is not None:
        shapes["planes"] = (K, 2, X.shape[1])
    for name, shape in shapes.items():
        if getattr(series, name).shape != shape:
            return f"{name} must have shape {shape}, not {getattr(series, name).shape}"
    for name in ("states", "periods"):
        if getattr(series, name).dtype.kind not in "iu":
            return f"{name} must hold whole numbers, not {getattr(series, name).dtype}"
    if not all_finite(X):
        return "X holds NaN or infinity"
    if X.dtype.itemsize > 4 and any(abs(block).max() > LARGEST_VALUE for block in blocks(X)):
        return "X holds values too large for float32"
    for name in ("thetas", "transition_matrix", "radii", "entry_angles", "planes"):
        values = getattr(series, name)
        if values is not None and not all_finite(values):
            return f"{name} holds NaN or infinity"
    if any(block.min() < 0 or block.max() >= K for block in blocks(series.states)):
        return f"states must lie in 0…{K - 1}"
    if series.periods.min() < 1 or series.periods.max() > LONGEST_PERIOD:
        return f"periods must be 1…{LONGEST_PERIOD}"
    if series.radii.min() <= 0 or series.radii.max() > LARGEST_VALUE:
        return f"radii must be above 0 and no more than {LARGEST_VALUE:g}"
    if series.planes is not None and abs(series.planes).max() > 1.001:
        return "planes must be pairs of unit vectors"
    P = series.transition_matrix
    if P.min() < 0 or not np.allclose(P.sum(axis=1), 1, atol=1e-6):
        return "the rows of transition_matrix must be probabilities that sum to 1"
    return None


def visits(states):
    """The visits of a state sequence: circles (n,), first steps (n,) and lengths (n,) in steps."""
    circles, starts, first, before = [], [], 0, -1
    for block in blocks(states):
        begins = np.flatnonzero(np.diff(block, prepend=before))
        circles.append(block[begins])
        starts.append(first + begins)
        first, before = first + len(block), block[-1]
    starts = np.concatenate(starts)
    return np.concatenate(circles), starts, np.diff(starts, append=first)


runs = visits  # the name until every caller has moved to `visits`


def check_fits_model(series, model, checkpoint):
    """Raise UserError when a model trained on another number of features meets this series."""
    if model.feature_dim != series.feature_dim:
        raise UserError(f"{checkpoint} predicts {model.feature_dim} features but the data have "
                        f"{series.feature_dim}; give the --data-dir it was trained on")


def window_settings(args, checkpoint):
    """seq_len, stride and val_fraction that a model was trained with; args: the flags that its checkpoint holds.

    Those it doesn't name (older files) are the training script's defaults, and a line says so. Raises UserError when
    one makes no sense.
    """
    missing = [name for name in WINDOW_DEFAULTS if name not in args]
    if missing:
        print(f"{checkpoint} doesn't name its " + ", ".join(f"{name} (taken: {WINDOW_DEFAULTS[name]})"
                                                            for name in missing))
    seq_len, stride, val_fraction = (args.get(name, default) for name, default in WINDOW_DEFAULTS.items())
    if not (isinstance(seq_len, int) and seq_len > 1 and isinstance(stride, int) and stride > 0
            and isinstance(val_fraction, float) and 0 < val_fraction < 1):
        raise UserError(f"{checkpoint} names seq_len {seq_len!r}, stride {stride!r} and val_fraction "
                        f"{val_fraction!r}, which make no windows; give another --checkpoint")
    return seq_len, stride, val_fraction


def first_validation_step(n_steps, val_fraction):
    """The first time step of validation: training sees the steps before it, validation those from it on."""
    return n_steps - round(n_steps * val_fraction)


def window_starts(first, last, seq_len, stride):
    """First steps of the windows of seq_len steps, every `stride` steps, that lie within [first, last)."""
    return np.arange(first, last - seq_len + 1, stride, dtype=np.int64)


def split_windows(n_steps, seq_len, stride, val_fraction):
    """Window starts for training and for validation, and the first validation step.

    Both kinds lie wholly on their side of the boundary, so no time step is in both. Raises UserError when either
    side is shorter than one window.
    """
    if seq_len > n_steps:
        raise UserError(f"--seq-len {seq_len} is longer than the series ({n_steps} steps); use a smaller one")
    boundary = first_validation_step(n_steps, val_fraction)
    train = window_starts(0, boundary, seq_len, stride)
    val = window_starts(boundary, n_steps, seq_len, stride)
    for starts, name, length in ((train, "training", boundary), (val, "validation", n_steps - boundary)):
        if len(starts) == 0:
            raise UserError(f"the {name} part has {length} steps, fewer than --seq-len {seq_len}; "
                            "use a smaller --seq-len, another --val-fraction or a longer series")
    return train, val, boundary


def jittered(starts, last, seq_len, stride, generator):
    """Training starts, each moved forward by 0…stride-1 random steps but never past `last` - seq_len.

    starts: (n,) int64 tensor; `generator` a torch.Generator on its device. Over the epochs every training step is
    seen at every position in a window.
    """
    import torch

    shift = torch.randint(stride, starts.shape, generator=generator, device=starts.device)
    return (starts + shift).clamp_(max=last - seq_len)


def gather(X, starts, seq_len):
    """The windows X[start : start + seq_len]: a tensor (n, seq_len, feature_dim).

    X: a tensor, from which they are taken by one indexing call on its device, or an array in host memory or mapped
    from the file, which gives a tensor on the CPU. starts: (n,) int64; for a tensor X, a tensor on its device.
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
    """Whether the series X may live on the device as a tensor.

    On a CPU always, where it is already, but for one that is mapped; on a GPU when it takes no more than a third of
    the free memory.
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


class Windows:
    """The windows of one series, cut out where the series lies and delivered on a device.

    X: (n_steps, feature_dim) float32 array, in memory or mapped. `on_device` says whether the whole series lies on the
    device as a tensor; otherwise `X` stays the array, and `loader` cuts windows out of it in other processes.
    `starts_device` is where the tensors of window starts that `at` gets should live.
    """

    def __init__(self, X, seq_len, device):
        import torch

        self.seq_len, self.device = seq_len, torch.device(device)
        self.on_device = fits_on(self.device, X)
        self.X = to_device(X, self.device) if self.on_device else X
        self.starts_device = self.device if self.on_device else torch.device("cpu")

    def at(self, starts):
        """The windows that begin at the steps `starts`, (n,) int64 on `starts_device`: (n, seq_len, feature_dim)."""
        return gather(self.X, starts, self.seq_len).to(self.device)

    def loader(self, batches, num_workers):
        """Yields the windows of each batch (a list of window starts) of a series that is not on the device."""
        return host_batches(self.X, batches, self.seq_len, self.device, num_workers)


class HostWindows:
    """Windows of a series in host memory or mapped, for a torch DataLoader: one item is one batch of window starts."""

    def __init__(self, X, batches, seq_len):
        self.X, self.batches, self.seq_len = X, batches, seq_len

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, i):
        return gather(self.X, self.batches[i], self.seq_len)


def host_batches(X, batches, seq_len, device, num_workers):
    """Batches of windows for a series that doesn't fit on the device: gathered by `num_workers` processes.

    batches: lists of window starts. Yields (n, seq_len, feature_dim) tensors on the device, in order.
    """
    from torch.utils.data import DataLoader

    loader = DataLoader(HostWindows(X, batches, seq_len), batch_size=None, num_workers=num_workers,
                        pin_memory=device.type == "cuda")
    for batch in loader:
        yield batch.to(device, non_blocking=True)
