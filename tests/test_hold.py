"""Signals held at their means, against models whose signals are constant and against a loop."""

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL

import hold
import mamba_model


def made_model(constant=(), seed=0, **more):
    torch.manual_seed(seed)
    model = mamba_model.CausalTimeSeriesMamba(6, **TINY_MODEL, constant=constant, **more).eval()
    return model.use_scan("reference", "cpu")


def series(n=200):
    return np.random.default_rng(0).standard_normal((n, 6)).astype(np.float32)


def test_means_are_those_of_all_steps_of_all_windows_before_the_last_one():
    model, X = made_model(), series()
    found = hold.signal_means(model, X, 30, 130)
    h = model.input_proj(torch.from_numpy(X[:120].reshape(4, 30, 6)))
    for means, layer in zip(found, model.layers, strict=True):
        signals = layer.mamba.signals(layer.norm(h))
        for name in ("delta", "B", "C", "z"):
            torch.testing.assert_close(means[name], signals[name].flatten(0, 1).mean(0), rtol=1e-4, atol=1e-5)
        h = layer(h, "reference")


@pytest.mark.parametrize("names", [("delta",), ("B",), ("C",), ("z",), ("delta", "B", "C"), ("delta", "B", "C", "z")])
@pytest.mark.parametrize("constant", [(), ("B",), ("delta", "z")])
def test_held_signals_are_constant_and_the_others_are_as_they_were(names, constant):
    model, X = made_model(constant), series()
    means = hold.signal_means(model, X, 40, 200)
    held = hold.held_model(model, names, means)
    x = torch.randn(2, 20, model.d_model)
    for own, before, after in zip(means, model.layers, held.layers, strict=True):
        old, new = before.mamba.signals(x), after.mamba.signals(x)
        for name in ("delta", "B", "C", "z", "conv"):
            wanted = own[name].expand_as(old[name]) if name in names else old[name]
            torch.testing.assert_close(new[name], wanted, rtol=1e-4, atol=1e-5)
    assert not torch.equal(held(torch.from_numpy(X[None]))["1"], model(torch.from_numpy(X[None]))["1"]) or (
        set(names) <= set(constant))


def test_to_hold_signals_that_are_constant_changes_nothing():
    names = ("delta", "B", "C", "z")
    model, X = made_model(names, mixture=2, max_horizon=3), series()
    held = hold.held_model(model, names, hold.signal_means(model, X, 40, 200))
    x = torch.from_numpy(X[None])
    for k, prediction in model(x).items():
        torch.testing.assert_close(held(x)[k], prediction, rtol=1e-4, atol=1e-5)


def test_each_signal_alone_and_all_of_them():
    assert hold.variants(["delta", "B"]) == [("delta",), ("B",), ("delta", "B")]
    assert hold.variants(["z"]) == [("z",)]
