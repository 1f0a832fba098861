"""visualize_gates.py: the signals against a recomputation, the statistics against brute force, and whole runs."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cli
import dataset
import figures
import mamba_model
import visualize_gates as vg

SCRIPT = Path(vg.__file__)
SEQ_LEN, N_STEPS, FEATURES, CIRCLES, LAYERS = 32, 1000, 3, 4, 2  # validation: 100 steps, three windows


def tiny_model(seed=0, feature_dim=FEATURES):
    torch.manual_seed(seed)
    return mamba_model.CausalTimeSeriesMamba(feature_dim, d_model=16, n_layers=LAYERS, d_state=4, d_ff=32).eval()


def save_model(path, model, **args):
    mamba_model.save_checkpoint(path, 1, model.state_dict(), {}, 1.0, 1.0, args)


def write_data(folder, n_steps=N_STEPS, features=FEATURES):
    rng = np.random.default_rng(0)
    folder.mkdir()
    states = np.arange(n_steps) // 20 % CIRCLES
    np.savez(folder / "data.npz", X=rng.normal(size=(n_steps, features)).astype(np.float32), states=states,
             thetas=rng.uniform(0, 6, n_steps),
             transition_matrix=(np.ones((CIRCLES, CIRCLES)) - np.eye(CIRCLES)) / (CIRCLES - 1),
             radii=np.ones(CIRCLES), entry_angles=np.zeros(CIRCLES), periods=np.full(CIRCLES, 10))


@pytest.fixture(autouse=True)
def short_names(monkeypatch):
    """Files' names without the numbers that many commands here give to be quick; test_file_names.py is about names."""
    in_name = cli.flags_in_name
    monkeypatch.setattr(cli, "flags_in_name", lambda parser, args, without=(): in_name(
        parser, args, (*without, "umap_points", "seed")))


@pytest.fixture
def work(tmp_path):
    """A folder with data/ and ckpt/m.pt, a tiny untrained model that says how its windows were cut."""
    write_data(tmp_path / "data")
    (tmp_path / "ckpt").mkdir()
    save_model(tmp_path / "ckpt" / "m.pt", tiny_model(), seq_len=SEQ_LEN, stride=8, val_fraction=0.1)
    return tmp_path


def flags(work, *more, checkpoint="m.pt"):
    return ["--checkpoint", str(work / "ckpt" / checkpoint), "--data-dir", str(work / "data"), "--save-dir",
            str(work / "plots"), "--device", "cpu", "--scan", "reference", *more]


def run_here(work, *more, **options):
    cli.run(vg.main, vg.parse_args(flags(work, *more, **options)))


def plots(work):
    return sorted(path.name for path in (work / "plots").iterdir())


# Signals


def recompute(block, x):
    """A Mamba block written out step by step in float64 numpy: x (time, d_model) to its signals and its output."""
    weight = {name: value.detach().double().numpy() for name, value in block.named_parameters()}
    u, z = np.split(x @ weight["in_proj.weight"].T, 2, axis=1)
    conv = np.zeros_like(u)
    for t in range(len(u)):
        for k in range(block.d_conv):
            if t - k >= 0:
                conv[t] += weight["conv1d.weight"][:, 0, block.d_conv - 1 - k] * u[t - k]
    conv += weight["conv1d.bias"]
    conv = conv / (1 + np.exp(-conv))
    mixed = conv @ weight["x_proj.weight"].T
    low_rank, B, C = np.split(mixed, [block.dt_rank, block.dt_rank + block.d_state], axis=1)
    delta = np.log1p(np.exp(low_rank @ weight["dt_proj.weight"].T + weight["dt_proj.bias"]))
    return {"conv": conv, "delta": delta, "z": z, "B": B, "C": C}


def recurrence(block, signals):
    """The block's output from its signals alone, h_t = exp(Δ A) h_{t-1} + Δ B u, looped over time."""
    A, D = -np.exp(block.A_log.detach().double().numpy()), block.D.detach().double().numpy()
    h, out = np.zeros_like(A), []
    for u, delta, z, B, C in zip(*(signals[name] for name in ("conv", "delta", "z", "B", "C")), strict=True):
        h = np.exp(delta[:, None] * A) * h + (delta * u)[:, None] * B
        out.append((h @ C + D * u) * z / (1 + np.exp(-z)))
    return np.array(out) @ block.out_proj.weight.detach().double().numpy().T


