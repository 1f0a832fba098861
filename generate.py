"""Let a trained model sing: feed its own predictions back, perturb it, and ask whether the song is still a song.

A song is a series that the model generates. Reads NAME.pt and DATA_DIR/data.npz, config.json. Each sample starts from
--seed-len real steps and goes on for --gen-len steps by the one-step recurrence, whose cost per step does not depend
on how many steps came before.

Of a mixture model, temperature 1 draws each step from the predicted density. Temperature 0 plays its mean. Other
temperatures T sharpen or flatten the mixture as in sketch-rnn (Ha & Eck 2017, arXiv 1704.03477, section 3.3): weights
softmax(logits / T), scales times sqrt(T). The limit of a small T is the mean of the likeliest component; it is not the
mean of the mixture, which 0 plays. Of a point model, temperature T adds Gaussian noise of standard deviation
T * noise_std (config.json) to each prediction, and 0 is greedy. What is drawn is the next step of the song, and the
model reads it as such.

Bursts come every --perturb-interval steps (the first one after that many) and last --perturb-duration steps. During a
burst, Gaussian noise of standard deviation --perturb-scale is added to what the model reads, or, with
--perturb-hidden, to the outputs of its layers. Burst noise acts on the model only; it is not part of the song.

The exact filter's smoother then labels each generated step with a circle and an angle, and a step is on the process
when the song keeps to these as well as a real series does (all but 1 in 100,000 steps of which count as on). Reported
are the share of steps on the process and how long the song stays there, circles, transitions and dwell times where it
is on the process, and its log-likelihood under the process, beside those of the real series. songs.py says how.

Writes to SAVE_DIR, VARIANT naming every setting that isn't the default:
  NAME_generated[_VARIANT].npz        generated, predictions (samples, steps, features), seed, seed_starts, perturbed,
                                      and, of the smoother, labels, thetas, deviation, on, log_likelihood, visits
  NAME_generated[_VARIANT]_seed.png   seed and continuation
  NAME_generated[_VARIANT]_truth.png  continuation against the true one, and the error
  NAME_generated[_VARIANT]_song.png   transition matrix, dwell times, deviation from the process
  NAME_compare[_VARIANT].png, .json   with --compare: greedy, temperature, output and hidden bursts side by side, of a
                                      mixture its mean with noise too, beside the real series where it is long enough

Examples:
  python generate.py --checkpoint model_next.pt --seed-len 64 --gen-len 512
  python generate.py --checkpoint model_next.pt --gen-len 2048 --temperature 0.5
  python generate.py --checkpoint model_next.pt --gen-len 2048 --perturb-hidden --perturb-interval 200 \\
      --perturb-scale 50 --perturb-duration 10
  python generate.py --checkpoint model_next.pt --gen-len 4096 --compare
"""

import cli  # first: from here on Ctrl-C ends the script without a traceback

# isort: split
import argparse
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
    # None until the checkpoint says which head it has.
    song.add_argument("--temperature", type=cli.non_negative_float, metavar="T",
                      help="of a mixture model: 1 draws from the predicted density, 0 plays its mean, and other values "
                           "sharpen or flatten it: softmax(logits / T) and scales * sqrt(T); of a point model: noise "
                           "on each prediction, in units of noise_std (default: 1 for a mixture, 0 for a point)")
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
    cli.add_drawing(parser)
    files = parser.add_argument_group("files")
    files.add_argument("--checkpoint", type=Path, required=True, metavar="NAME.pt", help="the trained model; required")
    cli.add_data_dir(files, of_checkpoint=True)
    cli.add_save_dir(files)
    args = parser.parse_args(argv)
    problem = find_problem(args)
    if problem:
        parser.error(problem)
    args.default_temperature, args.data_suffix = None, ""  # the latter is set when the data are known
    if args.compare:
        args.temperature = args.temperature or COMPARE_TEMPERATURE
        args.default_temperature = COMPARE_TEMPERATURE
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
                return f"{cli.flag_of(flag)} has no effect without bursts; add --perturb-interval N"
    return None


if __name__ == "__main__":
    cli.start()
    ARGS = parse_args()  # before the slow imports: --help and a bad flag answer at once

import numpy as np
import torch

import circle_process
import dataset
import figures
import mixture_head
import optimal_filter
import songs
import terminal
from mamba_model import data_suffix, open_model, stem

