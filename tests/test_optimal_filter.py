"""The exact filter against every hidden path of tiny processes, written out, and against a plain log-space HMM."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import arrays_of, only
from figure_checks import check_circle_legend, check_heatmap, check_strip, colour_bars, lines
from scipy.special import logsumexp
from scipy.stats import norm
from threadpoolctl import threadpool_info, threadpool_limits

import circle_process
import cli
import figures
import floor_cache
import optimal_filter
from dataset import Series

PERIODS = {2: [2, 3], 3: [2, 3, 4]}
NOISE = 1.1  # as large as the circles: every path keeps some weight


def make_process(n_circles, seed=0, dwell=(5.0, 2.0), dim=4, noise_std=NOISE, periods=None):
    """A tiny process as a Series of no steps and its Process."""
    rng = np.random.default_rng(seed)
    periods = np.array(periods or PERIODS[n_circles])
    matrix = rng.uniform(0.2, 1, (n_circles, n_circles)) * (1 - np.eye(n_circles))
    planes = np.stack([np.linalg.qr(rng.normal(size=(dim, 2)))[0].T for _ in range(n_circles)])
    series = Series(
        X=np.zeros((0, dim), np.float32), states=np.zeros(0, np.int64), thetas=np.zeros(0),
        process=circle_process.Process(
            transition_matrix=matrix / matrix.sum(axis=1, keepdims=True), radii=rng.uniform(1, 2, n_circles),
            entry_angles=rng.uniform(0, 2 * np.pi, n_circles), periods=periods, planes=planes),
        config={"noise_std": noise_std, "dwell_mean": dwell[0], "dwell_std": dwell[1]})
    return series, optimal_filter.process_from_series(series)


def simulate(series, n_steps, seed=1):
    """Fill in X, states and thetas of a Series with n_steps steps, by the definition of the process."""
    rng = np.random.default_rng(seed)
    config, states, thetas = series.config, [], []
    circle = rng.integers(series.n_circles)
    while len(states) < n_steps:
        period = series.process.periods[circle]
        revolutions = max(1, round(rng.normal(config["dwell_mean"], config["dwell_std"]) / period))
        for step in range(revolutions * period):
            states.append(circle)
            thetas.append((series.process.entry_angles[circle] + 2 * np.pi * step / period) % (2 * np.pi))
        circle = rng.choice(series.n_circles, p=series.process.transition_matrix[circle])
    series.states, series.thetas = np.array(states[:n_steps]), np.array(thetas[:n_steps])
    clean = np.array([point(series, i, angle) for i, angle in zip(series.states, series.thetas, strict=True)])
    series.X = (clean + config["noise_std"] * rng.normal(size=clean.shape)).astype(np.float32)
    return series


def point(series, circle, angle):
    v1, v2 = series.process.planes[circle]
    return series.process.radii[circle] * (np.cos(angle) * v1 + np.sin(angle) * v2)


def dwell_law(series, circle):
    """{revolutions: probability}, straight from the definition."""
    mean, std, period = series.config["dwell_mean"], series.config["dwell_std"], series.process.periods[circle]
    law = {r: norm.cdf((r + 0.5) * period, mean, std) - norm.cdf((r - 0.5) * period, mean, std)
           for r in range(2, 30)}
    return {1: norm.cdf(1.5 * period, mean, std)} | {r: p for r, p in law.items() if p > 1e-15}


def dense_hmm(series):
    """The process as a plain Markov chain over (circle, revolutions of the visit, step of the visit).

    Returns the list of states, its transition matrix, the emission means, and the law of the first state for both
    kinds of start, the stationary one as the chain's own fixed point.
    """
    K = series.n_circles
    laws = [dwell_law(series, i) for i in range(K)]
    states = [(i, r, e) for i in range(K) for r in laws[i] for e in range(r * series.process.periods[i])]
    index = {state: a for a, state in enumerate(states)}
    T, start = np.zeros((len(states), len(states))), np.zeros(len(states))
    for (i, r, e), a in index.items():
        if e + 1 < r * series.process.periods[i]:
            T[a, index[i, r, e + 1]] = 1
        else:
            for k in range(K):
                for revolutions, p in laws[k].items():
                    T[a, index[k, revolutions, 0]] = series.process.transition_matrix[i, k] * p
        if e == 0:
            start[a] = laws[i][r] / K
    means = np.array([point(series, i, series.process.entry_angles[i] + 2 * np.pi * e / series.process.periods[i])
                      for i, _, e in states])
    balance = np.vstack([T.T - np.eye(len(T)), np.ones(len(T))])
    stationary = np.linalg.lstsq(balance, np.r_[np.zeros(len(T)), 1])[0]
    return states, T, means, {"visit start": start, "stationary": stationary}


def enumerate_paths(T, start, length):
    """Every path of `length` states that has a positive probability: (paths (n, length), probabilities (n,))."""
    paths, probabilities = np.flatnonzero(start > 1e-15)[:, None], start[start > 1e-15]
    for _ in range(length - 1):
        grown = [(row, b) for row in range(len(paths)) for b in np.flatnonzero(T[paths[row, -1]])]
        rows, ends = np.array(grown).T
        probabilities = probabilities[rows] * T[paths[rows, -1], ends]
        paths = np.concatenate([paths[rows], ends[:, None]], axis=1)
    return paths, probabilities


def log_density(x, means, noise_std):
    """log N(x; mean, noise_std² I) for x (n, dim) and means (s, dim): (n, s)."""
    return norm.logpdf(x[:, None], means, noise_std).sum(axis=-1)


@pytest.mark.parametrize("initial", ["visit start", "stationary"])
@pytest.mark.parametrize("n_circles", [2, 3])
def test_matches_every_path_written_out(n_circles, initial):
    series, process = make_process(n_circles, seed=n_circles, dwell=(3.0, 1.2))
    n, horizons = 7, [1, 2, 3, 5]
    X = np.random.default_rng(5).normal(size=(n, 4)) * 1.5
    states, T, means, starts = dense_hmm(series)
    paths, probabilities = enumerate_paths(T, starts[initial], n + max(horizons))
    circles = np.array([state[0] for state in states])
    likelihood = log_density(X, means, NOISE)
    log_path = np.log(probabilities)[:, None] + np.cumsum(
        np.stack([likelihood[t, paths[:, t]] for t in range(n)], axis=1), axis=1)
    evidence = logsumexp(log_path, axis=0)
    posterior = np.exp(log_path - evidence)  # (paths, n): given x up to t

    result = optimal_filter.predict(process, X, horizons, initial)
    np.testing.assert_allclose(result["log_likelihood"], np.diff(evidence, prepend=0), atol=1e-10)
    smoothed = optimal_filter.smooth(process, X, initial)
    for t in range(n):
        for i in range(n_circles):
            on = circles[paths[:, t]] == i
            np.testing.assert_allclose(result["circle_posterior"][t, i], posterior[on, t].sum(), atol=1e-10)
            np.testing.assert_allclose(smoothed["circle_posterior"][t, i], posterior[on, -1].sum(), atol=1e-10)
        for k in horizons:
            np.testing.assert_allclose(result["prediction"][k][t], posterior[:, t] @ means[paths[:, t + k]],
                                       atol=1e-10)
    np.testing.assert_allclose(smoothed["log_likelihood"], result["log_likelihood"], atol=1e-12)


def reference_filter(series, X, initial, horizons):
    """Forward-backward in log space over the dense chain: what `predict` and `smooth` must give."""
    states, T, means, starts = dense_hmm(series)
    circles, steps = np.array([s[0] for s in states]), np.array([s[2] for s in states])
    emission = log_density(np.asarray(X, dtype=np.float64), means, series.config["noise_std"])
    with np.errstate(divide="ignore"):
        log_T, alpha = np.log(T), [np.log(np.maximum(starts[initial], 0)) + emission[0]]
    for t in range(1, len(X)):
        alpha.append(logsumexp(alpha[-1][:, None] + log_T, axis=0) + emission[t])
    beta = [np.zeros(len(states))]
    for t in range(len(X) - 1, 0, -1):
        beta.append(logsumexp(log_T + emission[t] + beta[-1], axis=1))
    alpha, beta = np.array(alpha), np.array(beta[::-1])
    filtered = np.exp(alpha - logsumexp(alpha, axis=1, keepdims=True))
    smoothed = np.exp(alpha + beta - logsumexp(alpha[-1]))
    of_circle = circles[:, None] == np.arange(series.n_circles)
    angles = series.process.entry_angles[circles] + 2 * np.pi * steps / series.process.periods[circles]
    return {"prediction": {k: filtered @ np.linalg.matrix_power(T, k) @ means for k in horizons},
            "circle_posterior": filtered @ of_circle, "smoothed": smoothed @ of_circle,
            "phasor": (smoothed * np.exp(1j * angles)) @ of_circle,
            "log_likelihood": np.diff(logsumexp(alpha, axis=1), prepend=0)}


@pytest.mark.parametrize("initial", ["visit start", "stationary"])
def test_matches_plain_hmm_on_a_longer_series(initial):
    series, process = make_process(3, seed=3, dwell=(6.0, 1.5))
    X, horizons = simulate(series, 250).X, [1, 2, 4, 13]
    wanted = reference_filter(series, X, initial, horizons)
    result = optimal_filter.predict(process, X, horizons, initial)
    np.testing.assert_allclose(result["circle_posterior"], wanted["circle_posterior"], atol=1e-10)
    for k in horizons:
        np.testing.assert_allclose(result["prediction"][k], wanted["prediction"][k], atol=1e-10)
        error = ((X[k:] - wanted["prediction"][k][:-k])**2).mean(axis=1)
        np.testing.assert_allclose(result["squared_error"][k], error, atol=1e-10)
    smoothed = optimal_filter.smooth(process, X, initial)
    np.testing.assert_allclose(smoothed["circle_posterior"], wanted["smoothed"], atol=1e-10)
    np.testing.assert_array_equal(smoothed["circle"], wanted["smoothed"].argmax(axis=1))
    mean_angle = wanted["phasor"][np.arange(len(X)), smoothed["circle"]]
    sharp = np.abs(mean_angle) > 0.1
    np.testing.assert_allclose(np.exp(1j * smoothed["theta"][sharp]), (mean_angle / np.abs(mean_angle))[sharp],
                               atol=1e-9)


def test_blocks_and_windows_of_any_length_agree(monkeypatch):
    series, process = make_process(3)
    X = simulate(series, 200).X
    whole = optimal_filter.predict(process, X, (1, 6))
    monkeypatch.setattr(optimal_filter, "BLOCK", 7)
    blocks = optimal_filter.predict(process, X, (1, 6))
    np.testing.assert_allclose(blocks["prediction"][6], whole["prediction"][6], atol=1e-13)
    for n in (1, 2, 3, 5):  # shorter than a revolution
        short = optimal_filter.predict(process, X[:n], (1, 6))
        np.testing.assert_allclose(short["prediction"][6], whole["prediction"][6][:n], atol=1e-13)
        assert short["squared_error"][6].shape == (0,)
        assert optimal_filter.smooth(process, X[:n], "stationary")["circle"].shape == (n,)


def test_burst_of_outliers_loses_no_state():
    """Log-probabilities fall to -1e6, where exp() is 0; what comes after must be as if nothing had been lost."""
    series, process = make_process(3, seed=7, dwell=(9.0, 1.5), noise_std=0.4)
    X = simulate(series, 170).X.astype(np.float64)
    X[100:110] += 400 * np.random.default_rng(0).normal(size=(10, 4))
    wanted = reference_filter(series, X, "visit start", [1, 3])
    result = optimal_filter.predict(process, X, [1, 3])
    np.testing.assert_allclose(result["prediction"][3], wanted["prediction"][3], atol=1e-7)
    np.testing.assert_allclose(result["circle_posterior"], wanted["circle_posterior"], atol=1e-7)
    smoothed = optimal_filter.smooth(process, X)
    np.testing.assert_allclose(smoothed["circle_posterior"], wanted["smoothed"], atol=1e-7)
    assert np.mean(smoothed["circle"][125:] == series.states[125:]) > 0.98
    assert smoothed["log_likelihood"][100:110].max() < smoothed["log_likelihood"][125:].min()
    assert smoothed["distance"][100:110].min() > 5 * smoothed["distance"][125:].max()


def test_data_that_the_process_cannot_make_still_get_an_answer():
    """A visit that never ends is impossible under the dwell law: the filter must stay finite all the same."""
    series, process = make_process(2, dwell=(4.0, 0.0), noise_std=0.05)
    step = np.arange(500)
    X = np.array([point(series, 0, process.entry_angles[0] + 2 * np.pi * j / process.periods[0]) for j in step])
    result = optimal_filter.predict(process, X, (1, 2))
    assert all(np.isfinite(value).all() for value in (result["prediction"][2], result["log_likelihood"]))
    assert np.isfinite(optimal_filter.smooth(process, X)["circle_posterior"]).all()


@pytest.mark.parametrize("period", [40, 120, 400, 1500])
def test_dwell_law(period):
    law = circle_process.revolution_law(period, 400.0, 100.0)
    assert law.sum() == pytest.approx(1, abs=1e-14)
    r = np.arange(2, len(law) + 1)
    wanted = norm.cdf((r + 0.5) * period, 400, 100) - norm.cdf((r - 0.5) * period, 400, 100)
    np.testing.assert_allclose(law[1:], wanted, atol=1e-14)
    draws = np.maximum(1, np.rint(np.random.default_rng(0).normal(400, 100, 200_000) / period)).astype(int)
    counts = np.bincount(draws, minlength=len(law) + 1)[1:]
    np.testing.assert_allclose(counts / len(draws), law, atol=6e-3)


def test_dwell_law_without_spread():
    np.testing.assert_array_equal(circle_process.revolution_law(100, 420.0, 0.0), [0, 0, 0, 1])
    np.testing.assert_array_equal(circle_process.revolution_law(100, 250.0, 0.0), [0, 1])  # round half to even
    np.testing.assert_array_equal(circle_process.revolution_law(100, 20.0, 0.0), [1])


def test_entry_rates_are_the_chain_s_own():
    series, process = make_process(3, dwell=(7.0, 3.0))
    states, _, _, starts = dense_hmm(series)
    begins = np.zeros(3)
    for (i, _, e), p in zip(states, starts["stationary"], strict=True):
        begins[i] += p * (e == 0)
    np.testing.assert_allclose(circle_process.entry_rates(process), begins, atol=1e-12)


def test_errors_are_those_the_filter_expects():
    """Over a long series the squared error of an optimal prediction equals its own predictive variance."""
    series, process = make_process(3, dwell=(9.0, 3.0), noise_std=0.3)
    X = simulate(series, 20_000).X
    floor = process.noise_std**2
    errors = optimal_filter.predict(process, X, (1, 2, 8), keep_predictions=False)["squared_error"]
    assert 0.97 * floor < errors[1].mean() < errors[2].mean() < errors[8].mean() < X.var(axis=0).mean() * 1.05
    # Nobody leaves a circle within a revolution: with the dwell fixed and the phase known only noise is left.
    fixed, process = make_process(2, dwell=(30.0, 0.0), noise_std=0.3, periods=[10, 15])
    fixed.process.transition_matrix[:] = [[0, 1], [1, 0]]
    errors = optimal_filter.predict(process, simulate(fixed, 20_000).X, (1, 8), keep_predictions=False)
    for k in (1, 8):
        assert errors["squared_error"][k][200:].mean() == pytest.approx(floor, rel=0.03)


def test_initial_law_of_the_first_circle():
    series, process = make_process(3)
    X = simulate(series, 30).X
    posterior = optimal_filter.predict(process, X, (), initial=[0, 1, 0])["circle_posterior"]
    np.testing.assert_array_equal(posterior[0], [0, 1, 0])
    optimal_filter.predict(process, X, (), initial=[0.5, 0.3, 0.2 + 5e-7])
    for wrong in ("somewhere", [0.5, 0.5], [0.5, 0.2, 0.2], [[0, 1, 0]], [1.2, -0.2, 0], [0.5, 0.5, 2e-6], [],
                  [math.nan, 0.5, 0.5], [math.inf, 0, 0]):
        with pytest.raises(ValueError, match="initial"):
            optimal_filter.predict(process, X, initial=wrong)


def test_window_errors():
    series, process = make_process(3)
    simulate(series, 300)
    starts, seq_len, horizons = [10, 40, 170], 50, (1, 4)
    windows, nll = {k: [] for k in horizons}, []
    for start in starts:
        X = series.X[start:start + seq_len]
        filtered = optimal_filter.predict(process, X, horizons, "stationary")
        nll.append(-filtered["log_likelihood"][1:])
        for k in horizons:
            windows[k].append((X[k:] - filtered["prediction"][k][:-k])**2)
    by_window = optimal_filter.window_floors(process, series, np.array(starts), seq_len, horizons)
    for k in horizons:
        assert by_window["mse"][k] == pytest.approx(np.mean(windows[k]), rel=1e-10)
    assert by_window["nll"] == {1: pytest.approx(np.mean(nll), rel=1e-10)}


@pytest.mark.parametrize("starts, horizons, message", [
    ([0, 250], (1, 49), None), ([0], (50,), "shorter than the window"), ([0], (1, 50), "shorter than the window"),
    ([0], (), "shorter than the window"), ([0], (0, 1), "must be 1 or more"), ([0], (1, -1), "must be 1 or more"),
    ([], (1,), "must lie in the series"), ([0, -1], (1,), "must lie in the series"),
    ([251, 0], (1,), "must lie in the series")])
def test_windows_lie_in_the_series_and_are_longer_than_the_horizons(starts, horizons, message):
    series = SimpleNamespace(n_steps=300)
    if message is None:
        assert optimal_filter.check_window(series, starts, 50, horizons) is not None
    else:
        with pytest.raises(ValueError, match=message):
            optimal_filter.check_window(series, np.array(starts), 50, horizons)


@pytest.mark.parametrize("X, message", [
    (np.zeros((1, 4)), None), (np.zeros((0, 4)), "X must be"), (np.zeros((5, 3)), "X must be"),
    (np.zeros((5, 5)), "X must be"), (np.zeros(4), "X must be"), (np.zeros((5, 4, 4)), "X must be"),
    (np.full((5, 4), np.nan), "NaN or infinity"), (np.array([[0, 0, 0, 0], [0, 0, 0, np.inf]]), "NaN or infinity"),
    (np.diag([np.nan, 1, 1, 1]), "NaN or infinity"), (np.diag([1, 1, 1, -np.inf]), "NaN or infinity")])
def test_a_series_that_the_process_cannot_have_made_is_refused(X, message):
    process = SimpleNamespace(feature_dim=4)
    if message is None:
        optimal_filter.check_series(process, X)
    else:
        with pytest.raises((ValueError, cli.UserError), match=message):
            optimal_filter.check_series(process, X)


@pytest.mark.parametrize("horizons, is_good", [("1,4", True), ("1,5", False), ("6,1", False)])
def test_the_flags_name_windows_longer_than_the_horizons(horizons, is_good, capsys):
    argv = ["--seq-len", "5", "--horizons", horizons]
    if is_good:
        assert optimal_filter.parse_args(argv).seq_len == 5
    else:
        with pytest.raises(SystemExit):
            optimal_filter.parse_args(argv)
        assert "--seq-len 5 must be longer than the largest of --horizons" in capsys.readouterr().err


def test_planes_are_recovered():
    series, process = make_process(3, noise_std=0.3, dim=6, periods=[3, 4, 5])
    simulate(series, 3000)
    planes, series.process = series.process.planes, dataclasses.replace(series.process, planes=None)
    refitted = optimal_filter.process_from_series(series)
    recovered = refitted.planes
    np.testing.assert_allclose(recovered @ recovered.transpose(0, 2, 1), np.tile(np.eye(2), (3, 1, 1)), atol=1e-12)
    np.testing.assert_allclose(recovered, planes, atol=0.05)
    # Planes fitted to the noise of the same data predict it too well, by what the docstring says.
    exact, fitted = (np.mean(optimal_filter.predict(p, series.X)["squared_error"][1]) for p in (process, refitted))
    assert exact - fitted == pytest.approx(0.09 * 3 * (2 * 6 - 3) / series.X.size, rel=0.6)
    series.states[series.states == 2] = 1
    with pytest.raises(cli.UserError, match="circle 2 is seen at too few angles"):
        optimal_filter.process_from_series(series)


@pytest.mark.parametrize(("change", "message"), [
    ({"drift": True}, "no usable drift_rate"),
    *(({"drift": True, "drift_rate": value}, "no usable drift_rate") for value in (math.nan, math.inf, -0.1)),
    *(({name: math.nan}, f"no usable {name}") for name in ("noise_std", "dwell_mean", "dwell_std", "center_walk_std")),
    *(({name: value}, f"no usable {name}") for value in (-1e-9, math.inf)
      for name in ("noise_std", "dwell_mean", "dwell_std", "center_walk_std")),
    ({"noise_std": 0.0}, "noise_std 0"), ({"noise_std": 9e-31}, "noise_std 9e-31"),
    ({"dwell_std": None}, "no usable dwell_std"),
    ({"dwell_mean": "long"}, "no usable dwell_mean"),
    ({"dwell_mean": 1e9}, "too many for the exact filter"),
])
def test_refuses_what_it_cannot_be_exact_for(change, message):
    series, _ = make_process(2)
    series.config = {k: v for k, v in (series.config | change).items() if v is not None}
    with pytest.raises(cli.UserError, match=message):
        optimal_filter.process_from_series(series)


def save_series(series, folder):
    folder.mkdir()
    np.savez(folder / "data.npz", **arrays_of(series))
    (folder / "config.json").write_text(json.dumps(series.config))


def run_script(*arguments):
    script = Path(optimal_filter.__file__)
    return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(script.parent)})


def test_script(tmp_path):
    series, process = make_process(3, dwell=(9.0, 3.0))
    save_series(simulate(series, 2000), tmp_path / "data")
    done = run_script("--data-dir", tmp_path / "data", "--save-dir", tmp_path / "out", "--horizons", "4,1",
                      "--seq-len", 50, "--stride", 10, "--val-fraction", 0.2)
    assert done.returncode == 0, done.stderr
    report = json.loads(only(tmp_path / "out", "optimal_filter*.json").read_text())
    assert only(tmp_path / "out", "optimal_filter*.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.suffix for p in (tmp_path / "out").iterdir()) == [".json", ".png"]
    result = optimal_filter.predict(process, series.X, (1, 4))
    windows = optimal_filter.window_floors(process, series, range(1600, 1951, 10), 50, (1, 4))
    assert report["noise_floor"] == NOISE**2 and [row["horizon"] for row in report["horizons"]] == [1, 4]
    for row in report["horizons"]:
        errors = result["squared_error"][row["horizon"]]
        assert row["mse"] == pytest.approx(errors.mean())
        assert row["val_mse"] == pytest.approx(errors[1600:].mean())
        assert row["val_window_mse"] == pytest.approx(windows["mse"][row["horizon"]])
        assert f"{row['mse']:.4f}" in done.stdout
    assert report["circle_accuracy"] == np.mean(result["circle_posterior"].argmax(axis=1) == series.states)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--horizons", "1,0"], "--horizons"),
    (["--horizons", "1,64", "--seq-len", "64"], "--seq-len 64 must be longer"),
    (["--data-dir", "nowhere"], "nowhere/data.npz not found"),
])
def test_script_says_what_is_wrong(refused, tmp_path, arguments, message):
    assert message in refused("optimal_filter", "--save-dir", tmp_path / "out", *arguments)
    assert not list(tmp_path.glob("out/*"))


def test_script_refuses_data_without_noise(refused, tmp_path):
    series, _ = make_process(2)
    simulate(series, 100).config["noise_std"] = 0.0
    save_series(series, tmp_path / "data")
    assert "noise_std 0" in refused("optimal_filter", "--data-dir", tmp_path / "data", "--save-dir", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


# ---- every flag, every number, every panel ---------------------------------------------------------------------


def test_excess_percent_and_the_table_of_errors():
    assert optimal_filter.excess_percent(3.0, 2.0) == pytest.approx(50)
    assert optimal_filter.excess_percent(1.5, 2.0) == pytest.approx(-25)
    assert optimal_filter.excess_percent(3.0, None) is None
    rows = optimal_filter.error_rows({"mse": {1: 3.0, 4: 5.12346}}, {"mse": {1: 2.0, 4: 5.0}, "nll": {1: 7.0}})
    assert rows == [
        {"horizon": 1, "val_mse": 3.0, "optimal_mse": 2.0, "excess_percent": pytest.approx(50)},
        {"horizon": 4, "val_mse": 5.12346, "optimal_mse": 5.0, "excess_percent": pytest.approx(2.4692)}]
    lines = optimal_filter.error_table(rows).splitlines()
    assert re.split(r" {2,}", lines[0]) == ["horizon", "validation MSE", "optimal", "excess"]
    assert lines[2].split() == ["1", "3.0000", "2.0000", "+50.00", "%"]
    assert lines[3].split() == ["4", "5.1235", "5.0000", "+2.47", "%"]
    unknown = optimal_filter.error_rows({"mse": {2: 3.0}}, {})
    assert unknown == [{"horizon": 2, "val_mse": 3.0, "optimal_mse": None, "excess_percent": None}]
    assert optimal_filter.error_table(unknown).splitlines()[2].split() == ["2", "3.0000", "–", "–"]
    both = optimal_filter.error_rows({"mse": {1: 3.0, 4: 5.0}, "nll": {1: 9.25, 4: 11.0}},
                                     {"mse": {1: 2.0, 4: 5.0}, "nll": {1: 9.5}})
    assert both[0] == rows[0] | {"val_nll": 9.25, "optimal_nll": 9.5, "excess_nats": -0.25}
    assert (both[1]["val_nll"], both[1]["optimal_nll"], both[1]["excess_nats"]) == (11.0, None, None)
    lines = optimal_filter.error_table(both).splitlines()
    assert re.split(r" {2,}", lines[0])[4:] == ["NLL (nats)", "optimal NLL", "above optimal"]
    assert lines[2].split()[5:] == ["9.2500", "9.5000", "-0.2500", "nats"]
    assert lines[3].split()[5:] == ["11.0000", "–", "–"]


def test_the_threads_of_blas_are_as_many_after_the_filter_as_before(monkeypatch):
    def threads():
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    series, _ = make_process(3)
    simulate(series, 3000)
    predict, seen = optimal_filter.predict, []
    monkeypatch.setattr(optimal_filter, "predict", lambda *given: seen.append(threads()) or predict(*given))
    with threadpool_limits(3, user_api="blas"):
        before = threads()
        optimal_filter.process_from_series(series)
        assert threads() == before
    assert seen and all(there == {1} for there in seen)  # one limit around all that run side by side


def test_process_or_none_says_what_there_is_not_and_why(capsys):
    series, process = make_process(2)
    assert optimal_filter.process_or_none(series, "no floor").dwell_law.tolist() == process.dwell_law.tolist()
    assert capsys.readouterr().out == ""
    series.config["noise_std"] = 0.0
    assert optimal_filter.process_or_none(series, "no floor") is None
    assert re.fullmatch(r"no floor: these data have noise_std 0, .*\n", capsys.readouterr().out)


@pytest.mark.parametrize("change", [{"center_walk_std": 0.1}, {"drift": True, "drift_rate": 0.1}])
def test_planes_of_circles_that_move_are_not_recovered(change):
    series, _ = make_process(2)
    series.process = dataclasses.replace(series.process, planes=None)
    series.config = series.config | change
    with pytest.raises(cli.UserError, match="has no planes, and circles that move"):
        optimal_filter.process_from_series(series)


def test_the_process_of_a_series_has_the_numbers_of_config_json():
    series, process = make_process(3, dwell=(5.0, 2.0), noise_std=0.8)
    assert process.noise_std == 0.8
    for i in range(3):
        law = dwell_law(series, i)
        np.testing.assert_allclose(process.dwell_law[i][:len(law)], list(law.values()), atol=1e-12)
        assert process.dwell_law[i].sum() == pytest.approx(1)
    for name in ("radii", "entry_angles", "periods", "transition_matrix", "planes"):
        assert getattr(process, name) is getattr(series.process, name)


@pytest.mark.parametrize("periods, mean, std, message", [
    ([2, 5], 20_000.0, 0.0, None), ([2, 5], 20_001.0, 0.0, "more than 10000 revolutions"),
    ([2, 5], 2_000.0, 2_000.0, None), ([2, 5], 2_000.0, 2_001.0, "more than 10000 revolutions"),
    ([1000, 1000], 499_000.0, 0.0, None),
    ([1000, 1000], 500_000.0, 0.0, "circles have 2000 phases, and a visit may last 501 revolutions"),
])
def test_the_number_of_states_has_a_limit(periods, mean, std, message):
    if message is None:
        optimal_filter.check_size(np.array(periods), mean, std)
    else:
        with pytest.raises(cli.UserError, match=message):
            optimal_filter.check_size(np.array(periods), mean, std)


def test_smoother_gives_distances_to_the_nearest_circle():
    series, process = make_process(3)
    X = simulate(series, 40).X
    angles = np.linspace(0, 2 * np.pi, 2001)
    everywhere = np.concatenate([[point(series, i, angle) for angle in angles] for i in range(3)])
    brute = [np.linalg.norm(everywhere - x, axis=1).min() for x in X]
    np.testing.assert_allclose(optimal_filter.smooth(process, X)["distance"], brute, atol=3e-3)


def test_defaults_are_those_of_training():
    args = optimal_filter.parse_args([])
    assert (args.seq_len, args.stride, args.val_fraction) == (1024, 256, 0.1)
    assert args.horizons == [1, 2, 4, 8, 16, 32, 64]
    assert (args.data_dir, args.save_dir) == (Path("data"), Path("plots"))
    assert optimal_filter.parse_args(["--horizons", "8,2,2"]).horizons == [2, 8]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a series of 400 steps, and what a plain log-space HMM makes of it."""
    series, _ = make_process(3, dwell=(6.0, 1.5), periods=[3, 4, 5])
    folder = tmp_path_factory.mktemp("filter")
    save_series(simulate(series, 400), folder / "data")
    horizons = [1, 3]
    return SimpleNamespace(series=series, folder=folder / "data", horizons=horizons,
                           reference=reference_filter(series, series.X, "visit start", horizons))


