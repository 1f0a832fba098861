"""The filter for a centre that walks: against every path written out, a particle filter, the exact filter and a bound.

The reference for one hidden path is a normal law over all numbers of the series at once, with its covariance written
out: nothing of it is recursive, as a Kalman filter is.
"""

import contextlib
import dataclasses
import functools
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import only
from scipy.special import gammaln, ive, logsumexp
from scipy.stats import multivariate_normal
from test_optimal_filter import NOISE, dense_hmm, enumerate_paths, make_process, point

import circle_process
import cli
import dataset
import figures
import generate
import markov_circles_timeseries as generator
import moving_filter
import observer
import optimal_filter
import songs
from moving_filter import Limits

WIDER = Limits(drop=80.0, merge=0.0, most=100_000)


def walking(process, walk_std):
    return dataclasses.replace(process, center_walk_std=walk_std)


def simulate(series, process, n, seed=0, first_step=0):
    """X, states, thetas and centres of n steps by the definition of the process."""
    rng = np.random.default_rng(seed)
    config, states, thetas, tilts = series.config, [], [], []
    circle = rng.integers(process.n_circles)
    while len(states) < n:
        period = process.periods[circle]
        revolutions = max(1, round(rng.normal(config["dwell_mean"], config["dwell_std"]) / period))
        for step in range(revolutions * period):
            states.append(circle)
            thetas.append((process.entry_angles[circle] + 2 * np.pi * step / period) % (2 * np.pi))
        tilts.append(tilt_of_visit(process, circle, revolutions * period, thetas[-revolutions * period:], rng))
        circle = rng.choice(process.n_circles, p=process.transition_matrix[circle])
    clean = np.array([point(series, i, angle) for i, angle in zip(states[:n], thetas[:n], strict=True)])
    clean = clean + np.concatenate(tilts)[:n]
    steps = rng.normal(size=(n, clean.shape[1])) * process.center_walk_std
    centers = np.cumsum(steps, axis=0) - steps[0] + rng.normal(size=clean.shape[1]) * np.sqrt(
        first_step) * process.center_walk_std
    X = clean + centers + process.noise_std * rng.normal(size=clean.shape)
    return X, np.array(states[:n]), np.array(thetas[:n]), centers


def tilt_of_visit(process, circle, length, thetas, rng):
    """How far the points of a visit (length, dim) are moved, as data/README.md says."""
    moved = np.zeros((length, process.planes.shape[2]))
    if process.tilt_rate and circle % 2 == 0:
        v1, v2 = process.planes[circle]
        axis = rng.normal(size=len(v1))
        axis -= v1 * (v1 @ axis) + v2 * (v2 @ axis)
        axis /= np.linalg.norm(axis)
        for step in range(length):
            alpha = process.tilt_rate * step / (length - 1)
            moved[step] = process.radii[circle] * np.sin(thetas[step]) * (
                (np.cos(alpha) - 1) * v2 + np.sin(alpha) * axis)
    return moved


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

    filtering = optimal_filter.new_filter(process, n, initial, horizons, first_step, keep_tree=True, limits=WIDER)
    maps = optimal_filter.prediction_map(process, horizons)
    (_, log_likelihood, circle_posterior, phasor, flux, center, _), = filtering.blocks(X)
    prediction = optimal_filter.predictions_of(process, maps, phasor, flux, center)
    np.testing.assert_allclose(log_likelihood, np.diff(evidence, prepend=0), atol=1e-9)
    _, _, smoothed = optimal_filter.states_of(*filtering.state_sums(n))
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


def test_distances_are_from_the_circles_around_their_centre():
    """A song around a centre that has walked far is as near to its circles as one around the origin."""
    series, process = make_process(2, seed=1, dwell=(6.0, 1.5))
    X = simulate(series, walking(process, 0.8), 60)[0] + 5
    found = optimal_filter.smooth(walking(process, 0.8), X)
    around = [point(series, i, angle) for i in range(2) for angle in np.linspace(0, 2 * np.pi, 2001)]
    brute = [np.linalg.norm(center + around - x, axis=1).min() for center, x in zip(found["center"], X, strict=True)]
    np.testing.assert_allclose(found["distance"], brute, atol=3e-3)
    assert np.abs(found["center"]).max() > 2


