"""What can be measured of a cloud of points: dimension, spectrum, probes, clusters, variance explained, and its UMAP.

Points are always the rows of an array (n, width). The scripts decide which points are measured; nothing here knows
about models, files or flags. scikit-learn and umap-learn take seconds to import, so the functions that need them
import them themselves.
"""

import contextlib
import functools
import warnings
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

import cli

BLOCK_VALUES = 2**16  # neighbour differences at a time: few enough for them to stay in the cache
BLOCK_ROWS = 2**16  # rows of which `spectrum` makes a float64 copy at a time
VOTE_STEPS = 101  # a quarter of the default mean visit: removes flicker, keeps visits
PROBE_FRACTION = 0.7  # the probes are fitted on this part of time and scored on the rest
PROBE_STEPS = 20_000  # at most so many steps of that part, drawn at random
RIDGE = 1.0
RIDGE_PENALTIES = 10.0 ** np.arange(-6, 1)  # that `ridge_r2` chooses from, for columns of variance 1
HELD_OUT = 0.2  # of the rows that it is fitted to: they choose the penalty
KMEANS_RESTARTS = 4
DIMENSION_KS = (5, 10, 30, 100)  # numbers of neighbours for the dimension
DIMENSION_POINTS = 10_000  # time steps drawn for it
DIMENSION_K = 30  # the one of them in titles and in comparisons


def one_thread():
    """A region in which BLAS and OpenMP compute with one thread. An iterative fit is thousands of small steps, at each
    of which threads wait for each other; beside other processes that takes ten times as long as one thread alone."""
    return threadpool_limits(1)


# ---------------------------------------------------------------------------------------------------------------
# Neighbours and dimension


def distinct(points):
    """The points (n, dim) without repeats, in another order."""
    return np.unique(points, axis=0)