RENEWAL = 4  # times `memory`: after so many steps the states of a song are made anew
BLOCK = 1024  # steps whose noise is drawn and whose predictions are collected at a time: bounds the extra memory
LEAST_TEMPERATURE = 1e-30  # of a mixture: float32 can't divide by much less
SHOWN_STEPS, SHOWN_SAMPLES = 4096, 3  # more than that can't be told apart in a figure
SAMPLE_STYLES = [{"color": "black"}, {"color": "0.5"}, {"color": "0.7"}]  # circles own the colours
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


def generate(model, seed, n_steps, noise_std=0.0, bursts=None, random_seed=42, temperature=0.0, memory=None):
    """Continue the series `seed` (n, seed_len, feature_dim), an array, for n_steps steps.

    noise_std: standard deviation, in data units, of the noise that is added to each prediction; the sum is the
    next step of the series and is fed back. temperature, for a mixture head only: above 0 the next step is drawn from
    the predicted mixture, sharpened as mixture_head.draw says. Returns (generated, predictions), each (n, n_steps,
    feature_dim) in the model's type: predictions[:, t] is the mean that the model gave for step t, generated[:, t]
    that plus the noise, or the draw.

    memory: how many steps of the past the model was trained on. A state that is carried much further drifts in a song,
    where no real series corrects it. So every RENEWAL * memory steps the states are made anew, from the last `memory`
    steps that the model has read. None: they are carried from the seed to the end.

    A sample's noise depends on random_seed and its place in the batch alone, so a larger batch only adds samples.
    """
    if temperature and not model.mixture:
        raise ValueError("a point head predicts no distribution to draw from; give noise_std in place of temperature")
    weight = model.input_proj.weight
    dtype = np.float64 if weight.dtype == torch.float64 else np.float32
    n, _, feature_dim = seed.shape

    @torch.inference_mode()
    def start_from(series):
        outputs, states = model.prefill(torch.as_tensor(series, dtype=weight.dtype, device=weight.device))
        return outputs["1"], states

    def origin_of(series):
        """What the recurrence counts from: (n, 1, feature_dim), or 0."""
        return 0 if model.relative is None else series[:, :1]

    sampling = Sampling(max(temperature, LEAST_TEMPERATURE) if temperature else 0.0)
    advance, start, origin = choose_stepper(model)(model, n, sampling), start_from(seed), origin_of(seed)
    edges = block_edges(n_steps, None if memory is None else RENEWAL * memory)
    past = seed[:, -memory:] if memory else seed

    in_burst = burst_steps(n_steps, bursts)
    streams = [[np.random.default_rng([random_seed, i, k]) for k in range(3)] for i in range(n)]
    predictions = np.empty((n, n_steps, feature_dim), dtype)
    generated = np.empty_like(predictions)
    own_std = 1.0 if temperature else noise_std
    with terminal.Bar(n_steps, desc="generating") as bar:
        for block in itertools.starmap(slice, itertools.pairwise(edges)):
            if memory and block.start and block.start % (RENEWAL * memory) == 0:
                start, origin = start_from(past), origin_of(past)
            draws = draw_noise(model, streams, in_burst[block], own_std, bursts, dtype)
            predictions[:, block], generated[:, block] = (values + origin for values in advance(draws, start))
            start = None
            if memory:
                past = np.concatenate([past, generated[:, block] + draws.observation], axis=1)[:, -memory:]
            bar.update(block.stop - block.start)
    return generated, predictions


def block_edges(n_steps, renewal):
    """The steps at which blocks of at most BLOCK steps begin and end; `renewal`: steps whose multiples are among them,
    if it is given."""
    edges = set(range(0, n_steps, BLOCK)) | {n_steps}
    return sorted(edges | set(range(0, n_steps, renewal)) if renewal else edges)


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


# A stepper takes a model, the number of samples and a Sampling, and gives a function
#   advance(draws, start) -> predictions, generated, each (n, steps, feature_dim)
# that computes a block of steps. start: what the model's prefill returned (the outputs of the horizon-1 head, and the
# states), or None to go on where it stopped. At step t it writes down the current prediction (of a
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


