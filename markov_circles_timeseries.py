"""Make the synthetic series: a Markov chain that wanders between noisy circles in many dimensions.

Writes DIR/data.npz and DIR/config.json (see data/README.md) and, beside them, the figures state_sequence.png,
transition_matrix.png, periods.png, sample_window_{0,1,2}.png and umap.png. The same flags give the same data,
byte for byte; a longer series with the same seed begins with the shorter one. A data.npz that is there already and
holds anything else than these flags make is never replaced.

With --uncompressed, data.npz grows block by block while the series is drawn, so that the series may be larger than
memory. It holds the same values, and every script then reads the parts it needs straight from the file.

Examples:
  python markov_circles_timeseries.py
  python markov_circles_timeseries.py --data-dir data/drift --n-steps 1000000 --drift --drift-rate 0.5 --no-umap
"""

import cli  # first: from here on Ctrl-C ends the script without a traceback

# isort: split
import argparse
import contextlib
import json
import struct
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import circle_process
import dataset
import terminal
from circle_process import BLOCK_VALUES, LARGEST_VALUE, LONGEST_PERIOD
from dataset import Series, load_series, pick
from measures import (
    DIMENSION_K,
    DIMENSION_POINTS,
    dimension_sample,
    distinct,
    knn,
    levina_bickel,
    umap_embedding,
)

figures = cli.imported_when_used("figures")  # matplotlib takes half a second, which --help need not wait for

N_SAMPLE_WINDOWS, SAMPLE_WINDOW = 3, 1000  # how many, and steps in each
FIRST_STEPS = 5000  # at the beginning of the series, drawn larger
MOST_BARS, TIME_BINS = 2000, 1000  # up to so many visits are drawn as a bar each, more as shares of so many stretches
ALIGNMENT = 64  # bytes; where the values of an uncompressed array begin in the file, as in an npy file
FEW_CIRCLES = 12  # up to here each circle gets its tick and each probability its number
FIGURES = ("state_sequence.png", "transition_matrix.png", "periods.png", "umap.png",
           *(f"sample_window_{i}.png" for i in range(N_SAMPLE_WINDOWS)))
UMAP_POINTS, UMAP_NEIGHBORS = 5000, 15


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    series = parser.add_argument_group("series")
    series.add_argument("--n-steps", type=cli.positive_int, default=100_000, metavar="N", help="time steps")
    circles = parser.add_argument_group("circles")
    circles.add_argument("--n-circles", type=cli.positive_int, default=10, metavar="K", help="circles, 2 or more")
    circles.add_argument("--ambient-dim", type=cli.positive_int, default=20, metavar="D", help="features of the series")
    circles.add_argument("--subspace-dim", type=cli.positive_int, metavar="D",
                         help="dimension of the random subspace that holds every circle (default: --ambient-dim)")
    circles.add_argument("--radius-mean", type=cli.positive_float, default=20.0, metavar="R",
                         help="mean radius, data units")
    circles.add_argument("--radius-std", type=cli.non_negative_float, default=2.0, metavar="R",
                         help="standard deviation of the radii, which are clipped to 0.5…1.5 times the mean")
    circles.add_argument("--noise-std", type=cli.non_negative_float, default=2.83, metavar="S",
                         help="standard deviation of the white noise on every feature")
    chain = parser.add_argument_group("visits (the Markov chain)")
    chain.add_argument("--dwell-mean", type=cli.positive_float, default=400.0, metavar="STEPS",
                       help="mean length of a visit, before it is rounded to whole revolutions")
    chain.add_argument("--dwell-std", type=cli.non_negative_float, default=100.0, metavar="STEPS",
                       help="standard deviation of the length of a visit")
    chain.add_argument("--min-period", type=cli.positive_int, default=40, metavar="STEPS",
                       help="steps per revolution of the first circle")
    chain.add_argument("--max-period", type=cli.positive_int, default=400, metavar="STEPS",
                       help="steps per revolution of the last circle")
    variants = parser.add_argument_group("variants")
    variants.add_argument("--drift", action="store_true",
                          help="tilt the plane of even-numbered circles during each visit, each time another way")
    variants.add_argument("--drift-rate", type=cli.non_negative_float, default=0.3, metavar="RAD",
                          help="tilt reached at the end of a visit, with --drift")
    variants.add_argument("--center-walk-std", type=cli.non_negative_float, default=0.0, metavar="S",
                          help="standard deviation per step and feature of the random walk of the common centre")
    cli.add_drawing(parser)
    files = parser.add_argument_group("files")
    cli.add_data_dir(files, own=False)
    files.add_argument("--uncompressed", action="store_true",
                       help="store data.npz uncompressed and write it while it is drawn: for series larger than memory")
    files.add_argument("--no-umap", action="store_true", help="skip the UMAP figure, by far the slowest part")
    cli.add_seed(series)
    args = parser.parse_args(argv)
    try:
        check_config(config_of(args))
    except cli.UserError as error:
        parser.error(error)
    return args