def knn(points, k):
    """The k nearest neighbours of every point, without the point itself: (distances (n, k), indices (n, k)).

    points (n, dim); Euclidean distances, float64, nearest first. All pairs of points are compared by parallel BLAS
    products, which in 20 dimensions is twice as fast as a tree. Raises UserError for fewer than k + 1 points, NaN or
    infinity.
    """
    from sklearn.neighbors import NearestNeighbors

    points = np.asarray(points)
    if len(points) < k + 1:
        raise cli.UserError(f"{k} neighbours need {k + 1} points, and there are {len(points)}; "
                            "use a smaller k or more points")
    if not np.isfinite(points).all():
        raise cli.UserError("the points hold NaN or infinity")
    indices = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(points).kneighbors(return_distance=False)
    # |a|² + |b|² - 2ab loses the digits of a small distance between points far from the origin. So only the choice of
    # the neighbours is taken from the products; their distances are computed anew from the differences.
    points, distances = points.astype(np.float64), np.empty((len(points), k))
    block = max(1, BLOCK_VALUES // (k * points.shape[1]))
    for first in range(0, len(points), block):
        rows = slice(first, first + block)
        difference = points.take(indices[rows], axis=0)
        difference -= points[rows, None]
        distances[rows] = np.sqrt(np.einsum("nkd,nkd->nk", difference, difference))
    order = np.argsort(distances, axis=1, kind="stable")
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(indices, order, axis=1)


def knn_of_first(distances, indices, n, k):
    """The k nearest neighbours of the first n points among these n, read off `knn` of more points.

    Exact: the list of a point names every point that is nearer than the last one named. Returns None when some list
    names fewer than k of the first n points; only a new query can find the others.
    """
    inside = indices[:n] < n
    if inside.sum(axis=1).min() < k:
        return None
    order = np.argsort(~inside, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances[:n], order, axis=1), np.take_along_axis(indices[:n], order, axis=1)


def dimension_from_distances(distances, ks):
    """Maximum-likelihood dimension for each k: {k: dimension}.

    distances (n, max(ks) or more), positive, nearest first: T_1(x) <= T_2(x) <= … from each point x.

        1 / m_k(x) = 1/(k-1) Σ_{j<k} log(T_k(x) / T_j(x))       Levina & Bickel 2004, eq. 8
        1 / m_k    = mean over x of 1 / m_k(x)                   MacKay & Ghahramani 2005

    The mean of the inverses pools the likelihoods of all points; the mean of m_k(x) itself would be biased upwards at
    small k. The factor is 1/(k-1), that of the likelihood, not the 1/(k-2) that unbiases a single m_k(x). Raises
    UserError when all k neighbours of every point are equally far away.
    """
    logs = np.log(distances[:, :max(ks)])
    sums = logs.cumsum(axis=1)
    inverse = {k: float((logs[:, k - 1] - sums[:, k - 2] / (k - 1)).mean()) for k in ks}
    if min(inverse.values()) <= 0:
        raise cli.UserError("the nearest neighbours of every point are equally far away, which no dimension "
                            "explains; use a larger k")
    return {k: 1 / inverse[k] for k in ks}


def levina_bickel(points, ks):
    """Intrinsic dimension of points (n, dim) for each k of ks (2 or more): {k: dimension}, from one neighbour query.

    Repeated points count once: their distance 0 would make any dimension 0. See dimension_from_distances for the
    estimator. Raises UserError for fewer than max(ks) + 1 distinct points, a k below 2, NaN or infinity.
    """
    if min(ks) < 2:
        raise cli.UserError("k must be 2 or more: one neighbour has no distance to compare with")
    distances, _ = knn(distinct(points), max(ks))
    return dimension_from_distances(distances, ks)


def two_nn(distances):
    """The TwoNN dimension from the distances (n, 2 or more) of `knn`, positive; None where all first two are equal.

    Facco, d'Errico, Rodriguez & Laio 2017, Scientific Reports 7, 12140: the ratio μ of a point's second distance to its
    first has the distribution 1 - μ^-d where the points have dimension d and their density is even over that distance.
    d is the slope through the origin of -log(1 - F(μ)) against log μ, without the largest tenth of the ratios.
    """
    n = len(distances)
    log_ratio = np.sort(np.log(distances[:, 1] / distances[:, 0]))[:int(0.9 * n)]
    height = -np.log1p(-np.arange(1, len(log_ratio) + 1) / n)
    square = log_ratio @ log_ratio
    return float(log_ratio @ height / square) if square > 0 else None


def dimensions(points, ks, distances=None):
    """The dimension of points (n, width) at several scales: {"two_nn": …, k: …}, TwoNN and Levina-Bickel for each k.

    distances: those of `knn` of these points to max(ks) neighbours or more, where they are known. Repeated points count
    once. None where there are too few different points for it.
    """
    if distances is None or distances[:, 0].min() == 0:
        points = distinct(points)
        ks_there = [k for k in ks if k < len(points)]
        distances = knn(points, max([2, *ks_there]))[0] if len(points) > 2 else None
    found = dict.fromkeys(["two_nn", *ks])
    if distances is not None:
        found["two_nn"] = two_nn(distances)
        ks_there = [k for k in ks if k <= distances.shape[1]]
        with contextlib.suppress(cli.UserError):  # points that are equally far apart have none
            found |= dimension_from_distances(distances, ks_there) if ks_there else {}
    return found


def dimension_sample(n, points, seed):
    """The time steps, out of n, that a dimension of `points` points is estimated from, the same in all scripts."""
    return np.random.default_rng(seed).permutation(n)[:points]


@functools.cache
def umap_module():
    """The module umap. What Numba compiles of it is kept on disk, also what umap itself compiles in each process."""
    from kernels import numba_cache

    numba_cache.install()  # before umap and pynndescent decorate their functions
    import umap

    for module, name in ((umap.umap_, "smooth_knn_dist"), (umap.umap_, "compute_membership_strengths"),
                         (umap.layouts, "_nb_optimize_layout_euclidean_single_epoch")):
        with contextlib.suppress(AttributeError):  # other versions have other names
            getattr(module, name).enable_caching()
    return umap


def umap_embedding(points, graph, seed):
    """Two UMAP coordinates (n, 2) of points (n, width); the same for the same seed.

    graph: the distances and indices (n, k) of `knn`, which leave out the point itself; UMAP's n_neighbors is k + 1,
    because UMAP counts the point as its own first neighbour. McInnes, Healy & Melville 2018, arXiv 1802.03426.
    Raises UserError for fewer than 4 points: UMAP starts from 3 eigenvectors of the graph.
    """
    if len(points) < 4:
        raise cli.UserError(f"a UMAP needs 4 points or more, and there are {len(points)}; use more points or no UMAP")
    distances = np.pad(graph[0], ((0, 0), (1, 0))).astype(np.float32)
    indices = np.concatenate([np.arange(len(points))[:, None], graph[1]], axis=1)
    reducer = umap_module().UMAP(n_neighbors=indices.shape[1], random_state=seed, n_jobs=1,
                                 # Without this UMAP ignores the given neighbours of fewer than 4096 points.
                                 force_approximation_algorithm=True, precomputed_knn=(indices, distances))
    with warnings.catch_warnings():
        # It warns that no points can be added to the embedding later; nobody here does that.
        warnings.filterwarnings("ignore", message="precomputed_knn", category=UserWarning)
        # And that the graph falls into parts. Circles that lie far apart are such parts; UMAP lays out each by itself.
        warnings.filterwarnings("ignore", message="Graph is not fully connected", category=UserWarning)
        return reducer.fit_transform(points)


# ---------------------------------------------------------------------------------------------------------------
# Covariance and scale


def spectrum(values, block=BLOCK_ROWS):
    """Mean, variances and directions of the principal axes of values (n, width), in float64, the largest first.

    Returns (mean (width,), eigenvalues (width,), eigenvectors (width, width), one per column) of the covariance. Only
    `block` rows at a time are copied to float64.
    """
    mean, total = values.mean(axis=0, dtype=np.float64), 0.0
    for first in range(0, len(values), block):
        centred = values[first:first + block] - mean
        total = total + centred.T @ centred
    eigenvalues, vectors = np.linalg.eigh(total / len(values))
    return mean, np.maximum(eigenvalues[::-1], 0), vectors[:, ::-1]


def participation_ratio(eigenvalues):
    """Effective rank (Σλ)² / Σλ² of a covariance with these eigenvalues (width,).

    1 for a line, the width for an isotropic cloud, None when nothing varies.
    """
    square = np.square(eigenvalues).sum()
    return float(eigenvalues.sum()**2 / square) if square > 0 else None


def principal_components(values, mean, vectors, n):
    """The first n principal components (rows, n) of values (rows, width), float32; mean and vectors from `spectrum`.

    Values that are no wider than n, and any values when n is None, are returned as they are.
    """
    if n is None or n >= values.shape[1]:
        return values
    axes = vectors[:, :n].astype(np.float32)
    return values @ axes - (mean @ axes).astype(np.float32)


def whitened(train, test):
    """Both sets (rows, width) in units of the train set's principal axes; axes along which nothing varies are dropped.

    For a linear probe this equals standardising each feature, except that the fit converges in far fewer iterations
    and the penalty treats all directions alike.
    """
    mean, eigenvalues, vectors = spectrum(train)
    varying = eigenvalues > 1e-10 * eigenvalues[0]
    axes = (vectors[:, varying] / np.sqrt(eigenvalues[varying])).astype(np.float32)
    shift = (mean @ axes).astype(np.float32)
    return train @ axes - shift, test @ axes - shift


def standardise(values):
    """Columns of values (n, channels) scaled to mean 0 and standard deviation 1; a column that never changes to 0."""
    values = np.asarray(values, dtype=np.float64)
    varies = np.ptp(values, axis=0) > 0
    return np.where(varies, (values - values.mean(axis=0)) / np.where(varies, values.std(axis=0), 1), 0)


def probe_split(n_rows, rng):
    """The rows that fit the probes and the rows that score them: (train (n,) ascending, a slice).

    Train: at most PROBE_STEPS rows from the first PROBE_FRACTION of time; the slice: all rows after that part.
    """
    boundary = round(n_rows * PROBE_FRACTION)
    train = np.sort(rng.permutation(boundary)[:PROBE_STEPS])
    return train, slice(boundary, n_rows)


# ---------------------------------------------------------------------------------------------------------------
# Linear probes (Alain & Bengio 2016, arXiv 1610.01644)


def circle_probe(train, train_states, test, test_states):
    """Accuracy on the test set of a multinomial logistic regression that is fitted on the train set.

    train, test (rows, width), whitened; states (rows,) int, or None. None without states, when the train set has one
    circle only, or no width.
    """
    if train_states is None:
        return None
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(train_states)) < 2 or train.shape[1] == 0:
        return None
    with one_thread():
        probe = LogisticRegression(C=1.0, tol=1e-3, max_iter=1000).fit(train, train_states)
    return float((probe.predict(test) == test_states).mean())


