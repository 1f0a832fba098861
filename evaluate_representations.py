"""Measure what each layer of a model knows about the hidden circle and phase, and compare models.

Reads one or more checkpoints NAME.pt and data/data.npz. Levels are the input, the layers from 1 on and the output (the
prediction one step ahead), each over the whole series, in windows of the model's own length that overlap by a quarter:
but for the very first steps every step has at least that much past. Tables go to the terminal, files to --save-dir:
  NAME_umap.png       a UMAP a level, coloured by circle; with --per-layer NAME_umap_layer7.png and so on
  NAME_summary.png    every measure against depth
  NAME_metrics.json   all numbers
  compare_A_B_summary.png and .csv   with several checkpoints: all in the same axes and one table
With --velocity or --pca 20, NAME becomes NAME_velocity or NAME_pca20: no run overwrites the files of another kind.

The measures of a level:
  probe acc.   circle accuracy of a linear probe (multinomial logistic regression) fitted on the first 70 % of time
               and scored on the rest; the exact filter's accuracy on the same steps is the ceiling
  phase R²     of (cos θ, sin θ), ridge regression, fitted and scored on the same parts of time
  ARI, NMI     of k-means (as many clusters as circles) against the true circles, over all steps; "smooth": after a
               majority vote over 101 steps
  silhouette   of the circles, Euclidean, over the --umap-points sample
  in the UMAP  silhouette, ARI and NMI once more, in the two UMAP coordinates; a step has the cluster of the sampled
               step nearest to it. All circles share their centre: as rings around one point they have no silhouette
               and k-means cuts across them, however well they are apart. UMAP lays the rings side by side
  rank         effective rank, the participation ratio of the covariance
  dim k        Levina-Bickel dimension over k nearest neighbours of the --lb-points sample
The best layer is the one with the best probe. --pca acts on UMAP, k-means, silhouette and dimension, not on the probes
and the rank, which take the whole representation.

Examples:
  python evaluate_representations.py --checkpoint model_next.pt --layers input,4,7,output
  python evaluate_representations.py --checkpoint model_next.pt model_next_freeze_A.pt --no-umap
"""

import argparse
from pathlib import Path

import cli


def level_list(text):
    """`input,4,7,output` as a list of 'input', 'output' and layer numbers."""
    levels = []
    for part in text.split(","):
        if part in ("input", "output"):
            levels.append(part)
        elif part.isdecimal() and int(part) > 0:
            levels.append(int(part))
        else:
            raise argparse.ArgumentTypeError(f"{part!r} is not input, output or a layer counted from 1")
    return levels


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    levels = parser.add_argument_group("levels")
    levels.add_argument("--layers", type=level_list, metavar="L,L,…",
                        help="levels to measure: input, output, layers counted from 1 (default: all)")
    levels.add_argument("--velocity", action="store_true",
                        help="take the change since the step before, h[t] - h[t-1], in place of the state h[t]")
    levels.add_argument("--pca", type=cli.positive_int, metavar="N",
                        help="reduce each level to its first N principal components; narrower ones stay as they are "
                             "(default: no reduction)")
    umaps = parser.add_argument_group("UMAP and silhouette")
    umaps.add_argument("--no-umap", action="store_true", help="no UMAPs: much faster")
    umaps.add_argument("--umap-points", type=cli.positive_int, default=5000, metavar="N",
                       help="random time steps in each UMAP and in the silhouette")
    umaps.add_argument("--umap-neighbors", type=cli.positive_int, default=30, metavar="K",
                       help="UMAP's n_neighbors, the point itself included")
    umaps.add_argument("--per-layer", action="store_true", help="one UMAP file a level in place of one grid")
    dimension = parser.add_argument_group("dimension")
    dimension.add_argument("--no-lb", action="store_true", help="no Levina-Bickel dimension")
    dimension.add_argument("--lb-points", type=cli.positive_int, default=10_000, metavar="N",
                           help="random time steps for the dimension")
    computing = parser.add_argument_group("computing")
    cli.add_seed(computing)
    cli.add_device(computing)
    cli.add_scan(computing)
    files = parser.add_argument_group("files")
    files.add_argument("--checkpoint", type=Path, nargs="+", default=[Path("model_next.pt")], metavar="NAME.pt",
                       help="trained models; several are compared")
    cli.add_data_dir(files)
    cli.add_save_dir(files)
    args = parser.parse_args(argv)
    if args.umap_neighbors < 2:
        parser.error("--umap-neighbors must be 2 or more: the point itself counts as one")
    if not args.no_umap and args.umap_points <= args.umap_neighbors:
        parser.error(f"--umap-points {args.umap_points} must be more than --umap-neighbors {args.umap_neighbors}")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the slow imports: --help and a bad flag answer at once

