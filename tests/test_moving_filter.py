"""The filter for a centre that walks: against every path written out, a particle filter, the exact filter and a bound.

The reference for one hidden path is a normal law over all numbers of the series at once, with its covariance written
out: nothing of it is recursive, as a Kalman filter is.
"""

import dataclasses

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from test_optimal_filter import NOISE, dense_hmm, enumerate_paths, make_process, point

import moving_filter
import optimal_filter
from moving_filter import Limits

WIDER = Limits(drop=80.0, merge=0.0, most=100_000)


def walking(process, walk_std):
    return dataclasses.replace(process, center_walk_std=walk_std)


def simulate(series, process, n, seed=0, first_step=0):
    """X, states, thetas and centres of n steps by the definition of the process."""
    rng = np.random.default_rng(seed)
    config, states, thetas = series.config, [], []
    circle = rng.integers(process.n_circles)
    while len(states) < n:
        period = process.periods[circle]
        revolutions = max(1, round(rng.normal(config["dwell_mean"], config["dwell_std"]) / period))
        for step in range(revolutions * period):
            states.append(circle)
            thetas.append((process.entry_angles[circle] + 2 * np.pi * step / period) % (2 * np.pi))
        circle = rng.choice(process.n_circles, p=process.transition_matrix[circle])
    clean = np.array([point(series, i, angle) for i, angle in zip(states[:n], thetas[:n], strict=True)])
    steps = rng.normal(size=(n, clean.shape[1])) * process.center_walk_std
    centers = np.cumsum(steps, axis=0) - steps[0] + rng.normal(size=clean.shape[1]) * np.sqrt(
        first_step) * process.center_walk_std
    X = clean + centers + process.noise_std * rng.normal(size=clean.shape)
    return X, np.array(states[:n]), np.array(thetas[:n]), centers


def path_means(X, points, walk_std, noise_std, first_step, horizons):
    """For one hidden path: log p(x_1 … x_t) for each t, and E[x_{t+k} | x_1 … x_t, path] {k: (n, dim)}.

    points (n + max horizon, dim): noise-free points of the path. Centre and noise are independent between features.
    """
    n, dim = X.shape
    long = len(points)
    before = np.minimum(np.arange(long)[:, None], np.arange(long)) + first_step  # the steps that two centres share
    centers = walk_std**2 * before
    covariance = centers + noise_std**2 * np.eye(long)
    evidence, means = np.empty(n), {k: np.empty((n, dim)) for k in horizons}
    for t in range(n):
        seen, residual = slice(0, t + 1), X[:t + 1] - points[:t + 1]
        evidence[t] = sum(multivariate_normal.logpdf(residual[:, c], cov=covariance[seen, seen]) for c in range(dim))
        for k in horizons:
            weights = np.linalg.solve(covariance[seen, seen], centers[seen, t + k])
            means[k][t] = points[t + k] + weights @ residual
    return evidence, means


@pytest.mark.parametrize("initial, first_step", [("visit start", 0), ("stationary", 7)])
def test_matches_every_path_written_out(initial, first_step):
    series, process = make_process(2, seed=2, dwell=(3.0, 1.2), dim=3)
    process = walking(process, 0.8)
    n, horizons = 5, [1, 3]
    X = simulate(series, process, n, seed=1, first_step=first_step)[0]
    states, T, means, starts = dense_hmm(series)
    paths, probabilities = enumerate_paths(T, starts[initial], n + max(horizons))
    circles = np.array([state[0] for state in states])
    log_path, ahead = np.empty((len(paths), n)), {k: np.empty((len(paths), n, 3)) for k in horizons}
    for row, path in enumerate(paths):
        log_path[row], predicted = path_means(X, means[path], 0.8, NOISE, first_step, horizons)
        for k in horizons:
            ahead[k][row] = predicted[k]
    log_path += np.log(probabilities)[:, None]
    evidence = logsumexp(log_path, axis=0)
    posterior = np.exp(log_path - evidence)

    filtering = optimal_filter.new_filter(process, n, initial, max(horizons), first_step, keep_tree=True, limits=WIDER)
    maps = optimal_filter.prediction_map(process, horizons)
    (_, log_likelihood, circle_posterior, phasor, flux, center), = filtering.blocks(X)
    prediction = optimal_filter.predictions_of(process, maps, phasor, flux, center)
    np.testing.assert_allclose(log_likelihood, np.diff(evidence, prepend=0), atol=1e-9)
    _, _, smoothed = optimal_filter.states_of(process, filtering.occupancy(n))
    for t in range(n):
        for i in range(2):
            on = circles[paths[:, t]] == i
            assert circle_posterior[t, i] == pytest.approx(posterior[on, t].sum(), abs=1e-9)
            assert smoothed[t, i] == pytest.approx(posterior[on, -1].sum(), abs=1e-9)
        for h, k in enumerate(horizons):
            np.testing.assert_allclose(prediction[t, h], posterior[:, t] @ ahead[k][:, t], atol=1e-9)
    # The functions that everybody uses, with the limits that they have.
    result = optimal_filter.predict(process, X, horizons, initial, first_step=first_step)
    np.testing.assert_allclose(result["prediction"][3], prediction[:, 1], atol=1e-5)
    np.testing.assert_allclose(result["center"], center, atol=1e-5)
    np.testing.assert_allclose(result["log_likelihood"], log_likelihood, atol=1e-6)
    found = optimal_filter.smooth(process, X, initial, first_step=first_step)
    np.testing.assert_allclose(found["circle_posterior"], smoothed, atol=1e-5)


@pytest.mark.parametrize("initial", ["visit start", "stationary"])
def test_a_centre_that_stands_still_gives_the_exact_filter(initial):
    series, process = make_process(3, seed=3, dwell=(6.0, 1.5))
    X = simulate(series, process, 300)[0]
    exact = optimal_filter.predict(process, X, (1, 6), initial)
    smoothed = optimal_filter.smooth(process, X, initial)
    starts, past = optimal_filter.initial_law(process, initial)
    filtering = moving_filter.MovingFilter(process, starts, past, 0.0, 6, Limits(drop=60.0), keep_tree=True)
    (_, log_likelihood, posterior, phasor, flux, center), = filtering.blocks(X)
    prediction = optimal_filter.predictions_of(process, optimal_filter.prediction_map(process, (1, 6)), phasor, flux,
                                               center)
    assert np.all(center == 0)
    np.testing.assert_allclose(prediction[:, 1], exact["prediction"][6], atol=1e-10)
    np.testing.assert_allclose(posterior, exact["circle_posterior"], atol=1e-10)
    np.testing.assert_allclose(log_likelihood, exact["log_likelihood"], atol=1e-10)
    circle, theta, by_tree = optimal_filter.states_of(process, filtering.occupancy(len(X)))
    np.testing.assert_allclose(by_tree, smoothed["circle_posterior"], atol=1e-7)
    np.testing.assert_array_equal(circle, smoothed["circle"])
    np.testing.assert_allclose(np.cos(theta - smoothed["theta"]), 1, atol=1e-6)
