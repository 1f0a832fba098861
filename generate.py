"""Let a trained model sing: feed its own predictions back, perturb it, and ask whether the song is still a song.

Reads NAME.pt and DATA_DIR/data.npz, config.json. Each sample starts from --seed-len real steps and goes on for
--gen-len steps by the one-step recurrence, whose cost a step does not depend on how many came before.

Temperature T adds Gaussian noise of standard deviation T * noise_std (config.json) to each prediction, and the sum is
both kept and fed back: T = 1 draws from the process as the model knows it, T = 0 is greedy. A burst every
--perturb-interval steps (the first one after that many) lasts --perturb-duration steps. While it lasts, Gaussian
noise of standard deviation --perturb-scale is added to what the model reads, or, with --perturb-hidden, to the
outputs of its layers. Burst noise acts on the model only; it is not part of the generated series.

The exact filter's smoother then labels each generated step with a circle and an angle. Reported are transitions, dwell
times, the circles visited, the share of predictions near no circle, and how long a generation stays on the process.

Writes to SAVE_DIR, VARIANT naming every setting that isn't the default:
  NAME_generated[_VARIANT].npz        generated, predictions (samples, steps, features), seed, seed_starts, perturbed,
                                      and, of the smoother, labels, thetas, nearest_distance, path_distance
  NAME_generated[_VARIANT]_seed.png   seed and continuation
  NAME_generated[_VARIANT]_truth.png  continuation against the true one, and the error
  NAME_generated[_VARIANT]_song.png   transition matrix, dwell times, distance to the process
  NAME_compare[_VARIANT].png, .json   with --compare: greedy, temperature, output and hidden bursts side by side

Examples:
  python generate.py --checkpoint model_next.pt --seed-len 64 --gen-len 512
  python generate.py --checkpoint model_next.pt --gen-len 2048 --temperature 0.5
  python generate.py --checkpoint model_next.pt --gen-len 2048 --perturb-hidden --perturb-interval 200 \\
      --perturb-scale 50 --perturb-duration 10
  python generate.py --checkpoint model_next.pt --gen-len 4096 --compare
"""

import argparse
from pathlib import Path

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
                      help="generations, run as one batch, from seeds spread evenly behind the first")
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
                        help="run greedy, temperature, output bursts and hidden bursts and compare them "
                             f"(temperature {COMPARE_TEMPERATURE:g}, interval {COMPARE_INTERVAL} unless given)")
    computing = parser.add_argument_group("computing")
    cli.add_seed(computing)
    cli.add_device(computing)
    cli.add_scan(computing)
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
    given = vars(args)
    given.setdefault("seed_offset", None)
    given.setdefault("perturb_scale", PERTURB_SCALE)
    given.setdefault("perturb_duration", min(PERTURB_DURATION, args.perturb_interval or PERTURB_DURATION))
    layers = given.pop("perturb_layers", None)
    args.perturb_layers = None if layers is None else sorted({n for group in layers for n in group})
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

import json
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import circle_process
import dataset
import figures
from mamba_model import load_checkpoint, stem

BLOCK = 1024  # steps whose noise is drawn and whose predictions are collected at a time: memory besides the result
SHOWN_STEPS, SHOWN_SAMPLES = 4096, 3  # more than that can't be told apart in a figure


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


