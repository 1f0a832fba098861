"""The process that is learned from labelled steps, and the floor of an observer who has to learn it."""

import dataclasses
import json
import math

import numpy as np
import pytest
from conftest import TINY_DATA

import circle_process
import dataset
import learned
import masked_model_gpu_mamba_next as training
import optimal_filter
import unseen

N = 20_000


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """30,000 steps whose file says nothing true of the process: what is learned must come from X and states."""
    import markov_circles_timeseries as generator

    folder = tmp_path_factory.mktemp("learned")
    generator.main(generator.parse_args([*TINY_DATA, "--n-steps", "30000", "--data-dir", str(folder)]))
    return dataset.load_series(folder)


def points_of(process, circle, step):
    theta = process.entry_angles[circle] + 2 * np.pi * step / process.periods[circle]
    return circle_process.points(process, np.full(len(step), circle), theta)


def test_what_is_learned_is_the_process(series):
    true = optimal_filter.process_from_series(series)
    blind = dataclasses.replace(series, thetas=None, process=dataclasses.replace(
        series.process, radii=series.process.radii * 3, periods=series.process.periods + 1, planes=None), config={})
    found = learned.learned_process(blind, N)
    assert found.periods.tolist() == true.periods.tolist()
    assert found.noise_std == pytest.approx(true.noise_std, rel=0.01)
    np.testing.assert_allclose(found.planes @ found.planes.transpose(0, 2, 1), np.tile(np.eye(2), (4, 1, 1)), atol=1e-9)
    for circle in range(4):
        on_true, on_found = (points_of(p, circle, np.arange(40)) for p in (true, found))
        n = np.sum(series.states[:N] == circle)
        # Of a plane and a radius 2 (dim - 1) numbers are fitted: this far a point is off on average, squared.
        expected = true.noise_std**2 * (2 * 6 - 2) / n
        assert np.square(on_true - on_found).sum(axis=1).mean() < 4 * expected
    assert np.abs(found.transition_matrix - true.transition_matrix).max() < 0.2
    assert not found.transition_matrix.diagonal().any()
    assert found.transition_matrix.sum(axis=1) == pytest.approx(np.ones(4))
    assert np.abs(found.dwell_law[:, :5] - true.dwell_law[:, :5]).max() < 0.1


