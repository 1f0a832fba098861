"""Make the synthetic series: a Markov chain that wanders between noisy circles in many dimensions.

Writes DIR/data.npz and DIR/config.json (see data/README.md) and, beside them, the figures state_sequence.png,
transition_matrix.png, periods.png, sample_window_{0,1,2}.png and umap.png. The same flags give the same data,
byte for byte; a longer series with the same seed begins with the shorter one.

A series larger than memory is written with --uncompressed: data.npz grows block by block while the series is drawn,
with the same values in it, and every script then reads the parts it needs straight from the file.

Examples:
  python markov_circles_timeseries.py
  python markov_circles_timeseries.py --data-dir data/drift --n-steps 1000000 --drift --drift-rate 0.5 --no-umap
"""

import argparse
import sys

import cli

# Visits are cut at this many steps, far beyond any series: sums of visits stay exact in int64.
LONGEST_VISIT = 2**40
# Larger numbers would leave float32, in which X is stored.
LARGEST_VALUE = 1e30


def parse_args(argv=None):
    p = cli.parser(__doc__)
    series = p.add_argument_group("series")
    series.add_argument("--n-steps", type=cli.positive_int, default=100_000, metavar="N", help="time steps")
    circles = p.add_argument_group("circles")
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
    chain = p.add_argument_group("visits (the Markov chain)")
    chain.add_argument("--dwell-mean", type=cli.positive_float, default=400.0, metavar="STEPS",
                       help="mean length of a visit, before it is rounded to whole revolutions")
    chain.add_argument("--dwell-std", type=cli.non_negative_float, default=100.0, metavar="STEPS",
                       help="standard deviation of the length of a visit")
    chain.add_argument("--min-period", type=cli.positive_int, default=40, metavar="STEPS",
                       help="steps a revolution of the first circle")
    chain.add_argument("--max-period", type=cli.positive_int, default=400, metavar="STEPS",
                       help="steps a revolution of the last circle")
    variants = p.add_argument_group("variants")
    variants.add_argument("--drift", action="store_true",
                          help="tilt the plane of even-numbered circles during each visit, anew at the next")
    variants.add_argument("--drift-rate", type=cli.non_negative_float, default=0.3, metavar="RAD",
                          help="tilt reached at the end of a visit, with --drift")
    variants.add_argument("--center-walk-std", type=cli.non_negative_float, default=0.0, metavar="S",
                          help="standard deviation, a step and feature, of the random walk of the common centre")
    files = p.add_argument_group("files")
    cli.add_data_dir(files)
    files.add_argument("--uncompressed", action="store_true",
                       help="store data.npz uncompressed and write it while it is drawn: for series larger than memory")
    files.add_argument("--no-umap", action="store_true", help="skip the UMAP figure, by far the slowest part")
    cli.add_seed(series)
    args = p.parse_args(argv)
    try:
        check_config(config_of(args))
    except cli.UserError as error:
        p.error(error)
    return args


def config_of(args):
    """The flags that shape the data, as the dict that config.json holds."""
    config = {name: value for name, value in vars(args).items() if name not in ("data_dir", "no_umap", "uncompressed")}
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
        (c.max_period > LONGEST_VISIT, f"--max-period must be {LONGEST_VISIT} or less"),
        (c.drift and c.subspace_dim < 3, "--drift needs a --subspace-dim of 3 or more: a plane tilts out of itself"),
        (max(c.radius_mean, c.radius_std, c.noise_std, c.center_walk_std) > LARGEST_VALUE,
         f"radii and standard deviations must be {LARGEST_VALUE:g} or less"),
        (8 * n_values > sys.maxsize, "no memory holds that many steps, circles or dimensions; use smaller numbers"),
    ]
    for wrong, message in problems:
        if wrong:
            raise cli.UserError(message)


if __name__ == "__main__":
    ARGS = parse_args()  # before the slow imports: --help and a bad flag answer at once

import contextlib  # noqa: E402
import json  # noqa: E402
import struct  # noqa: E402
import zipfile  # noqa: E402
from bisect import bisect_right  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from dataclasses import dataclass  # noqa: E402

import numpy as np  # noqa: E402

import dataset  # noqa: E402
import figures  # noqa: E402
from dataset import Series, load_series, pick  # noqa: E402
from measures import distinct, knn, levina_bickel, umap_embedding  # noqa: E402