def loop_stepper(model, n, sampling):
    """`model.step` in a plain loop: any device, and what the fast steppers are tested against."""
    output = states = None

    @torch.inference_mode()
    def advance(draws, start):
        nonlocal output, states
        output, states = start or (output, states)
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
        raise cli.UserError(f"--seed-len {seed_len} is longer than the series ({n_steps:,} steps); use a smaller one")
    if offset > last:
        raise cli.UserError(f"--seed-offset {offset} leaves no room for {seed_len} seed steps in the series of "
                            f"{n_steps}; use 0 to {last}")
    if last - gen_len >= offset:
        last -= gen_len
    return offset + np.arange(n_samples) * (last - offset) // n_samples


# ------------------------------------------------------------------------------------------------- is it a song?

SUMMARY_HEADER = ["", "on the process", "until off", "circles", "transitions", "TV", "95 % by chance", "mean dwell",
                  "p of dwells", "nats per step"]


def number(value, form):
    return "–" if value is None else format(value, form)


def summary_row(name, summary):
    """The cells of one line under SUMMARY_HEADER; summary: as `songs.summarise` returns it."""
    until_off = summary["steps_on_process"]
    if len(until_off) > SHOWN_SAMPLES:
        until_off = [f"{min(until_off)} to {max(until_off)}"]
    low, high = summary["total_variation_band"]
    error = summary["log_likelihood_error"]
    return [name, f"{summary['share_on_process']:.2%}", ", ".join(map(str, until_off)), summary["circles_visited"],
            summary["transitions"], number(summary["total_variation"], ".3f"),
            "–" if low is None else f"{low:.3f} to {high:.3f}", number(summary["mean_dwell"], ".0f"),
            number(summary["dwell_p_value"], ".3f"),
            f"{summary['log_likelihood']:.3f}" + ("" if error is None else f" ± {error:.3f}")]


def print_summaries(process, summaries):
    """Print a table of summaries, {name: summary}, and what the process itself gives in the long run."""
    rate, error = optimal_filter.entropy_rate(process)
    mean_dwell = songs.mean_dwell_of_law(process)
    law = ["process", f"{1 - songs.FALSE_ALARM:.3%}", *"–––––", f"{mean_dwell:.0f}", "–", f"{-rate:.3f} ± {error:.1g}"]
    print()
    print(cli.table(SUMMARY_HEADER, [*(summary_row(name, summary) for name, summary in summaries.items()), law]))
    print()
    clocks = {name: summary for name, summary in summaries.items() if summary["visit_ends"]}
    if clocks:
        print("visits end with a revolution, as they must:")
        print(cli.table(["", "ends seen", "to the step", *(f"within {k}" for k in range(1, songs.CLOCK_SHOWN + 1))], [
            [name, summary["visit_ends"], *(f"{share:.1%}" for share in summary["visit_ends_within"])]
            for name, summary in clocks.items()]))
        print()


def transition_table(summary):
    """For each circle that was left: how often, and how far from the true transitions, in fact and by chance."""
    rows = zip(summary["transitions_per_circle"], summary["total_variation_per_circle"],
               summary["total_variation_band_per_circle"], strict=True)
    return cli.table(["from circle", "left", "TV", "95 % by chance"], [
        [i, left, f"{distance:.3f}", f"{band[0]:.3f} to {band[1]:.3f}"]
        for i, (left, distance, band) in enumerate(rows) if left])


def reference_song(process, series, starts, seed_len, n_steps):
    """The same analysis of the true continuations of the seeds, or None where the series ends too early.

    A continuation that shares steps with an earlier one is left out: what is counted twice looks surer than it is.
    """
    if max(starts) + seed_len + n_steps > series.n_steps:
        return None
    apart = []
    for start in sorted(starts):
        if not apart or start >= apart[-1] + n_steps:
            apart.append(start)
    windows = np.stack([series.X[start:start + seed_len + n_steps] for start in apart])
    return songs.analyse(process, windows[:, :seed_len], windows[:, seed_len:])


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


SIGNED = {"unit": "data units", "cmap": "RdBu_r"}  # how heatmaps show the series, around white for 0


def signed_limits(values):
    """Limits of a diverging colour map, symmetric about 0, for values of any shape: nearly all lie within."""
    largest = np.percentile(np.abs(values), 99)
    return -largest, largest