def test_steps_behind_the_training_part_teach_nothing(series):
    X, states = series.X.copy(), series.states.copy()
    X[N:], states[N:] = 7.0, 0
    one, other = (learned.learned_process(s, N) for s in (series, dataclasses.replace(series, X=X, states=states)))
    for name in ("radii", "planes", "transition_matrix", "dwell_law", "noise_std"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_the_noise_is_what_is_left_per_number_that_was_not_fitted():
    """Planes and radii take 2 (dim - 1) numbers per circle: with so few steps their share of the noise shows."""
    found = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        states, theta = np.repeat([0, 1, 0, 1, 0], [5, 7, 10, 7, 5]), np.r_[0:5, 0:7, 0:10, 0:7, 0:5] * 2 * np.pi
        X = 5 * np.eye(6)[2 * states] * np.cos(theta / np.where(states, 7, 5))[:, None]
        X += 5 * np.eye(6)[2 * states + 1] * np.sin(theta / np.where(states, 7, 5))[:, None]
        series = dataset.Series((X + 0.5 * rng.standard_normal(X.shape)).astype(np.float32), states)
        found.append(learned.learned_process(series, len(X)).noise_std**2)
    # 204 values less 20 that were fitted: the mean of 60 estimates is off by 1.3 % on average, and 10 % without that
    assert np.mean(found) == pytest.approx(0.25, rel=0.04)


def test_dwell_times_and_transitions_are_the_likeliest_ones():
    rng = np.random.default_rng(0)
    periods = rng.choice([10, 40, 90, 300], 20_000)
    lengths = np.maximum(1, np.rint(rng.normal(400, 100, 20_000) / periods)).astype(int) * periods
    mean, std = learned.fit_dwell(lengths, periods)
    assert mean == pytest.approx(400, abs=3) and std == pytest.approx(100, abs=3)
    # A visit of one revolution may have been meant to be as short as one likes: it is rounded up.
    periods = rng.choice([10, 20, 40], 20_000)
    lengths = np.maximum(1, np.rint(rng.normal(25, 20, 20_000) / periods)).astype(int) * periods
    mean, std = learned.fit_dwell(lengths, periods)
    assert mean == pytest.approx(25, abs=1) and std == pytest.approx(20, abs=1)
    # By hand: the mean of a Dirichlet law whose α makes the counts likeliest, on a grid.
    circles = rng.choice(3, 60)
    circles = circles[np.r_[True, np.diff(circles) != 0]]
    counts = np.array([[sum((circles[:-1] == i) & (circles[1:] == j)) for j in range(3)] for i in range(3)])

    def log_likelihood(alpha):
        total = 0.0
        for i in range(3):
            total += math.lgamma(2 * alpha) - math.lgamma(counts[i].sum() + 2 * alpha)
            total += sum(math.lgamma(counts[i, j] + alpha) - math.lgamma(alpha) for j in range(3) if j != i)
        return total

    alpha = max(np.exp(np.linspace(-7, 5, 4001)), key=log_likelihood)
    matrix = (counts + alpha) * (1 - np.eye(3))
    np.testing.assert_allclose(learned.fit_transitions(circles, 3), matrix / matrix.sum(axis=1, keepdims=True),
                               atol=2e-3)


def test_what_cant_be_learned_is_said(series, capsys):
    for more, reason in (({"center_walk_std": 0.1}, "circles that move"), ({"drift": True}, "circles that move")):
        assert learned.learner_of(dataclasses.replace(series, config={**series.config, **more}), N) is None
        assert f"no floor of an observer who learns the process: {reason}" in capsys.readouterr().out
    assert learned.learner_of(series, 60) is None
    assert "has no whole visit in the training part" in capsys.readouterr().out


def test_the_second_floor_lies_between_the_exact_one_and_a_model(series, script, tmp_path):
    process, learner = optimal_filter.process_from_series(series), learned.learner_of(series, N)
    part = unseen.unseen_part(series, process, 100, 60_000)
    exact, second = (unseen.floor_blocks(dataclasses.replace(part, process=p), [1]) for p in (process, learner.process))
    excess, error = unseen.excess_and_error(second["mse"][1], exact["mse"][1], part.weights)
    # Each circle's 2 (dim - 1) numbers cost as much noise variance per step as steps share them, and a little for the
    # transitions.
    assert excess - 2 * error > 0 and excess < 100 * 3 * 4 * 10 / (N * 6)
    nats, _ = unseen.mean_and_error(second["nll"][1] - exact["nll"][1], part.weights)
    assert 0 < nats < 0.01


def test_it_stands_beside_the_exact_floor(script, shared_data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "finish", lambda *given: None)  # draws figures
    name = "masked_model_gpu_mamba_next"
    tiny = ["--d-model", "16", "--n-layers", "1", "--d-state", "4", "--d-ff", "16", "--seq-len", "64", "--epochs", "1",
            "--data-dir", shared_data, "--mixture", "2", "--max-horizon", "2"]
    out = script(name, *tiny, "--checkpoint", tmp_path / "a.pt").out
    series = dataset.load_series(shared_data)
    learner = learned.learner_of(series, 2700)
    _, starts, _ = dataset.split_windows(3000, 64, 256, 0.1)
    floors = optimal_filter.window_floors(learner.process, series, starts, 64, (1, 2))
    assert ("the same filter with the process learned from 2,700 labelled steps on the validation windows: "
            f"MSE {floors['mse'][1]:.4f} at horizon 1, MSE {floors['mse'][2]:.4f} at horizon 2, "
            f"NLL {floors['nll'][1]:.4f} at horizon 1") in out
    out = script(name, "--eval", tmp_path / "a.pt", "--test-steps", 20_000).out
    part = unseen.unseen_part(series, optimal_filter.process_or_none(series), 64, 20_000)
    exact, second = (unseen.floor_blocks(dataclasses.replace(part, process=p), [1, 2])
                     for p in (part.process, learner.process))
    percent = unseen.excess_and_error(second["mse"][1], exact["mse"][1], part.weights)
    nats = unseen.mean_and_error(second["nll"][1] - exact["nll"][1], part.weights)
    assert out.splitlines()[-1] == (
        "an observer who learns the process from the 2,700 labelled training steps: "
        f"{unseen.with_error(*percent, '+.2f', ' %')} and {unseen.with_error(*nats, '+.4f', ' nats')} at horizon 1")
    # Not where every epoch has new steps.
    out = script(name, *tiny, "--fresh", "--checkpoint", tmp_path / "b.pt").out
    assert "optimal filter on" in out and "learned from" not in out
    assert "an observer who learns" not in script(name, "--eval", tmp_path / "b.pt").out
    done = script("optimal_filter", "--data-dir", shared_data, "--seq-len", 64, "--stride", 256, "--horizons", "1,2",
                  "--save-dir", tmp_path)
    (path,) = tmp_path.glob("optimal_filter*.json")
    report = json.loads(path.read_text())
    assert report["learned_from_steps"] == 2700
    assert [row["val_window_learned_mse"] for row in report["horizons"]] == pytest.approx(list(floors["mse"].values()))
    assert "process learned" in done.out and f"{floors['mse'][2]:.4f}" in done.out