@pytest.fixture
def traced():
    """A model, an input, and what went in and out of every block when the model itself ran."""
    model, seen = tiny_model(), []
    model.use_scan("reference", "cpu")
    x = torch.randn(2, 20, FEATURES)
    hooks = [layer.mamba.register_forward_hook(
        lambda block, inputs, output: seen.append((inputs[0].detach(), output.detach()))) for layer in model.layers]
    model(x)
    for hook in hooks:
        hook.remove()
    return model, x, seen


def test_block_signals_match_a_recomputation_from_the_real_block_inputs(traced):
    model, x, seen = traced
    layers = vg.block_signals(model, x)
    assert len(layers) == LAYERS
    for layer, signals, (block_input, _) in zip(model.layers, layers, seen, strict=True):
        assert set(signals) == set(vg.SIGNALS)
        for i in range(len(x)):
            wanted = recompute(layer.mamba, block_input[i].double().numpy())
            for name in vg.SIGNALS:
                np.testing.assert_allclose(signals[name][i].numpy(), wanted[name], rtol=2e-4, atol=2e-6, err_msg=name)


def test_the_signals_run_through_the_recurrence_give_the_blocks_output(traced):
    model, x, seen = traced
    for layer, signals, (_, output) in zip(model.layers, vg.block_signals(model, x), seen, strict=True):
        for i in range(len(x)):
            one = {name: signal[i].double().numpy() for name, signal in signals.items()}
            np.testing.assert_allclose(recurrence(layer.mamba, one), output[i].numpy(), rtol=1e-3, atol=1e-5)


def test_signals_at_returns_each_step_in_the_order_asked_for():
    model = tiny_model()
    model.use_scan("reference", "cpu")
    X = np.random.default_rng(1).normal(size=(100, FEATURES)).astype(np.float32)
    steps = np.array([75, 12, 74, 30, 11])
    points = vg.signals_at(model, X, np.array([10, 42, 70]), 25, steps, [1])
    assert list(points) == [1]
    for row, (step, start) in enumerate(zip(steps, [70, 10, 70, 10, 10], strict=True)):
        window = vg.window_signals(model, X, start, 25)[1]
        for name in vg.SIGNALS:
            np.testing.assert_array_equal(points[1][name][row], window[name][step - start])


# Samples


def test_samples_are_validation_windows_that_share_no_step():
    starts = vg.sample_starts(N_STEPS, SEQ_LEN, 0.1)
    assert starts.tolist() == [900, 932, 964]


def test_a_validation_part_shorter_than_a_window_is_refused():
    with pytest.raises(cli.UserError, match="100 steps, fewer than the 101"):
        vg.sample_starts(N_STEPS, 101, 0.1)


def test_samples_that_do_not_exist_are_refused():
    for sample, n in ((0, 3), (2, 1)):
        vg.check_samples(sample, n, 3)
    for sample, n in ((0, 4), (3, 1), (2, 2)):
        with pytest.raises(cli.UserError, match=rf"--sample {sample}.* is out of range: .* samples 0…2"):
            vg.check_samples(sample, n, 3)


def test_sample_steps_are_different_steps_of_the_windows_and_follow_the_seed():
    starts = np.array([900, 950])
    steps = vg.sample_steps(starts, SEQ_LEN, 40, np.random.default_rng(3))
    assert len(set(steps.tolist())) == 40
    assert all(900 <= s < 932 or 950 <= s < 982 for s in steps)
    np.testing.assert_array_equal(steps, vg.sample_steps(starts, SEQ_LEN, 40, np.random.default_rng(3)))
    assert sorted(vg.sample_steps(starts, SEQ_LEN, 1000, np.random.default_rng(3))) == [
        *range(900, 932), *range(950, 982)]