def phase_probe(train, train_thetas, test, test_thetas):
    """R² on the test set of a ridge regression to (cos θ, sin θ), fitted on the train set: the mean of both targets.

    train, test (rows, width), whitened; thetas (rows,) radians. Negative when worse than the mean of the test set. None
    without thetas.
    """
    if train_thetas is None:
        return None
    from sklearn.metrics import r2_score

    target = np.stack([np.cos(train_thetas), np.sin(train_thetas)], axis=1)
    mean = target.mean(axis=0)
    weights = np.linalg.solve(train.T @ train + RIDGE * np.eye(train.shape[1]), train.T @ (target - mean))
    return float(r2_score(np.stack([np.cos(test_thetas), np.sin(test_thetas)], axis=1), test @ weights + mean))


# ---------------------------------------------------------------------------------------------------------------
# Ridge regressions from sums over the rows
#
# A regression needs no more of its rows than the matrix of second moments of (x, y, 1), which is a sum over them. So
# one pass over a representation serves regressions onto several targets, of all rows and of each group of rows alone.


class RidgeData(NamedTuple):
    """The second moments (width + targets + 1, the same) of three sets of rows, which are in order of time."""

    fit: np.ndarray  # the first part of the train set
    held_out: np.ndarray  # its last part, HELD_OUT of it, which chooses the penalty
    test: np.ndarray


