"""Estimate the intrinsic dimension of the data, for all points and for each circle, over k nearest neighbours.

Reads DIR/data.npz; writes dimension.json and dimension.png to the save folder. The maximum-likelihood estimator of
Levina & Bickel (NeurIPS 2004), averaged over points as MacKay & Ghahramani (2005) correct it.

Examples:
  python estimate_dimension.py
  python estimate_dimension.py --data-dir data --points 50000 --k 10 20 50 100 200 --save-dir plots
"""

import cli


def parse_args(argv=None):
    p = cli.parser(__doc__)
    estimate = p.add_argument_group("estimate")
    estimate.add_argument("--points", type=cli.positive_int, default=20_000, metavar="N",
                          help="time steps drawn at random without replacement; all when there are fewer")
    estimate.add_argument("--k", type=cli.positive_int, nargs="+", default=[5, 10, 20, 50, 100], metavar="K",
                          help="numbers of nearest neighbours, 2 or more each")
    cli.add_seed(estimate)
    files = p.add_argument_group("files")
    cli.add_data_dir(files)
    cli.add_save_dir(files)
    args = p.parse_args(argv)
    if min(args.k) < 2:
        p.error("--k must be 2 or more: one neighbour has no distance to compare with")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the slow imports: --help and a bad flag answer at once

import json  # noqa: E402
import warnings  # noqa: E402

import numpy as np  # noqa: E402

BLOCK_VALUES = 2**22  # neighbour differences held at a time