def generate(model, seed, n_steps, noise_std=0.0, bursts=None, random_seed=42):
    """Continue the series `seed` (n, seed_len, feature_dim), an array, for n_steps steps.

    noise_std: standard deviation, in the data's units, of the noise that is added to each prediction before it is
    kept and fed back. Returns (generated, predictions), each (n, n_steps, feature_dim) in the model's type:
    predictions[:, t] is the mean the model gave for step t, generated[:, t] that plus the noise.

    A sample's noise depends on random_seed and its place in the batch alone, so a larger batch only adds samples.
    """
    weight = model.input_proj.weight
    dtype = np.float64 if weight.dtype == torch.float64 else np.float32
    n, _, feature_dim = seed.shape
    with torch.inference_mode():
        prediction, states = model.prefill(torch.as_tensor(seed, dtype=weight.dtype, device=weight.device))
    advance = choose_stepper(model)(model, prediction["1"], states)

    in_burst = burst_steps(n_steps, bursts)
    hidden_layers = () if bursts is None or bursts.layers is None else bursts.layers
    streams = [[np.random.default_rng([random_seed, i, k]) for k in (0, 1)] for i in range(n)]
    predictions = np.empty((n, n_steps, feature_dim), dtype)
    generated = np.empty_like(predictions)
    with tqdm(total=n_steps, unit="step", disable=None, leave=False) as progress:
        for first in range(0, n_steps, BLOCK):
            here = in_burst[first:first + BLOCK]
            kept = np.zeros((n, len(here), feature_dim), dtype)
            fed = np.zeros_like(kept)  # burst noise on the observation
            hidden = np.zeros((n, here.sum() if hidden_layers else 0, model.n_layers, model.d_model), dtype)
            for i, (of_temperature, of_bursts) in enumerate(streams):
                if noise_std:
                    kept[i] = noise_std * of_temperature.standard_normal(kept[i].shape)
                if hidden_layers:
                    shape = (hidden.shape[1], len(hidden_layers), model.d_model)
                    hidden[i][:, list(hidden_layers)] = bursts.scale * of_bursts.standard_normal(shape)
                elif bursts is not None:
                    fed[i, here] = bursts.scale * of_bursts.standard_normal((here.sum(), feature_dim))
            row = np.where(here & bool(hidden_layers), np.cumsum(here) - 1, -1)
            block = slice(first, first + len(here))
            predictions[:, block] = advance(kept + fed, row, hidden)
            generated[:, block] = predictions[:, block] + kept
            progress.update(len(here))
    return generated, predictions


# A stepper takes a model and what its prefill returned and gives a function
#   advance(noise, burst, hidden) -> predictions (n, steps, feature_dim)
# that runs a block of steps and remembers where it stopped. Step t keeps the current prediction, reads that plus
# noise[:, t], and predicts the next; when burst[t] is not -1, hidden[:, burst[t], i] is added to the output of layer i
# while it reads. noise (n, steps, feature_dim); burst (steps,) int; hidden (n, bursts, n_layers, d_model).


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


def loop_stepper(model, prediction, states):
    """`model.step` in a plain loop: any device, and what the fast steppers are tested against."""

    @torch.inference_mode()
    def advance(noise, burst, hidden):
        nonlocal prediction, states
        noise, hidden = (torch.as_tensor(a, device=prediction.device) for a in (noise, hidden))
        predictions = torch.empty_like(noise)
        for t, row in enumerate(burst):
            predictions[:, t] = prediction

            def perturb(i, h, row=row):
                return h + hidden[:, row, i]

            heads, states = model.step(prediction + noise[:, t], states, perturb if row >= 0 else None)
            prediction = heads["1"]
        return predictions.cpu().numpy()

    return advance


