"""Let a trained model sing: feed its own predictions back, perturb it, and ask whether the song is still a song.

A song is a series that the model generates. Reads NAME.pt and DATA_DIR/data.npz, config.json. Each sample starts from
--seed-len real steps and goes on for --gen-len steps by the one-step recurrence, whose cost per step does not depend
on how many steps came before.

Temperature T adds Gaussian noise of standard deviation T * noise_std (config.json) to each prediction; the sum is the
next step of the song, and the model reads it as such: T = 1 draws from the process as the model knows it, T = 0 is
greedy. Bursts come every --perturb-interval steps (the first one after that many) and last --perturb-duration steps.
During a burst, Gaussian noise of standard deviation --perturb-scale is added to what the model reads, or, with
--perturb-hidden, to the outputs of its layers. Burst noise acts on the model only; it is not part of the song.

The exact filter's smoother then labels each generated step with a circle and an angle. Reported are transitions, dwell
times, the circles visited, the share of predictions near no circle, and how long a song stays on the process.

Writes to SAVE_DIR, VARIANT naming every setting that isn't the default:
  NAME_generated[_VARIANT].npz        generated, predictions (samples, steps, features), seed, seed_starts, perturbed,
                                      and, of the smoother, labels, thetas, nearest_distance, path_distance
  NAME_generated[_VARIANT]_seed.png   seed and continuation
  NAME_generated[_VARIANT]_truth.png  continuation against the true one, and the error
  NAME_generated[_VARIANT]_song.png   transition matrix, dwell times, distance to the process
  NAME_compare[_VARIANT].png, .json   with --compare: greedy, temperature, output and hidden bursts side by side,
                                      beside the real series where it is long enough

Examples:
  python generate.py --checkpoint model_next.pt --seed-len 64 --gen-len 512
  python generate.py --checkpoint model_next.pt --gen-len 2048 --temperature 0.5
  python generate.py --checkpoint model_next.pt --gen-len 2048 --perturb-hidden --perturb-interval 200 \\
      --perturb-scale 50 --perturb-duration 10
  python generate.py --checkpoint model_next.pt --gen-len 4096 --compare
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cli

PERTURB_SCALE, PERTURB_DURATION = 20.0, 10
COMPARE_TEMPERATURE, COMPARE_INTERVAL = 1.0, 200


def layer_numbers(text):
    """`1,3` as [1, 3]."""
    return [cli.positive_int(part) for part in text.split(",")]


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    song = parser.add_argument_group("song")
    song.add_argument("--seed-len", type=cli.positive_int, default=512, metavar="N",
                      help="real steps before it sings")
    song.add_argument("--gen-len", type=cli.positive_int, default=512, metavar="N", help="steps to generate")
    song.add_argument("--temperature", type=cli.non_negative_float, default=0.0, metavar="T",
                      help="noise on each prediction, in units of the data's noise_std")
    song.add_argument("--n-samples", type=cli.positive_int, default=3, metavar="N",
                      help="songs, generated as one batch, from seeds spread evenly behind the first")
    # Left out of the namespace unless given: their defaults depend on other flags.
    song.add_argument("--seed-offset", type=cli.non_negative_int, default=argparse.SUPPRESS, metavar="STEP",
                      help="time step where the first seed starts (default: the first validation step)")
    bursts = parser.add_argument_group("perturbation bursts")
    bursts.add_argument("--perturb-interval", type=cli.non_negative_int, default=0, metavar="N",
                        help="steps from one burst to the next; 0: no bursts")
    bursts.add_argument("--perturb-scale", type=cli.positive_float, default=argparse.SUPPRESS, metavar="STD",
                        help="standard deviation of the burst noise, in units of what it perturbs "
                             f"(default: {PERTURB_SCALE:g})")
    bursts.add_argument("--perturb-duration", type=cli.positive_int, default=argparse.SUPPRESS, metavar="N",
                        help=f"steps of a burst (default: {PERTURB_DURATION})")
    bursts.add_argument("--perturb-hidden", action="store_true", help="perturb layer outputs, not the observation")
    bursts.add_argument("--perturb-layers", type=layer_numbers, nargs="+", default=argparse.SUPPRESS, metavar="N",
                        help="the layers to perturb, counted from 1 (default: all)")
    bursts.add_argument("--compare", action="store_true",
                        help="compare greedy generation, temperature, output bursts and hidden bursts "
                             f"(temperature {COMPARE_TEMPERATURE:g}, interval {COMPARE_INTERVAL} unless given)")
    cli.add_computing(parser)
    files = parser.add_argument_group("files")
    files.add_argument("--checkpoint", type=Path, required=True, metavar="NAME.pt", help="the trained model; required")
    cli.add_data_dir(files)
    cli.add_save_dir(files)
    args = parser.parse_args(argv)
    problem = find_problem(args)
    if problem:
        parser.error(problem)
    if args.compare:
        args.temperature = args.temperature or COMPARE_TEMPERATURE
        args.perturb_interval = args.perturb_interval or COMPARE_INTERVAL
    flags = vars(args)
    flags.setdefault("seed_offset", None)
    flags.setdefault("perturb_scale", PERTURB_SCALE)
    flags.setdefault("perturb_duration", min(PERTURB_DURATION, args.perturb_interval or PERTURB_DURATION))
    groups = flags.pop("perturb_layers", None)
    args.perturb_layers = None if groups is None else sorted({n for group in groups for n in group})
    if args.perturb_interval and args.perturb_duration > args.perturb_interval:
        parser.error(f"--perturb-duration {args.perturb_duration} is longer than --perturb-interval "
                     f"{args.perturb_interval}: bursts would overlap; make it shorter")
    return args


def find_problem(args):
    """What is wrong with flags that only mean something together, in words, or None."""
    if args.compare and args.perturb_hidden:
        return "--compare runs with and without --perturb-hidden; leave that flag out"
    if "perturb_layers" in args and not (args.perturb_hidden or args.compare):
        return "--perturb-layers names layers to perturb; add --perturb-hidden"
    if not (args.perturb_interval or args.compare):
        for flag in ("perturb_hidden", "perturb_scale", "perturb_duration"):
            if getattr(args, flag, False):
                return f"--{flag.replace('_', '-')} has no effect without bursts; add --perturb-interval N"
    return None


if __name__ == "__main__":
    ARGS = parse_args()  # before the slow imports: --help and a bad flag answer at once

import numpy as np
import torch
from tqdm import tqdm

import circle_process
import dataset
import figures
import mixture_head
import optimal_filter
from mamba_model import open_model, stem

BLOCK = 1024  # steps whose noise is drawn and whose predictions are collected at a time: bounds the extra memory
LEAST_TEMPERATURE = 1e-30  # of a mixture: float32 can't divide by much less
SHOWN_STEPS, SHOWN_SAMPLES = 4096, 3  # more than that can't be told apart in a figure
MOST_NAMED_CIRCLES = 20  # beyond, a transition matrix has room for every fifth number only, and for no text beside it


# ------------------------------------------------------------------------------------------------- generation


@dataclass(frozen=True)
class Bursts:
    """Noise of standard deviation `scale` for `duration` steps, every `interval` steps, the first after `interval`.

    On the outputs of `layers` (counted from 0), or on the observation when that is None.
    """

    interval: int
    duration: int
    scale: float
    layers: tuple | None = None


def burst_steps(n_steps, bursts):
    """Which generated steps lie in a burst: (n_steps,) bool. At these the model reads perturbed."""
    t = np.arange(n_steps)
    if bursts is None:
        return np.zeros(n_steps, dtype=bool)
    return (t >= bursts.interval) & (t % bursts.interval < bursts.duration)


class Draws(NamedTuple):
    """The random numbers of a block of steps, drawn before a stepper computes them.

    own (n, steps, feature_dim): what becomes part of the series. Of a point head, the noise that is added to each
    prediction; of a mixture, the standard normals from which its component is drawn. uniform (n, steps), in [0, 1):
    chooses the component. observation: burst noise on what the model reads, of the shape of own. burst (steps,) int:
    for each step its row in hidden, -1 where there is none. hidden (n, rows, n_layers, d_model): burst noise on the
    layers' outputs.
    """

    own: np.ndarray
    uniform: np.ndarray
    observation: np.ndarray
    burst: np.ndarray
    hidden: np.ndarray


class Sampling(NamedTuple):
    """How a stepper turns a mixture into the next value: temperature 0 takes its mean, which a point head gives
    anyway; above 0 see mixture_head.draw. scale_range: mixture_head.SCALE_RANGE, which the kernels don't import."""

    temperature: float = 0.0
    scale_range: float = mixture_head.SCALE_RANGE


