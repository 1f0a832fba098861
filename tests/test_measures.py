"""Every measure against an independent reference: a formula written out, a loop, or another library."""

import itertools
import math

import numpy as np
import pytest
import skdim
from scipy.spatial import cKDTree
from sklearn.cluster import KMeans
from sklearn.linear_model import Ridge

import cli
import measures
from measures import dimension_from_distances, knn, levina_bickel


def blobs(n, centres, width=5, spread=0.01, seed=0):
    """Tight clusters far apart: points (n, width) and the cluster of each, in visits of about 40 steps."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) // 40) % centres
    means = 10 * np.linalg.qr(rng.standard_normal((width, width)))[0][:centres]
    return (means[labels] + spread * rng.standard_normal((n, width))).astype(np.float32), labels


# ---- neighbours and dimension --------------------------------------------------------------------------------


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


def test_knn_measures_distances_in_blocks(monkeypatch):
    monkeypatch.setattr(measures, "BLOCK_VALUES", 7 * 3 * 12)  # seven points at a time; the last block has four
    points = cube(60, 3)
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
    calls = []
    monkeypatch.setattr(measures, "knn", lambda points, k: calls.append(k) or knn(points, k))
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


def test_umap_keeps_clusters_apart_and_repeats_itself():
    points, labels = blobs(200, 3, spread=0.5)
    embedding = measures.umap_embedding(points, knn(points, 9), seed=1)
    assert embedding.shape == (200, 2) and np.isfinite(embedding).all()
    np.testing.assert_array_equal(embedding, measures.umap_embedding(points, knn(points, 9), seed=1))
    umap = measures.umap_module()  # what takes it seconds to compile is kept for the next process
    for function in (umap.umap_.smooth_knn_dist, umap.umap_.compute_membership_strengths):
        assert sum(function.stats.cache_hits.values()) + sum(function.stats.cache_misses.values()) > 0
    _, neighbours = knn(embedding, 5)
    assert (labels[neighbours] == labels[:, None]).mean() > 0.99


# ---- covariance, probes, clusters ----------------------------------------------------------------------------


def test_spectrum_is_that_of_the_covariance_and_needs_no_whole_copy():
    values = (np.random.default_rng(0).standard_normal((500, 6)) @ np.diag([5, 4, 3, 2, 1, 0.1]) + 7).astype(np.float32)
    mean, eigenvalues, vectors = measures.spectrum(values, block=64)
    covariance = np.cov(values.T.astype(np.float64), bias=True)
    np.testing.assert_allclose(mean, values.mean(axis=0, dtype=np.float64), rtol=1e-9)
    np.testing.assert_allclose(vectors @ np.diag(eigenvalues) @ vectors.T, covariance, atol=1e-8)
    assert (np.diff(eigenvalues) <= 0).all()


def test_participation_ratio_against_traces():
    values = np.random.default_rng(0).standard_normal((300, 5)) * [3, 2, 1, 1, 0.5]
    C = np.cov(values.T, bias=True)
    assert measures.participation_ratio(measures.spectrum(values)[1]) == pytest.approx(np.trace(C)**2 / np.trace(C @ C))
    assert measures.participation_ratio(np.ones(8)) == pytest.approx(8)
    assert measures.participation_ratio(np.array([4.0, 0, 0])) == 1
    assert measures.participation_ratio(np.zeros(3)) is None


def test_principal_components_are_those_of_a_singular_value_decomposition():
    values = np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32) * np.float32([9, 7, 5, 3, 2, 1]) + 3
    mean, _, vectors = measures.spectrum(values)
    reduced = measures.principal_components(values, mean, vectors, 3)
    u, s, _ = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(reduced), np.abs(u[:, :3] * s[:3]), rtol=1e-3, atol=1e-3)
    for n in (None, 6, 100):
        assert measures.principal_components(values, mean, vectors, n) is values


def test_whitening_takes_the_train_sets_axes_and_drops_those_without_variance():
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((3, 5))  # five features of three dimensions
    train, test = (rng.standard_normal((n, 3)) @ mix + 5 for n in (400, 50))
    white, other = measures.whitened(train, test)
    assert white.shape == (400, 3) and other.shape == (50, 3)
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(3), atol=1e-4)
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-4)
    stacked, _ = measures.whitened(train, np.concatenate([train, test]))
    np.testing.assert_allclose(measures.whitened(train, train[:10])[1], stacked[:10], atol=1e-4)


def test_whitening_leaves_out_only_axes_with_next_to_no_variance():
    values = np.random.default_rng(0).standard_normal((500, 3)) * [1, 1e-3, 1e-7]
    white, _ = measures.whitened(values, values)
    assert white.shape == (500, 2)
    np.testing.assert_allclose(white.std(axis=0), 1, rtol=1e-4)


def test_circle_probe_is_perfect_where_circles_are_apart_and_at_chance_for_shuffled_labels():
    values, labels = blobs(2000, 4, spread=1.0)
    assert measures.circle_probe(values[:1400], labels[:1400], values[1400:], labels[1400:]) == 1.0
    shuffled = np.random.default_rng(1).permutation(labels)
    accuracy = measures.circle_probe(values[:1400], shuffled[:1400], values[1400:], shuffled[1400:])
    assert abs(accuracy - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 600)  # four standard deviations of pure guessing


def test_circle_probe_is_linear():
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi, 2000)
    labels = np.arange(2000) % 2
    rings = (np.stack([np.cos(angle), np.sin(angle)], axis=1) * (1 + 2 * labels[:, None])).astype(np.float32)
    accuracy = measures.circle_probe(rings[:1400], labels[:1400], rings[1400:], labels[1400:])
    assert accuracy < 0.65  # no plane parts two concentric rings


def test_circle_probe_without_a_choice_is_none():
    values = np.ones((10, 2))
    assert measures.circle_probe(values, np.zeros(10, int), values, np.zeros(10, int)) is None
    assert measures.circle_probe(values[:, :0], np.arange(10) % 2, values[:, :0], np.arange(10) % 2) is None


def test_phase_probe_is_r2_of_a_ridge_regression():
    rng = np.random.default_rng(0)
    thetas = rng.uniform(0, 2 * np.pi, 900)
    wave = np.stack([np.cos(thetas), np.sin(thetas)], axis=1)
    values = wave @ rng.standard_normal((2, 6)) + 0.5 * rng.standard_normal((900, 6))
    n = 30  # few, so that the penalty counts
    train, test = measures.whitened(values[:n], values[n:])
    # The same ridge as least squares on rows appended to the design, and R² as a loop over its definition.
    mean = wave[:n].mean(axis=0)
    design = np.concatenate([train, np.eye(train.shape[1])])
    weights = np.linalg.lstsq(design, np.concatenate([wave[:n] - mean, np.zeros((train.shape[1], 2))]))[0]
    scores = []
    for i in range(2):
        y, guess = wave[n:, i], test @ weights[:, i] + mean[i]
        scores.append(1 - ((y - guess)**2).sum() / ((y - y.mean())**2).sum())
    found = measures.phase_probe(train, thetas[:n], test, thetas[n:])
    assert found == pytest.approx(np.mean(scores), abs=1e-4)
    assert 0.5 < found < 1


def test_phase_probe_at_its_ends():
    rng = np.random.default_rng(0)
    thetas = rng.uniform(0, 2 * np.pi, 2000)
    wave = np.stack([np.cos(thetas), np.sin(thetas)], axis=1)
    assert measures.phase_probe(wave[:1400], thetas[:1400], wave[1400:], thetas[1400:]) > 0.999
    noise = rng.standard_normal((2000, 3))
    assert abs(measures.phase_probe(noise[:1400], thetas[:1400], noise[1400:], thetas[1400:])) < 0.05


@pytest.mark.parametrize("width", [1, 3, 11, 301])
def test_majority_vote_against_a_loop(width):
    labels = np.random.default_rng(0).integers(0, 5, 200)
    labels[labels == 3] = 1  # a label that never occurs
    wanted = []
    for t in range(len(labels)):
        window = labels[max(0, t - width // 2):t + width // 2 + 1].tolist()
        wanted.append(min(set(window), key=lambda label: (-window.count(label), label)))
    np.testing.assert_array_equal(measures.majority_vote(labels, 5, width), wanted)


def rand_index(a, b):
    """Adjusted Rand index by counting pairs (Hubert & Arabie 1985)."""
    same_a, same_b = ((x[:, None] == x)[np.triu_indices(len(x), 1)] for x in (a, b))
    both, expected = (same_a & same_b).sum(), same_a.sum() * same_b.sum() / len(same_a)
    return (both - expected) / ((same_a.sum() + same_b.sum()) / 2 - expected)


def mutual_information(a, b):
    """Mutual information over the mean of the entropies, from counted frequencies."""
    def entropy(x):
        p = np.unique(x, return_counts=True, axis=0)[1] / len(x)
        return -(p * np.log(p)).sum()

    joint = entropy(np.stack([a, b], axis=1))
    return (entropy(a) + entropy(b) - joint) / ((entropy(a) + entropy(b)) / 2)


def test_cluster_scores_of_known_clusters():
    values, clusters = blobs(1200, 3)
    states = clusters.copy()
    states[900:] = np.arange(300) // 100  # what the clusters don't see
    found = measures.cluster_scores(values, np.arange(0, 1200, 3), states, 3, seed=0)
    assert found["kmeans_ari"] == pytest.approx(rand_index(states, clusters))
    assert found["kmeans_nmi"] == pytest.approx(mutual_information(states, clusters))
    assert 0.3 < found["kmeans_ari"] < 0.8


def test_smoothing_removes_flicker():
    steps = np.arange(1800)
    states = steps // 600
    means = 10 * np.eye(3)
    flicker = np.where(steps % 7 == 0, (states + 1) % 3, states)
    values = (means[flicker] + 0.01 * np.random.default_rng(0).standard_normal((1800, 3))).astype(np.float32)
    found = measures.cluster_scores(values, np.arange(1800), states, 3, seed=0)
    assert found["kmeans_ari"] == pytest.approx(rand_index(states, flicker)) and found["kmeans_ari"] < 0.8
    assert found["kmeans_nmi"] == pytest.approx(mutual_information(states, flicker))
    # Which number a cluster gets is chance, and the lowest wins a tie: one of the six ways to number them.
    ways = [measures.majority_vote(np.array(names)[flicker], 3, 101) for names in itertools.permutations(range(3))]
    wanted = [(rand_index(states, smooth), mutual_information(states, smooth)) for smooth in ways]
    scores = found["kmeans_ari_smooth"], found["kmeans_nmi_smooth"]
    assert any(scores == pytest.approx(way) for way in wanted) and min(scores) > 0.95


def test_clusters_of_noise_and_of_a_collapsed_level_score_nothing():
    rng = np.random.default_rng(0)
    noise, states = rng.standard_normal((3000, 4)), rng.integers(0, 5, 3000)
    found = measures.cluster_scores(noise, np.arange(3000), states, 5, seed=0)
    assert all(abs(score) < 0.05 for name, score in found.items() if "smooth" not in name)
    collapsed = measures.cluster_scores(np.ones((200, 4)), np.arange(200), np.arange(200) % 4, 4, seed=0)
    assert set(collapsed.values()) == {0.0}


def test_rings_around_one_centre_are_told_apart_where_a_umap_lays_them_side_by_side():
    rng = np.random.default_rng(0)
    states = (np.arange(1200) // 100) % 2
    angle = rng.uniform(0, 2 * np.pi, 1200)
    planes = np.linalg.qr(rng.standard_normal((6, 4)))[0].T.reshape(2, 2, 6)
    level = np.einsum("tp,tpd->td", np.stack([np.cos(angle), np.sin(angle)], axis=1), planes[states])
    shown = rng.permutation(1200)[:400]
    embedding = np.stack([10 * states[shown] + np.cos(angle[shown]), np.sin(angle[shown])], axis=1)  # as UMAP would
    nearest = np.array([np.argmin(((level[shown] - point)**2).sum(axis=1)) for point in level])
    found = measures.embedding_scores(embedding, nearest, states[shown], states, 2, seed=0)
    assert found["umap_silhouette"] == pytest.approx(measures.silhouette(embedding, states[shown])) and \
        found["umap_silhouette"] > 0.8
    assert found["umap_ari"] == pytest.approx(rand_index(states, states[shown][nearest])) and found["umap_ari"] > 0.95
    plain = measures.cluster_scores(level, np.arange(1200), states, 2, seed=0)
    assert plain["kmeans_ari"] < 0.3 and measures.silhouette(level, states) < 0.3


def test_silhouette_against_a_loop():
    rng = np.random.default_rng(0)
    states = rng.integers(0, 3, 60)
    points = rng.standard_normal((60, 4)) + 2 * np.eye(4)[states]
    values = []
    for i in range(60):
        mean = {s: np.mean([np.linalg.norm(points[i] - points[j]) for j in range(60) if states[j] == s and j != i])
                for s in range(3)}
        own, other = mean.pop(states[i]), min(mean.values())
        values.append((other - own) / max(own, other))
    assert measures.silhouette(points, states) == pytest.approx(np.mean(values))
    assert measures.silhouette(points, np.zeros(60, int)) is None


def test_nearest_within_is_exact_or_says_that_it_cannot_be():
    points = np.random.default_rng(0).standard_normal((300, 4))
    distances, indices = knn(points, 60)
    wanted = knn(points[:200], 9)
    found = measures.knn_of_first(distances, indices, 200, 9)
    np.testing.assert_array_equal(found[1], wanted[1])
    np.testing.assert_allclose(found[0], wanted[0])
    assert measures.knn_of_first(distances[:, :9], indices[:, :9], 200, 9) is None
    assert measures.knn_of_first(distances, indices, 40, 39) is None


# ---- variance explained --------------------------------------------------------------------------------------


def test_eta_squared_matches_a_loop_over_groups():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 5, 200)
    groups[groups == 3] = 2  # a circle that is never visited
    values = rng.normal(size=(200, 4)) + groups[:, None] * np.array([0, 0.3, 1, 5]) + 100
    for column, share in zip(values.T, measures.eta_squared(values, groups), strict=True):
        within = sum(((column[groups == g] - column[groups == g].mean()) ** 2).sum() for g in set(groups.tolist()))
        assert share == pytest.approx(1 - within / ((column - column.mean()) ** 2).sum(), abs=1e-10)


def test_eta_squared_at_its_ends():
    groups = np.array([0, 0, 1, 1, 2, 2])
    values = np.stack([groups * 2.0, np.array([0, 1, 0, 1, 0, 1.0]), np.full(6, 0.1)], axis=1)
    np.testing.assert_allclose(measures.eta_squared(values, groups), [1, 0, 0], atol=1e-12)


def test_standardise_leaves_a_constant_channel_at_zero():
    values = np.random.default_rng(0).normal(3, 7, size=(50, 3))
    values[:, 1] = 0.1
    scaled = measures.standardise(values)
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(scaled.std(axis=0), [1, 0, 1], atol=1e-12)


# ---- what the measures pass on ---------------------------------------------------------------------------------


def test_umap_gets_each_point_as_its_own_first_neighbour_and_the_seed(monkeypatch):
    import umap

    made = []

    class Reducer:
        def __init__(self, **options):
            made.append(options)

        def fit_transform(self, points):
            return points[:, :2]

    monkeypatch.setattr(umap, "UMAP", Reducer)
    points = cube(30, 3)
    graph = cKDTree(points).query(points, 6)
    found = measures.umap_embedding(points, (graph[0][:, 1:], graph[1][:, 1:]), seed=7)
    np.testing.assert_array_equal(found, points[:, :2])
    (options,) = made
    indices, distances = options.pop("precomputed_knn")
    np.testing.assert_array_equal(indices, graph[1])
    np.testing.assert_allclose(distances, graph[0], atol=1e-6)
    assert options == {"n_neighbors": 6, "random_state": 7, "n_jobs": 1, "force_approximation_algorithm": True}


def test_kmeans_starts_four_times_from_the_seed_and_is_fitted_on_the_rows_given(monkeypatch):
    rng = np.random.default_rng(0)
    values, states = rng.standard_normal((400, 3)), np.arange(400) // 50 % 5
    rows = rng.permutation(400)[:70]
    for seed in (1, 2):
        labels = KMeans(5, n_init=4, random_state=seed).fit(values[rows]).predict(values)
        found = measures.cluster_scores(values, rows, states, 5, seed)
        assert found["kmeans_ari"] == pytest.approx(rand_index(states, labels))
        assert found["kmeans_nmi"] == pytest.approx(mutual_information(states, labels))
        embedding = values[rows, :2]
        inner = KMeans(5, n_init=4, random_state=seed).fit(embedding).labels_
        nearest = rng.integers(0, 70, 400)
        found = measures.embedding_scores(embedding, nearest, states[rows], states, 5, seed)
        assert found["umap_ari"] == pytest.approx(rand_index(states, inner[nearest]))
        assert found["umap_nmi"] == pytest.approx(mutual_information(states, inner[nearest]))
    assert measures.fit_kmeans(values[:3], 5, 0).n_clusters == 3


def test_agreement_votes_over_101_steps_and_names_what_it_measures():
    labels = np.random.default_rng(0).integers(0, 3, 500)
    labels[::2] = (np.arange(500) // 90 % 3)[::2]
    states = np.arange(500) // 100 % 4
    smooth = [min(range(3), key=lambda c, t=t: (-(labels[max(0, t - 50):t + 51] == c).sum(), c)) for t in range(500)]
    found = measures.agreement(labels, states, 3, "a")
    assert found == {"a_ari": pytest.approx(rand_index(states, labels)),
                     "a_nmi": pytest.approx(mutual_information(states, labels)),
                     "a_ari_smooth": pytest.approx(rand_index(states, np.array(smooth))),
                     "a_nmi_smooth": pytest.approx(mutual_information(states, np.array(smooth)))}


def test_circle_probe_is_the_regularised_multinomial_fit():
    rng = np.random.default_rng(0)
    labels = np.r_[np.repeat([0, 1, 2], [14, 4, 6]), rng.integers(0, 3, 3000)]  # few to fit: the penalty counts
    values = rng.standard_normal((3024, 4)) * [1, 1, 0.3, 2] + 0.8 * np.eye(4)[labels]
    design = np.concatenate([values, np.ones((3024, 1))], axis=1)
    weights = np.zeros((5, 3))  # the last row: the intercepts, which are not penalised
    for _ in range(3000):  # gradient descent on the sum of the log losses + |w|² / 2
        p = np.exp(design[:24] @ weights)
        p /= p.sum(axis=1, keepdims=True)
        weights -= 0.01 * (design[:24].T @ (p - np.eye(3)[labels[:24]]) + np.r_[weights[:4], np.zeros((1, 3))])
    accuracy = ((design[24:] @ weights).argmax(axis=1) == labels[24:]).mean()
    found = measures.circle_probe(values[:24], labels[:24], values[24:], labels[24:])
    assert found == pytest.approx(accuracy, abs=0.002)


def test_silhouette_needs_two_circles_and_two_points_on_one():
    points = np.random.default_rng(0).standard_normal((4, 2))
    assert measures.silhouette(points, np.arange(4)) is None
    assert measures.silhouette(points, np.array([0, 0, 1, 2])) is not None


def test_dimension_of_two_points_by_hand():
    distances = np.array([[1.0, 2.0, 8.0], [1.0, 1.0, 4.0]])
    inverse = ((math.log(8) + math.log(4)) / 2 + (math.log(4) + math.log(4)) / 2) / 2
    assert dimension_from_distances(distances, [3])[3] == pytest.approx(1 / inverse)
    assert dimension_from_distances(distances, [2])[2] == pytest.approx(1 / (math.log(2) / 2))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_umap_of_very_few_points_is_refused_in_one_line(n):
    points = np.eye(3)[:n]
    with pytest.raises(cli.UserError, match="4 points or more"):
        measures.umap_embedding(points, measures.knn(points, n - 1) if n > 1 else None, 0)


# ---- TwoNN, beliefs by ridge regression, and errors over blocks ------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 5])
def test_two_nn_finds_the_dimension_of_a_cube_whatever_space_it_lies_in(d):
    points = cube(3000, d, ambient=8)
    found = measures.two_nn(knn(points, 2)[0])
    assert found == pytest.approx(skdim.id.TwoNN().fit(points).dimension_, rel=1e-6)
    assert found == pytest.approx(d, rel=0.08)


def test_two_nn_of_a_sphere_and_of_equal_distances():
    normals = np.random.default_rng(0).standard_normal((3000, 4))
    sphere = normals / np.linalg.norm(normals, axis=1, keepdims=True)
    assert measures.two_nn(knn(sphere, 2)[0]) == pytest.approx(3, rel=0.06)
    assert measures.two_nn(np.ones((50, 3))) is None


def ridge_case(n=300, width=6, targets=2, noise=0.5, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, width))
    y = x @ rng.standard_normal((width, targets)) + noise * rng.standard_normal((n, targets)) + 3
    return x, y


def r2(x, y, test, test_y, groups=None):
    return measures.ridge_r2(measures.ridge_data(x, y, test, test_y, groups), x.shape[1])


def test_ridge_regressions_are_scikit_learns():
    x, y = ridge_case()
    moments = measures.second_moments(x, y)
    test, test_y = ridge_case(50, seed=2)
    for targets in (slice(None), slice(1, 2)):
        for penalty, solution in zip(measures.RIDGE_PENALTIES, measures.ridge_solutions(moments, 6, targets),
                                     strict=True):
            wanted = Ridge(alpha=penalty * len(x)).fit(x, y[:, targets])
            np.testing.assert_allclose(solution, np.vstack([np.atleast_2d(wanted.coef_).T, wanted.intercept_]),
                                       rtol=1e-6, atol=1e-9)
            left = measures.squares_left(solution, measures.second_moments(test, test_y), 6, targets)
            assert left == pytest.approx(np.square(wanted.predict(test).reshape(50, -1) - test_y[:, targets]).sum())


def test_the_last_fifth_of_the_train_rows_chooses_the_penalty():
    x, y = ridge_case(60, 30, noise=6.0)  # so noisy that a large penalty is better
    x[48:], y[48:] = ridge_case(12, 30, noise=6.0, seed=4)  # a later time, another relation
    test, test_y = ridge_case(40, 30, noise=6.0)
    errors = [np.square(Ridge(alpha=p * 48).fit(x[:48], y[:48]).predict(x[48:]) - y[48:]).sum()
              for p in measures.RIDGE_PENALTIES]
    assert np.argmin(errors) > 0
    chosen = Ridge(alpha=measures.RIDGE_PENALTIES[np.argmin(errors)] * 60).fit(x, y)
    left, total = np.square(chosen.predict(test) - test_y).sum(), np.square(test_y - test_y.mean(axis=0)).sum()
    assert r2(x, y, test, test_y) == pytest.approx(1 - left / total, rel=1e-6)


def test_a_representation_that_is_the_belief_has_r2_1_and_noise_has_0():
    rng = np.random.default_rng(0)
    posterior = rng.dirichlet(np.ones(4), 4000)
    white = measures.whitened(posterior[:3000], posterior[3000:])
    assert r2(white[0], posterior[:3000], white[1], posterior[3000:]) == pytest.approx(1, abs=1e-4)
    noise = rng.standard_normal((4000, 5))
    assert abs(r2(noise[:3000], posterior[:3000], noise[3000:], posterior[3000:])) < 0.02


def test_within_groups_the_group_itself_explains_nothing():
    rng = np.random.default_rng(1)
    groups = rng.integers(0, 3, 900)
    y = (groups * 10 + rng.standard_normal(900))[:, None]
    x = np.eye(3)[groups] + 0.01 * rng.standard_normal((900, 3))
    split = groups[:600], groups[600:]
    assert r2(x[:600], y[:600], x[600:], y[600:]) > 0.9
    assert r2(x[:600], y[:600], x[600:], y[600:], split) < 0.02
    both = np.concatenate([x, y * np.array([1, 2, 3])[groups][:, None]], axis=1)
    data = measures.ridge_data(both[:600], y[:600], both[600:], y[600:], split)
    left = total = 0
    for group, part in enumerate(data):  # one regression per group, whose sums are pooled
        fit, score = np.flatnonzero(split[0] == group), 600 + np.flatnonzero(split[1] == group)
        for found, rows in zip(part, (fit[fit < 480], fit[fit >= 480], score), strict=True):
            np.testing.assert_allclose(found, measures.second_moments(both[rows], y[rows]))
        variation = np.square(y[score] - y[score].mean()).sum()
        left, total = left + (1 - measures.ridge_r2(part, 4)) * variation, total + variation
    assert measures.ridge_r2(data, 4) == pytest.approx(1 - left / total) and 1 - left / total > 0.99


def test_r2_of_what_is_too_little_or_never_varies_is_none():
    x, y = ridge_case(40, 6)
    assert r2(x[:7], y[:7], x[7:], y[7:]) is None  # not more rows than columns
    assert r2(x, y, x[:1], y[:1]) is None
    assert r2(x, np.ones((40, 1)), x, np.ones((40, 1))) is None
    assert r2(x[:, :0], y, x[:, :0], y) is None
    late = np.arange(40) >= 34  # a group that comes in the held-out part alone
    both = measures.ridge_data(x[:, :2], y, x[:, :2], y, (late, late))
    assert measures.ridge_r2(both[1:], 2) is None
    assert measures.ridge_r2(both, 2) == measures.ridge_r2(both[:1], 2) is not None


def test_a_ratio_over_blocks_and_its_error():
    rng = np.random.default_rng(0)
    spread, told = [], []
    for _ in range(400):  # the error that is told is that of repeated draws
        n = rng.integers(20, 40, 30)
        ratio, error = measures.ratio_and_error(n * (2 + rng.normal(0, 0.5, 30)), n)
        spread.append(ratio)
        told.append(error)
    assert np.mean(spread) == pytest.approx(2, abs=0.02)
    assert np.mean(told) == pytest.approx(np.std(spread), rel=0.1)
    ratio, error = measures.ratio_and_error([1.0, 5.0], [1.0, 2.0])
    residual = np.array([1 - 2, 5 - 4])
    assert ratio == 2 and error == pytest.approx(math.sqrt(2 / 1 * (residual**2).sum()) / 3)
    assert measures.ratio_and_error([3.0], [2.0]) == (1.5, None)
    assert measures.ratio_and_error([0.0, 0.0], [0.0, 0.0]) == (None, None)