def seed_windows(n_steps, seed_len, gen_len, n_samples, offset):
    """First steps (n_samples,) of the seeds: the first at `offset`, the others spread evenly behind it.

    As long as there is room, each leaves gen_len true steps behind it to compare with. Raises cli.UserError when a
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
        circles, _, _ = dataset.runs(labels)
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
    rows = [dataset.runs(labels) for labels in label_rows]
    return (np.concatenate([circles[1:-1] for circles, _, _ in rows]),
            np.concatenate([lengths[1:-1] for _, _, lengths in rows]))


def dwell_law(process, circles):
    """The true law of the dwell times of visits to `circles`: possible lengths (steps) and their probabilities."""
    revolutions = np.arange(1, process.dwell_law.shape[1] + 1)
    lengths = process.periods[circles][:, None] * revolutions
    values, index = np.unique(lengths, return_inverse=True)
    return values, np.bincount(index.ravel(), process.dwell_law[circles].ravel(), len(values)) / max(len(circles), 1)


def steps_on(off, patience):
    """Steps until something goes off for good measure: the first of `patience` off steps in a row, or all of them."""
    n, run = len(off), 0
    for t, bad in enumerate(off):
        run = run + 1 if bad else 0
        if run == patience:
            return t + 1 - patience
    return n


def off_distance(process):
    """A prediction farther than this from a point of the process is off it: half the smallest radius.

    Predictions have no noise, so the geometry is the measure. A prediction that hedges between circles or shrinks to
    the common centre, one radius from all of them, is off; a blurred one is not yet.
    """
    return process.radii.min() / 2


def analyse(process, seeds, generated, predictions):
    """What the exact smoother makes of a generation; arrays as `generate` returns them. Returns a dict.

    labels, thetas (n, n_steps): circle and angle of each generated step, given seed and continuation;
    nearest_distance: from each prediction to the nearest point of any circle; path_distance: to the point at the
    smoother's circle and angle, which moves as the process moves: a song that freezes, or stays on a circle longer
    than any visit lasts, is near a circle but not on the path. steps_on_process (n,): before the path distance stays
    above `off_distance` for half the shortest revolution.
    """
    import optimal_filter

    seed_len = seeds.shape[1]
    smoothed = [optimal_filter.smooth(process, np.concatenate(pair), initial="stationary")
                for pair in zip(seeds, generated, strict=True)]
    labels, thetas = (np.stack([s[name][seed_len:] for s in smoothed]) for name in ("circle", "theta"))
    path = np.linalg.norm(predictions - circle_process.points(process, labels, thetas), axis=-1)
    nearest = np.stack([circle_process.distance(process, rows) for rows in predictions])
    patience = max(int(process.periods.min()) // 2, 1)
    return {"labels": labels, "thetas": thetas, "nearest_distance": nearest, "path_distance": path,
            "steps_on_process": np.array([steps_on(row > off_distance(process), patience) for row in path])}


def summarise(process, song):
    """The numbers of a song, over all its samples, as a dict of plain values."""
    counts = transition_counts(song["labels"], process.n_circles)
    left = counts.sum(axis=1)
    distances, chance = (total_variation(counts, process.transition_matrix),
                         chance_total_variation(left, process.transition_matrix))
    _, dwells = completed_dwells(song["labels"])
    weigh = left / max(left.sum(), 1)
    return {
        "steps": int(song["labels"].shape[1]),
        "steps_on_process": song["steps_on_process"].tolist(),
        "near_no_circle": float((song["nearest_distance"] > off_distance(process)).mean()),
        "circles_visited": len(np.unique(song["labels"])),
        "transitions": int(left.sum()),
        "total_variation": float(np.nansum(distances * weigh)) if left.sum() else None,
        "total_variation_by_chance": float(np.nansum(chance * weigh)) if left.sum() else None,
        "transitions_a_row": left.tolist(),
        "total_variation_a_row": [None if math.isnan(d) else float(d) for d in distances],
        "completed_visits": len(dwells),
        "mean_dwell": float(dwells.mean()) if len(dwells) else None,
    }


SUMMARY_HEADER = ["", "steps on the process", "near no circle", "circles", "transitions", "TV", "TV by chance",
                  "mean dwell"]


def summary_row(name, s):
    def number(value, digits):
        return "–" if value is None else f"{value:.{digits}f}"

    return [name, ", ".join(map(str, s["steps_on_process"])), f"{s['near_no_circle']:.1%}", s["circles_visited"],
            s["transitions"], number(s["total_variation"], 3), number(s["total_variation_by_chance"], 3),
            number(s["mean_dwell"], 0)]


def reference_song(process, series, starts, seed_len, n_steps):
    """The same analysis of the true continuations, predicted step by step by the exact filter; None if too short."""
    import optimal_filter

    if max(starts) + seed_len + n_steps > series.n_steps:
        return None
    windows = np.stack([series.X[start:start + seed_len + n_steps] for start in starts])
    predictions = np.stack([optimal_filter.predict(process, X, initial="stationary")["prediction"][1][seed_len - 1:-1]
                            for X in windows])
    return analyse(process, windows[:, :seed_len], windows[:, seed_len:], predictions)


def rms_error(generated, truth):
    """Root mean square over features of generated - truth, a step: two arrays (n_steps, feature_dim) to (n_steps,)."""
    return np.sqrt(((generated - truth)**2).mean(axis=1))


# ------------------------------------------------------------------------------------------------- figures


def mark_bursts(ax, in_burst, start):
    """Short black bars above an axis where bursts were; `start` is the time step of in_burst[0]."""
    first, last = np.flatnonzero(np.diff(np.r_[False, in_burst, False])).reshape(-1, 2).T + start - 0.5
    ax.hlines(np.full(len(first), 1.02), first, last, color="black", linewidth=3, clip_on=False,
              transform=ax.get_xaxis_transform())


def draw_seed(path, title, windows, seed_states, labels, seed_starts, in_burst, n_circles):
    """Seed and continuation of each sample: a strip of circles above a heatmap of the features.

    windows (n, seed_len + steps, features); seed_states (n, seed_len); labels (n, steps) or None without a filter.
    """
    seed_len = seed_states.shape[1]
    fig, axes = figures.new_figure(2 * len(windows), 1, panel=(11.0, 1.5), title=title,
                                   gridspec_kw={"height_ratios": [0.12, 1] * len(windows)})
    limits = np.percentile(windows, [1, 99])
    for i, window in enumerate(windows):
        strip, heat = axes[2 * i:2 * i + 2, 0]
        known = seed_states[i] if labels is None else np.concatenate([seed_states[i], labels[i]])
        figures.state_strip(strip, known, n_circles, start=-seed_len)
        strip.set_xlim(-seed_len - 0.5, window.shape[0] - seed_len - 0.5)
        figures.heatmap_panel(fig, heat, window, start=-seed_len, ylabel="feature", limits=limits)
        strip.set_title(f"seed from time step {seed_starts[i]}", loc="left")
        heat.axvline(-0.5, color="white", linestyle="--")
        mark_bursts(strip, in_burst, 0)
    axes[-1, 0].set_xlabel("generated step (before 0: the seed; black bars: bursts)" if in_burst.any()
                           else "generated step (before 0: the seed)")
    figures.circle_legend(fig, n_circles)
    figures.save(fig, path)


def draw_truth(path, title, generated, labels, truth, states, start, errors, noise_std, in_burst, n_circles):
    """The first sample's continuation under the true one, their difference, and the error of all samples.

    generated, truth (steps, features), labels (steps,) or None; states (steps,); errors: a list of (steps,).
    """
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
        figures.state_strip(strip, labels, n_circles)
    figures.heatmap_panel(fig, heat, generated, ylabel="feature", limits=limits)
    figures.heatmap_panel(fig, difference, generated - truth, ylabel="feature", title="generated − true",
                          cmap="RdBu_r", symmetric=True)
    for i, error in enumerate(errors):
        curve.plot(error, linewidth=1.0, label=f"sample {i}")
    if noise_std:
        curve.axhline(noise_std, color="0.3", linestyle="--", linewidth=1.0, label="noise_std")
    curve.axhline(truth.std(), color="0.3", linestyle=":", linewidth=1.0, label="std of the true series")
    top = 1.35 * max(truth.std(), *(error.max() for error in errors))  # leaves room for the legend
    curve.set(xlim=(-0.5, len(truth) - 0.5), ylim=(0, top), ylabel="RMS error", xlabel="generated step")
    curve.legend(loc="upper left", ncols=5, fontsize=8)
    mark_bursts(strip, in_burst[:len(truth)], 0)
    figures.circle_legend(fig, n_circles)
    figures.save(fig, path)


def draw_song(path, title, song, P, counts, row_distances, dwells, law, threshold, in_burst):
    """Transition matrices, dwell times against their law, and the distance to the process over time.

    counts (K, K); row_distances (K,); dwells (n,) steps; law: (lengths, probabilities) or None without a visit.
    """
    fig, axes = figures.new_figure(2, 2, panel=(5.6, 3.9), title=title)
    left = counts.sum(axis=1)
    shares = counts / np.maximum(left, 1)[:, None]
    for ax, matrix, name in ((axes[0, 0], P, "true transitions"), (axes[0, 1], shares, "generated transitions")):
        image = ax.imshow(matrix, cmap="viridis", vmin=0, vmax=1)
        ax.set(title=name, xlabel="to circle", ylabel="from circle", xticks=range(len(P)), yticks=range(len(P)))
        if len(P) > 20:
            ax.set(xticks=range(0, len(P), 5), yticks=range(0, len(P), 5))
    fig.colorbar(image, ax=axes[0, :2].tolist(), label="probability", fraction=0.03, pad=0.01)
    if len(P) <= 20:
        texts = [f"TV {'–' if math.isnan(d) else f'{d:.2f}'}  n {n}" for d, n in zip(row_distances, left, strict=True)]
        for i, text in enumerate(texts):
            axes[0, 1].text(len(P) - 0.3, i, text, va="center", fontsize=8)
    histogram, distance = axes[1]
    if law is None:
        histogram.text(0.5, 0.5, "no visit was seen from\nits first to its last step", ha="center", va="center",
                       transform=histogram.transAxes)
        figures.bare(histogram)
    else:
        lengths, probabilities = law
        top = max(dwells.max(), lengths[np.searchsorted(np.cumsum(probabilities), 0.999).clip(max=len(lengths) - 1)])
        bins = np.linspace(0, top * 1.02, 41)
        histogram.hist(lengths, bins, weights=probabilities, color="0.75", label="true law")
        histogram.hist(dwells, bins, weights=np.full(len(dwells), 1 / len(dwells)), histtype="step", color="#1f77b4",
                       linewidth=1.5, label=f"generated ({len(dwells)} visits)")
        histogram.set(xlabel="dwell time (steps)", ylabel="share of visits")
        histogram.legend()
    histogram.set_title("dwell times")
    shown = song["path_distance"][:SHOWN_SAMPLES, :SHOWN_STEPS]
    for i, row in enumerate(shown):
        distance.plot(row, linewidth=0.8, label=f"sample {i}")
    distance.axhline(threshold, color="black", linestyle="--", linewidth=1.0, label="off the process")
    distance.set(xlabel="generated step", ylabel="distance", ylim=(0, None), xlim=(-0.5, shown.shape[1] - 0.5))
    distance.set_title("prediction to the process", pad=12)  # clear of the burst marks
    mark_bursts(distance, in_burst[:SHOWN_STEPS], 0)
    distance.legend(loc="upper right", fontsize=8)
    figures.save(fig, path)


def draw_compare(path, title, songs, summaries, bursts_of, threshold, n_circles):
    """The circles of each variant's samples as strips, white where a step is off the process, and its distances."""
    fig, axes = figures.new_figure(len(songs), 2, panel=(6.5, 1.6), title=title, sharex=True,
                                   gridspec_kw={"width_ratios": [1.3, 1]})
    colors = figures.circle_colors(n_circles)
    for (name, song), (strip, curve) in zip(songs.items(), axes, strict=True):
        labels, off = song["labels"][:SHOWN_SAMPLES], song["path_distance"][:SHOWN_SAMPLES] > threshold
        n, steps = labels.shape
        strip.imshow(np.where(off[..., None], 1.0, colors[labels]), aspect="auto", interpolation="nearest",
                     extent=(-0.5, steps - 0.5, n - 0.5, -0.5))
        strip.set(yticks=range(n), ylabel="sample")
        s = summaries[name]
        strip.set_title(f"{name}: {s['circles_visited']} circles, {s['near_no_circle']:.1%} near none", loc="left")
        curve.plot(song["path_distance"][:SHOWN_SAMPLES].T, linewidth=0.7)
        curve.axhline(threshold, color="black", linestyle="--", linewidth=1.0)
        curve.set(ylabel="distance", ylim=(0, None), xlim=(-0.5, steps - 0.5))
        for ax in (strip, curve):
            mark_bursts(ax, bursts_of[name], 0)
    for ax in axes[-1]:
        ax.set_xlabel("generated step")
    axes[0, 1].set_title("prediction to the process", loc="left")
    figures.circle_legend(fig, n_circles)
    figures.save(fig, path)


