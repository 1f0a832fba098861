"""The mixture head against densities written out in numpy and scipy, and the model that has one."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import TINY_MODEL

import mamba_model
import mixture_head

K, DIM = 3, 4


@pytest.fixture
def head():
    """Random outputs (2, 5, K (DIM + 2)) and a bias, in float64."""
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(2, 5, K * (DIM + 2), generator=generator, dtype=torch.float64)
    return outputs, torch.randn(K * (DIM + 2), generator=generator, dtype=torch.float64)


def numpy_mixture(outputs, bias):
    """weights (K,), scales (K,) and means (K, DIM) of one output vector, from the layout that the docstring states."""
    logits, log_scales, means = outputs[:K], outputs[K:2 * K], outputs[2 * K:].reshape(K, DIM)
    weights = np.exp(logits) / np.exp(logits).sum()
    base, reach = bias[K:2 * K], math.log(20)
    return weights, np.exp(base + reach * np.tanh((log_scales - base) / reach)), means


def test_density_mean_and_distribution_are_those_of_the_gaussians_written_out(head):
    outputs, bias = head
    x = torch.randn(2, 5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits, log_scales, means = mixture_head.split(outputs, bias, DIM)
    density = mixture_head.log_density(logits, log_scales, means, x)
    mean = mixture_head.mean(logits, means)
    distribution = mixture_head.distribution(logits, log_scales, means)
    assert density.shape == distribution.batch_shape == (2, 5) and distribution.event_shape == (DIM,)
    for i in np.ndindex(2, 5):
        weights, scales, mu = numpy_mixture(outputs[i].numpy(), bias.numpy())
        wanted = sum(w * scipy.stats.multivariate_normal(m, s**2).pdf(x[i].numpy())
                     for w, s, m in zip(weights, scales, mu, strict=True))
        assert density[i].item() == pytest.approx(math.log(wanted), rel=1e-10)
        assert mean[i].numpy() == pytest.approx(weights @ mu, rel=1e-10)
    torch.testing.assert_close(distribution.log_prob(x), density)
    torch.testing.assert_close(distribution.mean, mean)


def test_a_scale_never_leaves_its_range_around_the_bias():
    """However sure the network is: no component collapses on a data point, none blows up."""
    bias = torch.full((K * (DIM + 2),), 0.7)
    for extreme in (-1e4, 1e4):
        outputs = torch.full((K * (DIM + 2),), extreme)
        _, log_scales, _ = mixture_head.split(outputs, bias, DIM)
        assert log_scales.tolist() == pytest.approx([0.7 + math.copysign(math.log(20), extreme)] * K, rel=1e-5)
    _, log_scales, _ = mixture_head.split(bias + 0.01, bias, DIM)
    assert log_scales.tolist() == pytest.approx([0.71] * K, abs=1e-5)  # near the bias nothing is bent


def test_half_precision_outputs_are_computed_with_in_float32(head):
    outputs, bias = head
    parts = mixture_head.split(outputs.bfloat16(), bias.float(), DIM)
    assert {part.dtype for part in parts} == {torch.float32}
    exact = mixture_head.split(outputs.bfloat16().float(), bias.float(), DIM)
    for part, wanted in zip(parts, exact, strict=True):
        assert torch.equal(part, wanted)
    assert {part.dtype for part in mixture_head.split(outputs, bias, DIM)} == {torch.float64}


def test_all_components_start_at_the_data():
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, K * (DIM + 2))
    centre = [1.0, -2.0, 3.0, 0.5]
    mixture_head.initialise(linear.bias, np.array(centre), 5.0)
    logits, log_scales, means = mixture_head.split(linear(torch.zeros(8)), linear.bias, DIM)
    assert logits.tolist() == [0.0] * K and log_scales.exp().tolist() == pytest.approx([5.0] * K)
    assert means.tolist() == [centre] * K
    # Each component gets a share of the gradient from the first step on.
    logits, log_scales, means = mixture_head.split(linear(torch.randn(100, 8)), linear.bias, DIM)
    mixture_head.log_density(logits, log_scales, means, 5 * torch.randn(100, DIM)).mean().backward()
    rows = linear.weight.grad.abs().sum(dim=1)
    assert (rows > 0.01 * rows.max()).all()


@pytest.mark.parametrize("width", [0, 1, 2 * DIM, 2 * (DIM + 2) + 1])
def test_an_impossible_number_of_outputs_is_refused(width):
    with pytest.raises(ValueError, match=f"a head has {width} outputs"):
        mixture_head.n_components(width, DIM)


def test_number_of_outputs_and_of_components_agree():
    assert [mixture_head.n_outputs(k, 20) for k in (0, 1, 16)] == [20, 22, 352]
    assert [mixture_head.n_components(n, 20) for n in (20, 22, 352)] == [0, 1, 16]


# ---- the model that has one


@pytest.fixture
def model():
    torch.manual_seed(3)
    return mamba_model.CausalTimeSeriesMamba(DIM, **TINY_MODEL, max_horizon=2, mixture=K).double().eval()


def test_forward_and_encode_give_the_means_of_the_distributions(model):
    x = torch.randn(2, 6, DIM, dtype=torch.float64)
    distributions, predictions = model.distribution(x), model(x)
    assert list(distributions) == list(predictions) == ["1", "2"]
    for k, distribution in distributions.items():
        assert isinstance(distribution, torch.distributions.MixtureSameFamily)
        assert distribution.batch_shape == (2, 6) and distribution.component_distribution.event_shape == (DIM,)
        torch.testing.assert_close(distribution.mean, predictions[k])
    torch.testing.assert_close(model.encode(x)[-1], predictions["1"])


def test_step_and_prefill_give_the_outputs_that_a_sample_is_drawn_from(model):
    x = torch.randn(2, 6, DIM, dtype=torch.float64)
    outputs = model(x, raw=True)
    prefilled, states = model.prefill(x[:, :-1])
    stepped, _ = model.step(x[:, -1], states)
    for k in outputs:
        torch.testing.assert_close(prefilled[k], outputs[k][:, -2])
        torch.testing.assert_close(stepped[k], outputs[k][:, -1])


def test_a_checkpoint_knows_its_mixture_by_its_shapes(model, tmp_path):
    path = tmp_path / "mixture.pt"
    mamba_model.save_checkpoint(path, 1, model.state_dict(), {}, 1.0, 1.0, {})
    loaded, _ = mamba_model.load_checkpoint(path)
    assert loaded.mixture == K and loaded.horizons == [1, 2]
    x = torch.randn(1, 5, DIM)
    torch.testing.assert_close(loaded(x), {k: p.float() for k, p in model(x.double()).items()}, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_with_an_impossible_head_is_refused_in_one_line(model, tmp_path):
    state = model.state_dict()
    for k in ("1", "2"):
        state[f"output_heads.{k}.2.weight"] = state[f"output_heads.{k}.2.weight"][:-1].clone()
        state[f"output_heads.{k}.2.bias"] = state[f"output_heads.{k}.2.bias"][:-1].clone()
    path = tmp_path / "odd.pt"
    mamba_model.save_checkpoint(path, 1, state, {}, 1.0, 1.0, {})
    with pytest.raises(mamba_model.cli.UserError, match="a head has 17 outputs, neither 4"):
        mamba_model.load_checkpoint(path)


def test_a_point_head_predicts_no_distribution():
    with pytest.raises(ValueError, match="point head"):
        mamba_model.CausalTimeSeriesMamba(DIM, **TINY_MODEL).distribution(torch.randn(1, 3, DIM))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_a_draw_has_sharpened_weights_and_scales(temperature):
    logits, log_scales = torch.tensor([0.3, -1.0, 1.2]).double(), torch.tensor([-0.5, 0.2, 0.7]).double()
    means = torch.tensor([[0.0, 50.0], [-200.0, 0.0], [300.0, 1.0]]).double()  # so far apart that a draw tells which
    rng, n = np.random.default_rng(0), 40_000
    uniform, normal = torch.from_numpy(rng.random(n)), torch.from_numpy(rng.standard_normal((n, 2)))
    shapes = logits.expand(n, 3), log_scales.expand(n, 3), means.expand(n, 3, 2)
    drawn = mixture_head.draw(*shapes, temperature, uniform, normal)
    component = (drawn[:, None] - means).norm(dim=-1).argmin(dim=-1)
    weights = np.exp(logits.numpy() / temperature)
    for k, weight in enumerate(weights / weights.sum()):
        here = component == k
        assert float(here.double().mean()) == pytest.approx(weight, abs=0.01)
        scale = np.exp(log_scales[k].item()) * temperature**0.5
        np.testing.assert_allclose(drawn[here], means[k] + scale * normal[here], rtol=0, atol=1e-9)
    # the inverse of the cumulative weights: small uniform numbers choose the first component
    assert component[uniform < 0.99 * weights[0] / weights.sum()].max() == 0


def test_a_draw_never_takes_a_component_without_weight():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    means, zero = torch.tensor([[[1.0], [2.0], [3.0]]]), torch.zeros(1, 1)
    for uniform in (0.0, 0.5, float(np.nextafter(np.float32(1), np.float32(0)))):
        assert mixture_head.draw(logits, torch.zeros(1, 3), means, 1.0, torch.tensor([uniform]), zero).item() == 2.0
