"""What is reported as a result is measured here: on a test series, with standard errors.

The test series is one that neither training nor the choice of the epoch has seen. Where the process that made the data
is known, it is drawn anew from that process, with a seed of its own; of other data it is the last part of the series,
which training held back. The model sees it in windows as long as those of its training, one behind the other, each
begun without a past, and the exact filter the same ones.

Errors of neighbouring steps are not independent: at the end of a visit the model and the filter are both wrong for
many steps. So standard errors are those of the means of blocks, which hold about 25 visits or more (the method of
batch means: Law & Carson 1979, Operations Research 27). A model is always compared with the filter, or with another
model, on the same blocks: most of what makes one block harder than another is the noise, which both meet, and the
difference knows nothing of it.
"""

import dataclasses
import math

import numpy as np
import torch

import cli
import dataset
import figures
import floor_cache
import measures
import optimal_filter
from circle_process import draw_series
from mamba_model import window_errors
from representations import STEPS_IN_BATCH

TEST_STEPS = 1_000_000  # of the test series, where it is drawn
SEED = 1_000_003  # of the test series; beside it stand three numbers, so no series of the generator or of --fresh is it
VISITS_PER_BLOCK = 25
BLOCK_STEPS = 10_000  # of a block, at least, where nobody knows how long a visit lasts
FEWEST_BLOCKS = 5  # from fewer no standard error is computed


@dataclasses.dataclass(frozen=True)
class Unseen:
    """Windows of a test series, and the blocks that they are in.

    series: a dataset.Series; process: the optimal_filter's, or None when it isn't known; starts, first_steps: (n,) the
    first step of each window, in the series and in its recording; edges (n_blocks + 1,): block b has the windows
    edges[b] … edges[b + 1] - 1; drawn: whether the series was drawn for the test; folder: where floors are kept.
    """

    series: dataset.Series
    process: object
    seq_len: int
    starts: np.ndarray
    first_steps: np.ndarray
    edges: np.ndarray
    drawn: bool
    folder: object

    @property
    def weights(self):
        """The share of each block in all windows, (n_blocks,)."""
        return np.diff(self.edges) / len(self.starts)

    def block_means(self, values):
        """Means over the windows of each block: (n_windows, …) to (n_blocks, …)."""
        return np.add.reduceat(values, self.edges[:-1]) / np.diff(self.edges).reshape(-1, *[1] * (values.ndim - 1))

    def describe(self):
        """One line that says what the errors are measured on."""
        what = "newly drawn" if self.drawn else "held back from training and from the choice of the epoch"
        n_steps, n_blocks = len(self.starts) * self.seq_len, len(self.edges) - 1
        return (f"test series: {n_steps:,} steps, {what}; standard errors over {cli.count(n_blocks, 'block')} of "
                f"{n_steps // n_blocks:,} steps")


# ---- The test series ------------------------------------------------------------------------------------------

def can_be_drawn(series, process):
    """Whether new series of the process that made `series` can be drawn; process: as from
    `optimal_filter.process_or_none`, which is None for data without noise."""
    return dataset.unknown_of_process(series) == [] and (process is not None or series.config["noise_std"] == 0)


def drawn_series(series, n_steps):
    """A new dataset.Series of n_steps steps of the process of `series`.

    A centre that walks leads ever further away. There it is several series, each as long as the data at most, so that
    the model meets no place to which its training never led.
    """
    longest = series.n_steps if series.config.get("center_walk_std") else n_steps
    lengths = [longest] * (n_steps // longest) + [n_steps % longest] * (n_steps % longest > 0)
    parts = [draw_series(series.process, series.config, length, [SEED, number, 0, 1])
             for number, length in enumerate(lengths)]
    return dataset.Series(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)), process=series.process,
                          config=series.config, lengths=tuple(lengths))


