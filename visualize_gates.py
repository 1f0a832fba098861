"""Look inside the Mamba blocks: step size delta, output gate z, B, C and the convolved input, beside the series.

Reads a checkpoint NAME.pt and data/data.npz. A sample is a window of the validation part, as long as those that the
model was trained on; samples follow each other without overlap and are numbered from 0. Writes to --save-dir:
  NAME_gates_layer7_0.png     with --layer 7: all signals of layer 7 for sample 0
  NAME_gates_summary_0.png    without --layer: all signals of all layers for sample 0, and how much of each signal's
                              variance the circle explains
  NAME_gates_umap_delta.png   with --umap: one UMAP of delta per layer, coloured by circle; the same for z, B, C and
                              conv. With --layer 7 of that layer only: NAME_gates_layer7_umap_delta.png
With other --umap-points or --seed than the default these stand in the name.

Examples:
  python visualize_gates.py --checkpoint model_next.pt --layer 7 --sample 0
  python visualize_gates.py --checkpoint model_next.pt --umap
"""

import cli  # first: from here on Ctrl-C ends the script without a traceback

# isort: split
from pathlib import Path


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--layer", type=cli.positive_int, metavar="N",
                       help="show this layer, counted from 1 (default: all layers)")
    shown.add_argument("--sample", type=cli.non_negative_int, default=0, metavar="N",
                       help="first validation window to show, counted from 0; --umap takes points from all windows")
    shown.add_argument("--n-samples", type=cli.positive_int, default=1, metavar="N",
                       help="how many windows to show, one figure per window")
    shown.add_argument("--umap", action="store_true", help="draw UMAPs instead of heatmaps")
    shown.add_argument("--umap-points", type=cli.positive_int, default=3000, metavar="N",
                       help="random time steps in each UMAP")
    cli.add_computing(parser)
    cli.add_drawing(parser)
    files = parser.add_argument_group("files")
    files.add_argument("--checkpoint", type=Path, required=True, metavar="NAME.pt", help="the trained model; required")
    cli.add_data_dir(files, of_checkpoint=True)
    cli.add_save_dir(files)
    args = parser.parse_args(argv)
    args.settings = "".join(f"_{part}" for part in cli.flags_in_name(parser, args, (
        "layer", "sample", "n_samples", "umap", "data_dir", "save_dir", *(() if args.umap else ("umap_points",)))))
    return args


if __name__ == "__main__":
    cli.start()
    ARGS = parse_args()  # before the slow imports: --help and a bad flag answer at once

import numpy as np
import torch

import dataset
import figures
import mamba_model
import terminal
from measures import eta_squared, knn, standardise, umap_embedding

SIGNALS = ("delta", "z", "B", "C", "conv")
SYMBOLS = {"delta": "Δ", "z": "z", "B": "B", "C": "C", "conv": "conv"}
MEANINGS = {"delta": "step size Δ over the channel's mean: red takes the input in and forgets, blue holds the state",
            "z": "gate z, before SiLU: red open, blue closed",
            "B": "B: how the input enters the state",
            "C": "C: how the state is read out",
            "conv": "conv: the block's input after convolution and SiLU, never below −0.28"}
UMAP_NEIGHBORS = 15
ANOVA_POINTS = 5000  # time steps over which eta squared is taken
MAX_WINDOWS = 64  # sampled time steps come from at most so many windows, which bounds the time on a long series


# ---------------------------------------------------------------------------------------------------------------
# Samples


def sample_starts(n_steps, seq_len, val_fraction, recordings=None):
    """First time steps of the samples: validation windows end to end, so that no two share a step.

    recordings: as Series.recordings where there are several; no window crosses a border. Raises UserError when the
    validation part holds no window.
    """
    first = dataset.first_validation_step(n_steps, val_fraction)
    recordings = [(0, n_steps)] if recordings is None else recordings
    starts = dataset.starts_in_recordings(recordings, first, n_steps, seq_len, seq_len)
    if len(starts) == 0:
        part = "the validation part" if len(recordings) == 1 else "every recording of the validation part"
        steps = max(end - max(begin, first) for begin, end in recordings)
        raise cli.UserError(f"{part} has {cli.count(steps, 'step')}, fewer than the {seq_len:,} of the model's "
                            "windows; give the --data-dir the model was trained on, or a longer series")
    return starts