@pytest.fixture
def report(written, script, tmp_path, monkeypatch):
    """The script's report, its stdout and its Figure."""
    saved = {}
    monkeypatch.setattr(figures, "save", lambda fig, path: saved.update({path: fig}))
    monkeypatch.setattr(optimal_filter, "SHOWN_STEPS", 60)
    done = script("optimal_filter", "--data-dir", written.folder, "--save-dir", tmp_path / "out", "--horizons", "3,1",
                  "--seq-len", 30, "--stride", 20, "--val-fraction", 0.25)
    assert done.code == 0, done.err
    (fig,) = saved.values()
    assert [path.stem for path in saved] == [only(tmp_path / "out", "optimal_filter*.json").stem]
    return SimpleNamespace(json=json.loads(only(tmp_path / "out", "optimal_filter*.json").read_text()), out=done.out,
                           fig=fig)


def test_each_number_of_the_report(written, report):
    series, reference, found = written.series, written.reference, report.json
    right = reference["circle_posterior"].argmax(axis=1) == series.states
    smoothed = reference["smoothed"].argmax(axis=1) == series.states
    assert list(found) == ["noise_floor", "planes_recovered", "n_steps", "first_validation_step", "seq_len", "stride",
                           "horizons", "circle_accuracy", "val_circle_accuracy", "smoothed_circle_accuracy",
                           "log_likelihood_per_step", "learned_from_steps", "entropy_rate", "entropy_rate_error",
                           "made_by"]
    assert found["learned_from_steps"] == 300
    process = optimal_filter.process_from_series(series)
    assert (found["entropy_rate"], found["entropy_rate_error"]) == optimal_filter.entropy_rate(process)
    assert found["noise_floor"] == pytest.approx(NOISE**2) and found["planes_recovered"] is False
    assert (found["n_steps"], found["first_validation_step"], found["seq_len"], found["stride"]) == (400, 300, 30, 20)
    assert found["circle_accuracy"] == pytest.approx(right.mean())
    assert found["val_circle_accuracy"] == pytest.approx(right[300:].mean())
    assert found["smoothed_circle_accuracy"] == pytest.approx(smoothed.mean())
    assert right.mean() != right[300:].mean() != smoothed.mean()
    assert found["log_likelihood_per_step"] == pytest.approx(reference["log_likelihood"].mean())
    windows = [series.X[start:start + 30] for start in range(300, 371, 20)]
    alone = [reference_filter(series, X, "stationary", written.horizons)["prediction"] for X in windows]
    assert [row["horizon"] for row in found["horizons"]] == [1, 3]
    for row, k in zip(found["horizons"], (1, 3), strict=True):
        errors = ((series.X[k:] - reference["prediction"][k][:-k])**2).mean(axis=1)
        assert row["mse"] == pytest.approx(errors.mean())
        assert row["val_mse"] == pytest.approx(errors[300:].mean())
        assert row["val_window_mse"] == pytest.approx(
            np.mean([(X[k:] - predicted[k][:-k])**2 for X, predicted in zip(windows, alone, strict=True)]))