@cli.in_style
def draw_seed(title, windows, seed_states, labels, seed_starts, in_burst, n_circles):
    """Seed and continuation of each sample, a strip of circles above a heatmap of the features: a Figure.

    windows (n, seed_len + steps, features); seed_states (n, seed_len) or None without labels; labels (n, steps),
    figures.OFF where the song is off the process, or None without a filter.
    """
    seed_len, shown = windows.shape[1] - len(in_burst), []
    fig, axes = figures.new_figure(2 * len(windows), 1, panel=(11.0, 1.5), title=title,
                                   gridspec_kw={"height_ratios": [0.12, 1] * len(windows)})
    for i, window in enumerate(windows):
        strip, heat = axes[2 * i:2 * i + 2, 0]
        if seed_states is None:
            figures.bare(strip)
            strip.set_frame_on(False)
        else:
            circles = seed_states[i] if labels is None else np.concatenate([seed_states[i], labels[i]])
            figures.state_strip(strip, circles, n_circles, start=-seed_len)
            shown.append(circles)
        strip.set_xlim(-seed_len - 0.5, window.shape[0] - seed_len - 0.5)
        figures.heatmap_panel(fig, heat, window, start=-seed_len, ylabel="feature", limits=signed_limits(windows),
                              **SIGNED)
        strip.set_title(f"seed from time step {seed_starts[i]:,}", loc="left")
        heat.axvline(-0.5, color="black", linestyle="--", linewidth=1.0)
        burst_marks(strip, in_burst)
    axes[-1, 0].set_xlabel("generated step (before 0: the seed; black bars: bursts)" if in_burst.any()
                           else "generated step (before 0: the seed)")
    if shown:
        figures.circle_legend(fig, n_circles, np.unique(np.concatenate(shown)))
    return fig


@cli.in_style
def draw_truth(title, generated, labels, truths, states, start, noise_std, in_burst, n_circles):
    """The first sample's continuation under the true one, their difference, and the error of all samples: a Figure.

    generated (n, steps, features); labels (n, steps) or None without a filter; truths: a list of n arrays (steps,
    features), shorter where the series ends; states: the circles of the first of them, or None without labels; start:
    its first time step.
    """
    truth, steps = truths[0], len(truths[0])
    fig, axes = figures.new_figure(6, 1, panel=(11.0, 1.45), title=title,
                                   gridspec_kw={"height_ratios": [0.14, 1, 0.14, 1, 1, 1]})
    true_strip, true_heat, strip, heat, difference, curve = axes[:, 0]
    limits = signed_limits(truth)
    if states is None:
        true_strip.axis("off")
    else:
        figures.state_strip(true_strip, states, n_circles)
        present = np.unique(states) if labels is None else np.union1d(states, labels[0, :steps])
        figures.circle_legend(fig, n_circles, present)
    which = " of sample 0" if len(truths) > 1 else ""
    true_strip.set_title(f"true series{which}, from time step {start:,}", loc="left")
    figures.heatmap_panel(fig, true_heat, truth, ylabel="feature", limits=limits, **SIGNED)
    strip.set_title(f"generated{', sample 0' * (len(truths) > 1)}", loc="left")
    if labels is None:
        strip.axis("off")
    else:
        figures.state_strip(strip, labels[0, :steps], n_circles)
    figures.heatmap_panel(fig, heat, generated[0, :steps], ylabel="feature", limits=limits, **SIGNED)
    figures.heatmap_panel(fig, difference, generated[0, :steps] - truth, ylabel="feature", title="generated − true",
                          symmetric=True, **SIGNED)
    error_curves(curve, generated, truths, noise_std)
    burst_marks(strip, in_burst[:steps])
    return fig


def error_curves(ax, generated, truths, noise_std):
    """The RMS error of each sample over time, beside the noise and the spread of the first true continuation."""
    top = spread = truths[0].std()
    for i, (sample, truth, style) in enumerate(zip(generated, truths, SAMPLE_STYLES, strict=False)):
        if len(truth):
            error = rms_error(sample[:len(truth)], truth)
            top = max(top, error.max())
            ax.plot(error, linewidth=1.0, label=f"sample {i}", **style)
    if noise_std:
        ax.axhline(noise_std, color="crimson", linestyle="--", linewidth=1.0, label="noise_std")
    ax.axhline(spread, color="crimson", linestyle=":", linewidth=1.0, label="std of the true series")
    ax.set(xlim=(-0.5, len(truths[0]) - 0.5), ylim=(0, 1.35 * top), ylabel="RMS error\n(data units)",
           xlabel="generated step")
    ax.legend(loc="upper left", ncols=5, fontsize=8)  # above the curves: there is room for it