@pytest.mark.parametrize("initial", ["visit start", "stationary"])
def test_a_centre_that_stands_still_gives_the_exact_filter(initial):
    series, process = make_process(3, seed=3, dwell=(6.0, 1.5))
    X = simulate(series, process, 300)[0]
    exact = optimal_filter.predict(process, X, (1, 6), initial)
    smoothed = optimal_filter.smooth(process, X, initial)
    starts, past = optimal_filter.initial_law(process, initial)
    filtering = moving_filter.MovingFilter(process, starts, past, 0.0, (1, 6), Limits(drop=60.0), keep_tree=True)
    (_, log_likelihood, posterior, phasor, flux, center, _), = filtering.blocks(X)
    prediction = optimal_filter.predictions_of(process, optimal_filter.prediction_map(process, (1, 6)), phasor, flux,
                                               center)
    assert np.all(center == 0)
    np.testing.assert_allclose(prediction[:, 1], exact["prediction"][6], atol=1e-10)
    np.testing.assert_allclose(posterior, exact["circle_posterior"], atol=1e-10)
    np.testing.assert_allclose(log_likelihood, exact["log_likelihood"], atol=1e-10)
    circle, theta, by_tree = optimal_filter.states_of(*filtering.state_sums(len(X)))
    np.testing.assert_allclose(by_tree, smoothed["circle_posterior"], atol=1e-7)
    np.testing.assert_array_equal(circle, smoothed["circle"])
    np.testing.assert_allclose(np.cos(theta - smoothed["theta"]), 1, atol=1e-6)


def particle_filter(process, config, X, n_particles, seed):
    """log p(x_t | x_{<t}) and E[x_{t+1} | x_{<=t}] by a bootstrap particle filter that simulates the process.

    Gordon, Salmond & Smith 1993. A particle is a circle, a step of the visit, the visit's length and a centre; nothing
    of the filter under test is used, and no law of it: dwell times are drawn as the generator draws them.
    """
    rng = np.random.default_rng(seed)
    dim = X.shape[1]

    def enter(circle):
        dwell = rng.normal(config["dwell_mean"], config["dwell_std"], len(circle))
        return np.maximum(1, np.rint(dwell / process.periods[circle])).astype(int) * process.periods[circle]

    def position(circle, step, length, axis):
        angle = process.entry_angles[circle] + 2 * np.pi * step / process.periods[circle]
        alpha = (process.tilt_rate * (circle % 2 == 0) * step / (length - 1))[:, None]
        v1, v2 = process.planes[circle, 0], process.planes[circle, 1]
        tilted = np.cos(alpha) * v2 + np.sin(alpha) * axis
        return process.radii[circle][:, None] * (np.cos(angle)[:, None] * v1 + np.sin(angle)[:, None] * tilted)

    def draw_axis(circle):
        axis = rng.normal(size=(len(circle), dim))
        planes = process.planes[circle]
        axis -= np.einsum("np,npd->nd", np.einsum("npd,nd->np", planes, axis), planes)
        return axis / np.linalg.norm(axis, axis=1, keepdims=True)

    circle = rng.integers(process.n_circles, size=n_particles)
    step, length, center = np.zeros(n_particles, int), enter(circle), np.zeros((n_particles, dim))
    axis = draw_axis(circle)
    log_likelihood, prediction = np.empty(len(X)), np.empty_like(X)
    cumulative = process.transition_matrix.cumsum(axis=1)
    for t, x in enumerate(X):
        error2 = ((x - center - position(circle, step, length, axis))**2).sum(axis=1)
        log_weight = -error2 / (2 * process.noise_std**2) - dim / 2 * np.log(2 * np.pi * process.noise_std**2)
        log_likelihood[t] = logsumexp(log_weight) - np.log(n_particles)
        weight = np.exp(log_weight - logsumexp(log_weight))
        chosen = np.searchsorted(weight.cumsum(), (np.arange(n_particles) + rng.random()) / n_particles)
        circle, step, length, center, axis = (
            a[chosen.clip(max=n_particles - 1)] for a in (circle, step, length, center, axis))
        step = step + 1
        over = np.flatnonzero(step == length)
        circle = circle.copy()
        circle[over] = (rng.random(len(over))[:, None] > cumulative[circle[over]]).sum(axis=1)
        step[over] = 0
        length[over], axis[over] = enter(circle[over]), draw_axis(circle[over])
        prediction[t] = (center + position(circle, step, length, axis)).mean(axis=0)
        center = center + process.center_walk_std * rng.normal(size=center.shape)
    return log_likelihood, prediction


