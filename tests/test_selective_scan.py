"""The scan's CPU kernels, glue and one-step recurrence against the loop over time in plain torch, in float64."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cli import UserError
from kernels import nvrtc, scan_cpu, selective_scan
from kernels.selective_scan import (
    causal_conv_reference,
    choose_backend,
    conv_step,
    mamba_inner,
    mamba_inner_with_state,
    selective_scan_reference,
    selective_scan_step,
)
from mamba_model import CausalTimeSeriesMamba

REPO = Path(__file__).resolve().parent.parent
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
CHUNK = scan_cpu.CHUNK

# (batch, time, d_inner, d_state): one of everything; around the ends of a chunk and of a vector; odd sizes; the default
SHAPES = [
    (1, 1, 1, 1),
    (1, 2, 3, 3),
    (3, CHUNK, 8, 16),
    (2, CHUNK + 1, 16, 32),
    (1, 2 * CHUNK - 1, 33, 5),
    (2, 3 * CHUNK + 7, 21, 64),
    (1, 2 * CHUNK, 64, 2),
]
DTYPES = [torch.float32, torch.float64]


def relative_error(value, expected):
    assert value.shape == expected.shape
    return ((value.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def scan_inputs(batch, time, d_inner, d_state, seed=0):
    """float64 inputs of the scan as leaves, step sizes from 1e-4 to 10: u, delta, A, B, C, D, z, delta_bias."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = (batch, time)
    inputs = (
        normal(*rows, d_inner), normal(*rows, d_inner, scale=3.0), -normal(d_inner, d_state).exp(),
        normal(*rows, d_state), normal(*rows, d_state), normal(d_inner), normal(*rows, d_inner, scale=3.0),
        normal(d_inner) - 2,
    )
    return [tensor.requires_grad_() for tensor in inputs]


def inner_inputs(batch, time, d_inner, d_state, dt_rank=3, d_conv=4, seed=0):
    """float64 arguments of mamba_inner but for the back end, as leaves."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = (
        normal(batch, time, 2 * d_inner), normal(d_inner, d_conv), normal(d_inner),
        normal(dt_rank + 2 * d_state, d_inner, scale=d_inner**-0.5), normal(d_inner, dt_rank), normal(d_inner) - 1,
        -normal(d_inner, d_state).exp(), normal(d_inner),
    )
    return [tensor.requires_grad_() for tensor in inputs]


def cast(tensors, dtype):
    return [tensor.detach().to(dtype) for tensor in tensors]


def between(tensor):
    """The same values as a view with gaps in every row, as slices of xz and x_dbl are."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), torch.nan, dtype=tensor.dtype)
    wide[..., 2:-3] = tensor
    return wide[..., 2:-3]


# ---- the reference itself --------------------------------------------------------------------------------------


def test_reference_against_the_solution_in_closed_form():
    """h_T = sum_t exp(A (dt_{t+1} + ... + dt_T)) dt_t B_t u_t, with no loop and no recurrence."""
    u, delta, A, B, C, D, z, bias = (tensor.detach() for tensor in scan_inputs(2, 9, 3, 4))
    dt = torch.log1p(torch.exp(delta + bias))
    total = dt.cumsum(1)
    lag = total[:, :, None] - total[:, None]  # (batch, t, s, d_inner)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, :, :, None, None]
    decay = torch.where(causal, torch.exp(lag[..., None] * A), 0.0)
    h = torch.einsum("btsdn,bsd,bsn->btdn", decay, dt * u, B)
    expected = (torch.einsum("btdn,btn->btd", h, C) + D * u) * z / (1 + torch.exp(-z))
    y, last = selective_scan_reference(u, delta, A, B, C, D, z, bias)
    assert relative_error(y, expected) < 1e-12
    assert relative_error(last, h[:, -1]) < 1e-12


def test_reference_starts_from_the_state_it_is_given():
    """A sequence cut in two: the second half from the first half's last state is the whole's second half."""
    u, delta, A, B, C, D, z, bias = (tensor.detach() for tensor in scan_inputs(2, 9, 3, 4))
    whole, last = selective_scan_reference(u, delta, A, B, C, D, z, bias)
    halves = [[tensor[:, rows] for tensor in (u, delta, B, C, z)] for rows in (slice(4), slice(4, 9))]
    h, ys = None, []
    for u_, delta_, B_, C_, z_ in halves:
        y, h = selective_scan_reference(u_, delta_, A, B_, C_, D, z_, bias, h)
        ys.append(y)
    assert relative_error(torch.cat(ys, 1), whole) < 1e-12 and relative_error(h, last) < 1e-12