def second_moments(x, y):
    """The second moments of the rows (x, y, 1) of x (n, width) and y (n, targets), in float64."""
    rows = np.concatenate([x, y, np.ones((len(x), 1))], axis=1, dtype=np.float64)
    return rows.T @ rows


def ridge_data(train, target, test, test_target, groups=None):
    """RidgeData of all rows, or, with groups, a list with those of each group.

    train, test (rows, width), in order of time; targets (rows, targets); groups: those of the train rows and those of
    the test rows, (rows,) int each.
    """
    later = np.arange(len(train)) >= len(train) - round(HELD_OUT * len(train))

    def of(fit, score):
        parts = ((train, target, fit & ~later), (train, target, fit & later), (test, test_target, score))
        return RidgeData(*(second_moments(x[rows], y[rows]) for x, y, rows in parts))

    if groups is None:
        return of(np.ones(len(train), bool), np.ones(len(test), bool))
    return [of(groups[0] == group, groups[1] == group) for group in np.unique(np.concatenate(groups))]


def ridge_solutions(moments, width, targets):
    """The ridge regressions of the target columns `targets`, a slice, for each of RIDGE_PENALTIES, a list.

    moments: second moments of the rows. A solution (width + 1, targets) holds the weights and below them the intercept;
    the penalty is on the mean squared error.
    """
    x_sum, y_sum, n = moments[-1, :width], moments[-1, :-1][width:][targets], moments[-1, -1]
    square = moments[:width, :width] / n - np.outer(x_sum, x_sum) / n**2
    product = moments[:width, width:-1][:, targets] / n - np.outer(x_sum, y_sum) / n**2
    values, vectors = np.linalg.eigh(square)
    projected = vectors.T @ product
    weights = [vectors @ (projected / (np.maximum(values, 0) + penalty)[:, None]) for penalty in RIDGE_PENALTIES]
    return [np.vstack([w, (y_sum - x_sum @ w) / n]) for w in weights]


