"""The figures of what `evaluate_representations.py` measures: each measure against depth, for one or more models.

Reports are as in `level_tables`.
"""

import numpy as np

import cli
import figures
import measures
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
LINE_STYLES = ["-", "--", ":"]
OUTPUT_LABEL = "output: the prediction, in another space than the layers"
UNIT_PANELS = ("circle accuracy", "ARI", "NMI", "silhouette")  # panels with these titles have the scale 0…1


@cli.in_style
def draw_summary(reports, title):
    """Every measure against depth, from input to output, one colour per model; a Figure with a legend under its panels.

    The output has a marker of its own and is joined to no layer: it is the prediction, in the space of the features.
    With more than three models only the first line of each panel is drawn. Models that differ in depth share a relative
    depth axis.
    """
    colors = figures.run_colors(len(reports))
    on_a_page = cli.drawing_flags()[1] == "paper"  # too narrow for four panels side by side
    fig = figures.empty_figure((7.0, 9.0) if on_a_page else (14.8, 6.4), title)
    if on_a_page:
        grid = fig.add_gridspec(4, 2)
        places = [*(grid[i // 2, i % 2] for i in range(6)), grid[3, :]]
    else:
        grid = fig.add_gridspec(2, 12)
        places = [grid[0, i:i + 3] for i in range(0, 12, 3)] + [grid[1, i:i + 4] for i in range(0, 12, 4)]
    panels = [fig.add_subplot(place) for place in places]
    for ax, (name, lines) in zip(panels, PANELS, strict=True):
        figures.set_tick_sizes(ax)
        depth_panel(ax, reports, colors, name, lines)
    handles = [figures.Line2D([], [], color=color, marker="o", markersize=3.5, label=shortened(report["name"]))
               for report, color in zip(reports, colors, strict=True)]
    if any(m["depth"] > report["n_layers"] for report in reports for m in report["levels"]):
        handles.append(figures.Line2D([], [], color="0.3", linestyle="", marker="D", markersize=5, label=OUTPUT_LABEL))
    ceiling = reports[0]["filter_circle_accuracy"]
    if ceiling is not None:
        handles.append(panels[0].axhline(ceiling, color="0.4", linestyle="-.", linewidth=1,
                                         label=f"exact filter: {ceiling:.3f}"))
    fig.legend(handles=handles, loc="outside lower center", ncols=2 if on_a_page else 4)
    return fig


def depth_panel(ax, reports, colors, name, lines):
    """One panel of draw_summary: its lines {label: read(level)} against depth, for each report in its colour.

    Lines without any value are left out, and a panel without lines. With several lines left, a legend tells their
    styles; with one of several, the title names it.
    """
    n_layers = {report["n_layers"] for report in reports}
    shown = [(label, read) for label, read in lines.items()
             if any(read(m) is not None for report in reports for m in report["levels"])]
    shown = shown[:1] if len(reports) > 3 else shown
    if not shown:
        ax.axis("off")
        return
    for report, color in zip(reports, colors, strict=True):
        deepest = report["n_layers"] + 1 if len(n_layers) > 1 else 1
        depth = [m["depth"] / deepest for m in report["levels"]]
        for style, (_, read) in zip(LINE_STYLES, shown, strict=False):
            values = [np.nan if read(m) is None else read(m) for m in report["levels"]]
            inside = sum(m["depth"] <= report["n_layers"] for m in report["levels"])
            ax.plot(depth[:inside], values[:inside], color=color, linestyle=style, marker="o", markersize=3.5)
            ax.plot(depth[inside:], values[inside:], color=color, linestyle="", marker="D", markersize=5)
    ax.set_title(name + (f", {shown[0][0]}" if len(shown) == 1 < len(lines) else ""))
    if name.startswith(UNIT_PANELS):
        ax.set_ylim(min(0, ax.get_ylim()[0]), 1.02)
    depth_ticks(ax, reports, n_layers)
    if len(shown) > 1:
        ax.legend(handles=[figures.Line2D([], [], color="0.3", linestyle=style, label=label)
                           for style, (label, _) in zip(LINE_STYLES, shown, strict=False)])


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