def unseen_part(series, process, seq_len, n_steps=None, held_back=0):
    """The windows of the test series: an Unseen, or None when there is none, of which a line tells the reason.

    process: as for `can_be_drawn`; n_steps: as from --test-steps, of a series that is drawn, 0 for no test series;
    held_back: how many steps at the end of other data training held back.
    """
    n_steps = TEST_STEPS if n_steps is None else n_steps
    if n_steps == 0:
        return None
    drawn = can_be_drawn(series, process)
    if drawn:
        tested, first = drawn_series(series, max(n_steps, seq_len)), 0
    else:
        tested, first = series, series.n_steps - held_back
    recordings = tested.recordings
    starts = dataset.starts_in_recordings(recordings, first, tested.n_steps, seq_len, seq_len)
    if len(starts) == 0:
        print("no test series: the process isn't known, and training held no window of the data back")
        return None
    first_steps = starts - dataset.recordings_at(recordings, starts)[:, 0]
    return Unseen(tested, process, seq_len, starts, first_steps, block_edges(series.config, len(starts), seq_len),
                  drawn, series.folder)


def block_edges(config, n_windows, seq_len):
    """The first window of each block, and n_windows: (n_blocks + 1,). All blocks but for rounding are of one size, and
    hold VISITS_PER_BLOCK visits or more; config: the data's, which tells how long a visit lasts."""
    dwell = config.get("dwell_mean")
    steps = VISITS_PER_BLOCK * dwell if isinstance(dwell, int | float) and dwell > 0 else BLOCK_STEPS
    n_blocks = max(1, n_windows // max(1, math.ceil(steps / seq_len)))
    return np.linspace(0, n_windows, n_blocks + 1).round().astype(int)


def held_back(args, series, resumed):
    """How many steps at the end of its data a training run leaves to the test: none where a test series can be drawn.

    args: the run's flags, of which test_steps becomes this number, so that the checkpoint tells it; resumed: whether it
    is that of the run's start. A run of the time before there was a test has none. Raises UserError.
    """
    if can_be_drawn(series, optimal_filter.process_or_none(series)):
        return 0
    if not resumed:
        args.test_steps = steps_to_hold_back(series, args.seq_len, args.val_fraction, args.test_steps)
    return args.test_steps or 0


def left_to_the_test(flags, series, process):
    """How many steps of a series the training with these flags, a dict out of a checkpoint, has left to the test."""
    steps = flags.get("test_steps")
    if not isinstance(steps, int) or not 0 <= steps <= series.n_steps or can_be_drawn(series, process):
        return 0
    return steps


def steps_to_hold_back(series, seq_len, val_fraction, n_steps=None):
    """How many steps, at the end of data whose process isn't known, training holds back as their test part: n_steps,
    as from --test-steps, or else half of the validation part; 0 where that is too short for a window.

    Raises UserError when n_steps leaves nothing for validation.
    """
    first = dataset.first_validation_step(series.n_steps, val_fraction)
    held = (series.n_steps - first) // 2 if n_steps is None else n_steps

    def has_window(begin, end):
        return len(dataset.starts_in_recordings(series.recordings, begin, end, seq_len, seq_len)) > 0

    if has_window(first, series.n_steps - held) and has_window(series.n_steps - held, series.n_steps):
        return held
    if n_steps:
        raise cli.UserError(f"--test-steps {n_steps} must leave one window of {seq_len} steps for validation and one "
                            f"for the test part, out of {series.n_steps - first} steps; use another number, or a "
                            "larger --val-fraction")
    return 0


# ---- Errors on it ---------------------------------------------------------------------------------------------

def model_blocks(model, unseen):
    """The errors of a model, block by block: {"mse": {k: (n_blocks,)}, and "nll" where it predicts densities}."""
    device = next(model.parameters()).device
    windows = dataset.Windows(unseen.series.X, unseen.seq_len, device)
    batch_size = max(1, STEPS_IN_BATCH[device.type] // unseen.seq_len)
    errors = window_errors(model, windows, torch.from_numpy(unseen.starts).to(windows.starts_device), batch_size)
    blocks = unseen.block_means(errors.numpy())
    return {measure: {k: blocks[:, m, h] for h, k in enumerate(model.horizons)}
            for m, measure in enumerate(model.measures)}


def floor_blocks(unseen, horizons):
    """The errors of the exact filter on the same windows, block by block: {"mse": {k: (n_blocks,)}, "nll": {1: …}};
    {} when the process isn't known. Kept in the data's folder, see floor_cache."""
    if unseen.process is None:
        return {}
    process, series, starts, seq_len = unseen.process, unseen.series, unseen.starts, unseen.seq_len

    def compute():
        rows = optimal_filter.filter_each_window(process, series, starts, unseen.first_steps, seq_len, horizons)
        *mse, nll, _ = unseen.block_means(rows).T.tolist()
        return {"mse": dict(zip(horizons, mse, strict=True)), "nll": {1: nll}}

    floors = floor_cache.kept(compute, unseen.folder, (process, series, starts, seq_len), horizons,
                              [0, *unseen.edges, *unseen.first_steps], n_blocks=len(unseen.edges) - 1)
    return {measure: {k: np.array(values) for k, values in by_horizon.items()}
            for measure, by_horizon in floors.items()}


def mean_and_error(values, weights):
    """The mean of block means (n_blocks,), weighted by the blocks' shares, and its standard error, None where there are
    fewer than FEWEST_BLOCKS."""
    mean, error = measures.ratio_and_error(weights * values, weights)
    return mean, error if len(values) >= FEWEST_BLOCKS else None


def excess_and_error(mse, floor, weights):
    """How far an MSE is above the floor in percent, and its standard error, from block means (n_blocks,) of both."""
    ratio, error = measures.ratio_and_error(weights * mse, weights * floor)
    return 100 * (ratio - 1), 100 * error if len(mse) >= FEWEST_BLOCKS else None


def unseen_rows(blocks, floors, weights):
    """The errors on a test series beside the floors, one dict per horizon. blocks: as from `model_blocks`; floors: as
    from `floor_blocks`. Each number X has its standard error beside it as X_error; both are None when unknown."""
    rows = []

    def put(row, name, values, floor=0.0):
        row[name], row[f"{name}_error"] = (
            (None, None) if values is None or floor is None else mean_and_error(values - floor, weights))

    for k, mse in blocks["mse"].items():
        row, floor = {"horizon": k}, floors.get("mse", {}).get(k)
        put(row, "test_mse", mse)
        put(row, "optimal_mse", floor)
        row["excess_percent"], row["excess_percent_error"] = (
            (None, None) if floor is None else excess_and_error(mse, floor, weights))
        if "nll" in blocks:
            nll, floor = blocks["nll"].get(k), floors.get("nll", {}).get(k)
            put(row, "test_nll", nll)
            put(row, "optimal_nll", floor)
            put(row, "excess_nats", nll, floor)
        rows.append(row)
    return rows


# ---- Several models on one test series ------------------------------------------------------------------------

def as_report(model, unseen, learner=None):
    """What NAME_metrics.json holds of a model's errors on the test series, a dict that `compared` takes: the blocks of
    model and filter, their shares, and the rows of `unseen_rows`; with a `learned.Learner` its errors too."""
    blocks, floors = model_blocks(model, unseen), floor_blocks(unseen, model.horizons)
    report = {"what": unseen.describe(), "rows": unseen_rows(blocks, floors, unseen.weights),
              "blocks": as_lists(blocks), "floors": as_lists(floors), "weights": unseen.weights.tolist()}
    if learner is not None and floors:
        of_learner = floor_blocks(dataclasses.replace(unseen, process=learner.process), model.horizons)
        report["learner"] = {"n_steps": learner.n_steps, "rows": unseen_rows(
            {measure: of_learner[measure] for measure in blocks}, floors, unseen.weights)}
    return report


def print_report(report):
    """Print what `as_report` returns: the table, and a line on the learner."""
    print(f"{report['what']}\n{unseen_table(report['rows'])}")
    if "learner" in report:
        print(learner_line(report["learner"]))


def learner_line(learner):
    """How far an observer who learns the process is above the filter: one line. learner: as in `as_report`."""
    row = learner["rows"][0]
    nats = with_error(row.get("excess_nats"), row.get("excess_nats_error"), "+.4f", " nats")
    return (f"an observer who learns the process from the {learner['n_steps']:,} labelled training steps: "
            + with_error(row["excess_percent"], row["excess_percent_error"], "+.2f", " %")
            + (f" and {nats}" if "excess_nats" in row else "") + f" at horizon {row['horizon']}")


def as_lists(blocks):
    return {measure: {str(k): values.tolist() for k, values in by_horizon.items()}
            for measure, by_horizon in blocks.items()}


def compared(settings):
    """Settings side by side at horizon 1, a dict per setting. settings: {name: list of `as_report`, one per seed}.

    A setting is the mean over its seeds. Beside its excess over the filter stands the difference from the first setting
    that was measured on the same blocks. A standard error is that over blocks and, where there are several seeds, that
    over seeds: both of them vary, independently of each other.
    """
    rows, firsts = [], []
    for name, reports in settings.items():
        first_name, first = next((known for known in firsts if same_blocks(known[1][0], reports[0])), (name, reports))
        if first is reports:
            firsts.append((name, reports))
        weights = np.array(reports[0]["weights"])
        floor = reports[0]["floors"].get("mse", {}).get("1")
        base = np.mean([report["blocks"]["mse"]["1"] for report in first], axis=0) if floor is None else np.array(floor)
        row = {"setting": name, "seeds": len(reports), "compared_with": None if name == first_name else first_name}
        scale = 100 / float(weights @ base)

        def put(key, members, others, weights=weights, row=row):
            """The mean over members (n, n_blocks), less that over others (m, n_blocks)."""
            mean, error = mean_and_error(np.mean(members, axis=0) - np.mean(others, axis=0), weights)
            seeds = sum(np.var(group @ weights, ddof=1) / len(group) for group in (members, others) if len(group) > 1)
            row[key], row[f"{key}_error"] = mean, None if error is None else math.hypot(error, math.sqrt(seeds))

        mse, first_mse = ([np.array(r["blocks"]["mse"]["1"]) * scale for r in group] for group in (reports, first))
        if floor is not None:
            put("excess_percent", np.array(mse), np.array(floor)[None] * scale)
        if row["compared_with"]:
            put("difference_percent", np.array(mse), np.array(first_mse))
        if all("nll" in report["blocks"] for report in [*reports, *first]):
            nll, first_nll = (np.array([r["blocks"]["nll"]["1"] for r in group]) for group in (reports, first))
            if floor is not None:
                put("excess_nats", nll, np.array(reports[0]["floors"]["nll"]["1"])[None])
            if row["compared_with"]:
                put("difference_nats", nll, first_nll)
        rows.append(row)
    return rows


def same_blocks(report, other):
    """Whether two reports can be compared block by block: they have the same floors and blocks. The filter that
    predicts further horizons, too, sums in another order: its floor at horizon 1 may differ in the last bits."""
    def close(values, others):
        return len(values) == len(others) and np.allclose(values, others, rtol=1e-9, atol=0)

    return close(report["weights"], other["weights"]) and close(
        *(one["floors"].get("mse", {}).get("1", []) for one in (report, other)))


COMPARED = {  # of that table, as COLUMNS
    "above the filter": ("excess_percent", "+.2f", " %"), "above the first": ("difference_percent", "+.2f", " %"),
    "nats above the filter": ("excess_nats", "+.4f", ""), "above the first (nats)": ("difference_nats", "+.4f", "")}


def compared_cells(rows):
    """The table of `compared`: (titles, rows of texts); columns that no row has a value for are left out."""
    shown = {title: column for title, column in COMPARED.items() if any(column[0] in row for row in rows)}
    return ["on the test series", "seeds", *shown], [
        [row["setting"], row["seeds"], *(with_error(row.get(key), row.get(f"{key}_error"), form, unit)
                                         for key, form, unit in shown.values())] for row in rows]


def compared_table(rows):
    return cli.table(*compared_cells(rows))


@cli.in_style
def draw_compared(rows):
    """The rows of `compared` as a Figure: per setting the excess over the filter, or, where that isn't known, the
    difference from the first setting, with its standard error; a second panel for nats where all predict densities."""
    keys = [next(key for key in (f"excess_{unit}", f"difference_{unit}") if any(key in row for row in rows))
            for unit in ("percent", "nats") if any(f"{kind}_{unit}" in row for row in rows
                                                   for kind in ("excess", "difference"))]
    labels = {"excess_percent": "MSE above the exact filter (%)", "difference_percent": "MSE above the first (%)",
              "excess_nats": "NLL above the exact filter (nats per step)",
              "difference_nats": "NLL above the first (nats per step)"}
    height = 0.8 + 0.3 * len(rows)
    fig, axes = figures.new_figure(1, len(keys), (5.0, height), "errors on the test series", sharey=True)
    names = [f"{row['setting']} ({row['seeds']} seeds)" if row["seeds"] > 1 else row["setting"] for row in rows]
    for ax, key in zip(axes[0], keys, strict=True):
        for place, (row, color) in enumerate(zip(rows, figures.run_colors(len(rows)), strict=True)):
            if key in row:
                ax.errorbar(row[key], place, xerr=row[f"{key}_error"], color=color, marker="o", markersize=5, capsize=3)
        ax.set(xlabel=f"{labels[key]}\nmean ± standard error", yticks=range(len(rows)), yticklabels=names,
               ylim=(len(rows) - 0.5, -0.5))
        ax.grid(axis="x", color="0.9")
        shown = [row[key] for row in rows if key in row]
        if key.startswith("excess") and 0 < 5 * min(shown) < max(shown):
            ax.set_xscale("log")
            figures.log_ticks(ax.xaxis, (1, 2, 5))
    return fig


# ---- How they are printed -------------------------------------------------------------------------------------

def with_error(value, error, form="", unit=""):
    """"0.197 ± 0.004 %": no more digits than the standard error supports, which has two where its first one is a 1.

    form: of a value without a known error, as for format(); "+" for one with its sign. None is a dash.
    """
    if value is None:
        return "–"
    if error is None or not error > 0 or not math.isfinite(error):
        return f"{value:{form or '.4g'}}{unit}"
    exponent = math.floor(math.log10(error))
    leading = round(error / 10**exponent, 9)
    decimals = max(0, -exponent + (leading < 1.95))
    sign = "+" if form.startswith("+") else ""
    return f"{value:{sign}.{decimals}f} ± {error:.{decimals}f}{unit}"


COLUMNS = {  # of the table: the key of a row, the form of a number without a known error, and its unit
    "test MSE": ("test_mse", ".4f", ""), "optimal": ("optimal_mse", ".4f", ""),
    "excess": ("excess_percent", "+.2f", " %"), "NLL (nats)": ("test_nll", ".4f", ""),
    "optimal NLL": ("optimal_nll", ".4f", ""), "above optimal": ("excess_nats", "+.4f", " nats")}


def unseen_cells(rows):
    """The table of `unseen_rows`: (titles, rows of texts). NLL: the negative log-likelihood in nats per time step."""
    columns = {title: column for title, column in COLUMNS.items() if column[0] in rows[0]}
    return ["horizon", *columns], [
        [row["horizon"], *(with_error(row[key], row[f"{key}_error"], form, unit)
                           for key, form, unit in columns.values())] for row in rows]


def unseen_table(rows):
    titles, cells = unseen_cells(rows)
    return cli.table(titles, cells, align="r" * len(titles))