def test_reference_inner_part_written_out_for_one_channel_at_a_time():
    """mamba_inner by plain numbers: which half of xz is convolved, which rows of x_proj are delta, B and C."""
    xz, weight, conv_bias, x_proj, dt_proj, dt_bias, A, D = (
        tensor.detach().numpy() for tensor in inner_inputs(1, 6, 3, 2, dt_rank=2, d_conv=3))
    time, d_inner = 6, 3
    x, z, u, y = xz[0, :, :3], xz[0, :, 3:], np.zeros((6, 3)), np.zeros((1, 6, 3))
    for t, d in np.ndindex(time, d_inner):
        pre = conv_bias[d] + sum(weight[d, k] * x[t - 2 + k, d] for k in range(3) if t - 2 + k >= 0)
        u[t, d] = pre / (1 + np.exp(-pre))
    h = np.zeros((d_inner, 2))
    for t in range(time):
        low_rank, B, C = np.split(x_proj @ u[t], [2, 4])
        for d in range(d_inner):
            dt = np.log1p(np.exp(dt_proj[d] @ low_rank + dt_bias[d]))
            h[d] = np.exp(dt * A[d]) * h[d] + dt * B * u[t, d]
            y[0, t, d] = (C @ h[d] + D[d] * u[t, d]) * z[t, d] / (1 + np.exp(-z[t, d]))
    inputs = inner_inputs(1, 6, 3, 2, dt_rank=2, d_conv=3)
    for backend in ("reference", "cpu"):
        assert relative_error(mamba_inner(*inputs, backend), torch.from_numpy(y)) < 1e-12
        got, conv_state, last = mamba_inner_with_state(*inputs, backend)
        assert relative_error(got, torch.from_numpy(y)) < 1e-12
        assert relative_error(last, torch.from_numpy(h)[None]) < 1e-12
        assert torch.equal(conv_state, torch.from_numpy(x[None, -2:].copy()).transpose(1, 2))


def test_reference_conv_against_a_sum_over_taps():
    x, weight, bias = torch.randn(2, 6, 3).double(), torch.randn(3, 4).double(), torch.randn(3).double()
    expected = torch.empty_like(x)
    for t in range(6):
        pre = bias + sum(weight[:, 3 - lag] * x[:, t - lag] for lag in range(min(t, 3) + 1))
        expected[:, t] = pre / (1 + torch.exp(-pre))
    assert relative_error(causal_conv_reference(x, weight, bias), expected) < 1e-12


# ---- the CPU kernels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_h0", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_scan_values_and_gradients(shape, with_h0, dtype):
    # The inputs are rounded first: what their rounding does to the results is no error of the scan.
    inputs = [tensor.double().requires_grad_() for tensor in cast(scan_inputs(*shape), dtype)]
    generator = torch.Generator().manual_seed(1)
    h0 = torch.randn(shape[0], *shape[2:], generator=generator).double() if with_h0 else None
    y, last = selective_scan_reference(*inputs, h0=h0)
    dy = torch.randn(y.shape, generator=generator).double()
    gradients = torch.autograd.grad(y, inputs, dy, allow_unused=True)

    u, delta, A, B, C, D, z, bias = (between(t) if t.dim() == 3 else t for t in cast(inputs, dtype))
    h0 = None if h0 is None else h0.to(dtype)
    got_y, states, got_last = scan_cpu.scan_forward(u, delta, A, B, C, D, z, bias, h0)
    dz, dB, dC = (between(torch.empty_like(t)) for t in (z, B, C))
    du, ddelta, dA, dD, dbias = scan_cpu.scan_backward(
        between(dy.to(dtype)), u, delta, A, B, C, D, z, bias, states, dz, dB, dC
    )
    assert relative_error(got_y, y) < TOLERANCE[dtype]
    assert relative_error(got_last, last) < TOLERANCE[dtype]
    for got, expected in zip((du, ddelta, dA, dB, dC, dD, dz, dbias), gradients, strict=True):
        assert got.dtype == dtype
        assert relative_error(got, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 4), (2, 3, 5, 4), (1, CHUNK, 16, 1), (3, 2 * CHUNK + 5, 21, 4), (1, 40, 32, 7)]
)
def test_conv_values_and_gradients(shape, dtype):
    batch, time, channels, taps = shape
    x, weight, bias = torch.randn(batch, time, channels), torch.randn(channels, taps), torch.randn(channels)
    leaves = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    xc = causal_conv_reference(*leaves)
    dxc = torch.randn(xc.shape, dtype=torch.float64)
    expected = torch.autograd.grad(xc, leaves, dxc)

    x, weight, bias = cast(leaves, dtype)
    x, dx = between(x), between(torch.empty_like(x))
    dweight, dbias = scan_cpu.conv_silu_backward(x, weight, bias, dxc.to(dtype), dx)
    assert relative_error(scan_cpu.conv_silu_forward(x, weight, bias), xc) < TOLERANCE[dtype]
    for got, want in zip((dx, dweight, dbias), expected, strict=True):
        assert relative_error(got, want) < TOLERANCE[dtype]