def generate(model, seed, n_steps, noise_std=0.0, bursts=None, random_seed=42, temperature=0.0):
    """Continue the series `seed` (n, seed_len, feature_dim), an array, for n_steps steps.

    noise_std: standard deviation, in the data's units, of the noise that is added to each prediction; the sum is the
    next step of the series and is fed back. temperature, for a mixture head only: above 0 the next step is drawn from
    the predicted mixture, sharpened as mixture_head.draw says. Returns (generated, predictions), each (n, n_steps,
    feature_dim) in the model's type: predictions[:, t] is the mean that the model gave for step t, generated[:, t]
    that plus the noise, or the draw.

    A sample's noise depends on random_seed and its place in the batch alone, so a larger batch only adds samples.
    """
    if temperature and not model.mixture:
        raise ValueError("a point head predicts no distribution to draw from; give noise_std in place of temperature")
    weight = model.input_proj.weight
    dtype = np.float64 if weight.dtype == torch.float64 else np.float32
    n, _, feature_dim = seed.shape
    with torch.inference_mode():
        outputs, states = model.prefill(torch.as_tensor(seed, dtype=weight.dtype, device=weight.device))
    sampling = Sampling(max(temperature, LEAST_TEMPERATURE) if temperature else 0.0)
    advance = choose_stepper(model)(model, outputs["1"], states, sampling)

    in_burst = burst_steps(n_steps, bursts)
    streams = [[np.random.default_rng([random_seed, i, k]) for k in range(3)] for i in range(n)]
    predictions = np.empty((n, n_steps, feature_dim), dtype)
    generated = np.empty_like(predictions)
    own_std = 1.0 if temperature else noise_std
    with tqdm(total=n_steps, unit="step", disable=None, leave=False) as progress:
        for first in range(0, n_steps, BLOCK):
            block = slice(first, min(first + BLOCK, n_steps))
            draws = draw_noise(model, streams, in_burst[block], own_std, bursts, dtype)
            predictions[:, block], generated[:, block] = advance(draws)
            progress.update(block.stop - block.start)
    return generated, predictions