# ------------------------------------------------------------------------------------------------- the script


def plain(value):
    """A number as short as it can be without another number getting the same name."""
    return repr(value).removesuffix(".0")


def variant(args, defaults):
    """The part of a file name that tells this run from others: every setting that isn't the default, compactly."""
    parts = [f"{letter}{plain(getattr(args, name))}" for letter, name in
             (("s", "seed_len"), ("g", "gen_len"), ("n", "n_samples"), ("o", "seed_offset"), ("r", "seed"),
              ("T", "temperature")) if getattr(args, name) != getattr(defaults, name)]
    if args.perturb_interval != defaults.perturb_interval or args.perturb_scale != defaults.perturb_scale or \
            args.perturb_duration != defaults.perturb_duration:
        where = "hidden" if args.perturb_hidden else "output"
        where = "bursts" if args.compare else where
        parts.append(f"{where}{args.perturb_interval}x{plain(args.perturb_scale)}x{args.perturb_duration}")
    if args.perturb_layers:
        parts.append("L" + "-".join(map(str, args.perturb_layers)))
    return "".join(f"_{part}" for part in parts)


def file_prefix(args):
    """What the names of all files of this run begin with."""
    like = ["--checkpoint", str(args.checkpoint)] + (["--compare"] if args.compare else [])
    kind = "compare" if args.compare else "generated"
    return f"{stem(args.checkpoint)}_{kind}{variant(args, parse_args(like))}"


