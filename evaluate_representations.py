"""Measure what each layer of a model knows about the hidden circle and phase, and compare models.

Reads one or more checkpoints NAME.pt and data/data.npz. The levels of a model are the input, the layers from 1 on, and
the output (the prediction one step ahead). Each is computed for every time step of the series, in windows of the length
that the model was trained on. Neighbouring windows overlap by a quarter, so that the model has seen at least that much
of the past of every step but the first ones. Tables go to the terminal, files to --save-dir:
  NAME_umap.png       one UMAP per level, coloured by circle; with --per-layer NAME_umap_layer7.png and so on
  NAME_summary.png    every measure against depth
  NAME_beliefs.png    how much of the exact filter's beliefs each level holds
  NAME_excess.png     where the excess over the exact filter falls
  NAME_metrics.json   all numbers
  compare_A_B_summary.png and .csv   with several checkpoints: all in the same axes and in one table
  compare_A_B_test.csv               and their errors on the test series, each less the first one's on the same blocks
With other flags than the default, as --velocity, --pca 20 or --umap-points 3000, NAME becomes NAME_velocity, NAME_pca20
or NAME_umap_points3000, and a grid of some --layers NAME_umap_layers_input-7.png, so that nothing is overwritten.

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
import contextlib
import json
import multiprocessing
import multiprocessing.util
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
    cli.add_test_steps(parser.add_argument_group("test series"))
    parser.add_argument_group("baselines").add_argument(
        "--no-baselines", action="store_true",
        help="no low-passed input, quadratic probe, untrained model and linear autoregression: faster")
    parser.add_argument_group("interventions").add_argument(
        "--hold", type=cli.signals, metavar="S,S,…",
        help="signals of delta,B,C,z to hold at their mean over the training part, each alone and all together; the "
             "table tells what that adds to the error on the test series (default: none)")
    cli.add_computing(parser)
    cli.add_drawing(parser)
    files = parser.add_argument_group("files")
    files.add_argument("--checkpoint", type=Path, nargs="+", default=[Path("model_next.pt")], metavar="NAME.pt",
                       help="trained models; several are compared")
    cli.add_data_dir(files, of_checkpoint=True)
    cli.add_save_dir(files)
    args = parser.parse_args(argv)
    args.settings = "".join(f"_{part}" for part in cli.flags_in_name(parser, args, (
        "layers", "no_umap", "no_lb", "no_baselines", "hold", "per_layer", "checkpoint", "data_dir", "save_dir")))
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
from threadpoolctl import threadpool_limits

import baselines
import dataset
import excess
import figures
import hold
import level_figures
import level_tables
import mamba_model
import measures
import observer
import optimal_filter
import representations
import terminal
import unseen
from measures import DIMENSION_K, DIMENSION_KS

POINTS_WORTH_A_POOL = 10_000  # starting a process takes as long as embedding about this many points


# ---------------------------------------------------------------------------------------------------------------
# Levels


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


# ---------------------------------------------------------------------------------------------------------------
# The measures of one level


def neighborhood(points, lb_points, umap_points, umap_neighbors):
    """The dimension of the first lb_points and the neighbour graph for the UMAP of the first umap_points.

    Returns (`measures.dimensions` for the DIMENSION_KS, graph (distances, indices) as `measures.knn` gives it); each is
    None when its number of points is 0. One neighbour query serves all k and, where its lists are long enough, the UMAP
    too.
    """
    dimension = graph = None
    if lb_points:
        distances, indices = measures.knn(points[:lb_points], max(DIMENSION_KS))
        dimension = measures.dimensions(points[:lb_points], DIMENSION_KS, distances)
        if 0 < umap_points <= lb_points:
            graph = measures.knn_of_first(distances, indices, umap_points, umap_neighbors - 1)
    if umap_points and graph is None:
        graph = measures.knn(points[:umap_points], umap_neighbors - 1)
    return dimension, graph


class Measurer:
    """Measures levels of one series; the same for all models and baselines.

    rows: the sampled row numbers, in random order; optimum: an observer.Optimum; pool: as from `umap_pool`.
    """

    def __init__(self, series, optimum, rows, args, pool):
        self.series, self.optimum, self.rows, self.args, self.pool = series, optimum, rows, args, pool
        self.steps = representations.steps_of_rows(series, args.velocity)
        self.states, self.thetas = (dataset.rows_of(labels, self.steps) for labels in (series.states, series.thetas))
        self.n_umap = min(args.umap_points, len(rows))

    def probes(self, values, in_test, window_settings):
        """The measures of a level by regressions, which see its whole width: a dict.

        values (n, width), one row for each of the steps; in_test (n_windows, seq_len, width), the same level in the
        test series, None without one; window_settings: (seq_len, stride, val_fraction) of the model's training.
        """
        fit, score = measures.probe_split(len(values), np.random.default_rng(self.args.seed))
        train, test = measures.whitened(values[fit], values[score])
        readout, n = (None, 0) if in_test is None else self.optimum.readout(window_settings, self.args.velocity)
        return {
            "width": values.shape[1],
            "probe_accuracy": measures.circle_probe(train, dataset.rows_of(self.states, fit), test,
                                                    dataset.rows_of(self.states, score)),
            "phase_r2": measures.phase_probe(train, dataset.rows_of(self.thetas, fit), test,
                                             dataset.rows_of(self.thetas, score)),
            "beliefs": None if readout is None else readout.r2(values[:n], self.optimum.tested(
                window_settings[0]).rows(in_test, self.args.velocity)),
        }

    def level(self, values, in_test, window_settings, umap=True):
        """All measures of a level but those in its UMAP: (dict, its Embedding, or None without one).

        Arguments as for `probes`; umap: whether to make one, if there are any.
        """
        args, rows, n_umap = self.args, self.rows, self.n_umap
        umap = umap and not args.no_umap
        mean, eigenvalues, vectors = measures.spectrum(values)
        reduced = measures.principal_components(values, mean, vectors, args.pca)
        points = reduced[rows]  # its first ones serve the dimension, the UMAP and the silhouette
        n_lb = 0 if args.no_lb else min(args.lb_points, len(rows))
        dimension, graph = neighborhood(points, n_lb, n_umap if umap else 0, args.umap_neighbors)
        level = {
            **self.probes(values, in_test, window_settings),
            **measures.cluster_scores(reduced, rows, self.states, self.series.n_circles, args.seed),
            "silhouette": measures.silhouette(points[:n_umap], dataset.rows_of(self.states, rows[:n_umap])),
            "effective_rank": measures.participation_ratio(eigenvalues),
            "dimension": dimension,
            "dimension_whitened": None if args.no_lb else measures.dimensions(
                measures.whitened(points[:n_lb], points[:0])[0], [DIMENSION_K]),
        }
        return level, self.embedding(reduced, points[:n_umap], graph) if umap else None

    def embedding(self, reduced, points, graph):
        """Begin the UMAP of the sampled points (n_umap, width) of a level reduced (n, width): an Embedding."""
        from sklearn.metrics import pairwise_distances_argmin  # takes seconds to import, like all of scikit-learn

        return Embedding(submit(self.pool, measures.umap_embedding, points, graph, self.args.seed),
                         pairwise_distances_argmin(reduced, points))

    def embedding_scores(self, embedding):
        """What can be told apart in a UMAP that is ready, as `measures.embedding_scores`."""
        shown = dataset.rows_of(self.states, self.rows[:self.n_umap])
        return measures.embedding_scores(embedding.future.result(), embedding.nearest, shown, self.states,
                                         self.series.n_circles, self.args.seed)


class Embedding(NamedTuple):
    """A UMAP that is being computed."""

    future: concurrent.futures.Future  # of its coordinates (n_umap, 2)
    nearest: np.ndarray  # (n,) which of its points is nearest to each row of the level


# ---------------------------------------------------------------------------------------------------------------
# Baselines


class Baselines:
    """What the module `baselines` has to set beside the levels; computed once for all models with the same windows."""

    def __init__(self, measurer):
        self.measurer, self.of_input, self.of_architecture, self.linear = measurer, {}, {}, {}

    def input_levels(self, window_settings):
        """The low-passed input and the quadratic probe as levels, and the former's UMAP: (list, Embedding or None)."""
        if window_settings not in self.of_input:
            series, tested = self.measurer.series, self.measurer.optimum.tested(window_settings[0])
            low, embedding = self.measurer.level(*self.everywhere(baselines.low_passed, series, tested),
                                                 window_settings)
            quadratic = self.measurer.probes(*self.everywhere(lambda X, _: baselines.products(X), series, tested),
                                             window_settings)
            self.of_input[window_settings] = [{"level": "low-passed input", **low},
                                              {"level": "quadratic probe", **quadratic}], embedding
        return self.of_input[window_settings]

    def everywhere(self, function, series, tested):
        """function(X, recordings) of the series, one row for each step, and of the test windows, None without them."""
        values, in_test = function(series.X, series.recordings), None
        if self.measurer.args.velocity:
            values = values[self.measurer.steps] - values[self.measurer.steps - 1]
        if tested is not None:
            n, length, width = tested.windows.shape
            edges = np.arange(n)[:, None] * length + [0, length]
            in_test = function(tested.windows.numpy().reshape(-1, width), edges).reshape(n, length, -1)
        return values, in_test

    def untrained_levels(self, loaded):
        """The layers of a model of the same architecture and seed with its initial weights, as levels.

        Only the last one has the measures that are no regressions.
        """
        seed = loaded.trained_with.get("seed")
        untrained = baselines.untrained_like(loaded.model, seed if isinstance(seed, int) else 0)
        key = (weights_crc32(untrained), loaded.window_settings)
        if key not in self.of_architecture:
            measurer, n_layers = self.measurer, untrained.n_layers
            tested = measurer.optimum.tested(loaded.window_settings[0])
            depths = [depth for depth in range(1, n_layers + 1) if depth in loaded.depths or depth == n_layers]
            in_test = tested and representations.LevelsInWindows(untrained, tested.windows, depths)
            levels = []
            for depth, values in representations.of_steps(untrained, measurer.series.X, loaded.window_settings[0],
                                                          depths, measurer.args.velocity, measurer.series.recordings):
                given = values, in_test and in_test.at(depth), loaded.window_settings
                level = measurer.level(*given, umap=False)[0] if depth == n_layers else measurer.probes(*given)
                levels.append({"level": f"untrained layer {depth}", "depth": depth, **level})
            self.of_architecture[key] = levels
        return self.of_architecture[key]

    def autoregression(self, window_settings):
        """The error of a linear autoregression in the validation windows, and its excess over new steps: a dict.

        None where the training part is too short, or the validation part.
        """
        if window_settings not in self.linear:
            series, optimum = self.measurer.series, self.measurer.optimum
            seq_len, boundary = window_settings[0], dataset.first_validation_step(series.n_steps, window_settings[2])
            tested, self.linear[window_settings] = optimum.tested(seq_len), None
            with contextlib.suppress(ValueError, cli.UserError):
                linear = baselines.Autoregression([series.X[first:min(end, boundary)]
                                                   for first, end in series.recordings.tolist() if first < boundary])
                _, starts, _ = dataset.split_windows(series.n_steps, *window_settings, series.recordings)
                mse = float(linear.errors(series.X, starts, seq_len).mean())
                floor = optimum.window_floors(starts, seq_len, [1]).get("mse", {}).get(1)
                found = {"lags": linear.lags, "val_mse": mse, "optimal_mse": floor,
                         "excess_percent": optimal_filter.excess_percent(mse, floor)}
                if tested is not None:
                    errors, part = linear.errors(tested.part.series.X, tested.part.starts, seq_len), tested.part
                    found["test_excess_percent"], found["test_excess_percent_error"] = unseen.excess_and_error(
                        *(part.block_means(values.mean(axis=1, dtype=np.float64))
                          for values in (errors, tested.believed.error[:, :-1])), part.weights)
                self.linear[window_settings] = found
        return self.linear[window_settings]


