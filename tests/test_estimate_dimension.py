"""The script: every number that it prints, writes and draws, against scikit-dimension, and what it refuses.

The estimator itself is tested in test_measures.py.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import skdim
from conftest import only
from sklearn.decomposition import PCA

import cli
import dataset
import estimate_dimension as ed
import figures
import measures
from measures import levina_bickel


def dimension(points, k):
    return skdim.id.MLE().fit(points, n_neighbors=k).dimension_


def entry(name, values):
    """An entry of the report for k = 5, 10, 20."""
    return {"name": name, "points": 50, "distinct": 50, "dimension": dict(zip((5, 10, 20), values, strict=True))}


@pytest.fixture
def saved(monkeypatch):
    """The figures that are saved, {path: Figure}; no file is written."""
    figs = {}
    monkeypatch.setattr(figures, "save", lambda fig, path: figs.update({path: fig}))
    return figs


def test_every_number_that_is_printed_written_and_drawn(script, rewrite_data, tmp_path, saved):
    folder = rewrite_data()
    series = dataset.load_series(folder)
    X, states = series.X.copy(), series.states.copy()
    X[10:400] = X[10]  # 390 steps that are one point
    states[states == 1] = 0
    states[400:420] = 1
    rewrite_data(X=X, states=states)
    result = script("estimate_dimension", "--data-dir", folder, "--k", 20, 6, 20, "--points", 2500, "--seed", 9,
                    "--save-dir", tmp_path / "plots")
    steps = np.random.default_rng(9).permutation(3000)[:2500]
    points, circles = X[steps], states[steps]
    report = json.loads(only(tmp_path / "plots", "dimension*.json").read_text())
    assert {key: report[key] for key in ("points", "seed", "k")} == {"points": 2500, "seed": 9, "k": [6, 20]}
    assert set(report) == {"points", "seed", "k", "entries", "made_by"}
    lines = result.out.splitlines()
    n_distinct = len({tuple(x) for x in points.tolist()})
    assert lines[0] == f"{2500 - n_distinct} of 2,500 points repeat another and count once"
    assert re.split("  +", lines[1]) == ["circle", "points", "k = 6", "k = 20", "TwoNN"]
    ((path, fig),) = saved.items()
    assert path == tmp_path / "plots" / f"dimension_points2500_k6-20_seed9_{cli.data_name(folder)}.png"
    assert fig.axes[0].get_title() == "Intrinsic dimension of 2,500 points"
    for i, name in enumerate(["all", 0, 1, 2, 3]):
        own = points if name == "all" else points[circles == name]
        unique = np.array(sorted({tuple(x) for x in own.tolist()}))
        wanted = {str(k): dimension(unique, k) if len(unique) > k else None for k in (6, 20)}
        found = report["entries"][i]
        assert (found["name"], found["points"], found["distinct"]) == (name, len(own), len(unique))
        assert list(found["dimension"]) == ["6", "20"]
        assert found["dimension"] == {k: value and pytest.approx(value, rel=1e-4) for k, value in wanted.items()}
        assert lines[3 + i + (i > 0)].split() == [str(name), f"{len(own):,}", *(
            "–" if value is None else f"{found['dimension'][k]:.2f}" for k, value in wanted.items()),
            f"{found['two_nn']:.2f}"]
        assert found["two_nn"] == pytest.approx(skdim.id.TwoNN().fit(unique).dimension_, rel=1e-4)
        line = fig.axes[0].get_lines()[i]
        assert line.get_xdata().tolist() == [6, 20]
        np.testing.assert_allclose(line.get_ydata(), [np.nan if value is None else value for value in wanted.values()],
                                   rtol=1e-4)
    assert report["entries"][2]["dimension"]["20"] is None  # the circle of twenty steps at most
    white = PCA(whiten=True).fit(points).transform(np.unique(points, axis=0))
    wanted = [*(dimension(white, k) for k in (6, 20)), skdim.id.TwoNN().fit(white).dimension_]
    assert list(report["entries"][0]["whitened"].values()) == pytest.approx([wanted[2], *wanted[:2]], rel=1e-3)
    assert lines[4].split()[:3] == ["all,", "whitened", "2,500"]
    assert [float(cell) for cell in lines[4].split()[3:]] == pytest.approx(wanted, abs=0.02)
    assert lines[9] == f"wrote {only(tmp_path / 'plots', '*.json')}"


@pytest.mark.parametrize(("ambient", "shown"), [(20, False), (9, True), (3, True), (11, False)])
def test_the_figure_has_one_line_per_circle_and_tells_the_ambient_dimension_where_it_fits(ambient, shown):
    entries = [entry("all", (4, 4.5, 5)), entry(0, (3, 3.5, None)), entry(1, (5, 5.25, 5.5))]
    fig = ed.draw_dimension(entries, [5, 10, 20], ambient, "a title")
    (ax,) = fig.axes
    lines = ax.get_lines()
    for line, one, color in zip(lines, entries, ["black", *figures.circle_colors(2)], strict=False):
        np.testing.assert_array_equal(line.get_xdata(), [5, 10, 20])
        np.testing.assert_array_equal(line.get_ydata(), [np.nan if v is None else v for v in one["dimension"].values()])
        assert tuple(line.get_color()) == tuple(color)
    assert len(lines) == 3 + shown
    if shown:
        assert set(lines[3].get_ydata()) == {ambient}
        assert [text.get_text() for text in ax.texts] == [f"ambient dimension {ambient}"]
        assert ax.texts[0].xy[1] == ambient
    else:
        assert not ax.texts
    assert ax.get_ylim() == (0, pytest.approx(1.1 * (max(ambient, 5.5) if shown else 5.5)))
    assert ax.get_xscale() == "log" and ax.get_xticks().tolist() == [5, 10, 20]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["5", "10", "20"]
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == (
        "a title", "nearest neighbours k", "Levina–Bickel dimension")
    (legend,) = fig.legends
    assert [text.get_text() for text in legend.get_texts()] == ["all", "0", "1"]
    assert legend.get_title().get_text() == "circle"


def test_the_script_draws_the_ambient_dimension_of_the_data(script, data_dir, tmp_path, saved):
    script("estimate_dimension", "--data-dir", data_dir, "--k", 10, "--points", 500, "--save-dir", tmp_path)
    assert [text.get_text() for fig in saved.values() for text in fig.axes[0].texts] == ["ambient dimension 6"]


def test_notebooks_still_import_the_estimator_and_the_umap_from_here():
    assert ed.levina_bickel is measures.levina_bickel and ed.umap_embedding is measures.umap_embedding


def test_without_flags_the_readmes_defaults_hold():
    assert vars(ed.parse_args([])) == {"points": 10_000, "k": [5, 10, 30, 100], "seed": 42,
                                       "data_dir": Path("data"), "save_dir": Path("plots"),
                                       "format": "png", "style": None, "name": "dimension"}


def test_script_reports_all_points_and_each_circle(script, data_dir, tmp_path):
    result = script("estimate_dimension", "--data-dir", data_dir, "--k", 30, 10, "--points", 2000, "--save-dir",
                    tmp_path / "plots")
    assert result.code == 0 and result.err == ""
    assert {path.suffix for path in (tmp_path / "plots").iterdir()} == {".json", ".png"}
    report = json.loads(only(tmp_path / "plots", "dimension*.json").read_text())
    assert report["k"] == [10, 30] and report["points"] == 2000
    entries = report["entries"]
    assert [entry["name"] for entry in entries] == ["all", 0, 1, 2, 3]
    assert entries[0]["points"] == 2000 == sum(entry["points"] for entry in entries[1:])
    for entry in entries:
        row = next(line.split() for line in result.out.splitlines() if line.startswith(f"{entry['name']} "))
        assert row[2:-1] == [f"{entry['dimension'][k]:.2f}" for k in ("10", "30")]


def test_script_uses_every_point_when_asked_for_more(script, data_dir, tmp_path):
    assert script("estimate_dimension", "--data-dir", data_dir, "--k", 10, "--points", 10**6, "--save-dir",
                  tmp_path).code == 0
    entries = json.loads(only(tmp_path, "dimension*.json").read_text())["entries"]
    series = dataset.load_series(data_dir)
    own = levina_bickel(series.X[series.states == 2], [10])[10]
    assert entries[0]["points"] == series.n_steps
    assert entries[0]["dimension"]["10"] == pytest.approx(levina_bickel(series.X, [10])[10], rel=1e-9)
    assert entries[3]["dimension"]["10"] == pytest.approx(own, rel=1e-9)


def test_script_marks_circles_with_too_few_points(script, rewrite_data, tmp_path):
    folder = rewrite_data()
    states = dataset.load_series(folder).states
    states[states == 3] = 2
    states[:5] = 3
    rewrite_data(states=states)
    result = script("estimate_dimension", "--data-dir", folder, "--k", 3, 5, "--points", 10**6, "--save-dir", tmp_path)
    assert result.code == 0
    entry = json.loads(only(tmp_path, "dimension*.json").read_text())["entries"][4]
    assert entry["points"] == 5 and entry["dimension"]["5"] is None and entry["dimension"]["3"] > 0
    assert result.out.splitlines()[7].split()[-2] == "–"


def test_script_says_that_points_repeat(script, rewrite_data, tmp_path):
    folder = rewrite_data()
    X = dataset.load_series(folder).X
    X[:100] = X[0]
    rewrite_data(X=X)
    result = script("estimate_dimension", "--data-dir", folder, "--k", 5, "--save-dir", tmp_path)
    assert "99 of 3,000 points repeat another and count once" in result.out


@pytest.mark.parametrize("flags", [["--k", 1], ["--k", 0], ["--k"], ["--points", 0], ["--points", 50, "--k", 50],
                                   ["--k", 3000], ["--seed", -1], ["--foo"]])
def test_bad_flags_are_refused(refused, data_dir, tmp_path, flags):
    refused("estimate_dimension", "--data-dir", data_dir, "--save-dir", tmp_path / "plots", *flags)
    assert not list(tmp_path.glob("plots/*"))


def test_missing_data_are_refused(refused, tmp_path):
    assert "not found" in refused("estimate_dimension", "--data-dir", tmp_path, "--save-dir", tmp_path)