BLOCK_VALUES = 2**17  # values of X filled at a time: the temporaries stay in the cache
VISITS_A_ROUND = 1024
N_SAMPLE_WINDOWS, SAMPLE_WINDOW = 3, 1000
FIRST_STEPS = 5000
MOST_BARS, TIME_BINS = 2000, 1000  # visits drawn as bars each; beyond, the stretches of time whose shares are drawn
ALIGNMENT = 64  # bytes; where the values of an uncompressed array begin in the file, as in an npy file
FEW_CIRCLES = 12  # up to here each circle gets its tick and each probability its number
UMAP_POINTS, UMAP_NEIGHBORS, DIMENSION_K = 5000, 15, 20


# ---------------------------------------------------------------------------------------------------- the process

@dataclass
class Process:
    """K circles and the chain between them: what a series is drawn from.

    radii (K,); entry_angles (K,) radians; periods (K,) int64, steps a revolution; planes (K, 2, ambient_dim),
    orthonormal pairs inside the span of basis (subspace_dim, ambient_dim), orthonormal rows;
    transition_matrix (K, K).
    """

    radii: np.ndarray
    entry_angles: np.ndarray
    periods: np.ndarray
    planes: np.ndarray
    basis: np.ndarray
    transition_matrix: np.ndarray


@dataclass
class Visits:
    """The visits in their order: circles (n_visits,) int64, starts (n_visits + 1,) int64, the first step of each and
    the end of the last, which may lie beyond the series."""

    circles: np.ndarray
    starts: np.ndarray


def make_process(config, rng):
    """Draw the circles and the chain between them; config as in config.json."""
    K, mean = config["n_circles"], config["radius_mean"]
    radii = rng.normal(mean, config["radius_std"], K).clip(0.5 * mean, 1.5 * mean)
    basis = np.linalg.qr(rng.standard_normal((config["ambient_dim"], config["subspace_dim"])))[0].T
    pairs = np.linalg.qr(rng.standard_normal((K, config["subspace_dim"], 2)))[0]
    return Process(
        radii=radii,
        entry_angles=rng.uniform(0, 2 * np.pi, K),
        periods=np.rint(np.linspace(config["min_period"], config["max_period"], K)).astype(np.int64),
        planes=pairs.transpose(0, 2, 1) @ basis,
        basis=basis,
        transition_matrix=draw_transition_matrix(K, rng),
    )