def config_of(args):
    """The flags that shape the data, as the dict that config.json holds."""
    others = ("data_dir", "no_umap", "uncompressed", "format", "style")
    config = {name: value for name, value in vars(args).items() if name not in others}
    if config["subspace_dim"] is None:
        config["subspace_dim"] = config["ambient_dim"]
    return config


def check_config(config):
    """Raise UserError when the flags contradict each other."""
    c = argparse.Namespace(**config)
    n_values = c.n_steps * c.ambient_dim + c.n_circles * (c.n_circles + 2 * c.ambient_dim) + c.ambient_dim**2
    problems = [
        (c.n_steps < 2, "--n-steps must be 2 or more"),
        (c.n_circles < 2, "--n-circles must be 2 or more: the chain never stays where it is"),
        (c.ambient_dim < 2, "--ambient-dim must be 2 or more: a circle needs a plane"),
        (c.subspace_dim < 2, "--subspace-dim must be 2 or more: a circle needs a plane"),
        (c.subspace_dim > c.ambient_dim,
         f"--subspace-dim {c.subspace_dim} is larger than --ambient-dim {c.ambient_dim}"),
        (c.min_period < 2, "--min-period must be 2 or more: a circle of one step doesn't move"),
        (c.min_period > c.max_period,
         f"--min-period {c.min_period} is larger than --max-period {c.max_period}"),
        (c.max_period > LONGEST_PERIOD, f"--max-period must be {LONGEST_PERIOD} or less"),
        (c.drift and c.subspace_dim < 3, "--drift needs a --subspace-dim of 3 or more: a plane tilts out of itself"),
        (max(c.radius_mean, c.radius_std, c.noise_std, c.center_walk_std) > LARGEST_VALUE,
         f"radii and standard deviations must be {LARGEST_VALUE:g} or less"),
        (8 * n_values > sys.maxsize, "no memory holds that many steps, circles or dimensions; use smaller numbers"),
    ]
    for wrong, message in problems:
        if wrong:
            raise cli.UserError(message)


def generate(config, block_values=BLOCK_VALUES):
    """Draw a series; returns a dataset.Series. config: the keys of config.json.

    The memory taken is that of the series. Raises UserError when the flags contradict each other.
    """
    check_config(config)
    process = circle_process.draw_process(config)
    X, states, thetas = circle_process.draw_series(process, config, config["n_steps"], config["seed"], block_values)
    return Series(X=X, states=states, thetas=thetas, process=process, config=dict(config))


# ------------------------------------------------------------------------------------------------- the files


@contextlib.contextmanager
def writing_data(config, data_dir):
    """Give the path to write data.npz to, and write config.json with it.

    Both files are replaced together when the block ends well: no reader ever finds a new data.npz beside an old
    config.json, or the reverse.
    """
    config_file = data_dir / "config.json"
    with cli.writing(config_file) as config_part:
        config_part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        with cli.writing(data_dir / "data.npz") as data_part:
            yield data_part
            # Killed between the two replacements, this leaves data without a config.json, and the scripts say that it
            # is missing. Beside an older config.json they would silently compute with wrong parameters.
            config_file.unlink(missing_ok=True)
    print(f"wrote {data_dir / 'data.npz'} and config.json: {config['n_steps']:,} steps x {config['ambient_dim']} "
          "features")


