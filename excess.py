"""Where a model's excess over the exact filter falls: at which events, and after how long a history.

The excess at a time step is the squared error of the model's prediction of the next step less that of the exact
filter's, in the same window, after the same past. Standard errors are over blocks of windows that are long against a
visit, as in `unseen`.
"""

import itertools

import numpy as np

import measures
from beliefs import revolution_steps

FIRST_STEPS = 32  # of a window, in which there is little past to go by
AFTER_STEPS = 16  # after a switch, in which the new circle may not be known yet
EVENTS = ("first steps of a window", "step of a switch", "just after a switch", "a revolution ends without a switch",
          "all others")
HISTORY_BINS = 24


def event_classes(process, states, thetas, starts, length):
    """Which of EVENTS each prediction of the next step is, by its number: (n_windows, length - 1) int.

    The prediction at position t of a window is of the step t + 1. Each is one event: of those that it may be the first
    in EVENTS. states, thetas (n,): of the series; starts: of the windows.
    """
    n = len(states)
    switches = np.flatnonzero(states[1:] != states[:-1]) + 1  # first steps of the visits, but for the first visit
    since = np.full(n, n)  # steps since the last switch
    before = np.searchsorted(switches, np.arange(n), side="right")
    since[before > 0] = (np.arange(n) - switches[before - 1])[before > 0] if len(switches) else n
    event = np.full(n, EVENTS.index("all others"))
    event[revolution_steps(process, states, thetas) == 0] = EVENTS.index("a revolution ends without a switch")
    event[since <= AFTER_STEPS] = EVENTS.index("just after a switch")
    event[since == 0] = EVENTS.index("step of a switch")
    classes = event[np.asarray(starts)[:, None] + np.arange(1, length)]
    classes[:, :FIRST_STEPS] = EVENTS.index("first steps of a window")
    return classes


def by_event(errors, optimal, classes, edges):
    """The share of the excess, and the mean excess, of each of EVENTS and of all predictions: a list of dicts.

    errors, optimal: squared errors of the model and of the exact filter, (n_windows, length - 1) each; classes: as from
    `event_classes`; edges (n_blocks + 1,): block b has the windows edges[b] … edges[b + 1] - 1. "predictions" is the
    share of all predictions. Each other number stands beside its standard error, None with one block.
    """
    def sums(values):
        return np.add.reduceat(values.sum(axis=1, dtype=np.float64), edges[:-1])

    excess = errors.astype(np.float64) - optimal
    total, rows = sums(excess), []
    for name, here in [*((name, classes == i) for i, name in enumerate(EVENTS)), ("all", classes >= 0)]:
        inside = sums(np.where(here, excess, 0))
        share, share_error = measures.ratio_and_error(inside, total)
        mean, mean_error = measures.ratio_and_error(inside, sums(here))
        rows.append({"event": name, "predictions": float(here.mean()), "share": share, "share_error": share_error,
                     "mean_excess": mean, "mean_excess_error": mean_error})
    return rows


def by_history(errors, optimal):
    """Mean errors against how many steps of the window came before: {"steps", "mse", "optimal"}, lists over bins.

    errors, optimal: as in `by_event`. The bins are even on a logarithmic scale, but for the first ones of one step
    each; "steps" is the mean number in the bin, in which the step that is predicted from counts.
    """
    length = errors.shape[1]
    edges = np.unique(np.rint(np.geomspace(1, length + 1, HISTORY_BINS + 1)).astype(int))
    bins = [slice(a - 1, b - 1) for a, b in itertools.pairwise(edges)]
    steps = np.arange(1, length + 1)
    return {"steps": [float(steps[b].mean()) for b in bins],
            "mse": [float(errors[:, b].mean(dtype=np.float64)) for b in bins],
            "optimal": [float(optimal[:, b].mean(dtype=np.float64)) for b in bins]}