def test_each_number_that_is_printed(report):
    lines, found = report.out.splitlines(), report.json
    assert lines[0] == f"noise floor (noise_std²): {NOISE**2:.4f}"
    assert lines[3].split("  ") == ["horizon", "whole series", "validation", "windows of 30", "process learned"]
    assert [line.split() for line in lines[5:7]] == [
        [str(row["horizon"]), *(f"{row[key]:.4f}" for key in ("mse", "val_mse", "val_window_mse",
                                                              "val_window_learned_mse"))] for row in found["horizons"]]
    assert lines[7] == ("process learned: the same windows, by a filter that has learned the process from the first "
                        "300 steps and their circles")
    assert lines[9] == (f"circle accuracy: {100 * found['circle_accuracy']:.3f}% from the past, "
                        f"{100 * found['smoothed_circle_accuracy']:.3f}% from the whole series")
    assert lines[10] == f"log-likelihood: {found['log_likelihood_per_step']:.4f} nats per step"
    assert lines[11] == (f"entropy rate of the process: {found['entropy_rate']:.4f} ± "
                         f"{found['entropy_rate_error']:.1g} nats per step")
    assert "recovered" not in report.out


def test_each_panel_of_the_figure(written, report):
    fig = report.fig
    strip, heat, curve = fig.axes[:3]
    assert fig.get_suptitle() == "Bayes-optimal filter"
    check_strip(strip, written.series.states[300:360], 300, 3, "true circle")
    check_heatmap(heat, written.reference["circle_posterior"][300:360], 300, limits=(0, 1), cmap="Greys")
    assert (heat.get_xlabel(), heat.get_ylabel()) == ("time step", "circle")
    assert colour_bars(fig) == ["P(circle | past)"]
    check_circle_legend(fig, [0, 1, 2], 3)
    drawn, rows = lines(curve), report.json["horizons"]
    for key, label in (("mse", "whole series"), ("val_mse", "validation part"),
                       ("val_window_mse", "windows of 30 steps")):
        np.testing.assert_array_equal(drawn[label], [[1, 3], [row[key] for row in rows]])
    np.testing.assert_allclose(drawn["noise floor"][1], NOISE**2)
    assert [text.get_text() for text in curve.get_legend().get_texts()] == [
        "whole series", "validation part", "windows of 30 steps", "noise floor"]
    assert (curve.get_xlabel(), curve.get_ylabel()) == ("horizon (steps)", "mean squared error (data units²)")
    assert curve.get_xscale() == "log" and [t.get_text() for t in curve.get_xticklabels()] == ["1", "3"]