def refuse_other_data(config, data_dir):
    """Whether data_dir has the data already that `config` makes. Raises UserError where it has others: a data.npz that
    somebody else's flags, or somebody's own hands, have made is never replaced."""
    path = data_dir / "data.npz"
    if not path.exists():
        return False
    try:
        older = dataset.load_config(data_dir)
        if all(config[name] == value for name, value in older.items() if name in config) and holds_data(path, config):
            return True
    except cli.UserError:
        pass  # it can't be read: then nobody knows what it holds
    raise cli.UserError(f"{path} exists already and is not what these flags make; choose another --data-dir, or move "
                        "it elsewhere first")


@terminal.busy("comparing with the data that are there")
def holds_data(path, config):
    """Whether the npz at `path` holds exactly the arrays that `config` makes; they are drawn anew, block by block."""
    arrays, process = dataset.read_npz(path, lambda names: names), circle_process.draw_process(config)
    n_steps, names = config["n_steps"], dataset.ARRAYS[len(dataset.LONG_ARRAYS):]
    if set(arrays) != set(dataset.ARRAYS) or arrays["X"].shape != (n_steps, config["ambient_dim"]) or not all(
            np.array_equal(arrays[name], getattr(process, name)) for name in names):
        return False
    plan = circle_process.plan_series(process, config, n_steps, config["seed"])
    for steps, X in circle_process.draw_points(plan, BLOCK_VALUES):
        states, thetas, _, _ = circle_process.hidden_states(plan, steps)
        if not all(np.array_equal(arrays[name][steps], values) for name, values in (
                ("X", np.asarray(X, np.float32)), ("states", states), ("thetas", thetas))):
            return False
    return True


def save(series, data_dir):
    """Write a series as one compressed data.npz, and its config.json."""
    process = series.process
    with writing_data(series.config, data_dir) as part, terminal.busy("writing data.npz"):
        np.savez_compressed(part, X=series.X, states=series.states, thetas=series.thetas,
                            transition_matrix=process.transition_matrix, radii=process.radii,
                            entry_angles=process.entry_angles, periods=process.periods, planes=process.planes)


def save_uncompressed(config, data_dir, block_values=BLOCK_VALUES):
    """Draw a series straight into an uncompressed data.npz, and write its config.json.

    The values are those of `generate`; the memory taken is that of the visits and one block. A zip file takes one
    array after the other, so the circles and phases, which X needs too, are computed anew for their own arrays: that is
    cheap beside drawing the noise.
    """
    check_config(config)
    n_steps, dim = config["n_steps"], config["ambient_dim"]
    process = circle_process.draw_process(config)
    plan = circle_process.plan_series(process, config, n_steps, config["seed"])

    def hidden(i):
        blocks = circle_process.step_blocks(plan, block_values)
        return (circle_process.hidden_states(plan, steps)[i] for steps in blocks)

    with (writing_data(config, data_dir) as path, open(path, "wb") as file,
          zipfile.ZipFile(file, "w") as archive, terminal.busy("drawing the series")):
        points = circle_process.draw_points(plan, block_values)
        write_member(archive, file, "X", (n_steps, dim), np.float32, (X for _, X in points))
        write_member(archive, file, "states", (n_steps,), np.int64, hidden(0))
        write_member(archive, file, "thetas", (n_steps,), np.float64, hidden(1))
        for name in ("transition_matrix", "radii", "entry_angles", "periods", "planes"):
            values = getattr(process, name)
            write_member(archive, file, name, values.shape, values.dtype, [values])