def layers_to_perturb(args, n_layers):
    """--perturb-layers as a tuple counted from 0. Raises cli.UserError when the model has fewer layers."""
    layers = args.perturb_layers or range(1, n_layers + 1)
    if max(layers) > n_layers:
        raise cli.UserError(f"--perturb-layers {max(layers)}: the model has {n_layers} layers; use 1 to {n_layers}")
    return tuple(n - 1 for n in layers)


def run(args, model, seeds, noise_std, bursts):
    """`generate`, with the time it took on stdout. Raises cli.UserError when the series leaves the finite numbers."""
    begin = time.perf_counter()
    generated, predictions = generate(model, seeds, args.gen_len, noise_std, bursts, args.seed)
    seconds = time.perf_counter() - begin
    print(f"generated {len(seeds)} x {args.gen_len} steps in {seconds:.2f} s, start-up included")
    bad = ~np.isfinite(generated).all(axis=(0, 2))
    if bad.any():
        raise cli.UserError(f"the generation is no longer finite at step {bad.argmax()}; lower --perturb-scale or "
                            "--temperature")
    return generated, predictions


def compare(args, model, series, process, starts, seeds, noise_std):
    """Greedy, temperature, output bursts and hidden bursts, side by side with the real series."""
    timing = args.perturb_interval, args.perturb_duration, args.perturb_scale
    bursts = Bursts(*timing), Bursts(*timing, layers_to_perturb(args, model.n_layers))
    runs = {"greedy": (0.0, None), f"temperature {args.temperature:g}": (args.temperature * noise_std, None),
            "output bursts": (0.0, bursts[0]), "hidden bursts": (0.0, bursts[1])}
    songs = {name: analyse(process, seeds, *run(args, model, seeds, *how)) for name, how in runs.items()}
    marks = {name: burst_steps(args.gen_len, how[1]) for name, how in runs.items()}
    real = reference_song(process, series, starts, args.seed_len, args.gen_len)
    if real:
        songs, marks = {"real series": real, **songs}, {"real series": burst_steps(args.gen_len, None), **marks}
    summaries = {name: summarise(process, song) for name, song in songs.items()}
    print()
    print(cli.table(SUMMARY_HEADER, [summary_row(name, s) for name, s in summaries.items()]))
    print()
    prefix = args.save_dir / file_prefix(args)
    cli.write_text(Path(f"{prefix}.json"), json.dumps(summaries, indent=2) + "\n")
    print(f"wrote {prefix}.json")
    draw_compare(Path(f"{prefix}.png"), f"{stem(args.checkpoint)}: bursts of std {args.perturb_scale:g}, "
                 f"{args.perturb_duration} of every {args.perturb_interval} steps", songs, summaries, marks,
                 off_distance(process), process.n_circles)


