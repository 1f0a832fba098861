"""The figures of what `evaluate_representations.py` measures: each measure against depth, for one or more models.

Reports are as in `level_tables`.
"""

import numpy as np

import cli
import figures
import measures
from level_tables import BELIEFS, setting_names
from measures import DIMENSION_K


def level_title(level):
    """The title of a UMAP panel: the level's name, its dimension, and the silhouette of the circles in the UMAP."""
    dimension = (level["dimension"] or {}).get(DIMENSION_K)
    facts = [f"dim {dimension:.1f}"] if dimension is not None else []
    if level["umap_silhouette"] is not None:
        facts.append(f"silhouette here {level['umap_silhouette']:.2f}")
    return "\n".join([level["level"], ", ".join(facts)]).strip()


# The panels of the summary: (title, {line label: how to read the line off a level's measures}). The first line of each
# panel is the solid one.
VOTE = f"vote over {measures.VOTE_STEPS} steps"
PANELS = [
    ("circle accuracy of a linear probe", {"": lambda m: m["probe_accuracy"]}),
    ("phase R², (cos θ, sin θ)", {"": lambda m: m["phase_r2"]}),
    ("ARI of k-means", {VOTE: lambda m: m["kmeans_ari_smooth"],
                        "raw": lambda m: m["kmeans_ari"],
                        "in the UMAP, vote": lambda m: m.get("umap_ari_smooth")}),
    ("NMI of k-means", {VOTE: lambda m: m["kmeans_nmi_smooth"],
                        "raw": lambda m: m["kmeans_nmi"],
                        "in the UMAP, vote": lambda m: m.get("umap_nmi_smooth")}),
    ("silhouette of the circles", {"in the level": lambda m: m["silhouette"],
                                   "in its UMAP": lambda m: m.get("umap_silhouette")}),
    ("effective rank", {"": lambda m: m["effective_rank"]}),
    ("dimension", {
        f"Levina–Bickel, k = {DIMENSION_K}": lambda m: (m["dimension"] or {}).get(DIMENSION_K),
        "the same, whitened": lambda m: (m.get("dimension_whitened") or {}).get(DIMENSION_K),
        "TwoNN": lambda m: (m["dimension"] or {}).get("two_nn")}),
]
LEVEL_KEYS = ("probe_accuracy", "phase_r2", "kmeans_ari_smooth", "kmeans_nmi_smooth", "silhouette", "effective_rank",
              "dimension")  # what the first line of a panel reads; a baseline may lack it
LINE_STYLES = ["-", "--", ":"]
OUTPUT_LABEL = "output: the prediction, in another space than the layers"
UNIT_PANELS = ("circle accuracy", "ARI", "NMI", "silhouette")  # panels with these titles have the scale 0…1


# The panels of the figure of beliefs, in the same form.
BELIEF_PANELS = [(f"R² of: {title}", {"": lambda m, key=key: (m.get("beliefs") or {}).get(key)})
                 for key, title in BELIEFS.items()]
BASELINES = {  # first word of a baseline's levels: the dashes of its line, which is grey
    "low-passed": (0, (1, 1)), "quadratic": (0, (4, 1, 1, 1)), "untrained": (0, (5, 2))}
BASELINE_LABELS = {"low-passed": "low-passed input", "quadratic": "quadratic probe, one step",
                   "untrained": "untrained model"}
BASELINE_GREY = "0.5"


