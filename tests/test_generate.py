"""generate.py and its steppers: against the model run over the whole prefix, and brute force."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import arrays_of
from figure_checks import (
    bursts_marked,
    check_circle_legend,
    check_heatmap,
    check_strip,
    colour_bars,
    left_title,
    lines,
)
from matplotlib.colors import to_rgb

import circle_process
import cli
import figures
import generate
import optimal_filter
import songs
from kernels import step_cpu
from mamba_model import CausalTimeSeriesMamba, load_checkpoint, save_checkpoint

ROOT = Path(generate.__file__).parent
SHAPES = [
    {"feature_dim": 3, "d_model": 16, "n_layers": 2, "d_state": 4, "d_ff": 32},
    # nothing here is a multiple of a SIMD vector, and there is no convolution state
    {"feature_dim": 5, "d_model": 27, "n_layers": 3, "d_state": 5, "d_ff": 33, "d_conv": 1, "expand": 3},
]


def make_model(dtype=torch.float64, scan="reference", seed=0, **shape):
    torch.manual_seed(seed)
    model = CausalTimeSeriesMamba(**{**SHAPES[0], **shape}).to(dtype).eval()
    with torch.no_grad():  # far from initialisation, so that every parameter matters
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.use_scan(scan, "cpu")


def make_seed(model, n=3, length=9):
    return 3 * np.random.default_rng(1).standard_normal((n, length, model.feature_dim))


def parse(*flags):
    return generate.parse_args(["--checkpoint", "m.pt", *flags])


# ---- generation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", ["reference", "cpu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_is_the_prefix_run_again_at_each_step(shape, scan):
    model = make_model(scan=scan, **shape)
    seed = make_seed(model)
    x = torch.as_tensor(seed)
    with torch.no_grad():
        for _ in range(25):
            x = torch.cat([x, model(x)["1"][:, -1:]], dim=1)
    generated, predictions = generate.generate(model, seed, 25)
    np.testing.assert_allclose(generated, x[:, seed.shape[1]:], rtol=0, atol=1e-9)
    np.testing.assert_array_equal(generated, predictions)


def test_a_seed_shorter_than_the_convolution():
    model = make_model()
    seed = make_seed(model, length=1)
    x = torch.as_tensor(seed)
    with torch.no_grad():
        for _ in range(6):
            x = torch.cat([x, model(x)["1"][:, -1:]], dim=1)
    np.testing.assert_allclose(generate.generate(model, seed, 6)[0], x[:, 1:], rtol=0, atol=1e-9)


HEADS = [(0, 0.0), (5, 0.0), (5, 1.0), (6, 0.4)]  # components and temperature


def sing(model, seed, n_steps, temperature, bursts=None, random_seed=42):
    """A point head with noise, a mixture at its temperature: (generated, predictions)."""
    noise_std = 0.0 if model.mixture else 0.5
    return generate.generate(model, seed, n_steps, noise_std, bursts, random_seed, temperature)


def by_both(monkeypatch, model, stepper, *arguments):
    """What the plain loop and another stepper give: two pairs (generated, predictions)."""
    results = []
    for one in (generate.loop_stepper, stepper):
        monkeypatch.setattr(generate, "choose_stepper", lambda model, one=one: one)
        results.append(sing(model, *arguments))
    return results


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 4, 6])  # less than a tile, one, and more
@pytest.mark.parametrize("mixture, temperature", HEADS)
def test_cpu_stepper_is_the_plain_loop(monkeypatch, shape, n, dtype, tolerance, mixture, temperature):
    monkeypatch.setattr(generate, "BLOCK", 20)
    model = make_model(dtype, **shape, mixture=mixture)
    for layers in ((0, 1), None) if n == 4 else ((0, 1),):  # None: bursts on what the model reads
        bursts = generate.Bursts(12, 5, 2.0, layers)  # the third one, from step 36 on, lies on the border of two blocks
        loop, fast = by_both(monkeypatch, model, step_cpu.stepper, make_seed(model, n), 45, temperature, bursts)
        for one, other in zip(loop, fast, strict=True):
            np.testing.assert_allclose(other, one, rtol=0, atol=tolerance * np.abs(one).max())


def test_reference_scan_takes_the_plain_loop():
    assert generate.choose_stepper(make_model(scan="reference")) is generate.loop_stepper
    assert generate.choose_stepper(make_model(scan="cpu")) is step_cpu.stepper


@pytest.mark.parametrize("mixture, temperature", HEADS)
def test_the_block_size_does_not_matter(monkeypatch, mixture, temperature):
    model, bursts = make_model(scan="cpu", mixture=mixture), generate.Bursts(10, 3, 1.0, (1,))
    whole = sing(model, make_seed(model), 47, temperature, bursts)[0]
    monkeypatch.setattr(generate, "BLOCK", 8)
    np.testing.assert_array_equal(sing(model, make_seed(model), 47, temperature, bursts)[0], whole)


@pytest.mark.parametrize("bursts", [None, generate.Bursts(10, 3, 1.0), generate.Bursts(10, 3, 1.0, (1,))])
@pytest.mark.parametrize("mixture, temperature", HEADS)
def test_a_larger_batch_only_adds_samples(bursts, mixture, temperature):
    model = make_model(scan="cpu", mixture=mixture)
    seed = make_seed(model, 6)
    small = sing(model, seed[:2], 20, temperature, bursts)[0]
    np.testing.assert_allclose(sing(model, seed, 20, temperature, bursts)[0][:2], small, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mixture, temperature", [(0, 0.0), (5, 1.0)])
def test_the_seed_fixes_the_noise(mixture, temperature):
    model = make_model(scan="cpu", mixture=mixture)
    one, same, other = (sing(model, make_seed(model), 30, temperature, None, s)[0] for s in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1


def test_temperature_noise_has_the_std_asked_for_and_is_fed_back():
    model = make_model(scan="cpu")
    seed = make_seed(model, 2)
    generated, predictions = generate.generate(model, seed, 3000, noise_std=2.0)
    noise = generated - predictions
    assert noise.std() == pytest.approx(2.0, rel=0.03)
    assert abs(noise.mean()) < 0.06
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.05
    whole = torch.as_tensor(np.concatenate([seed, generated], axis=1))[:, :60]
    with torch.no_grad():
        again = model(whole)["1"][:, seed.shape[1] - 1:-1]
    np.testing.assert_allclose(predictions[:, :again.shape[1]], again, rtol=0, atol=1e-9)


@pytest.mark.parametrize("interval, duration, n_steps", [(10, 3, 35), (5, 5, 17), (7, 1, 7), (4, 2, 9)])
def test_burst_steps(interval, duration, n_steps):
    expected = [any(first <= t < first + duration for first in range(interval, n_steps, interval))
                for t in range(n_steps)]
    assert generate.burst_steps(n_steps, generate.Bursts(interval, duration, 1.0)).tolist() == expected
    assert not generate.burst_steps(n_steps, None).any()


@pytest.mark.parametrize("layers", [None, (0,), (1,)])
def test_a_burst_changes_nothing_before_it_is_read(layers):
    model = make_model(scan="cpu")
    calm = generate.generate(model, make_seed(model), 40)[0]
    shaken, predictions = generate.generate(model, make_seed(model), 40, bursts=generate.Bursts(12, 3, 5.0, layers))
    np.testing.assert_array_equal(shaken, predictions)  # burst noise is not part of the series
    np.testing.assert_array_equal(shaken[:, :13], calm[:, :13])
    assert (np.abs(shaken - calm)[:, 13:16].max(axis=2) > 1e-3).all()


def test_hidden_bursts_hit_the_layers_and_steps_asked_for(monkeypatch):
    model, seen = make_model(), []

    def spy(model, n, sampling):
        def advance(draws, start):
            seen.append((draws.own + draws.observation, draws.burst, draws.hidden))
            return np.zeros_like(draws.own), np.zeros_like(draws.own)
        return advance

    monkeypatch.setattr(generate, "choose_stepper", lambda model: spy)
    generate.generate(model, make_seed(model, 2), 3000, bursts=generate.Bursts(100, 20, 4.0, (1,)))
    burst = np.concatenate([part[1] for part in seen])
    np.testing.assert_array_equal(burst >= 0, generate.burst_steps(3000, generate.Bursts(100, 20, 4.0)))
    for noise, rows, hidden in seen:
        assert not noise.any()
        assert not hidden[:, :, 0].any()
        assert sorted(rows[rows >= 0]) == list(range(hidden.shape[1]))
        assert hidden[:, :, 1].std() == pytest.approx(4.0, rel=0.05)


def test_output_bursts_have_the_std_asked_for_and_only_in_the_bursts(monkeypatch):
    model, seen = make_model(), []

    def spy(model, n, sampling):
        def advance(draws, start):
            seen.append((draws.own + draws.observation, draws.burst))
            return np.zeros_like(draws.own), np.zeros_like(draws.own)
        return advance

    monkeypatch.setattr(generate, "choose_stepper", lambda model: spy)
    bursts = generate.Bursts(10, 4, 3.0)
    generate.generate(model, make_seed(model, 2), 3000, bursts=bursts)
    noise = np.concatenate([part[0] for part in seen], axis=1)
    inside = generate.burst_steps(3000, bursts)
    assert noise[:, inside].std() == pytest.approx(3.0, rel=0.03)
    assert not noise[:, ~inside].any()
    assert all((part[1] == -1).all() for part in seen)


@pytest.mark.parametrize("scan", ["reference", "cpu"])
def test_the_states_are_made_anew_from_what_was_read(monkeypatch, scan):
    model = make_model(scan=scan)
    monkeypatch.setattr(generate, "BLOCK", 7)
    monkeypatch.setattr(generate, "RENEWAL", 3)
    seed, noise = make_seed(model, 2), []
    draw_noise = generate.draw_noise
    monkeypatch.setattr(generate, "draw_noise", lambda *args: noise.append(draw_noise(*args)) or noise[-1])
    generated, predictions = generate.generate(model, seed, 40, bursts=generate.Bursts(9, 4, 2.0), memory=5)
    assert sorted(generate.block_edges(40, 15)) == [0, 7, 14, 15, 21, 28, 30, 35, 40]
    read = np.concatenate([seed, generated + np.concatenate([draws.observation for draws in noise], axis=1)], axis=1)
    first = seed.shape[1]
    with torch.no_grad():
        for t in (15, 16, 29, 30, 31, 39):  # what the model saw: all since the last renewal, and 5 steps before it
            begin = first + t // 15 * 15 - 5
            expected = model(torch.as_tensor(read[:, begin:first + t], dtype=model.input_proj.weight.dtype))["1"][:, -1]
            np.testing.assert_allclose(predictions[:, t], expected, rtol=1e-4, atol=1e-4)
        expected = model(torch.as_tensor(read[:, :first + 14], dtype=model.input_proj.weight.dtype))["1"][:, -1]
        np.testing.assert_allclose(predictions[:, 14], expected, rtol=1e-4, atol=1e-4)


# ---- the CUDA kernels ------------------------------------------------------------------------------------------

INTERPRETED = """
import numpy as np, torch
import generate; from kernels import step_cuda
from test_generate import HEADS, make_model, make_seed, sing
step_cuda.SEGMENT = 3
shape = {"feature_dim": 5, "d_model": 10, "n_layers": 2, "d_state": 3, "d_ff": 9, "d_conv": 3, "expand": 1}
for (mixture, temperature), constant in zip(HEADS, ((), ("B", "z"), ("delta", "C"), ("z",)), strict=True):
    model = make_model(torch.float32, **shape, mixture=mixture, constant=constant)
    results = []
    for stepper in (generate.loop_stepper, step_cuda.stepper):
        generate.choose_stepper = lambda model, stepper=stepper: stepper
        results.append(sing(model, make_seed(model, 2), 5, temperature, generate.Bursts(2, 1, 3.0, (1,))))
    for loop, fast in zip(*results):
        assert np.abs(loop - fast).max() < 1e-5 * np.abs(loop).max(), np.abs(loop - fast).max()