import concurrent.futures
import csv
import hashlib
import io
import json
import multiprocessing
import os
import signal
import threading
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import torch
from tqdm import tqdm

import dataset
import figures
import mamba_model
import measures

KS = (10, 30, 100)  # neighbours of the dimension estimate
K_SHOWN = 30  # the one in panel titles and in the comparison
PROBE_FRACTION = 0.7  # of time, to fit the probes
PROBE_STEPS = 20_000  # at most, drawn from that part
STEPS_IN_BATCH = {"cpu": 2**14, "cuda": 2**18}
POINTS_WORTH_A_POOL = 10_000  # starting a process costs as long as embedding about this many points


# ---------------------------------------------------------------------------------------------------------------
# Representations


def level_names(n_layers):
    """Names of all levels of a model, in order of depth."""
    return ["input", *(f"layer {i}" for i in range(1, n_layers + 1)), "output"]


def chosen_depths(levels, n_layers, checkpoint):
    """Depths (0 the input, n_layers + 1 the output), ascending, of the levels that --layers names; None: all.

    Raises UserError for a layer that the model doesn't have.
    """
    if levels is None:
        return list(range(n_layers + 2))
    for level in levels:
        if isinstance(level, int) and level > n_layers:
            raise cli.UserError(f"--layers {level} is out of range: {checkpoint} has layers 1…{n_layers}, input and "
                                "output")
    return sorted({{"input": 0, "output": n_layers + 1}.get(level, level) for level in levels})


