"""The data: one loader that checks it, sliding windows, and a validation split that leaks nothing.

Everything that reads `data/data.npz` and `data/config.json` goes through `load_series`.
"""

import json
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cli import UserError, one_line

REMEDY = "make it anew with: python markov_circles_timeseries.py --data-dir {}"
DEFLATE_MAX_RATIO = 1032  # no DEFLATE stream expands by more (zlib's technical notes)


@dataclass
class Series:
    """A series and the process that made it.

    X (n_steps, feature_dim) float32; states (n_steps,) int64, the circle of each step; thetas (n_steps,) float64,
    radians in [0, 2π); transition_matrix (K, K); radii (K,); entry_angles (K,) radians; periods (K,) int64, steps a
    revolution; planes (K, 2, feature_dim), orthonormal pairs, or None in older files; config: the generator's flags.
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

    Raises UserError when a file is missing or damaged, an array is missing, has a wrong shape or type, or holds NaN
    or infinity. Nothing is unpickled.
    """
    data_dir = Path(data_dir)
    path, remedy = data_dir / "data.npz", REMEDY.format(data_dir)
    if not path.is_file():
        raise UserError(f"{path} not found; {remedy}")
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {name: read_member(archive, name + ".npy") for name in
                      ("X", "states", "thetas", "transition_matrix", "radii", "entry_angles", "periods")}
            has_planes = "planes.npy" in archive.namelist()
            planes = read_member(archive, "planes.npy") if has_planes else None
    except KeyError as error:
        raise UserError(f"{path} lacks the array {one_line(error.args[0])}; {remedy}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError,
            RuntimeError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); {remedy}") from None
    series = Series(**arrays, planes=planes, config=load_config(data_dir))
    problem = find_problem(series)
    if problem:
        raise UserError(f"{path}: {problem}; {remedy}")
    series.X = np.ascontiguousarray(series.X, dtype=np.float32)
    series.states = series.states.astype(np.int64)
    series.periods = series.periods.astype(np.int64)
    for name in ("thetas", "transition_matrix", "radii", "entry_angles"):
        setattr(series, name, getattr(series, name).astype(np.float64))
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
    return config


def read_member(archive, name):
    """One array of an npz, its header checked against the bytes that are really there before memory is taken.

    Raises KeyError when it isn't there, ValueError when the header can't be trusted.
    """
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise KeyError(name.removesuffix(".npy")) from None
    if info.file_size > max(info.compress_size, 1) * DEFLATE_MAX_RATIO:
        raise ValueError(f"{name} declares more bytes than it can hold")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0,
                       (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read_header is None:
            raise ValueError(f"{name} has an unknown npy version {version}")
        shape, fortran_order, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError(f"{name} holds pickled objects, which are never read")
        if dtype.kind not in "fiu":
            raise ValueError(f"{name} holds {dtype}, not numbers")
        count = 1
        for size in shape:
            count *= size
        if file.tell() + count * dtype.itemsize != info.file_size:
            raise ValueError(f"{name} declares the shape {shape}, which its size does not fit")
        array = np.empty(count, dtype)
        target = memoryview(array.view(np.uint8))
        filled = 0
        while filled < len(target):
            got = file.readinto(target[filled:])
            if not got:
                raise EOFError(f"{name} ends early")
            filled += got
        file.read(1)  # reaches the member's end, where zipfile checks the CRC
    return array.reshape(shape, order="F" if fortran_order else "C")


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
    for name in ("thetas", "transition_matrix", "radii", "entry_angles", "planes"):
        values = getattr(series, name)
        if values is not None and not np.isfinite(values).all():
            return f"{name} holds NaN or infinity"
    if series.states.min() < 0 or series.states.max() >= K:
        return f"states must lie in 0…{K - 1}"
    if series.periods.min() < 1:
        return "periods must be 1 or more"
    P = series.transition_matrix
    if P.min() < 0 or not np.allclose(P.sum(axis=1), 1, atol=1e-6):
        return "the rows of transition_matrix must be probabilities that sum to 1"
    return None


def all_finite(X, block=1 << 20):
    """Whether every value is finite, block by block: no mask as large as X."""
    return all(np.isfinite(X[i:i + block]).all() for i in range(0, len(X), block))


def check_fits_model(series, model, checkpoint):
    """Raise UserError when a model trained on another number of features meets this series."""
    if model.feature_dim != series.feature_dim:
        raise UserError(f"{checkpoint} predicts {model.feature_dim} features but the data have "
                        f"{series.feature_dim}; give the --data-dir it was trained on")


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
    """The windows X[start : start + seq_len] in one indexing call: (n, seq_len, feature_dim), on X's device."""
    import torch

    return X[starts[:, None] + torch.arange(seq_len, device=starts.device)]


def fits_on(device, n_bytes):
    """Whether a series of n_bytes may live on the device: always in the CPU's own memory (it is there already),
    on a GPU when it takes no more than a third of the free memory."""
    import torch

    return device.type == "cpu" or n_bytes < torch.cuda.mem_get_info(device)[0] / 3


class HostWindows:
    """Windows of a series in host memory, for a torch DataLoader: one item is one batch of window starts."""

    def __init__(self, X, batches, seq_len):
        self.X, self.batches, self.seq_len = X, batches, seq_len

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, i):
        import torch

        return torch.from_numpy(np.stack([self.X[s:s + self.seq_len] for s in self.batches[i]]))


def host_batches(X, batches, seq_len, device, num_workers):
    """Batches of windows for a series that doesn't fit on the device: gathered by `num_workers` processes.

    batches: lists of window starts. Yields (n, seq_len, feature_dim) tensors on the device, in order.
    """
    from torch.utils.data import DataLoader

    loader = DataLoader(HostWindows(X, batches, seq_len), batch_size=None, num_workers=num_workers,
                        pin_memory=device.type == "cuda")
    for batch in loader:
        yield batch.to(device, non_blocking=True)