def knn(points, k):
    """The k nearest neighbours of every point, itself left out: (distances (n, k), indices (n, k)), nearest first.

    points (n, dim); Euclidean distances, float64. All pairs are compared, as BLAS products in parallel: in 20
    dimensions that is twice as fast as a tree. Raises UserError for fewer than k + 1 points, NaN or infinity.
    """
    from sklearn.neighbors import NearestNeighbors  # 2 s: only when it is used

    points = np.asarray(points)
    if len(points) < k + 1:
        raise cli.UserError(f"{k} neighbours need {k + 1} points, and there are {len(points)}; "
                            "use a smaller k or more points")
    if not np.isfinite(points).all():
        raise cli.UserError("the points hold NaN or infinity")
    indices = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(points).kneighbors(return_distance=False)
    # The products lose the digits of a small distance between points far from the origin: take it again from the
    # differences.
    distances = np.empty((len(points), k))
    block = max(1, BLOCK_VALUES // (k * points.shape[1]))
    for i in range(0, len(points), block):
        part = slice(i, i + block)
        difference = points[indices[part]].astype(np.float64) - points[part, None]
        distances[part] = np.sqrt(np.einsum("nkd,nkd->nk", difference, difference))
    order = np.argsort(distances, axis=1, kind="stable")
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(indices, order, axis=1)


def distinct(points):
    """The points (n, dim) without repeats, in another order."""
    return np.unique(points, axis=0)


def dimension_from_distances(distances, ks):
    """Maximum-likelihood dimension for each k: {k: dimension}.

    distances (n, max(ks) or more), positive, nearest first: T_1(x) <= T_2(x) <= … from each point x.

        1 / m_k(x) = 1/(k-1) Σ_{j<k} log(T_k(x) / T_j(x))       Levina & Bickel 2004, eq. 8
        1 / m_k    = mean over x of 1 / m_k(x)                   MacKay & Ghahramani 2005

    The mean of the inverses pools the likelihoods of all points; the mean of m_k(x) itself would be biased upwards at
    small k. The factor is 1/(k-1), that of the likelihood, not the 1/(k-2) that unbiases a single m_k(x).
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


def umap_embedding(points, graph, seed):
    """Two UMAP coordinates (n, 2) of points (n, width); deterministic for a seed.

    graph: distances and indices (n, k) of the nearest neighbours, as `knn` gives them, without the point itself; UMAP's
    n_neighbors is k + 1. McInnes, Healy & Melville 2018, arXiv 1802.03426.
    """
    import umap  # slow to import and compile: only where a UMAP is drawn

    # UMAP counts a point as its own first neighbour.
    distances = np.pad(graph[0], ((0, 0), (1, 0))).astype(np.float32)
    indices = np.concatenate([np.arange(len(points))[:, None], graph[1]], axis=1)
    with warnings.catch_warnings():
        # It warns that new points can't be added to the embedding, which nobody does here.
        warnings.filterwarnings("ignore", message="precomputed_knn", category=UserWarning)
        return umap.UMAP(n_neighbors=indices.shape[1], random_state=seed, n_jobs=1, force_approximation_algorithm=True,
                         precomputed_knn=(indices, distances)).fit_transform(points)


def dimension_by_circle(points, states, n_circles, ks):
    """One entry for all points and one for each circle, whose neighbours are sought among its own points only.

    Returns a list of n_circles + 1 dicts: name, points, distinct, dimension {k: dimension or None}, None where there
    are k or fewer distinct points.
    """
    groups = [("all", points)] + [(i, points[states == i]) for i in range(n_circles)]
    entries = []
    for name, group in groups:
        unique = distinct(group)
        possible = [k for k in ks if k < len(unique)]
        found = levina_bickel(unique, possible) if possible else {}
        entries.append({"name": name, "points": len(group), "distinct": len(unique),
                        "dimension": {k: found.get(k) for k in ks}})
    return entries


def dimension_table(entries, ks):
    rows = [[entry["name"], f"{entry['points']:,}",
             *("–" if entry["dimension"][k] is None else f"{entry['dimension'][k]:.2f}" for k in ks)]
            for entry in entries]
    return cli.table(["circle", "points", *(f"k = {k}" for k in ks)], rows)


def plot_dimension(entries, ks, ambient_dim, title):
    import figures

    fig, axes = figures.new_figure(panel=(7, 4.5))
    ax = axes[0, 0]
    values = np.array([[np.nan if entry["dimension"][k] is None else entry["dimension"][k] for k in ks]
                       for entry in entries])
    ax.plot(ks, values[0], color="black", marker="o", markersize=8, linewidth=4.5, label="all")
    for entry, line, color in zip(entries[1:], values[1:], figures.circle_colors(len(entries) - 1), strict=True):
        ax.plot(ks, line, color=color, marker="o", markersize=4, label=str(entry["name"]))
    top = np.nanmax(values)
    if ambient_dim < 2 * top:
        top = max(top, ambient_dim)
        ax.axhline(ambient_dim, color="0.6", linestyle=":", linewidth=1)
        ax.annotate(f"ambient dimension {ambient_dim}", (1, ambient_dim), (-2, 3), ha="right", color="0.4",
                    xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=9)
    ax.set_xscale("log")
    ax.set_xticks(ks, [str(k) for k in ks])
    ax.minorticks_off()
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.set(title=title, xlabel="nearest neighbours k", ylabel="Levina–Bickel dimension", ylim=(0, 1.1 * top))
    fig.legend(loc="outside right upper", title="circle", ncols=1 + (len(entries) - 1) // 15)
    return fig


def main(args):
    import figures
    from dataset import load_series, pick

    save_dir = cli.output_folder(args.save_dir)
    series = load_series(args.data_dir)
    ks = sorted(set(args.k))
    n = min(args.points, series.n_steps)
    steps = np.random.default_rng(args.seed).choice(series.n_steps, n, replace=False)
    entries = dimension_by_circle(pick(series.X, steps), pick(series.states, steps), series.n_circles, ks)
    n_distinct = entries[0]["distinct"]
    if n_distinct <= ks[-1]:
        raise cli.UserError(f"--k {ks[-1]} needs {ks[-1] + 1} different points, and there are {n_distinct}; "
                            "use a smaller --k or more --points")
    if n_distinct < n:
        print(f"{n - n_distinct:,} of {n:,} points repeat another and count once")
    print(dimension_table(entries, ks))
    report = {"points": n, "seed": args.seed, "k": ks, "entries": entries}
    cli.write_text(save_dir / "dimension.json", json.dumps(report, indent=2) + "\n")
    print(f"wrote {save_dir / 'dimension.json'}")
    figures.save(plot_dimension(entries, ks, series.feature_dim, f"Intrinsic dimension of {n:,} points"),
                 save_dir / "dimension.png")


if __name__ == "__main__":
    cli.run(main, ARGS)