def draw_noise(model, streams, in_burst, own_std, bursts, dtype):
    """The Draws of one block of steps; in_burst (steps,) says which of them lie in a burst.

    streams: for each sample, one random generator for its own noise, of standard deviation own_std, one for bursts and
    one for the choice of components.
    """
    n_burst = int(in_burst.sum())
    layers = [] if bursts is None or bursts.layers is None else list(bursts.layers)
    own = np.zeros((len(streams), len(in_burst), model.feature_dim), dtype)
    uniform = np.zeros(own.shape[:2], dtype)
    observation = np.zeros_like(own)
    hidden = np.zeros((len(streams), n_burst if layers else 0, model.n_layers, model.d_model), dtype)
    below_one = np.nextafter(dtype(1), dtype(0))  # rounding to float32 may make a 1 of a number below it
    for i, (own_rng, burst_rng, component_rng) in enumerate(streams):
        if own_std:
            own[i] = own_std * own_rng.standard_normal(own[i].shape)
        if model.mixture:
            uniform[i] = np.minimum(component_rng.random(len(in_burst)).astype(dtype), below_one)
        if layers:
            hidden[i][:, layers] = bursts.scale * burst_rng.standard_normal((n_burst, len(layers), model.d_model))
        elif bursts is not None:
            observation[i, in_burst] = bursts.scale * burst_rng.standard_normal((n_burst, model.feature_dim))
    return Draws(own, uniform, observation, hidden_rows(in_burst, bursts), hidden)


def hidden_rows(in_burst, bursts):
    """For each step (steps,) of a block, its row in Draws.hidden, -1 where it has none."""
    hits_layers = bursts is not None and bursts.layers is not None
    return np.where(in_burst & hits_layers, np.cumsum(in_burst) - 1, -1)


# A stepper takes a model, what its prefill returned (the outputs of the horizon-1 head, and the states) and a Sampling,
# and gives a function
#   advance(draws) -> predictions, generated, each (n, steps, feature_dim)
# that computes a block of steps and remembers where it stopped. At step t it writes down the current prediction (of a
# mixture, its mean) and what becomes part of the series: the prediction plus draws.own[:, t], or a draw from the
# mixture. It reads that plus draws.observation[:, t], and predicts the next one; where draws.burst[t] is not -1,
# draws.hidden[:, draws.burst[t], i] is added to the output of layer i while it reads.


def choose_stepper(model):
    """The fastest stepper for the model's device; the plain loop for the back end named reference."""
    device = model.input_proj.weight.device
    if model.backend_for(device) == "reference":
        return loop_stepper
    if device.type == "cuda":
        from kernels import step_cuda

        return step_cuda.stepper
    from kernels import step_cpu

    return step_cpu.stepper


def loop_stepper(model, output, states, sampling):
    """`model.step` in a plain loop: any device, and what the fast steppers are tested against."""

    @torch.inference_mode()
    def advance(draws):
        nonlocal output, states
        own, uniform, observation, hidden = (torch.as_tensor(a, device=output.device) for a in (
            draws.own, draws.uniform, draws.observation, draws.hidden))
        predictions, generated = torch.empty_like(own), torch.empty_like(own)
        for t, row in enumerate(draws.burst):
            mean = model.predictions({"1": output})["1"]
            predictions[:, t] = mean
            if sampling.temperature:
                mixture = model.mixture_of("1", output)
                value = mixture_head.draw(*mixture, sampling.temperature, uniform[:, t], own[:, t])
                read = value + observation[:, t]
            else:
                value, read = mean + own[:, t], mean + (own[:, t] + observation[:, t])
            generated[:, t] = value

            def perturb(i, h, row=row):
                return h + hidden[:, row, i]

            heads, states = model.step(read, states, perturb if row >= 0 else None)
            output = heads["1"]
        return predictions.cpu().numpy(), generated.cpu().numpy()

    return advance


def seed_windows(n_steps, seed_len, gen_len, n_samples, offset):
    """First steps (n_samples,) of the seeds: the first at `offset`, the others spread evenly behind it.

    As long as there is room, each seed has gen_len true steps after it to compare with. Raises cli.UserError when a
    seed at `offset` does not fit into the series.
    """
    last = n_steps - seed_len
    if last < 0:
        raise cli.UserError(f"--seed-len {seed_len} is longer than the series ({n_steps} steps); use a smaller one")
    if offset > last:
        raise cli.UserError(f"--seed-offset {offset} leaves no room for {seed_len} seed steps in the series of "
                            f"{n_steps}; use 0 to {last}")
    if last - gen_len >= offset:
        last -= gen_len
    return offset + np.arange(n_samples) * (last - offset) // n_samples


# ------------------------------------------------------------------------------------------------- is it a song?


def transition_counts(label_rows, n_circles):
    """How often each circle follows each other one: (K, K) int, row: from, column: to."""
    counts = np.zeros((n_circles, n_circles), dtype=np.int64)
    for labels in label_rows:
        circles, _, _ = dataset.visits(labels)
        np.add.at(counts, (circles[:-1], circles[1:]), 1)
    return counts


def total_variation(counts, P):
    """Total variation distance of each row of observed transitions from that of P: (K,), NaN for rows never left."""
    left = counts.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(left > 0, np.abs(counts / left[:, None] - P).sum(axis=1) / 2, np.nan)


