"""songs.py: what it says of real series, at the rates it claims, and of series that are no song of the process."""

import dataclasses
import itertools

import numpy as np
import pytest
from test_generate import toy_series

import circle_process
import optimal_filter
import songs

SEED_LEN = 40


@pytest.fixture(scope="module")
def toy():
    """A small series of 3 circles, and its process."""
    series = toy_series()
    return series, optimal_filter.process_from_series(series)


def judged(process, X):
    """The analysis and the summary of one series, its first SEED_LEN steps being the seed."""
    song = songs.analyse(process, X[None, :SEED_LEN], X[None, SEED_LEN:])
    return song, songs.summarise(process, song)


def drawn(process, n_steps, seed):
    """A series of the process, (n_steps, features)."""
    rng = np.random.default_rng(seed)
    circles, steps = optimal_filter.draw_path(process, n_steps, rng)
    theta = process.entry_angles[circles] + 2 * np.pi * steps / process.periods[circles]
    noise = rng.standard_normal((n_steps, process.feature_dim))
    return circle_process.points(process, circles, theta) + process.noise_std * noise


def drawn_visits(process, n_steps, seed):
    """The visits of a series as `analyse` would find them, without drawing its points."""
    circles, _ = optimal_filter.draw_path(process, n_steps, np.random.default_rng(seed))
    table = songs.visit_table(circles, np.ones(n_steps, bool), SEED_LEN)
    return np.column_stack([np.zeros(len(table), int), table])


# ---- real series pass, at the rates that are claimed ------------------------------------------------------------


def test_a_real_series_is_a_song(toy):
    series, process = toy
    song, summary = judged(process, series.X)
    states = series.states[SEED_LEN:]
    assert (song["labels"][0] == states).mean() > 0.999
    visits = [(k, len(list(steps))) for k, steps in itertools.groupby(states.tolist())]
    assert summary["share_on_process"] == 1
    assert summary["steps_on_process"] == [len(states)]
    assert summary["transitions"] == len(visits) - 1
    # the first visit began in the seed, whose length is not counted as a dwell time
    assert summary["mean_dwell"] == pytest.approx(np.mean([n for _, n in visits[1:-1]]), rel=0.01)
    assert summary["dwell_p_value"] > 0.01
    rate, error = optimal_filter.entropy_rate(process)
    assert abs(summary["log_likelihood"] + rate) < 4 * (error + summary["log_likelihood_error"])


def test_so_many_steps_of_real_series_count_as_off_as_is_claimed(toy, monkeypatch):
    _, process = toy
    monkeypatch.setattr(songs, "FALSE_ALARM", 0.01)
    X = np.stack([drawn(process, 200, seed) for seed in range(200)])
    on = songs.analyse(process, X[:, :SEED_LEN], X[:, SEED_LEN:])["on"]
    assert 1 - on.mean() == pytest.approx(0.01, abs=0.004)


@pytest.mark.parametrize("n_steps", [200, 2000])
def test_p_values_of_dwell_times_are_as_small_as_they_say(toy, n_steps):
    _, process = toy
    p = [songs.dwell_p_value(process, drawn_visits(process, n_steps, seed)) for seed in range(200)]
    p = np.array([value for value in p if value is not None])
    assert len(p) > 180
    for level in (0.01, 0.05, 0.2, 0.5):
        assert (p <= level).mean() < level + 3 * np.sqrt(level * (1 - level) / len(p)) + 0.005
    assert (p <= 0.5).mean() > 0.4


def test_19_of_20_real_series_lie_in_the_band_of_total_variation(toy):
    _, process = toy
    P, inside = process.transition_matrix, []
    for seed in range(200):
        counts = songs.transition_counts(drawn_visits(process, 2000, seed), 3)
        left = counts.sum(axis=1)
        distance = np.nansum(songs.total_variation(counts, P) * left) / left.sum()
        _, low, high = songs.chance_total_variation(left, P)[-1]
        inside.append(low <= distance <= high)
    assert 0.9 < np.mean(inside) < 0.99


# ---- what is no song doesn't pass ------------------------------------------------------------------------------


def test_a_frozen_step(toy):
    series, process = toy
    X = series.X[:600].copy()
    X[300:] = X[300]
    song, summary = judged(process, X)
    assert not song["on"][0, 310:].any()
    assert 250 <= summary["steps_on_process"][0] <= 275
    assert summary["transitions"] == (np.diff(series.states[SEED_LEN:300]) != 0).sum()
    assert summary["log_likelihood"] < -20


