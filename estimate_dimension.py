"""Estimate the intrinsic dimension of the data, for all points and for each circle, over k nearest neighbours.

Reads DIR/data.npz or your own --data; writes dimension.json and dimension.png to the save folder, with flags that
aren't the default and the name of the data where these aren't data/, as in dimension_points50000_subspace4.json. The
maximum-likelihood estimator of Levina & Bickel (NeurIPS 2004), averaged over points as MacKay & Ghahramani (2005)
correct it; and TwoNN (Facco et al. 2017), from the two nearest neighbours alone.

What they find depends on the scale: on the number of points and of neighbours, and on the units of the axes, of which
whitened points have none. So compare dimensions only at one scale. evaluate_representations.py and the title of the
generator's umap.png measure 10,000 time steps, the same ones for the same seed, over 30 neighbours.

Examples:
  python estimate_dimension.py
  python estimate_dimension.py --data-dir data --points 50000 --k 10 20 50 100 200 --save-dir plots
"""

import cli  # first: from here on Ctrl-C ends the script without a traceback

# isort: split
import numpy as np

import dataset
import terminal
from measures import (
    DIMENSION_KS,
    DIMENSION_POINTS,
    dimension_sample,
    dimensions,
    distinct,
    levina_bickel,
    umap_embedding,
    whitened,
)

figures = cli.imported_when_used("figures")  # matplotlib takes half a second, which --help need not wait for

__all__ = ["levina_bickel", "umap_embedding"]  # notebooks import these two from here


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    estimate = parser.add_argument_group("estimate")
    estimate.add_argument("--points", type=cli.positive_int, default=DIMENSION_POINTS, metavar="N",
                          help="time steps drawn at random without replacement; all when there are fewer")
    estimate.add_argument("--k", type=cli.positive_int, nargs="+", default=[*DIMENSION_KS], metavar="K",
                          help="numbers of nearest neighbours, each 2 or more")
    cli.add_seed(estimate)
    cli.add_drawing(parser)
    files = parser.add_argument_group("files")
    cli.add_data_dir(files)
    cli.add_save_dir(files)
    args = parser.parse_args(argv)
    args.k = sorted(set(args.k))
    args.name = cli.named_after("dimension", parser, args)
    if min(args.k) < 2:
        parser.error("--k must be 2 or more: one neighbour has no distance to compare with")
    return args


def dimension_by_circle(points, states, n_circles, ks):
    """The dimension of all points (n, dim), and of each circle when neighbours are sought among its own points only.

    states (n,) int, or None without labels: then of all points alone. Returns a list of n_circles + 1 dicts with name
    ("all" or the circle), points and distinct (how many), dimension {k: dimension or None}, None where there are k or
    fewer distinct points, and two_nn, the TwoNN dimension. That of all points has a "whitened" too, the same of the
    points in units of their principal axes, as `measures.dimensions` gives it.
    """
    groups = [("all", points)] + [(i, points[states == i]) for i in range(n_circles or 0)]
    entries = []
    with terminal.Bar(len(groups), desc="dimension") as bar:
        for name, group in groups:
            unique = distinct(group)
            found = dimensions(unique, ks)
            entries.append({"name": name, "points": len(group), "distinct": len(unique),
                            "dimension": {k: found[k] for k in ks}, "two_nn": found["two_nn"]})
            bar.update()
    entries[0]["whitened"] = dimensions(whitened(points, points[:0])[0], ks)
    return entries


def dimension_table(entries, ks):
    """The entries of dimension_by_circle as text, one row per entry and one column per k."""
    def row(name, n, values):
        return [name, f"{n:,}", *("–" if value is None else f"{value:.2f}" for value in values)]

    rows = [row(entry["name"], entry["points"], [*(entry["dimension"][k] for k in ks), entry["two_nn"]])
            for entry in entries]
    white = entries[0]["whitened"]
    rows.insert(1, row("all, whitened", entries[0]["points"], [*(white[k] for k in ks), white["two_nn"]]))
    return cli.table(["circle", "points", *(f"k = {k}" for k in ks), "TwoNN"], rows)


@cli.in_style
def draw_dimension(entries, ks, ambient_dim, title):
    """Dimension against k, one line per entry of dimension_by_circle; a Figure.

    The ambient dimension is drawn too, unless that would squeeze the lines into the lower half.
    """
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
    if len(entries) > 1:
        fig.legend(loc="outside right upper", title="circle", ncols=1 + (len(entries) - 1) // 15)
    return fig


def main(args):
    save_dir, name = cli.output_folder(args.save_dir), args.name
    series = dataset.load_series(args.data_dir)
    ks = args.k
    n = min(args.points, series.n_steps)
    steps = dimension_sample(series.n_steps, n, args.seed)
    points = dataset.pick(series.X, steps)
    states = None if series.states is None else dataset.pick(series.states, steps)
    if states is None:
        print("these data have no labels: the dimension of all points alone")
    entries = dimension_by_circle(points, states, series.n_circles, ks)
    n_distinct = entries[0]["distinct"]
    if n_distinct <= ks[-1]:
        raise cli.UserError(f"--k {ks[-1]} needs {ks[-1] + 1} different points, and there are {n_distinct}; "
                            "use a smaller --k or more --points")
    if n_distinct < n:
        print(f"{n - n_distinct:,} of {cli.count(n, 'point')} repeat another and count once")
    print(dimension_table(entries, ks))
    report = {"points": n, "seed": args.seed, "k": ks, "entries": entries}
    cli.write_json(save_dir / f"{name}.json", report)
    print(f"wrote {save_dir / name}.json")
    figures.save(draw_dimension(entries, ks, series.feature_dim, f"Intrinsic dimension of {n:,} points"),
                 save_dir / f"{name}.png")


if __name__ == "__main__":
    cli.start()
    cli.run(main, parse_args())