def test_a_long_series_costs_a_bounded_number_of_windows():
    starts = np.arange(0, 10_000 * SEQ_LEN, SEQ_LEN)
    windows = set(vg.sample_steps(starts, SEQ_LEN, 2000, np.random.default_rng(0)) // SEQ_LEN)
    assert len(windows) <= vg.MAX_WINDOWS
    assert min(windows) < 1000
    assert max(windows) > 9000


# Statistics


def test_channels_move_together_and_B_and_C_stay():
    rng = np.random.default_rng(0)
    signals = {name: rng.uniform(size=(10, 6)) for name in vg.SIGNALS}
    signals["z"], signals["conv"] = signals["delta"] + 1, signals["delta"] + 2
    ordered = vg.by_mean_delta(signals)
    assert (np.diff(ordered["delta"].mean(axis=0)) > 0).all()
    np.testing.assert_array_equal(ordered["z"], ordered["delta"] + 1)
    np.testing.assert_array_equal(ordered["conv"], ordered["delta"] + 2)
    assert ordered["B"] is signals["B"]
    assert ordered["C"] is signals["C"]


def test_log2_over_mean_counts_doublings_and_survives_an_underflow():
    delta = np.array([[1.0, 0.2, 0.0], [3.0, 0.2, 1.0]], dtype=np.float32)
    ratio = vg.log2_over_mean(delta)
    np.testing.assert_allclose(ratio[:, 0], [-1, np.log2(1.5)], rtol=1e-6)
    np.testing.assert_allclose(ratio[:, 1], 0, atol=1e-6)
    assert np.isfinite(ratio).all()


# Figures


def test_all_panels_of_a_layer_share_one_time_axis(monkeypatch, work):
    figs = []
    monkeypatch.setattr(vg.figures, "save", lambda fig, path: figs.append(fig))
    run_here(work, "--layer", "1", "--sample", "1")
    (fig,) = figs
    fig.draw_without_rendering()
    panels = [ax for ax in fig.axes if ax.get_label() != "<colorbar>"]
    assert len(panels) == 7  # state strip, input, five signals
    assert {ax.get_xlim() for ax in panels} == {(931.5, 963.5)}
    assert len({(round(ax.get_position().x0, 6), round(ax.get_position().x1, 6)) for ax in panels}) == 1


def test_the_layer_asked_for_is_the_layer_drawn(monkeypatch, work):
    drawn = []
    monkeypatch.setattr(vg, "draw_layer", lambda signals, *rest: drawn.append((signals, *rest)))
    monkeypatch.setattr(vg.figures, "save", lambda fig, path: None)
    run_here(work, "--layer", "2", "--sample", "2")
    model, series = tiny_model(), dataset.load_series(work / "data")
    model.use_scan("reference", "cpu")
    signals, X, states, n_circles, start, _ = drawn[0]
    wanted = vg.by_mean_delta(vg.window_signals(model, series.X, 964, SEQ_LEN)[1])
    for name in vg.SIGNALS:
        np.testing.assert_array_equal(signals[name], wanted[name])
    assert (start, n_circles) == (964, CIRCLES)
    np.testing.assert_array_equal(X, series.X[964:996])
    np.testing.assert_array_equal(states, series.states[964:996])


@pytest.fixture
def saved(monkeypatch):
    """The figures that are saved, {file name: Figure}; no file is written."""
    figs = {}
    monkeypatch.setattr(figures, "save", lambda fig, path: figs.update({path.name: fig}))
    return figs


def true_signals(X, start, length=SEQ_LEN):
    """The signals of both layers for one window, float64, from `recompute` and the model's own layers."""
    model = tiny_model()
    model.use_scan("reference", "cpu")
    with torch.no_grad():
        h = model.input_proj(torch.from_numpy(X[None, start:start + length]))
        layers = []
        for layer in model.layers:
            layers.append(recompute(layer.mamba, layer.norm(h)[0].double().numpy()))
            h = layer(h, "reference")
    return layers


def sorted_by_step_size(signals):
    order = sorted(range(signals["delta"].shape[1]), key=lambda c: signals["delta"][:, c].mean())
    return {name: values if name in "BC" else values[:, order] for name, values in signals.items()}


def panels_of(fig):
    return [ax for ax in fig.axes if ax.get_label() != "<colorbar>"]


def bars_of(fig):
    return [ax for ax in fig.axes if ax.get_label() == "<colorbar>"]


def legend_of(fig):
    return [text.get_text() for text in fig.legends[0].get_texts()]


def eta(values, states):
    """1 - SS_within / SS_total of each column, looped over groups; the mean over columns."""
    shares = []
    for column in np.asarray(values, dtype=float).T:
        within = sum(((column[states == g] - column[states == g].mean())**2).sum() for g in np.unique(states))
        shares.append(1 - within / ((column - column.mean())**2).sum())
    return np.mean(shares)


def test_every_panel_of_a_layer_shows_the_signal_that_its_title_names(work, saved):
    run_here(work, "--layer", "2", "--sample", "1")
    fig = saved["m_gates_layer2_1.png"]
    series = dataset.load_series(work / "data")
    signals = sorted_by_step_size(true_signals(series.X, 932)[1])
    mean = signals["delta"].mean(axis=0)
    wanted = [("input x", "data units", "feature", series.X[932:964]),
              ("conv: the block's input after convolution and SiLU, never below −0.28", "conv",
               "channel\n(by mean Δ)", signals["conv"]),
              ("step size Δ over the channel's mean: red takes the input in and forgets, blue holds the state",
               "log₂(Δ / mean)", "channel's\nmean Δ", np.log2(signals["delta"] / mean)),
              ("gate z, before SiLU: red open, blue closed", "z", "channel\n(by mean Δ)", signals["z"]),
              ("B: how the input enters the state", "B", "SSM state", signals["B"]),
              ("C: how the state is read out", "C", "SSM state", signals["C"])]
    strip, *heatmaps = panels_of(fig)
    np.testing.assert_allclose(strip.images[0].get_array()[0], figures.circle_colors(CIRCLES)[series.states[932:964]])
    assert tuple(strip.images[0].get_extent()) == (931.5, 963.5, 0, 1) and strip.get_ylabel() == "circle"
    for ax, bar, (title, unit, label, values) in zip(heatmaps, bars_of(fig), wanted, strict=True):
        image = ax.images[0]
        np.testing.assert_allclose(image.get_array(), values.T, rtol=1e-3, atol=2e-5)
        assert image.origin == "lower"
        assert tuple(image.get_extent()) == (931.5, 963.5, -0.5, values.shape[1] - 0.5)
        assert (ax.get_title(loc="left"), bar.get_ylabel(), ax.get_ylabel()) == (title, unit, label)
        ends, signed = np.percentile(values, [1, 99]), unit != "conv"  # after SiLU, conv has no negative side
        assert image.get_cmap().name == ("RdBu_r" if signed else "viridis")
        wanted_ends = [-max(abs(ends)), max(abs(ends))] if signed else ends
        np.testing.assert_allclose(image.get_clim(), wanted_ends, rtol=1e-3, atol=1e-5)
    marked = [0, 10, 20, 31]
    assert heatmaps[2].get_yticks().tolist() == marked
    assert [tick.get_text() for tick in heatmaps[2].get_yticklabels()] == [f"{mean[i]:.2g}" for i in marked]
    assert [ax.get_xlabel() for ax in heatmaps] == [""] * 5 + ["time step"]
    assert fig.get_suptitle() == "m: layer 2 of 2, sample 1"
    assert legend_of(fig) == [str(i) for i in sorted(set(series.states[932:964].tolist()))]


def test_every_panel_of_the_summary_shows_its_layer_and_signal(work, saved, capsys):
    run_here(work, "--sample", "2", "--seed", "4")
    fig = saved["m_gates_summary_2.png"]
    series = dataset.load_series(work / "data")
    layers = true_signals(series.X, 964)
    grid = np.array(panels_of(fig)).reshape(LAYERS + 1, 7)
    assert [ax.get_title() for ax in grid[0]] == ["mean Δ of channels", "Δ", "z", "B", "C", "conv",
                                                  "η² (dotted: of input)"]
    for strip in grid[0, :6]:
        np.testing.assert_allclose(strip.images[0].get_array()[0],
                                   figures.circle_colors(CIRCLES)[series.states[964:996]])
        assert tuple(strip.images[0].get_extent()) == (963.5, 995.5, 0, 1)
    assert [ax.get_ylabel() for ax in grid[0]] == ["layer", *[""] * 6]
    steps = np.random.default_rng(4).choice(np.arange(900, 996), 96, replace=False)
    by_step = [[true_signals(series.X, start)[i] for start in (900, 932, 964)] for i in range(LAYERS)]
    shares = [{name: eta(np.concatenate([window[name] for window in windows])[steps - 900], series.states[steps])
               for name in vg.SIGNALS} for windows in by_step]
    top = 1.1 * max(eta(series.X[steps], series.states[steps]), *(max(share.values()) for share in shares))
    for i in range(LAYERS):
        trace, *heatmaps, bars = grid[i + 1]
        signals = sorted_by_step_size(layers[i])
        (line,) = trace.get_lines()
        np.testing.assert_array_equal(line.get_xdata(), np.arange(964, 996))
        np.testing.assert_allclose(line.get_ydata(), signals["delta"].mean(axis=1), rtol=1e-4)
        assert trace.get_ylabel() == str(i + 1) and trace.get_xlim() == (963.5, 995.5)
        for ax, name in zip(heatmaps, ("delta", "z", "B", "C", "conv"), strict=True):
            image, values = ax.images[0], signals[name]
            np.testing.assert_allclose(image.get_array(), ((values - values.mean(axis=0)) / values.std(axis=0)).T,
                                       rtol=1e-2, atol=2e-3)
            assert image.get_clim() == (-2.5, 2.5) and image.origin == "lower" and image.get_cmap().name == "RdBu_r"
            assert tuple(image.get_extent()) == (963.5, 995.5, 0, 1)
        assert [bar.get_height() for bar in bars.patches] == pytest.approx(list(shares[i].values()), rel=1e-3)
        assert [bar.get_x() + bar.get_width() / 2 for bar in bars.patches] == pytest.approx(range(5))
        assert bars.get_ylim() == (0, pytest.approx(top, rel=1e-3))
        assert bars.get_lines()[0].get_ydata() == pytest.approx([eta(series.X[steps], series.states[steps])] * 2)
        last = i == LAYERS - 1
        assert [tick.get_text() for tick in bars.get_xticklabels()] == (["Δ", "z", "B", "C", "conv"] if last
                                                                        else [""] * 5)
        assert [ax.get_xlabel() for ax in (trace, *heatmaps)] == ["time step" if last else ""] * 6
    (bar,) = bars_of(fig)
    assert bar.get_xlabel().startswith("standard deviations from the channel's mean")
    assert fig.get_suptitle() == "m: signals of all layers, sample 2"
    assert legend_of(fig) == [str(i) for i in sorted(set(series.states[964:996].tolist()))]
    out = capsys.readouterr().out
    assert f"of the input: {eta(series.X[steps], series.states[steps]):.3f}\n" in out
    for i, share in enumerate(shares):
        row = re.search(rf"^layer {i + 1} +(.*)$", out, re.MULTILINE)[1].split()
        assert [float(cell) for cell in row] == pytest.approx(list(share.values()), abs=0.0011)
    assert re.search(r"^ +delta +z +B +C +conv$", out, re.MULTILINE)


@pytest.mark.parametrize("layer", [None, 2])
def test_every_umap_is_that_of_the_signal_and_layer_that_it_names(work, saved, monkeypatch, layer):
    calls = []

    def embed(values, graph, seed):
        calls.append((values, graph, seed))
        return values[:, :2] + 7

    monkeypatch.setattr(vg, "umap_embedding", embed)
    run_here(work, "--umap", "--umap-points", "60", "--seed", "6", *(["--layer", str(layer)] if layer else []))
    series = dataset.load_series(work / "data")
    steps = np.random.default_rng(6).choice(np.arange(900, 996), 60, replace=False)
    windows = [true_signals(series.X, start) for start in (900, 932, 964)]
    prefix = f"m_gates_layer{layer}" if layer else "m_gates"
    assert list(saved) == [f"{prefix}_umap_{name}.png" for name in ("delta", "z", "B", "C", "conv")]
    for name, symbol in (("delta", "Δ"), ("z", "z"), ("B", "B"), ("C", "C"), ("conv", "conv")):
        fig = saved[f"{prefix}_umap_{name}.png"]
        assert fig.get_suptitle() == f"m: UMAP of {symbol} at 60 validation steps"
        shown = [2] if layer else [1, 2]
        assert len(fig.axes) == len(shown)
        for ax, number in zip(fig.axes, shown, strict=True):
            values = np.concatenate([window[number - 1][name] for window in windows])[steps - 900]
            scaled = (values - values.mean(axis=0)) / values.std(axis=0)
            given, graph, seed = calls.pop(0)
            np.testing.assert_allclose(given, scaled, rtol=1e-2, atol=2e-3)
            distances = np.linalg.norm(given[:, None] - given, axis=2)
            np.testing.assert_array_equal(graph[1], distances.argsort(axis=1)[:, 1:15])
            assert seed == 6
            np.testing.assert_allclose(ax.collections[0].get_offsets(), scaled[:, :2] + 7, rtol=1e-2, atol=2e-3)
            np.testing.assert_allclose(ax.collections[0].get_facecolors()[:, :3],
                                       figures.circle_colors(CIRCLES)[series.states[steps]])
            assert ax.get_title() == f"layer {number}   (η² {eta(values, series.states[steps]):.2f})"
    assert not calls


@pytest.mark.parametrize("layer", [None, 1])
def test_each_sample_is_the_window_of_its_number(work, saved, layer):
    run_here(work, "--sample", "1", "--n-samples", "2", *(["--layer", str(layer)] if layer else []))
    kind = f"layer{layer}" if layer else "summary"
    assert list(saved) == [f"m_gates_{kind}_1.png", f"m_gates_{kind}_2.png"]
    series = dataset.load_series(work / "data")
    for number, start, fig in zip((1, 2), (932, 964), saved.values(), strict=True):
        assert fig.get_suptitle().endswith(f", sample {number}")
        strip, *others = panels_of(fig)
        np.testing.assert_allclose(strip.images[0].get_array()[0],
                                   figures.circle_colors(CIRCLES)[series.states[start:start + 32]])
        assert strip.images[0].get_extent()[0] == start - 0.5
        if layer:
            np.testing.assert_array_equal(others[0].images[0].get_array(), series.X[start:start + 32].T)
        else:
            first_trace = fig.axes[7].get_lines()[0]
            np.testing.assert_allclose(first_trace.get_ydata(), true_signals(series.X, start)[0]["delta"].mean(axis=1),
                                       rtol=1e-4)


def test_more_umap_points_than_steps_are_all_taken(work, saved, monkeypatch, capsys):
    monkeypatch.setattr(vg, "umap_embedding", lambda values, graph, seed: values[:, :2])
    run_here(work, "--umap", "--umap-points", "97", "--layer", "1")
    assert "have 96 steps: all are taken" in capsys.readouterr().out
    assert saved["m_gates_layer1_umap_z.png"].get_suptitle() == "m: UMAP of z at 96 validation steps"


def test_eta_squared_is_taken_over_so_many_steps_at_most(work, monkeypatch):
    monkeypatch.setattr(vg, "ANOVA_POINTS", 40)
    model, series = tiny_model(), dataset.load_series(work / "data")
    model.use_scan("reference", "cpu")
    _, share = vg.explained_by_circle(model, series, np.array([900, 932, 964]), SEQ_LEN, seed=1)
    steps = np.random.default_rng(1).choice(np.arange(900, 996), 40, replace=False)
    assert share == pytest.approx(eta(series.X[steps], series.states[steps]))


def test_device_and_scan_are_those_asked_for(work, saved, monkeypatch):
    asked, picked = [], []
    open_model, pick = mamba_model.open_model, cli.pick_device
    monkeypatch.setattr(mamba_model, "open_model", lambda *given: asked.append(given) or open_model(*given))
    monkeypatch.setattr(cli, "pick_device", lambda name: picked.append(name) or pick("cpu"))
    run_here(work, "--device", "a name", "--layer", "1")
    assert picked == ["a name"]
    assert asked == [(work / "ckpt" / "m.pt", work / "data", torch.device("cpu"), "reference")]


def test_without_flags_the_readmes_defaults_hold():
    assert vars(vg.parse_args(["--checkpoint", "m.pt"])) == {"format": "png", "style": None,
        "layer": None, "sample": 0, "n_samples": 1, "umap": False, "umap_points": 3000, "seed": 42, "device": "auto",
        "scan": "auto", "checkpoint": Path("m.pt"), "data_dir": None, "save_dir": Path("plots"), "settings": ""}


def test_umap_names_a_grid_a_signal_and_colours_by_circle(monkeypatch, work):
    drawn = []
    real = figures.draw_umaps
    monkeypatch.setattr(vg, "umap_embedding", lambda values, graph, seed: values[:, :2])
    monkeypatch.setattr(figures, "draw_umaps", lambda *given: drawn.append(given) or real(*given))
    run_here(work, "--umap", "--umap-points", "50")
    assert plots(work) == sorted(f"m_gates_umap_{name}.png" for name in vg.SIGNALS)
    assert all(len(embeddings) == LAYERS for embeddings, *_ in drawn)
    series = dataset.load_series(work / "data")
    steps = vg.sample_steps(vg.sample_starts(N_STEPS, SEQ_LEN, 0.1), SEQ_LEN, 50, np.random.default_rng(42))
    np.testing.assert_array_equal(drawn[0][2], series.states[steps])
    run_here(work, "--umap", "--umap-points", "50", "--layer", "2")
    assert f"m_gates_layer2_umap_{vg.SIGNALS[0]}.png" in plots(work)
    assert len(drawn[-1][0]) == 1


# Whole runs


def test_samples_get_a_figure_each_and_the_names_of_checkpoint_and_layer(work, capsys):
    run_here(work, "--layer", "2", "--sample", "1", "--n-samples", "2")
    assert plots(work) == ["m_gates_layer2_1.png", "m_gates_layer2_2.png"]
    run_here(work)
    assert plots(work) == ["m_gates_layer2_1.png", "m_gates_layer2_2.png", "m_gates_summary_0.png"]
    table = capsys.readouterr().out
    assert re.search(r"^layer 2( +\d\.\d{3}){5}$", table, re.MULTILINE)
    assert (work / "plots" / "m_gates_summary_0.png").read_bytes().startswith(b"\x89PNG")


def imported(importtime_log):
    """Top-level packages in the log of python -X importtime."""
    return set(re.findall(r"\| +(\w+)$", importtime_log, re.MULTILINE))


def test_command_line_end_to_end_without_umap_and_numba(work):
    done = subprocess.run([sys.executable, "-X", "importtime", SCRIPT, *flags(work, "--layer", "1")],
                          capture_output=True, text=True, check=True, cwd=work)
    assert done.stdout.splitlines()[-1].endswith("m_gates_layer1_0.png")
    assert plots(work) == ["m_gates_layer1_0.png"]
    assert "torch" in imported(done.stderr)
    assert not imported(done.stderr) & {"umap", "numba"}


def test_real_umap_end_to_end(work):
    command = [sys.executable, SCRIPT, *flags(work, "--umap", "--umap-points", "60", "--layer", "1")]
    subprocess.run(command, capture_output=True, check=True, cwd=work)
    assert plots(work) == sorted(f"m_gates_layer1_umap_{name}_umap_points60.png" for name in vg.SIGNALS)
    first = {path.name: path.read_bytes() for path in (work / "plots").iterdir()}
    subprocess.run(command, capture_output=True, check=True, cwd=work)
    assert first == {path.name: path.read_bytes() for path in (work / "plots").iterdir()}


def other_model(work):
    save_model(work / "ckpt" / "other.pt", tiny_model(feature_dim=FEATURES + 1), seq_len=SEQ_LEN, val_fraction=0.1)


def damaged_model(work):
    whole = (work / "ckpt" / "m.pt").read_bytes()
    (work / "ckpt" / "damaged.pt").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(("prepare", "checkpoint", "more", "words"), [
    (None, "m.pt", ["--layer", "3"], "layers 1…2"),
    (None, "m.pt", ["--layer", "3", "--umap"], "layers 1…2"),
    (None, "m.pt", ["--sample", "3"], "samples 0…2"),
    (None, "m.pt", ["--sample", "2", "--n-samples", "2"], "samples 0…2"),
    (None, "m.pt", ["--umap", "--umap-points", "10"], "--umap-points"),
    (None, "m.pt", ["--data-dir", "nowhere"], "nowhere"),
    (None, "gone.pt", [], "not found"),
    (damaged_model, "damaged.pt", [], "damaged"),
    (other_model, "other.pt", [], "predicts 4 features"),
])
def test_bad_input_ends_with_one_line_and_leaves_files_alone(work, capsys, prepare, checkpoint, more, words):
    if prepare:
        prepare(work)
    (work / "plots").mkdir()
    stem = checkpoint.removesuffix(".pt")
    old = work / "plots" / f"{stem}_gates_summary_0.png"
    old.write_bytes(b"precious")
    with pytest.raises(SystemExit) as stop:
        run_here(work, *more, checkpoint=checkpoint)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert plots(work) == [old.name]
    assert old.read_bytes() == b"precious"


@pytest.mark.parametrize("bad", [["--layer", "0"], ["--layer", "x"], ["--sample", "-1"], ["--n-samples", "0"],
                                 ["--umap-points", "0"], ["--scan", "fast"]])
def test_bad_flags_are_refused_when_parsed(bad, capsys):
    with pytest.raises(SystemExit) as stop:
        vg.parse_args(["--checkpoint", "m.pt", *bad])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_loads_nothing_slow():
    done = subprocess.run([sys.executable, "-X", "importtime", SCRIPT, "--help"], capture_output=True, text=True,
                          check=True)
    assert "--umap-points" in done.stdout
    assert "argparse" in imported(done.stderr)
    assert not imported(done.stderr) & {"torch", "umap", "numpy", "matplotlib", "numba"}