@pytest.mark.parametrize("walk_std, tilt_rate", [(0.3, 0.0), (0.0, 1.2), (0.2, 1.2)])
def test_agrees_with_a_particle_filter(walk_std, tilt_rate):
    series, process = make_process(3, seed=5, dwell=(9.0, 3.0), dim=4, noise_std=0.8)
    process = dataclasses.replace(process, center_walk_std=walk_std, tilt_rate=tilt_rate)
    X = simulate(series, process, 60, seed=2)[0]
    ours = optimal_filter.predict(process, X, (1,))
    runs = [particle_filter(process, series.config, X, 8_000, seed) for seed in range(4)]
    log_likelihood, prediction = (np.stack([run[i] for run in runs]) for i in range(2))
    for found, samples in ((ours["log_likelihood"], log_likelihood), (ours["prediction"][1], prediction)):
        error = samples.std(axis=0, ddof=1) / 2  # of the mean of four runs
        assert np.mean(((found - samples.mean(axis=0)) / error)**2) < 4.5  # of a t with 3 degrees of freedom: 3
        assert np.abs(found - samples.mean(axis=0)).mean() < 0.06  # and the particles are many enough to tell
    with pytest.raises(AssertionError):  # which a filter that takes the circles to stand still fails
        still = dataclasses.replace(process, center_walk_std=0.0, tilt_rate=0.0)
        np.testing.assert_allclose(optimal_filter.predict(still, X, (1,))["log_likelihood"],
                                   log_likelihood.mean(axis=0), atol=0.5)


def test_an_observer_who_is_told_circle_and_phase_is_never_undercut():
    series, process = make_process(3, seed=7, dwell=(30.0, 6.0), noise_std=0.5, periods=[10, 12, 15])
    for walk_std in (0.02, 0.1, 0.5):
        moving = walking(process, walk_std)
        X, states, thetas, _ = simulate(series, moving, 20_000, seed=3)
        errors = optimal_filter.predict(moving, X, (1, 4), keep_predictions=False)["squared_error"]
        # The same noise for both: the observer who is told makes its own error on this very series.
        told, _ = moving_filter.follow_walk(X - circle_process.points(moving, states, thetas), walk_std, 0.5)
        for k in (1, 4):
            told_errors = ((X[k:] - circle_process.points(moving, states, thetas)[k:] - told[:-k])**2).mean(axis=1)
            difference = errors[k] - told_errors
            assert difference.mean() > -3 * difference.std() / np.sqrt(len(difference))
            bound = moving_filter.told_floor(walk_std, 0.5, k)
            assert told_errors.mean() == pytest.approx(bound, rel=0.05)
            assert errors[k].mean() > 0.95 * bound
    assert [round(moving_filter.told_floor(walk, 2.83), 3) for walk in (0.01, 0.03, 0.1, 0.3)] == [
        8.037, 8.094, 8.297, 8.904]  # as the author worked them out


def test_the_walk_alone_is_followed_as_least_squares_follows_it():
    """Filter and smoother of a walk through noise against the normal equations of the whole path."""
    rng = np.random.default_rng(0)
    n, walk_std, noise_std = 12, 0.7, 1.3
    values = rng.normal(size=(n, 2))
    for initial_variance in (0.0, 4.0):
        steps = np.minimum(np.arange(n)[:, None], np.arange(n))
        centers = initial_variance + walk_std**2 * steps
        filtered, smoothed = moving_filter.follow_walk(values, walk_std, noise_std, initial_variance)
        np.testing.assert_allclose(
            smoothed, centers @ np.linalg.solve(centers + noise_std**2 * np.eye(n), values), atol=1e-12)
        for t in range(n):
            seen = slice(0, t + 1)
            noisy = centers[seen, seen] + noise_std**2 * np.eye(t + 1)
            np.testing.assert_allclose(filtered[t], centers[t, seen] @ np.linalg.solve(noisy, values[seen]),
                                       atol=1e-12)