def chance_total_variation(left, P):
    """The mean total variation that the true process itself shows when row i is left left[i] times: (K,).

    Half the sum of mean absolute deviations of binomial frequencies, by de Moivre's formula
    E|X - np| = 2 (m + 1) C(n, m + 1) p^(m + 1) (1 - p)^(n - m), m = floor(np).
    """
    out = np.full(len(P), np.nan)
    for i, n in enumerate(np.asarray(left).tolist()):
        if n:
            out[i] = sum(mean_absolute_deviation(n, p) for p in P[i].tolist()) / (2 * n)
    return out


def mean_absolute_deviation(n, p):
    """E|X - np| of a binomial X."""
    if p <= 0 or p >= 1:
        return 0.0
    m = min(math.floor(n * p), n - 1)
    log_choose = math.lgamma(n + 1) - math.lgamma(m + 2) - math.lgamma(n - m)
    return 2 * (m + 1) * math.exp(log_choose + (m + 1) * math.log(p) + (n - m) * math.log1p(-p))


def completed_dwells(label_rows):
    """Circles and lengths (steps) of the visits whose first and last step were both seen."""
    visits = [dataset.visits(labels) for labels in label_rows]
    return (np.concatenate([circles[1:-1] for circles, _, _ in visits]),
            np.concatenate([lengths[1:-1] for _, _, lengths in visits]))


def dwell_time_law(process, circles):
    """The true law of the dwell times of visits to `circles`: possible lengths (steps) and their probabilities."""
    revolutions = np.arange(1, process.dwell_law.shape[1] + 1)
    lengths = process.periods[circles][:, None] * revolutions
    values, index = np.unique(lengths, return_inverse=True)
    total = np.bincount(index.ravel(), process.dwell_law[circles].ravel(), len(values))
    return values, total / max(len(circles), 1)


def steps_on(off, patience):
    """Steps before the first `patience` consecutive ones that are off (n,) bool; all of them if there are none."""
    in_a_row = 0
    for t, is_off in enumerate(off):
        in_a_row = in_a_row + 1 if is_off else 0
        if in_a_row == patience:
            return t + 1 - patience
    return len(off)


def off_distance(process):
    """A prediction farther than this from a point of the process is off it: half the smallest radius.

    Predictions have no noise, so distance alone can judge them. A prediction that hedges between circles or shrinks to
    the common centre, one radius from all of them, is off; one that is merely blurred is not.
    """
    return process.radii.min() / 2