def write_member(archive, file, name, shape, dtype, values):
    """Add an uncompressed array to the zip archive being written to `file`; values: consecutive blocks of its rows.

    The npy header is padded so that the values begin at a multiple of ALIGNMENT in the file and can be used where
    they lie. Format: numpy.lib.format, version 1.0.
    """
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode("latin1")
    magic = np.lib.format.magic(1, 0)
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        length = len(text) + 1
        length += -(file.tell() + len(magic) + 2 + length) % ALIGNMENT
        member.write(magic + struct.pack("<H", length) + text.ljust(length - 1) + b"\n")
        for block in values:
            member.write(np.ascontiguousarray(block, dtype))


# ------------------------------------------------------------------------------------------------- the summary


def visit_statistics(series):
    """For each circle: steps (K,), visits (K,), and mean and std of the dwell (K,) in steps, NaN where there is none.

    The last visit, which the end of the series cuts, counts as a visit but not for the dwell.
    """
    K = series.n_circles
    circles, _, lengths = dataset.visits(series.states)
    n_steps = np.zeros(K, np.int64)
    np.add.at(n_steps, circles, lengths)
    dwells = [lengths[:-1][circles[:-1] == i] for i in range(K)]
    return (n_steps, np.bincount(circles, minlength=K),
            np.array([d.mean() if len(d) else np.nan for d in dwells]),
            np.array([d.std(ddof=1) if len(d) > 1 else np.nan for d in dwells]))


def time_shares(visits, n_circles, n_bins):
    """The share of each of n_bins equal stretches of time that is spent on each circle: (n_bins, n_circles).

    visits: circles, first steps and lengths of all visits, as from `dataset.visits`.
    """
    circles, starts, lengths = visits
    ends = np.append(starts, starts[-1] + lengths[-1])
    edges = np.linspace(0, ends[-1], n_bins + 1)
    # The time spent on a circle until now grows linearly within each visit: its values at the edges of the stretches.
    spent = [np.interp(edges, ends, np.concatenate([[0], np.cumsum(np.where(circles == i, lengths, 0))]))
             for i in range(n_circles)]
    return np.diff(spent).T / np.diff(edges)[:, None]


def summary_table(series, statistics):
    """The text table of `visit_statistics`, one row per circle."""
    def steps(x):
        return "–" if np.isnan(x) else f"{x:,.0f}"

    rows = []
    for i, (n_steps, n_visits, dwell_mean, dwell_std) in enumerate(zip(*statistics, strict=True)):
        rows.append([i, f"{series.process.radii[i]:.2f}", series.process.periods[i], f"{n_steps:,}",
                     f"{100 * n_steps / series.n_steps:.1f} %", f"{n_visits:,}", steps(dwell_mean), steps(dwell_std)])
    return cli.table(["circle", "radius", "period", "steps", "share", "visits", "dwell mean", "dwell std"], rows)


# ------------------------------------------------------------------------------------------------- the figures


def visit_bars(ax, visits, n_steps, n_circles):
    """A bar per visit at the height of its circle; visits as from `dataset.visits`."""
    circles, starts, lengths = visits
    ax.hlines(circles, starts, starts + lengths, colors=figures.circle_colors(n_circles)[circles], linewidths=5)
    ax.set(ylabel="circle", xlim=(0, n_steps), ylim=(-0.7, n_circles - 0.3))
    if n_circles <= FEW_CIRCLES:
        ax.set_yticks(range(n_circles))


def time_share_heatmap(fig, ax, shares, n_steps):
    """The shares (n_bins, n_circles) of `time_shares`: time to the right, circles upwards, darker for more time."""
    n_bins, n_circles = shares.shape
    image = ax.imshow(shares.T, aspect="auto", origin="lower", interpolation="nearest", cmap="Greys",
                      extent=(0, n_steps, -0.5, n_circles - 0.5))
    fig.colorbar(image, ax=ax, pad=0.01, fraction=0.03, label=f"share of {n_steps / n_bins:,.0f} steps")
    ax.set(ylabel="circle")
    if n_circles <= FEW_CIRCLES:
        ax.set_yticks(range(n_circles))


