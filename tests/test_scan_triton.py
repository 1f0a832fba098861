"""The Triton kernels against a float64 loop and autograd.

With a CUDA GPU they run on it. Without one, `test_through_the_interpreter` runs this file once more in a process of its
own under Triton's interpreter (TRITON_INTERPRET has to be set before the kernels are defined). Without triton, which
comes with CUDA builds of torch, nothing here runs.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: it comes with CUDA builds of torch", allow_module_level=True)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
CAN_RUN = INTERPRETED or torch.cuda.is_available()
runs_kernels = pytest.mark.skipif(not CAN_RUN, reason="needs a GPU or the interpreter")
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

if INTERPRETED:
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_for_numpy_2_4(tensor, scope):
        """Triton 3.6 takes int() of arrays with one element, for loop bounds; NumPy 2.4 no longer allows it."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_for_numpy_2_4

from kernels import scan_triton  # noqa: E402

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SHAPES = {
    # name: batch, time, d_inner, N, input dtype, initial state?, warps wanted per multiprocessor (more: time is split)
    "uneven": (2, 21, 18, 5, torch.float32, True, 1),
    "uneven, split": (2, 37, 18, 5, torch.float32, True, 12),
    "even": (1, 16, 32, 8, torch.float32, False, 1),
    "one step": (1, 1, 3, 1, torch.float32, True, 12),
    "wide state": (1, 9, 3, 70, torch.float32, False, 1),
    "bfloat16": (1, 20, 16, 16, torch.bfloat16, False, 1),
    "bfloat16, split": (1, 40, 16, 16, torch.bfloat16, True, 12),
    "float16": (1, 9, 16, 32, torch.float16, False, 1),
}


@pytest.mark.skipif(CAN_RUN, reason="the tests below run by themselves here")
def test_through_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not gpu", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


def reference_scan(u, delta, A, B, C, D, z, delta_bias, h0):
    """The recurrence, one step after the other: y and the last state."""
    dt = F.softplus(delta + delta_bias)
    h, ys = h0, []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        ys.append((h * C[:, t, None, :]).sum(-1) + D * u[:, t])
    return torch.stack(ys, 1) * F.silu(z), h


def reference_conv(x, weight, bias):
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=weight.shape[0])).transpose(1, 2)