def test_views_around_the_outputs_are_left_alone():
    """dz, dB and dC are slices of larger tensors: what lies beside them must not change, nor may the inputs."""
    inputs = cast(scan_inputs(2, CHUNK + 3, 13, 3), torch.float32)
    before = [tensor.clone() for tensor in inputs]
    y, states, _ = scan_cpu.scan_forward(*inputs)
    wide = [torch.full((2, CHUNK + 3, width), 7.0) for width in (30, 20, 20)]
    views = wide[0][..., 4:17], wide[1][..., 2:5], wide[2][..., 11:14]
    scan_cpu.scan_backward(torch.ones_like(y), *inputs, states, *views)
    for tensor, view in zip(wide, views, strict=True):
        view.fill_(7.0)
        assert (tensor == 7.0).all()
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_softplus_over_their_range(dtype):
    """Through the scan: with C = 0, D = 1 and u = 1, y is silu(z); with B = 1, the first state is dt u = dt."""
    limit = 80 if dtype == torch.float32 else 700  # beyond it the results leave the normal range
    x = torch.cat([torch.linspace(-limit, limit, 4001), torch.linspace(-5, 5, 4001), torch.tensor([-1e9, 1e4, 1e9])])
    x = x.to(dtype).double()
    rows, one = x.reshape(1, 1, -1), torch.ones(1, 1, len(x), dtype=torch.float64)
    by_channel, by_state = torch.ones(len(x), dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
    y, _, h = scan_cpu.scan_forward(
        *cast((one, rows, -by_channel[:, None], by_state, 0 * by_state, by_channel, rows, 0 * by_channel), dtype)
    )
    # the rounding of the exponent, |x| eps, is in every result
    allowed = (8 + 2 * x.abs()) * torch.finfo(dtype).eps
    for value, expected in ((y, x * torch.sigmoid(x)), (h, torch.logaddexp(x, torch.zeros_like(x)))):
        assert ((value.double().flatten() - expected).abs() <= allowed * expected.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_decay_is_exact_over_the_range_of_exp(dtype):
    """With B = 0 and one step, the last state is exp(dt A) h0: from no decay to underflow, and growth for A > 0."""
    exponents = torch.cat([torch.linspace(-750, 80, 5000), torch.tensor([-1e4, -1e7, -1e12])]).to(dtype).double()
    n = len(exponents)
    rows = torch.ones(1, 1, n, dtype=torch.float64)
    dt = F.softplus(torch.ones(1, dtype=torch.float64))
    A = (exponents / dt)[:, None].to(dtype)
    zero, one = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    _, _, h = scan_cpu.scan_forward(*cast((rows, rows, A, 0 * rows[..., :1], rows[..., :1], zero, rows, zero), dtype),
                                    h0=one.reshape(1, n, 1).to(dtype))
    expected = torch.exp(dt * A.double()).flatten()
    smallest = torch.finfo(dtype).smallest_normal
    # the exponent's own rounding is |dt A| eps, and no exponential can undo it
    allowed = expected * (16 + 4 * exponents.abs()) * torch.finfo(dtype).eps + smallest
    assert ((h.double().flatten() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("A_log", [20.0, 40.0, 80.0, 200.0])
def test_an_extreme_decay_forgets_at_once(A_log, dtype):
    """A = -exp(A_log): from 5e8 to infinity. exp(dt A) is 0, so a state is its last input alone, never NaN."""
    time, d_inner, d_state = CHUNK + 3, 5, 2
    u, delta, _, B, C, D, z, bias = cast(scan_inputs(1, time, d_inner, d_state), dtype)
    A = -torch.full((d_inner, d_state), A_log, dtype=dtype).exp()
    h0 = torch.ones(1, d_inner, d_state, dtype=dtype)
    y, states, last = scan_cpu.scan_forward(u, delta, A, B, C, D, z, bias, h0)
    h = (F.softplus(delta + bias) * u).double()[..., None] * B.double()[:, :, None]
    expected = ((h * C[:, :, None]).sum(-1) + D * u) * F.silu(z.double())
    assert relative_error(last, h[:, -1]) < TOLERANCE[dtype]
    assert relative_error(y, expected) < TOLERANCE[dtype]
    if A.isfinite().all():  # dA is 0 and the rest is finite, as autograd says of the reference
        leaves = [t.double().requires_grad_() for t in (u, delta, A, B, C, D, z, bias)]
        wanted = torch.autograd.grad(selective_scan_reference(*leaves, h0=h0.double())[0].sum(), leaves)
        dz, dB, dC = (torch.empty_like(t) for t in (z, B, C))
        du, ddelta, dA, dD, dbias = scan_cpu.scan_backward(torch.ones_like(y), u, delta, A, B, C, D, z, bias, states,
                                                           dz, dB, dC)
        for got, want in zip((du, ddelta, dA, dB, dC, dD, dz, dbias), wanted, strict=True):
            assert relative_error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z"])
def test_nan_reaches_the_output(name):
    names = ("u", "delta", "A", "B", "C", "D", "z", "bias")
    inputs = dict(zip(names, cast(scan_inputs(1, CHUNK + 9, 20, 3), torch.float32), strict=True))
    inputs[name][0, 4, 2] = torch.nan
    y, states, last = scan_cpu.scan_forward(*inputs.values())
    reference, reference_last = selective_scan_reference(*inputs.values())
    assert torch.equal(y.isnan(), reference.isnan()) and y.isnan().any()
    assert torch.equal(last.isnan(), reference_last.isnan())
    views = (torch.empty_like(inputs[key]) for key in ("z", "B", "C"))
    gradients = scan_cpu.scan_backward(torch.ones_like(y), *inputs.values(), states, *views)
    assert any(gradient.isnan().any() for gradient in gradients)


def test_same_bits_every_time_and_for_any_number_of_threads(monkeypatch):
    inputs = cast(scan_inputs(3, 50, 40, 6), torch.float32)
    dy = torch.randn(3, 50, 40)

    def everything():
        y, states, last = scan_cpu.scan_forward(*inputs)
        views = [torch.empty_like(inputs[i]) for i in (6, 3, 4)]
        return [y, last, *views, *scan_cpu.scan_backward(dy, *inputs, states, *views)]

    first = everything()
    for n_threads in (1, 2, 3):  # more threads than batch rows would cut the channels: the sums for B and C differ
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n_threads: n)
        assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True))


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("channels", [1, 32, 33, 100, 256])
@pytest.mark.parametrize("n_threads", [1, 2, 3, 16])
def test_slices_cover_every_channel_once_in_whole_vectors(monkeypatch, batch, channels, n_threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    slices = scan_cpu._slices(batch, channels, 32)
    assert slices[0][0] == 0 and channels <= slices[-1][1] < channels + 32
    assert all(a[1] == b[0] for a, b in itertools.pairwise(slices))
    assert all(start % 32 == stop % 32 == 0 and start < stop for start, stop in slices)
    assert batch * len(slices) >= min(n_threads, batch * -(-channels // 32))  # a task for every thread


def test_threads_share_the_channels_of_a_single_row(monkeypatch):
    inputs = scan_inputs(1, 40, 100, 4)
    y, _ = selective_scan_reference(*inputs)
    gradients = torch.autograd.grad(y.sum(), inputs)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert len(scan_cpu._slices(1, 100, 8)) == 3
    inputs = cast(inputs, torch.float64)
    got, states, _ = scan_cpu.scan_forward(*inputs)
    dz, dB, dC = (torch.empty_like(inputs[i]) for i in (6, 3, 4))
    du, ddelta, dA, dD, dbias = scan_cpu.scan_backward(torch.ones_like(got), *inputs, states, dz, dB, dC)
    for value, expected in zip((got, du, ddelta, dA, dB, dC, dD, dz, dbias), (y, *gradients), strict=True):
        assert relative_error(value, expected) < 1e-10


# ---- the inner part of a block ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (2, CHUNK + 5, 21, 5), (3, 40, 32, 32)])
def test_inner_values_and_gradients(shape, dtype):
    inputs = inner_inputs(*shape)
    y = mamba_inner(*inputs, "reference")
    dy = torch.randn(y.shape, dtype=torch.float64)
    expected = torch.autograd.grad(y, inputs, dy, allow_unused=True)
    leaves = [tensor.requires_grad_() for tensor in cast(inputs, dtype)]
    got = mamba_inner(*leaves, "cpu")
    assert relative_error(got, y) < TOLERANCE[dtype]
    for value, want in zip(torch.autograd.grad(got, leaves, dy.to(dtype)), expected, strict=True):
        assert relative_error(value, want) < TOLERANCE[dtype]


def test_gradient_of_a_plain_sum(monkeypatch):
    """Its gradient is a single 1 expanded with stride 0, which a GPU's kernels don't take."""
    scan_backward = scan_cpu.scan_backward

    def checked(dy, *more):
        assert dy.stride(-1) == 1
        return scan_backward(dy, *more)

    monkeypatch.setattr(scan_cpu, "scan_backward", checked)
    leaves = inner_inputs(2, 9, 5, 2)
    expected = torch.autograd.grad(mamba_inner(*leaves, "reference").sum(), leaves)
    for got, want in zip(torch.autograd.grad(mamba_inner(*leaves, "cpu").sum(), leaves), expected, strict=True):
        assert relative_error(got, want) < 1e-10


def test_autocast_around_the_call_changes_nothing():
    """The dtypes follow from xz: under autocast the projections would otherwise return bfloat16."""
    leaves = [tensor.requires_grad_() for tensor in cast(inner_inputs(1, 7, 4, 2), torch.float32)]
    plain = mamba_inner(*leaves, "cpu")
    expected = torch.autograd.grad(plain.square().sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        y = mamba_inner(*leaves, "cpu")
        got = torch.autograd.grad(y.square().sum(), leaves)
    assert torch.equal(y, plain) and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixed", [False, True])
def test_half_precision_is_computed_in_float32(dtype, mixed):
    """Weights in the type of xz, as after model.to(bfloat16), or in float32, as under autocast."""
    inputs = cast(inner_inputs(2, CHUNK + 5, 21, 5), dtype)
    expected_leaves = [tensor.double().requires_grad_() for tensor in inputs]
    expected = mamba_inner(*expected_leaves, "reference")
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = torch.autograd.grad(expected, expected_leaves, dy.double())
    leaves = [inputs[0], *(tensor.float() if mixed else tensor for tensor in inputs[1:])]
    leaves = [tensor.detach().requires_grad_() for tensor in leaves]
    y = mamba_inner(*leaves, "cpu")
    assert y.dtype == dtype and relative_error(y, expected) < 8 * torch.finfo(dtype).eps
    for leaf, got, want in zip(leaves, torch.autograd.grad(y, leaves, dy), wanted, strict=True):
        assert got.dtype == leaf.dtype and relative_error(got, want) < 16 * torch.finfo(dtype).eps
    y, conv_state, h = mamba_inner_with_state(*leaves, "cpu")
    assert (y.dtype, conv_state.dtype, h.dtype) == (dtype, dtype, torch.float32)


def test_half_precision_scan_equals_the_scan_of_the_widened_inputs():
    """Only the results are rounded: nothing within the recurrence."""
    inputs = cast(scan_inputs(2, CHUNK + 3, 13, 3), torch.bfloat16)
    wide = [tensor.float() for tensor in inputs]
    (y, states, last), (wide_y, wide_states, wide_last) = scan_cpu.scan_forward(*inputs), scan_cpu.scan_forward(*wide)
    assert torch.equal(y, wide_y.bfloat16()) and torch.equal(states, wide_states) and torch.equal(last, wide_last)
    views, wide_views = ([torch.empty_like(tensors[i]) for i in (6, 3, 4)] for tensors in (inputs, wide))
    got = scan_cpu.scan_backward(torch.ones_like(y), *inputs, states, *views)
    want = scan_cpu.scan_backward(torch.ones_like(wide_y), *wide, states, *wide_views)
    for a, b in zip((*got, *views), (*want, *wide_views), strict=True):
        assert torch.equal(a, b.to(a.dtype))


def test_a_model_under_autocast_and_in_bfloat16():
    torch.manual_seed(0)
    model, x = CausalTimeSeriesMamba(3, d_model=8, n_layers=1, d_state=2, d_ff=8).eval(), torch.randn(2, 20, 3)
    expected = model(x)["1"].double()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)["1"]
        y.float().square().sum().backward()
    assert relative_error(y, expected) < 0.05
    assert relative_error(model.to(torch.bfloat16)(x.bfloat16())["1"], expected) < 0.05


def test_torch_func_and_export_of_a_fresh_model():
    torch.manual_seed(0)
    model, x = CausalTimeSeriesMamba(3, d_model=4, n_layers=1, d_state=2, d_ff=4).eval(), torch.randn(2, 7, 3)
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x[None],))["1"].square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, row in enumerate(x):
        expected = torch.autograd.grad(loss(parameters, row), list(parameters.values()))
        for got, want in zip(per_sample.values(), expected, strict=True):
            assert relative_error(got[i], want.double()) < 1e-4
    slope = torch.func.jvp(lambda x: model(x)["1"], (x,), (torch.ones_like(x),))[1]
    step = 1e-3
    difference = (model(x + step)["1"] - model(x - step)["1"]) / (2 * step)
    assert relative_error(slope, difference.double()) < 1e-2
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x)["1"], model(x)["1"])


