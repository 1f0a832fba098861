"""The Triton kernels, those of the convolution, against float64 and autograd.

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

import cli  # noqa: E402
from kernels import conv_triton  # noqa: E402

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2}


@pytest.mark.skipif(CAN_RUN, reason="the tests below run by themselves here")
def test_through_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-m", "not gpu", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


def reference_conv(x, weight, bias):
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=weight.shape[0])).transpose(1, 2)


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def assert_close(names, actual, expected, tolerance):
    errors = {name: relative_error(a, e) for name, a, e in zip(names, actual, expected, strict=True)}
    assert all(error < tolerance for error in errors.values()), errors  # NaN fails too


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
    xc = conv_triton.conv_silu_forward(x, weight, bias)
    dweight, dbias = conv_triton.conv_silu_backward(x, weight, bias, dxc, dxz[..., :d_inner])
    assert (dxz[..., d_inner:] == 7).all()
    assert_close(["xc"], [xc], [xc_exact], TOLERANCE[dtype])
    assert_close(["dx", "dweight", "dbias"], [dxz[..., :d_inner], dweight, dbias], gradients, TOLERANCE[dtype])


@runs_kernels
def test_what_it_does_not_compute_is_refused():
    x, weight, bias = (torch.zeros(shape, device=DEVICE) for shape in ((1, 4, 4), (4, 4), (4,)))
    with pytest.raises(cli.UserError, match="float64"):
        conv_triton.conv_silu_forward(x.double(), weight, bias)
    with pytest.raises(cli.UserError, match="contiguous"):
        conv_triton.conv_silu_forward(x.transpose(1, 2), weight, bias)