def test_a_file_without_planes_is_said_to_make_errors_too_low(written, script, tmp_path):
    folder = tmp_path / "data"
    save_series(written.series, folder)
    with np.load(folder / "data.npz") as file:
        np.savez(folder / "data.npz", **{name: file[name] for name in file.files if name != "planes"})
    done = script("optimal_filter", "--data-dir", folder, "--save-dir", tmp_path, "--horizons", 1, "--seq-len", 30)
    assert done.code == 0, done.err
    assert json.loads(only(tmp_path, "optimal_filter*.json").read_text())["planes_recovered"] is True
    assert f"too low by about {NOISE**2 * 3 * (2 * 4 - 3) / (400 * 4):.1e}" in done.out


def test_entropy_rate_is_minus_the_mean_log_likelihood_of_long_series():
    process = make_process(3, dwell=(9.0, 3.0))[1]
    rate, error = optimal_filter.entropy_rate(process, 20_000)
    rng, means = np.random.default_rng(5), []
    for _ in range(4):
        circles, steps = optimal_filter.draw_path(process, 10_000, rng)
        theta = process.entry_angles[circles] + 2 * np.pi * steps / process.periods[circles]
        X = circle_process.points(process, circles, theta) + NOISE * rng.standard_normal((10_000, 4))
        means.append(optimal_filter.predict(process, X, ())["log_likelihood"].mean())
    spread = np.std(means, ddof=1) / 2
    assert abs(rate + np.mean(means)) < 4 * (spread + error)
    assert error < spread  # the control variate takes most of the noise away
    assert optimal_filter.entropy_rate(process, 20_000) == (rate, error)
    assert optimal_filter.entropy_rate(process, 20_000, seed=1) != (rate, error)
    # the error is how far the rates of other seeds are spread
    others = np.array([optimal_filter.entropy_rate(process, 2000, seed) for seed in range(12)])
    assert 0.6 < others[:, 1].mean() / others[:, 0].std(ddof=1) < 1.7
    # more noise, more entropy: at least that of the noise
    assert rate > 0.5 * 4 * np.log(2 * np.pi * np.e * NOISE**2)