def check_samples(sample, n_samples, available):
    """Raise UserError unless the samples sample … sample + n_samples - 1 exist."""
    if sample + n_samples > available:
        asked = f"--sample {sample}" + (f" --n-samples {n_samples}" if n_samples > 1 else "")
        raise cli.UserError(f"{asked} is out of range: the validation part has samples 0…{available - 1}")


def sample_steps(starts, seq_len, n_points, rng):
    """n_points different time steps of the windows in random order: (n_points,), or all steps where there are fewer.

    They come from at most MAX_WINDOWS of the windows, spread evenly.
    """
    if len(starts) > MAX_WINDOWS:
        starts = starts[np.linspace(0, len(starts) - 1, MAX_WINDOWS).astype(int)]
    steps = (starts[:, None] + np.arange(seq_len)).ravel()
    return rng.choice(steps, size=min(n_points, len(steps)), replace=False)


# ---------------------------------------------------------------------------------------------------------------
# Signals


@torch.no_grad()
def block_signals(model, x):
    """The signals of every block for x (batch, time, feature_dim), the model in eval mode.

    A list with one dict per layer: delta (after softplus), z (before SiLU) and conv (after SiLU), each (batch, time,
    d_inner), B and C (batch, time, d_state); names as in Gu & Dao 2023, algorithm 2.
    """
    inputs = [model.embed(x), *model.layer_outputs(x)[:-1]]
    return [layer.mamba.signals(layer.norm(h)) for layer, h in zip(model.layers, inputs, strict=True)]


def window_signals(model, X, start, seq_len):
    """block_signals of the window of X (n_steps, feature_dim) that begins at `start`, as arrays (seq_len, channels)."""
    x = dataset.gather(X, [start], seq_len).to(next(model.parameters()).device)
    return [{name: signal[0].cpu().numpy() for name, signal in layer.items()}
            for layer in block_signals(model, x)]


def signals_at(model, X, starts, seq_len, steps, layers):
    """Signals at chosen time steps, each computed in the window that holds the step.

    starts: first steps of the windows; steps (n,): time steps inside them; layers: the wanted ones, counted from 0.
    Returns {layer: {name: (n, channels)}}, row i for steps[i].
    """
    points = {layer: {} for layer in layers}
    for start in starts:
        inside = (steps >= start) & (steps < start + seq_len)
        if not inside.any():
            continue
        window = window_signals(model, X, start, seq_len)
        for layer, signals in points.items():
            for name, signal in window[layer].items():
                if name not in signals:
                    signals[name] = np.empty((len(steps), signal.shape[1]), signal.dtype)
                signals[name][inside] = signal[steps[inside] - start]
    return points


def by_mean_delta(signals):
    """The signals of one layer, their d_inner channels sorted by mean step size, the smallest first.

    conv, delta and z are sorted alike. B and C have no such channels: they keep the order of the state.
    """
    order = np.argsort(signals["delta"].mean(axis=0), kind="stable")
    return {name: signal if name in ("B", "C") else signal[:, order] for name, signal in signals.items()}


def log2_over_mean(delta):
    """log₂ of delta (n, channels) over the mean of its channel: 1 is twice the mean, -1 half of it.

    The step sizes of different channels span decades by design, so the changes of each one show only relative to its
    own mean.
    """
    delta = np.maximum(delta, np.finfo(np.float32).tiny)  # softplus underflows to 0
    return np.log2(delta / delta.mean(axis=0))


# ---------------------------------------------------------------------------------------------------------------
# Figures