def draw_transition_matrix(K, rng):
    """A sparse chain over K >= 2 circles on a ring: (K, K), rows sum to 1, the diagonal is zero.

    Each circle leads to its two ring neighbours (one when K is 2) and, from K = 4 on, to one or two circles further
    away, a shortcut being on average half as likely as a neighbour.
    """
    P = np.zeros((K, K))
    n_shortcuts = min(2, (K - 2) // 2)
    for i in range(K):
        neighbours = [(i - 1) % K, (i + 1) % K]
        P[i, neighbours] = rng.uniform(0.5, 1.5, 2)
        far = (i + 2 + rng.choice(max(K - 3, 0), n_shortcuts, replace=False)) % K if n_shortcuts else []
        P[i, far] = rng.uniform(0.25, 0.75, n_shortcuts)
    return P / P.sum(axis=1, keepdims=True)


def draw_visits(process, config, rng):
    """Draw visits until they cover config["n_steps"] steps.

    The first circle is uniform, the next ones follow the transition matrix. A visit lasts max(1, round(d / period))
    whole revolutions with d ~ N(dwell_mean, dwell_std).
    """
    cumulative = process.transition_matrix.cumsum(axis=1)
    cumulative /= cumulative[:, -1:]  # ends in exactly 1, above every draw
    rows = cumulative.tolist()
    circle = None
    circles, lengths, n_steps = [], [], 0
    while n_steps < config["n_steps"]:
        uniform = rng.random(VISITS_A_ROUND).tolist()
        dwell = rng.normal(config["dwell_mean"], config["dwell_std"], VISITS_A_ROUND)
        chain = []
        for u in uniform:
            circle = int(u * len(rows)) if circle is None else bisect_right(rows[circle], u)
            chain.append(circle)
        periods = process.periods[chain]
        revolutions = np.rint(dwell / periods).clip(1, np.maximum(1, LONGEST_VISIT // periods)).astype(np.int64)
        circles.append(chain)
        lengths.append(revolutions * periods)
        n_steps += int(lengths[-1].sum())
    starts = np.concatenate([[0], *lengths]).cumsum()
    n_visits = int(np.searchsorted(starts, config["n_steps"]))
    return Visits(np.concatenate(circles)[:n_visits], starts[:n_visits + 1])


def locate(visits, first, last):
    """The visit of each step in [first, last), and how many steps into it: two (last - first,) int64 arrays."""
    low = np.searchsorted(visits.starts, first, side="right") - 1
    high = np.searchsorted(visits.starts, last)
    steps_in_block = np.diff(visits.starts[low:high + 1].clip(first, last))
    visit = np.repeat(np.arange(low, high), steps_in_block)
    return visit, np.arange(first, last) - visits.starts[visit]


def phases(process, circle, step):
    """Phase in [0, 2π) `step` steps after the entry into `circle`; both (n,)."""
    # The step is reduced first: each revolution repeats the same numbers exactly.
    period = process.periods[circle]
    return (process.entry_angles[circle] + 2 * np.pi * (step % period) / period) % (2 * np.pi)


def circle_points(process, circle, theta):
    """Noise-free points r (cos θ v1 + sin θ v2), (n, ambient_dim) float32, of circle (n,) at phase theta (n,)."""
    r = process.radii[circle]
    coordinates = np.stack([r * np.cos(theta), r * np.sin(theta)], axis=1).astype(np.float32)
    return np.einsum("tp,tpd->td", coordinates, process.planes.astype(np.float32)[circle])


def draw_tilt_axes(process, visits, rng):
    """A unit vector for each visit, in the subspace and orthogonal to the circle's plane: (n_visits, ambient_dim)."""
    planes = process.planes[visits.circles]
    axes = rng.standard_normal((len(visits.circles), len(process.basis))) @ process.basis
    axes -= np.einsum("vp,vpd->vd", np.einsum("vpd,vd->vp", planes, axes), planes)
    return axes / np.linalg.norm(axes, axis=1, keepdims=True)


def add_tilt(points, process, visits, axes, visit, step, theta, drift_rate):
    """Move the points of even-numbered circles onto planes that tilt as the visit goes on; changes `points`.

    v2 becomes cos α v2 + sin α axis, α growing from 0 at the first step of the visit to drift_rate at its last.
    """
    rows = np.flatnonzero(visits.circles[visit] % 2 == 0)
    visit = visit[rows]
    circle = visits.circles[visit]
    alpha = drift_rate * step[rows] / (np.diff(visits.starts)[visit] - 1)
    height = (process.radii[circle] * np.sin(theta[rows]))[:, None]
    points[rows] += height * ((np.cos(alpha) - 1)[:, None] * process.planes[circle, 1]
                              + np.sin(alpha)[:, None] * axes[visit])


def walk(center, n, std, rng):
    """The next n positions of the centre's random walk, (n, dim), the first being `center`, and the one after."""
    steps = rng.standard_normal((n, len(center)))
    path = np.concatenate([center[None], std * steps]).cumsum(axis=0)
    return path[:-1], path[-1]


def draw_circles_and_visits(config):
    """What a series is drawn from: (Process, Visits, the random generators of noise, tilts and walk).

    Circles, visits, noise and each variant have random streams of their own: the same seed visits the same circles
    with and without noise, drift or a walking centre. Raises UserError when the flags contradict each other.
    """
    check_config(config)
    circle_rng, visit_rng, *rngs = np.random.default_rng(config["seed"]).spawn(5)
    process = make_process(config, circle_rng)
    return process, draw_visits(process, config, visit_rng), rngs


def parts(config, block_values=BLOCK_VALUES):
    """The steps of the series as consecutive slices, block_values values of X in each."""
    n_steps, block = config["n_steps"], max(1, block_values // config["ambient_dim"])
    return (slice(first, min(first + block, n_steps)) for first in range(0, n_steps, block))


def hidden_states(process, visits, part):
    """Of each step in the slice `part`: its circle, its phase, its visit and how many steps into it, (n,) each."""
    visit, step = locate(visits, part.start, part.stop)
    circle = visits.circles[visit]
    return circle, phases(process, circle, step), visit, step


def draw_points(config, process, visits, rngs, block_values=BLOCK_VALUES):
    """Draw X block by block; yields (part, X[part]). The size of a block changes no value."""
    noise_rng, tilt_rng, walk_rng = rngs
    axes = draw_tilt_axes(process, visits, tilt_rng) if config["drift"] else None
    dim = config["ambient_dim"]
    center = np.zeros(dim)
    for part in parts(config, block_values):
        circle, theta, visit, step = hidden_states(process, visits, part)
        X = noise_rng.standard_normal((len(circle), dim), dtype=np.float32)
        X *= np.float32(config["noise_std"])
        points = circle_points(process, circle, theta)
        if config["drift"]:
            add_tilt(points, process, visits, axes, visit, step, theta, config["drift_rate"])
        if config["center_walk_std"] > 0:
            path, center = walk(center, len(points), config["center_walk_std"], walk_rng)
            points += path
        X += points
        yield part, X


def generate(config, block_values=BLOCK_VALUES):
    """Draw a series; returns a dataset.Series. config: the keys of config.json.

    The memory taken is that of the series. Raises UserError when the flags contradict each other.
    """
    check_config(config)
    n_steps = config["n_steps"]
    X = np.empty((n_steps, config["ambient_dim"]), np.float32)
    states, thetas = np.empty(n_steps, np.int64), np.empty(n_steps)
    process, visits, rngs = draw_circles_and_visits(config)
    for part, points in draw_points(config, process, visits, rngs, block_values):
        X[part] = points
        states[part], thetas[part], _, _ = hidden_states(process, visits, part)
    return Series(X=X, states=states, thetas=thetas, transition_matrix=process.transition_matrix,
                  radii=process.radii, entry_angles=process.entry_angles, periods=process.periods,
                  planes=process.planes, config=dict(config))


# ------------------------------------------------------------------------------------------------------- the files

@contextlib.contextmanager
def writing_data(config, data_dir):
    """Give the path to write data.npz to; it and config.json appear whole or not at all, and never beside an older
    other."""
    config_file = data_dir / "config.json"
    with cli.writing(config_file) as config_part:
        config_part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        with cli.writing(data_dir / "data.npz") as part:
            yield part
            # A run killed between the two leaves data without a config.json, which says so, not with an older one's.
            config_file.unlink(missing_ok=True)
    print(f"wrote {data_dir / 'data.npz'} and config.json: {config['n_steps']:,} steps x {config['ambient_dim']} "
          "features")


def save(series, data_dir):
    """Write a series as one compressed data.npz, and its config.json."""
    with writing_data(series.config, data_dir) as part:
        np.savez_compressed(part, X=series.X, states=series.states, thetas=series.thetas,
                            transition_matrix=series.transition_matrix, radii=series.radii,
                            entry_angles=series.entry_angles, periods=series.periods, planes=series.planes)


def save_uncompressed(config, data_dir, block_values=BLOCK_VALUES):
    """Draw a series straight into an uncompressed data.npz, and write its config.json.

    The values are those of `generate`; the memory taken is that of the visits and a block. A zip takes one member
    after the other, so circles and phases are worked out from the visits once more for each: cheap beside the noise.
    """
    process, visits, rngs = draw_circles_and_visits(config)
    n_steps, dim = config["n_steps"], config["ambient_dim"]

    def hidden(i):
        return (hidden_states(process, visits, part)[i] for part in parts(config, block_values))

    with writing_data(config, data_dir) as path, open(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        points = draw_points(config, process, visits, rngs, block_values)
        write_member(archive, file, "X", (n_steps, dim), np.float32, (X for _, X in points))
        write_member(archive, file, "states", (n_steps,), np.int64, hidden(0))
        write_member(archive, file, "thetas", (n_steps,), np.float64, hidden(1))
        for name in ("transition_matrix", "radii", "entry_angles", "periods", "planes"):
            values = getattr(process, name)
            write_member(archive, file, name, values.shape, values.dtype, [values])


def write_member(archive, file, name, shape, dtype, values):
    """Add an array to the zip archive being written to `file`, uncompressed, from consecutive blocks of its rows.

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


# ---------------------------------------------------------------------------------------------------- the summary

def visit_statistics(series):
    """Steps (K,), visits (K,), and mean and std of the dwell (K,) in steps by circle, NaN where there is none.

    The last visit, which the end of the series cuts, counts as a visit but not for the dwell.
    """
    K = series.n_circles
    circles, _, lengths = dataset.runs(series.states)
    n_steps = np.zeros(K, np.int64)
    np.add.at(n_steps, circles, lengths)
    dwells = [lengths[:-1][circles[:-1] == i] for i in range(K)]
    return (n_steps, np.bincount(circles, minlength=K),
            np.array([d.mean() if len(d) else np.nan for d in dwells]),
            np.array([d.std(ddof=1) if len(d) > 1 else np.nan for d in dwells]))


def time_shares(visits, n_circles, n_bins):
    """The share of each of n_bins equal stretches of time that is spent on each circle: (n_bins, n_circles).

    visits: circles, first steps and lengths of all visits, as from `runs`.
    """
    circles, starts, lengths = visits
    ends = np.append(starts, starts[-1] + lengths[-1])
    edges = np.linspace(0, ends[-1], n_bins + 1)
    spent = [np.interp(edges, ends, np.concatenate([[0], np.cumsum(np.where(circles == i, lengths, 0))]))
             for i in range(n_circles)]
    return np.diff(spent).T / np.diff(edges)[:, None]


def summary_table(series, statistics):
    def steps(x):
        return "–" if np.isnan(x) else f"{x:.0f}"

    rows = [[i, f"{r:.2f}", period, f"{n:,}", f"{100 * n / series.n_steps:.1f} %", visits, steps(mean), steps(std)]
            for i, (r, period, n, visits, mean, std)
            in enumerate(zip(series.radii, series.periods, *statistics, strict=True))]
    return cli.table(["circle", "radius", "period", "steps", "share", "visits", "dwell mean", "dwell std"], rows)


# ---------------------------------------------------------------------------------------------------- the figures

def plot_visit_bars(ax, visits, n_steps, n_circles):
    circles, starts, lengths = visits
    ax.hlines(circles, starts, starts + lengths, colors=figures.circle_colors(n_circles)[circles], linewidths=5)
    ax.set(ylabel="circle", xlim=(0, n_steps), ylim=(-0.7, n_circles - 0.3))
    if n_circles <= FEW_CIRCLES:
        ax.set_yticks(range(n_circles))


def plot_time_shares(fig, ax, shares, n_steps):
    n_bins, n_circles = shares.shape
    image = ax.imshow(shares.T, aspect="auto", origin="lower", interpolation="nearest", cmap="Greys",
                      extent=(0, n_steps, -0.5, n_circles - 0.5))
    fig.colorbar(image, ax=ax, pad=0.01, fraction=0.03, label=f"share of {n_steps / n_bins:,.0f} steps")
    ax.set(ylabel="circle")
    if n_circles <= FEW_CIRCLES:
        ax.set_yticks(range(n_circles))


def plot_state_sequence(series):
    visits = dataset.runs(series.states)
    n = min(FIRST_STEPS, series.n_steps)
    fig, axes = figures.new_figure(3, 1, panel=(10, 2.2), height_ratios=[1, 6, 6])
    strip, start, whole = axes[:, 0]
    figures.state_strip(strip, series.states[:n], series.n_circles)
    strip.set_xlim(0, n)
    strip.set_title(f"The first {n:,} steps", loc="left")
    plot_visit_bars(start, dataset.runs(series.states[:n]), n, series.n_circles)
    if len(visits[0]) <= MOST_BARS:
        plot_visit_bars(whole, visits, series.n_steps, series.n_circles)
    else:
        shares = time_shares(visits, series.n_circles, min(TIME_BINS, series.n_steps))
        plot_time_shares(fig, whole, shares, series.n_steps)
    whole.set_title(f"All {series.n_steps:,} steps", loc="left")
    for ax in (start, whole):
        ax.set_xlabel("time step")
    return fig


def plot_transition_matrix(P):
    K = len(P)
    fig, axes = figures.new_figure(panel=(6, 5.2))
    ax = axes[0, 0]
    image = ax.imshow(np.ma.masked_equal(P, 0), cmap="viridis", vmin=0, vmax=P.max())
    fig.colorbar(image, ax=ax, label="probability")
    if K <= FEW_CIRCLES:
        for i, j in zip(*np.nonzero(P), strict=True):
            ax.text(j, i, f"{P[i, j]:.2f}", ha="center", va="center", fontsize=8, in_layout=False,  # it is inside
                    color="black" if P[i, j] > 0.6 * P.max() else "white")
        ax.set_xticks(range(K))
        ax.set_yticks(range(K))
    ax.set(title="Where the chain goes next", xlabel="next circle", ylabel="circle")
    return fig


def plot_periods(series, statistics):
    _, _, dwell_mean, dwell_std = statistics
    circles, colors = np.arange(series.n_circles), figures.circle_colors(series.n_circles)
    fig, axes = figures.new_figure(1, 3, panel=(4, 3.2))
    for ax, values, errors, label in zip(
            axes[0], (series.periods, series.radii, dwell_mean), (None, None, np.nan_to_num(dwell_std)),
            ("period [steps a revolution]", "radius", "dwell of a visit [steps], mean ± std"), strict=True):
        ax.bar(circles, np.nan_to_num(values), yerr=errors, color=colors, capsize=3)
        ax.set(xlabel="circle", ylabel=label)
        if series.n_circles <= FEW_CIRCLES:
            ax.set_xticks(circles)
    return fig


def plot_sample_window(series, first, n):
    fig, axes = figures.new_figure(2, 1, panel=(10, 2.3), height_ratios=[1, 10], sharex=True)
    strip, heat = axes[:, 0]
    part = slice(first, first + n)
    figures.state_strip(strip, series.states[part], series.n_circles, first)
    figures.heatmap_panel(fig, heat, series.X[part], first, ylabel="feature", unit="value", cmap="RdBu_r",
                          symmetric=True)
    heat.set_xlabel("time step")
    figures.circle_legend(fig, series.n_circles, np.unique(series.states[part]))
    return fig


def plot_umap(embedding, states, steps, n_circles, dimension):
    fig, axes = figures.new_figure(1, 2, panel=(6, 5.2), title=(
        f"UMAP of {len(embedding):,} points; Levina–Bickel dimension {dimension:.1f} (k = {DIMENSION_K})"))
    by_circle, by_time = axes[0]
    figures.scatter_panel(by_circle, embedding, colors=figures.circle_colors(n_circles)[states], title="by circle")
    figures.circle_legend(by_circle, n_circles, np.unique(states), loc="upper left", bbox_to_anchor=(1, 1))
    dots = figures.scatter_panel(by_time, embedding, values=steps, title="by time")
    fig.colorbar(dots, ax=by_time, label="time step", fraction=0.04)
    return fig


def plot_all(series, statistics):
    """{file name: figure} of all figures but the UMAP."""
    n = min(SAMPLE_WINDOW, series.n_steps)
    firsts = np.linspace(0, series.n_steps - n, N_SAMPLE_WINDOWS).astype(int).tolist()
    drawn = {"state_sequence.png": plot_state_sequence(series),
             "transition_matrix.png": plot_transition_matrix(series.transition_matrix),
             "periods.png": plot_periods(series, statistics),
             **{f"sample_window_{i}.png": plot_sample_window(series, first, n) for i, first in enumerate(firsts)}}
    return {name: figures.laid_out(fig) for name, fig in drawn.items()}


def make_umap(series, data_dir):
    seed = series.config["seed"]
    rng = np.random.default_rng(seed)
    steps = rng.choice(series.n_steps, min(UMAP_POINTS, series.n_steps), replace=False)
    points = pick(series.X, steps)
    if len(distinct(points)) <= DIMENSION_K:
        raise cli.UserError(f"umap.png needs more than {DIMENSION_K} different points; the data are written, and "
                            "--no-umap leaves this figure out")
    dimension = levina_bickel(points, [DIMENSION_K])[DIMENSION_K]
    embedding = umap_embedding(points, knn(points, min(UMAP_NEIGHBORS, len(points)) - 1), seed)
    fig = plot_umap(embedding, pick(series.states, steps), steps, series.n_circles, dimension)
    figures.save(fig, data_dir / "umap.png")


def main(args):
    data_dir = cli.output_folder(args.data_dir)
    if args.uncompressed:
        save_uncompressed(config_of(args), data_dir)
        series = load_series(data_dir)
        statistics = visit_statistics(series)
        drawn = plot_all(series, statistics)
    else:
        series = generate(config_of(args))
        statistics = visit_statistics(series)
        with ThreadPoolExecutor(1) as pool:  # the figures take shape while the data are compressed
            drawing = pool.submit(plot_all, series, statistics)
            save(series, data_dir)
        drawn = drawing.result()
    print(summary_table(series, statistics))
    figures.save_all({data_dir / name: fig for name, fig in drawn.items()})
    if not args.no_umap:
        make_umap(series, data_dir)


if __name__ == "__main__":
    cli.run(main, ARGS)