def test_a_kept_floor_is_found_under_all_that_it_depends_on():
    series, process = make_process(3)
    simulate(series, 100)
    ask = [0, 40], 30, [1, 2]
    other = {name: getattr(process, name) * 1.01 for name in ("radii", "entry_angles", "planes", "noise_std")}
    other |= {"periods": process.periods + 1, "transition_matrix": process.transition_matrix[::-1],
              "dwell_law": process.dwell_law[:, ::-1], "center_walk_std": 0.5}
    moved = dataclasses.replace(series, X=series.X + np.float32(0.01))
    keys = [floor_cache.digest(process, series, *ask), floor_cache.digest(process, moved, *ask),
            *(floor_cache.digest(dataclasses.replace(process, **{name: value}), series, *ask)
              for name, value in other.items()),
            *(floor_cache.digest(process, series, *more) for more in (
                ([0, 41], 30, [1, 2]), ([0], 30, [1, 2]), ([0, 40], 31, [1, 2]), ([0, 40], 30, [1, 3])))]
    assert len(set(keys)) == len(keys) == 2 + 8 + 4
    assert floor_cache.digest(process, series, *ask) == keys[0]


KEPT = {"mse": {1: [1.5, 2.0], 2: [3.0, 4.0]}, "nll": {1: [5.0, 6.0]}}


