"""What can be had without training, against loops and numpy's own least squares."""

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL

import baselines
import mamba_model


def waves(n, width, seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(n)[:, None]
    return (3 * np.sin(t * rng.uniform(0.1, 0.5, width) + rng.uniform(0, 6, width)) + rng.standard_normal((n, width))
            + 0.4 * rng.standard_normal((n, 1)) + 2).astype(np.float32)


def test_the_low_pass_is_a_causal_mean_within_each_recording():
    X = waves(30, 3)
    recordings = np.array([[0, 12], [12, 14], [14, 30]])
    found = baselines.low_passed(X, recordings)
    for first, end in recordings:
        for t in range(first, end):
            np.testing.assert_allclose(found[t], X[max(first, t - 3):t + 1].mean(axis=0), rtol=1e-5)


def test_products_are_all_of_two_features_of_one_step():
    X = waves(5, 3)
    wanted = [[*x, *(x[i] * x[j] for i in range(3) for j in range(i, 3))] for x in X]
    np.testing.assert_allclose(baselines.products(X), wanted, rtol=1e-6)
    assert baselines.products(waves(100, 50)).shape == (100, 40 + 40 * 41 // 2)


@pytest.mark.parametrize("constant", [(), ("B", "z"), ("delta", "C")])
def test_the_untrained_model_is_one_of_the_same_architecture_and_seed(constant):
    sizes = {**TINY_MODEL, "expand": 3, "d_conv": 2, "max_horizon": 5, "mixture": 2, "constant": constant}
    model = mamba_model.CausalTimeSeriesMamba(6, **sizes)
    model.use_scan("reference", "cpu")
    state = torch.random.get_rng_state()
    untrained = baselines.untrained_like(model, 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(3)
    wanted = mamba_model.CausalTimeSeriesMamba(6, **sizes)
    for (name, value), (other, weight) in zip(untrained.state_dict().items(), wanted.state_dict().items(), strict=True):
        assert name == other and torch.equal(value, weight)
    assert untrained.backends == model.backends and not untrained.training


@pytest.mark.parametrize("lengths", [(120,), (60, 3, 57)])
def test_the_autoregression_is_numpys_least_squares_for_each_number_of_lags(lengths):
    X, lags = waves(sum(lengths), 2), 5
    ends = np.cumsum(lengths)
    pieces = [X[end - n:end] for end, n in zip(ends, lengths, strict=True)]
    found = baselines.Autoregression(pieces, lags)
    long = [piece.astype(np.float64) for piece in pieces if len(piece) > lags]
    mean = np.concatenate(long).mean(axis=0)
    window = X[40:60] - mean
    errors = baselines.Autoregression(pieces, lags).errors(X, [40, 7], 20)
    assert errors.shape == (2, 19)
    for t in range(19):
        p = min(t + 1, lags)
        rows = [(np.concatenate([piece[s - 1 - j] - mean for j in range(p)]), piece[s] - mean)
                for piece in long for s in range(lags, len(piece))]
        A, b = (np.array(values) for values in zip(*rows, strict=True))
        weights = np.linalg.lstsq(A, b)[0]
        np.testing.assert_allclose(found.weights[p - 1], weights, rtol=1e-4, atol=1e-5)
        predicted = np.concatenate([window[t - j] for j in range(p)]) @ weights
        assert errors[0, t] == pytest.approx(np.mean((predicted - window[t + 1])**2), rel=1e-3)


def test_an_autoregression_stands_constant_features_and_refuses_short_pieces():
    X = np.concatenate([waves(80, 2), np.ones((80, 1), np.float32)], axis=1)
    assert np.isfinite(baselines.Autoregression([X], 4).errors(X, [3], 20)).all()
    with pytest.raises(ValueError, match="5 steps in a row"):
        baselines.Autoregression([X[:4], X[5:8]], 4)
    assert baselines.Autoregression([waves(60, 100)]).lags == 20