def test_features_outside_the_planes_are_one_kalman_filter(monkeypatch):
    """Two features that no circle reaches: turning the space into them changes nothing but the coordinates."""
    monkeypatch.setattr(moving_filter, "BLOCK", 7)  # what is known of the centre is handed on from block to block
    series, process = make_process(2, seed=4, dim=6, dwell=(6.0, 2.0))  # two planes span at most four dimensions
    process = walking(process, 0.4)
    assert moving_filter.span_of_planes(process).shape == (4, 6)
    X = simulate(series, process, 60)[0]
    found = optimal_filter.predict(process, X, (1, 3))
    span = moving_filter.span_of_planes(process)
    inside = dataclasses.replace(process, planes=process.planes @ span.T)
    alone = optimal_filter.predict(inside, X @ span.T, (1, 3))
    outside = X - X @ span.T @ span
    kalman, _ = moving_filter.follow_walk(outside, 0.4, NOISE)
    np.testing.assert_allclose(found["prediction"][3], alone["prediction"][3] @ span + kalman, atol=1e-9)
    before, _ = moving_filter.walk_variances(60, 0.4, NOISE, 0.0)
    rest = np.linalg.svd(span)[2][4:]  # an orthonormal basis of the other two dimensions
    innovation = (outside - np.r_[np.zeros((1, 6)), kalman[:-1]]) @ rest.T
    of_rest = -(innovation**2).sum(axis=1) / (2 * (before + NOISE**2)) - np.log(2 * np.pi * (before + NOISE**2))
    np.testing.assert_allclose(found["log_likelihood"], alone["log_likelihood"] + of_rest, atol=1e-9)


def test_a_long_series_in_stretches_is_what_it_is_in_one(monkeypatch):
    for walk_std in (0.0, 0.4):
        series, process = make_process(3, seed=8, dwell=(9.0, 2.0), noise_std=0.4)
        process = walking(process, walk_std)
        X = simulate(series, process, 3000, seed=4)[0]
        whole = optimal_filter.predict(process, X, (1, 5))
        smoothed = optimal_filter.smooth(process, X)
        with monkeypatch.context() as patch:
            patch.setattr(optimal_filter, "STRETCH", 500)
            cuts = optimal_filter.stretches(process, len(X), True)
            assert len(cuts) == 6 and cuts[0].begin == 0 and cuts[2].begin < cuts[2].first == 1000 == cuts[1].last
            assert cuts[1].last < cuts[1].end and cuts[-1].last == cuts[-1].end == 3000
            found = optimal_filter.predict(process, X, (1, 5))
            by_parts = optimal_filter.smooth(process, X)
            for name in ("circle_posterior", "log_likelihood", "center"):
                np.testing.assert_allclose(found[name], whole[name], atol=1e-7)
            np.testing.assert_allclose(found["prediction"][5], whole["prediction"][5], atol=1e-7)
            np.testing.assert_allclose(found["squared_error"][5], whole["squared_error"][5], atol=1e-7)
            np.testing.assert_allclose(by_parts["circle_posterior"], smoothed["circle_posterior"], atol=1e-7)
            np.testing.assert_allclose(by_parts["center"], smoothed["center"], atol=1e-7)
            # Where a stretch has not forgotten its start, the whole series is filtered in one go.
            patch.setattr(optimal_filter, "forgotten", lambda left, right: False)
            again = optimal_filter.predict(process, X, (1, 5))
            np.testing.assert_array_equal(again["prediction"][5], whole["prediction"][5])


def test_stretches_that_disagree_where_they_meet_are_noticed():
    left = {"posterior": np.array([[0.2, 0.8], [0.5, 0.5]]), "circle": np.array([1, 0]),
            "error 1": np.array([1, np.nan])}
    right = {"posterior": np.array([[0.5, 0.5]]), "circle": np.array([1]), "error 1": np.array([np.nan])}
    assert optimal_filter.forgotten(left, right)
    assert not optimal_filter.forgotten(left, right | {"posterior": np.array([[0.5 + 1e-6, 0.5]])})
    assert not optimal_filter.forgotten(left, right | {"error 1": np.array([2.0])})


def test_a_song_that_jumps_is_found_again():
    """The process never jumps into the middle of a revolution. A generated series may, and is not lost for good."""
    series, process = make_process(3, seed=9, dwell=(60.0, 5.0), noise_std=0.3, periods=[20, 25, 30])
    process = walking(process, 0.05)
    X, states, _, _ = simulate(series, process, 1200, seed=1)
    jumping = np.concatenate([X[:333], X[777:]])
    true = np.concatenate([states[:333], states[777:]])
    jumping[333:] += X[332] - X[332]  # the centre stays where it has wandered to in the meantime
    found = optimal_filter.smooth(process, jumping)
    assert np.mean(found["circle"][:320] == true[:320]) > 0.99
    assert np.mean(found["circle"][400:] == true[400:]) > 0.95
    # The revolution that the jump cuts counts until then only: at no step are there more circles than one.
    filtering = optimal_filter.new_filter(process, len(jumping), "visit start", keep_tree=True)
    for _ in filtering.blocks(jumping):
        pass
    posterior, phasor = filtering.state_sums(len(jumping))
    np.testing.assert_allclose(posterior.sum(axis=1), 1, atol=1e-6)
    assert (np.abs(phasor).sum(axis=1) < 1 + 1e-6).all()
    filtered = optimal_filter.predict(process, jumping)
    assert np.mean(filtered["circle_posterior"][380:].argmax(axis=1) == true[380:]) > 0.95