def scan_inputs(batch, time, d_inner, n_state, dtype, device=DEVICE, seed=0):
    """u, delta, A, B, C, D, z, delta_bias as the Mamba block passes them: z, B and C are slices of wider tensors."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    xz = normal(batch, time, 2 * d_inner).to(device, dtype)
    x_dbl = normal(batch, time, 3 + 2 * n_state).to(device, dtype)
    u, delta = (normal(batch, time, d_inner).to(device, dtype) for _ in range(2))
    A = -(3 * torch.rand(d_inner, n_state, generator=generator)).to(device)
    D, delta_bias = normal(d_inner).to(device), (normal(d_inner) - 2).to(device)
    return u, delta, A, x_dbl[..., 3 : 3 + n_state], x_dbl[..., 3 + n_state :], D, xz[..., d_inner:], delta_bias


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def assert_close(names, actual, expected, tolerance):
    errors = {name: relative_error(a, e) for name, a, e in zip(names, actual, expected, strict=True)}
    assert all(error < tolerance for error in errors.values()), errors  # NaN fails too


def check_scan(batch, time, d_inner, n_state, dtype, with_h0):
    inputs = scan_inputs(batch, time, d_inner, n_state, dtype)
    h0 = torch.randn(batch, d_inner, n_state).to(DEVICE) if with_h0 else None
    dy = torch.randn(batch, time, d_inner).to(DEVICE, dtype)
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    start = h0.double() if with_h0 else torch.zeros(batch, d_inner, n_state, dtype=torch.float64, device=DEVICE)
    y_exact, h_exact = reference_scan(*exact, start)
    gradients = torch.autograd.grad(y_exact, exact, dy.double())

    y, chunk_states, h_last = scan_triton.scan_forward(*inputs, h0)
    assert chunk_states.shape == scan_triton.chunk_states_shape(batch, time, d_inner, n_state)
    assert chunk_states.dtype == scan_triton.chunk_states_dtype(dtype)
    dxz = torch.full((batch, time, 2 * d_inner), 7.0, device=DEVICE, dtype=dtype)
    dx_dbl = torch.full((batch, time, 3 + 2 * n_state), 7.0, device=DEVICE, dtype=dtype)
    dz, dB, dC = dxz[..., d_inner:], dx_dbl[..., 3 : 3 + n_state], dx_dbl[..., 3 + n_state :]
    du, ddelta, dA, dD, ddelta_bias = scan_triton.scan_backward(dy, *inputs, chunk_states, dz, dB, dC)

    assert (dxz[..., :d_inner] == 7).all() and (dx_dbl[..., :3] == 7).all()  # nothing beside the views is touched
    assert y.dtype == du.dtype == ddelta.dtype == dtype
    assert h_last.dtype == dA.dtype == dD.dtype == ddelta_bias.dtype == torch.float32
    tolerance = TOLERANCE[dtype]
    assert_close(["y", "h"], [y, h_last], [y_exact, h_exact], tolerance)
    actual = [du, ddelta, dA, dB, dC, dD, dz, ddelta_bias]
    assert_close(["du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias"], actual, gradients, tolerance)


@runs_kernels
@pytest.mark.parametrize("name", SHAPES)
def test_scan(name, monkeypatch):
    *shape, warps_to_fill = SHAPES[name]
    monkeypatch.setattr(scan_triton, "WARPS_TO_FILL", warps_to_fill)
    check_scan(*shape)


@runs_kernels
@pytest.mark.parametrize(("time", "d_inner", "width", "dtype"), [
    (1, 3, 4, torch.float32), (19, 40, 4, torch.float32), (70, 8, 2, torch.bfloat16),
])  # fmt: skip
def test_conv(time, d_inner, width, dtype):
    xz = torch.randn(2, time, 2 * d_inner).to(DEVICE, dtype)
    x, weight, bias = xz[..., :d_inner], torch.randn(d_inner, width, device=DEVICE), torch.randn(d_inner, device=DEVICE)
    dxc = torch.randn(2, time, d_inner).to(DEVICE, dtype)
    exact = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    xc_exact = reference_conv(*exact)
    gradients = torch.autograd.grad(xc_exact, exact, dxc.double())
    dxz = torch.full_like(xz, 7.0)
    xc = scan_triton.conv_silu_forward(x, weight, bias)
    dweight, dbias = scan_triton.conv_silu_backward(x, weight, bias, dxc, dxz[..., :d_inner])
    assert (dxz[..., d_inner:] == 7).all()
    assert_close(["xc"], [xc], [xc_exact], TOLERANCE[dtype])
    assert_close(["dx", "dweight", "dbias"], [dxz[..., :d_inner], dweight, dbias], gradients, TOLERANCE[dtype])


@runs_kernels
def test_nan_stays_nan_and_in_its_place():
    u, *rest = scan_inputs(1, 12, 4, 4, torch.float32)
    u[0, 5, 2] = float("nan")
    y, _, h_last = scan_triton.scan_forward(u, *rest)
    assert y[0, 5:, 2].isnan().all() and h_last[0, 2].isnan().all()
    y[0, 5:, 2] = 0
    assert y.isfinite().all()


@runs_kernels
@pytest.mark.parametrize("time", [8, 11])
def test_an_extreme_decay_forgets_at_once(time):
    """A = -exp(40): exp(dt A) is 0, so a state is its last input alone, and no gradient is NaN."""
    u, delta, A, B, C, D, z, delta_bias = scan_inputs(1, time, 4, 2, torch.float32)
    A = torch.full_like(A, -2.0**58)
    h0 = torch.ones(1, 4, 2, device=DEVICE)
    y, chunk_states, h_last = scan_triton.scan_forward(u, delta, A, B, C, D, z, delta_bias, h0)
    h = (F.softplus(delta + delta_bias) * u).double()[..., None] * B.double()[:, :, None]
    assert_close(["h", "y"], [h_last, y], [h[:, -1], ((h * C[:, :, None]).sum(-1) + D * u) * F.silu(z.double())], 3e-6)
    dz, dB, dC = (torch.empty_like(tensor) for tensor in (z, B, C))
    gradients = scan_triton.scan_backward(torch.ones_like(y), u, delta, A, B, C, D, z, delta_bias, chunk_states, dz, dB,
                                          dC)
    assert all(gradient.isfinite().all() for gradient in (*gradients, dz, dB, dC)) and not gradients[2].any()


@runs_kernels
def test_softplus_keeps_its_digits_far_from_zero():
    """h after one step from zero is dt B u: reads dt off for delta from -20 to 80."""
    delta = torch.linspace(-20, 80, 161, device=DEVICE)[None, None]
    ones = torch.ones_like(delta)
    A, D = -torch.ones(161, 1, device=DEVICE), torch.zeros(161, device=DEVICE)
    _, _, h = scan_triton.scan_forward(ones, delta, A, ones[..., :1], ones[..., :1], D, ones, D)
    expected = F.softplus(delta[0, 0].double(), threshold=100)
    assert torch.allclose(h[0, :, 0].double(), expected, rtol=3e-6, atol=0)


@runs_kernels
def test_what_it_does_not_compute_is_refused():
    inputs = scan_inputs(1, 4, 4, 4, torch.float32)
    with pytest.raises(scan_triton.cli.UserError, match="float64"):
        scan_triton.scan_forward(*(tensor.double() for tensor in inputs))
    u, *rest = inputs
    with pytest.raises(scan_triton.cli.UserError, match="contiguous"):
        scan_triton.scan_forward(u.transpose(1, 2), *rest)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("batch", "time", "d_inner", "n_state"), [
    (1, 1024, 256, 32), (4, 300, 256, 32), (64, 257, 256, 32), (16, 128, 192, 16), (2, 200, 64, 64), (3, 100, 40, 200),
])  # fmt: skip
def test_scan_on_gpu(batch, time, d_inner, n_state, dtype):
    torch.manual_seed(0)
    check_scan(batch, time, d_inner, n_state, dtype, with_h0=batch < 4)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_results_repeat_bit_for_bit():
    inputs = scan_inputs(8, 256, 256, 32, torch.bfloat16)
    dy = torch.randn_like(inputs[0])

    def once():
        y, states, h = scan_triton.scan_forward(*inputs)
        dz, dB, dC = (torch.empty_like(inputs[i]) for i in (6, 3, 4))
        return [y, states, h, dz, dB, dC, *scan_triton.scan_backward(dy, *inputs, states, dz, dB, dC)]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))