@pytest.mark.parametrize("with_conv", [False, True])
def test_mamba_ssm_is_called_with_what_it_expects(monkeypatch, with_conv):
    """Stand-ins for the two packages, with their layout (batch, channels, time), must give what the reference gives."""
    called = []

    def selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
        called.append("scan")
        assert delta_softplus and return_last_state and D.dtype == A.dtype == delta_bias.dtype == torch.float32
        u, delta, B, C, z = (tensor.transpose(1, 2) for tensor in (u, delta, B, C, z))
        y, h = selective_scan_reference(u, delta, A, B, C, D, z, delta_bias)
        return y.transpose(1, 2), h

    def causal_conv1d_fn(x, weight, bias, activation):
        called.append("conv")
        assert activation == "silu"
        return causal_conv_reference(x.transpose(1, 2), weight, bias).transpose(1, 2)

    interface = SimpleNamespace(selective_scan_fn=selective_scan_fn)
    monkeypatch.setitem(sys.modules, "mamba_ssm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops", SimpleNamespace(selective_scan_interface=interface))
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", interface)
    monkeypatch.setitem(sys.modules, "causal_conv1d",
                        SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn) if with_conv else None)
    inputs = [tensor.requires_grad_() for tensor in cast(inner_inputs(2, 8, 4, 3), torch.float32)]
    y, expected = mamba_inner(*inputs, "mamba-ssm"), mamba_inner(*inputs, "reference")
    assert called == (["conv", "scan"] if with_conv else ["scan"])
    assert relative_error(y, expected.double()) < 1e-5
    gradients = [torch.autograd.grad(value.square().sum(), inputs) for value in (y, expected)]
    for got, want in zip(*gradients, strict=True):
        assert relative_error(got, want.double()) < 1e-5
    for got, want in zip(mamba_inner_with_state(*inputs, "mamba-ssm"), mamba_inner_with_state(*inputs, "reference"),
                         strict=True):
        assert relative_error(got, want.double()) < 1e-5