"""


def test_cuda_kernels_in_the_interpreter_are_the_plain_loop():
    pytest.importorskip("triton")
    run_python("-c", INTERPRETED, TRITON_INTERPRET="1", PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("bursts", [None, generate.Bursts(40, 7, 2.0), generate.Bursts(40, 7, 2.0, (0, 2))])
@pytest.mark.parametrize("n", [1, 3, 17])
@pytest.mark.parametrize("shape", [{}, {"feature_dim": 5, "d_model": 48, "n_layers": 3, "d_state": 5, "d_ff": 33}])
@pytest.mark.parametrize("mixture, temperature", [*HEADS, (16, 1.0)])
def test_cuda_graph_is_the_plain_loop(monkeypatch, shape, n, bursts, mixture, temperature):
    from kernels import step_cuda

    torch.manual_seed(0)
    model = CausalTimeSeriesMamba(**shape, mixture=mixture).cuda().eval().use_scan("auto", "cuda")
    assert generate.choose_stepper(model) is step_cuda.stepper
    loop, fast = by_both(monkeypatch, model, step_cuda.stepper, make_seed(model, n), 300, temperature, bursts)
    for one, other in zip(loop, fast, strict=True):
        # A draw within rounding of the border between two components may fall on either side; from there on the two
        # songs differ. It is rare: no sample may meet it in this many steps but one in a thousand.
        same = np.abs(other - one).max(axis=(1, 2)) <= 2e-4 * np.abs(one).max()
        assert same.all() or (temperature and n > 1 and same.sum() >= n - 1)


# ---- a mixture head --------------------------------------------------------------------------------------------


def test_temperature_1_draws_from_the_predicted_mixture_and_feeds_the_draw_back():
    model = make_model(scan="cpu", mixture=3)
    seed = make_seed(model, 2)
    generated, predictions = generate.generate(model, seed, 1500, temperature=1.0)
    series = torch.as_tensor(np.concatenate([seed, generated], axis=1))
    first = seed.shape[1] - 1
    with torch.no_grad():
        predicted = model.distribution(series)["1"]
        means = model(series)["1"][:, first:-1]
    np.testing.assert_allclose(predictions, means, rtol=0, atol=1e-9)
    # Each component's share of the draws and the distance of the draws from its mean, against a draw by torch.
    log_density = predicted.log_prob(torch.roll(series, -1, 1))[:, first:-1]
    torch.manual_seed(0)
    expected = predicted.log_prob(predicted.sample())[:, first:-1]
    error = float(expected.std()) / log_density.numel()**0.5
    assert abs(float(log_density.mean() - expected.mean())) < 5 * error
    assert float(log_density.std()) == pytest.approx(float(expected.std()), rel=0.1)


def test_temperature_0_plays_the_mean():
    model = make_model(mixture=3)
    generated, predictions = generate.generate(model, make_seed(model), 20)
    np.testing.assert_array_equal(generated, predictions)
    x = torch.as_tensor(make_seed(model))
    with torch.no_grad():
        for _ in range(20):
            x = torch.cat([x, model(x)["1"][:, -1:]], dim=1)
    np.testing.assert_allclose(generated, x[:, -20:], rtol=0, atol=1e-9)


def test_a_point_head_has_nothing_to_draw_from():
    model = make_model()
    with pytest.raises(ValueError, match="point head"):
        generate.generate(model, make_seed(model), 5, temperature=1.0)


# ---- seeds, flags, names ---------------------------------------------------------------------------------------


def test_seed_windows_lie_in_the_series_and_leave_truth_behind_them():
    starts = generate.seed_windows(1000, 100, 200, 3, 400)
    assert starts[0] == 400
    assert len(set(starts)) == 3
    assert (starts + 300 <= 1000).all()
    np.testing.assert_array_equal(generate.seed_windows(1000, 100, 5000, 1, 900), [900])
    assert (generate.seed_windows(1000, 100, 500, 4, 700) + 100 <= 1000).all()


@pytest.mark.parametrize("seed_len, offset, wanted", [(1001, 0, "--seed-len"), (100, 901, "--seed-offset")])
def test_seeds_that_do_not_fit(seed_len, offset, wanted):
    assert generate.seed_windows(1000, min(seed_len, 1000), 10, 1, min(offset, 900)).tolist() == [min(offset, 900)]
    with pytest.raises(cli.UserError, match=wanted):
        generate.seed_windows(1000, seed_len, 10, 3, offset)


@pytest.mark.parametrize("flags, wanted", [
    (["--perturb-hidden"], "--perturb-interval"),
    (["--perturb-scale", "3"], "--perturb-interval"),
    (["--perturb-duration", "3"], "--perturb-interval"),
    (["--perturb-interval", "10", "--perturb-layers", "1"], "--perturb-hidden"),
    (["--perturb-interval", "10", "--perturb-duration", "11"], "--perturb-duration"),
    (["--perturb-interval", "10", "--perturb-hidden", "--perturb-layers", "0"], "above 0"),
    (["--compare", "--perturb-hidden"], "--compare"),
    (["--temperature", "-1"], "--temperature"),
    (["--temperature", "nan"], "--temperature"),
    (["--gen-len", "0"], "--gen-len"),
    (["--seed-offset", "-1"], "--seed-offset"),
])
def test_bad_flags(capsys, flags, wanted):
    with pytest.raises(SystemExit) as stop:
        parse(*flags)
    assert stop.value.code == cli.EXIT_BAD_INPUT
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert wanted in message


def test_layers_count_from_one():
    args = parse("--perturb-interval", "50", "--perturb-hidden", "--perturb-layers", "3", "1,3")
    assert generate.layers_to_perturb(args, 3) == (0, 2)
    with pytest.raises(cli.UserError, match="2 layers"):
        generate.layers_to_perturb(args, 2)
    args = parse("--perturb-interval", "50", "--perturb-hidden")
    assert generate.layers_to_perturb(args, 3) == (0, 1, 2)


def test_runs_with_different_settings_have_different_names():
    bursts = ["--perturb-interval", "200"]
    runs = [[], ["--seed-len", "64"], ["--gen-len", "64"], ["--n-samples", "64"], ["--seed-offset", "64"],
            ["--seed", "64"], ["--temperature", "64"], ["--temperature", "0.5"], ["--temperature", "0.50000001"],
            bursts, [*bursts, "--perturb-hidden"], [*bursts, "--perturb-hidden", "--perturb-layers", "1", "2"],
            [*bursts, "--perturb-hidden", "--perturb-layers", "12"], [*bursts, "--perturb-scale", "3"],
            [*bursts, "--perturb-duration", "3"], ["--perturb-interval", "100"], ["--seed-offset", "0"]]
    runs += [[*run, "--compare"] for run in runs if "--perturb-hidden" not in run]
    names = [generate.file_prefix(parse(*run)) for run in runs]
    # --compare --perturb-interval 200 asks for what --compare does anyway
    assert len(set(names)) == len(names) - 1
    assert generate.file_prefix(parse()) == "m_generated"
    assert generate.file_prefix(parse("--compare", *bursts)) == "m_compare"
    assert generate.file_prefix(parse("--gen-len", "2048", *bursts, "--perturb-hidden", "--perturb-scale", "50")) \
        == "m_generated_g2048_hidden200x50x10"


def toy_series(n_steps=3000, seed=0, noise_std=0.5):
    """A small series of the process, written out step by step, as a dataset.Series."""
    import dataset

    rng, K, dim = np.random.default_rng(seed), 3, 6
    periods, radii, entry = np.array([8, 12, 16]), np.array([5.0, 6.0, 5.5]), np.array([0.3, 2.0, 4.0])
    planes = np.stack([np.linalg.qr(rng.standard_normal((dim, 2)))[0].T for _ in range(K)])
    P = np.array([[0, 0.8, 0.2], [0.3, 0, 0.7], [0.5, 0.5, 0]])
    states, thetas, circle = [], [], 0
    while len(states) < n_steps:
        steps = periods[circle] * max(1, round(rng.normal(40, 8) / periods[circle]))
        states += [circle] * steps
        thetas += list((entry[circle] + 2 * np.pi / periods[circle] * np.arange(steps)) % (2 * np.pi))
        circle = rng.choice(K, p=P[circle])
    states, thetas = np.array(states[:n_steps]), np.array(thetas[:n_steps])
    X = np.cos(thetas)[:, None] * planes[states, 0] + np.sin(thetas)[:, None] * planes[states, 1]
    X = (radii[states, None] * X + noise_std * rng.standard_normal(X.shape)).astype(np.float32)
    config = {"noise_std": noise_std, "dwell_mean": 40, "dwell_std": 8, "drift": False, "center_walk_std": 0}
    process = circle_process.Process(radii, entry, periods, P, planes)
    return dataset.Series(X, states, thetas, process, config)


@pytest.fixture(scope="module")
def toy():
    series = toy_series()
    return series, optimal_filter.process_from_series(series)


# ---- end to end ------------------------------------------------------------------------------------------------


def run_python(*command, **environment):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, toy):
    """Flags that name a checkpoint and its data."""
    folder, (series, _) = tmp_path_factory.mktemp("generate"), toy
    write_series(folder, series, series.config)
    model = make_model(torch.float32, feature_dim=6, d_model=16, n_layers=2, d_state=4, d_ff=32)
    save_checkpoint(folder / "m.pt", 1, model.state_dict(), {}, 1.0, 1.0, {"val_fraction": 0.5})
    return ["--checkpoint", folder / "m.pt", "--data-dir", folder]


def write_series(data_dir, series, config):
    np.savez(data_dir / "data.npz", **arrays_of(series))
    (data_dir / "config.json").write_text(json.dumps(config))


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_end_to_end(script, inputs, toy, tmp_path):
    series, _ = toy
    done = script("generate", *inputs, "--save-dir", tmp_path, "--gen-len", 90, "--seed-len", 40,
                  "--temperature", 0.5, "--perturb-interval", 30, "--perturb-hidden", "--perturb-layers", 2)
    assert done.code == 0, done.err
    prefix = "m_generated_s40_g90_T0.5_hidden30x20x10_L2"
    assert "95 % by chance" in done.out
    assert names_in(tmp_path) == {f"{prefix}{end}" for end in (".npz", "_seed.png", "_truth.png", "_song.png")}
    with np.load(tmp_path / f"{prefix}.npz", allow_pickle=False) as arrays:
        assert arrays["generated"].shape == arrays["predictions"].shape == (3, 90, 6)
        assert arrays["seed_starts"][0] == 1500
        for start, seed in zip(arrays["seed_starts"], arrays["seed"], strict=True):
            np.testing.assert_array_equal(seed, series.X[start:start + 40])
        np.testing.assert_array_equal(np.flatnonzero(arrays["perturbed"]), [*range(30, 40), *range(60, 70)])
        assert arrays["labels"].shape == arrays["deviation"].shape == (3, 90)


def test_compare_end_to_end(script, inputs, tmp_path):
    done = script("generate", *inputs, "--save-dir", tmp_path, "--gen-len", 250, "--compare")
    assert done.code == 0, done.err
    assert names_in(tmp_path) == {"m_compare_g250.png", "m_compare_g250.json"}
    numbers = json.loads((tmp_path / "m_compare_g250.json").read_text())
    assert "--compare" in numbers.pop("made_by")["command"]
    assert list(numbers) == ["real series", "greedy", "temperature 1", "output bursts", "hidden bursts"]
    for name in numbers:
        assert name in done.out
    assert numbers["real series"]["steps_on_process"] == [250] * 2  # the seeds lie closer together than a song is long


def test_data_that_the_filter_does_not_know_and_no_truth(script, refused, inputs, toy, tmp_path):
    write_series(tmp_path, toy[0], {})
    flags = [*inputs[:2], "--data-dir", tmp_path, "--save-dir", tmp_path / "plots"]
    done = script("generate", *flags, "--gen-len", 30, "--seed-len", 100, "--seed-offset", 2900)
    assert done.code == 0, done.err
    assert "no exact filter" in done.out
    assert "no true continuation" in done.out
    assert names_in(tmp_path / "plots") == {f"m_generated_s100_g30_o2900{end}" for end in (".npz", "_seed.png")}
    assert "noise_std" in refused("generate", *flags, "--temperature", 1)
    assert "--compare" in refused("generate", *flags, "--compare")


@pytest.mark.parametrize("flags, wanted", [
    (["--seed-len", "4000"], "--seed-len 4000"),
    (["--seed-offset", "2900"], "--seed-offset 2900"),
    (["--perturb-interval", "20", "--perturb-hidden", "--perturb-layers", "3"], "2 layers"),
])
def test_bad_input_leaves_nothing(refused, inputs, flags, wanted, tmp_path):
    assert wanted in refused("generate", *inputs, *flags, "--save-dir", tmp_path / "never")
    assert not (tmp_path / "never").exists()


# ---- every flag, every number, every panel ---------------------------------------------------------------------

NOISE_STD = 0.5  # of the toy series; its checkpoint has val_fraction 0.5: the first seed starts at step 1500


def song_step_by_step(model, seeds, n_steps, noise_std, bursts, random_seed):
    """What the model sings, one call of `model.step` after the other."""
    generated, predictions = np.zeros((2, len(seeds), n_steps, 6))
    for i, seed in enumerate(seeds):
        own, of_bursts, _ = (np.random.default_rng([random_seed, i, k]) for k in range(3))
        prediction, states = model.prefill(torch.as_tensor(seed[None]))
        for t in range(n_steps):
            predictions[i, t] = prediction["1"][0]
            generated[i, t] = predictions[i, t] + (noise_std * own.standard_normal(6) if noise_std else 0)
            read, on_layer = generated[i, t].copy(), {}
            if bursts and t >= bursts["interval"] and t % bursts["interval"] < bursts["duration"]:
                if bursts["layers"]:
                    for layer in bursts["layers"]:
                        on_layer[layer] = bursts["scale"] * of_bursts.standard_normal(model.d_model)
                else:
                    read += bursts["scale"] * of_bursts.standard_normal(6)

            def perturb(layer, h, on_layer=on_layer):
                return h + torch.as_tensor(on_layer.get(layer, np.zeros(model.d_model)), dtype=h.dtype)

            with torch.no_grad():
                prediction, states = model.step(torch.as_tensor(read[None], dtype=torch.float32), states, perturb)
    return generated, predictions


WINDOW, ALLOWED = 4, scipy.stats.chi2.isf(1e-5, 4 * 6) * NOISE_STD**2 / (4 * 6)  # half of 8 steps; 6 features


def judged(process, seeds, generated):
    """What the analysis finds of songs, one sample and step at a time: [labels, thetas, log-likelihood, deviation, on],
    (n, n_steps) each, and the visits, a list of (sample, circle, first, end, entered, left)."""
    found, visits = [], []
    for sample, (seed, song) in enumerate(zip(seeds, generated, strict=True)):
        X = np.concatenate([seed, song]).astype(float)
        smoothed = optimal_filter.smooth(process, X, "stationary")
        squared = [((x - process.radii[i] * (np.cos(a) * process.planes[i, 0] + np.sin(a) * process.planes[i, 1]))**2
                    ).sum() for x, i, a in zip(X, smoothed["circle"], smoothed["theta"], strict=True)]
        means = []
        for t in range(len(X)):
            first = min(max(t - WINDOW // 2, 0), len(X) - WINDOW)
            means.append(sum(squared[first:first + WINDOW]) / WINDOW / 6)
        on = np.array(means) <= ALLOWED
        values = (smoothed["circle"], smoothed["theta"], smoothed["log_likelihood"], np.sqrt(means), on)
        found.append([value[len(seed):] for value in values])
        groups, t = [], -len(seed)
        for circle, steps in itertools.groupby(np.where(on, smoothed["circle"], -1).tolist()):
            n = len(list(steps))
            groups.append((circle, t, t + n))
            t += n
        for (before, *_), (circle, first, end), (after, *_) in zip([(-1,), *groups], groups, [*groups[1:], (-1,)],
                                                                   strict=False):
            if circle >= 0 and end > 0:
                visits.append((sample, circle, first, end, int(before >= 0), int(after >= 0)))
    return [np.array(value) for value in zip(*found, strict=True)], visits


def song_numbers(process, found, visits, clock_errors):
    """The row of a song in the JSON and in the table, counted one step at a time."""
    K, P, (labels, _, log_likelihood, _, on) = process.n_circles, process.transition_matrix, found
    counts = np.zeros((K, K), int)
    for before, after in itertools.pairwise(visits):
        if before[5]:
            counts[before[1], after[1]] += 1
    dwells = [end - first for _, _, first, end, entered, left in visits if entered and left and first >= 0]
    left = counts.sum(axis=1)
    distances = [abs(counts[i] / left[i] - P[i]).sum() / 2 if left[i] else None for i in range(K)]
    chance = songs.chance_total_variation(left, P)
    stays = []
    for row in ~on:
        stays_off = [t for t in range(len(row)) if row[t:t + WINDOW].all() and t + WINDOW <= len(row)]
        stays.append(stays_off[0] if stays_off else len(row))
    total, mean = left.sum(), log_likelihood.mean()
    batches = [(row[t:t + 100] - mean).sum() for row in log_likelihood for t in range(0, len(row), 100)]
    error = np.sqrt(np.sum(np.square(batches)) * len(batches) / (len(batches) - 1)) / log_likelihood.size
    plain = [[None if np.isnan(end) else pytest.approx(end) for end in row] for row in chance]
    return {"steps": labels.shape[1], "share_on_process": pytest.approx(on.mean()), "steps_on_process": stays,
            "log_likelihood": pytest.approx(mean), "log_likelihood_error": pytest.approx(error),
            "circles_visited": len({visit[1] for visit in visits}), "transitions": total,
            "total_variation": pytest.approx(sum(d * n for d, n in zip(distances, left, strict=True) if n) / total),
            "total_variation_by_chance": plain[-1][0], "total_variation_band": plain[-1][1:],
            "transition_counts": counts.tolist(), "transitions_per_circle": left.tolist(),
            "total_variation_per_circle": [None if d is None else pytest.approx(d) for d in distances],
            "total_variation_band_per_circle": [row[1:] for row in plain[:-1]],
            "completed_visits": len(dwells), "mean_dwell": pytest.approx(np.mean(dwells)),
            "dwell_p_value": songs.dwell_p_value(process, np.array(visits)),
            "visit_ends": len(clock_errors),
            "visit_ends_within":
                [np.mean([abs(e) <= k for e in clock_errors]) for k in range(4)] if len(clock_errors) else None}


def table_cells(summary):
    def number(key, digits):
        value = summary[key]
        return f"{getattr(value, 'expected', value):.{digits}f}"

    low, high = (end.expected for end in summary["total_variation_band"])
    return [f"{100 * summary['share_on_process'].expected:.2f}%", ", ".join(map(str, summary["steps_on_process"])),
            str(summary["circles_visited"]), str(summary["transitions"]), number("total_variation", 3),
            f"{low:.3f} to {high:.3f}", number("mean_dwell", 0), number("dwell_p_value", 3),
            f"{number('log_likelihood', 3)} ± {number('log_likelihood_error', 3)}"]


def table_rows(text):
    """The lines of a table under its rule, as cells."""
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines()[2:]]


@pytest.fixture
def caught(monkeypatch):
    """The Figures that a script would save: {end of the name: Figure}."""
    saved = {}
    monkeypatch.setattr(figures, "save", lambda fig, path: saved.update({path.stem.rpartition("_")[2]: fig}))
    return saved


@pytest.fixture
def model_of(inputs):
    """The checkpoint's model, run by the plain loop."""
    return load_checkpoint(inputs[1], "cpu")[0].use_scan("reference", "cpu")