@cli.in_style
def draw_state_sequence(series):
    """The circles over time, at the beginning of the series and over all of it: a Figure."""
    visits = dataset.visits(series.states)
    n = min(FIRST_STEPS, series.n_steps)
    fig, axes = figures.new_figure(3, 1, panel=(10, 2.2), height_ratios=[1, 6, 6])
    strip, start, whole = axes[:, 0]
    figures.state_strip(strip, series.states[:n], series.n_circles)
    strip.set_xlim(0, n)
    strip.set_title(f"The first {n:,} steps", loc="left")
    visit_bars(start, dataset.visits(series.states[:n]), n, series.n_circles)
    if len(visits[0]) <= MOST_BARS:
        visit_bars(whole, visits, series.n_steps, series.n_circles)
    else:
        shares = time_shares(visits, series.n_circles, min(TIME_BINS, series.n_steps))
        time_share_heatmap(fig, whole, shares, series.n_steps)
    whole.set_title(f"All {series.n_steps:,} steps", loc="left")
    for ax in (start, whole):
        ax.set_xlabel("time step")
    return fig


@cli.in_style
def draw_transition_matrix(P):
    """The transition matrix P (K, K) with its numbers, impossible transitions left white: a Figure."""
    K = len(P)
    fig, axes = figures.new_figure(panel=(6, 5.2))
    ax = axes[0, 0]
    image = ax.imshow(np.ma.masked_equal(P, 0), cmap="viridis", vmin=0, vmax=P.max())
    fig.colorbar(image, ax=ax, label="probability")
    if K <= FEW_CIRCLES:
        for i, j in zip(*np.nonzero(P), strict=True):
            # The text lies inside its cell: the layout need not measure it, which takes long.
            ax.text(j, i, f"{P[i, j]:.2f}", ha="center", va="center", fontsize=8, in_layout=False,
                    color="black" if P[i, j] > 0.6 * P.max() else "white")
        ax.set_xticks(range(K))
        ax.set_yticks(range(K))
    ax.set(title="Where the chain goes next", xlabel="next circle", ylabel="circle")
    return fig


@cli.in_style
def draw_periods(series, statistics):
    """Period, radius and dwell of each circle as bars: a Figure."""
    _, _, dwell_mean, dwell_std = statistics
    circles, colors = np.arange(series.n_circles), figures.circle_colors(series.n_circles)
    fig, axes = figures.new_figure(1, 3, panel=(4, 3.2), title="Period, radius and dwell time of each circle")
    panels = [(series.process.periods, None, "period (steps per revolution)"),
              (series.process.radii, None, "radius (data units)"),
              (np.nan_to_num(dwell_mean), np.nan_to_num(dwell_std), "dwell of a visit (steps), mean ± std")]
    for ax, (values, errors, label) in zip(axes[0], panels, strict=True):
        ax.bar(circles, values, yerr=errors, color=colors, capsize=3)
        ax.set(xlabel="circle", ylabel=label)
        if series.n_circles <= FEW_CIRCLES:
            ax.set_xticks(circles)
        else:
            ax.xaxis.get_major_locator().set_params(integer=True)
    return fig


@cli.in_style
def draw_sample_window(series, first, n):
    """The features of n steps from `first` on, under their circles: a Figure."""
    fig, axes = figures.new_figure(2, 1, panel=(10, 2.3), height_ratios=[1, 10], sharex=True,
                                   title=f"Steps {first:,} to {first + n - 1:,} of the series")
    strip, heat = axes[:, 0]
    shown = slice(first, first + n)
    figures.state_strip(strip, series.states[shown], series.n_circles, first)
    figures.heatmap_panel(fig, heat, series.X[shown], first, ylabel="feature", unit="data units", cmap="RdBu_r",
                          symmetric=True)
    heat.set_xlabel("time step")
    figures.circle_legend(fig, series.n_circles, np.unique(series.states[shown]))
    return fig