@pytest.mark.parametrize("noise_std", [0.0, 0.5])
def test_one_circle_for_ever(toy, noise_std):
    _, process = toy
    n = 1500
    theta = process.entry_angles[1] + 2 * np.pi * np.arange(n) / process.periods[1]
    X = circle_process.points(process, 1, theta) + noise_std * np.random.default_rng(0).standard_normal((n, 6))
    song, summary = judged(process, X)
    # The smoother must leave the circle at times, since no visit lasts for ever; nothing near such a time counts.
    assert len(np.unique(song["labels"])) > 1
    assert summary["transitions"] == 0 and summary["circles_visited"] == 1 and summary["completed_visits"] == 0
    assert summary["share_on_process"] < 0.95
    assert summary["log_likelihood"] < -optimal_filter.entropy_rate(process)[0] - 5


def test_a_circle_that_is_never_left_after_a_real_transition_has_impossible_dwell_times(toy):
    series, process = toy
    change = int(np.flatnonzero(np.diff(series.states) != 0)[3]) + 1
    circle = series.states[change]
    stay = circle_process.points(process, circle, process.entry_angles[circle] + 2 * np.pi * np.arange(400)
                                 / process.periods[circle])
    _, summary = judged(process, np.concatenate([series.X[change - 100:change], stay]))
    assert summary["dwell_p_value"] <= 0.001


@pytest.mark.parametrize("name", ["shuffled", "white noise", "silence", "backwards", "another process"])
def test_a_foreign_series(toy, name):
    series, process = toy
    rng = np.random.default_rng(0)
    X = {"shuffled": rng.permutation(series.X[:1500]),
         "white noise": series.X.std() * rng.standard_normal((1500, 6)),
         "silence": np.zeros((1500, 6)),
         "backwards": series.X[:1500][::-1],
         "another process": toy_series(1500, seed=9).X}[name]
    _, summary = judged(process, X)
    assert summary["share_on_process"] < 0.01
    assert summary["transitions"] == summary["completed_visits"] == 0
    assert summary["total_variation"] is None and summary["dwell_p_value"] is None and summary["mean_dwell"] is None
    assert summary["total_variation_band"] == [None, None]
    assert summary["log_likelihood"] < -40


def test_wrong_dwell_times_and_wrong_transitions_are_told(toy):
    _, process = toy
    slow = dataclasses.replace(process, dwell_law=circle_process.dwell_law(process.periods, 46, 8))
    assert songs.dwell_p_value(process, drawn_visits(slow, 8000, 1)) < 0.01
    uniform = dataclasses.replace(process, transition_matrix=(1 - np.eye(3)) / 2)
    counts = songs.transition_counts(drawn_visits(uniform, 8000, 1), 3)
    left = counts.sum(axis=1)
    distance = np.nansum(songs.total_variation(counts, process.transition_matrix) * left) / left.sum()
    assert distance > songs.chance_total_variation(left, process.transition_matrix)[-1, 2]


# ---- the parts, by brute force ---------------------------------------------------------------------------------


def test_long_songs_are_smoothed_in_blocks_that_change_nothing(toy, monkeypatch):
    series, process = toy
    whole, _ = judged(process, series.X)
    monkeypatch.setattr(songs, "BLOCK", 100)
    blocks = list(songs.overlapping_blocks(process, 3000))
    assert len(blocks) > 2
    assert [step for first, last, _, _ in blocks for step in range(first, last)] == list(range(3000))
    parts, _ = judged(process, series.X)
    for name, values in whole.items():
        np.testing.assert_allclose(parts[name], values, rtol=1e-6, atol=1e-6)


def test_the_log_likelihood_is_that_of_the_filter_given_the_seed(toy):
    series, process = toy
    song, _ = judged(process, series.X[:300])
    found = optimal_filter.predict(process, series.X[:300], initial="stationary")["log_likelihood"][SEED_LEN:]
    np.testing.assert_allclose(song["log_likelihood"][0], found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [1, 3, 4, 9])