@pytest.mark.parametrize("initial", ["visit start", "stationary"])
def test_planes_that_hardly_tilt_give_the_exact_filter(initial):
    """Although each length of a visit is then a hypothesis of its own, and the predictions are made another way."""
    series, process = make_process(3, seed=3, dwell=(6.0, 1.5))
    X = simulate(series, process, 300)[0]
    exact, tilting = (optimal_filter.predict(p, X, (1, 6), initial)
                      for p in (process, dataclasses.replace(process, tilt_rate=1e-9)))
    for name in ("circle_posterior", "log_likelihood"):
        np.testing.assert_allclose(tilting[name], exact[name], atol=1e-8)
    for k in (1, 6):
        np.testing.assert_allclose(tilting["prediction"][k], exact["prediction"][k], atol=1e-8)
    smoothed, by_tree = (optimal_filter.smooth(p, X, initial)["circle_posterior"]
                         for p in (process, dataclasses.replace(process, tilt_rate=1e-9)))
    np.testing.assert_allclose(by_tree, smoothed, atol=1e-6)


def test_predictions_of_tilting_planes_err_as_little_as_they_can():
    """An error is orthogonal to everything that the past tells: to a prediction made earlier, for one."""
    series, process = make_process(3, seed=11, dwell=(24.0, 5.0), noise_std=0.3, periods=[6, 7, 8], dim=5)
    process = dataclasses.replace(process, tilt_rate=1.0)
    X = simulate(series, process, 20_000, seed=5)[0]
    tilting = optimal_filter.predict(process, X, (1, 4))
    flat = optimal_filter.predict(dataclasses.replace(process, tilt_rate=0.0), X, (1, 4))
    for k in (1, 4):
        assert tilting["squared_error"][k].mean() < 0.85 * flat["squared_error"][k].mean()
        prediction = tilting["prediction"][k][:-k]
        product = ((X[k:] - prediction) * prediction).sum(axis=1)
        assert abs(product.mean()) < 4 * product.std() / np.sqrt(len(product) / 5)
    assert tilting["log_likelihood"].mean() > flat["log_likelihood"].mean() + 0.1


@pytest.mark.parametrize("n", [1, 2, 5, 18])
def test_sphere_tables_are_ratios_of_bessel_functions(n):
    """At the places of the tables, and between two of them, where `look_up` interpolates."""
    def by_bessel(place):
        kappa, order = n * np.expm1(place * moving_filter.TABLE_STEP), n / 2 - 1
        log_phi = gammaln(n / 2) + order * np.log(2 / kappa) + np.log(ive(order, kappa)) + kappa
        return kappa, ive(n / 2, kappa) / ive(order, kappa), log_phi

    tables, place = moving_filter.sphere_tables(n), np.array([1, 40, 400, 1000, 2000, 2998])
    _, mean_length, log_phi = by_bessel(place)
    np.testing.assert_allclose(tables["mean_length"][place], mean_length, rtol=1e-10)
    np.testing.assert_allclose(tables["log_phi"][place], log_phi, rtol=1e-10, atol=1e-11)
    for kappa, mean_length, log_phi in zip(*by_bessel(place + np.array([0.5, 0.1, 0.3, 0.8, 0.4, 0.6])), strict=True):
        found = moving_filter.look_up.py_func(SimpleNamespace(dimension=float(n), **tables), kappa)
        assert found == pytest.approx((mean_length, log_phi), rel=1e-8, abs=5e-6)


@pytest.mark.parametrize("n", [2, 4, 18])
def test_beyond_the_sphere_tables_the_mean_length_goes_on(n):
    circles = SimpleNamespace(dimension=float(n), **moving_filter.sphere_tables(n))
    end = n * np.expm1((len(circles.log_phi) - 1) * moving_filter.TABLE_STEP)
    for kappa in (1.01 * end, 10 * end):
        mean_length, log_phi = moving_filter.look_up.py_func(circles, kappa)
        assert (1 - mean_length) * 2 * kappa == pytest.approx(n - 1, rel=1e-3)  # 1 - A_n(κ) = (n - 1) / 2κ + O(1 / κ²)
        order = n / 2 - 1  # and log Φ grows by the logarithm of κ^-order I_order(κ)
        growth = [np.log(ive(order, k)) + k - order * np.log(k) for k in (kappa, end)]
        assert log_phi - circles.log_phi[-1] == pytest.approx(growth[0] - growth[1], rel=0, abs=1e-3)