@cli.in_style
def draw_song(title, process, song, summary, in_burst):
    """Transitions and dwell times beside the true ones, and the deviation from the path over time: a Figure."""
    fig, axes = figures.new_figure(2, 2, panel=(5.6, 3.9), title=title)
    transition_panels(fig, axes[0], process.transition_matrix, summary)
    dwell_histogram(axes[1, 0], process, *songs.completed_dwells(song["visits"]), summary["dwell_p_value"])
    ax = axes[1, 1]
    deviation_curves(ax, process, song["deviation"][:SHOWN_SAMPLES, :SHOWN_STEPS], in_burst[:SHOWN_STEPS])
    ax.set(xlabel="generated step", ylabel="RMS deviation (data units)")
    ax.set_title("deviation of the song from its path", pad=12)  # clear of the burst marks
    ax.legend(loc="upper left", fontsize=8, ncols=2)
    return fig


def transition_panels(fig, axes, P, summary):
    """The true transition matrix P (K, K) and the shares that were seen, with each row's distance beside it.

    What is impossible, or was never seen, is white. A circle that was never left has no shares: its row is hatched.
    """
    K, counts = len(P), np.array(summary["transition_counts"])
    left = counts.sum(axis=1)
    shares = counts / np.maximum(left, 1)[:, None]
    ticks = range(K) if K <= MOST_NAMED_CIRCLES else range(0, K, 5)
    for ax, matrix, name in zip(axes, (P, shares), ("true transitions", "generated transitions"), strict=True):
        image = ax.imshow(np.ma.masked_equal(matrix, 0), cmap="viridis", vmin=0, vmax=1)
        ax.set(title=name, xlabel="to circle", ylabel="from circle", xticks=ticks, yticks=ticks)
    fig.colorbar(image, ax=axes.tolist(), label="probability", fraction=0.03, pad=0.01)
    for i in np.flatnonzero(left == 0):
        axes[1].axhspan(i - 0.5, i + 0.5, facecolor="0.95", edgecolor="0.75", hatch="////", linewidth=0)
    if K > MOST_NAMED_CIRCLES:
        return
    for i, (distance, n) in enumerate(zip(summary["total_variation_per_circle"], left, strict=True)):
        axes[1].text(K - 0.3, i, f"TV {distance:.2f}  n {n}" if n else "never left", va="center", fontsize=8)


def dwell_histogram(ax, process, circles, dwells, p_value):
    """The lengths of visits, dwells (n,) steps on circles (n,), over the law that the process gives them."""
    ax.set_title("dwell times" if p_value is None else f"dwell times (p = {p_value:.3f})")
    if len(dwells) == 0:
        ax.text(0.5, 0.5, "no visit was seen from\nits first to its last step", ha="center", va="center",
                transform=ax.transAxes)
        figures.bare(ax)
        return
    lengths, law = songs.dwell_time_law(process, circles)
    nearly_all = lengths[np.searchsorted(np.cumsum(law), 0.999).clip(max=len(lengths) - 1)]
    bins = np.linspace(0, 1.02 * max(dwells.max(), nearly_all), 41)
    ax.hist(lengths, bins, weights=law, color="0.75", label="true law")
    ax.hist(dwells, bins, weights=np.full(len(dwells), 1 / len(dwells)), histtype="step", color="black",
            linewidth=1.5, label=f"generated ({cli.count(len(dwells), 'visit')})")
    ax.set(xlabel="dwell time (steps)", ylabel="share of visits")
    ax.legend()


def deviation_curves(ax, process, deviations, in_burst):
    """The deviation of each sample, (n, steps), from its path, as songs.analyse gives it, and where it is off."""
    threshold = songs.largest_deviation(process, songs.window_length(process))
    for i, (row, style) in enumerate(zip(deviations, SAMPLE_STYLES, strict=False)):
        ax.plot(row, linewidth=0.8, label=f"sample {i}", **style)
    ax.axhline(threshold, color="crimson", linestyle="--", linewidth=1.0, label="above: off the process")
    top = max(deviations.max(), threshold)
    ax.set(xlim=(-0.5, deviations.shape[1] - 0.5), ylim=(0, 1.35 * top))  # room for the legend
    burst_marks(ax, in_burst)