def test_inner_gradcheck():
    assert torch.autograd.gradcheck(lambda *args: mamba_inner(*args, "cpu"), inner_inputs(2, 5, 3, 2))


def test_a_convolution_computed_again_is_not_kept_and_changes_nothing(monkeypatch):
    inputs = inner_inputs(2, CHUNK + 3, 5, 2)
    expected = torch.autograd.grad(mamba_inner(*inputs, "cpu").square().sum(), inputs)
    monkeypatch.setattr(scan_cpu, "CONVOLVES_AGAIN", True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = mamba_inner(*inputs, "cpu")
    assert kept and all(tensor.shape != y.shape for tensor in kept)
    for got, want in zip(torch.autograd.grad(y.square().sum(), inputs), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("run", [mamba_inner, selective_scan._inner_op])
def test_y_is_given_to_a_backward_pass_that_needs_it_and_to_no_other(monkeypatch, run):
    """By the autograd Function and by the operator that torch.compile calls."""
    inputs, given = inner_inputs(2, CHUNK + 3, 5, 2), []
    scan_backward = scan_cpu.scan_backward
    monkeypatch.setattr(scan_cpu, "scan_backward", lambda *args: given.append(args[-1]) or scan_backward(*args))
    for dtypes in ((), (torch.float64,)):
        monkeypatch.setattr(scan_cpu, "NEEDS_Y", dtypes)
        outputs = run(*inputs, "cpu")
        y = outputs if run is mamba_inner else outputs[0]
        torch.autograd.grad(y.sum(), inputs)
    assert given[0] is None and torch.equal(given[1], y)


def test_inner_takes_the_weight_of_a_conv1d():
    inputs = inner_inputs(1, 6, 4, 2)
    y = mamba_inner(*inputs, "cpu")
    inputs[1] = inputs[1].unsqueeze(1)
    assert torch.equal(mamba_inner(*inputs, "cpu"), y)


@pytest.mark.parametrize("again", [False, True])
def test_inner_op_is_registered_as_torch_expects(monkeypatch, again):
    monkeypatch.setattr(scan_cpu, "CONVOLVES_AGAIN", again)
    monkeypatch.setattr(scan_cpu, "NEEDS_Y", (torch.float64,) if again else ())
    torch.library.opcheck(selective_scan._inner_op, (*inner_inputs(2, CHUNK + 3, 5, 2), "cpu"))


@pytest.mark.parametrize("needs_y", [(), (torch.float64,)])
def test_inner_compiles_without_a_graph_break(monkeypatch, needs_y):
    """aot_eager: traces forward and backward as torch.compile does, but needs no C++ compiler."""
    monkeypatch.setattr(scan_cpu, "NEEDS_Y", needs_y)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: mamba_inner(*args, "cpu"), fullgraph=True, backend="aot_eager")
    for time in (CHUNK, 50):  # the second length makes the time dynamic
        inputs = inner_inputs(2, time, 8, 3)
        expected = torch.autograd.grad(mamba_inner(*inputs, "cpu").square().sum(), inputs)
        got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_saved_memory_does_not_grow_with_the_state():
    """What autograd keeps: xz, its convolved half, the small projections, the parameters and one state per chunk."""
    batch, time, d_inner, d_state = 2, 8 * CHUNK, 64, 32
    inputs = [tensor.requires_grad_() for tensor in cast(inner_inputs(batch, time, d_inner, d_state), torch.float32)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        mamba_inner(*inputs, "cpu")
    row = batch * time * d_inner
    assert sum(saved) < 3 * row + row * d_state / CHUNK + row * 1.2 + sum(t.numel() for t in inputs[1:])
    assert max(saved) < row * d_state / 4


def test_backward_allocates_no_tensor_of_the_states(monkeypatch):
    """The largest tensor that either pass allocates is as large as xz, however many states a channel has."""
    batch, time, d_inner, d_state = 1, 4 * CHUNK, 32, 64
    inputs = [tensor.requires_grad_() for tensor in cast(inner_inputs(batch, time, d_inner, d_state), torch.float32)]
    sizes = []
    torch_empty, numpy_empty = torch.empty, np.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: (r := torch_empty(*a, **k), sizes.append(r.numel()))[0])
    monkeypatch.setattr(np, "empty", lambda *a, **k: (r := numpy_empty(*a, **k), sizes.append(r.size))[0])
    with torch.profiler.profile(profile_memory=True) as profile:
        mamba_inner(*inputs, "cpu").sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events()) / 4
    assert sizes and largest > 0
    assert max(largest, *sizes) < batch * time * d_inner * d_state / 8


