"""What an exact observer believes, and how much of that a representation holds.

The exact filter of the process (`optimal_filter`) knows at each time step everything that the past tells about the
hidden state: how likely each circle is, the phase, how many revolutions the present visit has done, and how likely
the visit is to end now. These are the beliefs. Shai et al. (2024, "Transformers represent belief state geometry in
their residual stream", arXiv 2405.15943) look for them in the layers of a trained network by linear regression: a
network that predicts as well as the filter must hold them in some form, while it could name the circle without any
of the rest.

`Beliefs` of a series come from `beliefs`, those of windows that each begin without a past from `in_windows`. A
`Readout` is the regression.
"""

from typing import NamedTuple

import numpy as np

import dataset
import measures
import optimal_filter

NEAR_STEPS = 2  # a visit may end soon: at most so many steps from the last step of a revolution
READOUT_STEPS = 50_000  # that the regressions are fitted to


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


def in_windows(process, X, starts, length, first_steps=None, progress=None):
    """The Beliefs in windows X[start : start + length], each begun without a past: arrays (n_windows, length, …).

    That is the past that a model has which sees one window at a time. first_steps: how many steps each window begins
    behind the first one of its recording, by default `starts`; progress: called with the number of steps whenever some
    are done.
    """
    def one(place):
        start, first_step = place
        window = X[start:start + length]
        found = beliefs(process, window, first_step=first_step)
        dataset.release(window)
        if progress:
            progress(length)
        return found

    starts = np.asarray(starts).tolist()
    first_steps = starts if first_steps is None else np.asarray(first_steps).tolist()
    found = optimal_filter.on_all_cores(one, list(zip(starts, first_steps, strict=True)))
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


# ---------------------------------------------------------------------------------------------------------------
# How much of the beliefs a representation holds


class Readout:
    """Linear regressions from a representation of time steps onto the beliefs at them.

    fit, fit_near: the Beliefs at n steps, and whether each is near the end of a revolution, (n,) bool; the regressions
    are fitted to READOUT_STEPS of them, drawn at random. score, score_near: the same of other, unseen steps, all of
    which score the regressions.
    """

    def __init__(self, fit, fit_near, score, score_near, seed):
        K, rng = fit.circle.shape[1], np.random.default_rng(seed)
        self.columns = {"circle": slice(0, K), "phase": slice(K, K + 2), "revolutions": slice(K + 2, K + 3),
                        "hazard": slice(K + 3, K + 4)}
        self.rows = np.sort(rng.permutation(len(fit_near))[:READOUT_STEPS])
        self.near_rows = np.sort(rng.permutation(np.flatnonzero(fit_near))[:READOUT_STEPS])
        self.near_scored = np.flatnonzero(score_near)
        self.fit, self.score = targets_of(fit), targets_of(score)
        self.likeliest = fit.circle.argmax(axis=1), score.circle.argmax(axis=1)

    def r2(self, values, scored):
        """How much of the variance of each belief a ridge regression from a representation explains: a dict.

        values (n, width): at the steps that may fit the regressions; scored (m, width): at those that score them.
        "circle": of all K probabilities together; "phase": of both numbers; "revolutions": within each circle, since
        the circle itself tells much about how many revolutions its visits last; "hazard": near the ends of revolutions
        alone, since elsewhere it is 0. None for what isn't known or doesn't vary.
        """
        n, rows, near_rows = len(scored), self.rows, self.near_rows
        train, rest = measures.whitened(values[rows], np.concatenate([scored, values[near_rows]]))
        width, test, near = train.shape[1], rest[:n], rest[n:]
        by_circle = measures.ridge_data(train, self.fit[rows], test, self.score,
                                        (self.likeliest[0][rows], self.likeliest[1]))
        everywhere = measures.RidgeData(*(sum(parts) for parts in zip(*by_circle, strict=True)))
        at_ends = measures.ridge_data(near, self.fit[near_rows], test[self.near_scored], self.score[self.near_scored])
        data = {"circle": everywhere, "phase": everywhere, "revolutions": by_circle, "hazard": at_ends}
        return {name: measures.ridge_r2(data[name], width, columns) for name, columns in self.columns.items()}


def targets_of(believed):
    """The beliefs as the columns of one array: circle, phase, revolutions (0 where they aren't known), hazard."""
    revolutions = np.zeros_like(believed.hazard) if believed.revolutions is None else believed.revolutions
    return np.column_stack([believed.circle, believed.phase, revolutions, believed.hazard])


def rows_of(believed, rows):
    """The Beliefs of these rows alone; rows: any index of the first axis."""
    return Beliefs(*(None if values is None else values[rows] for values in believed))