@cli.in_style
def draw_umap(embedding, states, steps, n_circles, dimension, n_steps):
    """The embedding (n, 2) of the points at `steps` (n,), coloured by circle, states (n,), and by time: a Figure.

    dimension: of DIMENSION_POINTS of the n_steps steps of the series, or of all, over DIMENSION_K neighbours.
    """
    fig, axes = figures.new_figure(1, 2, panel=(6, 5.2), title=(
        f"UMAP of {len(embedding):,} points; "
        f"Levina–Bickel dimension {dimension:.1f} ({min(DIMENSION_POINTS, n_steps):,} points, k = {DIMENSION_K})"))
    by_circle, by_time = axes[0]
    figures.scatter_panel(by_circle, embedding, colors=figures.circle_colors(n_circles)[states], title="by circle")
    figures.circle_legend(by_circle, n_circles, np.unique(states), loc="upper left", bbox_to_anchor=(1, 1))
    dots = figures.scatter_panel(by_time, embedding, values=steps, title="by time")
    fig.colorbar(dots, ax=by_time, label="time step", fraction=0.04).solids.set_alpha(1)
    return fig


def draw_all(series, statistics):
    """{file name: Figure} of all figures but the UMAP."""
    n = min(SAMPLE_WINDOW, series.n_steps)
    drawn = {"state_sequence.png": draw_state_sequence(series),
             "transition_matrix.png": draw_transition_matrix(series.process.transition_matrix),
             "periods.png": draw_periods(series, statistics)}
    for i, first in enumerate(np.linspace(0, series.n_steps - n, N_SAMPLE_WINDOWS).astype(int).tolist()):
        drawn[f"sample_window_{i}.png"] = draw_sample_window(series, first, n)
    return {name: figures.laid_out(fig) for name, fig in drawn.items()}


def save_umap(series, data_dir):
    """Embed a random part of the points and write umap.png. Raises UserError when there are too few different ones."""
    seed = series.config["seed"]
    steps = dimension_sample(series.n_steps, DIMENSION_POINTS, seed)
    sample = pick(series.X, steps)
    steps, points = steps[:UMAP_POINTS], sample[:UMAP_POINTS]
    if len(distinct(sample)) <= DIMENSION_K:
        raise cli.UserError(f"umap.png needs more than {DIMENSION_K} different points; the data are written, and "
                            "--no-umap leaves this figure out")
    with terminal.busy(f"UMAP of {len(points):,} points"):
        dimension = levina_bickel(sample, [DIMENSION_K])[DIMENSION_K]
        embedding = umap_embedding(points, knn(points, min(UMAP_NEIGHBORS, len(points)) - 1), seed)
    fig = draw_umap(embedding, pick(series.states, steps), steps, series.n_circles, dimension, series.n_steps)
    figures.save(fig, data_dir / "umap.png")


# ------------------------------------------------------------------------------------------------- the script


def main(args):
    data_dir, config = cli.output_folder(args.data_dir), config_of(args)
    if not refuse_other_data(config, data_dir):
        for name in FIGURES:  # of data that are gone
            (data_dir / name).unlink(missing_ok=True)
    if args.uncompressed:
        save_uncompressed(config, data_dir)
        with terminal.busy("reading what was written, and drawing figures"):
            series = load_series(data_dir)
            statistics = visit_statistics(series)
            drawn = draw_all(series, statistics)
    else:
        with terminal.busy("drawing the series"):
            series = generate(config)
        statistics = visit_statistics(series)
        with ThreadPoolExecutor(1) as pool:  # the figures are laid out while the data are compressed
            drawing = pool.submit(draw_all, series, statistics)
            save(series, data_dir)
        with terminal.busy("drawing figures"):
            drawn = drawing.result()
    print(summary_table(series, statistics))
    figures.save_all({data_dir / name: fig for name, fig in drawn.items()})
    if not args.no_umap:
        save_umap(series, data_dir)


if __name__ == "__main__":
    cli.start()
    cli.run(main, parse_args())
