"""What the layers know: every measure against an independent reference, names and refusals, whole runs."""

import csv
import itertools
import json
import math
import os
import re
import statistics
import zlib
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import skdim
import torch
from conftest import TINY_MODEL
from matplotlib.figure import Figure
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

import baselines
import cli
import dataset
import evaluate_representations as ev
import excess
import figures
import learned
import level_figures
import level_tables
import mamba_model
import measures
import observer
import optimal_filter
import representations
import unseen
from measures import knn, levina_bickel

SAVED = {**TINY_MODEL, "seq_len": 128, "stride": 64, "val_fraction": 0.1}
QUICK = ["--no-umap", "--lb-points", 400, "--umap-points", 300, "--device", "cpu"]


@pytest.fixture(autouse=True)
def short_names(monkeypatch):
    """Files' names without the numbers that all commands here give to be quick; test_file_names.py is about names."""
    in_name, quick = cli.flags_in_name, ("umap_points", "umap_neighbors", "lb_points", "seed", "test_steps")
    monkeypatch.setattr(cli, "flags_in_name",
                        lambda parser, args, without=(): in_name(parser, args, (*without, *quick)))


def tiny_model(seed=0, **sizes):
    torch.manual_seed(seed)
    return mamba_model.CausalTimeSeriesMamba(**{"feature_dim": 6, **TINY_MODEL, **sizes}).eval().use_scan(
        "reference", "cpu")


def save_model(path, model, **args):
    mamba_model.save_checkpoint(path, 1, model.state_dict(), {}, 1.0, 1.0, {**SAVED, **args})
    return path


def names_in(folder):
    return {path.name for path in folder.iterdir()}


# ---- levels ----------------------------------------------------------------------------------------------------


def test_levels_are_named_and_ordered_by_depth():
    assert representations.level_names(2) == ["input", "layer 1", "layer 2", "output"]
    assert ev.level_list("output,2,input") == ["output", 2, "input"]
    assert ev.chosen_depths(["output", 2, "input", 2], 7, "m.pt") == [0, 2, 8]
    assert ev.chosen_depths(None, 2, "m.pt") == [0, 1, 2, 3]


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "layer", "1,,2", "1, 2", "²"])
def test_what_is_no_level_is_refused(text):
    with pytest.raises(ev.argparse.ArgumentTypeError, match="counted from 1"):
        ev.level_list(text)


def test_a_layer_that_the_model_lacks_is_refused():
    assert ev.chosen_depths([3, 7], 7, "m.pt") == [3, 7]
    with pytest.raises(cli.UserError, match=r"--layers 8 .* layers 1…7"):
        ev.chosen_depths([3, 8], 7, "m.pt")


# ---- one row a time step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_steps", "seq_len"), [(1000, 128), (100, 128), (128, 128), (129, 128), (50, 1), (7, 2),
                                                  (1000, 3)])
def test_windows_cover_every_step_and_overlap_by_a_quarter(n_steps, seq_len):
    starts, length = representations.overlapping_windows(n_steps, seq_len)
    assert length == min(seq_len, n_steps)
    assert starts[0] == 0 and starts[-1] + length == n_steps
    for before, after in itertools.pairwise(starts):
        assert before < after
        assert before + length - after >= min(length // 4, length - 1)


@pytest.mark.parametrize(("n_steps", "seq_len"), [(500, 64), (64, 64), (65, 64), (40, 64), (30, 2)])
@pytest.mark.parametrize("velocity", [False, True])
def test_each_step_comes_from_the_window_with_most_past(n_steps, seq_len, velocity):
    starts, length = representations.overlapping_windows(n_steps, seq_len)
    X = np.random.default_rng(0).standard_normal((n_steps, 3))
    # Every window sees its own multiple of the series, so a row tells which window it came from.
    windows = torch.from_numpy(np.stack([(i + 1) * X[start:start + length] for i, start in enumerate(starts)]))
    rows = representations.stitch(windows, starts, velocity)
    wanted = []
    for t in range(int(velocity), n_steps):
        i, start = min((start, i) for i, start in enumerate(starts) if start <= t - int(velocity) and t < start + length
                       )[::-1]
        if t >= length:
            assert t - start >= length // 4  # causal past enough
        wanted.append((i + 1) * (X[t] - X[t - 1] if velocity else X[t]))
    np.testing.assert_allclose(rows, wanted, rtol=1e-12)


@pytest.mark.parametrize(("velocity", "mixture"), [(False, 0), (True, 0), (False, 3)])
def test_representations_are_those_that_the_model_gives_each_window(velocity, mixture, monkeypatch):
    monkeypatch.setattr(representations, "STEPS_IN_BATCH", {"cpu": 130})  # two windows at a time
    model, X = tiny_model(mixture=mixture), np.random.default_rng(0).standard_normal((150, 6)).astype(np.float32)
    starts, length = representations.overlapping_windows(150, 64)
    found = dict(representations.of_steps(model, X, 64, [0, 1, 2, 3], velocity))
    assert list(found) == [0, 1, 2, 3]
    windows = torch.from_numpy(np.stack([X[start:start + length] for start in starts]))
    with torch.no_grad():
        levels = [windows, *model.encode(windows)]
    for depth, windows in enumerate(levels):
        wanted = np.empty((150, windows.shape[2]))
        for start, window in reversed(list(zip(starts, windows.numpy(), strict=True))):
            wanted[start:start + length] = window
        if velocity:  # of a step and the one before in the window that holds both
            for t in range(149, 0, -1):
                i = next(i for i, s in enumerate(starts) if s <= t - 1 and t < s + length)
                wanted[t] = windows[i, t - starts[i]] - windows[i, t - 1 - starts[i]]
            wanted = wanted[1:]
        np.testing.assert_allclose(found[depth], wanted, rtol=1e-4, atol=1e-5)


def test_only_the_wanted_levels_are_computed():
    model, X = tiny_model(), np.zeros((100, 6), np.float32)
    calls = []
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, i=i: calls.append(i))
    assert [depth for depth, _ in representations.of_steps(model, X, 64, [0, 1])] == [0, 1]
    assert calls == [0]
    assert [depth for depth, _ in representations.of_steps(model, X, 64, [0])] == [0]
    assert calls == [0]


def test_errors_are_measured_without_reduced_precision(monkeypatch):
    asked, measure = [], mamba_model.validation_errors
    monkeypatch.setattr(mamba_model, "validation_errors",
                        lambda *given, amp: asked.append(amp) or measure(*given, amp=amp))
    series = dataset.Series(np.zeros((400, 6), np.float32))
    ev.prediction_errors(tiny_model(), series, (40, 25, 0.3), NoFilter())
    assert asked == [False]


class Measuring:
    """What a Measurer is asked for, with the widths of the levels in place of measures; two test windows."""

    def __init__(self, n_features=6, length=20):
        rng = np.random.default_rng(3)
        X, windows = (rng.standard_normal(shape).astype(np.float32) for shape in ((50, 6), (2, length, n_features)))
        self.series, self.args = dataset.Series(X), SimpleNamespace(velocity=False)
        self.windows = torch.from_numpy(windows)
        self.optimum = SimpleNamespace(tested=lambda seq_len: SimpleNamespace(windows=self.windows))

    def probes(self, values, in_test, window_settings):
        return {"width": values.shape[1], "in_test": in_test.shape}

    def level(self, *given, umap=True):
        return self.probes(*given), None


def test_errors_in_the_test_windows_pair_a_prediction_with_the_next_step():
    model, measuring, steps = tiny_model(), Measuring(), []
    loaded = SimpleNamespace(model=model, name="m", window_settings=(20, 10, 0.1), depths=[1])
    levels, embeddings, errors = ev.measure_levels(loaded, measuring, SimpleNamespace(update=lambda: steps.append(1)))
    assert [level["level"] for level in levels] == ["layer 1"] and not embeddings and len(steps) == 1
    with torch.no_grad():
        predicted = model(measuring.windows)["1"].numpy()
    windows = measuring.windows.numpy()
    for i, t in itertools.product(range(2), range(19)):
        assert errors[i, t] == pytest.approx(np.mean((predicted[i, t] - windows[i, t + 1])**2), rel=1e-4)


@pytest.mark.parametrize("flags, seed", [({"seed": 7}, 7), ({"seed": 3}, 3), ({}, 0), ({"seed": None}, 0)])
def test_the_untrained_model_has_the_seed_of_the_run(monkeypatch, flags, seed):
    asked, untrained_like = [], baselines.untrained_like
    monkeypatch.setattr(baselines, "untrained_like", lambda *given: asked.append(given) or untrained_like(*given))
    model = tiny_model()
    loaded = SimpleNamespace(model=model, trained_with=flags, window_settings=(20, 10, 0.1), depths=[0, 3])
    levels = ev.Baselines(Measuring()).untrained_levels(loaded)
    assert asked == [(model, seed)]
    assert [level["level"] for level in levels] == ["untrained layer 2"] and levels[0]["in_test"] == (2, 20, 16)


class NoFilter:
    def window_floors(self, starts, seq_len, horizons):
        return {}


def test_the_autoregression_learns_from_the_training_part_and_is_scored_in_the_validation_windows():
    """Of each recording it learns what lies before the first validation step, 280; no window crosses a border."""
    X = np.random.default_rng(1).standard_normal((400, 3)).cumsum(axis=0).astype(np.float32)
    series = dataset.Series(X, lengths=(150, 200, 50))
    optimum = SimpleNamespace(tested=lambda seq_len: None, window_floors=NoFilter().window_floors)
    found = ev.Baselines(SimpleNamespace(series=series, optimum=optimum)).autoregression((40, 25, 0.3))
    errors = baselines.Autoregression([X[:150], X[150:280]]).errors(X, [280, 305, 350], 40)
    assert found == {"lags": 32, "val_mse": pytest.approx(errors.mean()), "optimal_mse": None, "excess_percent": None}