@cli.in_style
def draw_compare(title, process, compared, summaries, in_burst):
    """The circles of each song's samples as strips, grey where a step is off the process, and its deviations: a Figure.

    compared, summaries, in_burst: dicts with the same names as keys, of what `songs.analyse`, `songs.summarise` and
    `burst_steps` return.
    """
    n_circles = process.n_circles
    fig, axes = figures.new_figure(len(compared), 2, panel=(6.5, 1.6), title=title, sharex=True,
                                   gridspec_kw={"width_ratios": [1.3, 1]})
    present = set()
    for (name, song), (strip, curve) in zip(compared.items(), axes, strict=True):
        labels = shown_labels(song)[:SHOWN_SAMPLES]
        present.update(np.unique(labels).tolist())
        n, steps = labels.shape
        strip.imshow(figures.strip_colors(labels, n_circles), aspect="auto", interpolation="nearest",
                     extent=(-0.5, steps - 0.5, n - 0.5, -0.5))
        strip.set(yticks=range(n), ylabel="sample")
        summary = summaries[name]
        strip.set_title(f"{name}: {summary['share_on_process']:.1%} on the process, "
                        + cli.count(summary["circles_visited"], "circle") + ", "
                        + cli.count(summary["transitions"], "transition"), loc="left")
        deviation_curves(curve, process, song["deviation"][:SHOWN_SAMPLES], in_burst[name])
        curve.set(ylabel="data units")
        burst_marks(strip, in_burst[name])
    for ax in axes[-1]:
        ax.set_xlabel("generated step")
    axes[0, 1].set_title("RMS deviation from the path (dashed: off above)", loc="left")
    figures.circle_legend(fig, n_circles, present)
    return fig


# ------------------------------------------------------------------------------------------------- the script


@dataclass(frozen=True)
class Inputs:
    """What is generated from: process is None for data that the exact filter doesn't know; starts (n,) time steps of
    the seeds (n, seed_len, features); noise_std 0 where config.json gives none; memory: of `generate`."""

    model: torch.nn.Module
    series: dataset.Series
    process: circle_process.Process | None
    starts: np.ndarray
    seeds: np.ndarray
    noise_std: float
    memory: int


def load_inputs(args):
    """Load and check what the flags name: an Inputs. Raises cli.UserError when something doesn't fit."""
    model, trained_with, series = open_model(args.checkpoint, args.data_dir, cli.pick_device(args.device), args.scan)
    settle_temperature(args, model.mixture)
    args.data_suffix = data_suffix(series, trained_with)
    if args.perturb_layers:
        layers_to_perturb(args, model.n_layers)
    process = optimal_filter.process_or_none(series, without="no exact filter, so no song analysis")
    if process is not None and process.tilt_rate:
        print("no song analysis: the planes of these data tilt, and the smoother gives no axis that they tilt along")
        process = None
    if args.compare and process is None:
        raise cli.UserError("--compare judges by the exact filter, which does not know these data; leave it out")
    noise_std = series.config.get("noise_std")
    if args.temperature and noise_std is None and not model.mixture:
        raise cli.UserError("--temperature is in units of noise_std, which no config.json of these data gives; "
                            "use --temperature 0")
    memory, _, val_fraction = dataset.window_settings(trained_with, args.checkpoint)
    offset = args.seed_offset
    if offset is None:
        first_validation_step = dataset.first_validation_step(series.n_steps, val_fraction)
        offset = min(first_validation_step, max(series.n_steps - args.seed_len, 0))
    starts = seed_windows(series.n_steps, args.seed_len, args.gen_len, args.n_samples, offset)
    starts = dataset.into_recordings(starts, args.seed_len, series.recordings)
    seeds = np.stack([series.X[start:start + args.seed_len] for start in starts])
    print(f"seeds of {cli.count(args.seed_len, 'step')} from time steps {', '.join(f'{start:,}' for start in starts)}")
    return Inputs(model, series, process, starts, seeds, noise_std or 0.0, memory)