def analyse(process, seeds, generated, predictions):
    """What the exact smoother makes of a generation; arrays as `generate` takes and returns them. Returns a dict.

    labels, thetas (n, n_steps): circle and angle of each generated step, given seed and continuation.
    nearest_distance (n, n_steps): from each prediction to the nearest point of any circle.
    path_distance (n, n_steps): from each prediction to the point at the smoother's circle and angle, which moves as the
    process moves. A song that freezes, or stays on a circle longer than any visit lasts, is near a circle but not on
    the path. When the centre walks, both are distances from circles around the centre that the smoother finds.
    steps_on_process (n,): steps before the path distance stays above `off_distance` for half the shortest revolution.
    """
    seed_len = seeds.shape[1]
    smoothed = [optimal_filter.smooth(process, np.concatenate(pair), initial="stationary")
                for pair in zip(seeds, generated, strict=True)]
    labels, thetas, centers = (np.stack([s[name][seed_len:] for s in smoothed])
                               for name in ("circle", "theta", "center"))
    around_center = predictions - centers
    path = np.linalg.norm(around_center - circle_process.points(process, labels, thetas), axis=-1)
    nearest = np.stack([circle_process.distance(process, rows) for rows in around_center])
    patience = max(int(process.periods.min()) // 2, 1)
    return {"labels": labels, "thetas": thetas, "nearest_distance": nearest, "path_distance": path,
            "steps_on_process": np.array([steps_on(row > off_distance(process), patience) for row in path])}


def summarise(process, song):
    """The numbers of a song, over all its samples, as a dict of plain values; None for what was never seen."""
    P = process.transition_matrix
    counts = transition_counts(song["labels"], process.n_circles)
    left = counts.sum(axis=1)
    distances, chance = total_variation(counts, P), chance_total_variation(left, P)
    share = left / max(left.sum(), 1)  # each row of the matrix counts by how often its circle was left
    _, dwells = completed_dwells(song["labels"])
    return {
        "steps": int(song["labels"].shape[1]),
        "steps_on_process": song["steps_on_process"].tolist(),
        "near_no_circle": float((song["nearest_distance"] > off_distance(process)).mean()),
        "circles_visited": len(np.unique(song["labels"])),
        "transitions": int(left.sum()),
        "total_variation": float(np.nansum(distances * share)) if left.sum() else None,
        "total_variation_by_chance": float(np.nansum(chance * share)) if left.sum() else None,
        "transitions_a_row": left.tolist(),
        "total_variation_a_row": [None if math.isnan(d) else float(d) for d in distances],
        "completed_visits": len(dwells),
        "mean_dwell": float(dwells.mean()) if len(dwells) else None,
    }


SUMMARY_HEADER = ["", "steps on the process", "near no circle", "circles", "transitions", "TV", "TV by chance",
                  "mean dwell"]


def summary_row(name, summary):
    """The cells of one line under SUMMARY_HEADER; summary: as `summarise` returns it."""
    def number(key, digits):
        return "–" if summary[key] is None else f"{summary[key]:.{digits}f}"

    return [name, ", ".join(map(str, summary["steps_on_process"])), f"{summary['near_no_circle']:.1%}",
            summary["circles_visited"], summary["transitions"], number("total_variation", 3),
            number("total_variation_by_chance", 3), number("mean_dwell", 0)]


def transition_table(process, labels):
    """For each circle that was left: how often, and how far from the true transitions, in fact and by chance."""
    P = process.transition_matrix
    counts = transition_counts(labels, process.n_circles)
    left = counts.sum(axis=1)
    distances, chance = total_variation(counts, P), chance_total_variation(left, P)
    return cli.table(["from circle", "left", "TV", "TV by chance"], [
        [i, left[i], f"{distances[i]:.3f}", f"{chance[i]:.3f}"] for i in np.flatnonzero(left)])


def reference_song(process, series, starts, seed_len, n_steps):
    """The same analysis of the true continuations of the seeds, or None where the series ends too early.

    The exact filter takes the model's place: it predicts each step from the true ones before it.
    """
    if max(starts) + seed_len + n_steps > series.n_steps:
        return None
    windows = np.stack([series.X[start:start + seed_len + n_steps] for start in starts])
    predictions = []
    for X in windows:
        one_ahead = optimal_filter.predict(process, X, initial="stationary")["prediction"][1]
        predictions.append(one_ahead[seed_len - 1:-1])  # row t predicts step t + 1
    return analyse(process, windows[:, :seed_len], windows[:, seed_len:], np.stack(predictions))


def rms_error(generated, truth):
    """Root mean square of generated - truth over features: two (n_steps, feature_dim) arrays to (n_steps,)."""
    return np.sqrt(((generated - truth)**2).mean(axis=1))


# ------------------------------------------------------------------------------------------------- figures


def burst_marks(ax, in_burst):
    """Short black bars above an axis where bursts were; in_burst (n_steps,) begins with generated step 0."""
    edges = np.flatnonzero(np.diff(np.r_[False, in_burst, False]))  # first step of a burst, first step after it, …
    first, last = edges.reshape(-1, 2).T - 0.5
    ax.hlines(np.full(len(first), 1.02), first, last, color="black", linewidth=3, clip_on=False,
              transform=ax.get_xaxis_transform())


def draw_seed(title, windows, seed_states, labels, seed_starts, in_burst, n_circles):
    """Seed and continuation of each sample, a strip of circles above a heatmap of the features: a Figure.

    windows (n, seed_len + steps, features); seed_states (n, seed_len); labels (n, steps) or None without a filter.
    """
    seed_len = seed_states.shape[1]
    fig, axes = figures.new_figure(2 * len(windows), 1, panel=(11.0, 1.5), title=title,
                                   gridspec_kw={"height_ratios": [0.12, 1] * len(windows)})
    limits = np.percentile(windows, [1, 99])
    for i, window in enumerate(windows):
        strip, heat = axes[2 * i:2 * i + 2, 0]
        circles = seed_states[i] if labels is None else np.concatenate([seed_states[i], labels[i]])
        figures.state_strip(strip, circles, n_circles, start=-seed_len)
        strip.set_xlim(-seed_len - 0.5, window.shape[0] - seed_len - 0.5)
        figures.heatmap_panel(fig, heat, window, start=-seed_len, ylabel="feature", limits=limits)
        strip.set_title(f"seed from time step {seed_starts[i]}", loc="left")
        heat.axvline(-0.5, color="white", linestyle="--")
        burst_marks(strip, in_burst)
    axes[-1, 0].set_xlabel("generated step (before 0: the seed; black bars: bursts)" if in_burst.any()
                           else "generated step (before 0: the seed)")
    figures.circle_legend(fig, n_circles)
    return fig


def draw_truth(title, generated, labels, truths, states, start, noise_std, in_burst, n_circles):
    """The first sample's continuation under the true one, their difference, and the error of all samples: a Figure.

    generated (n, steps, features); labels (n, steps) or None without a filter; truths: a list of n arrays (steps,
    features), shorter where the series ends; states: the circles of the first of them; start: its first time step.
    """
    truth, steps = truths[0], len(truths[0])
    fig, axes = figures.new_figure(6, 1, panel=(11.0, 1.45), title=title,
                                   gridspec_kw={"height_ratios": [0.14, 1, 0.14, 1, 1, 1]})
    true_strip, true_heat, strip, heat, difference, curve = axes[:, 0]
    limits = np.percentile(truth, [1, 99])
    figures.state_strip(true_strip, states, n_circles)
    true_strip.set_title(f"true series, from time step {start}", loc="left")
    figures.heatmap_panel(fig, true_heat, truth, ylabel="feature", limits=limits)
    strip.set_title("generated", loc="left")
    if labels is None:
        strip.axis("off")
    else:
        figures.state_strip(strip, labels[0, :steps], n_circles)
    figures.heatmap_panel(fig, heat, generated[0, :steps], ylabel="feature", limits=limits)
    figures.heatmap_panel(fig, difference, generated[0, :steps] - truth, ylabel="feature", title="generated − true",
                          cmap="RdBu_r", symmetric=True)
    error_curves(curve, generated, truths, noise_std)
    burst_marks(strip, in_burst[:steps])
    figures.circle_legend(fig, n_circles)
    return fig


def error_curves(ax, generated, truths, noise_std):
    """The RMS error of each sample over time, beside the noise and the spread of the first true continuation."""
    top = spread = truths[0].std()
    for i, (sample, truth) in enumerate(zip(generated, truths, strict=True)):
        if len(truth):
            error = rms_error(sample[:len(truth)], truth)
            top = max(top, error.max())
            ax.plot(error, linewidth=1.0, label=f"sample {i}")
    if noise_std:
        ax.axhline(noise_std, color="0.3", linestyle="--", linewidth=1.0, label="noise_std")
    ax.axhline(spread, color="0.3", linestyle=":", linewidth=1.0, label="std of the true series")
    ax.set(xlim=(-0.5, len(truths[0]) - 0.5), ylim=(0, 1.35 * top), ylabel="RMS error", xlabel="generated step")
    ax.legend(loc="upper left", ncols=5, fontsize=8)  # above the curves: there is room for it


def draw_song(title, process, song, in_burst):
    """Transitions and dwell times beside the true ones, and the distance to the process over time: a Figure."""
    fig, axes = figures.new_figure(2, 2, panel=(5.6, 3.9), title=title)
    transition_panels(fig, axes[0], process.transition_matrix, transition_counts(song["labels"], process.n_circles))
    dwell_histogram(axes[1, 0], process, *completed_dwells(song["labels"]))
    distance_curves(axes[1, 1], song["path_distance"][:SHOWN_SAMPLES, :SHOWN_STEPS], off_distance(process),
                    in_burst[:SHOWN_STEPS])
    return fig


def transition_panels(fig, axes, P, counts):
    """The true transition matrix P (K, K) and the shares of counts (K, K), with each row's distance beside it."""
    K, left = len(P), counts.sum(axis=1)
    shares = counts / np.maximum(left, 1)[:, None]
    ticks = range(K) if K <= MOST_NAMED_CIRCLES else range(0, K, 5)
    for ax, matrix, name in zip(axes, (P, shares), ("true transitions", "generated transitions"), strict=True):
        image = ax.imshow(matrix, cmap="viridis", vmin=0, vmax=1)
        ax.set(title=name, xlabel="to circle", ylabel="from circle", xticks=ticks, yticks=ticks)
    fig.colorbar(image, ax=axes.tolist(), label="probability", fraction=0.03, pad=0.01)
    if K <= MOST_NAMED_CIRCLES:
        for i, (distance, n) in enumerate(zip(total_variation(counts, P), left, strict=True)):
            text = f"TV {'–' if math.isnan(distance) else f'{distance:.2f}'}  n {n}"
            axes[1].text(K - 0.3, i, text, va="center", fontsize=8)


def dwell_histogram(ax, process, circles, dwells):
    """The lengths of visits, dwells (n,) steps on circles (n,), over the law that the process gives them."""
    ax.set_title("dwell times")
    if len(dwells) == 0:
        ax.text(0.5, 0.5, "no visit was seen from\nits first to its last step", ha="center", va="center",
                transform=ax.transAxes)
        figures.bare(ax)
        return
    lengths, law = dwell_time_law(process, circles)
    nearly_all = lengths[np.searchsorted(np.cumsum(law), 0.999).clip(max=len(lengths) - 1)]
    bins = np.linspace(0, 1.02 * max(dwells.max(), nearly_all), 41)
    ax.hist(lengths, bins, weights=law, color="0.75", label="true law")
    ax.hist(dwells, bins, weights=np.full(len(dwells), 1 / len(dwells)), histtype="step", color="#1f77b4",
            linewidth=1.5, label=f"generated ({len(dwells)} visits)")
    ax.set(xlabel="dwell time (steps)", ylabel="share of visits")
    ax.legend()


def distance_curves(ax, distances, threshold, in_burst):
    """The distance of each sample's prediction to the process, (n, steps), and where it counts as off."""
    for i, row in enumerate(distances):
        ax.plot(row, linewidth=0.8, label=f"sample {i}")
    ax.axhline(threshold, color="black", linestyle="--", linewidth=1.0, label="off the process")
    ax.set(xlabel="generated step", ylabel="distance", ylim=(0, None), xlim=(-0.5, distances.shape[1] - 0.5))
    ax.set_title("prediction to the process", pad=12)  # clear of the burst marks
    burst_marks(ax, in_burst)
    ax.legend(loc="upper right", fontsize=8)


def draw_compare(title, songs, summaries, in_burst, threshold, n_circles):
    """The circles of each song's samples as strips, white where a step is off the process, and its distances: a Figure.

    songs, summaries, in_burst: dicts with the same names as keys, of what `analyse`, `summarise` and `burst_steps`
    return.
    """
    fig, axes = figures.new_figure(len(songs), 2, panel=(6.5, 1.6), title=title, sharex=True,
                                   gridspec_kw={"width_ratios": [1.3, 1]})
    colors = figures.circle_colors(n_circles)
    for (name, song), (strip, curve) in zip(songs.items(), axes, strict=True):
        labels, distances = song["labels"][:SHOWN_SAMPLES], song["path_distance"][:SHOWN_SAMPLES]
        n, steps = labels.shape
        off = distances > threshold
        strip.imshow(np.where(off[..., None], 1.0, colors[labels]), aspect="auto", interpolation="nearest",
                     extent=(-0.5, steps - 0.5, n - 0.5, -0.5))
        strip.set(yticks=range(n), ylabel="sample")
        summary = summaries[name]
        strip.set_title(f"{name}: {summary['circles_visited']} circles, {summary['near_no_circle']:.1%} near none",
                        loc="left")
        curve.plot(distances.T, linewidth=0.7)
        curve.axhline(threshold, color="black", linestyle="--", linewidth=1.0)
        curve.set(ylabel="distance", ylim=(0, None), xlim=(-0.5, steps - 0.5))
        for ax in (strip, curve):
            burst_marks(ax, in_burst[name])
    for ax in axes[-1]:
        ax.set_xlabel("generated step")
    axes[0, 1].set_title("prediction to the process", loc="left")
    figures.circle_legend(fig, n_circles)
    return fig


# ------------------------------------------------------------------------------------------------- the script


@dataclass(frozen=True)
class Inputs:
    """What is generated from: process is None for data that the exact filter doesn't know; starts (n,) time steps of
    the seeds (n, seed_len, features); noise_std 0 where config.json gives none."""

    model: torch.nn.Module
    series: dataset.Series
    process: circle_process.Process | None
    starts: np.ndarray
    seeds: np.ndarray
    noise_std: float


def load_inputs(args):
    """Load and check what the flags name: an Inputs. Raises cli.UserError when something doesn't fit."""
    model, trained_with, series = open_model(args.checkpoint, args.data_dir, cli.pick_device(args.device), args.scan)
    if args.perturb_layers:
        layers_to_perturb(args, model.n_layers)
    process = optimal_filter.process_or_none(series, without="no exact filter, so no song analysis")
    if args.compare and process is None:
        raise cli.UserError("--compare judges by the exact filter, which does not know these data; leave it out")
    noise_std = series.config.get("noise_std")
    if args.temperature and noise_std is None:
        raise cli.UserError(f"--temperature is in units of noise_std, which {args.data_dir}/config.json doesn't give; "
                            "use --temperature 0")
    offset = args.seed_offset
    if offset is None:
        _, _, val_fraction = dataset.window_settings(trained_with, args.checkpoint)
        first_validation_step = dataset.first_validation_step(series.n_steps, val_fraction)
        offset = min(first_validation_step, max(series.n_steps - args.seed_len, 0))
    starts = seed_windows(series.n_steps, args.seed_len, args.gen_len, args.n_samples, offset)
    seeds = np.stack([series.X[start:start + args.seed_len] for start in starts])
    print(f"seeds of {args.seed_len} steps from time steps {', '.join(map(str, starts))}")
    return Inputs(model, series, process, starts, seeds, noise_std or 0.0)


def layers_to_perturb(args, n_layers):
    """--perturb-layers as a tuple counted from 0. Raises cli.UserError when the model has fewer layers."""
    layers = args.perturb_layers or range(1, n_layers + 1)
    if max(layers) > n_layers:
        raise cli.UserError(f"--perturb-layers {max(layers)}: the model has {n_layers} layers; use 1 to {n_layers}")
    return tuple(n - 1 for n in layers)


def plain(value):
    """A number as short as it can be without another number getting the same name."""
    return repr(value).removesuffix(".0")


def variant(args, defaults):
    """The part of a file name that names every setting that isn't the default, compactly."""
    def changed(*names):
        return any(getattr(args, name) != getattr(defaults, name) for name in names)

    letters = {"seed_len": "s", "gen_len": "g", "n_samples": "n", "seed_offset": "o", "seed": "r", "temperature": "T"}
    words = [letter + plain(getattr(args, name)) for name, letter in letters.items() if changed(name)]
    if changed("perturb_interval", "perturb_scale", "perturb_duration"):
        where = "bursts" if args.compare else "hidden" if args.perturb_hidden else "output"
        words.append(f"{where}{args.perturb_interval}x{plain(args.perturb_scale)}x{args.perturb_duration}")
    if args.perturb_layers:
        words.append("L" + "-".join(map(str, args.perturb_layers)))
    return "".join(f"_{word}" for word in words)


def file_prefix(args):
    """What the names of all files that this command writes begin with."""
    bare_command = ["--checkpoint", str(args.checkpoint)] + (["--compare"] if args.compare else [])
    kind = "compare" if args.compare else "generated"
    return f"{stem(args.checkpoint)}_{kind}{variant(args, parse_args(bare_command))}"


def beside(args, ending):
    """The path of a file that this command writes."""
    return args.save_dir / f"{file_prefix(args)}{ending}"


def timed_generation(args, inputs, noise_std, bursts):
    """`generate`, with the time it took on stdout. Raises cli.UserError when the series leaves the finite numbers."""
    begin = time.perf_counter()
    generated, predictions = generate(inputs.model, inputs.seeds, args.gen_len, noise_std, bursts, args.seed)
    seconds = time.perf_counter() - begin
    print(f"generated {len(inputs.seeds)} x {args.gen_len} steps in {seconds:.2f} s, start-up included")
    broken = ~np.isfinite(generated).all(axis=(0, 2))
    if broken.any():
        raise cli.UserError(f"the generation is no longer finite at step {broken.argmax()}; lower --perturb-scale or "
                            "--temperature")
    return generated, predictions


def compare(args, inputs):
    """Greedy, temperature, output bursts and hidden bursts, side by side with the real series."""
    process, timing = inputs.process, (args.perturb_interval, args.perturb_duration, args.perturb_scale)
    settings = {  # name: the standard deviation of the temperature noise, and the bursts
        "greedy": (0.0, None),
        f"temperature {args.temperature:g}": (args.temperature * inputs.noise_std, None),
        "output bursts": (0.0, Bursts(*timing)),
        "hidden bursts": (0.0, Bursts(*timing, layers_to_perturb(args, inputs.model.n_layers))),
    }
    songs, in_burst = {}, {}
    real = reference_song(process, inputs.series, inputs.starts, args.seed_len, args.gen_len)
    if real:
        songs["real series"], in_burst["real series"] = real, burst_steps(args.gen_len, None)
    for name, (noise_std, bursts) in settings.items():
        generated, predictions = timed_generation(args, inputs, noise_std, bursts)
        songs[name] = analyse(process, inputs.seeds, generated, predictions)
        in_burst[name] = burst_steps(args.gen_len, bursts)

    summaries = {name: summarise(process, song) for name, song in songs.items()}
    print()
    print(cli.table(SUMMARY_HEADER, [summary_row(name, summary) for name, summary in summaries.items()]))
    print()
    cli.write_text(beside(args, ".json"), json.dumps(summaries, indent=2) + "\n")
    print(f"wrote {beside(args, '.json')}")
    title = (f"{stem(args.checkpoint)}: bursts of std {args.perturb_scale:g}, {args.perturb_duration} of every "
             f"{args.perturb_interval} steps")
    fig = draw_compare(title, songs, summaries, in_burst, off_distance(process), process.n_circles)
    figures.save(fig, beside(args, ".png"))


def sing(args, inputs):
    """One generation: its arrays, its figures, and its numbers where the exact filter can judge it."""
    bursts = None
    if args.perturb_interval:
        layers = layers_to_perturb(args, inputs.model.n_layers) if args.perturb_hidden else None
        bursts = Bursts(args.perturb_interval, args.perturb_duration, args.perturb_scale, layers)
    in_burst = burst_steps(args.gen_len, bursts)
    generated, predictions = timed_generation(args, inputs, args.temperature * inputs.noise_std, bursts)
    song = None if inputs.process is None else analyse(inputs.process, inputs.seeds, generated, predictions)

    with cli.writing(beside(args, ".npz")) as part:
        np.savez_compressed(part, generated=generated, predictions=predictions, seed=inputs.seeds,
                            seed_starts=inputs.starts, perturbed=in_burst, **(song or {}))
    print(f"wrote {beside(args, '.npz')}")
    save_continuations(args, inputs, generated, None if song is None else song["labels"], in_burst)
    if song is not None:
        report(args, inputs, song, in_burst)


def save_continuations(args, inputs, generated, labels, in_burst):
    """Write the figures of the first samples and steps: seed and continuation, and continuation and truth."""
    series, n = inputs.series, min(SHOWN_SAMPLES, len(inputs.starts))
    steps = min(args.gen_len, SHOWN_STEPS)
    cut = "" if steps == args.gen_len else f", first {steps} of {args.gen_len} steps"
    name = stem(args.checkpoint)
    starts, ends = inputs.starts[:n], inputs.starts[:n] + args.seed_len  # of the seeds
    generated, in_burst = generated[:n, :steps], in_burst[:steps]
    labels = None if labels is None else labels[:n, :steps]

    seed_states = np.stack([series.states[start:end] for start, end in zip(starts, ends, strict=True)])
    windows = np.concatenate([inputs.seeds[:n], generated], axis=1)
    fig = draw_seed(f"{name}: seed and continuation{cut}", windows, seed_states, labels, starts, in_burst,
                    series.n_circles)
    figures.save(fig, beside(args, "_seed.png"))

    truths = [series.X[end:end + steps] for end in ends]
    if len(truths[0]) == 0:
        print("the series ends with the seed: no true continuation to compare with")
        return
    states = series.states[ends[0]:ends[0] + len(truths[0])]
    fig = draw_truth(f"{name}: continuation and truth{cut}", generated, labels, truths, states, ends[0],
                     inputs.noise_std, in_burst, series.n_circles)
    figures.save(fig, beside(args, "_truth.png"))


def report(args, inputs, song, in_burst):
    """The song's numbers as tables, beside those of the true continuations, and its figure."""
    process, name = inputs.process, stem(args.checkpoint)
    summary = summarise(process, song)
    rows = [summary_row("generated", summary)]
    real = reference_song(process, inputs.series, inputs.starts, args.seed_len, args.gen_len)
    if real:
        rows.append(summary_row("real series", summarise(process, real)))
    print()
    print(cli.table(SUMMARY_HEADER, rows))
    print()
    if summary["transitions"]:
        print(transition_table(process, song["labels"]))
        print()
    on_process = ", ".join(map(str, summary["steps_on_process"]))
    title = (f"{name}: on the process for {on_process} of {args.gen_len} steps; "
             f"{summary['near_no_circle']:.1%} of steps near no circle; {summary['circles_visited']} circles")
    figures.save(draw_song(title, process, song, in_burst), beside(args, "_song.png"))


def main(args):
    inputs = load_inputs(args)
    args.save_dir = cli.output_folder(args.save_dir)
    if args.compare:
        compare(args, inputs)
    else:
        sing(args, inputs)


if __name__ == "__main__":
    cli.run(main, ARGS)