@pytest.mark.parametrize("held_back, starts", [(0, (280, 305, 330, 355)), (20, (280, 305, 330)), (40, (280, 305))])
def test_errors_pair_a_prediction_with_what_it_predicts_in_the_validation_windows(monkeypatch, held_back, starts):
    """No window reaches into the steps that were held back for the test."""
    monkeypatch.setattr(representations, "STEPS_IN_BATCH", {"cpu": 120})  # three windows at a time; there are four
    model, X = tiny_model(max_horizon=3), np.random.default_rng(1).standard_normal((400, 6)).astype(np.float32)
    series = dataset.Series(X)
    found = ev.prediction_errors(model, series, (40, 25, 0.3), NoFilter(), held_back)
    assert [row["horizon"] for row in found] == [1, 2, 3]
    for row in found:
        k, errors = row["horizon"], []
        for start in starts:
            with torch.no_grad():
                prediction = model(torch.from_numpy(X[None, start:start + 40]))[str(k)][0].numpy()
            errors += [(prediction[t] - X[start + t + k])**2 for t in range(40 - k)]
        assert row["val_mse"] == pytest.approx(np.mean(errors), rel=1e-5)
        assert row["optimal_mse"] is row["excess_percent"] is None


# ---- measures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_rows", [10, 1000, 100_000])
def test_probes_are_fitted_on_the_past_and_scored_on_the_future(n_rows):
    train, scored = measures.probe_split(n_rows, np.random.default_rng(0))
    tested = np.arange(n_rows)[scored]
    assert train.max() < tested.min() and tested[-1] == n_rows - 1
    assert len(tested) == pytest.approx(0.3 * n_rows, abs=1)
    assert len(set(train.tolist())) == len(train) == min(measures.PROBE_STEPS, n_rows - len(tested))


@pytest.mark.parametrize(("n_umap", "neighbours"), [(150, 10), (300, 15), (400, 10), (120, 60)])
def test_one_neighbour_query_serves_dimension_and_umap(monkeypatch, n_umap, neighbours):
    points = np.random.default_rng(0).standard_normal((400, 5))
    queries = []
    monkeypatch.setattr(measures, "knn", lambda points, k: queries.append((len(points), k)) or knn(points, k))
    dimension, graph = ev.neighborhood(points, 300, n_umap, neighbours)
    assert dimension.pop("two_nn") == pytest.approx(skdim.id.TwoNN().fit(points[:300]).dimension_, rel=1e-6)
    assert queries[0] == (300, 100) and len(queries) == 1 + (n_umap in (400, 120))
    assert dimension == pytest.approx(levina_bickel(points[:300], measures.DIMENSION_KS), rel=1e-9)
    wanted = knn(points[:n_umap], neighbours - 1)
    np.testing.assert_array_equal(graph[1], wanted[1])
    np.testing.assert_allclose(graph[0], wanted[0])


def test_neighborhood_leaves_out_what_is_not_asked_for():
    points = np.random.default_rng(0).standard_normal((300, 3))
    assert ev.neighborhood(points, 0, 0, 15) == (None, None)
    assert ev.neighborhood(points, 300, 0, 15)[1] is None
    assert ev.neighborhood(points, 0, 100, 15)[0] is None


def test_repeated_points_count_once_and_a_collapsed_level_has_no_dimension():
    points = np.random.default_rng(0).standard_normal((300, 4))
    repeated = np.concatenate([points, points[:80]])
    ks = measures.DIMENSION_KS
    two_nn = skdim.id.TwoNN().fit(points).dimension_
    assert ev.neighborhood(repeated, 380, 0, 15)[0] == pytest.approx({"two_nn": two_nn, **levina_bickel(points, ks)})
    assert ev.neighborhood(np.ones((300, 4)), 300, 0, 15)[0] == dict.fromkeys(["two_nn", *ks])


def test_the_best_layer_is_no_input_and_the_first_of_equals():
    levels = [{"level": name, "probe_accuracy": a} for name, a in
              [("input", 1.0), ("layer 1", 0.5), ("layer 2", 0.9), ("layer 3", 0.9), ("output", 1.0)]]
    layers = level_tables.layers_of(levels)
    assert level_tables.best_layer(layers)["level"] == "layer 2" and len(layers) == 3
    assert level_tables.best_layer(level_tables.layers_of(levels[:1])) is None
    assert level_tables.best_layer([{"level": "layer 1", "probe_accuracy": None}]) is None


# ---- UMAP ------------------------------------------------------------------------------------------------------