def settle_temperature(args, mixture):
    """Give --temperature its value where the head decides: 1 for a mixture, 0 for a point; note if it is the default.

    Names of files tell of the temperature when it isn't.
    """
    default = args.default_temperature
    if default is None:
        default = 1.0 if mixture else 0.0
    args.temperature = default if args.temperature is None else args.temperature
    args.default_temperature = default


def layers_to_perturb(args, n_layers):
    """--perturb-layers as a tuple counted from 0. Raises cli.UserError when the model has fewer layers."""
    layers = args.perturb_layers or range(1, n_layers + 1)
    if max(layers) > n_layers:
        raise cli.UserError(f"--perturb-layers {max(layers)}: the model has {cli.count(n_layers, 'layer')}; "
                            f"use 1 to {n_layers}")
    return tuple(n - 1 for n in layers)


def plain(value):
    """A number as short as it can be without another number getting the same name."""
    return repr(value).removesuffix(".0")


def variant(args, defaults):
    """The part of a file name that names every setting that isn't the default, compactly."""
    def changed(*names):
        return any(getattr(args, name) != getattr(defaults, name) for name in names)

    letters = {"seed_len": "s", "gen_len": "g", "n_samples": "n", "seed_offset": "o", "seed": "r"}
    words = [letter + plain(getattr(args, name)) for name, letter in letters.items() if changed(name)]
    if args.temperature not in (None, args.default_temperature):
        words.append("T" + plain(args.temperature))
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
    return f"{stem(args.checkpoint)}_{kind}{variant(args, parse_args(bare_command))}{args.data_suffix}"


def beside(args, ending):
    """The path of a file that this command writes."""
    return args.save_dir / f"{file_prefix(args)}{ending}"


def timed_generation(args, inputs, noise_std, bursts, temperature):
    """`generate`, with the time it took on stdout. Raises cli.UserError when the series leaves the finite numbers."""
    begin = time.perf_counter()
    generated, predictions = generate(inputs.model, inputs.seeds, args.gen_len, noise_std, bursts, args.seed,
                                      temperature, inputs.memory)
    seconds = time.perf_counter() - begin
    print(f"generated {len(inputs.seeds):,} x {cli.count(args.gen_len, 'step')} in {seconds:.2f} s, start-up included")
    broken = ~np.isfinite(generated).all(axis=(0, 2))
    if broken.any():
        raise cli.UserError(f"the generation is no longer finite at step {broken.argmax()}; lower --perturb-scale or "
                            "--temperature")
    return generated, predictions


def shown_labels(song):
    """The circles of a song's steps, (n, n_steps) int, figures.OFF where it is off the process."""
    return np.where(song["on"], song["labels"], figures.OFF)


def compared_settings(args, inputs):
    """What --compare plays: {name: (standard deviation of the noise on each prediction, temperature of the mixture,
    bursts)}."""
    timing = (args.perturb_interval, args.perturb_duration, args.perturb_scale)
    noise_std, degree = args.temperature * inputs.noise_std, f"{args.temperature:g}"
    if inputs.model.mixture:
        temperature = {f"noise {degree}": (noise_std, 0.0, None),
                       f"temperature {degree}": (0.0, args.temperature, None)}
    else:
        temperature = {f"temperature {degree}": (noise_std, 0.0, None)}
    return {
        "greedy": (0.0, 0.0, None),
        **temperature,
        "output bursts": (0.0, 0.0, Bursts(*timing)),
        "hidden bursts": (0.0, 0.0, Bursts(*timing, layers_to_perturb(args, inputs.model.n_layers))),
    }


def compare(args, inputs):
    """Greedy, temperature, output bursts and hidden bursts, side by side with the real series."""
    process, compared, in_burst = inputs.process, {}, {}
    real = reference_song(process, inputs.series, inputs.starts, args.seed_len, args.gen_len)
    if real:
        compared["real series"], in_burst["real series"] = real, burst_steps(args.gen_len, None)
    for name, (noise_std, temperature, bursts) in compared_settings(args, inputs).items():
        generated, _ = timed_generation(args, inputs, noise_std, bursts, temperature)
        compared[name] = songs.analyse(process, inputs.seeds, generated)
        in_burst[name] = burst_steps(args.gen_len, bursts)

    summaries = {name: songs.summarise(process, song) for name, song in compared.items()}
    print_summaries(process, summaries)
    cli.write_json(beside(args, ".json"), summaries)
    print(f"wrote {beside(args, '.json')}")
    title = (f"{stem(args.checkpoint)}: bursts of std {args.perturb_scale:g}, {args.perturb_duration} of every "
             f"{args.perturb_interval} steps")
    figures.save(draw_compare(title, process, compared, summaries, in_burst), beside(args, ".png"))