def squares_left(solution, moments, width, targets):
    """Σ (y - what a solution predicts)² over the rows that these are the second moments of, and over the targets."""
    columns = np.arange(width, len(moments) - 1)[targets]
    used = moments[np.ix_([*range(width), -1, *columns], [*range(width), -1, *columns])]
    difference = np.vstack([-solution, np.eye(len(columns))])
    return float(np.einsum("at,ab,bt->", difference, used, difference))


def ridge_r2(data, width, targets=slice(None)):
    """R² on the test rows of ridge regressions that are fitted to the train rows, over the target columns together.

    data: RidgeData, or a list with those of groups. Each group then has a regression and a mean of its own, so that
    it counts for nothing which group a row is in. Left out are groups with fewer than two test rows, groups whose
    train rows are all held out or none of them, and groups with no more train rows than columns. None where nothing is
    left or nothing varies.
    """
    left = total = 0.0
    for fit, held_out, test in [data] if isinstance(data, RidgeData) else data:
        few = (fit + held_out)[-1, -1] <= width + 1 or test[-1, -1] < 2
        if width == 0 or few or fit[-1, -1] == 0 or held_out[-1, -1] == 0:
            continue
        errors = [squares_left(w, held_out, width, targets) for w in ridge_solutions(fit, width, targets)]
        chosen = ridge_solutions(fit + held_out, width, targets)[int(np.argmin(errors))]
        left += squares_left(chosen, test, width, targets)
        y, y_sum = np.diag(test)[width:-1][targets], test[-1, width:-1][targets]
        total += (y - y_sum**2 / test[-1, -1]).sum()
    return float(1 - left / total) if total > 1e-9 * (1 + left) else None


# ---------------------------------------------------------------------------------------------------------------
# Means and their errors


def ratio_and_error(numerators, denominators):
    """Σ numerators / Σ denominators over blocks (n,) of data each, and its standard error: (ratio, error).

    The error is that of a ratio estimator (Cochran 1977, Sampling Techniques, section 6.3), from how much the blocks
    differ; None with fewer than two blocks. The blocks have to be long against what their values depend on each other
    over. (None, None) where the denominators sum to 0.
    """
    n, total = len(numerators), np.sum(denominators)
    if total == 0:
        return None, None
    ratio = np.sum(numerators) / total
    residual = np.asarray(numerators) - ratio * np.asarray(denominators)
    error = np.sqrt(n / (n - 1) * np.square(residual).sum()) / abs(total) if n > 1 else None
    return float(ratio), None if error is None else float(error)


# ---------------------------------------------------------------------------------------------------------------
# Clusters


def fit_kmeans(points, n_clusters, seed):
    """A fitted sklearn KMeans of points (n, width), with at most n clusters."""
    from sklearn.cluster import KMeans

    with warnings.catch_warnings(), one_thread():
        # A level may have collapsed to fewer distinct points than there are circles; its low scores show that.
        warnings.filterwarnings("ignore", message="Number of distinct clusters")
        return KMeans(min(n_clusters, len(points)), n_init=KMEANS_RESTARTS, random_state=seed).fit(points)


def majority_vote(labels, n_labels, width):
    """The commonest label among the `width` steps around each step; at both ends there are fewer steps around it.

    labels (n,) int in 0…n_labels - 1; width odd. Ties go to the lowest label.
    """
    n, half = len(labels), width // 2
    low, high = np.maximum(np.arange(n) - half, 0), np.minimum(np.arange(n) + half + 1, n)
    winner, most = np.zeros(n, np.int64), np.full(n, -1)
    for label in range(n_labels):  # one label at a time, so that memory does not grow with n_labels
        total = np.concatenate([[0], np.cumsum(labels == label)])
        count = total[high] - total[low]
        better = count > most
        winner[better], most[better] = label, count[better]
    return winner