def test_merging_two_hypotheses_costs_at_most_what_their_distance_tells():
    """½ w1 w2 / (w1 + w2) d² / P, as the module's docstring has it; and what is forgotten of the revolutions."""
    hyp = SimpleNamespace(center=np.array([[1.0, 2.0]]), log_weight=np.log([0.3]), law=np.array([[0.5, 0.5]]))
    cost = moving_filter.merging_cost.py_func
    given = hyp, 0, np.log(0.1), np.array([1.0, 4.0]), np.array([0.2, 0.8])
    both = 0.3 * 0.1 / 0.4
    assert cost(*given, 0.7, False) == pytest.approx(0.5 * both * 2.0**2 / 0.7)
    assert cost(*given, 0.7, True) == pytest.approx(0.5 * both * 2.0**2 / 0.7 + both * 0.6)
    assert cost(*given, 0.0, False) == np.inf and cost(*given[:3], hyp.center[0], hyp.law[0], 0.0, True) == 0


# ---- the script, its files and its figure ----------------------------------------------------------------------

DATA = ["--no-umap", "--n-steps", "3000", "--n-circles", "3", "--ambient-dim", "5", "--min-period", "8", "--max-period",
        "20", "--dwell-mean", "60", "--dwell-std", "15", "--radius-mean", "5", "--noise-std", "0.7", "--seed", "3"]