def sing(args, inputs):
    """One generation: its arrays, its figures, and its numbers where the exact filter can judge it."""
    bursts = None
    if args.perturb_interval:
        layers = layers_to_perturb(args, inputs.model.n_layers) if args.perturb_hidden else None
        bursts = Bursts(args.perturb_interval, args.perturb_duration, args.perturb_scale, layers)
    in_burst = burst_steps(args.gen_len, bursts)
    noise_std, temperature = args.temperature * inputs.noise_std, 0.0
    if inputs.model.mixture:
        noise_std, temperature = 0.0, args.temperature
    generated, predictions = timed_generation(args, inputs, noise_std, bursts, temperature)
    song = None if inputs.process is None else songs.analyse(inputs.process, inputs.seeds, generated)

    with cli.writing(beside(args, ".npz")) as part:
        np.savez_compressed(part, generated=generated, predictions=predictions, seed=inputs.seeds,
                            seed_starts=inputs.starts, perturbed=in_burst, **(song or {}))
    print(f"wrote {beside(args, '.npz')}")
    save_continuations(args, inputs, generated, None if song is None else shown_labels(song), in_burst)
    if song is not None:
        report(args, inputs, song, in_burst)


def save_continuations(args, inputs, generated, labels, in_burst):
    """Write the figures of the first samples and steps: seed and continuation, and continuation and truth."""
    series, n = inputs.series, min(SHOWN_SAMPLES, len(inputs.starts))
    steps = min(args.gen_len, SHOWN_STEPS)
    cut = "" if steps == args.gen_len else f", first {steps:,} of {args.gen_len:,} steps"
    name = stem(args.checkpoint)
    starts, ends = inputs.starts[:n], inputs.starts[:n] + args.seed_len  # of the seeds
    generated, in_burst = generated[:n, :steps], in_burst[:steps]
    labels = None if labels is None else labels[:n, :steps]

    seed_states = None if series.states is None else np.stack(
        [series.states[start:end] for start, end in zip(starts, ends, strict=True)])
    windows = np.concatenate([inputs.seeds[:n], generated], axis=1)
    fig = draw_seed(f"{name}: seed and continuation{cut}", windows, seed_states, labels, starts, in_burst,
                    series.n_circles)
    figures.save(fig, beside(args, "_seed.png"))

    lasts = dataset.recordings_at(series.recordings, starts)[:, 1]
    truths = [series.X[end:min(end + steps, last)] for end, last in zip(ends, lasts, strict=True)]
    if len(truths[0]) == 0:
        print("the series or its recording ends with the seed: no true continuation to compare with")
        return
    states = None if series.states is None else series.states[ends[0]:ends[0] + len(truths[0])]
    fig = draw_truth(f"{name}: continuation and truth{cut}", generated, labels, truths, states, ends[0],
                     inputs.noise_std, in_burst, series.n_circles)
    figures.save(fig, beside(args, "_truth.png"))


def report(args, inputs, song, in_burst):
    """The song's numbers as tables, beside those of the true continuations, and its figure."""
    process, name = inputs.process, stem(args.checkpoint)
    summary = songs.summarise(process, song)
    summaries = {"generated": summary}
    real = reference_song(process, inputs.series, inputs.starts, args.seed_len, args.gen_len)
    if real:
        summaries["real series"] = songs.summarise(process, real)
    print_summaries(process, summaries)
    if summary["transitions"]:
        print(transition_table(summary))
        print()
    title = (f"{name}: {summary['share_on_process']:.1%} of {cli.count(args.gen_len, 'step')} on the process; "
             f"{cli.count(summary['circles_visited'], 'circle')}, {cli.count(summary['transitions'], 'transition')}")
    figures.save(draw_song(title, process, song, summary, in_burst), beside(args, "_song.png"))


def main(args):
    inputs = load_inputs(args)
    args.save_dir = cli.output_folder(args.save_dir)
    if args.compare:
        compare(args, inputs)
    else:
        sing(args, inputs)


if __name__ == "__main__":
    cli.run(main, ARGS)