def overlapping_windows(n_steps, seq_len):
    """Starts of windows that cover every step, each overlapping the one before by a quarter or more: (starts, length).

    The last one ends with the series. A series shorter than seq_len is one window.
    """
    length = min(seq_len, n_steps)
    advance = length - max(1, length // 4)
    starts = list(range(0, n_steps - length + 1, max(advance, 1)))
    if starts[-1] + length < n_steps:
        starts.append(n_steps - length)
    return starts, length


def stitch(windows, starts, velocity=False):
    """One row a time step from overlapping windows (n, length, width), each step from the window with most past.

    Returns (n_steps, width), or (n_steps - 1, width) with velocity: the change from the step before, within a window,
    for the steps from 1 on.
    """
    first = int(velocity)  # the step of a window's first row
    if velocity:
        windows = windows.diff(dim=1)
    parts, done = [], first
    for window, start in zip(windows, starts, strict=True):
        parts.append(window[done - start - first:])
        done = start + first + len(window)
    return torch.cat(parts).numpy()


@torch.inference_mode()
def in_batches(function, x, device):
    """function(x) for x (n, length, width), a few windows at a time on the device; the result on the CPU."""
    n = max(1, STEPS_IN_BATCH[device.type] // x.shape[1])
    return torch.cat([function(part.to(device)).cpu() for part in x.split(n)])


def representations(model, X, seq_len, depths, velocity=False):
    """Yields (depth, values) for the wanted depths: values (n_steps, width) float32, one row fewer with velocity.

    All windows go through one layer before the next: memory holds one level of the series, however deep the model.
    """
    device = next(model.parameters()).device
    backend = model.backend_for(device)
    starts, length = overlapping_windows(len(X), seq_len)
    h = dataset.gather(X, starts, length)
    steps = [model.input_proj, *(lambda x, layer=layer: layer(x, backend) for layer in model.layers),
             lambda x: model.output_heads["1"](model.final_norm(x))]
    for depth in range(max(depths) + 1):
        if depth == 0:
            level, h = h, in_batches(steps[0], h, device) if max(depths) else None
        else:
            level = h = in_batches(steps[depth], h, device)
        if depth in depths:
            yield depth, stitch(level, starts, velocity)


@torch.inference_mode()
def validation_mse(model, X, starts, seq_len):
    """Mean squared error of each horizon over validation windows, as in training: {k: mse}, float32 arithmetic.

    The prediction at t is compared with x[t + k] for all t + k in the window. starts (n,): first steps.
    """
    device = next(model.parameters()).device
    sums = dict.fromkeys(model.horizons, 0.0)
    for part in torch.from_numpy(starts).split(max(1, STEPS_IN_BATCH[device.type] // seq_len)):
        x = dataset.gather(X, part, seq_len).to(device)
        for key, prediction in model(x).items():
            k = int(key)
            sums[k] += len(part) * (prediction[:, :-k] - x[:, k:]).square().mean(dtype=torch.float64).item()
    return {k: total / len(starts) for k, total in sums.items()}


# ---------------------------------------------------------------------------------------------------------------
# Measures


def probe_split(n_rows, rng):
    """Row numbers to fit the probes, at most PROBE_STEPS from the first PROBE_FRACTION of time, and the rows to score
    them, all later ones: (train (n,), a slice)."""
    boundary = round(n_rows * PROBE_FRACTION)
    train = np.sort(rng.permutation(boundary)[:PROBE_STEPS])
    return train, slice(boundary, n_rows)


def neighborhood(points, lb_points, umap_points, umap_neighbors):
    """Dimension {k: value} of the first lb_points and the neighbour graph (distances, indices) that UMAP needs of the
    first umap_points; None for what has 0 points.

    One neighbour query serves all k and, where its lists are long enough, UMAP too. The dimension of a level with too
    few distinct points is None for all k.
    """
    dimension = graph = None
    if lb_points:
        distances, indices = measures.knn(points[:lb_points], max(KS))
        try:
            # Repeated points would count as neighbours at distance 0: levina_bickel leaves them out and asks anew.
            distinct = distances[:, 0].min() > 0
            dimension = (measures.dimension_from_distances(distances, KS) if distinct
                         else measures.levina_bickel(points[:lb_points], KS))
        except cli.UserError:
            dimension = dict.fromkeys(KS)
        if 0 < umap_points <= lb_points:
            graph = measures.knn_of_first(distances, indices, umap_points, umap_neighbors - 1)
    if umap_points and graph is None:
        graph = measures.knn(points[:umap_points], umap_neighbors - 1)
    return dimension, graph


def level_measures(values, series, rows, args):
    """All measures of one level, and what its UMAP needs.

    values (n, width), a row for each of the last n steps of the series; rows: the sampled row numbers, in random
    order. Returns (dict, points (n_umap, width), graph, nearest (n,)), the last three None without UMAP: the sampled
    points, their neighbours, and which of them is nearest to each row.
    """
    from sklearn.metrics import pairwise_distances_argmin

    states, thetas = series.states[-len(values):], series.thetas[-len(values):]
    mean, eigenvalues, vectors = measures.spectrum(values)
    reduced = measures.principal_components(values, mean, vectors, args.pca)
    points = reduced[rows]
    n_umap, n_lb = min(args.umap_points, len(rows)), 0 if args.no_lb else min(args.lb_points, len(rows))
    dimension, graph = neighborhood(points, n_lb, 0 if args.no_umap else n_umap, args.umap_neighbors)

    fit, score = probe_split(len(values), np.random.default_rng(args.seed))
    train, test = measures.whitened(values[fit], values[score])
    level = {
        "width": values.shape[1],
        "probe_accuracy": measures.circle_probe(train, states[fit], test, states[score]),
        "phase_r2": measures.phase_probe(train, thetas[fit], test, thetas[score]),
        **measures.cluster_scores(reduced, rows, states, series.n_circles, args.seed),
        "silhouette": measures.silhouette(points[:n_umap], states[rows[:n_umap]]),
        "effective_rank": measures.participation_ratio(eigenvalues),
        "dimension": dimension,
    }
    if args.no_umap:
        return level, None, None, None
    return level, points[:n_umap], graph, pairwise_distances_argmin(reduced, points[:n_umap])


def best_layer(levels):
    """The measures of the layer, neither input nor output, with the best probe; the first of equals. None without."""
    layers = [m for m in levels if m["level"].startswith("layer") and m["probe_accuracy"] is not None]
    return max(layers, key=lambda m: m["probe_accuracy"], default=None)


# ---------------------------------------------------------------------------------------------------------------
# UMAP


def umap_pool(n_embeddings, n_points):
    """A pool of processes for the UMAPs, or None where one process is as fast."""
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), n_embeddings)
    if workers < 2 or n_embeddings * n_points < POINTS_WORTH_A_POOL:
        return None
    # Spawned, not forked: torch's and numba's threads don't survive a fork.
    return concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"),
                                                  initializer=start_worker)


def start_worker():
    """A worker ends on Ctrl-C without a traceback, and with the script even when that is killed: it would wait for work
    for ever."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def end_with_the_script():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_the_script, daemon=True).start()


def submit(pool, function, *arguments):
    """A future of function(*arguments), computed in the pool, or here and now without one."""
    if pool is not None:
        return pool.submit(function, *arguments)
    future = concurrent.futures.Future()
    future.set_result(function(*arguments))
    return future


# ---------------------------------------------------------------------------------------------------------------
# Floor and ceiling


def filter_accuracy(process, series):
    """How often the exact filter, given all of the past, names the circle, over the steps that score the probes."""
    from optimal_filter import predict

    posterior = predict(process, series.X, horizons=(), keep_predictions=False)["circle_posterior"]
    _, scored = probe_split(series.n_steps, np.random.default_rng(0))
    return float((posterior.argmax(axis=1) == series.states)[scored].mean())


def prediction_errors(model, series, windows, process, floors):
    """The model's validation MSE and the exact filter's on the same windows: a list with a dict a horizon.

    windows: (seq_len, stride, val_fraction); floors: those of earlier models, {key: {k: mse}}, added to. The filter
    starts anew in each window, as the model does. Raises UserError when the validation part holds no window.
    """
    seq_len = windows[0]
    _, starts, _ = dataset.split_windows(series.n_steps, *windows)
    if model.horizons[-1] >= seq_len:
        raise cli.UserError(f"its largest horizon, {model.horizons[-1]}, does not fit into windows of {seq_len} steps")
    mse = validation_mse(model, series.X, starts, seq_len)
    key = (windows, tuple(model.horizons))
    if process is not None and key not in floors:
        from optimal_filter import window_mse

        floors[key] = window_mse(process, series, starts, seq_len, model.horizons)
    floor = floors.get(key, {})
    return [{"horizon": k, "val_mse": value, "optimal_mse": floor.get(k),
             "excess_percent": 100 * (value / floor[k] - 1) if floor else None} for k, value in mse.items()]


# ---------------------------------------------------------------------------------------------------------------
# Tables


def cell(value, form=".3f"):
    return "–" if value is None else format(value, form)


def level_table(report):
    """The table of one model: a row a level."""
    columns = [("probe acc.", "probe_accuracy", ".3f"), ("phase R²", "phase_r2", ".3f"), ("ARI", "kmeans_ari", ".3f"),
               ("smooth", "kmeans_ari_smooth", ".3f"), ("NMI", "kmeans_nmi", ".3f"),
               ("smooth", "kmeans_nmi_smooth", ".3f"), ("silhouette", "silhouette", ".3f"),
               ("rank", "effective_rank", ".1f")]
    with_dimension = any(m["dimension"] for m in report["levels"])
    header = ["level", *(title for title, _, _ in columns), *([f"dim {k}" for k in KS] if with_dimension else [])]
    return cli.table(header, [
        [m["level"], *(cell(m[key], form) for _, key, form in columns),
         *([cell(m["dimension"][k], ".2f") for k in KS] if with_dimension else [])] for m in report["levels"]])


def umap_table(report):
    """The table of what a model's UMAPs tell apart: a row a level."""
    keys = ("umap_silhouette", "umap_ari", "umap_ari_smooth", "umap_nmi", "umap_nmi_smooth")
    return cli.table(["in the UMAP", "silhouette", "ARI", "smooth", "NMI", "smooth"], [
        [m["level"], *(cell(m[key]) for key in keys)] for m in report["levels"]])


def error_table(report):
    return cli.table(["horizon", "val MSE", "optimal", "excess"], [
        [row["horizon"], cell(row["val_mse"], ".4f"), cell(row["optimal_mse"], ".4f"),
         cell(row["excess_percent"], "+.2f") + (" %" if row["excess_percent"] is not None else "")]
        for row in report["errors"]], align="rrrr")


def peak(levels, key):
    """The highest value of a measure over all levels, None where no level has it."""
    return max((m[key] for m in levels if m.get(key) is not None), default=None)


def comparison_row(report):
    """One model in one row: its prediction one step ahead, its best layer, its last layer and its peaks over levels."""
    error = next((row for row in report["errors"] if row["horizon"] == 1), {})
    levels = report["levels"]
    best = best_layer(levels) or {}
    deepest = next((m for m in reversed(levels) if m["level"].startswith("layer")), {})
    return {"checkpoint": report["name"], "val_mse": error.get("val_mse"), "optimal_mse": error.get("optimal_mse"),
            "excess_percent": error.get("excess_percent"), "best_layer": best.get("level"),
            "probe_accuracy": best.get("probe_accuracy"), "phase_r2": best.get("phase_r2"),
            "silhouette": best.get("silhouette"), "kmeans_ari": best.get("kmeans_ari"),
            "kmeans_ari_smooth": best.get("kmeans_ari_smooth"),
            f"dimension_k{K_SHOWN}": (best.get("dimension") or {}).get(K_SHOWN),
            f"last_layer_dimension_k{K_SHOWN}": (deepest.get("dimension") or {}).get(K_SHOWN),
            **{f"peak_{key}": peak(levels, key) for key in ("silhouette", "umap_silhouette", "umap_ari_smooth")}}


COMPARISON = {"checkpoint": ("checkpoint", ""), "val_mse": ("val MSE", ".4f"), "optimal_mse": ("optimal", ".4f"),
              "excess_percent": ("excess %", "+.2f"), "best_layer": ("best layer", ""),
              "probe_accuracy": ("probe acc.", ".3f"), "phase_r2": ("phase R²", ".3f"),
              "silhouette": ("silhouette", ".3f"), "kmeans_ari": ("ARI", ".3f"), "kmeans_ari_smooth": ("smooth", ".3f"),
              f"dimension_k{K_SHOWN}": (f"dim {K_SHOWN}", ".2f"),
              f"last_layer_dimension_k{K_SHOWN}": ("last", ".2f"), "peak_silhouette": ("peak sil.", ".3f"),
              "peak_umap_silhouette": ("UMAP sil.", ".3f"), "peak_umap_ari_smooth": ("UMAP ARI", ".3f")}


def comparison_table(rows):
    """Rows of comparison_row as text; columns that no row has a value for are left out."""
    keys = [key for key in COMPARISON if any(row[key] is not None for row in rows)]
    return cli.table([COMPARISON[key][0] for key in keys],
                     [[cell(row[key], COMPARISON[key][1]) for key in keys] for row in rows])


def seed_groups(reports):
    """Reports of models trained with the same flags but for the seed, {name of the first: list}, two or more each."""
    groups = {}
    for report in reports:
        flags = {key: value for key, value in report["trained_with"].items()
                 if key not in ("seed", "checkpoint", "resume", "device", "log_dir")}
        groups.setdefault(json.dumps(flags, sort_keys=True, default=str), []).append(report)
    return {group[0]["name"]: group for group in groups.values() if len(group) > 1}


def spread_table(groups):
    """Mean ± standard deviation over seeds of each column of the comparison, a row a group; None without numbers."""
    rows = []
    for name, group in groups.items():
        rows.append([f"{name}, {len(group)} seeds"])
        members = [comparison_row(report) for report in group]
        for key, (_, form) in COMPARISON.items():
            values = [member[key] for member in members]
            if form and None not in values:
                rows[-1].append(f"{np.mean(values):{form}} ± {np.std(values, ddof=1):{form.lstrip('+')}}")
            elif form:
                rows[-1].append("–")
    header = ["mean ± std", *(title for title, form in COMPARISON.values() if form)]
    kept = [i for i in range(len(header)) if i == 0 or any(row[i] != "–" for row in rows)]
    return cli.table([header[i] for i in kept], [[row[i] for i in kept] for row in rows])


def comparison_csv(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)  # None is written as an empty cell
    return text.getvalue()


# ---------------------------------------------------------------------------------------------------------------
# Figures


def level_title(level):
    """A level's name with its dimension, and the silhouette of the circles as the panel shows them."""
    dimension = (level["dimension"] or {}).get(K_SHOWN)
    facts = [f"dim {dimension:.1f}"] if dimension is not None else []
    if level["umap_silhouette"] is not None:
        facts.append(f"silhouette here {level['umap_silhouette']:.2f}")
    return "\n".join([level["level"], ", ".join(facts)]).strip()


# (title, {line label: how to read it from a level's measures}); the first line of a panel is the solid one.
PANELS = [
    ("circle accuracy of a linear probe", {"": lambda m: m["probe_accuracy"]}),
    ("phase R², (cos θ, sin θ)", {"": lambda m: m["phase_r2"]}),
    ("ARI of k-means", {f"vote over {measures.VOTE_STEPS} steps": lambda m: m["kmeans_ari_smooth"],
                        "raw": lambda m: m["kmeans_ari"], "in the UMAP, vote": lambda m: m.get("umap_ari_smooth")}),
    ("NMI of k-means", {f"vote over {measures.VOTE_STEPS} steps": lambda m: m["kmeans_nmi_smooth"],
                        "raw": lambda m: m["kmeans_nmi"], "in the UMAP, vote": lambda m: m.get("umap_nmi_smooth")}),
    ("silhouette of the circles", {"in the level": lambda m: m["silhouette"],
                                   "in its UMAP": lambda m: m.get("umap_silhouette")}),
    ("effective rank", {"": lambda m: m["effective_rank"]}),
    ("Levina–Bickel dimension", {f"k = {k}": lambda m, k=k: (m["dimension"] or {}).get(k)
                                 for k in sorted(KS, key=lambda k: k != K_SHOWN)}),
]
LINE_STYLES = ["-", "--", ":"]
UNIT_PANELS = ("circle accuracy", "ARI", "NMI", "silhouette")  # share the scale 0…1


def summary_figure(reports, title):
    """Every measure against depth, from input to output, one colour a model; the last panel is the legend."""
    n_layers = {report["n_layers"] for report in reports}
    colors = figures.circle_colors(max(len(reports), 2))
    fig, axes = figures.new_figure(2, 4, panel=(3.7, 3.0), title=title)
    for ax, (name, lines) in zip(axes.ravel(), PANELS, strict=False):
        shown = [(label, read) for label, read in lines.items()
                 if any(read(m) is not None for report in reports for m in report["levels"])]
        shown = shown[:1 if len(reports) > 3 else None]
        for report, color in zip(reports, colors, strict=False):
            depth = [m["depth"] / (report["n_layers"] + 1 if len(n_layers) > 1 else 1) for m in report["levels"]]
            for style, (_, read) in zip(LINE_STYLES, shown, strict=False):
                values = [np.nan if read(m) is None else read(m) for m in report["levels"]]
                ax.plot(depth, values, color=color, linestyle=style, marker="o", markersize=3.5)
        ax.set_title(name + (f", {shown[0][0]}" if len(shown) == 1 < len(lines) else ""))
        if name.startswith(UNIT_PANELS):
            ax.set_ylim(min(0, ax.get_ylim()[0]), 1.02)
        depth_ticks(ax, reports, n_layers)
        if len(shown) > 1:
            ax.legend(handles=[figures.Line2D([], [], color="0.3", linestyle=style, label=label)
                               for style, (label, _) in zip(LINE_STYLES, shown, strict=False)])
    handles = [figures.Line2D([], [], color=color, marker="o", markersize=3.5, label=shortened(report["name"]))
               for report, color in zip(reports, colors, strict=False)]
    ceiling = reports[0]["filter_circle_accuracy"]
    if ceiling is not None:
        handles.append(axes[0, 0].axhline(ceiling, color="0.4", linestyle="-.", linewidth=1,
                                          label=f"exact filter: {ceiling:.3f}"))
    figures.hide_unused(axes, len(PANELS))
    axes.ravel()[-1].legend(handles=handles, loc="center left")
    return fig


def depth_ticks(ax, reports, n_layers):
    """Label the depth axis: layers by number, or only its ends when the models differ in depth."""
    if len(n_layers) > 1:
        ax.set_xticks([0, 1], ["input", "output"])
        ax.set_xlabel("relative depth")
        return
    (n,) = n_layers
    depths = sorted({m["depth"] for report in reports for m in report["levels"]})
    every = -(-len(depths) // 12)
    kept = [d for d in depths if d in (0, n + 1) or (d % every == 0 and d + every <= n + 1) or every == 1]
    ax.set_xticks(kept, ["in" if d == 0 else "out" if d == n + 1 else str(d) for d in kept])
    ax.set_xlabel("layer")


def shortened(name, most=34):
    return name if len(name) <= most else name[:most - 1] + "…"


# ---------------------------------------------------------------------------------------------------------------
# The script


def variant(args):
    """What --velocity and --pca add to file names, and to titles."""
    suffix = ("_velocity" if args.velocity else "") + (f"_pca{args.pca}" if args.pca else "")
    words = [", change since the step before"] if args.velocity else []
    words += [f", up to {args.pca} principal components"] if args.pca else []
    return suffix, "".join(words)


def unique_names(checkpoints):
    """The stems of the checkpoints, which name their files. Raises UserError when two are the same."""
    names = [mamba_model.stem(path) for path in checkpoints]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise cli.UserError(f"{checkpoints[names.index(name)]} and {checkpoints[i]} would both write {name}_… "
                                "files; give each checkpoint once, and rename one where the names are the same")
    return names


def comparison_name(names, most=100):
    """compare_A_B, cut and closed with a hash where it would be too long for a file name."""
    joined = "_".join(names)
    if len(joined) > most:
        joined = f"{joined[:most]}_{hashlib.sha256(joined.encode()).hexdigest()[:8]}"
    return f"compare_{joined}"


def sampled_rows(n_rows, args):
    """Row numbers of the sample, in random order: the UMAP and the dimension take the first ones of them.

    Raises UserError when there are too few for either.
    """
    rows = np.random.default_rng(args.seed).permutation(n_rows)[:max(args.umap_points, args.lb_points)]
    if not args.no_umap and len(rows) <= args.umap_neighbors:
        raise cli.UserError(f"the series has {n_rows} steps to draw from, too few for --umap-neighbors "
                            f"{args.umap_neighbors}; use a smaller one or --no-umap")
    if not args.no_lb and min(args.lb_points, len(rows)) <= max(KS):
        raise cli.UserError(f"the dimension needs more than {max(KS)} points, and there are "
                            f"{min(args.lb_points, len(rows))}; use more --lb-points, a longer series or --no-lb")
    return rows


def load_models(args, series, device):
    """All models with what belongs to them, checked before any work: a list of (name, path, model, windows, depths,
    the flags of its training that JSON can hold)."""
    models = []
    for name, path in zip(unique_names(args.checkpoint), args.checkpoint, strict=True):
        model, saved = mamba_model.load_checkpoint(path, device)
        dataset.check_fits_model(series, model, path)
        depths = chosen_depths(args.layers, model.n_layers, path)
        models.append((name, path, model.use_scan(args.scan, device), dataset.window_settings(saved, path), depths,
                       {key: value for key, value in saved.items()
                        if isinstance(value, str | int | None) or (isinstance(value, float) and np.isfinite(value))}))
    return models


def evaluate(model, series, windows, depths, rows, args, pool, name):
    """Measures of all levels of a model, the futures of their UMAPs, the sampled step nearest to each: three lists."""
    names, measured, futures, nearest = level_names(model.n_layers), [], [], []
    levels = representations(model, series.X, windows[0], depths, args.velocity)
    for depth, values in tqdm(levels, desc=name, total=len(depths), unit="level", disable=None):
        if not np.isfinite(values).all():
            raise cli.UserError(f"{name}: {names[depth]} holds NaN or infinity on these data; give another "
                                "--checkpoint or the --data-dir it was trained on")
        level, points, graph, nearest_sample = level_measures(values, series, rows, args)
        measured.append({"level": names[depth], "depth": depth, **level})
        if not args.no_umap:
            futures.append(submit(pool, measures.umap_embedding, points, graph, args.seed))
            nearest.append(nearest_sample)
    return measured, futures, nearest


def write_report(report, args, prefix, subtitle):
    print(level_table(report))
    if "umap_silhouette" in report["levels"][0]:
        print(umap_table(report))
    cli.write_text(args.save_dir / f"{prefix}_metrics.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    print(f"wrote {args.save_dir / f'{prefix}_metrics.json'}")
    figures.save(summary_figure([report], f"{report['name']}: measures against depth{subtitle}"),
                 args.save_dir / f"{prefix}_summary.png")


def write_umaps(report, embeddings, states, n_circles, args, prefix, subtitle):
    title = f"{report['name']}: UMAP of {len(states):,} steps{subtitle}"
    titles = [level_title(m) for m in report["levels"]]
    if not args.per_layer:
        fig = figures.draw_umaps(embeddings, titles, states, n_circles, title)
        figures.save(fig, args.save_dir / f"{prefix}_umap.png")
        return
    for level, embedding, panel_title in zip(report["levels"], embeddings, titles, strict=True):
        fig = figures.draw_umaps([embedding], [panel_title], states, n_circles, title)
        figures.save(fig, args.save_dir / f"{prefix}_umap_{level['level'].replace(' ', '')}.png")


def write_comparison(reports, args, suffix, subtitle):
    rows = [comparison_row(report) for report in reports]
    prefix = comparison_name([report["name"] for report in reports]) + suffix
    print(f"\nbest layer of each checkpoint (last: dimension of the last layer, k = {K_SHOWN}; peaks over all levels)\n"
          + comparison_table(rows))
    groups = seed_groups(reports)
    if groups:
        print("\nthe same flags but for the seed\n" + spread_table(groups))
    cli.write_text(args.save_dir / f"{prefix}_summary.csv", comparison_csv(rows))
    print(f"wrote {args.save_dir / f'{prefix}_summary.csv'}")
    figures.save(summary_figure(reports, f"measures against depth{subtitle}"),
                 args.save_dir / f"{prefix}_summary.png")


def main(args):
    from optimal_filter import known_process

    device = cli.pick_device(args.device)
    series = dataset.load_series(args.data_dir)
    models = load_models(args, series, device)
    first = int(args.velocity)  # the first step has no step before it
    rows = sampled_rows(series.n_steps - first, args)
    cli.output_folder(args.save_dir)
    suffix, subtitle = variant(args)

    n_embeddings = 0 if args.no_umap else sum(len(depths) for *_, depths, _ in models)
    pool = umap_pool(n_embeddings, min(args.umap_points, len(rows)))
    try:
        process = known_process(series, "no optimal floor and ceiling")
        accuracy = None if process is None else filter_accuracy(process, series)
        floors, reports = {}, []
        for name, path, model, windows, depths, trained_with in models:
            print(f"\n{name}: {model.n_layers} layers" + (f"; exact filter's circle accuracy {accuracy:.3f}"
                                                          if accuracy is not None else ""))
            report = {"name": name, "checkpoint": str(path), "data_dir": str(args.data_dir), "seed": args.seed,
                      "velocity": args.velocity, "pca": args.pca, "umap_points": min(args.umap_points, len(rows)),
                      "lb_points": None if args.no_lb else min(args.lb_points, len(rows)), "n_layers": model.n_layers,
                      "seq_len": windows[0], "filter_circle_accuracy": accuracy, "errors": [],
                      "trained_with": trained_with}
            try:
                report["errors"] = prediction_errors(model, series, windows, process, floors)
                print(error_table(report))
            except cli.UserError as error:
                print(f"no validation MSE: {error}")
            report["levels"], futures, nearest = evaluate(model, series, windows, depths, rows, args, pool, name)
            best = best_layer(report["levels"])
            report["best_layer"] = best["level"] if best else None
            shown = series.states[first + rows[:report["umap_points"]]]
            embeddings = [future.result() for future in futures]
            for level, embedding, to_shown in zip(report["levels"], embeddings, nearest, strict=False):
                level |= measures.embedding_scores(embedding, to_shown, shown, series.states[first:], series.n_circles,
                                                   args.seed)
            write_report(report, args, name + suffix, subtitle)
            if embeddings:
                write_umaps(report, embeddings, shown, series.n_circles, args, name + suffix, subtitle)
            reports.append(report)
        if len(reports) > 1:
            write_comparison(reports, args, suffix, subtitle)
    except BrokenProcessPool:
        raise cli.UserError("a process that computed a UMAP was ended, probably for lack of memory; "
                            "use fewer --umap-points") from None
    finally:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    cli.run(main, ARGS)