@pytest.mark.parametrize("floors, n_blocks, found", [
    (KEPT, 2, True), (KEPT, 3, False), (KEPT, 1, False), (KEPT, None, False),
    ({"mse": {1: 1.5, 2: 3.0}, "nll": {1: 5.0}}, None, True), ({"mse": {1: 1.5, 2: 3.0}, "nll": {1: 5.0}}, 2, False),
    (KEPT | {"nll": {1: [5.0]}}, 2, False), (KEPT | {"nll": {1: [5.0, math.nan]}}, 2, False),
    *((KEPT | {"nll": {1: [value, 6.0]}}, 2, False) for value in (math.inf, -math.inf, 5, "5.0")),
    ({"mse": {1: 1.5, 2: 3.0}, "nll": {1: math.inf}}, None, False),
    ({"mse": {1: 1.5, 2: 3.0}, "nll": {1: 5}}, None, False), (KEPT | {"nll": {1: "56"}}, 2, False),
    (KEPT | {"mse": {1: [1.5, 2.0]}}, 2, False), (KEPT | {"nll": {1: [5.0, None]}}, 2, False)])
def test_kept_floors_are_taken_only_if_they_are_all_that_is_asked_for(tmp_path, floors, n_blocks, found):
    floor_cache.store(tmp_path, "key", floors)
    assert floor_cache.load(tmp_path, "key", [1, 2], n_blocks) == (floors if found else None)
    assert floor_cache.load(tmp_path, "other", [1, 2], n_blocks) is None


def test_drawn_paths_follow_the_laws_of_the_process():
    process = make_process(3, dwell=(9.0, 3.0))[1]
    circles, steps = optimal_filter.draw_path(process, 60_000, np.random.default_rng(0))
    begins = np.flatnonzero(steps == 0)
    lengths, visited = np.diff(begins), circles[begins]
    for i, period in enumerate(process.periods):
        revolutions = lengths[visited[:-1] == i] / period
        shares = [np.mean(revolutions == r + 1) for r in range(process.dwell_law.shape[1])]
        np.testing.assert_allclose(shares, process.dwell_law[i], atol=0.02)
        following = visited[1:][visited[:-1] == i]
        np.testing.assert_allclose(np.bincount(following, minlength=3) / len(following), process.transition_matrix[i],
                                   atol=0.03)
    assert (np.diff(steps)[np.diff(steps) != 1] < 0).all() and len(steps) == 60_000
