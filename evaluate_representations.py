"""Measure what each layer of a model knows about the hidden circle and phase, and compare models.

Reads one or more checkpoints NAME.pt and data/data.npz. The levels of a model are the input, the layers from 1 on, and
the output (the prediction one step ahead). Each is computed for every time step of the series, in windows of the length
that the model was trained on. Neighbouring windows overlap by a quarter, so that the model has seen at least that much
of the past of every step but the first ones. Tables go to the terminal, files to --save-dir:
  NAME_umap.png       one UMAP per level, coloured by circle; with --per-layer NAME_umap_layer7.png and so on
  NAME_summary.png    every measure against depth
  NAME_metrics.json   all numbers
  compare_A_B_summary.png and .csv   with several checkpoints: all in the same axes and in one table
With --velocity or --pca 20, NAME becomes NAME_velocity or NAME_pca20, so that nothing is overwritten.

The measures of a level:
  probe acc.   how often a linear probe (multinomial logistic regression), fitted on the first 70 % of time, names the
               true circle in the rest; the exact filter's accuracy on the same steps is the ceiling
  phase R²     of (cos θ, sin θ) by ridge regression, fitted and scored on the same parts of time
  ARI, NMI     of k-means (as many clusters as circles) against the true circles, over all steps; "smooth": after a
               majority vote over 101 steps
  silhouette   of the circles, Euclidean, over the --umap-points sample
  in the UMAP  silhouette, ARI and NMI once more, in the two UMAP coordinates; a step that is not in the sample has the
               cluster of the sampled step nearest to it. The circles share their centre: as rings around one point they
               have no silhouette and k-means cuts across them, however far apart they are. UMAP lays the rings side by
               side
  rank         effective rank, the participation ratio of the covariance
  dim k        Levina-Bickel dimension over k nearest neighbours of the --lb-points sample
The best layer is the one with the best probe. --pca acts on UMAP, k-means, silhouette and dimension, not on the probes
and the rank, which take the whole representation.

Examples:
  python evaluate_representations.py --checkpoint model_next.pt --layers input,4,7,output
  python evaluate_representations.py --checkpoint model_next.pt model_next_freeze_A.pt --no-umap
"""

import cli  # first: from here on Ctrl-C ends the script without a traceback

# isort: split
import argparse
import concurrent.futures
import csv
import io
import json
import multiprocessing
import os
import signal
import threading
import zlib
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple


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
    umaps.add_argument("--per-layer", action="store_true", help="one UMAP file per level in place of one grid")
    dimension = parser.add_argument_group("dimension")
    dimension.add_argument("--no-lb", action="store_true", help="no Levina-Bickel dimension")
    dimension.add_argument("--lb-points", type=cli.positive_int, default=10_000, metavar="N",
                           help="random time steps for the dimension")
    cli.add_computing(parser)
    cli.add_drawing(parser)
    files = parser.add_argument_group("files")
    files.add_argument("--checkpoint", type=Path, nargs="+", default=[Path("model_next.pt")], metavar="NAME.pt",
                       help="trained models; several are compared")
    cli.add_data_dir(files, of_checkpoint=True)
    cli.add_save_dir(files)
    args = parser.parse_args(argv)
    if args.umap_neighbors < 2:
        parser.error("--umap-neighbors must be 2 or more: the point itself counts as one")
    if not args.no_umap and args.umap_points < 4:
        parser.error(f"--umap-points {args.umap_points}: a UMAP needs 4 points or more")
    if not args.no_umap and args.umap_points <= args.umap_neighbors:
        parser.error(f"--umap-points {args.umap_points} must be more than --umap-neighbors {args.umap_neighbors}")
    return args


if __name__ == "__main__":
    cli.start()
    ARGS = parse_args()  # before the slow imports: --help and a bad flag answer at once

import numpy as np
import torch
from tqdm import tqdm

import dataset
import figures
import mamba_model
import measures
import optimal_filter

