"""Floors that were computed before: DATA_DIR/floors.json, so that the next run on the same data doesn't compute them.

An entry is found by a digest of all that the floor depends on: the values of the series (their CRC-32), the numbers of
the process, and the windows and horizons. A file that is damaged, an entry whose own CRC is wrong and one of another
series are as good as none. Where the folder can't be written to, nothing is kept.
"""

import contextlib
import hashlib
import json
import math
import zlib

import numpy as np

import cli
import dataset

VERSION = 2  # raise it when the filter computes something else
MOST_ENTRIES = 100  # the oldest go


def digest(process, series, starts, seq_len, horizons):
    """A text that differs when the floor of these windows might. horizons: with other numbers behind them, if the floor
    depends on more."""
    numbers = [process.radii, process.entry_angles, process.periods, process.transition_matrix, process.planes,
               process.dwell_law, np.array([process.noise_std, process.center_walk_std, process.tilt_rate])]
    windows = [np.asarray(starts, np.int64), np.array([seq_len, *horizons], np.int64)]
    text = hashlib.sha256(f"{VERSION} {dataset.crc32(series.X)} {series.X.shape}".encode())
    for array in (*numbers, *windows):
        text.update(f"{array.shape} {array.dtype}".encode() + np.ascontiguousarray(array).tobytes())
    return text.hexdigest()


def entry_crc(floors):
    return zlib.crc32(json.dumps(floors, sort_keys=True).encode())


def read(folder):
    """The entries of floors.json that are whole: {digest: {"floors": …, "crc": …}}, oldest first."""
    try:
        entries = json.loads((folder / "floors.json").read_text(encoding="utf-8"))
        return {key: entry for key, entry in entries.items() if entry["crc"] == entry_crc(entry["floors"])}
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, KeyError):
        return {}


def kept(compute, folder, windows, horizons, more=(), n_blocks=None):
    """The floors {"mse": {k: …}, "nll": {1: …}}: those that were kept in this folder, or else those that compute()
    returns, which are kept from then on. Without a folder they are computed.

    windows: (process, series, starts, seq_len), as for `digest`; more: further numbers that the floors depend on;
    n_blocks: of how many blocks each value is a list, None where it is one number.
    """
    if folder is None:
        return compute()
    key = digest(*windows, [*horizons, *more])
    floors = load(folder, key, horizons, n_blocks)
    if floors is None:
        floors = compute()
        store(folder, key, floors)
    return floors


def load(folder, key, horizons, n_blocks=None):
    """The floors under this digest, or None; arguments as for `kept`."""
    try:
        floors = read(folder)[key]["floors"]
        floors = {"mse": {k: floors["mse"][str(k)] for k in horizons}, "nll": {1: floors["nll"]["1"]}}
    except (KeyError, TypeError):
        return None
    values = [value for by_horizon in floors.values() for value in by_horizon.values()]
    if n_blocks is not None:
        if not all(isinstance(blocks, list) and len(blocks) == n_blocks for blocks in values):
            return None
        values = [value for blocks in values for value in blocks]
    return floors if all(isinstance(value, float) and math.isfinite(value) for value in values) else None


def store(folder, key, floors):
    """Keep floors under this digest."""
    floors = {name: {str(k): value for k, value in values.items()} for name, values in floors.items()}
    entries = read(folder) | {key: {"floors": floors, "crc": entry_crc(floors)}}
    entries = dict(list(entries.items())[-MOST_ENTRIES:])
    with contextlib.suppress(cli.UserError):  # a folder that can't be written to
        cli.write_text(folder / "floors.json", json.dumps(entries, indent=1) + "\n")
