"""What an exact observer believes, and where a model falls short of it.

The exact filter of the process (`optimal_filter`) knows at each time step everything that the past tells about the
hidden state: how likely each circle is, the phase, how many revolutions the present visit has done, and how likely
the visit is to end now. These are the beliefs. Shai et al. (2024, "Transformers represent belief state geometry in
their residual stream", arXiv 2405.15943) look for them in the layers of a trained network by linear regression: a
network that predicts as well as the filter must hold them in some form, while it could name the circle without any
of the rest.

`Beliefs` of a series come from `beliefs`, those of windows that each begin without a past from `in_windows`.
`event_classes` sorts the predictions in windows by what happens there, for the share of a model's excess that each
kind of event takes.
"""

from typing import NamedTuple

import numpy as np

import dataset
import optimal_filter

NEAR_STEPS = 2  # a visit may end soon: at most so many steps from the last step of a revolution
FIRST_STEPS = 32  # of a window, in which the model has nearly no past to go by
AFTER_STEPS = 16  # after a switch, in which the new circle may not be known yet
EVENTS = ("first steps of a window", "step of a switch", "just after a switch", "a revolution ends without a switch",
          "all others")


class Beliefs(NamedTuple):
    """What the exact filter believes after each of n steps, given these and the steps before them.

    All arrays are float32 and have the steps as their first axis; those of `in_windows` have the windows before it.
    """

    circle: np.ndarray  # (n, K) P(circle)
    phase: np.ndarray  # (n, 2) E[cos θ], E[sin θ]
    revolutions: np.ndarray | None  # (n,) E[revolutions that the present visit has done]; None where circles move
    hazard: np.ndarray  # (n,) P(this is the last step of the visit)
    error: np.ndarray  # (n,) mean over features of (x[t+1] - its prediction)²; NaN at the last step
    nll: np.ndarray  # (n,) -log p(x[t+1]) in nats; NaN at the last step


def beliefs(process, X, initial="stationary", first_step=None):
    """The Beliefs of the exact filter on X (n, feature_dim), a stretch of a series of the process.

    initial, first_step: as in `optimal_filter.new_filter`; by default X begins anywhere in a long series.
    """
    maps, n = optimal_filter.prediction_map(process, [1]), len(optimal_filter.check_series(process, X))
    filtering = optimal_filter.new_filter(process, n, initial, [1], first_step, count_revolutions=True)
    parts, predictions, log_likelihoods = [], [], []
    for _, log_likelihood, posterior, phasor, flux, center, ahead in filtering.blocks(X):
        revolutions = getattr(filtering, "revolutions", None)  # a MovingFilter counts none
        parts.append((posterior, phasor.sum(axis=1), revolutions, flux[:, :, 0].sum(axis=1)))
        predictions.append(optimal_filter.predictions_of(process, maps, phasor, flux, center, ahead)[:, 0])
        log_likelihoods.append(log_likelihood)
    error, nll = np.full(n, np.nan), np.full(n, np.nan)
    error[:-1] = np.square(X[1:] - np.concatenate(predictions)[:-1]).mean(axis=1)
    nll[:-1] = -np.concatenate(log_likelihoods)[1:]
    circle, phase, revolutions, hazard = (None if values[0] is None else np.concatenate(values).astype(np.float32)
                                          for values in zip(*parts, strict=True))
    return Beliefs(circle, phase, revolutions, hazard, error.astype(np.float32), nll.astype(np.float32))


def in_windows(process, X, starts, length):
    """The Beliefs in windows X[start : start + length], each begun without a past: arrays (n_windows, length, …).

    That is the past that a model has which sees one window at a time.
    """
    def one(start):
        window = X[start:start + length]
        found = beliefs(process, window, first_step=start)
        dataset.release(window)
        return found

    found = optimal_filter.on_all_cores(one, np.asarray(starts).tolist())
    return Beliefs(*(None if values[0] is None else np.stack(values) for values in zip(*found, strict=True)))


# ---------------------------------------------------------------------------------------------------------------
# What happens at a step


def revolution_steps(process, states, thetas):
    """How many steps of its revolution have passed at each step, (n,) int: 0 at the entry angle."""
    periods = process.periods[states]
    turned = (thetas - process.entry_angles[states]) / (2 * np.pi) * periods
    return np.rint(turned).astype(np.int64) % periods


def near_an_end(process, states, thetas):
    """Whether each step is at most NEAR_STEPS from the last one of a revolution, where a visit can end: (n,) bool."""
    periods, step = process.periods[states], revolution_steps(process, states, thetas)
    return np.minimum((periods - 1 - step) % periods, (step + 1) % periods) <= NEAR_STEPS


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
