"""Where the excess falls, against loops over the steps."""

import numpy as np
import pytest
from test_optimal_filter import make_process, simulate

import excess


def test_every_prediction_is_one_event_and_the_right_one(monkeypatch):
    monkeypatch.setattr(excess, "FIRST_STEPS", 4)
    monkeypatch.setattr(excess, "AFTER_STEPS", 2)
    series, process = make_process(3, seed=1, dwell=(9.0, 4.0))
    series = simulate(series, 200)
    states, thetas = series.states, series.thetas
    starts, length = [0, 31, 170], 30
    found = excess.event_classes(process, states, thetas, starts, length)
    assert found.shape == (3, 29)
    since, age, wanted = 10**6, 0, []
    for t in range(200):
        switch = t > 0 and states[t] != states[t - 1]
        since, age = (0, 0) if switch else (since + 1, age + 1 if t else 0)
        ends = age % process.periods[states[t]] == 0
        wanted.append(1 if switch else 2 if since <= 2 else 3 if ends else 4)
    for row, start in enumerate(starts):
        assert found[row].tolist() == [0] * 4 + wanted[start + 5:start + length]
    assert set(found.ravel()) == set(range(len(excess.EVENTS)))


def test_shares_and_means_of_events_with_their_errors_over_blocks():
    rng = np.random.default_rng(0)
    errors, optimal = rng.random((6, 9)) + 1, rng.random((6, 9))
    classes, edges = rng.integers(0, 5, (6, 9)), np.array([0, 2, 3, 6])
    rows = excess.by_event(errors, optimal, classes, edges)
    assert [row["event"] for row in rows] == [*excess.EVENTS, "all"]
    difference = errors - optimal
    for i, row in enumerate(rows):
        here = classes == i if i < 5 else np.ones((6, 9), bool)
        assert row["predictions"] == here.mean()
        assert row["share"] == pytest.approx(difference[here].sum() / difference.sum())
        assert row["mean_excess"] == pytest.approx(difference[here].mean())
        parts = [(difference[a:b][here[a:b]].sum(), here[a:b].sum(), difference[a:b].sum())
                 for a, b in ((0, 2), (2, 3), (3, 6))]
        for key, column in (("mean_excess", 1), ("share", 2)):
            left = [part[0] - row[key] * part[column] for part in parts]
            wanted = np.sqrt(3 / 2 * np.square(left).sum()) / abs(sum(part[column] for part in parts))
            assert row[f"{key}_error"] == pytest.approx(wanted)
    assert excess.by_event(errors, optimal, classes, np.array([0, 6]))[0]["share_error"] is None


def test_errors_against_the_history_are_means_over_all_windows_of_each_bin(monkeypatch):
    monkeypatch.setattr(excess, "HISTORY_BINS", 4)
    errors = np.random.default_rng(0).random((3, 15))
    found = excess.by_history(errors, errors / 2)
    # Edges 1, 2, 4, 8, 16: the first bin is the prediction from one step alone
    wanted = [errors[:, 0].mean(), errors[:, 1:3].mean(), errors[:, 3:7].mean(), errors[:, 7:15].mean()]
    assert found["mse"] == pytest.approx(wanted) and found["optimal"] == pytest.approx(np.array(wanted) / 2)
    assert found["steps"] == [1, 2.5, 5.5, 11.5]