def test_a_pool_is_used_where_it_pays(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert ev.umap_pool(9, 100) is None and ev.umap_pool(1, 10**6) is None
    pool = ev.umap_pool(9, 5000)
    try:
        assert ev.submit(pool, os.getpid).result(timeout=120) != os.getpid()
    finally:
        pool.shutdown()
    assert ev.submit(None, os.getpid).result() == os.getpid()


# ---- every measure of a level ----------------------------------------------------------------------------------


def level_args(**changes):
    return SimpleNamespace(**{"umap_points": 150, "lb_points": 220, "umap_neighbors": 12, "no_umap": False,
                              "no_lb": False, "pca": None, "velocity": False, "seed": 3, **changes})


def measured(values, series, rows, args):
    """The measures of a level of the last steps of a series, and its points, their neighbours and the nearest ones."""
    n = len(values)
    tail = dataset.Series(series.X[-n:], series.states[-n:], series.thetas[-n:])
    measurer, given = ev.Measurer(tail, None, rows, args, None), []
    measurer.embedding = lambda reduced, points, graph: given.extend([points, graph, cdist(
        reduced, points).argmin(axis=1)]) or "an embedding"
    level, embedding = measurer.level(values, None, (64, 64, 0.1))
    assert embedding == (None if args.no_umap else "an embedding")
    return level, *(given or [None, None, None])


def rings(n, n_circles=3, width=7, noise=0.9):
    """A level (n, width) of rings with offsets, and the series whose last n steps it belongs to."""
    rng = np.random.default_rng(5)
    states = np.concatenate([[2, 2], np.arange(n) // 30 % n_circles])  # the series has two steps more
    thetas = np.concatenate([[0, 0], np.arange(n) * 0.31 % (2 * np.pi)])
    axes = rng.standard_normal((n_circles, 2, width))
    wave = np.stack([np.cos(thetas), np.sin(thetas)], axis=1)[2:]
    values = np.einsum("tp,tpw->tw", wave, axes[states[2:]]) + 0.5 * rng.standard_normal((n_circles, width))[states[2:]]
    values = (values + noise * rng.standard_normal((n, width))).astype(np.float32)
    return values, dataset.Series(np.zeros((n + 2, 1), np.float32), states, thetas)


def vote(labels, width):
    """The commonest label around each step, the lowest of equals, by counting."""
    winners = []
    for t in range(len(labels)):
        window = labels[max(0, t - width // 2):t + width // 2 + 1].tolist()
        winners.append(min(set(window), key=lambda label: (-window.count(label), label)))
    return np.array(winners)


def dimension_at(points, ks):
    return {"two_nn": skdim.id.TwoNN().fit(points).dimension_,
            **{k: skdim.id.MLE().fit(points, n_neighbors=k).dimension_ for k in ks}}


def agreement_scores(prefix, labels, states):
    return {f"{prefix}_ari": adjusted_rand_score(states, labels),
            f"{prefix}_nmi": normalized_mutual_info_score(states, labels),
            f"{prefix}_ari_smooth": adjusted_rand_score(states, vote(labels, 101)),
            f"{prefix}_nmi_smooth": normalized_mutual_info_score(states, vote(labels, 101))}


@pytest.mark.parametrize("changes", [{}, {"pca": 2}, {"umap_points": 300, "lb_points": 180, "seed": 8}])
def test_every_measure_of_a_level_is_that_of_an_independent_computation(monkeypatch, changes):
    monkeypatch.setattr(measures, "PROBE_STEPS", 250)
    args = level_args(**changes)
    values, series = rings(600)
    states, thetas = series.states[2:], series.thetas[2:]
    rows = np.random.default_rng(1).permutation(600)[:max(args.umap_points, args.lb_points)]
    level, points, graph, nearest = measured(values, series, rows, args)

    whole = values.astype(np.float64)
    reduced = whole if args.pca is None else PCA(args.pca).fit(whole).transform(whole)
    sample = reduced[rows]
    train = np.random.default_rng(args.seed).permutation(420)[:250]
    white = PCA(whiten=True).fit(whole[train])
    scale = math.sqrt(250 / 249)  # PCA divides by n - 1
    probe = LogisticRegression(C=1.0, max_iter=5000, tol=1e-6).fit(white.transform(whole[train]) * scale, states[train])
    accuracy = (probe.predict(white.transform(whole[420:]) * scale) == states[420:]).mean()
    wave = np.stack([np.cos(thetas), np.sin(thetas)], axis=1)
    ridge = Ridge(alpha=1.0).fit(white.transform(whole[train]) * scale, wave[train])
    clusters = KMeans(3, n_init=4, random_state=args.seed).fit(sample.astype(np.float32)).predict(
        reduced.astype(np.float32))
    C = np.cov(whole.T, bias=True)
    shown = args.umap_points
    wanted = {
        "width": 7, "probe_accuracy": accuracy,
        "phase_r2": ridge.score(white.transform(whole[420:]) * scale, wave[420:]), "beliefs": None,
        **agreement_scores("kmeans", clusters, states),
        "silhouette": silhouette_score(sample[:shown], states[rows[:shown]]),
        "effective_rank": np.trace(C)**2 / np.trace(C @ C),
        "dimension": dimension_at(sample[:args.lb_points], (5, 10, 30, 100)),
        "dimension_whitened": dimension_at(PCA(whiten=True).fit_transform(sample[:args.lb_points]), (30,)),
    }
    assert list(level) == list(wanted)
    for key, value in wanted.items():
        if key == "beliefs":
            assert level[key] is None
        elif key == "probe_accuracy":  # two fits that both stop a little short of the optimum
            assert level[key] == pytest.approx(value, abs=0.012) and 0.6 < value < 1
        else:
            assert level[key] == pytest.approx(value, rel=2e-3), key
    distances = cdist(sample[:shown], sample[:shown])
    np.testing.assert_array_equal(graph[1], distances.argsort(axis=1)[:, 1:args.umap_neighbors])
    # Principal axes have no sign; distances show that the points are the right ones.
    np.testing.assert_allclose(cdist(points, points), distances, atol=1e-3)
    np.testing.assert_array_equal(nearest, cdist(reduced, sample[:shown]).argmin(axis=1))


def test_what_a_level_is_not_asked_for_is_left_out():
    values, series = rings(300)
    rows = np.arange(300)
    level, *rest = measured(values, series, rows, level_args(no_umap=True, no_lb=True))
    assert rest == [None, None, None] and level["dimension"] is None
    assert level["silhouette"] == pytest.approx(silhouette_score(values[:150], series.states[2:152]), rel=1e-5)


# ---- tables ----------------------------------------------------------------------------------------------------

MEASURES = ("probe_accuracy", "phase_r2", "kmeans_ari", "kmeans_nmi", "kmeans_ari_smooth", "kmeans_nmi_smooth",
            "silhouette", "effective_rank", "umap_silhouette", "umap_ari", "umap_nmi", "umap_ari_smooth",
            "umap_nmi_smooth")


def made_report(name="m", n_layers=3, shift=0.0, depths=None, best=2, umap=True, **more):
    """A report whose every number is different: the layer `best` has the best probe, the last layer doesn't."""
    levels = []
    for depth in range(n_layers + 2) if depths is None else depths:
        level = {"level": ["input", *(f"layer {i + 1}" for i in range(n_layers)), "output"][depth], "depth": depth}
        for j, key in enumerate(MEASURES):
            level[key] = 0.0137 + shift + 0.041 * j + 0.0023 * (depth if depth == best else -depth)
        level["effective_rank"] *= 10
        level["dimension"] = {k: 5 + shift + 0.3 * i - 0.07 * depth for i, k in enumerate(("two_nn", 5, 10, 30, 100))}
        level["dimension_whitened"] = {k: 9 + shift + 0.2 * i - 0.05 * depth for i, k in enumerate(("two_nn", 30))}
        level["beliefs"] = {key: 0.2 + shift + 0.1 * i - 0.03 * abs(depth - best) for i, key in enumerate(
            ("circle", "phase", "revolutions", "hazard"))}
        levels.append(level if umap else {key: value for key, value in level.items() if "umap" not in key})
    errors = [{"horizon": k, "val_mse": 8.5 + k + shift, "optimal_mse": 8.1 + k, "excess_percent": 4.9 - k + shift,
               "val_nll": 51.3 + k + shift, "optimal_nll": 50.2 + k, "excess_nats": 1.13 - k + shift}
              for k in (1, 2, 4)]
    return {"name": name, "n_layers": n_layers, "levels": levels, "errors": errors, "filter_circle_accuracy": 0.957,
            "lb_points": 220, "seq_len": 128, "trained_with": {"seed": 1, "lr": 0.1, "data_dir": name}, **more}


def cells(text):
    """A text table as lists of cells: the header and the rows. No cell is empty."""
    header, rule, *rows = (re.split(r"  +", line.strip()) for line in text.splitlines())
    assert all(set(word) == {"-"} for word in rule)
    return header, rows


def test_every_cell_of_the_table_of_levels():
    report = made_report()
    header, rows = cells(level_tables.level_table(report))
    assert header == ["level", "probe acc.", "phase R²", "ARI", "smooth", "NMI", "smooth", "silhouette", "rank"]
    keys = ["probe_accuracy", "phase_r2", "kmeans_ari", "kmeans_ari_smooth", "kmeans_nmi", "kmeans_nmi_smooth",
            "silhouette"]
    assert rows == [[m["level"], *(f"{m[key]:.3f}" for key in keys), f"{m['effective_rank']:.1f}"]
                    for m in report["levels"]]
    report["levels"][1]["probe_accuracy"] = None
    report["baselines"] = [{"level": "quadratic probe", "probe_accuracy": 0.1234, "phase_r2": 0.5, "beliefs": None}]
    header, rows = cells(level_tables.level_table(report))
    assert rows[1][:2] == ["layer 1", "–"] and rows[5] == ["quadratic probe", "0.123", "0.500", *["–"] * 6]


def test_every_cell_of_the_tables_of_dimensions_and_beliefs():
    report = made_report()
    report["levels"][1]["dimension"][5] = None
    low = {**report["levels"][0], "level": "low-passed input"}
    report["baselines"] = [low, {"level": "quadratic probe", "beliefs": dict.fromkeys(low["beliefs"], 0.5)}]
    header, rows = cells(level_tables.dimension_table(report))
    assert header == ["dimension of 220 steps", "TwoNN", "k = 5", "k = 10", "k = 30", "k = 100", "whitened: TwoNN",
                      "k = 30"]
    assert rows[1][2] == "–"
    rows[1][2] = report["levels"][1]["dimension"][5] = 4.5
    for row, m in zip(rows, [*report["levels"], low], strict=True):
        values = [*m["dimension"].values(), *m["dimension_whitened"].values()]
        assert row == [m["level"], *(f"{value:.2f}" if value != 4.5 else 4.5 for value in values)]
    header, rows = cells(level_tables.belief_table(report))
    assert header == ["R² of beliefs", "circle", "phase", "revolutions done", "visit ends now"]
    assert rows == [[m["level"], *(f"{m['beliefs'][key]:.3f}" for key in ("circle", "phase", "revolutions", "hazard"))]
                    for m in (*report["levels"], *report["baselines"])]


def test_every_cell_of_the_table_of_umaps():
    report = made_report()
    header, rows = cells(level_tables.umap_table(report))
    assert header == ["in the UMAP", "silhouette", "ARI", "smooth", "NMI", "smooth"]
    assert rows == [[m["level"], *(f"{m[key]:.3f}" for key in (
        "umap_silhouette", "umap_ari", "umap_ari_smooth", "umap_nmi", "umap_nmi_smooth"))] for m in report["levels"]]


WANTED_COMPARISON = {  # column of the CSV: (title in the table, format there, where the value comes from)
    "checkpoint": ("checkpoint", "", lambda r: r["name"]),
    "val_mse": ("val MSE", ".4f", lambda r: r["errors"][0]["val_mse"]),
    "optimal_mse": ("optimal", ".4f", lambda r: r["errors"][0]["optimal_mse"]),
    "excess_percent": ("excess %", "+.2f", lambda r: r["errors"][0]["excess_percent"]),
    "val_nll": ("val NLL", ".4f", lambda r: r["errors"][0]["val_nll"]),
    "optimal_nll": ("optimal", ".4f", lambda r: r["errors"][0]["optimal_nll"]),
    "excess_nats": ("nats above", "+.4f", lambda r: r["errors"][0]["excess_nats"]),
    "best_layer": ("best layer", "", lambda r: "layer 2"),
    "probe_accuracy": ("probe acc.", ".3f", lambda r: r["levels"][2]["probe_accuracy"]),
    "phase_r2": ("phase R²", ".3f", lambda r: r["levels"][2]["phase_r2"]),
    "silhouette": ("silhouette", ".3f", lambda r: r["levels"][2]["silhouette"]),
    "kmeans_ari": ("ARI", ".3f", lambda r: r["levels"][2]["kmeans_ari"]),
    "kmeans_ari_smooth": ("smooth", ".3f", lambda r: r["levels"][2]["kmeans_ari_smooth"]),
    "dimension_k30": ("dim 30", ".2f", lambda r: r["levels"][2]["dimension"][30]),
    "last_layer_dimension_k30": ("last", ".2f", lambda r: r["levels"][3]["dimension"][30]),
    "peak_silhouette": ("peak sil.", ".3f", lambda r: max(m["silhouette"] for m in r["levels"])),
    "peak_umap_silhouette": ("UMAP sil.", ".3f", lambda r: max(m["umap_silhouette"] for m in r["levels"])),
    "peak_umap_ari_smooth": ("UMAP ARI", ".3f", lambda r: max(m["umap_ari_smooth"] for m in r["levels"])),
}


WANTED_IN_CSV = {  # columns that only the CSV has
    f"belief_{key}": ("", "", lambda r, key=key: max(m["beliefs"][key] for m in r["levels"][1:4]))
    for key in ("circle", "phase", "revolutions", "hazard")}


def peaked(report, level):
    """The report with its highest silhouettes at this level, far from the best layer."""
    for i, key in enumerate(("silhouette", "umap_silhouette", "umap_ari_smooth")):
        report["levels"][level][key] = 0.91 + 0.01 * i
    return report


def test_every_cell_of_the_comparison():
    reports = [peaked(made_report("a"), 0), peaked(made_report("b", shift=0.2), 4)]
    rows = [level_tables.comparison_row(report) for report in reports]
    for row, report in zip(rows, reports, strict=True):
        assert row == {key: read(report) for key, (_, _, read) in (WANTED_COMPARISON | WANTED_IN_CSV).items()}
    header, table = cells(level_tables.comparison_table(rows))
    assert header == [title for title, _, _ in WANTED_COMPARISON.values()]
    assert table == [[format(read(report), form) for _, form, read in WANTED_COMPARISON.values()]
                     for report in reports]
    lines = list(csv.reader(level_tables.comparison_csv(rows).split("\n")))
    assert lines[0] == list(WANTED_COMPARISON | WANTED_IN_CSV) and lines[3:] == [[]]
    for line, report in zip(lines[1:3], reports, strict=True):
        assert line == [str(read(report)) for _, _, read in (WANTED_COMPARISON | WANTED_IN_CSV).values()]


def test_a_comparison_leaves_out_columns_that_nobody_fills_and_marks_empty_cells():
    full, bare = made_report("a", umap=False), made_report("b", umap=False, depths=[0, 4], errors=[])
    for level in bare["levels"]:
        level["dimension"] = level["beliefs"] = None
    for error in full["errors"]:  # a point head has no likelihood
        for key in ("val_nll", "optimal_nll", "excess_nats"):
            del error[key]
    rows = [level_tables.comparison_row(report) for report in (full, bare)]
    header, table = cells(level_tables.comparison_table(rows))
    assert header == [title for key, (title, _, _) in WANTED_COMPARISON.items()
                      if key not in ("val_nll", "optimal_nll", "excess_nats") and "umap" not in key]
    peak = f"{max(m['silhouette'] for m in bare['levels']):.3f}"
    assert table[1] == ["b", *["–"] * 11, peak]
    assert level_tables.comparison_csv(rows).split("\n")[2] == f"b{',' * 15}{rows[1]['peak_silhouette']},,{',' * 4}"


def test_models_are_of_one_group_when_only_the_seed_and_names_differ():
    flags = {"lr": 0.1, "epochs": 5, "seed": 1, "checkpoint": "a.pt", "resume": None, "device": "cpu", "log_dir": None}
    changes = {"a": {}, "b": {"seed": 2}, "c": {"lr": 0.2}, "d": {"checkpoint": "d.pt", "resume": "x.pt"},
               "e": {"epochs": 6, "seed": 3}, "f": {"device": "cuda", "log_dir": "x", "style": "talk"},
               "g": {"lr": 0.2, "seed": 9}}
    reports = [{"name": name, "trained_with": {**flags, **change}} for name, change in changes.items()]
    groups = level_tables.seed_groups(reports)
    assert {name: [r["name"] for r in group] for name, group in groups.items()} == {"a": ["a", "b", "d", "f"],
                                                                                    "c": ["c", "g"]}


def test_a_group_has_the_name_that_its_models_share_but_for_the_seed():
    def groups(*models):
        reports = [{"name": name, "trained_with": {"seed": seed, "lr": lr}} for name, seed, lr in models]
        return {name: [report["name"] for report in group] for name, group in level_tables.seed_groups(reports).items()}

    full = ("full_42", 42, 0.1), ("full_43", 43, 0.1)
    assert groups(*full, ("z_42", 42, 0.2), ("z_43_data-ab", 43, 0.2)) == {
        "full": ["full_42", "full_43"], "z_42": ["z_42", "z_43_data-ab"]}
    assert groups(("a_seed2_b", 2, 1), ("a_seed3_b", 3, 1), ("c4", 4, 2), ("c5", 5, 2)) == {
        "a_b": ["a_seed2_b", "a_seed3_b"], "c4": ["c4", "c5"]}
    assert groups(*full, ("full", 42, 0.3)) == {"full_42": ["full_42", "full_43"]}  # not one setting with that model
    assert groups(*full, ("full_44", 44, 0.2), ("full_45", 45, 0.2)) == {
        "full_42": ["full_42", "full_43"], "full_44": ["full_44", "full_45"]}


def test_every_cell_of_the_spread_over_seeds():
    reports = [made_report(f"r{i}", shift=shift) for i, shift in enumerate((0.0, 0.05, 0.31))]
    other = [made_report(f"o{i}", shift=shift, errors=[]) for i, shift in enumerate((0.1, 0.2))]
    header, rows = cells(level_tables.spread_table({"r0": reports, "o0": other}))
    numbers = {key: entry for key, entry in WANTED_COMPARISON.items() if entry[1]}
    assert header == ["mean ± std", *(title for title, _, _ in numbers.values())]
    for row, name, group in ((rows[0], "r0, 3 seeds", reports), (rows[1], "o0, 2 seeds", other)):
        assert row[0] == name
        for cell, (title, form, read) in zip(row[1:], numbers.values(), strict=True):
            if title in ("val MSE", "optimal", "excess %", "val NLL", "nats above") and name.startswith("o"):
                assert cell == "–"
            else:
                values = [read(report) for report in group]
                assert cell == (f"{statistics.mean(values):{form}} ± "
                                f"{statistics.stdev(values):{form.replace('+', '')}}"), title
    header, _ = cells(level_tables.spread_table({"o0": other}))
    assert header[:2] == ["mean ± std", "probe acc."]


def test_a_peak_is_the_highest_value_of_the_levels_that_have_one():
    assert level_tables.peak([{"x": 0.1}, {"x": None}, {"x": 0.7}, {}, {"x": 0.3}], "x") == 0.7
    assert level_tables.peak([{"x": None}, {}], "x") is None


# ---- figures ---------------------------------------------------------------------------------------------------

PANEL_LINES = [  # title, one line per entry: (label, key)
    ("circle accuracy of a linear probe", [("", "probe_accuracy")]),
    ("phase R², (cos θ, sin θ)", [("", "phase_r2")]),
    ("ARI of k-means", [("vote over 101 steps", "kmeans_ari_smooth"), ("raw", "kmeans_ari"),
                        ("in the UMAP, vote", "umap_ari_smooth")]),
    ("NMI of k-means", [("vote over 101 steps", "kmeans_nmi_smooth"), ("raw", "kmeans_nmi"),
                        ("in the UMAP, vote", "umap_nmi_smooth")]),
    ("silhouette of the circles", [("in the level", "silhouette"), ("in its UMAP", "umap_silhouette")]),
    ("effective rank", [("", "effective_rank")]),
    ("dimension", [("Levina–Bickel, k = 30", 30), ("the same, whitened", "whitened"), ("TwoNN", "two_nn")]),
]


def read(level, key):
    if key == "whitened":
        return level["dimension_whitened"][30]
    return level["dimension"][key] if key in level["dimension"] else level[key]


def legend_of(target):
    legend = target.legends[0] if isinstance(target, Figure) else target.get_legend()
    return [text.get_text() for text in legend.get_texts()]


def test_every_line_of_the_summary_is_the_measure_that_its_panel_names():
    reports = [made_report("first"), made_report("second", shift=0.3)]
    fig = level_figures.draw_summary(reports, "measures against depth")
    assert fig.get_suptitle() == "measures against depth" and len(fig.axes) == 7
    colors = figures.run_colors(2)
    for ax, (title, lines) in zip(fig.axes, PANEL_LINES, strict=True):
        assert ax.get_title() == title
        drawn = iter(ax.get_lines())
        for report, color in zip(reports, colors, strict=True):
            for style, (_, key) in zip(("-", "--", ":"), lines, strict=False):
                line, output = next(drawn), next(drawn)  # the output is joined to no layer
                assert line.get_xdata().tolist() == [0, 1, 2, 3] and list(output.get_xdata()) == [4]
                assert [*line.get_ydata(), *output.get_ydata()] == [read(level, key) for level in report["levels"]]
                assert tuple(line.get_color()) == tuple(output.get_color()) == tuple(color)
                assert (line.get_linestyle(), line.get_marker()) == (style, "o")
                assert (output.get_linestyle(), output.get_marker()) == ("None", "D")
        assert ax.get_xlabel() == "layer"
        assert [tick.get_text() for tick in ax.get_xticklabels()] == ["in", "1", "2", "3", "out"]
        assert ax.get_xticks().tolist() == [0, 1, 2, 3, 4]
        if len(lines) > 1:
            assert legend_of(ax) == [label for label, _ in lines]
            assert [h.get_linestyle() for h in ax.get_legend().get_lines()] == ["-", "--", ":"][:len(lines)]
        else:
            assert ax.get_legend() is None
        if title.startswith(("circle accuracy", "ARI", "NMI", "silhouette")):
            assert ax.get_ylim()[0] <= 0 and ax.get_ylim()[1] == 1.02
        else:
            assert ax.get_ylim()[1] != 1.02
    ceiling = fig.axes[0].get_lines()[-1]
    assert set(ceiling.get_ydata()) == {0.957} and ceiling.get_linestyle() == "-."
    output = "output: the prediction, in another space than the layers"
    assert legend_of(fig) == ["first", "second", output, "exact filter: 0.957"]
    handles = fig.legends[0].get_lines()
    assert handles[2].get_marker() == "D"
    assert [tuple(h.get_color()) for h in handles[:2]] == [tuple(color) for color in colors]


def excess_of(shift=0.0):
    events = [{"event": name, "predictions": 0.1 * i + 0.05, "share": 0.3 - 0.1 * i + shift,
               "share_error": 0.01 * i + 0.01, "mean_excess": 0.1, "mean_excess_error": 0.01}
              for i, name in enumerate((*excess.EVENTS, "all"))]
    return {"steps": 5000, "blocks": 6, "events": events,
            "history": {"steps": [1.0, 2.5, 20.0], "mse": [9 + shift, 8.5, 8.2], "optimal": [8.8, 8.4, 8.1]}}


def test_every_line_and_bar_of_the_figures_of_beliefs_and_of_the_excess():
    reports = [made_report("first", excess=excess_of()), made_report("second", shift=0.1, excess=excess_of(0.2))]
    colors = figures.run_colors(2)
    fig = level_figures.draw_beliefs(reports, "t")
    assert [ax.get_title() for ax in fig.axes] == ["R² of: circle", "R² of: phase", "R² of: revolutions done",
                                                   "R² of: visit ends now"]
    for ax, key in zip(fig.axes, ("circle", "phase", "revolutions", "hazard"), strict=True):
        drawn = iter(ax.get_lines())
        for report, color in zip(reports, colors, strict=True):
            line, output = next(drawn), next(drawn)
            assert [*line.get_ydata(), *output.get_ydata()] == [m["beliefs"][key] for m in report["levels"]]
            assert tuple(line.get_color()) == tuple(color)
    fig = level_figures.draw_excess(reports, "t")
    bars, curves = fig.axes
    width = [bar.get_width() for bar in bars.patches]
    events = [row for r in reports for row in r["excess"]["events"][:5]]
    assert width == pytest.approx([100 * row["share"] for row in events])
    error_bars = [segment for group in bars.collections for segment in group.get_segments()]
    assert [(high - low) / 2 for low, high in (segment[:, 0] for segment in error_bars)] == pytest.approx(
        [100 * row["share_error"] for row in events])
    assert [tuple(bar.get_facecolor()[:3]) for bar in bars.patches] == [tuple(c) for c in colors for _ in range(5)]
    assert [tick.get_text() for tick in bars.get_yticklabels()] == [
        f"{row['event']}\n({row['predictions']:.1%} of all)" for row in excess_of()["events"][:5]]
    lines = curves.get_lines()
    assert [line.get_ydata().tolist() for line in lines] == [[9, 8.5, 8.2], [9.2, 8.5, 8.2], [8.8, 8.4, 8.1]]
    assert lines[0].get_xdata().tolist() == [1, 2.5, 20] and curves.get_xscale() == "log"
    assert legend_of(fig) == ["first", "second", "exact filter"]


def test_seeds_of_one_setting_are_one_line_in_a_band():
    flags = {"lr": 0.1}
    reports = [made_report(f"r{i}", shift=shift, trained_with={**flags, "seed": i}) for i, shift in
               enumerate((0.0, 0.05, 0.31))] + [made_report("other", shift=0.2)]
    fig = level_figures.draw_summary(reports, "t")
    line, _, other, _, _ = fig.axes[0].get_lines()
    values = np.array([[m["probe_accuracy"] for m in report["levels"]] for report in reports])
    np.testing.assert_allclose(line.get_ydata(), values[:3].mean(axis=0)[:4])
    np.testing.assert_allclose(other.get_ydata(), values[3][:4])
    (band,) = fig.axes[0].collections
    edge = band.get_paths()[0].vertices
    spread = values[:3].std(axis=0, ddof=1)[0]
    at_input = edge[edge[:, 0] == 0][:, 1]
    mean = line.get_ydata()[0]
    assert (at_input.min(), at_input.max()) == pytest.approx((mean - spread, mean + spread))
    assert legend_of(fig)[:2] == ["r0, 3 seeds", "other"]


def test_baselines_are_grey_lines_that_the_legend_names():
    report = made_report("m")
    low = {**report["levels"][0], "level": "low-passed input", "probe_accuracy": 0.43, "silhouette": 0.21}
    del low["depth"]
    untrained = [{"level": f"untrained layer {d}", "depth": d, "probe_accuracy": 0.3 + 0.1 * d, "phase_r2": 0.2,
                  "beliefs": None} for d in (1, 2, 3)]
    quadratic = {"level": "quadratic probe", "probe_accuracy": 0.77, "phase_r2": 0.6, "beliefs": None}
    fig = level_figures.draw_summary([{**report, "baselines": [low, quadratic, *untrained]}], "t")
    grey = [line for line in fig.axes[0].get_lines() if str(line.get_color()) == level_figures.BASELINE_GREY]
    assert [line.get_ydata() for line in grey[:2]] == [[0.43, 0.43], [0.77, 0.77]]
    np.testing.assert_allclose(grey[2].get_ydata(), [0.4, 0.5, 0.6])
    assert list(grey[2].get_xdata()) == [1, 2, 3]
    (line,) = [line for line in fig.axes[4].get_lines() if str(line.get_color()) == level_figures.BASELINE_GREY]
    assert list(line.get_ydata()) == [0.21, 0.21]
    assert legend_of(fig)[2:5] == ["low-passed input", "quadratic probe, one step", "untrained model"]


def test_a_summary_on_a_page_has_two_columns_that_nothing_covers(tmp_path):
    with cli._running(SimpleNamespace(style="paper")):
        fig = level_figures.draw_summary([made_report("first"), made_report("second", shift=0.3)], "against depth")
        figures.save(fig, tmp_path / "a.png")
    assert fig.get_size_inches().tolist() == [7, 9] and len(fig.axes) == 7
    boxes = [ax.get_tightbbox() for ax in fig.axes] + [fig.legends[0].get_window_extent()]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(box.x0 >= 0 and box.x1 <= fig.bbox.x1 and box.y0 >= 0 for box in boxes)


def test_a_summary_draws_what_there_is():
    report = made_report(umap=False, filter_circle_accuracy=None, depths=[0, 2, 4])
    for level in report["levels"]:
        level["dimension"] = level["dimension_whitened"] = None
    report["levels"][1]["phase_r2"] = None
    fig = level_figures.draw_summary([report], "t")
    assert legend_of(fig) == ["m", level_figures.OUTPUT_LABEL]
    assert len(fig.axes[0].get_lines()) == 2 and len(fig.axes[2].get_lines()) == 4 and not fig.axes[6].get_lines()
    assert legend_of(fig.axes[2]) == ["vote over 101 steps", "raw"]
    assert fig.axes[4].get_title() == "silhouette of the circles, in the level"
    assert fig.axes[1].get_lines()[0].get_xdata().tolist() == [0, 2]
    assert np.isnan(fig.axes[1].get_lines()[0].get_ydata()).tolist() == [False, True]
    assert legend_of(level_figures.draw_summary([made_report(depths=[0, 1, 2])], "t")) == ["m", "exact filter: 0.957"]
    report["levels"][0]["silhouette"] = -0.4
    assert level_figures.draw_summary([report], "t").axes[4].get_ylim()[0] < -0.4


@pytest.mark.parametrize("key, value, alike", [
    ("weights_crc32", 8, False), ("data_crc32", 8, False), ("seed", 8, False), ("velocity", True, False),
    ("pca", 3, False), ("seq_len", 64, False), ("umap_points", 50, False), ("umap_neighbors", 8, False),
    ("lb_points", 8, False), ("umap_neighbors", None, True), ("lb_points", None, True), ("test_steps", 8, True)])
def test_an_earlier_report_counts_where_it_was_measured_alike(tmp_path, key, value, alike):
    """Otherwise the numbers of other data, or of another sample, would stand in one table with those of these."""
    settings = {"weights_crc32": 1, "data_crc32": 2, "seed": 3, "velocity": False, "pca": None, "umap_points": 100,
                "umap_neighbors": 15, "test_steps": 0}
    earlier, report = made_report(**settings), made_report(umap=False, depths=[1], **settings)
    earlier[key] = value
    (tmp_path / "a.json").write_text(json.dumps(earlier))
    merged = ev.with_earlier(report, tmp_path / "a.json")
    assert [level["depth"] for level in merged["levels"]] == ([0, 1, 2, 3, 4] if alike else [1])
    assert merged["levels"][-1].get("umap_ari") == (earlier["levels"][-1]["umap_ari"] if alike else None)
    assert merged == report or alike


def test_models_of_different_depth_share_a_relative_depth():
    """So do the layers of the untrained model, which has as many as the first one."""
    layers = made_report("a", n_layers=3)["levels"][1:4]
    untrained = [{**level, "level": f"untrained {level['level']}"} for level in layers]
    fig = level_figures.draw_summary([made_report("b", n_layers=3, baselines=untrained), made_report("a", n_layers=1)],
                                     "t")
    (grey,) = (line for line in fig.axes[0].get_lines() if str(line.get_color()) == level_figures.BASELINE_GREY)
    assert grey.get_xdata() == pytest.approx([0.25, 0.5, 0.75])
    assert grey.get_ydata() == pytest.approx([level["probe_accuracy"] for level in untrained])
    fig = level_figures.draw_summary([made_report("a", n_layers=1), made_report("b", n_layers=3)], "t")
    places = [line.get_xdata().tolist() for line in fig.axes[0].get_lines()[:4]]
    assert places == [[0, 0.5], [1], [0, 0.25, 0.5, 0.75], [1]]
    assert [tick.get_text() for tick in fig.axes[0].get_xticklabels()] == ["input", "output"]
    assert fig.axes[0].get_xlabel() == "relative depth"


def test_many_models_get_one_line_each_and_short_names():
    names = ["a" * 34, "b" * 35, "c", "d"]
    fig = level_figures.draw_summary([made_report(name, shift=0.1 * i) for i, name in enumerate(names)], "t")
    assert [len(ax.get_lines()) for ax in fig.axes[1:]] == [8] * 6
    assert fig.axes[2].get_title() == "ARI of k-means, vote over 101 steps" and fig.axes[2].get_legend() is None
    assert legend_of(fig)[:4] == ["a" * 34, "b" * 33 + "…", "c", "d"]


def test_a_deep_model_has_the_ticks_that_find_room():
    fig = level_figures.draw_summary([made_report(n_layers=30)], "t")
    ticks = fig.axes[0].get_xticks().tolist()
    labels = [tick.get_text() for tick in fig.axes[0].get_xticklabels()]
    assert labels == ["in", *(str(tick) for tick in ticks[1:-1]), "out"] and ticks[0] == 0 and ticks[-1] == 31
    assert len(ticks) <= 13 and np.diff(ticks).min() >= 2 and np.diff(ticks).max() <= 6


def test_a_umap_panel_tells_the_dimension_of_its_level_and_its_own_silhouette():
    level = {"level": "layer 3", "dimension": {10: 4.0, 30: 5.26, 100: 6.0}, "umap_silhouette": 0.318,
             "silhouette": 0.9}
    assert level_figures.level_title(level) == "layer 3\ndim 5.3, silhouette here 0.32"
    assert level_figures.level_title({**level, "dimension": None}) == "layer 3\nsilhouette here 0.32"
    assert level_figures.level_title({**level, "umap_silhouette": None}) == "layer 3\ndim 5.3"
    assert level_figures.level_title({**level, "dimension": {30: None}, "umap_silhouette": None}) == "layer 3"


# ---- names -----------------------------------------------------------------------------------------------------


def test_two_checkpoints_of_one_name_are_refused():
    assert ev.unique_names(["a/m.pt", "n.pt"]) == ["m", "n"]
    with pytest.raises(cli.UserError, match=r"a/m\.pt and b/m\.pt would both write m_"):
        ev.unique_names(["a/m.pt", "b/m.pt"])


def test_a_comparison_of_many_keeps_a_name_of_its_own_that_fits_a_file_system():
    assert ev.comparison_name(["a", "b"]) == "compare_a_b"
    many = ["model_next_gate_lr_factor0_freeze_A_" + str(i) for i in range(30)]
    name = ev.comparison_name(many)
    assert len(name) < 130
    assert name != ev.comparison_name([*many[:-1], "other"])


# ---- whole runs ------------------------------------------------------------------------------------------------


@pytest.fixture
def run(script, shared_data, tiny_checkpoint, tmp_path):
    """Run the script on the small series, with plots in tmp_path / "plots"; returns (result, file names)."""
    def run(*flags, checkpoints=(tiny_checkpoint,), data=shared_data, baselines=False, test=False):
        quick = ([] if baselines else ["--no-baselines"]) + ([] if test else ["--test-steps", 0])
        result = script("evaluate_representations", "--checkpoint", *checkpoints, "--data-dir", data, "--save-dir",
                        tmp_path / "plots", *quick, *flags)
        assert result.code == 0, result.err
        return result, names_in(tmp_path / "plots")

    return run


def test_end_to_end(run, shared_data, tiny_checkpoint, tmp_path):
    result, files = run(*QUICK)
    assert files == {"tiny_summary.png", "tiny_metrics.json"}
    report = json.loads((tmp_path / "plots" / "tiny_metrics.json").read_text())
    levels = report["levels"]
    assert [m["level"] for m in levels] == ["input", "layer 1", "layer 2", "output"]
    assert [m["width"] for m in levels] == [6, 16, 16, 6]
    assert report["filter_circle_accuracy"] > 0.9
    assert report["best_layer"] in ("layer 1", "layer 2")
    for m in levels:
        row = next(line for line in result.out.splitlines() if line.startswith(m["level"]))
        assert f"{m['probe_accuracy']:.3f}" in row and f" {m['dimension']['30']:.2f} " in result.out
        assert 0 < m["probe_accuracy"] <= 1 and m["phase_r2"] <= 1 and -1 <= m["silhouette"] <= 1

    series = dataset.load_series(shared_data)
    rows = np.random.default_rng(42).permutation(series.n_steps)[:400]
    dimension = levina_bickel(series.X[rows], measures.DIMENSION_KS)
    dimension["two_nn"] = skdim.id.TwoNN().fit(series.X[rows]).dimension_
    assert levels[0]["dimension"] == pytest.approx({str(k): value for k, value in dimension.items()})
    C = np.cov(series.X.T.astype(np.float64), bias=True)
    assert levels[0]["effective_rank"] == pytest.approx(np.trace(C)**2 / np.trace(C @ C), rel=1e-6)
    shown = rows[:300]
    assert levels[0]["silhouette"] == pytest.approx(measures.silhouette(series.X[shown], series.states[shown]))

    (error,) = report["errors"]
    model, _ = mamba_model.load_checkpoint(tiny_checkpoint)
    _, starts, _ = dataset.split_windows(series.n_steps, 128, 64, 0.1)
    with torch.no_grad():
        x = torch.from_numpy(np.stack([series.X[start:start + 128] for start in starts]))
        prediction = model(x)["1"]
    assert error["val_mse"] == pytest.approx((prediction[:, :-1] - x[:, 1:]).double().square().mean().item(), rel=1e-5)
    assert error["optimal_mse"] < error["val_mse"]
    assert error["excess_percent"] == pytest.approx(100 * (error["val_mse"] / error["optimal_mse"] - 1))


def test_the_same_flags_give_the_same_numbers(run, tmp_path):
    run(*QUICK)
    first = (tmp_path / "plots" / "tiny_metrics.json").read_bytes()
    run(*QUICK)
    assert (tmp_path / "plots" / "tiny_metrics.json").read_bytes() == first


def test_levels_velocity_and_pca_have_files_of_their_own(run, shared_data, tmp_path):
    _, files = run(*QUICK, "--no-lb", "--layers", "input,2", "--velocity", "--pca", 3)
    assert files == {"tiny_velocity_pca3_summary.png", "tiny_velocity_pca3_metrics.json"}
    report = json.loads((tmp_path / "plots" / "tiny_velocity_pca3_metrics.json").read_text())
    assert [m["level"] for m in report["levels"]] == ["input", "layer 2"]
    assert [m["dimension"] for m in report["levels"]] == [None, None]
    change = np.diff(dataset.load_series(shared_data).X.astype(np.float64), axis=0)
    C = np.cov(change.T, bias=True)
    assert report["levels"][0]["effective_rank"] == pytest.approx(np.trace(C)**2 / np.trace(C @ C), rel=1e-4)
    rows = np.random.default_rng(42).permutation(len(change))[:2000]
    states = dataset.load_series(shared_data).states[1:]  # a change belongs to the step that it leads to
    run(*QUICK, "--no-lb", "--layers", "input", "--velocity", "--umap-points", 2000)
    report = json.loads((tmp_path / "plots" / "tiny_velocity_metrics.json").read_text())
    assert report["levels"][0]["silhouette"] == pytest.approx(measures.silhouette(change[rows], states[rows]), rel=1e-5)
    _, files = run(*QUICK, "--no-lb", "--layers", "output", "--pca", 20)
    assert {"tiny_pca20_summary.png", "tiny_pca20_metrics.json"} <= files and "tiny_metrics.json" not in files


def test_pca_acts_on_clusters_and_dimension_but_not_on_the_probes(run, tmp_path):
    run(*QUICK, "--layers", "input")
    run(*QUICK, "--layers", "input", "--pca", 2)
    whole, reduced = (json.loads((tmp_path / "plots" / f"tiny{kind}_metrics.json").read_text())["levels"][0]
                      for kind in ("", "_pca2"))
    for name in ("probe_accuracy", "phase_r2", "effective_rank"):
        assert whole[name] == reduced[name]
    for name in ("kmeans_ari", "silhouette", "dimension"):
        assert whole[name] != reduced[name]
    assert reduced["dimension"]["30"] < 2.5 < whole["dimension"]["30"]


def test_umap_end_to_end(run, tmp_path):
    _, files = run("--umap-points", 120, "--umap-neighbors", 10, "--no-lb", "--layers", "input,1", "--device", "cpu")
    assert files == {"tiny_umap_layers_input-1.png", "tiny_summary.png", "tiny_metrics.json"}
    assert (tmp_path / "plots" / "tiny_umap_layers_input-1.png").read_bytes().startswith(b"\x89PNG")
    for m in json.loads((tmp_path / "plots" / "tiny_metrics.json").read_text())["levels"]:
        assert -1 <= m["umap_silhouette"] <= 1 and m["umap_ari"] <= 1 and 0 <= m["umap_nmi_smooth"] <= 1


def test_umaps_show_the_sampled_steps_in_a_grid_or_one_by_one(run, shared_data, monkeypatch):
    drawn, draw = [], figures.draw_umaps
    monkeypatch.setattr(measures, "umap_embedding", lambda points, graph, seed: points[:, :2])
    monkeypatch.setattr(figures, "draw_umaps", lambda *given: drawn.append(given) or draw(*given))
    flags = ["--umap-points", 1500, "--no-lb", "--device", "cpu"]
    _, files = run(*flags)
    assert "tiny_umap.png" in files and len(drawn) == 1
    embeddings, titles, states, n_circles, _ = drawn[0]
    assert len(embeddings) == len(titles) == 4 and n_circles == 4
    series = dataset.load_series(shared_data)
    rows = np.random.default_rng(42).permutation(series.n_steps)[:1500]
    np.testing.assert_array_equal(states, series.states[rows])
    np.testing.assert_array_equal(embeddings[0], series.X[rows, :2])

    _, files = run(*flags, "--per-layer", "--velocity")
    assert {f"tiny_velocity_umap_{level}.png" for level in ("input", "layer1", "layer2", "output")} <= files
    assert "tiny_velocity_umap.png" not in files
    rows = np.random.default_rng(42).permutation(series.n_steps - 1)[:1500]
    np.testing.assert_array_equal(drawn[1][2], series.states[rows + 1])
    np.testing.assert_allclose(drawn[1][0][0], (series.X[rows + 1] - series.X[rows])[:, :2], atol=1e-5)


def test_several_checkpoints_are_compared_in_one_table_and_one_figure(run, tiny_checkpoint, tmp_path):
    deeper = save_model(tmp_path / "deep.pt", tiny_model(1, n_layers=3, max_horizon=4))
    result, files = run(*QUICK, checkpoints=(tiny_checkpoint, deeper), test=True)
    assert files == {"compare_tiny_deep_summary.csv", "compare_tiny_deep_summary.png", "compare_tiny_deep_test.csv",
                     "tiny_summary.png",
                     "tiny_metrics.json", "deep_summary.png", "deep_metrics.json",
                     *(f"{name}_{kind}.png" for name in ("tiny", "deep", "compare_tiny_deep")
                       for kind in ("beliefs", "excess"))}
    with open(tmp_path / "plots" / "compare_tiny_deep_summary.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["checkpoint"] for row in table] == ["tiny", "deep", "input"]
    for row in table[:2]:
        report = json.loads((tmp_path / "plots" / f"{row['checkpoint']}_metrics.json").read_text())
        best = next(m for m in report["levels"] if m["level"] == report["best_layer"])
        assert row["best_layer"] == report["best_layer"]
        assert float(row["val_mse"]) == report["errors"][0]["val_mse"]
        assert float(row["probe_accuracy"]) == best["probe_accuracy"]
        assert float(row["dimension_k30"]) == best["dimension"]["30"]
        assert f"{best['kmeans_ari_smooth']:.3f}" in result.out
    assert [row["horizon"] for row in report["errors"]] == [1, 2, 4]
    assert "but for the seed" not in result.out


def test_runs_that_differ_in_the_seed_alone_are_averaged(run, tmp_path):
    paths = [save_model(tmp_path / f"{name}.pt", tiny_model(i), seed=seed, checkpoint=f"{name}.pt", lr=lr)
             for i, (name, seed, lr) in enumerate([("a", 1, 0.1), ("b", 2, 0.1), ("other", 2, 0.2), ("c", 3, 0.1)])]
    result, _ = run(*QUICK, "--layers", "1,2", checkpoints=paths)
    reports = [json.loads((tmp_path / "plots" / f"{name}_metrics.json").read_text()) for name in "abc"]
    errors = [report["errors"][0]["val_mse"] for report in reports]
    row = next(line for line in result.out.splitlines() if line.startswith("a, 3 seeds"))
    assert f"{np.mean(errors):.4f} ± {np.std(errors, ddof=1):.4f}" in row
    peaks = [max(m["silhouette"] for m in report["levels"]) for report in reports]
    assert f"{np.mean(peaks):.3f} ± {np.std(peaks, ddof=1):.3f}" in row
    assert "other, " not in result.out


def test_data_that_the_filter_does_not_know_have_measures_but_no_floor(run, rewrite_data, tmp_path):
    result, _ = run(*QUICK, "--no-lb", "--layers", "1", data=rewrite_data(config={"noise_std": 0.0}))
    assert "no optimal floor and ceiling" in result.out
    (path,) = (tmp_path / "plots").glob("tiny_*metrics.json")
    report = json.loads(path.read_text())
    assert report["filter_circle_accuracy"] is None and report["errors"][0]["optimal_mse"] is None
    assert report["levels"][0]["probe_accuracy"] > 0


def test_windows_longer_than_the_validation_part_have_measures_but_no_error(run, tmp_path):
    long = save_model(tmp_path / "long.pt", tiny_model(), seq_len=2000)
    result, _ = run(*QUICK, "--no-lb", "--layers", "1", checkpoints=[long])
    assert "no validation MSE: the validation part has 300 steps" in result.out
    assert json.loads((tmp_path / "plots" / "long_metrics.json").read_text())["errors"] == []


# ---- what the script passes on and writes ----------------------------------------------------------------------


def report_of(folder, name="tiny"):
    return json.loads((folder / "plots" / f"{name}_metrics.json").read_text())


@pytest.fixture
def saved(monkeypatch):
    """The figures that are saved, {file name: Figure}; no file is written."""
    figs = {}
    monkeypatch.setattr(figures, "save", lambda fig, path: figs.update({path.name: fig}))
    monkeypatch.setattr(figures, "save_all", lambda made: figs.update({path.name: fig for path, fig in made.items()}))
    return figs


@pytest.fixture
def quick_measures(monkeypatch):
    """Measures that take long in place of which a test wants only what they are called with: a dict of calls."""
    calls = {"seeds": [], "neighbours": [], "points": []}

    def clusters(values, rows, states, n_circles, seed):
        calls["seeds"].append(seed)
        return dict.fromkeys(("kmeans_ari", "kmeans_nmi", "kmeans_ari_smooth", "kmeans_nmi_smooth"), 0.1)

    def scores(embedding, nearest, shown, states, n_circles, seed):
        calls["seeds"].append(seed)
        return dict.fromkeys(("umap_silhouette", "umap_ari", "umap_nmi", "umap_ari_smooth", "umap_nmi_smooth"), 0.2)

    def umap(points, graph, seed):
        calls["seeds"].append(seed)
        calls["neighbours"].append(graph[0].shape)
        calls["points"].append(points)
        return points[:, :2]

    monkeypatch.setattr(measures, "circle_probe", lambda train, *_: 0.5 + train.shape[1] / 100)
    monkeypatch.setattr(measures, "cluster_scores", clusters)
    monkeypatch.setattr(measures, "embedding_scores", scores)
    monkeypatch.setattr(measures, "umap_embedding", umap)
    return calls


def test_every_number_about_the_evaluation_itself(run, shared_data, tiny_checkpoint, tmp_path, quick_measures,
                                                  monkeypatch):
    pools = []
    monkeypatch.setattr(ev, "umap_pool", lambda *given: pools.append(given))
    run("--layers", "input,2", "--velocity", "--pca", 4, "--seed", 5, "--umap-points", 10**6, "--lb-points", 250,
        "--umap-neighbors", 9, "--device", "cpu", "--scan", "reference")
    report = report_of(tmp_path, "tiny_velocity_pca4")
    series = dataset.load_series(shared_data)
    process = optimal_filter.process_from_series(series)
    posterior = optimal_filter.predict(process, series.X, horizons=())["circle_posterior"]
    tail = series.n_steps * 7 // 10
    wanted = {"name": "tiny", "checkpoint": str(tiny_checkpoint), "data_dir": str(shared_data), "seed": 5,
              "velocity": True, "pca": 4, "umap_points": 2999, "lb_points": 250, "n_layers": 2, "seq_len": 128,
              "filter_circle_accuracy": float((posterior.argmax(axis=1)[tail:] == series.states[tail:]).mean()),
              "trained_with": {**SAVED, "dropout": 0.1, "data_dir": str(shared_data)}, "best_layer": "layer 2",
              "umap_neighbors": 9, "data_crc32": dataset.crc32(series.X), "test_steps": 0}
    assert {key: report[key] for key in wanted} == wanted
    assert set(report) == {*wanted, "errors", "test", "levels", "weights_crc32", "made_by"}
    weights = mamba_model.load_checkpoint(tiny_checkpoint)[0].state_dict().values()
    assert report["weights_crc32"] == zlib.crc32(b"".join(tensor.numpy().tobytes() for tensor in weights))
    starts = np.arange(2700, 3000 - 128 + 1, 64)
    floor = optimal_filter.window_floors(process, series, starts, 128, [1])
    assert report["errors"][0]["optimal_mse"] == pytest.approx(floor["mse"][1], rel=1e-9)
    assert set(quick_measures["seeds"]) == {5} and len(quick_measures["seeds"]) == 2 * 3
    assert quick_measures["neighbours"] == [(2999, 8)] * 2
    assert pools == [(2, 2999)]


def test_the_seed_draws_the_sample_and_starts_all_that_is_random(run, shared_data, tmp_path, quick_measures, saved,
                                                                 monkeypatch):
    trained = []
    monkeypatch.setattr(measures, "PROBE_STEPS", 100)
    monkeypatch.setattr(measures, "phase_probe", lambda train, thetas, *_: trained.append(thetas) or 0.5)
    flags = ["--layers", "input", "--umap-points", 60, "--no-lb", "--device", "cpu", "--seed", 11]
    run(*flags)
    series = dataset.load_series(shared_data)
    rows = np.random.default_rng(11).permutation(3000)[:60]
    np.testing.assert_array_equal(quick_measures["points"][0], series.X[rows])
    assert set(quick_measures["seeds"]) == {11}
    shown = saved["tiny_umap_layers_input.png"].axes[0].collections[0]
    np.testing.assert_allclose(shown.get_facecolors()[:, :3], figures.circle_colors(4)[series.states[rows]])
    fitted = sorted(np.random.default_rng(11).permutation(2100)[:100])
    np.testing.assert_array_equal(trained[0], series.thetas[fitted])


def test_device_and_scan_are_those_asked_for(run, monkeypatch, quick_measures, shared_data, tmp_path):
    asked, picked = [], []
    open_model, pick = mamba_model.open_model, cli.pick_device
    monkeypatch.setattr(mamba_model, "open_model", lambda *given: asked.append(given) or open_model(*given))
    monkeypatch.setattr(cli, "pick_device", lambda name: picked.append(name) or pick("cpu"))
    run("--no-umap", "--lb-points", 10**6, "--layers", "input", "--device", "a name", "--scan", "reference")
    assert picked == ["a name"]
    (_, data_dir, device, scan, _), = asked
    assert (data_dir, device, scan) == (shared_data, torch.device("cpu"), "reference")
    report = report_of(tmp_path)
    assert report["lb_points"] == 3000 and report["best_layer"] is None  # the input is no layer


def test_measures_in_the_umap_are_those_of_each_levels_own_umap(run, shared_data, tmp_path, monkeypatch, saved):
    monkeypatch.setattr(measures, "circle_probe", lambda *_: 0.5)
    monkeypatch.setattr(measures, "umap_embedding", lambda points, graph, seed: 3 * points[:, 1:3])
    run("--umap-points", 1500, "--no-lb", "--velocity", "--layers", "input,output", "--seed", 2, "--device", "cpu")
    series = dataset.load_series(shared_data)
    change, states = np.diff(series.X, axis=0), series.states[1:]
    rows = np.random.default_rng(2).permutation(2999)[:1500]
    level = report_of(tmp_path, "tiny_velocity")["levels"][0]
    embedding = 3 * change[rows][:, 1:3]
    labels = KMeans(4, n_init=4, random_state=2).fit(embedding).labels_[cdist(change, change[rows]).argmin(axis=1)]
    for key, value in agreement_scores("umap", labels, states).items():
        assert level[key] == pytest.approx(value, abs=2e-3), key
    assert level["umap_silhouette"] == pytest.approx(silhouette_score(embedding, states[rows]), rel=1e-4)
    fig = saved["tiny_velocity_umap_layers_input-output.png"]
    assert fig.get_suptitle() == "tiny: UMAP of 1,500 steps, change since the step before"
    np.testing.assert_allclose(fig.axes[0].collections[0].get_offsets(), embedding, atol=1e-5)
    assert [ax.get_title().split("\n")[0] for ax in fig.axes] == ["input", "output"]
    assert f"silhouette here {level['umap_silhouette']:.2f}" in fig.axes[0].get_title()


def test_figures_per_level_show_that_level(run, shared_data, quick_measures, saved):
    run("--umap-points", 80, "--no-lb", "--per-layer", "--pca", 3, "--layers", "1,output", "--device", "cpu")
    shown = dataset.load_series(shared_data).states[np.random.default_rng(42).permutation(3000)[:80]]
    names = {"tiny_pca3_umap_layer1.png": "layer 1", "tiny_pca3_umap_output.png": "output"}
    assert set(saved) == {*names, "tiny_pca3_summary.png"}
    for (name, level), points in zip(names.items(), quick_measures["points"], strict=True):
        (ax,) = saved[name].axes
        assert ax.get_title() == f"{level}\nsilhouette here 0.20"
        assert saved[name].get_suptitle() == "tiny: UMAP of 80 steps, up to 3 principal components"
        np.testing.assert_array_equal(ax.collections[0].get_offsets(), points[:, :2])
        np.testing.assert_allclose(ax.collections[0].get_facecolors()[:, :3], figures.circle_colors(4)[shown])
    assert saved["tiny_pca3_summary.png"].get_suptitle() == (
        "tiny: measures against depth, up to 3 principal components")


def test_what_is_printed_and_drawn_is_what_the_reports_say(run, shared_data, tiny_checkpoint, tmp_path, quick_measures,
                                                           saved):
    other = save_model(tmp_path / "deep.pt", tiny_model(1, n_layers=3, max_horizon=2), seq_len=64)
    result, _ = run("--umap-points", 120, "--lb-points", 130, "--device", "cpu", "--pca", 3, "--velocity",
                    checkpoints=(tiny_checkpoint, other), baselines=True, test=True)
    reports = [report_of(tmp_path, f"{name}_velocity_pca3") for name in ("tiny", "deep")]
    for report in reports:
        for level in [level for level in (*report["levels"], *report["baselines"]) if "dimension" in level]:
            for key in ("dimension", "dimension_whitened"):
                level[key] = {int(k) if k.isdecimal() else k: value for k, value in level[key].items()}
        for text in (level_tables.level_table(report), level_tables.umap_table(report),
                     level_tables.dimension_table(report), level_tables.belief_table(report),
                     level_tables.event_table(report), level_tables.linear_line(report)):
            assert f"{text}\n" in result.out
        rows = [[str(row["horizon"]), f"{row['val_mse']:.4f}", f"{row['optimal_mse']:.4f}",
                 f"{row['excess_percent']:+.2f} %"] for row in report["errors"]]
        for row in rows:
            assert re.search(r"^ *" + r" +".join(map(re.escape, row)) + "$", result.out, re.MULTILINE)
        assert (f"\n{report['name']}: {report['n_layers']} layers; exact filter's circle accuracy "
                f"{report['filter_circle_accuracy']:.3f}\n") in result.out
        summary = saved[f"{report['name']}_velocity_pca3_summary.png"]
        *layers, output = [level["effective_rank"] for level in report["levels"]]
        assert [line.get_ydata().tolist() for line in summary.axes[5].get_lines()[:2]] == [layers, [output]]
        assert summary.legends[0].get_texts()[0].get_text() == report["name"]
    assert reports[1]["seq_len"] == 64 and [row["horizon"] for row in reports[1]["errors"]] == [1, 2]
    assert reports[0]["errors"][0]["optimal_mse"] != reports[1]["errors"][0]["optimal_mse"]  # other windows
    table = [*(level_tables.comparison_row(report) for report in reports), *level_tables.baseline_rows(reports[0])]
    assert level_tables.comparison_table(table) in result.out
    folder = tmp_path / "plots"
    assert (folder / "compare_tiny_deep_velocity_pca3_summary.csv").read_text() == level_tables.comparison_csv(table)
    # The errors on the test series: of each model in its own windows, and beside each other in a table and a file.
    series = dataset.load_series(shared_data)
    for report, path in zip(reports, (tiny_checkpoint, tmp_path / "deep.pt"), strict=True):
        part = unseen.unseen_part(series, optimal_filter.process_or_none(series), report["seq_len"])
        test = unseen.as_report(mamba_model.load_checkpoint(path)[0], part, learned.learner_of(series, 2700))
        assert report["test"] == test
        assert f"{part.describe()}\n{unseen.unseen_table(test['rows'])}\n" in result.out
    tested = unseen.compared({report["name"]: [report["test"]] for report in reports})
    assert f"\n{unseen.compared_table(tested)}\n" in result.out
    assert (folder / "compare_tiny_deep_velocity_pca3_test.csv").read_text() == level_tables.comparison_csv(tested)
    compared = saved["compare_tiny_deep_velocity_pca3_summary.png"]
    assert compared.get_suptitle() == (
        "measures against depth, change since the step before, up to 3 principal components")
    assert [len(line.get_ydata()) for line in compared.axes[5].get_lines()[:4]] == [3, 1, 4, 1]  # levels and output


def test_the_ceiling_is_the_filters_accuracy_on_the_steps_that_score_the_probes(monkeypatch):
    posterior = np.full((10, 3), 0.1)
    posterior[np.arange(10), [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]] = 0.8
    series = SimpleNamespace(n_steps=10, X="X", states=np.array([1, 2, 0, 0, 1, 2, 0, 1, 1, 0]))  # wrong: 0, 1, 2, 8
    asked = []
    monkeypatch.setattr(optimal_filter, "process_or_none", lambda series, without: "a process")
    monkeypatch.setattr(optimal_filter, "predict", lambda *given, **more: asked.append(given) or {
        "circle_posterior": posterior})
    assert observer.Optimum(series).circle_accuracy == pytest.approx(2 / 3)
    assert asked == [("a process", "X")]


@pytest.mark.parametrize("test_steps, n_steps", [(None, observer.BELIEF_STEPS), (300, 300), (0, None),
                                                 (2 * observer.BELIEF_STEPS, observer.BELIEF_STEPS)])
def test_beliefs_are_scored_on_no_more_steps_than_the_flag_says(monkeypatch, test_steps, n_steps):
    """--test-steps makes a look at the beliefs quick: the default is 100,000 steps through the exact filter."""
    asked = []
    monkeypatch.setattr(optimal_filter, "process_or_none", lambda series, without: None)
    monkeypatch.setattr(unseen, "unseen_part", lambda series, process, seq_len, n: asked.append((seq_len, n)))
    optimum = observer.Optimum(SimpleNamespace(), test_steps)
    optimum.process = "a process"
    assert optimum.tested(64) is None and asked == ([] if n_steps is None else [(64, n_steps)])


def test_windows_shared_by_models_are_filtered_once(monkeypatch):
    calls = []
    monkeypatch.setattr(optimal_filter, "process_or_none", lambda series, without: None)
    optimum = observer.Optimum(SimpleNamespace())
    assert optimum.circle_accuracy is None and optimum.window_floors(np.arange(3), 8, [1]) == {}
    optimum.process = "a process"
    monkeypatch.setattr(optimal_filter, "window_floors", lambda *given: calls.append(given) or {1: len(calls)})
    asked = [(np.arange(3), 8, [1]), (np.arange(3), 8, [1]), (np.arange(1, 4), 8, [1]), (np.arange(3), 9, [1]),
             (np.arange(3), 8, [1, 2])]
    assert [optimum.window_floors(*given)[1] for given in asked] == [1, 1, 2, 3, 4]


def test_without_flags_the_readmes_defaults_hold():
    args = vars(ev.parse_args([]))
    assert args == {"layers": None, "velocity": False, "pca": None, "test_steps": None, "no_umap": False,
                    "umap_points": 5000, "umap_neighbors": 30, "per_layer": False, "no_lb": False, "lb_points": 10_000,
                    "seed": 42, "device": "auto", "scan": "auto", "checkpoint": [Path("model_next.pt")],
                    "no_baselines": False, "hold": None,
                    "data_dir": None, "save_dir": Path("plots"), "format": "png", "style": None, "settings": ""}


# ---- refusals --------------------------------------------------------------------------------------------------

MOST_K = max(ev.DIMENSION_KS)


@pytest.mark.parametrize(("flags", "is_good"), [
    (["--umap-points", "4", "--umap-neighbors", "2"], True), (["--umap-points", "3", "--umap-neighbors", "2"], False),
    (["--umap-points", "31", "--umap-neighbors", "30"], True),
    (["--umap-points", "30", "--umap-neighbors", "30"], False),
    (["--umap-points", "1", "--no-umap"], True), (["--umap-points", "30", "--no-umap"], True)])
def test_the_least_points_of_a_umap(flags, is_good, capsys):
    argv = ["--checkpoint", "m.pt", *flags]
    if is_good:
        assert ev.parse_args(argv).umap_points == int(flags[1])
    else:
        with pytest.raises(SystemExit):
            ev.parse_args(argv)
        assert f"--umap-points {flags[1]}" in capsys.readouterr().err


@pytest.mark.parametrize(("n_rows", "flags", "message"), [
    (31, ["--no-lb"], None), (30, ["--no-lb"], "30 steps to draw from, too few for --umap-neighbors 30"),
    (MOST_K + 1, ["--no-umap"], None), (MOST_K, ["--no-umap"], f"more than {MOST_K} points, and there are {MOST_K};"),
    (3000, ["--no-umap", "--lb-points", str(MOST_K + 1), "--umap-points", "3000"], None),
    (3000, ["--no-umap", "--lb-points", str(MOST_K)], f"there are {MOST_K};"),
    (2, ["--no-umap", "--no-lb"], None)])
def test_the_least_rows_of_a_umap_and_a_dimension(n_rows, flags, message):
    args = ev.parse_args(["--checkpoint", "m.pt", *flags])
    if message is None:
        assert len(ev.sampled_rows(n_rows, args)) == n_rows
    else:
        with pytest.raises(cli.UserError, match=message):
            ev.sampled_rows(n_rows, args)


@pytest.mark.parametrize(("flags", "words"), [
    (["--layers", "3"], "layers 1…2"), (["--layers", "0"], "counted from 1"), (["--layers", "in"], "counted from 1"),
    (["--layers", ""], "counted from 1"), (["--umap-neighbors", "1"], "2 or more"),
    (["--umap-points", "30"], "must be more than --umap-neighbors"), (["--umap-points", "0"], "above 0"),
    (["--lb-points", "100"], "use more --lb-points"), (["--pca", "0"], "above 0"), (["--pca", "-3"], "above 0"),
    (["--umap-neighbors", "4000", "--umap-points", "5000"], "too few for --umap-neighbors"),
    (["--data-dir", "nowhere"], "not found"), (["--device", "tpu"], "no device"), (["--checkpoint"], "expected"),
    (["--checkpoint", "none.pt"], "not found"), (["--checkpoint", __file__], "no checkpoint or is damaged"),
])
def test_bad_input_is_refused_and_leaves_files_alone(refused, shared_data, tiny_checkpoint, tmp_path, flags, words):
    plots = tmp_path / "plots"
    plots.mkdir()
    (plots / "tiny_metrics.json").write_text("precious")
    assert words in refused("evaluate_representations", "--checkpoint", tiny_checkpoint, "--data-dir", shared_data,
                            "--save-dir", plots, "--device", "cpu", *flags)
    assert names_in(plots) == {"tiny_metrics.json"} and (plots / "tiny_metrics.json").read_text() == "precious"


def overflowing(folder):
    model = tiny_model()
    model.input_proj.weight.data.fill_(1e38)
    return save_model(folder / "bad.pt", model)


def infinite(folder):
    """A model that predicts infinity, and NaN nowhere."""
    model = tiny_model()
    hidden, _, last = model.output_heads["1"]
    hidden.bias.data[0], last.weight.data[:, 0] = 100, 3e38
    return save_model(folder / "bad.pt", model)


@pytest.mark.parametrize(("make", "words"), [
    (overflowing, "layer 1 holds NaN"), (infinite, "output holds NaN or infinity"),
    (lambda folder: save_model(folder / "bad.pt", tiny_model(feature_dim=5)), "predicts 5 features"),
    (lambda folder: save_model(folder / "bad.pt", tiny_model(), seq_len=1), "make no windows"),
    (lambda folder: save_model(folder / "bad.pt", tiny_model(), stride="64"), "make no windows"),
    (lambda folder: save_model(folder / "bad.pt", tiny_model(), val_fraction=1.0), "make no windows"),
])
def test_a_checkpoint_that_does_not_serve_is_refused(refused, shared_data, tmp_path, make, words):
    assert words in refused("evaluate_representations", "--checkpoint", make(tmp_path), "--data-dir", shared_data,
                            "--save-dir", tmp_path / "plots", "--layers", "1,output", "--test-steps", 0, *QUICK)
    assert not list(tmp_path.glob("plots/*"))


def test_the_same_name_twice_and_a_folder_that_is_a_file_are_refused(refused, shared_data, tiny_checkpoint, tmp_path):
    flags = ["--data-dir", shared_data, *QUICK]
    assert "both write" in refused("evaluate_representations", "--checkpoint", tiny_checkpoint, tiny_checkpoint, *flags)
    (tmp_path / "file").write_text("precious")
    assert "can't write to folder" in refused("evaluate_representations", "--checkpoint", tiny_checkpoint, "--save-dir",
                                              tmp_path / "file", *flags)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_umap_process_that_dies_ends_with_one_line(refused, shared_data, tiny_checkpoint, tmp_path, monkeypatch):
    def broken(*_):
        future = Future()
        future.set_exception(BrokenProcessPool())
        return future

    monkeypatch.setattr(ev, "submit", broken)
    assert "fewer --umap-points" in refused("evaluate_representations", "--checkpoint", tiny_checkpoint, "--data-dir",
                                            shared_data, "--save-dir", tmp_path / "plots", "--no-lb", "--layers", "1")
    assert "tiny_umap.png" not in names_in(tmp_path / "plots")
