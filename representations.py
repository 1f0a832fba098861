"""What each level of a model holds at every time step of a series.

The levels are the input, the layers from 1 on, and the output, which is the prediction one step ahead. A model sees
one window at a time; neighbouring windows overlap, so that each step is seen with some of its past.
"""

import numpy as np
import torch

import dataset

STEPS_IN_BATCH = {"cpu": 2**14, "cuda": 2**18}  # time steps that go through a layer at once


def level_names(n_layers):
    """Names of all levels of a model, in order of depth."""
    return ["input", *(f"layer {i}" for i in range(1, n_layers + 1)), "output"]


def overlapping_windows(n_steps, seq_len):
    """Windows that cover every step, each overlapping the one before by a quarter or more: (list of starts, length).

    The last window ends with the series. A series shorter than seq_len is one window.
    """
    length = min(seq_len, n_steps)
    advance = length - max(1, length // 4)
    starts = list(range(0, n_steps - length + 1, max(advance, 1)))
    if starts[-1] + length < n_steps:
        starts.append(n_steps - length)
    return starts, length


def steps_of_rows(series, velocity):
    """The time steps that have a row of a level, (n_rows,): all, or with velocity all but the first of each recording,
    which has no step before it."""
    steps = np.arange(series.n_steps)
    return np.delete(steps, series.recordings[:, 0]) if velocity else steps


def stitch(windows, starts, velocity=False):
    """One row per time step from overlapping windows (n, length, width).

    A step that lies in several windows is taken from the one that holds most of its past. Returns (n_steps, width), or
    (n_steps - 1, width) with velocity: the change since the step before, both in one window, for the steps from 1 on.
    """
    first = int(velocity)  # the step of a window's first row
    if velocity:
        windows = windows.diff(dim=1)
    rows, done = [], first  # `done`: the steps before this one have their row
    for window, start in zip(windows, starts, strict=True):
        rows.append(window[done - start - first:])
        done = start + first + len(window)
    return torch.cat(rows).numpy()


@torch.inference_mode()
def in_batches(function, x, device):
    """function(x) for x (n, length, width), a few windows at a time on the device; the result is on the CPU."""
    n = max(1, STEPS_IN_BATCH[device.type] // x.shape[1])
    return torch.cat([function(windows.to(device)).cpu() for windows in x.split(n)])


def of_windows(model, windows, depths):
    """Yields (depth, level) for the wanted depths, ascending; windows: a list of tensors (n, length, feature_dim).

    level: a list of tensors (n, length, width), one for each of these. All windows go through one layer before the
    next one, so that memory holds one level, however deep the model is.
    """
    device = next(model.parameters()).device
    backend = model.backend_for(device)

    def prediction(x):
        return model.predictions({"1": model.output_heads["1"](model.final_norm(x))})["1"]

    if 0 in depths:
        yield 0, windows
    if max(depths) == 0:
        return
    steps = [*(lambda x, layer=layer: layer(x, backend) for layer in model.layers), prediction]
    h = [in_batches(model.embed, some, device) for some in windows]
    for depth, step in enumerate(steps[:max(depths)], 1):
        h = [in_batches(step, some, device) for some in h]
        if step is prediction and model.relative is not None:
            h = [some + x[:, :1] for some, x in zip(h, windows, strict=True)]
        if depth in depths:
            yield depth, h


def of_steps(model, X, seq_len, depths, velocity=False, recordings=None):
    """Yields (depth, values) for the wanted depths: values (n_steps, width) float32, with velocity one row less for
    each recording.

    recordings: as Series.recordings where there are several; no window crosses a border.
    """
    pieces = [(X[first:end], *overlapping_windows(end - first, seq_len))
              for first, end in ([(0, len(X))] if recordings is None else recordings.tolist())]
    windows = [dataset.gather(piece, starts, length) for piece, starts, length in pieces]
    for depth, level in of_windows(model, windows, depths):
        yield depth, np.concatenate([stitch(some, starts, velocity)
                                     for some, (_, starts, _) in zip(level, pieces, strict=True)])


class LevelsInWindows:
    """The levels of a model in windows (n, length, feature_dim), a tensor, for depths that are asked for in order."""

    def __init__(self, model, windows, depths):
        self.found, self.last = of_windows(model, [windows], depths), (None, None)

    def at(self, depth):
        """The level of this depth, (n, length, width); the last one may be asked for again."""
        while self.last[0] != depth:
            reached, (level,) = next(self.found)
            self.last = reached, level.numpy()
        return self.last[1]