# ---- one step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("length", [1, 2, CHUNK, CHUNK + 5])
def test_prefill_and_steps_equal_the_whole_sequence(backend, length):
    time, rank, d_state = CHUNK + 12, 3, 4
    inputs = cast(inner_inputs(2, time, 10, d_state, dt_rank=rank), torch.float64)
    xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D = inputs
    whole, whole_conv, whole_h = mamba_inner_with_state(*inputs, backend)
    assert relative_error(whole, mamba_inner(*inputs, "reference")) < 1e-10
    y, conv_state, h = mamba_inner_with_state(xz[:, :length], *inputs[1:], backend)
    outputs = [*y.unbind(1)]
    for t in range(length, time):
        x, z = xz[:, t].chunk(2, dim=-1)
        given = conv_state.clone(), h.clone()
        xc, next_conv = conv_step(conv_state, x, conv_weight, conv_bias)
        delta, B, C = (xc @ x_proj.T).split([rank, d_state, d_state], dim=-1)
        y, next_h = selective_scan_step(h, xc, delta @ dt_proj.T, A, B, C, D, z, dt_bias)
        assert torch.equal(given[0], conv_state) and torch.equal(given[1], h)
        conv_state, h = next_conv, next_h
        outputs.append(y)
    assert relative_error(torch.stack(outputs, 1), whole) < 1e-10
    assert relative_error(h, whole_h) < 1e-10
    assert torch.equal(conv_state, whole_conv)


