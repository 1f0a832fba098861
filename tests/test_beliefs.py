"""The exact filter's beliefs against a plain hidden Markov model, and how much of them a representation holds."""

import dataclasses

import numpy as np
import pytest
from test_optimal_filter import NOISE, dense_hmm, log_density, make_process, simulate

import beliefs


@pytest.mark.parametrize("initial", ["visit start", "stationary"])
def test_beliefs_are_those_of_a_chain_over_all_hidden_states(initial):
    series, process = make_process(3, seed=4, dwell=(9.0, 3.0))
    X = simulate(series, 60).X
    states, T, means, starts = dense_hmm(series)
    i, r, e = np.array(states).T
    periods = process.periods[i]
    angle = process.entry_angles[i] + 2 * np.pi * e / periods
    wave = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    likelihood = np.exp(log_density(X, means, NOISE))
    found = beliefs.beliefs(process, X, initial)
    prior = starts[initial]
    for t in range(60):
        posterior = prior * likelihood[t] / (prior @ likelihood[t])
        prior = posterior @ T
        np.testing.assert_allclose(found.circle[t], [posterior[i == k].sum() for k in range(3)], atol=1e-6)
        np.testing.assert_allclose(found.phase[t], posterior @ wave, atol=1e-6)
        assert found.revolutions[t] == pytest.approx(posterior @ (e // periods), abs=1e-5)
        assert found.hazard[t] == pytest.approx(posterior[e + 1 == r * periods].sum(), abs=1e-6)
        if t < 59:
            assert found.error[t] == pytest.approx(np.mean((X[t + 1] - prior @ means)**2), rel=1e-5)
            assert found.nll[t] == pytest.approx(-np.log(prior @ likelihood[t + 1]), rel=1e-5)
    assert np.isnan(found.error[-1]) and np.isnan(found.nll[-1])


def test_windows_begin_without_a_past():
    series, process = make_process(2, seed=3)
    X = simulate(series, 50).X
    found = beliefs.in_windows(process, X, [0, 13, 30], 20)
    for row, start in enumerate([0, 13, 30]):
        alone = beliefs.beliefs(process, X[start:start + 20])
        for name in beliefs.Beliefs._fields:
            np.testing.assert_array_equal(getattr(found, name)[row], getattr(alone, name))


def test_circles_that_move_have_all_beliefs_but_the_revolutions():
    series, process = make_process(2, seed=3)
    X = simulate(series, 40).X
    still = beliefs.beliefs(process, X)
    moving = beliefs.beliefs(dataclasses.replace(process, center_walk_std=1e-7), X, first_step=0)
    assert moving.revolutions is None
    for name in ("circle", "phase", "hazard", "error", "nll"):
        np.testing.assert_allclose(getattr(moving, name), getattr(still, name), atol=2e-3)


def test_a_visit_may_end_near_the_last_step_of_a_revolution():
    series, process = make_process(2, seed=1, periods=[9, 14])
    series = simulate(series, 300)
    near = beliefs.near_an_end(process, series.states, series.thetas)
    step = 0
    for t in range(300):
        step = 0 if t and series.states[t] != series.states[t - 1] else step + (t > 0)
        period = process.periods[series.states[t]]
        last = period - 1 - step % period  # steps to go
        assert near[t] == (last <= 2 or last >= period - 2), t


def test_a_readout_finds_beliefs_that_are_there_and_none_in_noise():
    series, process = make_process(3, seed=2, dwell=(30.0, 9.0), periods=[4, 6, 9], noise_std=0.5)
    series = simulate(series, 6000)
    believed = beliefs.beliefs(process, series.X)
    near = beliefs.near_an_end(process, series.states, series.thetas)
    early, late = slice(4000), slice(4000, None)
    readout = beliefs.Readout(beliefs.rows_of(believed, early), near[early], beliefs.rows_of(believed, late),
                              near[late], 0)
    whole = beliefs.targets_of(believed)
    found = readout.r2(whole[early], whole[late])
    assert list(found) == ["circle", "phase", "revolutions", "hazard"]
    assert min(found.values()) > 0.999
    noise = np.random.default_rng(0).standard_normal((6000, 4))
    assert max(abs(value) for value in readout.r2(noise[early], noise[late]).values()) < 0.05
    on_circle = believed.circle  # the circle alone says nothing about the revolutions within it
    assert abs(readout.r2(on_circle[early], on_circle[late])["revolutions"]) < 0.1
    unknown = beliefs.rows_of(believed._replace(revolutions=None), early)
    late_ones = beliefs.rows_of(believed._replace(revolutions=None), late)
    assert beliefs.Readout(unknown, near[early], late_ones, near[late], 0).r2(whole[early], whole[late])[
        "revolutions"] is None