@pytest.fixture
def sung(script, inputs, toy, tmp_path, caught):
    """Run the script; its arrays, Figures and stdout."""
    def run(*flags):
        done = script("generate", *inputs, "--save-dir", tmp_path, "--scan", "reference", *flags)
        assert done.code == 0, done.err
        (path,) = tmp_path.glob("*.npz")
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        return SimpleNamespace(arrays=arrays, figures=caught, out=done.out)

    return run


@pytest.fixture
def played(toy, monkeypatch):
    """In place of the model's song: the process's own, on another noise, silent for a while in its middle."""
    series, _ = toy

    def play(model, seeds, n_steps, *_):
        songs = np.stack([series.X[1200 + 400 * i:][:n_steps] for i in range(len(seeds))]).copy()
        songs[0, 60:90] = 0
        return songs, songs + 1

    monkeypatch.setattr(generate, "generate", play)


BURSTS = ["--perturb-interval", 25, "--perturb-duration", 4, "--perturb-scale", 3]


@pytest.mark.parametrize("flags, noise_std, bursts, random_seed", [
    ([], 0.0, None, 42),
    (["--temperature", 2, "--seed", 5], 1.0, None, 5),
    ([*BURSTS, "--temperature", 1], 0.5, {"interval": 25, "duration": 4, "scale": 3, "layers": None}, 42),
    ([*BURSTS, "--perturb-hidden", "--seed", 6], 0.0,
     {"interval": 25, "duration": 4, "scale": 3, "layers": [0, 1]}, 6),
    ([*BURSTS, "--perturb-hidden", "--perturb-layers", 2], 0.0,
     {"interval": 25, "duration": 4, "scale": 3, "layers": [1]}, 42),
])
def test_each_array_of_the_npz(sung, toy, model_of, flags, noise_std, bursts, random_seed):
    series, process = toy
    found = sung("--gen-len", 60, "--seed-len", 50, "--n-samples", 2, *flags).arrays
    starts = [1500, 1500 + (3000 - 50 - 60 - 1500) // 2]
    seeds = np.stack([series.X[start:start + 50] for start in starts])
    generated, predictions = song_step_by_step(model_of, seeds, 60, noise_std, bursts, random_seed)
    assert set(found) == {"generated", "predictions", "seed", "seed_starts", "perturbed", "labels", "thetas",
                          "log_likelihood", "deviation", "on", "visits", "clock_errors"}
    assert found["seed_starts"].tolist() == starts
    np.testing.assert_array_equal(found["seed"], seeds)
    np.testing.assert_allclose(found["generated"], generated, atol=2e-4)
    np.testing.assert_allclose(found["predictions"], predictions, atol=2e-4)
    assert (bursts is None) == (not found["perturbed"].any())
    if bursts:
        assert np.flatnonzero(found["perturbed"]).tolist() == [*range(25, 29), *range(50, 54)]
    check_analysis(process, found)


def check_analysis(process, found):
    (labels, thetas, log_likelihood, deviation, on), visits = judged(process, found["seed"], found["generated"])
    np.testing.assert_array_equal(found["labels"], labels)
    np.testing.assert_allclose(found["thetas"], thetas)
    np.testing.assert_allclose(found["log_likelihood"], log_likelihood, atol=1e-6)
    np.testing.assert_allclose(found["deviation"], deviation, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found["on"], on)
    assert [tuple(row) for row in found["visits"].tolist()] == visits


def test_no_true_step_is_counted_twice(toy):
    series, process = toy
    song = generate.reference_song(process, series, np.array([519, 350, 300, 520, 600, 900]), 60, 220)
    apart = generate.reference_song(process, series, np.array([300, 520, 900]), 60, 220)
    assert song["on"].shape == (3, 220)
    assert all(np.array_equal(song[key], apart[key]) for key in apart)


def test_each_number_that_is_printed_of_a_song(sung, toy, played):
    series, process = toy
    result = sung("--gen-len", 220, "--seed-len", 60, "--seed-offset", 300, "--n-samples", 2)
    found, lines = result.arrays, result.out.splitlines()
    check_analysis(process, found)
    starts = [300, 300 + (3000 - 60 - 220 - 300) // 2]
    assert f"seeds of 60 steps from time steps {starts[0]:,}, {starts[1]:,}" in lines
    assert any(line.startswith("generated 2 x 220 steps in ") for line in lines)
    summary = song_numbers(process, *judged(process, found["seed"], found["generated"]), found["clock_errors"])
    real = [series.X[start + 60:start + 280] for start in starts]
    clock = songs.clock_errors(process, series.X[starts[0]:starts[0] + 280])
    clock = [*clock, *songs.clock_errors(process, series.X[starts[1]:starts[1] + 280])]
    real = song_numbers(process, *judged(process, found["seed"], real), clock)
    assert summary["transitions"] and summary["completed_visits"] and summary["share_on_process"].expected < 0.95
    head = lines.index(next(line for line in lines if "on the process" in line))
    assert re.split(r" {2,}", lines[head].strip()) == [
        "on the process", "until off", "circles", "transitions", "TV", "95 % by chance", "mean dwell", "p of dwells",
        "nats per step"]
    rate, error = optimal_filter.entropy_rate(process)
    rows = table_rows("\n".join(lines[head:head + 5]))
    assert rows[0] == ["generated", *table_cells(summary)]
    assert rows[1] == ["real series", *table_cells(real)]
    visits = circle_process.entry_rates(process)  # per step
    assert rows[2] == ["process", "99.999%", *"–––––", f"{1 / visits.sum():.0f}", "–", f"{-rate:.3f} ± {error:.1g}"]
    head = lines.index(next(line for line in lines if line.startswith("from circle")))
    assert re.split(r" {2,}", lines[head]) == ["from circle", "left", "TV", "95 % by chance"]
    left, bands = summary["transitions_per_circle"], summary["total_variation_band_per_circle"]
    assert table_rows("\n".join(lines[head:head + 2 + np.count_nonzero(left)])) == [
        [str(i), str(n), f"{summary['total_variation_per_circle'][i].expected:.3f}",
         f"{bands[i][0].expected:.3f} to {bands[i][1].expected:.3f}"] for i, n in enumerate(left) if n]


@pytest.mark.parametrize("flags", [[], [*BURSTS, "--seed-offset", 2800]])
def test_each_panel_of_seed_and_truth(sung, toy, monkeypatch, played, flags):
    monkeypatch.setattr(generate, "SHOWN_STEPS", 70)
    monkeypatch.setattr(generate, "SHOWN_SAMPLES", 2)
    series, _ = toy
    gen_len = 90 if not flags else 170  # the second run ends behind the series, the first not
    result = sung("--gen-len", gen_len, "--seed-len", 40, *flags)
    found, fig = result.arrays, result.figures["seed"]
    starts, shown = found["seed_starts"], found["generated"][:2, :70]
    marks = [[24.5, 28.5], [49.5, 53.5]] if flags else []

    labels = np.where(found["on"], found["labels"], figures.OFF)
    assert {figures.OFF, 0, 1, 2} == set(labels[:, :70].ravel())
    windows = np.concatenate([found["seed"][:2], shown], axis=1)
    limits = np.percentile(abs(windows), 99) * np.array([-1, 1])
    assert fig.get_suptitle() == f"m: seed and continuation, first 70 of {gen_len} steps"
    assert len([ax for ax in fig.axes if ax.images]) == 4
    for i in range(2):
        strip, heat = fig.axes[2 * i:2 * i + 2]
        states = np.concatenate([series.states[starts[i]:starts[i] + 40], labels[i, :70]])
        check_strip(strip, states, -40, 3)
        check_heatmap(heat, windows[i], -40, limits, "RdBu_r")
        assert strip.get_xlim() == (-40.5, 69.5) and left_title(strip) == f"seed from time step {starts[i]:,}"
        assert heat.get_ylabel() == "feature" and list(heat.lines[0].get_xdata()) == [-0.5, -0.5]
        assert bursts_marked(strip) == marks
    assert heat.get_xlabel().startswith("generated step (before 0: the seed")
    assert ("black bars: bursts" in heat.get_xlabel()) == bool(flags)
    check_circle_legend(fig, [0, 1, 2, figures.OFF], 3)
    assert colour_bars(fig) == ["data units"] * 2

    fig = result.figures["truth"]
    end = starts[0] + 40
    truth = series.X[end:end + 70]
    true_strip, true_heat, strip, heat, difference, curve = [ax for ax in fig.axes if ax.get_label() != "<colorbar>"]
    assert fig.get_suptitle() == f"m: continuation and truth, first 70 of {gen_len} steps"
    limits = np.percentile(abs(truth), 99) * np.array([-1, 1])
    check_strip(true_strip, series.states[end:end + 70], 0, 3)
    assert left_title(true_strip) == f"true series of sample 0, from time step {end:,}"
    assert left_title(strip) == "generated, sample 0"
    check_heatmap(true_heat, truth, 0, limits, "RdBu_r")
    check_strip(strip, labels[0, :70], 0, 3)
    check_heatmap(heat, shown[0], 0, limits, "RdBu_r")
    assert colour_bars(fig) == ["data units"] * 3
    gap = shown[0] - truth
    limit = max(abs(np.percentile(gap, [1, 99])))
    check_heatmap(difference, gap, 0, (-limit, limit), "RdBu_r")
    assert left_title(difference) == "generated − true"
    assert [ax.get_ylabel() for ax in (true_heat, heat, difference)] == ["feature"] * 3
    assert curve.get_ylabel() == "RMS error\n(data units)"
    assert curve.get_xlabel() == "generated step" and curve.get_xlim() == (-0.5, 69.5)
    drawn = lines(curve)
    assert list(drawn) == ["sample 0", "sample 1", "noise_std", "std of the true series"]
    highest = truth.std()
    for i in range(2):
        true = series.X[starts[i] + 40:][:70]
        errors = [np.sqrt(np.mean((g - x)**2)) for g, x in zip(shown[i], true, strict=False)]
        np.testing.assert_allclose(drawn[f"sample {i}"][1], errors, rtol=1e-5)
        highest = max(highest, *errors)
    np.testing.assert_array_equal(drawn["noise_std"][1], NOISE_STD)
    np.testing.assert_allclose(drawn["std of the true series"][1], truth.std())
    np.testing.assert_allclose(curve.get_ylim(), (0, 1.35 * highest), rtol=1e-5)
    assert bursts_marked(strip) == marks
    check_circle_legend(fig, [*sorted({*series.states[end:end + 70], *labels[0, :70]} - {figures.OFF}), figures.OFF], 3)


def test_each_panel_of_the_song(sung, toy, monkeypatch, played):
    monkeypatch.setattr(generate, "SHOWN_STEPS", 120)
    monkeypatch.setattr(generate, "SHOWN_SAMPLES", 2)
    _, process = toy
    result = sung("--gen-len", 200, "--seed-len", 40, *BURSTS, "--n-samples", 2)
    found, fig = result.arrays, result.figures["song"]
    true, generated, histogram, distance = [ax for ax in fig.axes if ax.get_label() != "<colorbar>"]
    _, visits = judged(process, found["seed"], found["generated"])
    summary = song_numbers(process, *judged(process, found["seed"], found["generated"]), found["clock_errors"])
    counts, left = np.array(summary["transition_counts"]), summary["transitions_per_circle"]
    whole = [visit for visit in visits if visit[4] and visit[5] and visit[2] >= 0]
    on, dwells = [visit[1] for visit in whole], [visit[3] - visit[2] for visit in whole]
    P = process.transition_matrix
    shares = np.array([row / n if n else row for row, n in zip(counts, left, strict=True)])
    for ax, matrix, title in ((true, P, "true transitions"), (generated, shares, "generated transitions")):
        (image,) = ax.images
        np.testing.assert_allclose(image.get_array().filled(0), matrix)
        np.testing.assert_array_equal(image.get_array().mask, matrix == 0)  # white
        assert image.origin == "upper" and image.get_clim() == (0, 1)
        assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == (title, "to circle", "from circle")
        assert ax.get_xticks().tolist() == ax.get_yticks().tolist() == [0, 1, 2]
    assert [(text.get_position()[1], text.get_text()) for text in generated.texts] == [
        (i, f"TV {abs(shares[i] - P[i]).sum() / 2:.2f}  n {n}" if n else "never left") for i, n in enumerate(left)]
    assert not true.patches and len(generated.patches) == left.count(0)
    assert not true.texts and colour_bars(fig) == ["probability"]

    law, song = histogram.patches[:40], histogram.patches[40:]
    probabilities = {}
    for k in on:
        for r, p in enumerate(process.dwell_law[k], 1):
            length = r * process.periods[k]
            probabilities[length] = probabilities.get(length, 0) + p / len(on)
    for bar in law:
        inside = [p for length, p in probabilities.items() if bar.get_x() <= length < bar.get_x() + bar.get_width()]
        assert bar.get_height() == pytest.approx(sum(inside), abs=1e-9)
    outline = song[0].get_xy()
    share = np.histogram(dwells, np.unique(outline[:, 0]))[0] / len(dwells)
    assert max(outline[:, 1]) == pytest.approx(max(share))
    assert outline[:, 0].max() >= max(dwells)
    assert (histogram.get_xlabel(), histogram.get_ylabel()) == ("dwell time (steps)", "share of visits")
    assert [text.get_text() for text in histogram.get_legend().get_texts()] == [
        "true law", f"generated ({len(dwells)} visits)"]
    assert histogram.get_title() == f"dwell times (p = {summary['dwell_p_value']:.3f})"

    drawn = lines(distance)
    assert list(drawn) == ["sample 0", "sample 1", "above: off the process"]
    for i in range(2):
        np.testing.assert_array_equal(drawn[f"sample {i}"][1], found["deviation"][i, :120])
    np.testing.assert_allclose(drawn["above: off the process"][1], ALLOWED**0.5)
    assert (distance.get_xlabel(), distance.get_ylabel()) == ("generated step", "RMS deviation (data units)")
    assert distance.get_xlim() == (-0.5, 119.5) and distance.get_ylim()[0] == 0
    assert distance.get_title() == "deviation of the song from its path"
    assert bursts_marked(distance) == [[first - 0.5, first + 3.5] for first in (25, 50, 75, 100)]
    assert fig.get_suptitle() == (f"m: {100 * found['on'].mean():.1f}% of 200 steps on the process; "
                                  f"{summary['circles_visited']} circles, {summary['transitions']} transitions")


def test_a_song_without_a_whole_visit_and_a_matrix_with_many_rows(toy):
    series, process = toy
    silent = np.zeros((1, 30, 6))
    song = songs.analyse(process, series.X[None, :40], silent)
    fig = generate.draw_song("quiet", process, song, songs.summarise(process, song), np.zeros(30, bool))
    true, generated, histogram = fig.axes[:3]
    assert "no visit was seen" in histogram.texts[0].get_text() and not histogram.patches
    assert histogram.get_title() == "dwell times" and not true.patches
    assert [(patch.get_y(), patch.get_height(), patch.get_hatch()) for patch in generated.patches] == [
        (i - 0.5, 1.0, "////") for i in range(3)]
    assert [text.get_text() for text in generated.texts] == ["never left"] * 3
    fig, axes = figures.new_figure(1, 2)
    summary = {"transition_counts": np.zeros((21, 21), int), "total_variation_per_circle": [None] * 21}
    generate.transition_panels(fig, axes[0], np.full((21, 21), 1 / 21), summary)
    assert axes[0, 1].get_xticks().tolist() == [0, 5, 10, 15, 20] and not axes[0, 1].texts


def compared(script, flags, monkeypatch, tmp_path):
    """Run --compare; what it asked `generate` for, its numbers, its table."""
    asked, real_generate = [], generate.generate

    def record(model, seeds, n_steps, noise_std, bursts, random_seed, temperature, memory):
        result = real_generate(model, seeds, n_steps, noise_std, bursts, random_seed, temperature, memory)
        asked.append(SimpleNamespace(seeds=seeds, n_steps=n_steps, noise_std=noise_std, bursts=bursts,
                                     random_seed=random_seed, temperature=temperature, memory=memory,
                                     generated=result[0]))
        return result

    monkeypatch.setattr(generate, "generate", record)
    done = script("generate", *flags, "--compare", "--save-dir", tmp_path)
    assert done.code == 0, done.err
    numbers = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert set(numbers.pop("made_by")) == {"command", "commit", "data"}
    return asked, numbers, done.out.partition("\n\n")[2]


def test_compare_runs_what_its_rows_say(script, inputs, toy, tmp_path, monkeypatch, caught):
    series, process = toy
    monkeypatch.setattr(generate, "SHOWN_SAMPLES", 2)
    asked, numbers, table = compared(script, [
        *inputs, "--gen-len", 150, "--seed-len", 60, "--n-samples", 2, "--temperature", 3, "--perturb-interval", 40,
        "--perturb-duration", 7, "--perturb-scale", 2.5, "--perturb-layers", 2, "--seed", 11], monkeypatch, tmp_path)
    assert [(run.noise_std, run.bursts, run.temperature) for run in asked] == [
        (0.0, None, 0), (3 * NOISE_STD, None, 0), (0.0, generate.Bursts(40, 7, 2.5, None), 0),
        (0.0, generate.Bursts(40, 7, 2.5, (1,)), 0)]
    starts = [1500, 1500 + (3000 - 60 - 150 - 1500) // 2]
    for run in asked:
        assert run.n_steps == 150 and run.random_seed == 11
        assert run.memory == cli.WINDOW_DEFAULTS["seq_len"]  # the checkpoint names none
        np.testing.assert_array_equal(run.seeds, np.stack([series.X[start:start + 60] for start in starts]))

    names = ["real series", "greedy", "temperature 3", "output bursts", "hidden bursts"]
    assert list(numbers) == names
    real = np.stack([series.X[start + 60:start + 210] for start in starts])
    rows = table_rows(table.partition("\n\n")[0])
    panels = [ax for ax in caught["L2"].axes if ax.get_label() != "<colorbar>"]
    for i, (name, song) in enumerate(zip(names, [real, *(run.generated for run in asked)], strict=True)):
        found, visits = judged(process, asked[0].seeds, song)
        labels, _, log_likelihood, deviation, on = found
        assert numbers[name]["share_on_process"] == pytest.approx(on.mean())
        assert numbers[name]["log_likelihood"] == pytest.approx(log_likelihood.mean())
        assert rows[i][0] == name and rows[i][1] == f"{100 * on.mean():.2f}%"
        if name == "real series":
            seen = zip(asked[0].seeds, song, strict=True)
            clock = [error for parts in seen for error in songs.clock_errors(process, np.concatenate(parts))]
            expected = song_numbers(process, found, visits, clock)
            assert numbers[name] == expected
            assert rows[i] == [name, *table_cells(expected)]
        strip, curve = panels[2 * i:2 * i + 2]
        (image,) = strip.images
        colors = np.where(on[..., None], figures.circle_colors(3)[labels], to_rgb(figures.OFF_COLOR))
        np.testing.assert_allclose(image.get_array(), colors)
        assert list(image.get_extent()) == [-0.5, 149.5, 1.5, -0.5] and strip.get_ylabel() == "sample"
        summary = numbers[name]
        assert left_title(strip) == (f"{name}: {100 * on.mean():.1f}% on the process, {summary['circles_visited']} "
                                     f"circles, {summary['transitions']} transitions")
        for line, row in zip(curve.lines, deviation, strict=False):
            np.testing.assert_allclose(line.get_ydata(), row, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(curve.lines[2].get_ydata(), ALLOWED**0.5)
        assert len(curve.lines) == 3 and curve.get_ylabel() == "data units" and curve.get_ylim()[0] == 0
        bursts = [[39.5, 46.5], [79.5, 86.5], [119.5, 126.5]] if "bursts" in name else []
        assert bursts_marked(strip) == bursts_marked(curve) == bursts
    assert panels[-1].get_xlabel() == panels[-2].get_xlabel() == "generated step"
    assert left_title(panels[1]) == "RMS deviation from the path (dashed: off above)"
    assert caught["L2"].get_suptitle() == "m: bursts of std 2.5, 7 of every 40 steps"
    check_circle_legend(caught["L2"], [0, 1, 2, figures.OFF], 3)


@pytest.fixture(scope="module")
def mixture(inputs):
    """Flags that name a checkpoint with a mixture head and its data."""
    model = make_model(torch.float32, feature_dim=6, d_model=16, n_layers=2, d_state=4, d_ff=32, mixture=3)
    path = inputs[3] / "mix.pt"
    save_checkpoint(path, 1, model.state_dict(), {}, 1.0, 1.0, {"val_fraction": 0.5})
    return ["--checkpoint", path, *inputs[2:]]


def test_compare_of_a_mixture_has_its_mean_its_mean_with_noise_and_its_draws(
        script, mixture, tmp_path, monkeypatch, caught):
    asked, numbers, _ = compared(script, [*mixture, "--gen-len", 30, "--seed-len", 30, "--n-samples", 1], monkeypatch,
                                 tmp_path)
    assert list(numbers) == ["real series", "greedy", "noise 1", "temperature 1", "output bursts", "hidden bursts"]
    assert [(run.noise_std, run.temperature) for run in asked] == [(0, 0), (NOISE_STD, 0), (0, 1), (0, 0), (0, 0)]


def test_the_head_decides_what_the_temperature_is_and_what_names_tell_of_it(script, inputs, mixture, tmp_path, caught):
    def asked(flags, *more):
        args = generate.parse_args([str(word) for word in [*flags, "--device", "cpu", *more]])
        generate.load_inputs(args)
        return args.temperature, generate.file_prefix(args)

    assert asked(inputs) == (0.0, "m_generated")
    assert asked(inputs, "--temperature", 0) == (0.0, "m_generated")
    assert asked(inputs, "--temperature", 1) == (1.0, "m_generated_T1")
    assert asked(mixture) == asked(mixture, "--temperature", 1) == (1.0, "mix_generated")
    assert asked(mixture, "--temperature", 0) == (0.0, "mix_generated_T0")
    assert asked(mixture, "--compare") == (1.0, "mix_compare")
    # a mixture needs no noise_std
    write_series(tmp_path, toy_series(), {})
    done = script("generate", *mixture[:2], "--data-dir", tmp_path, "--save-dir", tmp_path / "plots", "--gen-len", 9)
    assert done.code == 0, done.err


@pytest.mark.parametrize("flags, temperature", [([], 1.0), (["--temperature", 0.3], 0.3), (["--temperature", 0], 0.0)])
def test_a_mixture_is_played_at_its_temperature(sung, mixture, inputs, monkeypatch, flags, temperature):
    result = sung(*mixture, "--gen-len", 25, "--seed-len", 20, "--n-samples", 2, *flags).arrays
    model = load_checkpoint(mixture[1], "cpu")[0].use_scan("reference", "cpu")
    generated, predictions = generate.generate(model, result["seed"], 25, temperature=temperature)
    np.testing.assert_array_equal(result["generated"], generated)
    np.testing.assert_array_equal(result["predictions"], predictions)
    assert (temperature == 0) == np.array_equal(generated, predictions)


def test_the_first_seed_starts_with_validation_or_where_it_is_told(inputs, toy):
    def starts(*flags):
        args = generate.parse_args([str(word) for word in [*inputs, "--device", "cpu", *flags]])
        return generate.load_inputs(args).starts.tolist()

    assert starts("--n-samples", 1) == [1500]  # val_fraction 0.5 of 3000 steps
    assert starts("--n-samples", 1, "--seed-offset", 12) == [12]
    assert starts("--n-samples", 1, "--seed-offset", 0) == [0]
    assert starts("--seed-len", 1600, "--n-samples", 1) == [1400]  # a seed that is longer than the validation part
    assert starts("--n-samples", 3, "--gen-len", 100, "--seed-len", 100) == [1500, 1933, 2366]


def test_seed_windows_are_spread_evenly_behind_the_first():
    assert generate.seed_windows(1000, 100, 200, 3, 400).tolist() == [400, 500, 600]
    assert generate.seed_windows(1000, 100, 500, 3, 400).tolist() == [400, 400, 400]  # the last with 500 steps of truth
    assert generate.seed_windows(1000, 100, 501, 4, 400).tolist() == [400, 525, 650, 775]  # no room for the truth
    assert generate.seed_windows(1000, 100, 10, 2, 900).tolist() == [900, 900]


def test_flags_reach_what_loads_the_inputs(inputs, toy, monkeypatch):
    asked = {}

    def open_model(*words):
        asked["model"] = words
        raise cli.UserError("enough")

    monkeypatch.setattr(generate, "open_model", open_model)
    monkeypatch.setattr(cli, "pick_device", lambda name: f"device {name}")
    with pytest.raises(cli.UserError, match="enough"):
        generate.load_inputs(parse("--data-dir", "there", "--device", "cuda:1", "--scan", "reference"))
    assert asked["model"] == (Path("m.pt"), Path("there"), "device cuda:1", "reference")


def test_defaults():
    args = parse()
    assert (args.seed_len, args.gen_len, args.n_samples, args.temperature) == (512, 512, 3, None)
    assert (args.seed, args.seed_offset, args.perturb_layers, args.perturb_hidden) == (42, None, None, False)
    assert (args.perturb_interval, args.perturb_scale, args.perturb_duration) == (0, 20.0, 10)
    assert (args.save_dir, args.data_dir) == (Path("plots"), None)
    assert parse("--perturb-interval", "6").perturb_duration == 6  # no burst is longer than the interval
    args = parse("--compare")
    assert (args.temperature, args.perturb_interval) == (1.0, 200)
    args = parse("--compare", "--temperature", "0.3", "--perturb-interval", "30")
    assert (args.temperature, args.perturb_interval, args.perturb_duration) == (0.3, 30, 10)


def test_a_song_that_leaves_the_finite_numbers_is_refused(refused, inputs, tmp_path, monkeypatch):
    def generate_with_a_hole(model, seeds, n_steps, *_):
        generated = np.zeros((len(seeds), n_steps, 6))
        generated[1, 17] = np.inf
        return generated, generated

    monkeypatch.setattr(generate, "generate", generate_with_a_hole)
    line = refused("generate", *inputs, "--gen-len", 30, "--save-dir", tmp_path / "out")
    assert "no longer finite at step 17" in line
    assert not list((tmp_path / "out").iterdir())