# ---------------------------------------------------------------------------------------------------------------
# UMAP


def umap_pool(n_embeddings, n_points):
    """A pool of processes for the UMAPs, or None where one process is as fast."""
    workers = min(cli.n_cores(), n_embeddings)
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
    # At its end, at once: tearing down what umap has compiled takes seconds, for which the script would wait.
    multiprocessing.util.Finalize(None, os._exit, (0,), exitpriority=0)


def submit(pool, function, *arguments):
    """A future of function(*arguments), computed in the pool, or here and now without one."""
    if pool is not None:
        return pool.submit(function, *arguments)
    future = concurrent.futures.Future()
    future.set_result(function(*arguments))
    return future


# ---------------------------------------------------------------------------------------------------------------
# Errors


def prediction_errors(model, series, window_settings, optimum, held_back=0):
    """The validation errors of the model and of the exact filter on the same windows: `optimal_filter.error_rows`.

    window_settings: (seq_len, stride, val_fraction); held_back: steps at the end that are a test part.
    Raises UserError when the validation part holds no window or the largest horizon doesn't fit into one.
    """
    seq_len = window_settings[0]
    _, starts, _ = dataset.split_windows(series.n_steps, *window_settings, series.recordings, held_back)
    if model.horizons[-1] >= seq_len:
        raise cli.UserError(f"its largest horizon, {model.horizons[-1]}, does not fit into windows of {seq_len} steps")
    device = next(model.parameters()).device
    windows = dataset.Windows(series.X, seq_len, device)
    with terminal.busy("validation errors"):
        errors = mamba_model.validation_errors(
            model, windows, torch.from_numpy(starts).to(windows.starts_device),
            max(1, representations.STEPS_IN_BATCH[device.type] // seq_len), amp=False)
    floors = optimum.window_floors(starts, seq_len, model.horizons)
    return optimal_filter.error_rows(model.errors_by_horizon(errors), floors)


# ---------------------------------------------------------------------------------------------------------------
# The script


def subtitle_of(args):
    """What --velocity and --pca add to titles."""
    words = [", change since the step before"] if args.velocity else []
    words += [f", up to {args.pca} principal components"] if args.pca else []
    return "".join(words)


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
    rows = measures.dimension_sample(n_rows, max(args.umap_points, args.lb_points), args.seed)
    if not args.no_umap and len(rows) <= args.umap_neighbors:
        raise cli.UserError(f"the series has {cli.count(n_rows, 'step')} to draw from, too few for --umap-neighbors "
                            f"{args.umap_neighbors}; use a smaller one or --no-umap")
    if not args.no_lb and min(args.lb_points, len(rows)) <= max(DIMENSION_KS):
        raise cli.UserError(f"the dimension needs more than {max(DIMENSION_KS)} points, and there are "
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


def measure_levels(loaded, measurer, bar):
    """The measures of all levels of a model; their Embeddings, without UMAP an empty list; and its errors on the test
    series, (n_windows, seq_len - 1), None without one. bar: a terminal.Bar that counts both, levels and UMAPs.
    """
    series, args, model = measurer.series, measurer.args, loaded.model
    tested, output = measurer.optimum.tested(loaded.window_settings[0]), model.n_layers + 1
    in_test = tested and representations.LevelsInWindows(model, tested.windows, sorted({*loaded.depths, output}))
    names, levels, embeddings = representations.level_names(model.n_layers), [], []
    found = representations.of_steps(model, series.X, loaded.window_settings[0], loaded.depths, args.velocity,
                                     series.recordings)
    for depth, values in found:
        if not np.isfinite(values).all():
            raise cli.UserError(f"{loaded.name}: {names[depth]} holds NaN or infinity on these data; give another "
                                "--checkpoint or the --data-dir it was trained on")
        level, embedding = measurer.level(values, in_test and in_test.at(depth), loaded.window_settings)
        levels.append({"level": names[depth], "depth": depth, **level})
        bar.update()
        if embedding is not None:
            embedding.future.add_done_callback(lambda future: bar.update())
            embeddings.append(embedding)
    if tested is None:
        return levels, embeddings, None
    return levels, embeddings, np.square(in_test.at(output)[:, :-1] - tested.windows.numpy()[:, 1:]).mean(axis=2)


def evaluate(loaded, measurer, beside):
    """All numbers of a model, and its UMAPs: (report, list of embeddings (n_umap, 2)).

    The report is what NAME_metrics.json holds; the list is empty without UMAP. beside: Baselines, None without.
    """
    args, series, optimum, model = measurer.args, measurer.series, measurer.optimum, loaded.model
    report = {
        "name": loaded.name, "checkpoint": str(loaded.path), "data_dir": str(args.data_dir or series.source),
        "weights_crc32": weights_crc32(model), "data_crc32": dataset.data_crc32(series), "seed": args.seed,
        "velocity": args.velocity, "pca": args.pca, "umap_points": measurer.n_umap,
        "umap_neighbors": None if args.no_umap else args.umap_neighbors,
        "lb_points": None if args.no_lb else min(args.lb_points, len(measurer.rows)), "n_layers": model.n_layers,
        "seq_len": loaded.window_settings[0], "test_steps": args.test_steps,
        "filter_circle_accuracy": optimum.circle_accuracy, "errors": [], "trained_with": loaded.trained_with,
    }

    # ---- how well it predicts in its validation part
    try:
        held_back = optimum.held_back(loaded.trained_with)
        report["errors"] = prediction_errors(model, series, loaded.window_settings, optimum, held_back)
        print(optimal_filter.error_table(report["errors"]))
        learner = None if loaded.trained_with.get("fresh") else optimum.learner(
            dataset.first_validation_step(series.n_steps, loaded.window_settings[2]))
        report["test"] = optimum.test_errors(model, loaded.window_settings[0], held_back, learner)
    except cli.UserError as error:
        print(f"no validation MSE: {error}")

    # ---- what its levels know, and what is known without it
    with terminal.Bar(len(loaded.depths) * (1 if args.no_umap else 2), desc=f"levels of {loaded.name}") as bar:
        report["levels"], embeddings, errors = measure_levels(loaded, measurer, bar)
        low_passed = None
        if beside is not None:
            of_input, low_passed = beside.input_levels(loaded.window_settings)
            report["baselines"] = [*(dict(level) for level in of_input), *beside.untrained_levels(loaded)]
            report["autoregression"] = beside.autoregression(loaded.window_settings)
        found = [embedding.future.result() for embedding in embeddings]
    best = level_tables.best_layer(level_tables.layers_of(report["levels"]))
    report["best_layer"] = best["level"] if best else None

    # ---- what can be told apart in their UMAPs
    with terminal.Bar(len(embeddings), desc="clusters in the UMAPs") as bar:
        for level, embedding in zip(report["levels"], embeddings, strict=False):
            level |= measurer.embedding_scores(embedding)
            bar.update()
        if low_passed is not None:
            report["baselines"][0] |= measurer.embedding_scores(low_passed)

    # ---- what it loses when signals are held
    if args.hold and report.get("test"):
        report["hold"] = hold_signals(loaded, measurer, report["test"])

    # ---- where it is further from the truth than the exact filter
    tested = optimum.tested(loaded.window_settings[0])
    if tested is not None:
        optimal = tested.believed.error[:, :-1]
        report["excess"] = {"steps": int(tested.windows[..., 0].numel()), "blocks": len(tested.part.edges) - 1,
                            "events": excess.by_event(errors, optimal, tested.events, tested.part.edges),
                            "history": excess.by_history(errors, optimal)}
    return report, found


def hold_signals(loaded, measurer, as_trained):
    """What --hold asks for, which is printed: `hold.held_rows`. as_trained: the model's errors on the test series."""
    seq_len, _, val_fraction = loaded.window_settings
    series, optimum, names = measurer.series, measurer.optimum, measurer.args.hold.split(",")
    part = optimum.test_part(seq_len, optimum.held_back(loaded.trained_with))
    with terminal.Bar(len(hold.variants(names)), desc="signals held") as bar:
        means = hold.signal_means(loaded.model, series.X, seq_len,
                                  dataset.first_validation_step(series.n_steps, val_fraction))
        rows = hold.held_rows(loaded.model, part, names, means, as_trained, bar.update)
    print(unseen.compared_table(rows))
    return rows


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
        left_out = {key: earlier[key] for key in ("baselines", "autoregression", "hold")
                    if key in earlier and key not in report}
        for level in [*levels.values(), *left_out.get("baselines", [])]:
            for key in ("dimension", "dimension_whitened"):
                if level.get(key):
                    level[key] = {int(k) if k.isdecimal() else k: value for k, value in level[key].items()}
        for level in report["levels"]:
            measured = {key: value for key, value in level.items() if value is not None}
            levels[level["depth"]] = {**level, **levels.get(level["depth"], {}), **measured}
        levels = [levels[depth] for depth in sorted(levels)]
        best = level_tables.best_layer(level_tables.layers_of(levels))
        settings = {key: report[key] if report[key] is not None else earlier[key] for key in SAME_SETTINGS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return report  # there is none, or it is one of an older version
    return {**left_out, **report, **settings, "levels": levels, "best_layer": best["level"] if best else None}


def write_report(report, args, prefix, subtitle):
    """Print the tables of a model, write its numbers and its summary figure; returns the report `with_earlier` ones."""
    print(level_tables.level_table(report))
    if report["levels"][0].get("umap_silhouette") is not None:
        print(level_tables.umap_table(report))
    if report["lb_points"] is not None:
        print(level_tables.dimension_table(report))
    if report.get("excess"):
        print(level_tables.belief_table(report))
        print(level_tables.event_table(report))
    if report.get("autoregression"):
        print(level_tables.linear_line(report))
    report = with_earlier(report, args.save_dir / f"{prefix}_metrics.json")
    cli.write_json(args.save_dir / f"{prefix}_metrics.json", report, allow_nan=False)
    print(f"wrote {args.save_dir / f'{prefix}_metrics.json'}")
    write_figures([report], args, prefix, f"{report['name']}: ", subtitle)
    return report


def write_figures(reports, args, prefix, before, subtitle):
    """Write the figures of one report or of several; before, subtitle: what stands around their titles."""
    found = {"summary": level_figures.draw_summary(reports, f"{before}measures against depth{subtitle}")}
    if all(report.get("excess") for report in reports):
        found["beliefs"] = level_figures.draw_beliefs(
            reports, f"{before}what linear regressions read out of the exact filter's beliefs{subtitle}")
        found["excess"] = level_figures.draw_excess(
            reports, f"{before}excess over the exact filter in {reports[0]['excess']['steps']:,} new steps")
    figures.save_all({args.save_dir / f"{prefix}_{name}.png": fig for name, fig in found.items()})


def write_umaps(report, embeddings, series, steps, args, prefix, subtitle):
    """Write the UMAPs of a model's levels, in one grid or, with --per-layer, one file per level; steps: the time steps
    of their points, whose circles colour them, or, without these, themselves."""
    states, n_circles = dataset.rows_of(series.states, steps), series.n_circles
    states = steps if states is None else states
    title = f"{report['name']}: UMAP of {len(states):,} steps{subtitle}"
    titles = [level_figures.level_title(m) for m in report["levels"]]
    if not args.per_layer:
        fig = figures.draw_umaps(embeddings, titles, states, n_circles, title)
        shown = "" if args.layers is None else f"_layers_{'-'.join(map(str, args.layers))}"
        figures.save(fig, args.save_dir / f"{prefix}_umap{shown}.png")
        return
    for level, embedding, level_name in zip(report["levels"], embeddings, titles, strict=True):
        fig = figures.draw_umaps([embedding], [level_name], states, n_circles, title)
        figures.save(fig, args.save_dir / f"{prefix}_umap_{level['level'].replace(' ', '')}.png")


def write_comparison(reports, args, suffix, subtitle):
    """Print the comparison of several models, write its CSV and its summary figure."""
    rows = [level_tables.comparison_row(report) for report in reports] + level_tables.baseline_rows(reports[0])
    prefix = comparison_name([report["name"] for report in reports]) + suffix
    print(f"\nbest layer of each checkpoint (last: dimension of the last layer, k = {DIMENSION_K}; peaks over all "
          "levels)\n" + level_tables.comparison_table(rows))
    if reports[0].get("excess"):
        print("\n" + level_tables.belief_comparison(reports))
    groups = level_tables.seed_groups(reports)
    if groups:
        print("\nthe same flags but for the seed\n" + level_tables.spread_table(groups))
    tested = unseen.compared(level_tables.test_settings(reports))
    if tested:
        print("\n" + unseen.compared_table(tested))
        cli.write_text(args.save_dir / f"{prefix}_test.csv", level_tables.comparison_csv(tested))
        print(f"wrote {args.save_dir / f'{prefix}_test.csv'}")
    cli.write_text(args.save_dir / f"{prefix}_summary.csv", level_tables.comparison_csv(rows))
    print(f"wrote {args.save_dir / f'{prefix}_summary.csv'}")
    write_figures(reports, args, prefix, "", subtitle)


def main(args):
    # ---- what is measured; bad input is refused here, before any work
    device = cli.pick_device(args.device)
    models, series = load_models(args, device)
    steps = representations.steps_of_rows(series, args.velocity)
    rows = sampled_rows(len(steps), args)
    cli.output_folder(args.save_dir)
    suffix, subtitle = args.settings, subtitle_of(args)

    # ---- one model after the other, while other processes embed the levels that are ready
    n_embeddings = 0 if args.no_umap else sum(len(loaded.depths) for loaded in models) + (not args.no_baselines)
    pool = umap_pool(n_embeddings, min(args.umap_points, len(rows)))
    # Threads of BLAS that wait for work would take turns with these processes.
    threads = threadpool_limits(None if pool is None else 1, user_api="blas")
    try:
        if series.states is None:
            print("these data have no labels: no probes, clusters and silhouette; UMAPs are coloured by time")
        measurer = Measurer(series, observer.Optimum(series, args.test_steps, args.seed), rows, args, pool)
        beside, reports = None if args.no_baselines else Baselines(measurer), []
        for loaded in models:
            accuracy = measurer.optimum.circle_accuracy
            ceiling = "" if accuracy is None else f"; exact filter's circle accuracy {accuracy:.3f}"
            print(f"\n{loaded.name}: {cli.count(loaded.model.n_layers, 'layer')}{ceiling}")
            report, embeddings = evaluate(loaded, measurer, beside)
            whole = write_report(report, args, loaded.name + suffix, subtitle)
            if embeddings:
                shown = steps[rows[:report["umap_points"]]]
                write_umaps(report, embeddings, series, shown, args, loaded.name + suffix, subtitle)
            reports.append(whole)

        # ---- the models beside each other
        if len(reports) > 1:
            write_comparison(reports, args, suffix, subtitle)
    except BrokenProcessPool:
        raise cli.UserError("a process that computed a UMAP was ended, probably for lack of memory; "
                            "use fewer --umap-points") from None
    finally:
        threads.restore_original_limits()
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    cli.run(main, ARGS)
