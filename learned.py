"""The second floor: the exact filter of an observer who isn't told the process, but has to learn it from the training
steps, their values and their circles.

The exact filter knows the numbers of the process. A model can only learn them, from as many steps as it is trained on,
so with finite data not even a perfect learner of its kind reaches the exact floor. This observer knows the form of the
process (circles around one centre, constant speed, whole revolutions, a Markov chain of visits, one normal law of dwell
times for all circles, white noise) and fits its numbers:

- the period of a circle: of all divisors of the lengths of its visits the one at which a harmonic explains most;
- plane, radius and entry angle: least squares on that harmonic, and of all circles the nearest one to its two vectors;
- the noise: the variance that is left;
- mean and standard deviation of the dwell times: maximum likelihood of the numbers of revolutions;
- the transitions: their counts plus α per possible one, the mean under a Dirichlet prior, whose α is that under which
  the counts are likeliest (empirical Bayes: Minka 2000, Estimating a Dirichlet distribution).

Then the exact filter runs with these. Nothing here looks at the process that the file describes.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.special import gammaln, ndtr

import circle_process
import cli
from cli import UserError

optimize = cli.imported_when_used("scipy.optimize")  # it takes a third of a second, which --help need not wait for

STEPS_AT_ONCE = 2**20


class Learner(NamedTuple):
    """The process as it was learned, and from how many steps."""

    process: circle_process.Process
    n_steps: int


def learner_of(series, n_steps):
    """The Learner that has seen the first n_steps of a series, or None, after a line with the reason, where these
    don't tell the process."""
    try:
        return Learner(learned_process(series, n_steps), n_steps)
    except UserError as error:
        print(f"no floor of an observer who learns the process: {error}")
        return None


def learned_process(series, n_steps):
    """The circle_process.Process that the first n_steps of a series, X and states, tell of; series: a dataset.Series.

    Raises UserError where they don't tell it: a circle without a whole visit, or circles that move.
    """
    if series.config.get("center_walk_std") or series.config.get("drift"):
        raise UserError("circles that move aren't fitted")
    states = np.asarray(series.states[:n_steps])
    starts = np.r_[0, np.flatnonzero(np.diff(states)) + 1]
    circles, lengths = states[starts], np.diff(starts)  # the last visit may be cut short: it has no length
    K = series.n_circles
    since = np.arange(n_steps) - np.repeat(starts, np.diff(np.r_[starts, n_steps]))
    fits = [fit_circle(series.X, np.flatnonzero(states == i), since, lengths[circles[:-1] == i], i) for i in range(K)]
    periods, radii, planes, squares = map(np.array, zip(*fits, strict=True))
    n_values, n_numbers = n_steps * series.feature_dim, K * (2 * series.feature_dim - 2)
    dwell_mean, dwell_std = fit_dwell(lengths, periods[circles[:-1]])
    return circle_process.Process(
        radii=radii, entry_angles=np.zeros(K), periods=periods, planes=planes,
        noise_std=math.sqrt(squares.sum() / (n_values - n_numbers)),
        transition_matrix=fit_transitions(circles, K),
        dwell_law=circle_process.dwell_law(periods, dwell_mean, dwell_std))


def fit_circle(X, steps, since, lengths, number):
    """(period, radius, plane (2, feature_dim), sum of squared residuals) of a circle, whose phase at entry is 0.

    steps: those of X that are on it; since: how many steps each step of X is after the entry; lengths: of its visits.
    """
    if len(lengths) == 0:
        raise UserError(f"circle {number} has no whole visit in the training part")
    longest = int(np.gcd.reduce(lengths))  # all visits are whole revolutions: the period divides it
    sums, counts, square = np.zeros((longest, X.shape[1])), np.zeros(longest), 0.0
    for first in range(0, len(steps), STEPS_AT_ONCE):
        block = steps[first:first + STEPS_AT_ONCE]
        values, place = X[block].astype(np.float64), since[block] % longest
        counts += np.bincount(place, minlength=longest)
        sums += np.stack([np.bincount(place, column, longest) for column in values.T], axis=1)
        square += float(np.square(values).sum())
    best = None
    for period in (p for p in range(2, longest + 1) if longest % p == 0):
        angle = 2 * np.pi * np.arange(longest) / period
        waves = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        vectors, *_ = np.linalg.lstsq(waves.T @ (counts[:, None] * waves), waves.T @ sums, rcond=None)
        left, sizes, right = np.linalg.svd(vectors, full_matrices=False)
        radius, plane = sizes.mean(), left @ right
        points = radius * waves @ plane
        squares = square - 2 * float((points * sums).sum()) + float(counts @ np.square(points).sum(axis=1))
        if best is None or squares < best[3]:
            best = period, radius, plane, squares
    if best is None:
        raise UserError(f"the visits to circle {number} in the training part don't tell its period")
    return best


def fit_dwell(lengths, periods):
    """The mean and the standard deviation of the dwell times before they are rounded to whole revolutions, in steps:
    those under which the lengths of the visits (n,), to circles of these periods (n,), are likeliest."""
    low = np.where(lengths > periods, lengths - periods / 2, -np.inf)

    def surprise(mean_and_log_std):
        mean, std = mean_and_log_std[0], math.exp(mean_and_log_std[1])
        mass = ndtr((lengths + periods / 2 - mean) / std) - ndtr((low - mean) / std)
        return -float(np.log(np.maximum(mass, 1e-300)).sum())

    start = [lengths.mean(), math.log(max(lengths.std(), 0.1 * lengths.mean()))]
    mean, log_std = optimize.minimize(surprise, start, method="Nelder-Mead", options={"xatol": 1e-3, "fatol": 1e-4}).x
    return float(mean), math.exp(log_std)


def fit_transitions(circles, K):
    """The transition matrix (K, K) of the visits to `circles`, (n,) one after the other."""
    counts = np.zeros((K, K))
    np.add.at(counts, (circles[:-1], circles[1:]), 1.0)
    elsewhere = ~np.eye(K, dtype=bool)

    def surprise(log_alpha):
        alpha = math.exp(log_alpha)
        rows = gammaln((K - 1) * alpha) - gammaln(counts.sum(axis=1) + (K - 1) * alpha)
        cells = gammaln(counts[elsewhere] + alpha) - gammaln(alpha)
        return -float(rows.sum() + cells.sum())

    alpha = math.exp(optimize.minimize_scalar(surprise, bounds=(-7, 5), method="bounded").x)
    matrix = np.where(elsewhere, counts + alpha, 0.0)
    return matrix / matrix.sum(axis=1, keepdims=True)