KS = (10, 30, 100)  # numbers of neighbours for the dimension
K_SHOWN = 30  # the one of them in panel titles and in the comparison
PROBE_FRACTION = 0.7  # the probes are fitted on this part of time and scored on the rest
PROBE_STEPS = 20_000  # at most so many steps of that part, drawn at random
STEPS_IN_BATCH = {"cpu": 2**14, "cuda": 2**18}  # time steps that go through a layer at once
POINTS_WORTH_A_POOL = 10_000  # starting a process takes as long as embedding about this many points


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
    """Windows that cover every step, each overlapping the one before by a quarter or more: (list of starts, length).

    The last window ends with the series. A series shorter than seq_len is one window.
    """
    length = min(seq_len, n_steps)
    advance = length - max(1, length // 4)
    starts = list(range(0, n_steps - length + 1, max(advance, 1)))
    if starts[-1] + length < n_steps:
        starts.append(n_steps - length)
    return starts, length


def steps_of_rows(series, velocity):
    """The time steps that have a row of a level, (n_rows,): all, or with velocity all but the first of each recording,
    which has no step before it."""
    steps = np.arange(series.n_steps)
    return np.delete(steps, series.recordings[:, 0]) if velocity else steps


def stitch(windows, starts, velocity=False):
    """One row per time step from overlapping windows (n, length, width).

    A step that lies in several windows is taken from the one that holds most of its past. Returns (n_steps, width), or
    (n_steps - 1, width) with velocity: the change since the step before, both in one window, for the steps from 1 on.
    """
    first = int(velocity)  # the step of a window's first row
    if velocity:
        windows = windows.diff(dim=1)
    rows, done = [], first  # `done`: the steps before this one have their row
    for window, start in zip(windows, starts, strict=True):
        rows.append(window[done - start - first:])
        done = start + first + len(window)
    return torch.cat(rows).numpy()


@torch.inference_mode()
def in_batches(function, x, device):
    """function(x) for x (n, length, width), a few windows at a time on the device; the result is on the CPU."""
    n = max(1, STEPS_IN_BATCH[device.type] // x.shape[1])
    return torch.cat([function(windows.to(device)).cpu() for windows in x.split(n)])


def representations(model, X, seq_len, depths, velocity=False, recordings=None):
    """Yields (depth, values) for the wanted depths: values (n_steps, width) float32, with velocity one row less for
    each recording.

    recordings: as Series.recordings where there are several; no window crosses a border. All windows go through one
    layer before the next one, so that memory holds one level of the series, however deep the model is.
    """
    device = next(model.parameters()).device
    backend = model.backend_for(device)
    pieces = [(X[first:end], *overlapping_windows(end - first, seq_len))
              for first, end in ([(0, len(X))] if recordings is None else recordings.tolist())]
    h = [dataset.gather(piece, starts, length) for piece, starts, length in pieces]

    def prediction(x):
        return model.predictions({"1": model.output_heads["1"](model.final_norm(x))})["1"]

    # steps[i] leads from the output of step i - 1 to the next: the input projection, the layers, the prediction
    steps = [model.input_proj, *(lambda x, layer=layer: layer(x, backend) for layer in model.layers), prediction]
    for depth in range(max(depths) + 1):
        level = h
        if depth or max(depths):
            h = [in_batches(steps[depth], windows, device) for windows in h]
        level = h if depth else level
        if depth in depths:
            yield depth, np.concatenate([stitch(windows, starts, velocity)
                                         for windows, (_, starts, _) in zip(level, pieces, strict=True)])


# ---------------------------------------------------------------------------------------------------------------
# The measures of one level


def probe_split(n_rows, rng):
    """The rows that fit the probes and the rows that score them: (train (n,) ascending, a slice).

    Train: at most PROBE_STEPS rows from the first PROBE_FRACTION of time; the slice: all rows after that part.
    """
    boundary = round(n_rows * PROBE_FRACTION)
    train = np.sort(rng.permutation(boundary)[:PROBE_STEPS])
    return train, slice(boundary, n_rows)


def neighborhood(points, lb_points, umap_points, umap_neighbors):
    """The dimension of the first lb_points and the neighbour graph for the UMAP of the first umap_points.

    Returns (dimension {k: value} for the KS, graph (distances, indices) as `measures.knn` gives it); each is None when
    its number of points is 0. The dimension of a level with too few distinct points is None for all k. One neighbour
    query serves all k and, where its lists are long enough, the UMAP too.
    """
    dimension = graph = None
    if lb_points:
        distances, indices = measures.knn(points[:lb_points], max(KS))
        try:
            if distances[:, 0].min() > 0:
                dimension = measures.dimension_from_distances(distances, KS)
            else:  # some points repeat; levina_bickel leaves the copies out and asks for the neighbours anew
                dimension = measures.levina_bickel(points[:lb_points], KS)
        except cli.UserError:
            dimension = dict.fromkeys(KS)
        if 0 < umap_points <= lb_points:
            graph = measures.knn_of_first(distances, indices, umap_points, umap_neighbors - 1)
    if umap_points and graph is None:
        graph = measures.knn(points[:umap_points], umap_neighbors - 1)
    return dimension, graph


def level_measures(values, series, rows, args):
    """All measures of one level but those in its UMAP, and what its UMAP needs.

    values (n, width), one row for each of the last n steps of the series; rows: the sampled row numbers, in random
    order. Returns (dict, points, graph, nearest): the sampled points (n_umap, width), their neighbours, and for each of
    the n rows which of these points is nearest (n,); these three are None without UMAP.
    """
    from sklearn.metrics import pairwise_distances_argmin  # takes seconds to import, like all of scikit-learn

    steps = steps_of_rows(series, args.velocity)[-len(values):]
    states, thetas = dataset.rows_of(series.states, steps), dataset.rows_of(series.thetas, steps)
    mean, eigenvalues, vectors = measures.spectrum(values)
    reduced = measures.principal_components(values, mean, vectors, args.pca)

    # ---- the sample: its first points serve the dimension, the UMAP and the silhouette.
    points = reduced[rows]
    n_umap, n_lb = min(args.umap_points, len(rows)), 0 if args.no_lb else min(args.lb_points, len(rows))
    dimension, graph = neighborhood(points, n_lb, 0 if args.no_umap else n_umap, args.umap_neighbors)

    # ---- the probes, which see the whole width of the level, and k-means
    fit, score = probe_split(len(values), np.random.default_rng(args.seed))
    train, test = measures.whitened(values[fit], values[score])
    level = {
        "width": values.shape[1],
        "probe_accuracy": measures.circle_probe(train, dataset.rows_of(states, fit), test,
                                                dataset.rows_of(states, score)),
        "phase_r2": measures.phase_probe(train, dataset.rows_of(thetas, fit), test, dataset.rows_of(thetas, score)),
        **measures.cluster_scores(reduced, rows, states, series.n_circles, args.seed),
        "silhouette": measures.silhouette(points[:n_umap], dataset.rows_of(states, rows[:n_umap])),
        "effective_rank": measures.participation_ratio(eigenvalues),
        "dimension": dimension,
    }
    if args.no_umap:
        return level, None, None, None
    return level, points[:n_umap], graph, pairwise_distances_argmin(reduced, points[:n_umap])


def best_layer(levels):
    """The measures of the layer with the best probe, the first of equals; input and output are no layers.

    None when no layer has a probe.
    """
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
    """Let a worker end on Ctrl-C without a traceback, and end when the script does, even if that is killed.

    Without the second, the workers of a killed script would wait for work for ever.
    """
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


class Optimum:
    """What the exact filter reaches on a series: the floor of the errors and the ceiling of the circle accuracy.

    For data that the filter doesn't know there is neither, and a line says why.
    """

    def __init__(self, series):
        self.series, self.floors = series, {}
        self.process = optimal_filter.process_or_none(series, "no optimal floor and ceiling")
        self.circle_accuracy = None if self.process is None else self.measure_circle_accuracy()

    def measure_circle_accuracy(self):
        """How often the filter, given all of the past, names the true circle, over the steps that score the probes."""
        posterior = optimal_filter.predict(self.process, self.series.X, horizons=(),
                                           keep_predictions=False)["circle_posterior"]
        _, scored = probe_split(self.series.n_steps, np.random.default_rng(0))
        return float((posterior.argmax(axis=1) == self.series.states)[scored].mean())

    def window_floors(self, starts, seq_len, horizons):
        """`optimal_filter.window_floors` of these windows, each begun without a past, as by a model; {} if unknown."""
        if self.process is None:
            return {}
        key = (starts.tobytes(), seq_len, tuple(horizons))
        if key not in self.floors:  # models to be compared mostly share their windows
            self.floors[key] = optimal_filter.window_floors(self.process, self.series, starts, seq_len, horizons)
        return self.floors[key]


def prediction_errors(model, series, window_settings, optimum):
    """The validation errors of the model and of the exact filter on the same windows: `optimal_filter.error_rows`.

    window_settings: (seq_len, stride, val_fraction). Raises UserError when the validation part holds no window or the
    largest horizon doesn't fit into one.
    """
    seq_len = window_settings[0]
    _, starts, _ = dataset.split_windows(series.n_steps, *window_settings, series.recordings)
    if model.horizons[-1] >= seq_len:
        raise cli.UserError(f"its largest horizon, {model.horizons[-1]}, does not fit into windows of {seq_len} steps")
    device = next(model.parameters()).device
    windows = dataset.Windows(series.X, seq_len, device)
    errors = mamba_model.validation_errors(model, windows, torch.from_numpy(starts).to(windows.starts_device),
                                           max(1, STEPS_IN_BATCH[device.type] // seq_len), amp=False)
    floors = optimum.window_floors(starts, seq_len, model.horizons)
    return optimal_filter.error_rows(model.errors_by_horizon(errors), floors)


# ---------------------------------------------------------------------------------------------------------------
# Tables


def cell(value, form=".3f"):
    """A number as text; a dash for None."""
    return "–" if value is None else format(value, form)


LEVEL_COLUMNS = [  # title, key of a level's measures, number format
    ("probe acc.", "probe_accuracy", ".3f"),
    ("phase R²", "phase_r2", ".3f"),
    ("ARI", "kmeans_ari", ".3f"),
    ("smooth", "kmeans_ari_smooth", ".3f"),
    ("NMI", "kmeans_nmi", ".3f"),
    ("smooth", "kmeans_nmi_smooth", ".3f"),
    ("silhouette", "silhouette", ".3f"),
    ("rank", "effective_rank", ".1f"),
]


def level_table(report):
    """The table of one model, one row per level; without the columns of the dimension when no level has one."""
    ks = KS if any(m["dimension"] for m in report["levels"]) else []
    header = ["level", *(title for title, _, _ in LEVEL_COLUMNS), *(f"dim {k}" for k in ks)]
    rows = []
    for m in report["levels"]:
        rows.append([m["level"], *(cell(m[key], form) for _, key, form in LEVEL_COLUMNS),
                     *(cell(m["dimension"][k], ".2f") for k in ks)])
    return cli.table(header, rows)


def umap_table(report):
    """The table of what can be told apart in a model's UMAPs, one row per level."""
    keys = ("umap_silhouette", "umap_ari", "umap_ari_smooth", "umap_nmi", "umap_nmi_smooth")
    return cli.table(["in the UMAP", "silhouette", "ARI", "smooth", "NMI", "smooth"], [
        [m["level"], *(cell(m[key]) for key in keys)] for m in report["levels"]])


def peak(levels, key):
    """The highest value of a measure over all levels; None when no level has it."""
    return max((m[key] for m in levels if m.get(key) is not None), default=None)


# What the comparison tells of each model: {column of the CSV: (its title in the table, number format or "" for text)}
COMPARISON = {
    "checkpoint": ("checkpoint", ""),
    "val_mse": ("val MSE", ".4f"),
    "optimal_mse": ("optimal", ".4f"),
    "excess_percent": ("excess %", "+.2f"),
    "val_nll": ("val NLL", ".4f"),
    "optimal_nll": ("optimal", ".4f"),
    "excess_nats": ("nats above", "+.4f"),
    "best_layer": ("best layer", ""),
    "probe_accuracy": ("probe acc.", ".3f"),
    "phase_r2": ("phase R²", ".3f"),
    "silhouette": ("silhouette", ".3f"),
    "kmeans_ari": ("ARI", ".3f"),
    "kmeans_ari_smooth": ("smooth", ".3f"),
    f"dimension_k{K_SHOWN}": (f"dim {K_SHOWN}", ".2f"),
    f"last_layer_dimension_k{K_SHOWN}": ("last", ".2f"),
    "peak_silhouette": ("peak sil.", ".3f"),
    "peak_umap_silhouette": ("UMAP sil.", ".3f"),
    "peak_umap_ari_smooth": ("UMAP ARI", ".3f"),
}


def comparison_row(report):
    """One model as {column of COMPARISON: value or None}."""
    levels = report["levels"]
    one_ahead = next((row for row in report["errors"] if row["horizon"] == 1), {})
    best = best_layer(levels) or {}
    last = next((m for m in reversed(levels) if m["level"].startswith("layer")), {})
    return {
        "checkpoint": report["name"],
        **{key: one_ahead.get(key) for key in ("val_mse", "optimal_mse", "excess_percent", "val_nll", "optimal_nll",
                                                 "excess_nats")},
        "best_layer": best.get("level"),
        **{key: best.get(key) for key in ("probe_accuracy", "phase_r2", "silhouette", "kmeans_ari",
                                          "kmeans_ari_smooth")},
        f"dimension_k{K_SHOWN}": (best.get("dimension") or {}).get(K_SHOWN),
        f"last_layer_dimension_k{K_SHOWN}": (last.get("dimension") or {}).get(K_SHOWN),
        **{f"peak_{key}": peak(levels, key) for key in ("silhouette", "umap_silhouette", "umap_ari_smooth")},
    }


def comparison_table(rows):
    """Rows of comparison_row as text; columns that no row has a value for are left out."""
    keys = [key for key in COMPARISON if any(row[key] is not None for row in rows)]
    return cli.table([COMPARISON[key][0] for key in keys],
                     [[cell(row[key], COMPARISON[key][1]) for key in keys] for row in rows])


def seed_groups(reports):
    """Reports of models that were trained with the same flags but for the seed: {name of the first one: list of them}.

    Flags that don't change the result don't count either. A model without such siblings is left out.
    """
    groups = {}
    for report in reports:
        flags = {key: value for key, value in report["trained_with"].items()
                 if key not in ("seed", "checkpoint", "resume", "device", "log_dir")}
        groups.setdefault(json.dumps(flags, sort_keys=True, default=str), []).append(report)
    return {group[0]["name"]: group for group in groups.values() if len(group) > 1}


def spread_table(groups):
    """Mean ± standard deviation (n - 1) over the seeds of each column of the comparison, one row per group.

    A column without numbers in any group is left out.
    """
    columns = [key for key, (_, form) in COMPARISON.items() if form]
    rows = []
    for name, group in groups.items():
        members = [comparison_row(report) for report in group]
        rows.append([f"{name}, {len(group)} seeds"])
        for key in columns:
            form, values = COMPARISON[key][1], [member[key] for member in members]
            if None in values:
                rows[-1].append("–")
            else:
                rows[-1].append(f"{np.mean(values):{form}} ± {np.std(values, ddof=1):{form.lstrip('+')}}")
    header = ["mean ± std", *(COMPARISON[key][0] for key in columns)]
    shown = [i for i in range(len(header)) if i == 0 or any(row[i] != "–" for row in rows)]
    return cli.table([header[i] for i in shown], [[row[i] for i in shown] for row in rows])


def comparison_csv(rows):
    """Rows of comparison_row as CSV text with a header line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)  # None is written as an empty cell
    return text.getvalue()


# ---------------------------------------------------------------------------------------------------------------
# Figures


def level_title(level):
    """The title of a UMAP panel: the level's name, its dimension, and the silhouette of the circles in the UMAP."""
    dimension = (level["dimension"] or {}).get(K_SHOWN)
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
    ("Levina–Bickel dimension", {f"k = {k}": lambda m, k=k: (m["dimension"] or {}).get(k)
                                 for k in sorted(KS, key=lambda k: k != K_SHOWN)}),
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


# ---------------------------------------------------------------------------------------------------------------
# The script


def variant(args):
    """What --velocity and --pca add to file names and to titles: two strings."""
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


def comparison_name(names):
    """compare_A_B, shortened where that would be too long for a file name."""
    return cli.short_name(f"compare_{'_'.join(names)}")


def sampled_rows(n_rows, args):
    """The sampled row numbers in random order; UMAP and dimension each take as many of the first ones as they need.

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


class LoadedModel(NamedTuple):
    """A model to evaluate."""

    name: str  # the first part of its files' names
    path: Path
    model: mamba_model.CausalTimeSeriesMamba
    window_settings: tuple  # seq_len, stride and val_fraction of its training
    depths: list  # of the levels to measure
    trained_with: dict  # the flags of its training that JSON can hold


def load_models(args, device):
    """All models, and the series: everything that can be wrong with either is refused before any work is done."""
    models, series = [], None
    for name, path in zip(unique_names(args.checkpoint), args.checkpoint, strict=True):
        model, saved, series = mamba_model.open_model(path, args.data_dir, device, args.scan, series)
        trained_with = {key: value for key, value in saved.items()
                        if isinstance(value, str | int | None) or (isinstance(value, float) and np.isfinite(value))}
        name += mamba_model.data_suffix(series, saved)
        models.append(LoadedModel(name, path, model, dataset.window_settings(saved, path),
                                  chosen_depths(args.layers, model.n_layers, path), trained_with))
    return models, series


def weights_crc32(model):
    """A number that tells the weights of two models apart."""
    value = 0
    for tensor in model.state_dict().values():
        value = zlib.crc32(tensor.cpu().numpy().tobytes(), value)
    return value


def measure_levels(loaded, series, rows, args, pool):
    """The measures of all levels of a model, the futures of their UMAPs, and the sampled step nearest to each step.

    Returns three lists with one entry per level; the last two are empty without UMAP.
    """
    names, levels, futures, nearest = level_names(loaded.model.n_layers), [], [], []
    found = representations(loaded.model, series.X, loaded.window_settings[0], loaded.depths, args.velocity,
                            series.recordings)
    for depth, values in tqdm(found, desc=loaded.name, total=len(loaded.depths), unit="level", disable=None):
        if not np.isfinite(values).all():
            raise cli.UserError(f"{loaded.name}: {names[depth]} holds NaN or infinity on these data; give another "
                                "--checkpoint or the --data-dir it was trained on")
        level, points, graph, nearest_sample = level_measures(values, series, rows, args)
        levels.append({"level": names[depth], "depth": depth, **level})
        if not args.no_umap:
            futures.append(submit(pool, measures.umap_embedding, points, graph, args.seed))
            nearest.append(nearest_sample)
    return levels, futures, nearest


def evaluate(loaded, series, optimum, rows, args, pool):
    """All numbers of a model, and its UMAPs: (report, list of embeddings (n_umap, 2)).

    The report is what NAME_metrics.json holds; the list is empty without UMAP.
    """
    report = {
        "name": loaded.name, "checkpoint": str(loaded.path), "data_dir": str(args.data_dir or series.folder),
        "weights_crc32": weights_crc32(loaded.model), "data_crc32": dataset.crc32(series.X), "seed": args.seed,
        "velocity": args.velocity, "pca": args.pca, "umap_points": min(args.umap_points, len(rows)),
        "umap_neighbors": None if args.no_umap else args.umap_neighbors,
        "lb_points": None if args.no_lb else min(args.lb_points, len(rows)), "n_layers": loaded.model.n_layers,
        "seq_len": loaded.window_settings[0], "filter_circle_accuracy": optimum.circle_accuracy, "errors": [],
        "trained_with": loaded.trained_with,
    }

    # ---- how well it predicts
    try:
        report["errors"] = prediction_errors(loaded.model, series, loaded.window_settings, optimum)
        print(optimal_filter.error_table(report["errors"]))
    except cli.UserError as error:
        print(f"no validation MSE: {error}")

    # ---- what its levels know
    report["levels"], futures, nearest = measure_levels(loaded, series, rows, args, pool)
    best = best_layer(report["levels"])
    report["best_layer"] = best["level"] if best else None

    # ---- what can be told apart in their UMAPs
    states = dataset.rows_of(series.states, steps_of_rows(series, args.velocity))
    embeddings = [future.result() for future in futures]
    for level, embedding, nearest_sample in zip(report["levels"], embeddings, nearest, strict=False):
        shown_states = dataset.rows_of(states, rows[:len(embedding)])
        level |= measures.embedding_scores(embedding, nearest_sample, shown_states, states, series.n_circles, args.seed)
    return report, embeddings


# Reports that agree in these are measured on the same, and those in which they agree or one has none (null), alike.
SAME_SUBJECT = ("weights_crc32", "data_crc32", "seed", "velocity", "pca", "seq_len", "umap_points")
SAME_SETTINGS = ("umap_neighbors", "lb_points")


def with_earlier(report, path):
    """The report with what an earlier one, in the file at `path`, has and this one leaves out (--no-umap, --no-lb,
    --layers), where all that both measure is measured alike; so a quick look at a model costs none of its numbers."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if (any(earlier[key] != report[key] for key in SAME_SUBJECT)
                or any(earlier[key] != report[key] and None not in (earlier[key], report[key])
                       for key in SAME_SETTINGS)):
            return report
        levels = {level["depth"]: level for level in earlier["levels"]}
        for level in levels.values():
            if level["dimension"]:
                level["dimension"] = {int(k): value for k, value in level["dimension"].items()}
        for level in report["levels"]:
            measured = {key: value for key, value in level.items() if value is not None}
            levels[level["depth"]] = {**level, **levels.get(level["depth"], {}), **measured}
        levels = [levels[depth] for depth in sorted(levels)]
        best = best_layer(levels)
        settings = {key: report[key] if report[key] is not None else earlier[key] for key in SAME_SETTINGS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return report  # there is none, or it is one of an older version
    return {**report, **settings, "levels": levels, "best_layer": best["level"] if best else None}


def write_report(report, args, prefix, subtitle):
    """Print the tables of a model, write its numbers and its summary figure."""
    print(level_table(report))
    if report["levels"][0].get("umap_silhouette") is not None:
        print(umap_table(report))
    report = with_earlier(report, args.save_dir / f"{prefix}_metrics.json")
    cli.write_json(args.save_dir / f"{prefix}_metrics.json", report, allow_nan=False)
    print(f"wrote {args.save_dir / f'{prefix}_metrics.json'}")
    figures.save(draw_summary([report], f"{report['name']}: measures against depth{subtitle}"),
                 args.save_dir / f"{prefix}_summary.png")


def write_umaps(report, embeddings, series, steps, args, prefix, subtitle):
    """Write the UMAPs of a model's levels, in one grid or, with --per-layer, one file per level; steps: the time steps
    of their points, whose circles colour them, or, without these, themselves."""
    states, n_circles = dataset.rows_of(series.states, steps), series.n_circles
    states = steps if states is None else states
    title = f"{report['name']}: UMAP of {len(states):,} steps{subtitle}"
    titles = [level_title(m) for m in report["levels"]]
    if not args.per_layer:
        fig = figures.draw_umaps(embeddings, titles, states, n_circles, title)
        figures.save(fig, args.save_dir / f"{prefix}_umap.png")
        return
    for level, embedding, level_name in zip(report["levels"], embeddings, titles, strict=True):
        fig = figures.draw_umaps([embedding], [level_name], states, n_circles, title)
        figures.save(fig, args.save_dir / f"{prefix}_umap_{level['level'].replace(' ', '')}.png")


def write_comparison(reports, args, suffix, subtitle):
    """Print the comparison of several models, write its CSV and its summary figure."""
    rows = [comparison_row(report) for report in reports]
    prefix = comparison_name([report["name"] for report in reports]) + suffix
    print(f"\nbest layer of each checkpoint (last: dimension of the last layer, k = {K_SHOWN}; peaks over all levels)\n"
          + comparison_table(rows))
    groups = seed_groups(reports)
    if groups:
        print("\nthe same flags but for the seed\n" + spread_table(groups))
    cli.write_text(args.save_dir / f"{prefix}_summary.csv", comparison_csv(rows))
    print(f"wrote {args.save_dir / f'{prefix}_summary.csv'}")
    figures.save(draw_summary(reports, f"measures against depth{subtitle}"), args.save_dir / f"{prefix}_summary.png")


def main(args):
    # ---- what is measured; bad input is refused here, before any work
    device = cli.pick_device(args.device)
    models, series = load_models(args, device)
    steps = steps_of_rows(series, args.velocity)
    rows = sampled_rows(len(steps), args)
    cli.output_folder(args.save_dir)
    suffix, subtitle = variant(args)

    # ---- one model after the other, while other processes embed the levels that are ready
    n_embeddings = 0 if args.no_umap else sum(len(loaded.depths) for loaded in models)
    pool = umap_pool(n_embeddings, min(args.umap_points, len(rows)))
    try:
        if series.states is None:
            print("these data have no labels: no probes, clusters and silhouette; UMAPs are coloured by time")
        optimum, reports = Optimum(series), []
        for loaded in models:
            ceiling = ("" if optimum.circle_accuracy is None
                       else f"; exact filter's circle accuracy {optimum.circle_accuracy:.3f}")
            print(f"\n{loaded.name}: {loaded.model.n_layers} layers{ceiling}")
            report, embeddings = evaluate(loaded, series, optimum, rows, args, pool)
            write_report(report, args, loaded.name + suffix, subtitle)
            if embeddings:
                shown = steps[rows[:report["umap_points"]]]
                write_umaps(report, embeddings, series, shown, args, loaded.name + suffix, subtitle)
            reports.append(report)

        # ---- the models beside each other
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
