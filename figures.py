"""How this project's figures look: style, circle colours, state strip, heatmap and scatter panels, saving.

Everything here draws; nothing computes. Figures are made without pyplot: no display is needed, there is no current
figure that functions share, and nothing has to be closed.

One convention for all drawing functions, here and in the scripts:
  draw_summary(…)                        `draw_*` makes one whole Figure and returns it. It writes no file: scripts
                                         pass the Figure to `save`, and notebooks show it.
  heatmap_panel(fig, ax, …)              A function that is named after a thing draws that thing into the Axes or the
  state_strip(ax, …), circle_legend(…)   Figure that it is given.
What makes a Figure is decorated with `cli.in_style`: the style holds while it is drawn, and a notebook's own settings
are left alone.
"""

import itertools
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullLocator

import cli

STYLE = {
    "figure.dpi": 150,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.5,
}

PAGE = {"paper": (7.0, 9.0), "talk": (13.3, 7.5)}  # inches: the text of a page of A4 or letter, and a wide slide
# Points: no smaller text on either. A slide that is printed 6.5 inches wide then has 7 points, as has a page.
SMALLEST = {"paper": 8, "talk": 14.5}
STRETCH = 1.6  # at most, of a figure's sides on a slide

# matplotlib's petroff10 (Petroff 2021, arXiv 2107.02270): ten colours that readers with a colour deficiency tell apart.
TEN_COLORS = ["#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
              "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"]
OFF, OFF_COLOR = -1, "#dddddd"  # in place of a circle: a step that is on none


def circle_colors(n_circles):
    """RGB colours (n_circles, 3), one per circle.

    Up to ten circles have a colour each. No palette keeps more of them apart, so that more than ten are coloured by
    their number, from dark to light, which doesn't pretend that each can be told from all others.
    """
    if n_circles <= len(TEN_COLORS):
        return np.array([to_rgb(c) for c in TEN_COLORS[:n_circles]])
    return matplotlib.colormaps["viridis"](np.linspace(0, 1, n_circles))[:, :3]


def run_colors(n_runs):
    """RGB colours (n_runs, 3) for training runs, or for one run's horizons.

    None of them resembles a circle's colour, and readers with a colour deficiency tell the first seven apart. Greys
    follow.
    """
    palette = ["#4848d9", "#d9486c", "#6c4800", "#00b5d9", "#b5b500", "#240000", "#002448"]
    greys = np.linspace(0.3, 0.8, max(n_runs - len(palette), 1))
    return np.array([to_rgb(color) for color in palette] + [(grey,) * 3 for grey in greys])[:n_runs]


@cli.in_style
def new_figure(rows=1, cols=1, panel=(4.0, 3.0), title=None, **subplots):
    """A Figure of rows x cols panels, each `panel` (width, height) inches, and its Axes as an array (rows, cols).

    `subplots` goes to Figure.subplots: sharex, height_ratios and so on.
    """
    fig = empty_figure((panel[0] * cols, panel[1] * rows), title)
    axes = fig.subplots(rows, cols, squeeze=False, **subplots)
    for ax in axes.flat:
        set_tick_sizes(ax)
    return fig, axes


def set_tick_sizes(ax):
    """Keep the style's sizes: ticks are made when the figure is shown, in a notebook after the style has ended."""
    for axis in "xy":
        ax.tick_params(axis, labelsize=matplotlib.rcParams[f"{axis}tick.labelsize"])


def empty_figure(size, title=None):
    """A Figure of `size` (width, height) inches without panels."""
    fig = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(fig)
    if title:
        fig.suptitle(title, fontsize=13)
    return fig


@cli.in_style
def laid_out(fig):
    """The figure after its constrained layout has been computed and switched off, so that drawing it later is quick."""
    engine = fig.get_layout_engine()
    if engine is not None:
        fit_to_page(fig, cli.drawing_flags()[1])
        break_title(fig)
        engine.execute(fig)
        fig.set_layout_engine(None)
    return fig