def test_window_mean(window):
    values = np.random.default_rng(0).random(9)
    expected = []
    for t in range(9):
        first = min(max(t - window // 2, 0), 9 - window)
        expected.append(values[first:first + window].mean())
    np.testing.assert_allclose(songs.window_mean(values, window), expected)


def test_window_length(toy):
    _, process = toy
    assert songs.window_length(process) == 4
    assert songs.window_length(dataclasses.replace(process, periods=np.array([1, 5, 9]))) == 1


def test_visits_count_where_both_sides_are_on_the_process():
    #                   seed      | song
    labels = np.array([0, 0, 1, 1,  1, 2, 2, 0, 0, 0, 1, 1, 2, 2])
    on = np.array([1, 1, 1, 1,      1, 1, 1, 1, 0, 1, 1, 1, 1, 0], bool)
    table = songs.visit_table(labels, on, 4)
    assert table.tolist() == [[1, -2, 1, 1, 1], [2, 1, 3, 1, 1], [0, 3, 4, 1, 0], [0, 5, 6, 0, 1], [1, 6, 8, 1, 1],
                              [2, 8, 9, 1, 0]]
    visits = np.column_stack([np.zeros(6, int), table])
    counts = np.zeros((3, 3), int)
    for a, b in ((1, 2), (2, 0), (0, 1), (1, 2)):
        counts[a, b] += 1
    np.testing.assert_array_equal(songs.transition_counts(visits, 3), counts)
    circles, dwells = songs.completed_dwells(visits)
    assert circles.tolist() == [2, 1] and dwells.tolist() == [2, 2]


def test_visits_of_different_samples_do_not_follow_each_other():
    visits = np.array([[0, 0, 0, 5, 0, 1], [0, 1, 5, 9, 1, 0], [1, 2, 0, 9, 0, 0]])
    assert songs.transition_counts(visits, 3).tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_revolutions_are_counted_where_their_end_was_seen(toy):
    _, process = toy  # periods 8, 12, 16
    M = process.dwell_law.shape[1]
    visits = np.array([
        [0, 0, 10, 34, 1, 1],   # ended after 3 revolutions: went on after 1 and 2
        [0, 1, 34, 34 + 30, 1, 0],  # its end wasn't seen: went on after 1 and 2
        [1, 2, -20, 28, 1, 1],  # the first revolution ended before the song did begin: went on after 2, ended after 3
        [1, 1, 28, 52, 0, 1],   # nobody saw it begin
        [2, 2, 0, 16, 1, 0],    # one revolution, and nobody saw whether it went on
        [3, 0, 0, 8 * (M + 5), 1, 0],  # longer than any
    ])
    at_risk, ended = np.zeros((3, M + 1), int), np.zeros((3, M + 1), int)
    at_risk[0, :3] += 1
    ended[0, 2] += 1
    at_risk[1, :2] += 1
    at_risk[2, 1:3] += 1
    ended[2, 2] += 1
    at_risk[0, :M + 1] += 1
    found = songs.revolution_ends(process, visits)
    np.testing.assert_array_equal(found[0], at_risk)
    np.testing.assert_array_equal(found[1], ended)
    assert songs.dwell_p_value(process, visits) == 0.0
    assert songs.dwell_p_value(process, visits[3:5]) is None


def test_what_no_simulation_shows_is_as_unlikely_as_so_many_simulations_can_say(toy):
    """Twenty visits of one revolution, under a law that gives hardly any: possible, and so more likely than 0."""
    process = dataclasses.replace(toy[1], dwell_law=np.array([[1e-6, 1 - 1e-6]] * 3))
    visits = np.array([[0, 0, first, first + process.periods[0], 1, 1] for first in range(0, 2000, 100)])
    assert songs.dwell_p_value(process, visits) == 1 / (songs.DWELL_DRAWS + 1)


def test_deviance_is_twice_the_log_likelihood_ratio():
    k, n, p = np.array([0, 3, 5]), np.array([4, 7, 5]), np.array([0.2, 0.5, 0.9])
    expected = 0.0
    for a, b, c in zip(k, n, p, strict=True):
        best = a / b
        expected += 2 * sum(count * np.log(share / rate) for count, share, rate in
                            ((a, best, c), (b - a, 1 - best, 1 - c)) if count)
    assert songs.deviance(k, n, p) == pytest.approx(expected)


def test_total_variation():
    P = np.array([[0, 0.5, 0.5], [1, 0, 0], [0.25, 0.75, 0]])
    counts = np.array([[0, 3, 1], [2, 0, 2], [0, 0, 0]])
    np.testing.assert_allclose(songs.total_variation(counts, P), [0.25, 0.5, np.nan])


def test_chance_total_variation_has_the_mean_and_the_quantiles_of_draws():
    P = np.array([[0, 0.7, 0.2, 0.1], [1, 0, 0, 0], [0.3, 0.3, 0, 0.4], [0.5, 0.5, 0, 0]])
    left, rng = np.array([70, 30, 10, 0]), np.random.default_rng(1)
    draws = []
    for _ in range(4000):
        rows = [abs(rng.multinomial(n, p) / n - p).sum() / 2 if n else np.nan for n, p in zip(left, P, strict=True)]
        draws.append([*rows, np.nansum(rows * left) / left.sum()])
    draws = np.array(draws)
    expected = np.column_stack([draws.mean(axis=0), *np.quantile(draws, (0.025, 0.975), axis=0)])
    np.testing.assert_allclose(songs.chance_total_variation(left, P), expected, atol=0.02)
    assert np.isnan(songs.chance_total_variation([0, 0, 0, 0], P)).all()


@pytest.mark.parametrize("off, patience, expected", [
    ("0000", 2, 4), ("1111", 2, 0), ("0101011", 2, 5), ("0101", 2, 4), ("0011", 3, 4), ("01", 1, 1),
])
def test_steps_until_off(off, patience, expected):
    assert songs.steps_until_off(np.array([c == "0" for c in off]), patience) == expected


def test_the_error_of_a_mean_of_dependent_numbers():
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(200):
        steps = rng.standard_normal((2, 5000))
        mean, error = songs.mean_and_error(steps + np.roll(steps, 1, axis=1))  # neighbours share half of their noise
        means.append(mean)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)
    assert songs.mean_and_error(np.ones((1, 7))) == (1.0, None)


def test_dwell_law_is_the_law_of_the_visits(toy):
    _, process = toy
    lengths, law = songs.dwell_time_law(process, np.array([0, 0, 2]))
    assert law.sum() == pytest.approx(1)
    rng = np.random.default_rng(0)
    draws = [p * np.maximum(1, np.round(rng.normal(40, 8, 20000) / p)) for p in process.periods[[0, 0, 2]]]
    assert lengths @ law == pytest.approx(np.mean(draws), rel=0.01)
    circles, dwells = songs.completed_dwells(drawn_visits(process, 200_000, 0))
    assert songs.mean_dwell_of_law(process) == pytest.approx(dwells.mean(), rel=0.02)
    assert set(circles.tolist()) == {0, 1, 2}


# ---- the clock --------------------------------------------------------------------------------------------------


def visits_that_miss(process, missed, seed):
    """A series of visits of three revolutions, each as many steps longer as `missed` says, with noise."""
    rng, parts = np.random.default_rng(seed), []
    for n, error in enumerate(missed):
        circle = n % process.n_circles
        steps = np.arange(3 * process.periods[circle] + error)
        angles = process.entry_angles[circle] + 2 * np.pi * steps / process.periods[circle]
        parts.append(circle_process.points(process, np.full(len(steps), circle), angles))
    X = np.concatenate(parts)
    return X + process.noise_std * rng.standard_normal(X.shape)


def test_clock_errors_are_the_steps_by_which_visits_miss_the_end_of_a_revolution(toy):
    _, process = toy
    missed = [0, 0, -2, 1, 0, 3, -1, 0, 0, 2, 0]
    errors = songs.clock_errors(process, visits_that_miss(process, missed, 1))
    # The first beginning isn't known to the step, and the last end isn't in the series.
    assert errors.tolist() == missed[1:-1]
    song = songs.analyse(process, *(part[None] for part in np.split(visits_that_miss(process, missed, 1), [SEED_LEN])))
    summary = songs.summarise(process, song)
    assert summary["visit_ends"] == 9
    assert summary["visit_ends_within"] == pytest.approx([4 / 9, 6 / 9, 8 / 9, 1])


def test_a_real_series_keeps_the_clock_and_what_is_no_song_has_none(toy):
    series, process = toy
    lengths = [len(list(steps)) for _, steps in itertools.groupby(series.states.tolist())]
    errors = songs.clock_errors(process, series.X)
    assert not errors.any() and len(errors) in (len(lengths) - 2, len(lengths) - 1)
    noise = np.random.default_rng(0).standard_normal((2000, process.feature_dim)) * 5
    assert len(songs.clock_errors(process, noise)) == 0
    circle = np.arange(2000)
    for_ever = circle_process.points(process, np.zeros(2000, int), process.entry_angles[0] + 2 * np.pi * circle / 8)
    assert len(songs.clock_errors(process, for_ever)) == 0
    walking = dataclasses.replace(process, center_walk_std=0.1)
    assert len(songs.clock_errors(walking, series.X)) == 0
    # a stretch that fits nowhere is passed over, and the visit after it doesn't count
    broken = np.concatenate([series.X[:1000], noise[:100], series.X[1000:]])
    assert not songs.clock_errors(process, broken).any() and len(songs.clock_errors(process, broken)) > len(errors) - 6