@cli.in_style
def draw_summary(reports, title):
    """Every measure against depth, from input to output, one colour per setting; a Figure, its legend below.

    Models that were trained with the same flags but for the seed are one setting: its line is their mean, in a band of
    one standard deviation. Baselines are grey. The output has a marker of its own and is joined to no layer: it is the
    prediction, in the space of the features. With more than three settings only the first line of each panel is drawn.
    Models that differ in depth share a relative depth axis.
    """
    on_a_page = cli.drawing_flags()[1] == "paper"  # too narrow for four panels side by side
    fig = figures.empty_figure((7.0, 9.0) if on_a_page else (14.8, 6.6), title)
    if on_a_page:
        grid = fig.add_gridspec(4, 2)
        places = [*(grid[i // 2, i % 2] for i in range(6)), grid[3, :]]
    else:
        grid = fig.add_gridspec(2, 12)
        places = [grid[0, i:i + 3] for i in range(0, 12, 3)] + [grid[1, i:i + 4] for i in range(0, 12, 4)]
    panels = [fig.add_subplot(place) for place in places]
    handles = depth_panels(panels, PANELS, reports)
    ceiling = reports[0]["filter_circle_accuracy"]
    if ceiling is not None:
        handles.append(panels[0].axhline(ceiling, color="0.4", linestyle="-.", linewidth=1,
                                         label=f"exact filter: {ceiling:.3f}"))
    fig.legend(handles=handles, loc="outside lower center", ncols=2 if on_a_page else 4)
    return fig


@cli.in_style
def draw_beliefs(reports, title):
    """How much of each belief of the exact filter a linear regression finds, against depth; a Figure like the summary.
    """
    on_a_page = cli.drawing_flags()[1] == "paper"
    fig, axes = figures.new_figure(*((2, 2) if on_a_page else (1, 4)), panel=(3.7, 3.6), title=title)
    handles = depth_panels(list(axes.flat), BELIEF_PANELS, reports)
    for ax in axes.flat:
        ax.set_ylim(min(-0.02, ax.get_ylim()[0]), 1.02)
    fig.legend(handles=handles, loc="outside lower center", ncols=2 if on_a_page else 4)
    return fig


@cli.in_style
def draw_excess(reports, title):
    """Where the excess over the exact filter falls: by event, and the errors against the steps seen; a Figure.

    Bars are shares of a model's excess, with their standard errors. The curves of the models, one colour per setting
    and seeds averaged, stand above that of the exact filter.
    """
    settings = settings_of(reports)
    on_a_page = cli.drawing_flags()[1] == "paper"
    fig, axes = figures.new_figure(*((2, 1) if on_a_page else (1, 2)), panel=(6.2, 4.2), title=title)
    bars, curves = axes.flat
    handles = []
    for i, ((label, group), color) in enumerate(zip(settings.items(), figures.run_colors(len(settings)), strict=True)):
        rows = [[row for row in report["excess"]["events"] if row["event"] != "all"] for report in group]
        shares = 100 * np.mean([[row["share"] for row in events] for events in rows], axis=0)
        errors = [[np.nan if row["share_error"] is None else 100 * row["share_error"] for row in events]
                  for events in rows]
        height = 0.8 / len(settings)
        places = np.arange(len(shares)) + (i - (len(settings) - 1) / 2) * height
        bars.barh(places, shares, height, color=color, xerr=np.mean(errors, axis=0), ecolor="0.2")
        history = [report["excess"]["history"] for report in group]
        handles += curves.plot(history[0]["steps"], np.mean([h["mse"] for h in history], axis=0), color=color,
                               marker="o", markersize=3, label=shortened(label))
    handles += curves.plot(history[0]["steps"], history[0]["optimal"], color="0.2", linestyle="-.",
                           label="exact filter")
    names = [f"{row['event']}\n({row['predictions']:.1%} of all)" for row in rows[0]]
    bars.set_yticks(range(len(names)), names)
    bars.invert_yaxis()
    bars.axvline(0, color="0.4", linewidth=0.8)
    bars.set(title="share of the excess", xlabel="% of the excess over the exact filter")
    curves.set(title="error against the length of the history", xlabel="steps of the window seen so far",
               ylabel="mean squared error (data units²)", xscale="log", yscale="log")
    figures.log_ticks(curves.xaxis, (1, 3))
    figures.log_ticks_for_range(curves)
    fig.legend(handles=handles, loc="outside lower center", ncols=2 if on_a_page else 4)
    return fig


def settings_of(reports):
    """Reports by setting, {label: list of them}: those that differ in the seed alone, and measure the same levels, are
    one setting."""
    name_of, groups = setting_names(reports), {}
    for report in reports:
        depths = tuple(m["depth"] for m in report["levels"])
        groups.setdefault((name_of[report["name"]], depths), []).append(report)
    return {name if len(group) == 1 else f"{name}, {len(group)} seeds": group for (name, _), group in groups.items()}


def depth_panels(panels, contents, reports):
    """Draw depth_panel in all panels; contents: like PANELS. Returns the handles of the legend that they share."""
    settings = settings_of(reports)
    colors = figures.run_colors(len(settings))
    baselines = reports[0].get("baselines", [])
    for ax, (name, lines) in zip(panels, contents, strict=True):
        figures.set_tick_sizes(ax)
        depth_panel(ax, settings, colors, name, lines, baselines)
    handles = [figures.Line2D([], [], color=color, marker="o", markersize=3.5, label=shortened(label))
               for label, color in zip(settings, colors, strict=True)]
    if any(m["depth"] > report["n_layers"] for report in reports for m in report["levels"]):
        handles.append(figures.Line2D([], [], color="0.3", linestyle="", marker="D", markersize=5, label=OUTPUT_LABEL))
    for first, dashes in BASELINES.items():
        if any(m["level"].startswith(first) for m in baselines):
            handles.append(figures.Line2D([], [], color=BASELINE_GREY, linestyle=dashes,
                                          label=BASELINE_LABELS[first]))
    return handles


def depth_panel(ax, settings, colors, name, lines, baselines=()):
    """One panel: its lines {label: read(level)} against depth, for each setting in its colour.

    settings: as from `settings_of`; baselines: their levels, of which the first line alone is drawn. Lines without any
    value are left out, and a panel without lines. With several lines left, a legend tells their styles; with one of
    several, the title names it.
    """
    reports = [report for group in settings.values() for report in group]
    n_layers = {report["n_layers"] for report in reports}
    shown = [(label, read) for label, read in lines.items()
             if any(read(m) is not None for report in reports for m in report["levels"])]
    shown = shown[:1] if len(settings) > 3 else shown
    if not shown:
        ax.axis("off")
        return
    for group, color in zip(settings.values(), colors, strict=True):
        deepest = group[0]["n_layers"] + 1 if len(n_layers) > 1 else 1
        depth = [m["depth"] / deepest for m in group[0]["levels"]]
        inside = sum(m["depth"] <= group[0]["n_layers"] for m in group[0]["levels"])
        for style, (_, read) in zip(LINE_STYLES, shown, strict=False):
            values = np.array([[np.nan if read(m) is None else read(m) for m in report["levels"]]
                               for report in group])
            mean = values.mean(axis=0)
            ax.plot(depth[:inside], mean[:inside], color=color, linestyle=style, marker="o", markersize=3.5)
            ax.plot(depth[inside:], mean[inside:], color=color, linestyle="", marker="D", markersize=5)
            if len(group) > 1:
                spread = values.std(axis=0, ddof=1)[:inside]
                ax.fill_between(depth[:inside], mean[:inside] - spread, mean[:inside] + spread, color=color, alpha=0.2,
                                linewidth=0)
    baseline_lines(ax, baselines, shown[0][1], reports[0]["n_layers"] + 1 if len(n_layers) > 1 else 1)
    ax.set_title(name + (f", {shown[0][0]}" if len(shown) == 1 < len(lines) else ""))
    if name.startswith(UNIT_PANELS):
        ax.set_ylim(min(0, ax.get_ylim()[0]), 1.02)
    depth_ticks(ax, reports, n_layers)
    if len(shown) > 1:
        ax.legend(handles=[figures.Line2D([], [], color="0.3", linestyle=style, label=label)
                           for style, (label, _) in zip(LINE_STYLES, shown, strict=False)])


def baseline_lines(ax, baselines, read, deepest):
    """The baselines of a panel that have a value: the untrained model against depth, the others as level lines."""
    for first, dashes in BASELINES.items():
        levels = [m for m in baselines if m["level"].startswith(first)]
        found = [(m.get("depth"), read({**dict.fromkeys(LEVEL_KEYS), **m})) for m in levels]
        found = [(depth, value) for depth, value in found if value is not None]
        if not found:
            continue
        style = {"color": BASELINE_GREY, "linestyle": dashes, "linewidth": 1.2, "zorder": 1}
        if len(found) == 1:
            ax.axhline(found[0][1], **style)
        else:
            ax.plot([depth / deepest for depth, _ in found], [value for _, value in found], **style)


def depth_ticks(ax, reports, n_layers):
    """Label the depth axis: "in", layer numbers (at most about 12) and "out"; only its ends when depths differ."""
    if len(n_layers) > 1:
        ax.set_xticks([0, 1], ["input", "output"])
        ax.set_xlabel("relative depth")
        return
    (n,) = n_layers
    depths = sorted({m["depth"] for report in reports for m in report["levels"]})
    every = -(-len(depths) // 12)
    marked = [d for d in depths if d in (0, n + 1) or (d % every == 0 and d + every <= n + 1) or every == 1]
    ax.set_xticks(marked, ["in" if d == 0 else "out" if d == n + 1 else str(d) for d in marked])
    ax.set_xlabel("layer")


def shortened(name, most=34):
    """The name, cut to `most` characters."""
    return name if len(name) <= most else name[:most - 1] + "…"