def break_title(fig):
    """Break a title that is wider than the figure, or would reach the legend at its right, into lines."""
    if not fig.get_suptitle():
        return
    at_right = [legend.get_window_extent().width for legend in fig.legends if legend._outside_loc == "right"]
    allowed = max(0.95 * fig.bbox.width - 2 * max(at_right, default=0), 0.4 * fig.bbox.width)
    wanted, lines = fig._suptitle.get_window_extent().width, fig.get_suptitle().split("\n")
    if wanted > allowed:
        columns = int(max(map(len, lines)) * allowed / wanted)
        fig._suptitle.set_text("\n".join(textwrap.fill(line, columns) for line in lines))


def fit_to_page(fig, style):
    """Give a figure the size and the text of a page (style "paper") or a slide ("talk"); None leaves it as it is.

    A page is PAGE inches, and no text on it is below SMALLEST points. What is then too wide for its place, a title, a
    label, a legend or the numbers at an axis, is broken into lines, or turned or thinned out.
    """
    if style is None:
        return
    width, height = fig.get_size_inches()
    grow = min(PAGE[style][0] / width, PAGE[style][1] / height)
    if style == "talk":  # its text grows more than it does, so it may be stretched towards the slide's shape
        fig.set_size_inches(min(STRETCH * grow * width, PAGE[style][0]), min(STRETCH * grow * height, PAGE[style][1]))
    elif grow < 1:
        fig.set_size_inches(min(width, PAGE[style][0]), min(height, PAGE[style][1]))
    fig.set_dpi(300 if style == "paper" else fig.dpi)
    # On a page all text is small. On a slide it grows with the figure.
    largest, factor = (10, 1) if style == "paper" else (np.inf, max(grow, 1))

    def size(points):
        return float(np.clip(factor * points, SMALLEST[style], largest))

    for text in fig.findobj(Text):
        text.set_fontsize(size(text.get_fontsize()))
    for ax in fig.axes:
        for axis in (ax.xaxis, ax.yaxis):
            ticks = axis.get_ticklabels()
            axis.set_tick_params(labelsize=ticks[0].get_fontsize() if ticks else SMALLEST[style])
    if fig.get_suptitle():
        columns = int(fig.get_figwidth() * 72 / (0.62 * size(fig._suptitle.get_fontsize())))
        fig.suptitle(textwrap.fill(fig.get_suptitle(), columns), fontsize=fig._suptitle.get_fontsize())
    for ax in fig.axes:
        if ax.get_legend() is not None:
            ax.get_legend().set_in_layout(False)  # one that is too wide would make its panel narrow
    originals = {}
    for _ in range(2):  # what becomes narrower leaves room, and so another layout
        fig.get_layout_engine().execute(fig)
        for ax in fig.axes:
            break_lines(ax, 0.95 * fig.bbox.width, originals)
    fig.get_layout_engine().execute(fig)
    for ax in fig.axes:
        thin_ticks(ax)
        narrow_legend(ax)


def break_lines(ax, page_width, originals):
    """Break titles that are wider than their panel and labels that are wider than the page (in pixels) into lines.
    originals: {Text: what it said at first}, which is filled in."""
    room = ax.get_window_extent().width
    for text, allowed in ((ax.title, room), (ax._left_title, room), (ax.xaxis.label, page_width)):
        lines = originals.setdefault(text, text.get_text()).split("\n")
        text.set_text("\n".join(lines))
        wanted = text.get_window_extent().width
        if wanted > allowed:
            columns = max(12, int(max(map(len, lines)) * allowed / wanted))
            text.set_text("\n".join(textwrap.fill(line, columns) for line in lines))


def narrow_legend(ax):
    """Give a legend inside a panel as many columns as there is room for."""
    legend = ax.get_legend()
    while legend is not None and legend._ncols > 1 and legend.get_window_extent().width > ax.get_window_extent().width:
        texts = legend.get_texts()
        legend = ax.legend(legend.legend_handles, [text.get_text() for text in texts], loc=legend._loc,
                           ncols=legend._ncols - 1, fontsize=texts[0].get_fontsize())
        legend.set_in_layout(False)


