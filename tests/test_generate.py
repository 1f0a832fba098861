"""generate.py and its steppers: against the model run over the whole prefix, and brute force."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import arrays_of

import circle_process
import cli
import generate
from kernels import step_cpu
from mamba_model import CausalTimeSeriesMamba, save_checkpoint

ROOT = Path(generate.__file__).parent
SHAPES = [
    {"feature_dim": 3, "d_model": 16, "n_layers": 2, "d_state": 4, "d_ff": 32},
    # nothing here is a multiple of a SIMD vector, and there is no convolution state
    {"feature_dim": 5, "d_model": 27, "n_layers": 3, "d_state": 5, "d_ff": 33, "d_conv": 1, "expand": 3},
]


def make_model(dtype=torch.float64, scan="reference", seed=0, **shape):
    torch.manual_seed(seed)
    model = CausalTimeSeriesMamba(**(shape or SHAPES[0])).to(dtype).eval()
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


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 4, 6])  # less than a tile, one, and more
def test_cpu_stepper_is_the_plain_loop(monkeypatch, shape, n, dtype, tolerance):
    monkeypatch.setattr(generate, "BLOCK", 50)
    model = make_model(dtype, **shape)
    bursts = generate.Bursts(30, 7, 2.0, (0, 1))
    runs = []
    for stepper in (generate.loop_stepper, step_cpu.stepper):
        monkeypatch.setattr(generate, "choose_stepper", lambda model, stepper=stepper: stepper)
        runs.append(generate.generate(model, make_seed(model, n), 200, 0.5, bursts)[0])
    scale = np.abs(runs[0]).max()
    np.testing.assert_allclose(runs[1], runs[0], rtol=0, atol=tolerance * scale)


def test_reference_scan_takes_the_plain_loop():
    assert generate.choose_stepper(make_model(scan="reference")) is generate.loop_stepper
    assert generate.choose_stepper(make_model(scan="cpu")) is step_cpu.stepper


def test_the_block_size_does_not_matter(monkeypatch):
    model, bursts = make_model(scan="cpu"), generate.Bursts(10, 3, 1.0, (1,))
    whole = generate.generate(model, make_seed(model), 47, 0.3, bursts)[0]
    monkeypatch.setattr(generate, "BLOCK", 8)
    np.testing.assert_array_equal(generate.generate(model, make_seed(model), 47, 0.3, bursts)[0], whole)


@pytest.mark.parametrize("bursts", [None, generate.Bursts(10, 3, 1.0), generate.Bursts(10, 3, 1.0, (1,))])
def test_a_larger_batch_only_adds_samples(bursts):
    model = make_model(scan="cpu")
    seed = make_seed(model, 6)
    small = generate.generate(model, seed[:2], 40, 0.3, bursts)[0]
    np.testing.assert_allclose(generate.generate(model, seed, 40, 0.3, bursts)[0][:2], small, rtol=0, atol=1e-12)


def test_the_seed_fixes_the_noise():
    model = make_model(scan="cpu")
    one, same, other = (generate.generate(model, make_seed(model), 30, 1.0, random_seed=s)[0] for s in (1, 1, 2))
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

    def spy(model, prediction, states):
        def advance(noise, burst, hidden):
            seen.append((noise, burst, hidden))
            return np.zeros_like(noise)
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

    def spy(model, prediction, states):
        return lambda noise, burst, hidden: seen.append((noise, burst)) or np.zeros_like(noise)

    monkeypatch.setattr(generate, "choose_stepper", lambda model: spy)
    bursts = generate.Bursts(10, 4, 3.0)
    generate.generate(model, make_seed(model, 2), 3000, bursts=bursts)
    noise = np.concatenate([part[0] for part in seen], axis=1)
    inside = generate.burst_steps(3000, bursts)
    assert noise[:, inside].std() == pytest.approx(3.0, rel=0.03)
    assert not noise[:, ~inside].any()
    assert all((part[1] == -1).all() for part in seen)


# ---- the CUDA kernels ------------------------------------------------------------------------------------------

INTERPRETED = """
import numpy as np, torch
import generate; from kernels import step_cuda
from test_generate import make_model, make_seed
step_cuda.SEGMENT = 3
model = make_model(torch.float32, feature_dim=5, d_model=10, n_layers=2, d_state=3, d_ff=9, d_conv=3, expand=1)
runs = []
for stepper in (generate.loop_stepper, step_cuda.stepper):
    generate.choose_stepper = lambda model, stepper=stepper: stepper
    runs.append(generate.generate(model, make_seed(model, 2), 5, 0.5, generate.Bursts(2, 1, 3.0, (1,)))[0])
