"""--relative: a model that sees each window relative to its first step, in every way in which a model is used."""

import numpy as np
import pytest
import torch
from conftest import TINY_DATA, TINY_MODEL

import baselines
import dataset
import generate
import hold
import mamba_model
import markov_circles_timeseries as generator
import masked_model_gpu_mamba_next as training
import representations
import visualize_gates

FEATURES, SHIFT = 3, torch.tensor([100.0, -50.0, 7.0])


def model_of(mixture=0, relative=True, seed=0, **more):
    """A tiny model whose predictions are some units large."""
    torch.manual_seed(seed)
    model = mamba_model.CausalTimeSeriesMamba(FEATURES, **TINY_MODEL, mixture=mixture, relative=relative, **more)
    return model.double().eval().use_scan("reference", "cpu")


def windows(n=2, length=20, seed=1):
    return 5 * torch.randn(n, length, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_twin(model):
    """A model with the same weights that sees windows as they are."""
    twin = mamba_model.CausalTimeSeriesMamba(FEATURES, **TINY_MODEL, mixture=model.mixture,
                                             max_horizon=model.horizons[-1])
    weights = {name: value for name, value in model.state_dict().items() if name != "relative"}
    twin.double().eval().use_scan("reference", "cpu").load_state_dict(weights)
    return twin


@pytest.mark.parametrize("mixture", [0, 2])
@torch.no_grad()
def test_it_is_a_model_of_the_differences_from_the_first_step(mixture):
    model, x = model_of(mixture, max_horizon=2), windows()
    plain, first = plain_twin(model), x[:, :1]
    for k, prediction in model(x).items():
        torch.testing.assert_close(prediction, plain(x - first)[k] + first)
    *layers, prediction = model.encode(x)
    *expected, output = plain.encode(x - first)
    torch.testing.assert_close(layers, expected)
    torch.testing.assert_close(prediction, output + first)
    if mixture:
        log_prob = model.distribution(x)["1"].log_prob(x)
        torch.testing.assert_close(log_prob, plain.distribution(x - first)["1"].log_prob(x - first))
    moved = x + SHIFT
    torch.testing.assert_close(model(moved)["2"], model(x)["2"] + SHIFT)
    torch.testing.assert_close(mamba_model.horizon_errors(model, model(moved, raw=True), moved),
                               mamba_model.horizon_errors(model, model(x, raw=True), x))
    assert not torch.allclose(plain(moved)["1"], plain(x)["1"] + SHIFT)


@torch.no_grad()
def test_every_look_into_the_layers_sees_the_differences():
    model, x = model_of(seed=2).float(), windows().float()
    plain, X = plain_twin(model).float(), x[0].numpy()
    difference = X - X[0]

    signals = visualize_gates.block_signals(model, x)
    for layer, expected in zip(signals, visualize_gates.block_signals(plain, x - x[:, :1]), strict=True):
        torch.testing.assert_close(layer, expected)
    means = hold.signal_means(model, X, len(X), len(X))
    for layer, expected in zip(means, hold.signal_means(plain, difference, len(X), len(X)), strict=True):
        torch.testing.assert_close(layer, expected)
    *expected, output = plain.encode(torch.from_numpy(difference)[None])
    levels = dict(representations.of_windows(model, [x[:1]], range(4)))
    torch.testing.assert_close(levels[0][0], x[:1])
    for depth, level in enumerate([*expected, output + x[:1, :1]], 1):
        torch.testing.assert_close(levels[depth][0], level)


def test_a_checkpoint_keeps_it(tmp_path):
    for relative in (True, False):
        model = model_of(relative=relative).float()
        assert ("relative" in model.state_dict()) == relative
        mamba_model.save_checkpoint(tmp_path / "a.pt", 1, model.state_dict(), {}, 0.0, 0.0, {})
        loaded, _ = mamba_model.load_checkpoint(tmp_path / "a.pt")
        x = windows().float()
        torch.testing.assert_close(loaded.use_scan("reference", "cpu")(x)["1"], model(x)["1"])
        assert (baselines.untrained_like(loaded, 0).relative is not None) == relative


@torch.no_grad()
def test_normalised_data_give_up_their_scale_and_not_their_mean():
    model, x = model_of(mixture=2), windows() + SHIFT
    mean, std = np.array([90.0, -40.0, 0.0]), np.full(3, 4.0)
    expected = model((x - torch.from_numpy(mean)) / 4)["1"] * 4 + torch.from_numpy(mean)
    torch.testing.assert_close(model.unscaled((mean, std))(x)["1"], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mixture, temperature", [(0, 0.0), (2, 0.0), (2, 0.7)])
@pytest.mark.parametrize("scan", ["reference", "cpu"])
def test_a_song_goes_on_from_where_its_seed_is(mixture, temperature, scan):
    model, seed = model_of(mixture).float().use_scan(scan, "cpu"), windows().float().numpy()
    options = {"n_steps": 30, "temperature": temperature, "memory": 6}  # states are made anew after 24 steps
    song, means = generate.generate(model, seed, **options)
    moved, moved_means = generate.generate(model, seed + SHIFT.numpy(), **options)
    np.testing.assert_allclose(moved, song + SHIFT.numpy(), atol=1e-3)
    np.testing.assert_allclose(moved_means, means + SHIFT.numpy(), atol=1e-3)
    with torch.no_grad():
        whole = torch.from_numpy(np.concatenate([seed, song], axis=1))
        expected = model(whole[:, :-1])["1"][:, 19:43]   # from the seed's first step on
        anew = model(whole[:, 38:-1])["1"][:, 5:]        # from the last 6 steps before step 24 on
    np.testing.assert_allclose(means[:, :24], expected, atol=1e-3)
    np.testing.assert_allclose(means[:, 24:], anew, atol=1e-3)


def test_a_mixture_starts_from_the_differences_over_half_a_window():
    X = np.arange(64)[:, None] * np.array([1.0, 2.0, 4.0]) + np.tile([[0.5], [-0.5]], (32, 3))
    args = training.parse_args(["--relative", "--mixture", "2", "--seq-len", "10", "--device", "cpu"])
    bias = training.build_model(args, 3, X.astype(np.float32)).output_heads["1"][-1].bias.detach()
    differences = X[5:] - X[:-5]  # 5, 10 and 20, and ± 1
    np.testing.assert_allclose(bias[4:], np.tile(differences.mean(axis=0), 2), rtol=1e-6)
    np.testing.assert_allclose(bias[2:4], np.log(differences.var(axis=0).mean()) / 2, rtol=1e-5)


@pytest.mark.usefixtures("undrawn")
def test_a_wandering_series_from_the_shell(script, tmp_path):
    generator.main(generator.parse_args([*TINY_DATA, "--center-walk-std", "1", "--data-dir", str(tmp_path / "data")]))
    x = dataset.gather(dataset.load_series(tmp_path / "data").X, range(2700, 2900, 50), 64)
    errors = {}
    for name, more in (("plain", []), ("relative", ["--relative"])):
        done = script("masked_model_gpu_mamba_next", "--data-dir", tmp_path / "data", "--d-model", "16",
                      "--n-layers", "1", "--d-state", "4", "--d-ff", "16", "--seq-len", "64", "--stride", "32",
                      "--batch-size", "8", "--epochs", "4", "--warmup-epochs", "1", "--lr", "0.01", "--device", "cpu",
                      "--dropout", "0", "--no-train-eval", "--checkpoint", tmp_path / f"{name}.pt", *more)
        assert done.code == 0, done
        model, flags = mamba_model.load_checkpoint(tmp_path / f"{name}.pt")
        assert (model.relative is not None) == flags["relative"] == (name == "relative")
        with torch.no_grad():
            errors[name] = mamba_model.horizon_mse(model(x), x).item()
    assert errors["relative"] < errors["plain"] / 3, errors
    done = script("masked_model_gpu_mamba_next", "--resume", "--checkpoint", tmp_path / "relative.pt", "--epochs", "5")
    assert done.code == 0 and "epoch 5/5" in done.out, done
    assert mamba_model.load_checkpoint(tmp_path / "relative.pt")[0].relative is not None