def thin_ticks(ax):
    """Where the labels of the x axis overlap, turn those that are words, and leave out numbers between others."""
    labels = [label for label in ax.get_xticklabels() if label.get_text() and label.get_visible()]
    low, high = sorted(ax.get_xlim())
    labels = [label for label in labels if low <= label.get_position()[0] <= high]

    def overlap(some):
        boxes = [label.get_window_extent() for label in some]
        return any(left.x1 + 2 > right.x0 for left, right in itertools.pairwise(boxes))

    if not overlap(labels):
        return
    if any(label.get_text()[0].isalpha() for label in labels):
        ax.tick_params(axis="x", labelrotation=90)
        return
    every = next((n for n in range(2, len(labels)) if not overlap(labels[::n])), len(labels))
    shown = labels[::every]
    ax.set_xticks([label.get_position()[0] for label in shown], [label.get_text() for label in shown])


def save(fig, path):
    """Write the figure, whole or not at all, and print its path; its metadata tell command, commit and data."""
    save_all({path: fig})


def save_all(figs):
    """Write figures, {path.png: figure}, each whole or not at all, print their paths in this order and return them.

    With --format pdf or svg the paths end in that. A thread compresses one PNG while the next is drawn. savefig would
    draw each of them twice, the first time only to compute its layout.
    """
    def write(path, pixels, dpi):
        with cli.writing(path) as part:
            # Without the version of matplotlib in the file, the same numbers give the same bytes.
            origin = {key.capitalize(): value for key, value in cli.made_by().items() if value is not None}
            matplotlib.image.imsave(part, pixels, format="png", dpi=dpi, metadata={"Software": None, **origin})
        return path

    form, _ = cli.drawing_flags()
    with ThreadPoolExecutor(1) as pool, matplotlib.rc_context({**STYLE, "pdf.fonttype": 42, "svg.hashsalt": "figure"}):
        jobs = []
        for path, fig in figs.items():
            laid_out(fig)
            if form == "png":
                fig.canvas.draw()
                jobs.append(pool.submit(write, path, np.array(fig.canvas.buffer_rgba()), fig.dpi))
            else:
                jobs.append(pool.submit(write_vectors, fig, Path(path).with_suffix(f".{form}"), form))
        paths = []
        for job in jobs:
            paths.append(job.result())
            print(f"wrote {paths[-1]}")
    return paths


def write_vectors(fig, path, form):
    """Write a figure as PDF or SVG, whole or not at all, with its origin and without a date; returns the path."""
    origin = "; ".join(f"{key}: {value}" for key, value in cli.made_by().items() if value is not None)
    metadata = {"Subject": origin, "CreationDate": None} if form == "pdf" else {"Description": origin, "Date": None}
    with cli.writing(path) as part:
        fig.savefig(part, format=form, metadata=metadata)
    return path


def bare(ax):
    """Hide the ticks of Axes whose units mean nothing, like UMAP coordinates."""
    ax.set_xticks([])
    ax.set_yticks([])


def log_ticks(axis, multiples):
    """Ticks of a logarithmic axis at these multiples of the powers of ten, each labelled as a plain number."""
    axis.set_major_locator(LogLocator(subs=multiples))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def log_ticks_for_range(ax):
    """log_ticks on the y axis of Axes, the closer together the less of the axis there is."""
    low, high = ax.get_ylim()
    log_ticks(ax.yaxis, (1, 2, 5) if high > 10 * low else (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8))


def hide_unused(axes, used):
    """Switch off the panels after the first `used` ones."""
    for ax in axes.ravel()[used:]:
        ax.axis("off")


def strip_colors(states, n_circles):
    """The colours (…, 3) of states (…) int: that of the circle, or OFF_COLOR where it is OFF."""
    return np.vstack([circle_colors(n_circles), to_rgb(OFF_COLOR)])[np.asarray(states)]  # index -1: the last row


def leave_out(*panels):
    """Take panels out of their figure, which gives their room to the others: of a strip of circles where the data name
    none. The time axis of panels that share one stays."""
    for ax in panels:
        ax.remove()


def state_strip(ax, states, n_circles, start=0, label="circle"):
    """The state sequence as one strip of circle colours; a single image, so that a long sequence is drawn quickly.

    states: (n_steps,) int, OFF where a step is on no circle; start: the time step of states[0].
    """
    ax.imshow(strip_colors(states, n_circles)[None], aspect="auto", interpolation="nearest",
              extent=(start - 0.5, start + len(states) - 0.5, 0, 1))
    ax.set_yticks([])
    ax.set_ylabel(label, rotation=0, ha="right", va="center")
    ax.tick_params(axis="x", labelbottom=False, length=0)
    for side in ax.spines.values():
        side.set_visible(False)