@cli.in_style
def draw_layer(signals, X, states, n_circles, start, title):
    """One layer, one sample: state strip, input and all signals on one time axis; a Figure.

    signals {name: (seq_len, channels)} in the order of by_mean_delta, with "log2_over_mean" of delta and "mean_delta"
    (channels,); X (seq_len, feature_dim), states (seq_len,); start: the first time step.
    """
    heights = [0.3, 1, 1.5, 1.5, 1.5, 1, 1]
    fig, axes = figures.new_figure(len(heights), 1, panel=(13.0, 9.5 / len(heights)), title=title, sharex=True,
                                   gridspec_kw={"height_ratios": heights})
    strip, inputs, conv, delta, z, B, C = axes[:, 0]
    label_strips(fig, [strip], states, n_circles, start)
    figures.heatmap_panel(fig, inputs, X, start, ylabel="feature", title="input x", unit="data units", cmap="RdBu_r",
                          symmetric=True)
    channel = "channel\n(by mean Δ)"
    figures.heatmap_panel(fig, conv, signals["conv"], start, ylabel=channel, title=MEANINGS["conv"], unit="conv")
    figures.heatmap_panel(fig, delta, signals["log2_over_mean"], start, ylabel="channel's\nmean Δ",
                          title=MEANINGS["delta"], unit="log₂(Δ / mean)", cmap="RdBu_r", symmetric=True)
    marked = np.linspace(0, len(signals["mean_delta"]) - 1, 4).astype(int)
    delta.set_yticks(marked, [f"{value:.2g}" for value in signals["mean_delta"][marked]])
    figures.heatmap_panel(fig, z, signals["z"], start, ylabel=channel, title=MEANINGS["z"], unit="z", cmap="RdBu_r",
                          symmetric=True)
    for ax, name in ((B, "B"), (C, "C")):
        figures.heatmap_panel(fig, ax, signals[name], start, ylabel="SSM state", title=MEANINGS[name], unit=name,
                              cmap="RdBu_r", symmetric=True)
    C.set_xlabel("time step")
    fig.align_ylabels(axes[1:, 0])
    return fig


def label_strips(fig, panels, states, n_circles, start, **label):
    """The circles (n,) from time step `start` on in each of these panels, and their legend; without labels, states
    None, the panels are empty."""
    for ax in panels:
        if states is None:
            ax.axis("off")
        else:
            figures.state_strip(ax, states, n_circles, start, **label)
    if states is not None:
        figures.circle_legend(fig, n_circles, np.unique(states))


@cli.in_style
def draw_summary(layers, shares, input_share, states, n_circles, start, title):
    """All layers, one sample: one row per layer, with the mean step size, all signals and what the circle explains.

    layers: a list of {name: (seq_len, channels)}, standardised except for "mean_delta" (seq_len,); shares: a list of
    {name: η²} and input_share the η² of the series itself, in [0, 1], both None without labels; start: the first time
    step. Returns a Figure.
    """
    n_layers = len(layers)
    fig, axes = figures.new_figure(
        n_layers + 1, len(SIGNALS) + 2, panel=(16 / (len(SIGNALS) + 2), (1.15 * n_layers + 1.2) / (n_layers + 1)),
        title=title, gridspec_kw={"height_ratios": [0.2] + [1] * n_layers, "width_ratios": [1.3, *[1] * 5, 1.6]})

    # ---- the first row: titles and state strips
    for ax, name in zip(axes[0, :-1], ("mean Δ of channels", *(SYMBOLS[name] for name in SIGNALS)), strict=True):
        ax.set_title(name)
    label_strips(fig, axes[0, :-1], states, n_circles, start, label="")
    axes[0, 0].set_ylabel("layer", rotation=0, ha="right", va="center")
    axes[0, -1].axis("off")
    axes[0, -1].set_title("" if shares is None else "η² (dotted: of input)")

    # ---- one row per layer
    top = None if shares is None else 1.1 * max(input_share, *(max(share.values()) for share in shares))
    for i, signals in enumerate(layers):
        image = layer_row(axes[i + 1], signals, start, str(i + 1), last=i == n_layers - 1)
        if shares is None:
            axes[i + 1, -1].axis("off")
        else:
            share_bars(axes[i + 1, -1], shares[i], input_share, top, last=i == n_layers - 1)

    bar = fig.colorbar(image, ax=axes[1:, 1:-1], location="bottom", fraction=0.02, aspect=60, extend="both",
                       extendfrac=0.02)
    bar.set_label("standard deviations from the channel's mean (d_inner channels sorted by mean Δ)" + (
        "" if shares is None else "\nη²: share of variance that the circle explains, over the validation part"))
    fig.align_ylabels(axes[1:, 0])
    return fig