# ---- choice of back end ----------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    """Decides which packages seem installed. GPUs seem to be there, with all that the back end cuda needs."""
    present = {"numba", "triton", "mamba_ssm"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(nvrtc, "libraries", lambda: ("NVRTC", "the driver"))
    monkeypatch.setattr(selective_scan.importlib.util, "find_spec", lambda name: object() if name in present else None)
    return present


@pytest.mark.parametrize(
    ("requested", "device", "missing", "expected"),
    [
        ("auto", "cpu", (), "cpu"),
        ("auto", "cuda", (), "cuda"),
        ("cuda", "cuda:1", (), "cuda"),
        ("triton", "cuda", (), "cuda"),  # its former name
        ("auto", "cuda:1", ("triton",), "mamba-ssm"),
        ("mamba-ssm", "cuda", (), "mamba-ssm"),
        ("reference", "cpu", ("numba",), "reference"),
        ("reference", "cuda", (), "reference"),
    ],
)
def test_backend_choice(monkeypatch, installed, requested, device, missing, expected):
    monkeypatch.setattr(selective_scan, "missing_for_cuda", lambda: None)
    installed.difference_update(missing)
    assert choose_backend(requested, device) == expected
    assert choose_backend(requested, torch.device(device)) == expected


@pytest.mark.parametrize(
    ("requested", "device", "missing", "message"),
    [
        ("cuda", "cpu", (), "CUDA"),
        ("triton", "cpu", (), "back end cuda needs a CUDA device"),
        ("mamba-ssm", "cpu", (), "CUDA"),
        ("cpu", "cuda", (), "does not run on a CUDA device"),
        ("fast", "cpu", (), "choose from"),
        ("auto", "meta", (), "meta"),
        ("auto", "cuda", ("triton", "mamba_ssm"), "triton, which is not installed: pip install triton; .*mamba"),
        ("auto", "cpu", ("numba",), "numba, which is not installed"),
        ("cuda", "cuda", ("triton",), "pip install triton"),
        ("mamba-ssm", "cuda", ("mamba_ssm",), "pip install mamba-ssm"),
        ("cpu", "cpu", ("numba",), "pip install numba"),
    ],
)
def test_backend_errors(installed, requested, device, missing, message):
    installed.difference_update(missing)
    with pytest.raises(UserError, match=message):
        choose_backend(requested, device)


@pytest.mark.parametrize(("here", "cc", "headers", "message"), [
    ((), None, True, "install gcc"), (("cc",), None, True, "install gcc"), (("gcc",), None, False, "-dev"),
    (("gcc",), "icc", True, "icc"), (("clang",), None, True, None), (("gcc",), None, True, None),
    (("icc",), "icc", True, None)])
def test_what_cuda_needs_is_said_before_it_runs(monkeypatch, tmp_path, installed, here, cc, headers, message):
    monkeypatch.setattr(selective_scan.shutil, "which", lambda name: name if name in here else None)
    monkeypatch.setattr(selective_scan.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    monkeypatch.delenv("CC", raising=False)
    if cc is not None:
        monkeypatch.setenv("CC", cc)
    if headers:
        (tmp_path / "Python.h").touch()
    if message is None:
        assert choose_backend("auto", "cuda") == "cuda"
        monkeypatch.setattr(nvrtc, "libraries", lambda: None)
        message = "NVRTC.*pip install nvidia-cuda-nvrtc"
    for requested in ("auto", "cuda"):
        with pytest.raises(UserError, match=message):
            choose_backend(requested, "cuda")
    assert choose_backend("reference", "cuda") == "reference" and choose_backend("mamba-ssm", "cuda") == "mamba-ssm"
    assert choose_backend("auto", "cpu") == "cpu"


def test_a_gpu_that_is_too_old_is_named_before_it_runs(monkeypatch, installed):
    """Below compute capability 7.5 auto is mamba-ssm, where that is installed."""
    monkeypatch.setattr(selective_scan, "missing_for_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    assert choose_backend("auto", "cuda:1") == "mamba-ssm" and choose_backend("reference", "cuda:1") == "reference"
    message = "capability 7.5 or above, and cuda:1 has 7.0; or choose --scan mamba-ssm, or --scan reference"
    with pytest.raises(UserError, match=message):
        choose_backend("cuda", "cuda:1")
    installed.discard("mamba_ssm")
    with pytest.raises(UserError, match=message):
        choose_backend("auto", "cuda:1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert choose_backend("auto", "cuda:1") == "cuda"
    with pytest.raises(UserError, match=r"8\.0 or above for bfloat16, and cuda:1 has 7\.5; give --no-amp"):
        selective_scan.check_bfloat16("cuda", torch.device("cuda:1"))
    selective_scan.check_bfloat16("mamba-ssm", torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    selective_scan.check_bfloat16("cuda", torch.device("cuda:1"))


def run_python(code, **environment):
    return subprocess.run([sys.executable, "-c", code], cwd=REPO, env={**os.environ, **environment}, text=True,
                          capture_output=True, check=True).stdout


def test_choice_is_printed_once_and_loads_no_kernel():
    code = """
import sys, torch
from kernels import selective_scan
torch.set_num_threads(2)
selective_scan.choose_backend("auto", "cpu")
selective_scan.choose_backend("cpu", "cpu")
print(sorted({"numba", "triton", "mamba_ssm", "kernels.scan_cpu"} & set(sys.modules)))
"""
    assert run_python(code) == "scan back end: cpu (numba, 2 threads)\n[]\n"


def test_the_first_calls_of_a_kernel_may_come_from_several_threads():
    """Numba registers at a call which array types a kernel takes, which is not safe in threads: all must be there."""
    code = """
import threading, torch
from kernels import scan_cpu
scan_cpu._compile(scan_cpu._conv_forward_kernel, torch.float32)

def late(self, *arguments):
    raise AssertionError("registered at a call")

scan_cpu._compile(scan_cpu._conv_forward_kernel, torch.float32)._search_new_conversions = late
barrier, ends = threading.Barrier(4), []
wide = torch.randn(2, 9, 12)
inputs = [wide[..., :6].contiguous(), wide[..., 3:9], wide[:1, :, :6], wide[:, ::2, 6:]]

def call(x):
    barrier.wait()
    scan_cpu.conv_silu_forward(x, torch.zeros(6, 4), torch.zeros(6))
    ends.append("ended")

threads = [threading.Thread(target=call, args=(x,)) for x in inputs]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(*ends)
"""
    assert run_python(code).split() == ["ended"] * 4


def test_kernels_are_compiled_anew_when_the_code_inlined_into_them_has_changed(tmp_path):
    """Numba's cache on disk looks at scan_cpu.py and step_cpu.py, but their kernels hold code of simd.py too."""
    folder = tmp_path / "kernels"
    shutil.copytree(REPO / "kernels", folder, ignore=shutil.ignore_patterns("__pycache__"))
    code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import generate
from kernels import scan_cpu, step_cpu
from mamba_model import CausalTimeSeriesMamba
model = CausalTimeSeriesMamba(3, d_model=4, n_layers=1, d_state=2, d_ff=4).eval()
generate.generate(model, torch.zeros(1, 4, 3).numpy(), 2)
scan = scan_cpu._compile(scan_cpu._conv_forward_kernel, torch.float32)
print(step_cpu.__file__, *(sum(kernel.stats.cache_hits.values()) for kernel in (step_cpu.run_tile, scan)))
"""

    def hits():
        command = [sys.executable, "-c", code, str(tmp_path)]
        out = subprocess.run(command, cwd=REPO, text=True, capture_output=True, check=True).stdout
        file, *hits = out.splitlines()[-1].split()
        assert file == str(folder / "step_cpu.py")
        return [int(n) for n in hits]

    assert [hits(), hits()] == [[0, 0], [1, 1]]
    with open(folder / "simd.py", "a") as file:
        file.write("# changed\n")
    assert hits() == [0, 0]


@pytest.mark.parametrize("linear", [True, False])
def test_a_second_derivative_ends_in_one_clear_message(linear):
    leaves = cast(inner_inputs(1, 9, 8, 4), torch.float32)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    y = mamba_inner(*leaves, "cpu")
    (first,) = torch.autograd.grad(y.sum() if linear else y.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; give --scan reference"):
        first.square().sum().backward()
    y = mamba_inner(*leaves, "reference")
    (first,) = torch.autograd.grad(y.sum(), leaves[:1], create_graph=True)
    first.square().sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