def agreement(labels, states, n_labels, prefix):
    """ARI and NMI of cluster labels (n,) against the states (n,), as they are and after a vote over VOTE_STEPS steps.

    Returns {prefix_ari, prefix_nmi, prefix_ari_smooth, prefix_nmi_smooth}: None each without states, or where there is
    one only, with which any single cluster would agree perfectly.
    """
    if states is None or len(np.unique(states)) < 2:
        return dict.fromkeys((f"{prefix}_ari", f"{prefix}_nmi", f"{prefix}_ari_smooth", f"{prefix}_nmi_smooth"))
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    smooth = majority_vote(labels, n_labels, VOTE_STEPS)
    return {f"{prefix}_ari": float(adjusted_rand_score(states, labels)),
            f"{prefix}_nmi": float(normalized_mutual_info_score(states, labels)),
            f"{prefix}_ari_smooth": float(adjusted_rand_score(states, smooth)),
            f"{prefix}_nmi_smooth": float(normalized_mutual_info_score(states, smooth))}


def cluster_scores(values, rows, states, n_circles, seed):
    """`agreement` with the states (n,) of the k-means clusters of values (n, width).

    The centres are fitted on the given rows; every step then gets the cluster of the nearest centre. None for all of it
    without states.
    """
    if states is None:
        return agreement(None, None, 0, "kmeans")
    kmeans = fit_kmeans(values[rows], n_circles, seed)
    return agreement(kmeans.predict(values), states, kmeans.n_clusters, "kmeans")


def embedding_scores(embedding, nearest, shown_states, states, n_circles, seed):
    """What can be told apart in a UMAP: the silhouette of its circles, and `agreement` of its k-means clusters.

    embedding (n_shown, 2) and shown_states (n_shown,) belong to the sampled steps; nearest (n,) int names for every
    step of the series the sampled one that is nearest to it in the level itself, whose cluster it gets. None for all of
    it without states.
    """
    if states is None:
        return {"umap_silhouette": None, **agreement(None, None, 0, "umap")}
    kmeans = fit_kmeans(embedding, n_circles, seed)
    return {"umap_silhouette": silhouette(embedding, shown_states),
            **agreement(kmeans.labels_[nearest], states, kmeans.n_clusters, "umap")}


# ---------------------------------------------------------------------------------------------------------------
# How far apart the circles are


def silhouette(points, states):
    """Mean silhouette of the circles, Euclidean (Rousseeuw 1987).

    points (n, width), states (n,) int, or None. None without states, with fewer than two circles, or when each point
    has one of its own.
    """
    if states is None:
        return None
    from sklearn.metrics import silhouette_score

    n_present = len(np.unique(states))
    return float(silhouette_score(points, states)) if 2 <= n_present < len(points) else None


def eta_squared(values, groups):
    """Share of each column's variance that the group explains: one-way ANOVA, η² = SS_between / SS_total.

    values (n, channels), groups (n,) int from 0; returns (channels,) in [0, 1], 0 for a column that never changes.
    Time steps of one visit resemble each other, so few visits per group push η² up: use it to compare layers and
    signals, not to test a hypothesis.
    """
    values = np.asarray(values, dtype=np.float64)
    centred = values - values.mean(axis=0)
    member = groups[:, None] == np.arange(groups.max() + 1)
    counts = member.sum(axis=0)
    means = (member.T @ centred) / np.maximum(counts, 1)[:, None]
    between, total = counts @ means**2, (centred**2).sum(axis=0)
    varies = np.ptp(values, axis=0) > 0
    return np.where(varies, between / np.where(varies, total, 1), 0).clip(0, 1)