assert np.abs(runs[0] - runs[1]).max() < 1e-5 * np.abs(runs[0]).max(), np.abs(runs[0] - runs[1]).max()
"""


def test_cuda_kernels_in_the_interpreter_are_the_plain_loop():
    pytest.importorskip("triton")
    run_python("-c", INTERPRETED, TRITON_INTERPRET="1", PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("bursts", [None, generate.Bursts(40, 7, 2.0), generate.Bursts(40, 7, 2.0, (0, 2))])
@pytest.mark.parametrize("n", [1, 3, 17])
@pytest.mark.parametrize("shape", [{}, {"feature_dim": 5, "d_model": 48, "n_layers": 3, "d_state": 5, "d_ff": 33}])
def test_cuda_graph_is_the_plain_loop(monkeypatch, shape, n, bursts):
    from kernels import step_cuda

    torch.manual_seed(0)
    model = CausalTimeSeriesMamba(**shape).cuda().eval().use_scan("auto", "cuda")
    assert generate.choose_stepper(model) is step_cuda.stepper
    runs = []
    for stepper in (generate.loop_stepper, step_cuda.stepper):
        monkeypatch.setattr(generate, "choose_stepper", lambda model, stepper=stepper: stepper)
        runs.append(generate.generate(model, make_seed(model, n), 300, 0.5, bursts)[0])
    np.testing.assert_allclose(runs[1], runs[0], rtol=0, atol=2e-4 * np.abs(runs[0]).max())


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


# ---- song analysis ---------------------------------------------------------------------------------------------


def random_labels(K=4, n=300):
    rng = np.random.default_rng(3)
    return np.repeat(rng.integers(0, K, n), rng.integers(1, 6, n))


def test_visits_and_transitions_by_brute_force():
    rows = [random_labels(), random_labels(n=7), np.array([2, 2, 2])]
    counts = np.zeros((4, 4), dtype=int)
    for labels in rows:
        for a, b in itertools.pairwise(labels):
            counts[a, b] += a != b
    np.testing.assert_array_equal(generate.transition_counts(rows, 4), counts)
    circles, lengths = generate.completed_dwells(rows)
    expected = []
    for labels in rows:
        expected += [(k, len(list(run))) for k, run in itertools.groupby(labels)][1:-1]
    assert list(zip(circles, lengths, strict=True)) == expected


def test_total_variation():
    P = np.array([[0, 0.5, 0.5], [1, 0, 0], [0.25, 0.75, 0]])
    counts = np.array([[0, 3, 1], [2, 0, 2], [0, 0, 0]])
    np.testing.assert_allclose(generate.total_variation(counts, P), [0.25, 0.5, np.nan])


def test_chance_total_variation_is_the_mean_over_draws():
    P = np.array([[0, 0.7, 0.2, 0.1], [1, 0, 0, 0], [0.3, 0.3, 0, 0.4], [0.5, 0.5, 0, 0]])
    left, rng = np.array([7, 3, 1, 0]), np.random.default_rng(0)
    draws = [generate.total_variation(np.stack([rng.multinomial(n, p) for n, p in zip(left, P, strict=True)]), P)
             for _ in range(4000)]
    chance = generate.chance_total_variation(left, P)
    np.testing.assert_allclose(chance[:3], np.mean(draws, axis=0)[:3], atol=0.01)
    assert np.isnan(chance[3])


@pytest.mark.parametrize("off, patience, expected", [
    ("0000", 2, 4), ("1111", 2, 0), ("0101011", 2, 5), ("0101", 2, 4), ("0011", 3, 4), ("01", 1, 1),
])
def test_steps_on(off, patience, expected):
    assert generate.steps_on([c == "1" for c in off], patience) == expected


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
    import optimal_filter

    series = toy_series()
    return series, optimal_filter.process_from_series(series)


def clean_points(series):
    plane = series.process.planes[series.states]
    return series.process.radii[series.states, None] * (np.cos(series.thetas)[:, None] * plane[:, 0]
                                                + np.sin(series.thetas)[:, None] * plane[:, 1])


def test_nearest_distance_by_brute_force(toy):
    _, process = toy
    X = np.random.default_rng(5).standard_normal((20, process.feature_dim)) * 4
    angles = np.linspace(0, 2 * np.pi, 4001)
    circles = [r * (np.cos(angles)[:, None] * p[0] + np.sin(angles)[:, None] * p[1])
               for r, p in zip(process.radii, process.planes, strict=True)]
    brute = [min(np.linalg.norm(circle - x, axis=1).min() for circle in circles) for x in X]
    np.testing.assert_allclose(circle_process.distance(process, X), brute, atol=1e-4)


def test_the_process_itself_is_a_song(toy):
    series, process = toy
    points = clean_points(series)[None]
    song = generate.analyse(process, series.X[None, :100], series.X[None, 100:], points[:, 100:])
    assert (song["labels"][0] == series.states[100:]).mean() > 0.99
    assert song["steps_on_process"].tolist() == [2900]
    summary = generate.summarise(process, song)
    assert summary["near_no_circle"] == 0
    assert summary["circles_visited"] == 3
    assert summary["total_variation"] < summary["total_variation_by_chance"] + 0.1
    assert summary["mean_dwell"] == pytest.approx(40, rel=0.1)


def test_freezing_or_shrinking_to_the_centre_leaves_the_process(toy):
    series, process = toy
    points = clean_points(series)[None]
    frozen = points.copy()
    frozen[:, 500:] = frozen[:, 500]
    song = generate.analyse(process, points[:, :100], frozen[:, 100:], frozen[:, 100:])
    assert 395 <= song["steps_on_process"][0] <= 430
    assert song["nearest_distance"].max() < 1e-6
    dying = points * np.where(np.arange(3000) < 500, 1, 0.05)[:, None]
    song = generate.analyse(process, points[:, :100], dying[:, 100:], dying[:, 100:])
    assert song["steps_on_process"].tolist() == [400]
    assert generate.summarise(process, song)["near_no_circle"] == pytest.approx(2500 / 2900)


def test_dwell_law_is_the_law_of_the_visits(toy):
    _, process = toy
    lengths, law = generate.dwell_time_law(process, np.array([0, 0, 2]))
    assert law.sum() == pytest.approx(1)
    rng = np.random.default_rng(0)
    draws = [p * np.maximum(1, np.round(rng.normal(40, 8, 20000) / p)) for p in process.periods[[0, 0, 2]]]
    assert lengths @ law == pytest.approx(np.mean(draws), rel=0.01)


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
    assert "TV by chance" in done.out
    assert names_in(tmp_path) == {f"{prefix}{end}" for end in (".npz", "_seed.png", "_truth.png", "_song.png")}
    with np.load(tmp_path / f"{prefix}.npz", allow_pickle=False) as arrays:
        assert arrays["generated"].shape == arrays["predictions"].shape == (3, 90, 6)
        assert arrays["seed_starts"][0] == 1500
        for start, seed in zip(arrays["seed_starts"], arrays["seed"], strict=True):
            np.testing.assert_array_equal(seed, series.X[start:start + 40])
        np.testing.assert_array_equal(np.flatnonzero(arrays["perturbed"]), [*range(30, 40), *range(60, 70)])
        assert arrays["labels"].shape == arrays["path_distance"].shape == (3, 90)


def test_compare_end_to_end(script, inputs, tmp_path):
    done = script("generate", *inputs, "--save-dir", tmp_path, "--gen-len", 250, "--compare")
    assert done.code == 0, done.err
    assert names_in(tmp_path) == {"m_compare_g250.png", "m_compare_g250.json"}
    numbers = json.loads((tmp_path / "m_compare_g250.json").read_text())
    assert list(numbers) == ["real series", "greedy", "temperature 1", "output bursts", "hidden bursts"]
    for name in numbers:
        assert name in done.out
    assert numbers["real series"]["steps_on_process"] == [250] * 3


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