WINDOWS = ["--seq-len", "60", "--stride", "40", "--horizons", "1,4"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a series whose centre walks, made as a user makes it."""
    folder = tmp_path_factory.mktemp("walking")
    generator.main(generator.parse_args([*DATA, "--center-walk-std", "0.2", "--data-dir", str(folder)]))
    return folder


@pytest.fixture
def walking_data(made, tmp_path):
    return shutil.copytree(made, tmp_path / "data")


def test_script(script, walking_data, tmp_path, monkeypatch):
    saved = {}
    monkeypatch.setattr(figures, "save", lambda fig, path: saved.update({path.name: fig}))
    monkeypatch.setattr(optimal_filter, "SHOWN_STEPS", 200)
    done = script("optimal_filter", "--data-dir", walking_data, "--save-dir", tmp_path / "out", *WINDOWS)
    assert done.code == 0 and done.err == "", done.err
    report = json.loads(only(tmp_path / "out", "optimal_filter*.json").read_text())
    series = dataset.load_series(walking_data)
    process = optimal_filter.process_from_series(series)
    assert process.center_walk_std == report["center_walk_std"] == 0.2
    found = optimal_filter.predict(process, series.X, (1, 4))
    plain = dataclasses.replace(series, folder=None)
    windows = optimal_filter.window_floors(process, plain, np.arange(2700, 2941, 40), 60, (1, 4))
    variance = -0.02 + np.sqrt(0.02**2 + 0.04 * 0.49)  # P, from the issue: -q/2 + √(q²/4 + qσ²)
    for row, k in zip(report["horizons"], (1, 4), strict=True):
        assert row["mse"] == pytest.approx(found["squared_error"][k].mean(), rel=1e-9)
        assert row["val_window_mse"] == pytest.approx(windows["mse"][k], rel=1e-9)
        assert row["told_mse"] == pytest.approx(0.49 + variance + k * 0.04, rel=1e-9)
        assert row["told_mse"] < 1.05 * row["mse"] and row["mse"] < row["val_window_mse"]
        assert re.search(rf"^ +{k} .* {row['told_mse']:.4f}$", done.out, re.M)
    limits = report["limits"]
    assert limits["change_percent"] < 1e-3
    assert limits["hypotheses_per_step_wider"] > 2 * limits["hypotheses_per_step"] > 2
    assert f"with {limits['hypotheses_per_step_wider']:.1f} the errors change by at most" in done.out
    assert report["circle_accuracy"] > 0.95

    center = next(iter(saved.values())).axes[2]
    config = json.loads((walking_data / "config.json").read_text())
    walk_rng = np.random.default_rng(3).spawn(5)[4]  # by the generator's own documentation: the fifth stream
    true = np.r_[np.zeros((1, 5)), 0.2 * walk_rng.standard_normal((2999, 5))].cumsum(axis=0)
    assert config["center_walk_std"] == 0.2
    lines = center.get_lines()
    assert [line.get_label() for line in lines[:2]] == ["true", "inferred from the past"] and len(lines) == 6
    for c in range(3):
        np.testing.assert_array_equal(lines[2 * c].get_xdata(), np.arange(2700, 2900))
        np.testing.assert_allclose(lines[2 * c].get_ydata(), true[2700:2900, c], atol=1e-9)
        np.testing.assert_allclose(lines[2 * c + 1].get_ydata(), found["center"][2700:2900, c], atol=1e-9)
    assert center.get_xlabel() == "time step" and center.get_ylabel() == "centre, features 0…2\n(data units)"
    assert center.get_xlim() == (2700, 2900)
    told = next(iter(saved.values())).axes[3].get_lines()[3]
    assert told.get_label() == "circle and phase told"
    np.testing.assert_allclose(told.get_ydata(), [row["told_mse"] for row in report["horizons"]])


def test_the_centre_of_data_with_another_seed_is_inferred(walking_data):
    series = dataset.load_series(walking_data)
    process = optimal_filter.process_from_series(series)
    shown, inferred = slice(100, 300), np.zeros((3000, 5))
    true, label, _ = optimal_filter.center_paths(series, process, shown, inferred)
    assert label == "true"
    for config in ({"seed": 4}, {"seed": None}, {"center_walk_std": "far"}):
        series.config = series.config | config
        told, label, rows = optimal_filter.center_paths(series, process, shown, inferred)
        assert label == "circle and phase told" and rows.shape == told.shape == (200, 5)
        assert np.std(told - true) < 0.5 < np.std(true)
        on_circle = series.X[:300] - circle_process.points(process, series.states[:300], series.thetas[:300])
        past, whole = moving_filter.follow_walk(on_circle, process.center_walk_std, process.noise_std)
        np.testing.assert_array_equal(told, whole[100:])
        assert np.abs(told - past[100:]).max() > 0.01


def test_what_the_limits_cost_is_the_largest_change_up_or_down(monkeypatch):
    def filter_windows(process, series, starts, seq_len, horizons, limits=None):
        return (1.0, 0.97, 49.0, 5.0) if limits is None else (1.0, 1.0, 49.0, 12.0)

    monkeypatch.setattr(optimal_filter, "filter_windows", filter_windows)
    assert optimal_filter.cost_of_limits(None, None, [0, 50], 40, [1, 2]) == {
        "change_percent": pytest.approx(3), "hypotheses_per_step": 5.0, "hypotheses_per_step_wider": 12.0}


def test_training_and_evaluation_have_a_floor_and_a_ceiling(walking_data, capsys):
    series = dataset.load_series(walking_data)
    optimum = observer.Optimum(series)
    assert optimum.circle_accuracy > 0.9
    starts = np.arange(2700, 2900, 50)
    floors = optimum.window_floors(starts, 60, [1])
    assert 0.49 < floors["mse"][1] < 2 and "no optimal" not in capsys.readouterr().out
    process = optimal_filter.process_from_series(series)
    alone = [optimal_filter.predict(process, series.X[s:s + 60], (1,), "stationary", first_step=s) for s in starts]
    assert floors["mse"][1] == pytest.approx(np.mean([a["squared_error"][1].mean() for a in alone]))
    assert floors["nll"][1] == pytest.approx(-np.mean([a["log_likelihood"][1:].mean() for a in alone]))


def test_songs_are_judged_around_the_centre(walking_data):
    """The true series as a song, far from where it began: on the process all the time."""
    series = dataset.load_series(walking_data)
    process = optimal_filter.process_from_series(series)
    song = generate.reference_song(process, series, [1500, 2000], 100, 400)
    assert np.mean(song["labels"][0] == series.states[1600:2000]) > 0.98
    assert song["on"].all() and np.median(song["deviation"]) < 1.1 * process.noise_std
    still = dataclasses.replace(process, center_walk_std=0.0)
    assert generate.reference_song(still, series, [1500, 2000], 100, 400)["on"].mean() < 0.5
    rate, error = optimal_filter.entropy_rate(process, 3000)
    mean, spread = songs.mean_and_error(song["log_likelihood"])
    assert abs(mean + rate) < 4 * (spread + error)


def test_data_whose_planes_tilt(script, tmp_path, monkeypatch):
    monkeypatch.setattr(optimal_filter, "entropy_rate", functools.partial(optimal_filter.entropy_rate, n_steps=4000))
    drift = [*DATA, "--drift", "--drift-rate", "0.8"]
    folder = tmp_path / "both"
    generator.main(generator.parse_args([*drift, "--center-walk-std", "0.1", "--data-dir", str(folder)]))
    done = script("optimal_filter", "--data-dir", folder, "--save-dir", tmp_path / "out", *WINDOWS)
    assert done.code == 0 and "the circles move" in done.out, done.err
    report = json.loads(only(tmp_path / "out", "optimal_filter*.json").read_text())
    assert report["tilt_rate"] == 0.8 and report["limits"]["change_percent"] < 1e-3
    assert report["circle_accuracy"] > 0.95
    assert abs(report["entropy_rate"] + report["log_likelihood_per_step"]) < 0.1
    series = dataset.load_series(folder)
    process = optimal_filter.process_from_series(series)
    still = dataclasses.replace(process, tilt_rate=0.0)
    wrong = optimal_filter.predict(still, series.X, (1,))["squared_error"][1].mean()
    assert report["horizons"][0]["mse"] < 0.95 * wrong

    # Two planes span four of six dimensions: those that planes tilt in are drawn again from the flags.
    config = generator.config_of(generator.parse_args([*drift, "--n-circles", "2", "--ambient-dim", "6"]))
    series = generator.generate(config)
    process = optimal_filter.process_from_series(series)
    assert process.basis.shape == (6, 6)
    series.config["seed"] += 1
    with pytest.raises(cli.UserError, match="does not give the subspace"):
        optimal_filter.process_from_series(series)


def test_what_the_walk_makes_impossible_is_said(walking_data):
    series = dataset.load_series(walking_data)
    series.process = dataclasses.replace(series.process, planes=None)
    with pytest.raises(cli.UserError, match="no planes, and circles that move"):
        optimal_filter.process_from_series(series)


# ---- floors that were computed before --------------------------------------------------------------------------


def test_a_floor_is_computed_once(walking_data, monkeypatch):
    calls = []
    filter_windows = optimal_filter.filter_windows
    monkeypatch.setattr(optimal_filter, "filter_windows", lambda *a, **k: calls.append(a) or filter_windows(*a, **k))
    series = dataset.load_series(walking_data)
    process = optimal_filter.process_from_series(series)
    starts = np.arange(100, 400, 100)
    floors = optimal_filter.window_floors(process, series, starts, 50, (1, 2))
    path = walking_data / "floors.json"
    whole = path.read_text()

    def again(process=process, series=series, starts=starts, seq_len=50, horizons=(1, 2)):
        """The floors, and whether they were computed."""
        calls.clear()
        return optimal_filter.window_floors(process, series, starts, seq_len, horizons), bool(calls)

    assert again() == (floors, False)  # the same numbers to the last digit
    assert again(series=dataset.load_series(walking_data)) == (floors, False)
    changed = series.X.copy()
    changed[7, 3] += 1e-3
    for other in ({"series": dataclasses.replace(series, X=changed)}, {"starts": starts + 1}, {"seq_len": 51},
                  {"horizons": (1, 3)}, {"process": dataclasses.replace(process, center_walk_std=0.21)},
                  {"process": dataclasses.replace(process, noise_std=0.71)},
                  {"process": dataclasses.replace(process, dwell_law=process.dwell_law[:, ::-1].copy())}):
        found, computed = again(**other)
        assert computed
        assert again(**other) == (found, False)
    assert again() == (floors, False)  # the older entries are still there
    number = repr(floors["mse"][1])
    for damaged in ("", "[]", "{", "[" * 100_000, '{"a": 1}', whole[:-20], whole.replace('"crc"', '"cr"'),
                    whole.replace(number, "NaN"), whole.replace(number, repr(floors["mse"][1] / 2))):
        path.write_text(damaged)
        assert again() == (floors, True)
        assert again() == (floors, False)
    path.write_bytes(b"\xff\xfe")
    assert again() == (floors, True)


def test_a_folder_that_cannot_be_written_to_keeps_no_floor(walking_data, monkeypatch):
    @contextlib.contextmanager
    def refuse(path):
        raise cli.UserError(f"can't write {path}")
        yield

    monkeypatch.setattr(cli, "writing", refuse)
    series = dataset.load_series(walking_data)
    process = optimal_filter.process_from_series(series)
    assert optimal_filter.window_floors(process, series, np.array([5]), 50)["mse"][1] > 0
    assert not (walking_data / "floors.json").exists()
