"""The dimension estimator against scikit-dimension, the formula, and manifolds of known dimension."""

import json

import pytest

import dataset
from measures import levina_bickel


def test_script_reports_all_points_and_each_circle(script, data_dir, tmp_path):
    result = script("estimate_dimension", "--data-dir", data_dir, "--k", 30, 10, "--points", 2000, "--save-dir",
                    tmp_path / "plots")
    assert result.code == 0 and result.err == ""
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"dimension.json", "dimension.png"}
    report = json.loads((tmp_path / "plots" / "dimension.json").read_text())
    assert report["k"] == [10, 30] and report["points"] == 2000
    entries = report["entries"]
    assert [entry["name"] for entry in entries] == ["all", 0, 1, 2, 3]
    assert entries[0]["points"] == 2000 == sum(entry["points"] for entry in entries[1:])
    for entry in entries:
        row = next(line.split() for line in result.out.splitlines() if line.startswith(f"{entry['name']} "))
        assert row[2:] == [f"{entry['dimension'][k]:.2f}" for k in ("10", "30")]


def test_script_uses_every_point_when_asked_for_more(script, data_dir, tmp_path):
    assert script("estimate_dimension", "--data-dir", data_dir, "--k", 10, "--points", 10**6, "--save-dir",
                  tmp_path).code == 0
    entries = json.loads((tmp_path / "dimension.json").read_text())["entries"]
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
    entry = json.loads((tmp_path / "dimension.json").read_text())["entries"][4]
    assert entry["points"] == 5 and entry["dimension"]["5"] is None and entry["dimension"]["3"] > 0
    assert result.out.splitlines()[6].split()[-1] == "–"


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