def sing(args, model, series, process, starts, seeds, noise_std):
    """One generation with its arrays and figures."""
    bursts = None
    if args.perturb_interval:
        layers = layers_to_perturb(args, model.n_layers) if args.perturb_hidden else None
        bursts = Bursts(args.perturb_interval, args.perturb_duration, args.perturb_scale, layers)
    in_burst = burst_steps(args.gen_len, bursts)
    generated, predictions = run(args, model, seeds, args.temperature * noise_std, bursts)
    song = None if process is None else analyse(process, seeds, generated, predictions)

    prefix, name = args.save_dir / file_prefix(args), stem(args.checkpoint)
    with cli.writing(Path(f"{prefix}.npz")) as part:
        np.savez_compressed(part, generated=generated, predictions=predictions, seed=seeds, seed_starts=starts,
                            perturbed=in_burst, **(song or {}))
    print(f"wrote {prefix}.npz")

    labels = None if song is None else song["labels"]
    shown = slice(min(args.gen_len, SHOWN_STEPS))
    cut = "" if args.gen_len <= SHOWN_STEPS else f", first {SHOWN_STEPS} of {args.gen_len} steps"
    ends = starts + args.seed_len
    samples = range(min(SHOWN_SAMPLES, len(starts)))
    draw_seed(Path(f"{prefix}_seed.png"), f"{name}: seed and continuation{cut}",
              np.concatenate([seeds, generated[:, shown]], axis=1)[samples],
              np.stack([series.states[starts[i]:ends[i]] for i in samples]),
              None if labels is None else labels[samples, shown], starts, in_burst[shown], series.n_circles)

    truths = [series.X[end:end + args.gen_len][shown] for end in ends]
    if len(truths[0]):
        steps = len(truths[0])
        errors = [rms_error(g[:len(truth)], truth) for g, truth in zip(generated, truths, strict=True) if len(truth)]
        draw_truth(Path(f"{prefix}_truth.png"), f"{name}: continuation and truth{cut}", generated[0, :steps],
                   None if labels is None else labels[0, :steps], truths[0], series.states[ends[0]:ends[0] + steps],
                   ends[0], errors[:SHOWN_SAMPLES], series.config.get("noise_std"), in_burst, series.n_circles)
    else:
        print("the series ends with the seed: no true continuation to compare with")
    if song is not None:
        report(args, prefix, series, process, starts, song, in_burst)


