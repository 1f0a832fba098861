"""Where the excess falls, against loops over the steps."""

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
