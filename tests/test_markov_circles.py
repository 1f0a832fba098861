"""The generator against the definition of the process, and its script as a user meets it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import arrays_of
from figure_checks import (
    check_circle_legend,
    check_heatmap,
    check_strip,
    colour_bars,
    left_title,
    text_rows,
)
from matplotlib.colors import to_rgb
from matplotlib.image import imread

import circle_process
import cli
import dataset
import figures
import markov_circles_timeseries as mc
from measures import knn

QUIET = ["--noise-std", "0"]
SMALL = ["--n-steps", "4000", "--n-circles", "4", "--ambient-dim", "6", "--min-period", "10", "--max-period", "40",
         "--dwell-mean", "80", "--dwell-std", "20"]


def config(*flags):
    return mc.config_of(mc.parse_args([str(flag) for flag in flags]))


def visits_of(series):
    """(circle, first step, end) of each whole visit, found one step at a time."""
    found, first = [], 0
    for t in range(1, series.n_steps):
        if series.states[t] != series.states[t - 1]:
            found.append((int(series.states[first]), first, t))
            first = t
    return found


@pytest.mark.parametrize("K", [2, 3, 4, 5, 10, 30])
def test_transition_matrix_is_sparse_and_leads_to_both_neighbours(K):
    for seed in range(20):
        P = circle_process.draw_transition_matrix(K, np.random.default_rng(seed))
        np.testing.assert_allclose(P.sum(axis=1), 1, rtol=1e-12)
        assert (P >= 0).all() and (np.diag(P) == 0).all()
        for i in range(K):
            assert P[i, (i + 1) % K] > 0 and P[i, (i - 1) % K] > 0
            shortcuts = (P[i] > 0).sum() - len({(i + 1) % K, (i - 1) % K})
            assert shortcuts == {2: 0, 3: 0, 4: 1, 5: 1}.get(K, 2)


def test_visits_follow_the_transition_matrix():
    series = mc.generate(config(*SMALL, *QUIET, "--n-steps", 400_000, "--n-circles", 5, "--ambient-dim", 2))
    circles, _, _ = dataset.visits(series.states)
    counts = np.zeros((5, 5))
    np.add.at(counts, (circles[:-1], circles[1:]), 1)
    P = series.process.transition_matrix
    assert (counts[P == 0] == 0).all()
    n = counts.sum(axis=1, keepdims=True)
    assert (np.abs(counts - n * P) <= 5 * np.sqrt(n * P * (1 - P))).all()


def test_first_circle_is_uniform():
    base = config(*SMALL, "--n-steps", 2)
    first = [mc.generate({**base, "seed": seed}).states[0] for seed in range(400)]
    assert (np.abs(np.bincount(first, minlength=4) - 100) < 5 * np.sqrt(400 * 0.25 * 0.75)).all()


def test_dwell_is_whole_revolutions_of_a_gaussian():
    series = mc.generate(config(*QUIET, "--n-steps", 400_000, "--ambient-dim", 2, "--n-circles", 3,
                                "--max-period", 300))
    by_circle = {0: [], 1: [], 2: []}
    for circle, first, end in visits_of(series):
        assert (end - first) % series.process.periods[circle] == 0
        by_circle[circle].append(end - first)
    rng = np.random.default_rng(0)
    for circle, dwells in by_circle.items():
        period = series.process.periods[circle]
        expected = np.maximum(1, np.rint(rng.normal(400, 100, 100_000) / period)) * period
        assert abs(np.mean(dwells) - expected.mean()) < 5 * expected.std() / np.sqrt(len(dwells))
        assert 0.8 < np.std(dwells) / expected.std() < 1.2


def test_short_dwell_still_makes_one_revolution():
    series = mc.generate(config(*SMALL, "--dwell-mean", 1, "--dwell-std", 0))
    assert all(end - first == series.process.periods[circle] for circle, first, end in visits_of(series))


def test_phase_starts_at_the_entry_angle_and_advances_by_a_period():
    series = mc.generate(config(*SMALL))
    assert series.thetas.min() >= 0 and series.thetas.max() < 2 * np.pi
    for circle, first, end in visits_of(series):
        step = np.arange(end - first)
        expected = series.process.entry_angles[circle] + 2 * np.pi * step / series.process.periods[circle]
        difference = np.exp(1j * series.thetas[first:end]) - np.exp(1j * expected)
        assert np.abs(difference).max() < 1e-12
        assert series.thetas[first] == pytest.approx(series.process.entry_angles[circle], abs=1e-12)


def test_periods_are_linearly_spaced_whole_numbers():
    series = mc.generate(config("--n-steps", 10))
    assert series.process.periods.tolist() == [40, 80, 120, 160, 200, 240, 280, 320, 360, 400]
    assert mc.generate(config(*SMALL)).process.periods.tolist() == [10, 20, 30, 40]


def test_radii_are_gaussian_and_clipped():
    wide = mc.generate(config("--n-steps", 2, "--n-circles", 500, "--radius-std", 40)).process.radii
    assert wide.min() == 10 and wide.max() == 30
    narrow = mc.generate(config("--n-steps", 2, "--n-circles", 500)).process.radii
    assert abs(narrow.mean() - 20) < 5 * 2 / np.sqrt(500) and 1.7 < narrow.std() < 2.3


@pytest.mark.parametrize("subspace", [2, 3, 7, 20])
def test_planes_are_orthonormal_in_one_subspace(subspace):
    series = mc.generate(config("--subspace-dim", subspace, "--n-steps", 20_000, "--dwell-mean", 50, *QUIET))
    gram = series.process.planes @ series.process.planes.transpose(0, 2, 1)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(2), gram.shape), atol=1e-12)
    assert np.linalg.matrix_rank(series.process.planes.reshape(-1, 20)) == subspace
    assert np.linalg.matrix_rank(series.X, tol=0.1) == subspace
    assert (np.abs(series.process.planes).max(axis=(0, 1)) > 1e-3).all()  # the subspace is not along the axes


def test_points_without_noise_lie_on_their_circle():
    series = mc.generate(config(*SMALL, *QUIET))
    for t in range(0, series.n_steps, 7):
        v1, v2 = series.process.planes[series.states[t]]
        theta = series.thetas[t]
        point = series.process.radii[series.states[t]] * (np.cos(theta) * v1 + np.sin(theta) * v2)
        np.testing.assert_allclose(series.X[t], point, atol=1e-4)


def test_noise_is_white_with_the_given_std():
    noisy, quiet = (mc.generate(config("--n-steps", 20_000, "--noise-std", std)) for std in (2.83, 0))
    noise = noisy.X - quiet.X  # the same seed walks the same path
    n = len(noise)
    assert np.abs(noise.mean(axis=0)).max() < 5 * 2.83 / np.sqrt(n)
    covariance = np.cov(noise.T) / 2.83**2
    assert np.abs(covariance - np.eye(20)).max() < 6 * np.sqrt(2 / n)
    assert np.abs((noise[1:] * noise[:-1]).mean(axis=0)).max() / 2.83**2 < 5 / np.sqrt(n)


@pytest.mark.parametrize("variant", [[], ["--drift"], ["--center-walk-std", 0.1]])
def test_neither_the_block_nor_the_length_changes_a_value(variant):
    c = config(*SMALL, *variant)
    whole, blocks = mc.generate(c), mc.generate(c, block_values=6 * 37)
    longer = mc.generate({**c, "n_steps": 9000})
    in_blocks = arrays_of(blocks)
    for name, values in arrays_of(whole).items():
        np.testing.assert_array_equal(values, in_blocks[name])
    for name in ("X", "states", "thetas"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(longer, name)[:4000])


def test_drift_tilts_even_circles_and_starts_anew():
    flags = [*SMALL, *QUIET, "--n-circles", 5]
    still, drifting = mc.generate(config(*flags)), mc.generate(config(*flags, "--drift", "--drift-rate", 0.5))
    np.testing.assert_array_equal(still.states, drifting.states)
    odd = still.states % 2 == 1
    np.testing.assert_array_equal(still.X[odd], drifting.X[odd])
    axes = []
    for circle, first, end in visits_of(still):
        if circle % 2:
            continue
        X, theta = drifting.X[first:end].astype(float), drifting.thetas[first:end]
        np.testing.assert_allclose(X[0], still.X[first], atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(X, axis=1), still.process.radii[circle], rtol=1e-5)
        alpha = 0.5 * np.arange(end - first) / (end - first - 1)
        height = still.process.radii[circle] * np.sin(theta)
        v1, v2 = still.process.planes[circle]
        np.testing.assert_allclose(X @ v1, still.process.radii[circle] * np.cos(theta), atol=1e-4)
        np.testing.assert_allclose(X @ v2, height * np.cos(alpha), atol=1e-4)
        rest = X - np.outer(X @ v1, v1) - np.outer(X @ v2, v2)
        lift = height * np.sin(alpha)
        axis = lift @ rest / (lift @ lift)
        assert np.linalg.norm(axis) == pytest.approx(1, abs=1e-4)
        np.testing.assert_allclose(rest, np.outer(lift, axis), atol=1e-3)
        axes.append(axis)
    cosines = np.array(axes) @ np.array(axes).T
    assert np.abs(cosines[np.triu_indices(len(axes), 1)]).max() < 0.9999  # a new axis at each visit


def test_drift_stays_in_the_subspace():
    series = mc.generate(config(*SMALL, *QUIET, "--subspace-dim", 3, "--drift", "--drift-rate", 1))
    assert np.linalg.matrix_rank(series.X, tol=0.1) == 3


def test_center_walk_is_a_gaussian_walk_from_the_origin():
    flags = [*SMALL, *QUIET, "--n-steps", 20_000]
    still, walking = mc.generate(config(*flags)), mc.generate(config(*flags, "--center-walk-std", 0.5))
    center = walking.X.astype(float) - still.X
    np.testing.assert_allclose(center[0], 0, atol=1e-4)
    steps = np.diff(center, axis=0)
    n = steps.size
    assert abs(steps.std() / 0.5 - 1) < 5 / np.sqrt(2 * n)
    assert abs(steps.mean()) < 5 * 0.5 / np.sqrt(n)
    assert np.abs(np.corrcoef(steps.T) - np.eye(6)).max() < 5 / np.sqrt(len(steps))
    assert abs((steps[1:] * steps[:-1]).mean()) < 5 * 0.25 / np.sqrt(n)


def test_statistics_agree_with_a_count_by_hand():
    series = mc.generate(config(*SMALL))
    whole = visits_of(series)
    rows = mc.summary_table(series, mc.visit_statistics(series)).splitlines()[2:]
    assert len(rows) == 4
    for circle, row in enumerate(rows):
        dwells = [end - first for c, first, end in whole if c == circle]
        n_visits = len(dwells) + (series.states[-1] == circle)
        n_steps = int((series.states == circle).sum())
        assert row.split() == [str(circle), f"{series.process.radii[circle]:.2f}", str(series.process.periods[circle]),
                               f"{n_steps:,}", f"{n_steps / 40:.1f}", "%", str(n_visits), f"{np.mean(dwells):.0f}",
                               f"{np.std(dwells, ddof=1):.0f}"]


def test_script_writes_what_the_loader_reads(script, tmp_path):
    result = script("markov_circles_timeseries", *SMALL, "--no-umap", "--drift", "--data-dir", tmp_path)
    assert result.code == 0 and result.err == ""
    assert "dwell mean" in result.out
    assert {path.name for path in tmp_path.iterdir()} == {
        "data.npz", "config.json", "state_sequence.png", "transition_matrix.png", "periods.png",
        "sample_window_0.png", "sample_window_1.png", "sample_window_2.png"}
    for figure in tmp_path.glob("*.png"):
        assert imread(figure)[..., :3].std() > 0.05
    series, expected = dataset.load_series(tmp_path), mc.generate(config(*SMALL, "--drift"))
    loaded = arrays_of(series)
    for name, values in arrays_of(expected).items():
        np.testing.assert_array_equal(loaded[name], values)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "n_steps": 4000, "n_circles": 4, "ambient_dim": 6, "subspace_dim": 6, "radius_mean": 20.0, "radius_std": 2.0,
        "noise_std": 2.83, "dwell_mean": 80.0, "dwell_std": 20.0, "min_period": 10, "max_period": 40, "drift": True,
        "drift_rate": 0.3, "center_walk_std": 0.0, "seed": 42}
    with np.load(tmp_path / "data.npz", allow_pickle=False) as file:
        assert file["X"].dtype == np.float32 and file["states"].dtype == np.int64
        assert file["thetas"].dtype == file["planes"].dtype == np.float64


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        mc.save(mc.generate(config(*SMALL, "--seed", seed)), tmp_path / name)
    a, b, c = ((tmp_path / name / "data.npz").read_bytes() for name in "abc")
    assert a == b != c


def test_failed_save_keeps_the_older_data(tmp_path, monkeypatch):
    mc.save(mc.generate(config(*SMALL)), tmp_path)
    older = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(path, **arrays):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(cli.UserError, match="No space left"):
        mc.save(mc.generate(config(*SMALL, "--seed", 1)), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == older


@pytest.mark.parametrize("variant", [[], ["--drift", "--seed", 3], ["--center-walk-std", 0.1]])
def test_uncompressed_data_have_the_values_of_the_compressed(tmp_path, variant):
    c = config(*SMALL, *variant)
    folders = [tmp_path / name for name in ("packed", "a", "b")]
    for folder in folders:
        folder.mkdir()
    packed, a, b = folders
    mc.save(mc.generate(c), packed)
    mc.save_uncompressed(c, a)
    mc.save_uncompressed(c, b, block_values=6 * 37)
    assert (a / "data.npz").read_bytes() == (b / "data.npz").read_bytes()
    assert (a / "config.json").read_bytes() == (packed / "config.json").read_bytes()
    with np.load(a / "data.npz") as plain, np.load(packed / "data.npz") as expected:
        assert set(plain.files) == set(expected.files)
        for name in expected.files:
            assert plain[name].dtype == expected[name].dtype
            np.testing.assert_array_equal(plain[name], expected[name])


def test_script_writes_a_long_uncompressed_series_and_its_figures(script, tmp_path):
    flags = [*SMALL, "--n-steps", 200_000, "--ambient-dim", 3, "--no-umap"]
    plain = script("markov_circles_timeseries", *flags, "--uncompressed", "--data-dir", tmp_path / "plain")
    packed = script("markov_circles_timeseries", *flags, "--data-dir", tmp_path / "packed")
    assert plain.code == packed.code == 0 and plain.err == packed.err == ""
    assert plain.out.replace("plain", "packed") == packed.out
    size, smaller = ((tmp_path / name / "data.npz").stat().st_size for name in ("plain", "packed"))
    assert size > 200_000 * (3 * 4 + 16) > smaller
    names = sorted(path.name for path in (tmp_path / "packed").glob("*.png"))
    assert len(names) == 6
    for name in names:
        np.testing.assert_array_equal(imread(tmp_path / "plain" / name), imread(tmp_path / "packed" / name))
        assert imread(tmp_path / "plain" / name)[..., :3].std() > 0.05


def test_failed_uncompressed_save_keeps_the_older_data(tmp_path, monkeypatch):
    mc.save(mc.generate(config(*SMALL)), tmp_path)
    older = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(config, *_):
        yield slice(0, 10), np.zeros((10, 6), np.float32)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(circle_process, "draw_points", full_disk)
    with pytest.raises(cli.UserError, match="No space left"):
        mc.save_uncompressed(config(*SMALL, "--seed", 1), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == older


def test_runs_across_blocks():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 2000, 2000)
    circles = np.cumsum(rng.integers(1, 4, 2000)) % 4  # neighbours differ
    states = np.repeat(circles, lengths)
    assert states.nbytes > 3 * dataset.BLOCK_BYTES
    for found, expected in zip(dataset.visits(states), (circles, np.cumsum(lengths) - lengths, lengths), strict=True):
        np.testing.assert_array_equal(found, expected)
    states = states[:dataset.BLOCK_BYTES // 8 + 1]  # one step in the last block
    assert dataset.visits(states)[2].sum() == len(states)


def test_time_shares_against_a_count():
    series = mc.generate(config(*SMALL))
    shares = mc.time_shares(dataset.visits(series.states), 4, 40)
    expected = [np.bincount(part, minlength=4) / 100 for part in series.states.reshape(40, 100)]
    np.testing.assert_allclose(shares, expected, atol=1e-12)


@pytest.mark.parametrize("flags", [
    ["--subspace-dim", 21], ["--subspace-dim", 1], ["--ambient-dim", 1], ["--n-circles", 1], ["--n-circles", 0],
    ["--n-steps", 1], ["--n-steps", 0], ["--n-steps", 10**18], ["--min-period", 401], ["--min-period", 1],
    ["--max-period", 10**20], ["--radius-mean", 0], ["--radius-mean", "inf"], ["--radius-std", -1],
    ["--noise-std", -0.1], ["--noise-std", "nan"], ["--dwell-mean", 0], ["--dwell-std", -1], ["--drift-rate", -1],
    ["--center-walk-std", -1], ["--radius-mean", 1e38], ["--drift", "--subspace-dim", 2], ["--seed", -1],
    ["--n-step", 100], ["--save-dir", "plots"]])
def test_impossible_flags_are_refused(refused, tmp_path, flags):
    assert refused("markov_circles_timeseries", *flags, "--no-umap", "--data-dir", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("good, bad", [
    ({"n_steps": 2}, {"n_steps": 1}), ({"n_circles": 2}, {"n_circles": 1}),
    ({"ambient_dim": 2, "subspace_dim": 2}, {"ambient_dim": 1, "subspace_dim": 1}),
    ({"subspace_dim": 2}, {"subspace_dim": 1}),
    ({"subspace_dim": 20}, {"subspace_dim": 21}), ({"min_period": 2}, {"min_period": 1}),
    ({"min_period": 40, "max_period": 40}, {"min_period": 41, "max_period": 40}),
    ({"max_period": 2**40}, {"max_period": 2**40 + 1}),
    ({"drift": True, "subspace_dim": 3}, {"drift": True, "subspace_dim": 2}),
    *(({name: 1e30}, {name: 1.01e30}) for name in ("radius_mean", "radius_std", "noise_std", "center_walk_std")),
    ({"n_steps": 10**16}, {"n_steps": 10**17})])
def test_flags_at_their_bounds_and_just_beyond(good, bad):
    mc.check_config(config() | good)
    with pytest.raises(cli.UserError):
        mc.check_config(config() | bad)


@pytest.mark.parametrize("flags", [
    ["--n-circles", 2], ["--n-steps", 2], ["--radius-std", 0, "--dwell-std", 0], ["--max-period", 10**9],
    ["--n-circles", 40, "--ambient-dim", 2, "--min-period", 2, "--max-period", 2], ["--dwell-mean", 1e300],
    ["--ambient-dim", 3, "--drift", "--drift-rate", 0]])
def test_extreme_but_possible_flags_work(tmp_path, flags):
    series = mc.generate(config("--n-steps", 500, *flags))
    mc.save(series, tmp_path)
    np.testing.assert_array_equal(dataset.load_series(tmp_path).X, series.X)


def test_figures_of_two_steps_and_many_circles(script, tmp_path):
    result = script("markov_circles_timeseries", "--n-steps", 2, "--n-circles", 13, "--no-umap", "--data-dir", tmp_path)
    assert result.code == 0 and result.err == ""


def test_umap_is_never_imported_without_need(tmp_path):
    code = ("import sys, markov_circles_timeseries as mc; "
            "mc.main(mc.parse_args(sys.argv[1:])); "
            "assert not {'umap', 'numba', 'torch', 'sklearn', 'matplotlib.pyplot'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code, *SMALL, "--no-umap", "--data-dir", str(tmp_path)], check=True,
                   cwd=Path(mc.__file__).parent)


def test_umap_with_too_few_points_says_so_and_keeps_the_data(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(mc, "draw_all", lambda *_: {})
    message = refused("markov_circles_timeseries", "--n-steps", 15, "--data-dir", tmp_path)
    assert "--no-umap" in message
    assert dataset.load_series(tmp_path).n_steps == 15


def test_umap_keeps_the_circles_apart_and_repeats_itself(tmp_path):
    series = mc.generate(config(*SMALL, "--ambient-dim", 20, "--noise-std", 0.5))
    points, states = series.X[::10], series.states[::10]
    embedding = mc.umap_embedding(points, knn(points, 14), seed=1)
    np.testing.assert_array_equal(embedding, mc.umap_embedding(points, knn(points, 14), seed=1))
    _, neighbours = knn(embedding, 5)
    assert (states[neighbours] == states[:, None]).mean() > 0.95
    mc.save_umap(series, tmp_path)
    assert imread(tmp_path / "umap.png")[..., :3].std() > 0.05


# ---- every flag, every panel -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flag, key, value", [
    ("--n-steps", "n_steps", 77), ("--n-circles", "n_circles", 6), ("--ambient-dim", "ambient_dim", 9),
    ("--subspace-dim", "subspace_dim", 5), ("--radius-mean", "radius_mean", 3.5), ("--radius-std", "radius_std", 0.25),
    ("--noise-std", "noise_std", 1.5), ("--dwell-mean", "dwell_mean", 91.0), ("--dwell-std", "dwell_std", 7.0),
    ("--min-period", "min_period", 12), ("--max-period", "max_period", 55), ("--drift", "drift", True),
    ("--drift-rate", "drift_rate", 0.9), ("--center-walk-std", "center_walk_std", 0.125), ("--seed", "seed", 5)])
def test_each_flag_sets_its_entry_of_config_json_alone(flag, key, value):
    """What the entries mean is tested in test_circle_process.py, against the definition of the process."""
    plain = config()
    assert plain == {
        "n_steps": 100_000, "n_circles": 10, "ambient_dim": 20, "subspace_dim": 20, "radius_mean": 20.0,
        "radius_std": 2.0, "noise_std": 2.83, "dwell_mean": 400.0, "dwell_std": 100.0, "min_period": 40,
        "max_period": 400, "drift": False, "drift_rate": 0.3, "center_walk_std": 0.0, "seed": 42}
    changed = config(flag) if value is True else config(flag, value)
    follows = {"subspace_dim": 9} if key == "ambient_dim" else {}
    assert changed == plain | {key: value} | follows
    args = mc.parse_args([flag] if value is True else [flag, str(value)])
    assert (args.data_dir, args.uncompressed, args.no_umap) == (Path("data"), False, False)


def test_generate_draws_the_process_and_the_series_of_one_seed():
    c = config(*SMALL, "--seed", 8, "--drift")
    series, process = mc.generate(c), circle_process.draw_process(c)
    X, states, thetas = circle_process.draw_series(process, c, 4000, 8)
    for found, expected in ((series.X, X), (series.states, states), (series.thetas, thetas),
                            (series.process.planes, process.planes)):
        np.testing.assert_array_equal(found, expected)
    assert series.config == c and series.process.noise_std == 2.83


@pytest.fixture
def small():
    return mc.generate(config(*SMALL, "--n-steps", 2000))


def check_bars(ax, series, n):
    """One bar per visit of the first n steps, found one step at a time, at the height of its circle."""
    found, first = [], 0
    for t in range(1, n + 1):
        if t == n or series.states[t] != series.states[t - 1]:
            found.append((series.states[first], first, t))
            first = t
    (bars,) = ax.collections
    assert [segment.tolist() for segment in bars.get_segments()] == [[[a, c], [b, c]] for c, a, b in found]
    colors = figures.circle_colors(4)[[circle for circle, _, _ in found]]
    np.testing.assert_allclose(bars.get_colors()[:, :3], colors)
    assert ax.get_xlim() == (0, n) and ax.get_ylim() == (-0.7, 3.7)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time step", "circle") and ax.get_yticks().tolist() == [0, 1, 2, 3]


def test_figure_of_the_state_sequence(small, monkeypatch):
    monkeypatch.setattr(mc, "FIRST_STEPS", 900)
    strip, start, whole = mc.draw_state_sequence(small).axes
    check_strip(strip, small.states[:900])
    assert strip.get_xlim() == (0, 900)
    assert left_title(strip) == "The first 900 steps" and left_title(whole) == "All 2,000 steps"
    check_bars(start, small, 900)
    check_bars(whole, small, 2000)


def test_figure_of_the_state_sequence_of_many_visits(small, monkeypatch):
    n_visits = 1 + int((np.diff(small.states) != 0).sum())
    monkeypatch.setattr(mc, "MOST_BARS", n_visits)
    assert len(mc.draw_state_sequence(small).axes) == 3
    monkeypatch.setattr(mc, "MOST_BARS", n_visits - 1)
    monkeypatch.setattr(mc, "TIME_BINS", 40)
    fig = mc.draw_state_sequence(small)
    (image,) = fig.axes[2].images
    shares = [[(part == i).mean() for part in small.states.reshape(40, 50)] for i in range(4)]
    np.testing.assert_allclose(image.get_array(), shares, atol=1e-12)
    assert image.origin == "lower" and list(image.get_extent()) == [0, 2000, -0.5, 3.5]
    assert image.get_cmap().name == "Greys" and colour_bars(fig) == ["share of 50 steps"]
    assert fig.axes[2].get_ylabel() == "circle" and fig.axes[2].get_xlabel() == "time step"
    assert fig.axes[2].get_yticks().tolist() == [0, 1, 2, 3]


def test_figure_of_the_transition_matrix():
    P = np.array([[0, 0.9, 0.1, 0], [0.5, 0, 0, 0.5], [0.25, 0.25, 0, 0.5], [0, 0.3, 0.7, 0]])
    fig = mc.draw_transition_matrix(P)
    ax = fig.axes[0]
    (image,) = ax.images
    np.testing.assert_array_equal(image.get_array().filled(-1), np.where(P == 0, -1, P))
    assert image.origin == "upper" and image.get_clim() == (0, 0.9)
    assert {text.get_position(): text.get_text() for text in ax.texts} == {
        (j, i): f"{P[i, j]:.2f}" for i in range(4) for j in range(4) if P[i, j]}  # x: to, y: from
    for text in ax.texts:  # readable on dark and on bright cells
        assert text.get_color() == ("black" if float(text.get_text()) > 0.54 else "white")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("next circle", "circle")
    assert ax.get_title() == "Where the chain goes next" and colour_bars(fig) == ["probability"]
    assert ax.get_xticks().tolist() == ax.get_yticks().tolist() == [0, 1, 2, 3]
    assert not mc.draw_transition_matrix(np.full((13, 13), 1 / 13)).axes[0].texts


def test_figure_of_the_periods(small):
    whole = visits_of(small)
    dwells = [[end - first for circle, first, end in whole if circle == i] for i in range(4)]
    fig = mc.draw_periods(small, mc.visit_statistics(small))
    axes = fig.axes
    assert fig.get_suptitle() == "Period, radius and dwell time of each circle"
    expected = {"period (steps per revolution)": [10, 20, 30, 40], "radius (data units)": small.process.radii,
                "dwell of a visit (steps), mean ± std": [np.mean(d) for d in dwells]}
    for ax, (label, heights) in zip(axes, expected.items(), strict=True):
        np.testing.assert_allclose([bar.get_height() for bar in ax.patches], heights)
        np.testing.assert_allclose([bar.get_x() + bar.get_width() / 2 for bar in ax.patches], range(4))
        np.testing.assert_allclose([to_rgb(bar.get_facecolor()) for bar in ax.patches], figures.circle_colors(4))
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("circle", label) and ax.get_xticks().tolist() == [0, 1, 2, 3]
    assert not axes[0].containers[0].errorbar and not axes[1].containers[0].errorbar
    (error_bars,) = axes[2].collections
    for segment, lengths in zip(error_bars.get_segments(), dwells, strict=True):
        spread = np.std(lengths, ddof=1)
        np.testing.assert_allclose(segment[:, 1], [np.mean(lengths) - spread, np.mean(lengths) + spread])


def test_figures_of_the_sample_windows_lie_at_the_beginning_middle_and_end(small, monkeypatch):
    monkeypatch.setattr(mc, "SAMPLE_WINDOW", 300)
    drawn = mc.draw_all(small, mc.visit_statistics(small))
    assert list(drawn) == ["state_sequence.png", "transition_matrix.png", "periods.png",
                           "sample_window_0.png", "sample_window_1.png", "sample_window_2.png"]
    assert left_title(drawn["state_sequence.png"].axes[0]) == "The first 2,000 steps"
    assert drawn["transition_matrix.png"].axes[0].get_title() == "Where the chain goes next"
    np.testing.assert_array_equal(drawn["transition_matrix.png"].axes[0].images[0].get_array().filled(0),
                                  small.process.transition_matrix)
    assert drawn["periods.png"].axes[1].get_ylabel() == "radius (data units)"
    for i, first in enumerate((0, 850, 1700)):
        fig = drawn[f"sample_window_{i}.png"]
        strip, heat = fig.axes[:2]
        X, states = small.X[first:first + 300], small.states[first:first + 300]
        check_strip(strip, states, first)
        limit = max(abs(np.percentile(X, [1, 99])))
        check_heatmap(heat, X, first, limits=(-limit, limit), cmap="RdBu_r")
        assert (heat.get_xlabel(), heat.get_ylabel()) == ("time step", "feature") and colour_bars(fig) == ["data units"]
        assert fig.get_suptitle() == f"Steps {first:,} to {first + len(X) - 1:,} of the series"
        check_circle_legend(fig, np.unique(states))


def test_figure_of_the_umap(small, tmp_path, monkeypatch):
    seen, saved = {}, {}
    monkeypatch.setattr(mc, "UMAP_POINTS", 200)

    def embed(points, neighbours, seed):
        seen.update(points=points, neighbours=neighbours, seed=seed)
        return points[:, :2]

    monkeypatch.setattr(mc, "umap_embedding", embed)
    monkeypatch.setattr(figures, "save", lambda fig, path: saved.update({path: fig}))
    mc.save_umap(small, tmp_path)
    steps = np.random.default_rng(42).permutation(2000)[:200]
    np.testing.assert_array_equal(seen["points"], small.X[steps])
    assert seen["seed"] == 42 and seen["neighbours"][1].shape == (200, 14)
    fig = saved[tmp_path / "umap.png"]
    by_circle, by_time = fig.axes[:2]
    for ax in (by_circle, by_time):
        np.testing.assert_allclose(ax.collections[0].get_offsets(), small.X[steps, :2])
    colors = figures.circle_colors(4)[small.states[steps]]
    np.testing.assert_allclose(by_circle.collections[0].get_facecolors()[:, :3], colors)
    np.testing.assert_array_equal(by_time.collections[0].get_array(), steps)
    assert (by_circle.get_title(), by_time.get_title()) == ("by circle", "by time")
    check_circle_legend(by_circle, [0, 1, 2, 3])
    assert colour_bars(fig) == ["time step"]
    distances = np.linalg.norm(small.X[:, None].astype(float) - small.X, axis=2)
    near = np.log(np.sort(distances, axis=1)[:, 1:31])
    inverse = np.mean(near[:, -1:] - near[:, :-1])
    assert "UMAP of 200 points" in fig.get_suptitle() and "(2,000 points, k = 30)" in fig.get_suptitle()
    shown = float(fig.get_suptitle().partition("dimension ")[2].split()[0])
    assert shown == pytest.approx(1 / inverse, rel=0.1)


@pytest.mark.parametrize("flags", [[], ["--uncompressed"]])
def test_script_prints_the_statistics_and_saves_the_figures(script, tmp_path, monkeypatch, flags):
    saved, umaps = {}, []
    monkeypatch.setattr(mc, "draw_all", lambda series, statistics: {
        "some.png": (series.n_steps, len(series.X), statistics[0].tolist())})
    monkeypatch.setattr(figures, "save_all", saved.update)
    monkeypatch.setattr(mc, "save_umap", lambda series, data_dir: umaps.append((series.n_steps, data_dir)))
    result = script("markov_circles_timeseries", *SMALL, *flags, "--data-dir", tmp_path)
    series = mc.generate(config(*SMALL))
    assert f"wrote {tmp_path / 'data.npz'} and config.json: 4,000 steps x 6 features" in result.out
    assert mc.summary_table(series, mc.visit_statistics(series)) in result.out
    assert len(text_rows(mc.summary_table(series, mc.visit_statistics(series)))) == 4
    assert saved == {tmp_path / "some.png": (series.n_steps, len(series.X), mc.visit_statistics(series)[0].tolist())}
    assert umaps == [(4000, tmp_path)]
    script("markov_circles_timeseries", *SMALL, *flags, "--no-umap", "--data-dir", tmp_path)
    assert len(umaps) == 1
    assert dataset.load_series(tmp_path).X.flags.writeable != bool(flags)  # mapped read-only where uncompressed


def test_statistics_without_a_whole_visit():
    series = mc.generate(config(*SMALL, "--n-steps", 5))
    circle = series.states[0]
    rows = text_rows(mc.summary_table(series, mc.visit_statistics(series)))
    assert rows[circle][3:] == ["5", "100.0", "%", "1", "–", "–"]
    assert all(rows[i][3:] == ["0", "0.0", "%", "0", "–", "–"] for i in range(4) if i != circle)


def test_values_of_an_uncompressed_array_are_aligned_in_the_file(tmp_path):
    mc.save_uncompressed(config(*SMALL), tmp_path)
    series = dataset.load_series(tmp_path)
    expected = mc.generate(config(*SMALL))
    content = (tmp_path / "data.npz").read_bytes()
    for name in ("X", "states", "thetas"):
        np.testing.assert_array_equal(getattr(series, name), getattr(expected, name))
        assert content.index(getattr(expected, name)[:50].tobytes()) % 64 == 0