def report(args, prefix, series, process, starts, song, in_burst):
    """The song's numbers as tables, beside those of the true continuations, and its figure."""
    P = process.transition_matrix
    counts = transition_counts(song["labels"], process.n_circles)
    distances, chance = total_variation(counts, P), chance_total_variation(counts.sum(axis=1), P)
    summary = summarise(process, song)
    rows = [summary_row("generated", summary)]
    real = reference_song(process, series, starts, args.seed_len, args.gen_len)
    if real:
        rows.append(summary_row("real series", summarise(process, real)))
    print()
    print(cli.table(SUMMARY_HEADER, rows))
    print()
    if counts.any():
        print(cli.table(["from circle", "left", "TV", "TV by chance"], [
            [i, n, f"{d:.3f}", f"{c:.3f}"] for i, (n, d, c) in enumerate(
                zip(counts.sum(axis=1), distances, chance, strict=True)) if n]))
        print()
    circles, dwells = completed_dwells(song["labels"])
    on = ", ".join(map(str, summary["steps_on_process"]))
    draw_song(Path(f"{prefix}_song.png"), f"{stem(args.checkpoint)}: on the process for {on} of {args.gen_len} steps; "
              f"{summary['near_no_circle']:.1%} of steps near no circle; {summary['circles_visited']} circles",
              song, P, counts, distances, dwells, dwell_law(process, circles) if len(circles) else None,
              off_distance(process), in_burst)


def main(args):
    import optimal_filter

    device = cli.pick_device(args.device)
    model, model_args = load_checkpoint(args.checkpoint, device)
    series = dataset.load_series(args.data_dir)
    dataset.check_fits_model(series, model, args.checkpoint)
    if args.perturb_layers:
        layers_to_perturb(args, model.n_layers)
    process = optimal_filter.process_or_none(series, "no exact filter, so no song analysis")
    if args.compare and process is None:
        raise cli.UserError("--compare judges by the exact filter, which does not know these data; leave it out")
    noise_std = series.config.get("noise_std")
    if args.temperature and not isinstance(noise_std, int | float):
        raise cli.UserError(f"--temperature is in units of noise_std, which {args.data_dir}/config.json doesn't give; "
                            "use --temperature 0")
    offset = args.seed_offset
    if offset is None:
        val_fraction = model_args.get("val_fraction")
        val_fraction = val_fraction if isinstance(val_fraction, float) and 0 < val_fraction < 1 else 0.1
        offset = min(dataset.first_validation_step(series.n_steps, val_fraction),
                     max(series.n_steps - args.seed_len, 0))
    starts = seed_windows(series.n_steps, args.seed_len, args.gen_len, args.n_samples, offset)
    args.save_dir = cli.output_folder(args.save_dir)
    model.use_scan(args.scan, device)
    seeds = np.stack([series.X[start:start + args.seed_len] for start in starts])
    print(f"seeds of {args.seed_len} steps from time steps {', '.join(map(str, starts))}")
    (compare if args.compare else sing)(args, model, series, process, starts, seeds, noise_std or 0.0)


if __name__ == "__main__":
    cli.run(main, ARGS)
