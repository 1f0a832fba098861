"""The dimension estimator against scikit-dimension, the formula, and manifolds of known dimension."""

import json

import numpy as np
import pytest
import skdim
from scipy.spatial import cKDTree

import cli
import dataset
from estimate_dimension import dimension_from_distances, knn, levina_bickel


def cube(n, d, ambient=None, seed=0):
    """n points, uniform in a d-dimensional unit cube that lies askew in `ambient` dimensions."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((ambient or d, d)))[0]
    return rng.random((n, d)) @ axes.T


@pytest.mark.parametrize("shape", [(300, 3), (500, 20), (200, 128)])
def test_knn_equals_a_tree(shape):
    points = np.random.default_rng(1).standard_normal(shape)
    distances, indices = knn(points, 12)
    tree_distances, tree_indices = cKDTree(points).query(points, 13)
    np.testing.assert_allclose(distances, tree_distances[:, 1:], rtol=1e-12)
    np.testing.assert_array_equal(indices, tree_indices[:, 1:])


def test_knn_of_all_other_points():
    distances, indices = knn(cube(20, 3), 19)
    assert all(sorted([i, *row]) == list(range(20)) for i, row in enumerate(indices))
    assert (np.diff(distances, axis=1) >= 0).all()


def test_knn_far_from_the_origin_in_float32():
    points = (np.random.default_rng(2).standard_normal((400, 5)) + 1000).astype(np.float32)
    distances, _ = knn(points, 10)
    np.testing.assert_allclose(distances, cKDTree(points.astype(np.float64)).query(points, 11)[0][:, 1:], rtol=1e-9)


def test_knn_leaves_the_point_out_even_among_its_copies():
    points = np.repeat(cube(5, 2), 4, axis=0)
    distances, indices = knn(points, 3)
    assert (indices != np.arange(20)[:, None]).all()
    assert (distances == 0).all() and (indices // 4 == np.arange(20)[:, None] // 4).all()


def test_estimator_is_the_published_formula():
    points = cube(60, 3)
    k, inverse = 7, []
    for x in points:
        T = np.sort(np.linalg.norm(points - x, axis=1))[1:k + 1]
        inverse.append(sum(np.log(T[k - 1] / T[j]) for j in range(k - 1)) / (k - 1))
    assert levina_bickel(points, [k])[k] == pytest.approx(1 / np.mean(inverse), rel=1e-9)


@pytest.mark.parametrize(("points", "k"), [(cube(500, 3, 10), 20), (cube(400, 5), 10), (cube(300, 2, 40), 50),
                                           (np.random.default_rng(3).standard_normal((500, 20)), 20)])
def test_equals_scikit_dimension(points, k):
    expected = skdim.id.MLE().fit(points, n_neighbors=k).dimension_
    assert levina_bickel(points, [k])[k] == pytest.approx(expected, rel=1e-9)


def test_default_neighbours_of_scikit_dimension_is_the_k_of_the_umap_title():
    import markov_circles_timeseries as mc
    assert mc.DIMENSION_K == skdim.id.MLE()._N_NEIGHBORS


@pytest.mark.parametrize("d", [1, 2, 4, 6])
def test_cube_has_its_dimension(d):
    estimate = levina_bickel(cube(4000, d, 12), [10])[10]
    # Too low near the faces of the cube, too high by about (k-1)/(k-2) inside.
    assert d * 0.85 < estimate < d * 1.2


def test_ring_is_a_line_with_noise_small_and_a_volume_with_noise_large():
    rng = np.random.default_rng(4)
    angle = rng.uniform(0, 2 * np.pi, 3000)
    ring = np.stack([np.cos(angle), np.sin(angle), *np.zeros((3, 3000))], axis=1)
    thin, thick = (levina_bickel(ring + noise * rng.standard_normal(ring.shape), [20])[20] for noise in (1e-5, 0.3))
    assert 0.9 < thin < 1.2 and 3.5 < thick < 5.5


def test_all_k_at_once_equals_one_at_a_time():
    points, ks = cube(500, 4, 8), [100, 2, 10, 33]
    together = levina_bickel(points, ks)
    assert list(together) == ks
    for k in ks:
        assert together[k] == pytest.approx(levina_bickel(points, [k])[k], rel=1e-12)


def test_one_neighbour_query_serves_all_k(monkeypatch):
    import estimate_dimension
    calls = []
    monkeypatch.setattr(estimate_dimension, "knn", lambda points, k: calls.append(k) or knn(points, k))
    levina_bickel(cube(200, 3), [5, 50, 20])
    assert calls == [50]


def test_scale_and_shift_change_nothing():
    points = cube(500, 3)
    assert levina_bickel(1e4 * points - 7, [15])[15] == pytest.approx(levina_bickel(points, [15])[15], rel=1e-6)


def test_repeated_points_count_once():
    points = cube(300, 3)
    repeated = np.concatenate([points, points[:100], points[:1].repeat(50, axis=0)])
    assert levina_bickel(repeated, [10])[10] == pytest.approx(levina_bickel(points, [10])[10], rel=1e-12)


@pytest.mark.parametrize(("points", "ks", "message"), [
    (cube(10, 2), [10], "need 11 points"),
    (np.ones((50, 3)), [5], "there are 1"),
    (cube(50, 2), [1], "2 or more"),
    (np.where(np.eye(30) > 0, np.nan, 1), [5], "NaN or infinity"),
    (np.where(np.eye(30) > 0, np.inf, 1), [5], "NaN or infinity"),
    (np.eye(30), [5], "equally far"),
])
def test_what_has_no_dimension_is_refused(points, ks, message):
    with pytest.raises(cli.UserError, match=message):
        levina_bickel(points, ks)


def test_dimension_from_distances_takes_more_columns_than_needed():
    distances, _ = knn(cube(100, 3), 30)
    assert dimension_from_distances(distances, [10]) == dimension_from_distances(distances[:, :10], [10])


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