def layer_row(axes, signals, start, label, last):
    """The mean step size and the heatmaps of one layer of draw_summary; only the last row shows time steps.

    Returns the last heatmap, for the colour bar: all have the same colours.
    """
    trace, *heatmaps, _ = axes
    n_steps = len(signals["mean_delta"])
    trace.plot(start + np.arange(n_steps), signals["mean_delta"], color="black", linewidth=1)
    trace.set_xlim(start - 0.5, start + n_steps - 0.5)
    trace.set_ylabel(label, rotation=0, ha="right", va="center")
    for ax, name in zip(heatmaps, SIGNALS, strict=True):
        image = ax.imshow(signals[name].T, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-2.5, vmax=2.5,
                          extent=(start - 0.5, start + n_steps - 0.5, 0, 1))
        ax.set_yticks([])
    for ax in (trace, *heatmaps):
        ax.locator_params(axis="x", nbins=3)
        ax.tick_params(axis="x", labelbottom=last)
        if last:
            ax.set_xlabel("time step")
    return image


def share_bars(ax, share, input_share, top, last):
    """One bar per signal, {name: η²}, and a dotted line at the η² of the input; names only in the last row."""
    ax.bar(range(len(SIGNALS)), [share[name] for name in SIGNALS], color="#4477aa")
    ax.axhline(input_share, color="black", linestyle=":", linewidth=1)
    ax.set_ylim(0, top or 1)
    ax.set_xticks(range(len(SIGNALS)), [SYMBOLS[name] for name in SIGNALS] if last else [])


# ---------------------------------------------------------------------------------------------------------------
# The script


def explained_by_circle(model, series, starts, seq_len, seed):
    """η² of the circle, averaged over channels, at up to ANOVA_POINTS random time steps of the validation windows.

    Returns (a list with {signal: share} per layer, the share of the series itself); (None, None) without labels.
    """
    if series.states is None:
        return None, None
    steps = sample_steps(starts, seq_len, ANOVA_POINTS, np.random.default_rng(seed))
    states = series.states[steps]
    with terminal.busy(f"signals at {len(steps):,} steps"):
        points = signals_at(model, series.X, starts, seq_len, steps, range(model.n_layers))
    shares = [{name: float(eta_squared(values, states).mean()) for name, values in points[layer].items()}
              for layer in range(model.n_layers)]
    return shares, float(eta_squared(series.X[steps], states).mean())


def share_table(shares, input_share):
    """The shares of explained_by_circle as text, one row per layer and one column per signal."""
    rows = [[f"layer {i + 1}", *(f"{share[name]:.3f}" for name in SIGNALS)] for i, share in enumerate(shares)]
    return (f"share of variance that the circle explains (eta squared); of the input: {input_share:.3f}\n"
            + cli.table(["", *SIGNALS], rows))


def write_layers(args, model, series, starts, seq_len, folder):
    """With --layer: one figure per sample that was asked for, all signals of that layer."""
    name = mamba_model.stem(args.checkpoint)
    for sample in range(args.sample, args.sample + args.n_samples):
        start = int(starts[sample])
        window = slice(start, start + seq_len)
        signals = by_mean_delta(window_signals(model, series.X, start, seq_len)[args.layer - 1])
        signals |= {"log2_over_mean": log2_over_mean(signals["delta"]), "mean_delta": signals["delta"].mean(axis=0)}
        fig = draw_layer(signals, series.X[window], dataset.rows_of(series.states, window), series.n_circles, start,
                         f"{name}: layer {args.layer} of {model.n_layers}, sample {sample}")
        figures.save(fig, folder / f"{name}_gates_layer{args.layer}_{sample}{args.data_suffix}.png")