def heatmap_panel(fig, ax, values, start=0, ylabel="", title="", unit="", cmap="viridis", symmetric=False,
                  limits=None):
    """A heatmap of values (n_steps, n_channels) with time to the right, channels upwards, and a colour bar.

    start: the time step of values[0]; unit: the label of the colour bar. The colours span the 1st to 99th percentile
    of the values, so that an outlier doesn't use up the colours of all others; `symmetric` centres them on zero, and
    `limits` (low, high) fixes them, so that several panels can be compared.
    """
    values = np.asarray(values)
    low, high = limits if limits is not None else np.percentile(values, [1, 99])
    if symmetric:
        high = max(abs(low), abs(high))
        low = -high
    if low == high:
        low, high = low - 0.5, high + 0.5
    image = ax.imshow(values.T, aspect="auto", origin="lower", interpolation="nearest", cmap=cmap,
                      norm=Normalize(low, high),
                      extent=(start - 0.5, start + len(values) - 0.5, -0.5, values.shape[1] - 0.5))
    beyond = {(True, True): "both", (True, False): "min", (False, True): "max", (False, False): "neither"}
    bar = fig.colorbar(image, ax=ax, pad=0.01, fraction=0.03, extend=beyond[values.min() < low, values.max() > high])
    if unit:
        bar.set_label(unit)
    ax.yaxis.get_major_locator().set_params(integer=True)  # there is no channel 2.5
    ax.set_ylabel(ylabel)
    if title:
        ax.set_title(title, loc="left")


def scatter_panel(ax, points, colors=None, values=None, cmap="viridis", title="", size=None):
    """A scatter of points (n, 2) in colours (n, 3), or coloured by values (n,) through cmap, without ticks.

    size: the area of a dot in points²; by default the more points, the smaller. Returns the artist, for a colour bar.
    Later points cover earlier ones: shuffle points that are sorted by group.
    """
    size = size or float(np.clip(20000 / max(len(points), 1), 1.0, 12.0))
    dots = ax.scatter(points[:, 0], points[:, 1], s=size, c=colors if values is None else values,
                      cmap=None if values is None else cmap, linewidths=0, alpha=0.8, rasterized=True)
    bare(ax)
    ax.set_title(title)
    return dots


def circle_legend(target, n_circles, present=None, **where):
    """A legend of the circles in `present` (default: all) on a Figure (outside its panels) or an Axes.

    present may hold OFF, which comes last. where: loc and other arguments of matplotlib's legend.
    """
    circles = sorted(range(n_circles) if present is None else present, key=lambda i: (i == OFF, i))
    handles = [Line2D([], [], linestyle="", marker="o", markersize=7, color=strip_colors(i, n_circles),
                      label="off" if i == OFF else str(i)) for i in circles]
    where = {"loc": "outside right upper", **where} if isinstance(target, Figure) else where
    title = "circle" if n_circles <= len(TEN_COLORS) else "circle,\nby number"
    return target.legend(handles=handles, title=title, ncols=1 + (len(handles) - 1) // 15, **where)


@cli.in_style
def draw_umaps(embeddings, titles, states, n_circles, title):
    """UMAPs coloured by circle, one panel and title per embedding (n, 2), with one legend; a Figure.

    states: (n,) int, the circle of each point, the same for all embeddings; with n_circles None they are time steps,
    which a colour bar tells.
    """
    cols = len(embeddings) if len(embeddings) < 4 else min(5, -(-len(embeddings) // 2))
    rows = -(-len(embeddings) // cols)
    fig, axes = new_figure(rows, cols, panel=(3.1, 3.3) if len(embeddings) > 1 else (6.5, 6.0), title=title)
    colors = {"values": states} if n_circles is None else {"colors": circle_colors(n_circles)[states]}
    for ax, points, name in zip(axes.ravel(), embeddings, titles, strict=False):
        dots = scatter_panel(ax, points, **colors, title=name)
    hide_unused(axes, len(embeddings))
    if n_circles is None:
        fig.colorbar(dots, ax=axes.ravel().tolist(), label="time step", fraction=0.02)
    else:
        circle_legend(fig, n_circles, np.unique(states))
    return fig