def write_summaries(args, model, series, starts, seq_len, folder):
    """Without --layer: a table of what the circle explains, and one figure per sample, all signals of all layers."""
    name = mamba_model.stem(args.checkpoint)
    shares, input_share = explained_by_circle(model, series, starts, seq_len, args.seed)
    if shares is not None:
        print(share_table(shares, input_share))
    for sample in range(args.sample, args.sample + args.n_samples):
        start = int(starts[sample])
        layers = [by_mean_delta(signals) for signals in window_signals(model, series.X, start, seq_len)]
        scaled = [{signal: standardise(values) for signal, values in layer.items()}
                  | {"mean_delta": layer["delta"].mean(axis=1)} for layer in layers]
        fig = draw_summary(scaled, shares, input_share, dataset.rows_of(series.states, slice(start, start + seq_len)),
                           series.n_circles, start, f"{name}: signals of all layers, sample {sample}")
        figures.save(fig, folder / f"{name}_gates_summary_{sample}{args.data_suffix}.png")


def write_umaps(args, model, series, starts, seq_len, folder):
    """With --umap: one figure per signal, with one UMAP per layer."""
    steps = sample_steps(starts, seq_len, args.umap_points, np.random.default_rng(args.seed))
    if len(steps) <= UMAP_NEIGHBORS:
        raise cli.UserError(f"a UMAP needs more than {UMAP_NEIGHBORS} steps, not {len(steps):,}; "
                            "give a larger --umap-points or a longer series")
    if len(steps) < args.umap_points:
        print(f"the validation windows used have {cli.count(len(steps), 'step')}: all are taken")
    name, states = mamba_model.stem(args.checkpoint), dataset.rows_of(series.states, steps)
    layers = range(model.n_layers) if args.layer is None else [args.layer - 1]
    with terminal.busy(f"signals at {len(steps):,} steps"):
        points = signals_at(model, series.X, starts, seq_len, steps, layers)
    prefix = f"{name}_gates" + ("" if args.layer is None else f"_layer{args.layer}")
    with terminal.Bar(len(SIGNALS) * len(layers), desc="UMAPs") as bar:
        for signal in SIGNALS:
            embeddings, titles = [], []
            for layer in layers:
                values = points[layer][signal]
                scaled = standardise(values)
                embeddings.append(umap_embedding(scaled, knn(scaled, UMAP_NEIGHBORS - 1), args.seed))
                share = "" if states is None else f"   (η² {eta_squared(values, states).mean():.2f})"
                titles.append(f"layer {layer + 1}{share}")
                bar.update()
            fig = figures.draw_umaps(embeddings, titles, steps if states is None else states, series.n_circles,
                                     f"{name}: UMAP of {SYMBOLS[signal]} at {len(steps):,} validation steps")
            with bar.external_write_mode():
                figures.save(fig, folder / f"{prefix}_umap_{signal}{args.data_suffix}.png")


def main(args):
    device = cli.pick_device(args.device)
    model, trained_with, series = mamba_model.open_model(args.checkpoint, args.data_dir, device, args.scan)
    args.data_suffix = args.settings + mamba_model.data_suffix(series, trained_with)
    if args.layer is not None and args.layer > model.n_layers:
        raise cli.UserError(f"--layer {args.layer} is out of range: the model has layers 1…{model.n_layers}")
    seq_len, _, val_fraction = dataset.window_settings(trained_with, args.checkpoint)
    starts = sample_starts(series.n_steps, seq_len, val_fraction, series.recordings)
    if series.states is None:
        print("these data have no labels: no circles are shown, and no share of variance that they explain")
    if not args.umap:
        check_samples(args.sample, args.n_samples, len(starts))
    folder = cli.output_folder(args.save_dir)
    write = write_umaps if args.umap else write_summaries if args.layer is None else write_layers
    write(args, model, series, starts, seq_len, folder)


if __name__ == "__main__":
    cli.run(main, ARGS)
