"""The selective scan of Mamba: its equations, one interface to several back ends, and the one-step recurrence.

`mamba_inner` is everything in a Mamba block between in_proj and out_proj (Gu & Dao 2023, arXiv 2312.00752, algorithm 2
and figure 3): causal convolution, the projections that make the recurrence depend on its input, the scan and the gate.

Back ends (`choose_backend`): "cpu" (scan_cpu.py, Numba), "cuda" (scan_cuda.py, CUDA C++, with the convolution before it
in conv_triton.py, Triton), "mamba-ssm" (the package of the paper's authors, CUDA) and "reference" (a loop over time in
plain torch, any device: slow, and what the others are tested against). Numba, Triton and mamba-ssm are imported when
their back end first runs, not before.

The equations, with the names that both backward kernels use for the same quantities
------------------------------------------------------------------------------------
For each sequence, channel and step t there are u, delta and z; for each sequence and step B and C, vectors over the N
states, which all channels share; for each channel A, a vector over the states, D and delta_bias. The state h and
everything written with A, B or C below is a vector over the states; a . b is the sum over them.

Forward (equation 2 and section 3.2 of the paper, with B discretised as dt B, as the authors' code does):

    dt_t = softplus(delta_t + delta_bias)          step size, the paper's Δ
    a_t  = exp(dt_t A)                             decay
    v_t  = dt_t u_t                                what enters the state
    h_t  = a_t h_{t-1} + v_t B_t                   state; h_{-1} = h0, zero in the model
    o_t  = C_t . h_t + D u_t                       output before the gate
    y_t  = o_t silu(z_t)                           output

Backward: dx stands for the gradient of the loss with respect to x, given dy. The adjoint state dh_t collects what h_t
contributes through o_t and, by way of h_{t+1}, through all later steps, so it is a recurrence that runs back in time:

    do_t    = dy_t silu(z_t)
    dh_t    = do_t C_t + carry_{t+1}               carry behind the last step: zero
    carry_t = a_t dh_t                             what step t hands on to h_{t-1}
    de_t    = carry_t h_{t-1}                      gradient of the exponent e_t = dt_t A

and from these, at each step,

    dv_t     = dh_t . B_t
    du_t     = dv_t dt_t + do_t D
    ddt_t    = dv_t u_t + de_t . A
    ddelta_t = ddt_t slope_t                       slope_t = sigmoid(delta_t + delta_bias), the slope of the softplus
    dz_t     = dy_t o_t silu'(z_t)                 silu'(z) = gate (1 + z (1 - gate)) with gate = sigmoid(z)
    dB_t     = sum over channels of dh_t v_t
    dC_t     = sum over channels of do_t h_t

and, summed over sequences and steps,

    dA          = sum of de_t dt_t
    dD          = sum of do_t u_t
    ddelta_bias = sum of ddelta_t

The kernels hold A2 = A log2(e), because 2^x takes fewer instructions than e^x: a_t = 2^(dt_t A2), and de_t . A is
ln(2) de_t . A2. They keep h only at the boundaries of chunks of steps, and compute it again between these on the way
back.
"""

import functools
import importlib
import importlib.util
import os
import shutil
import sys
import sysconfig

import torch
import torch.nn.functional as F

from cli import BACKENDS, UserError, backend_name

NO_SECOND_DERIVATIVE = ("the kernels of the selective scan have no second derivative; give --scan reference, or "
                        "model.use_scan(\"reference\", device), which is slow")
# Of the back ends with kernels of their own: the module of the convolution and that of the scan.
KERNEL_MODULES = {"cpu": ("kernels.scan_cpu", "kernels.scan_cpu"), "cuda": ("kernels.conv_triton", "kernels.scan_cuda")}
# The least compute capability of a GPU for the back end cuda, and for bfloat16 inputs, which take its tensor cores.
LEAST_CAPABILITY, BFLOAT16_CAPABILITY = (7, 5), (8, 0)


# ---- reference -------------------------------------------------------------------------------------------------


def causal_conv_reference(x, weight, bias):
    """silu(causal depthwise convolution) over time: x (batch, time, d_inner), weight (d_inner, d_conv), x_{t<0} = 0."""
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight.unsqueeze(1), bias, groups=x.shape[2])).transpose(1, 2)


def selective_scan_reference(u, delta, A, B, C, D, z, delta_bias, h0=None):
    """The forward equations as a loop over time, differentiable: the reference for values and gradients.

    u, delta, z: (batch, time, d_inner); A: (d_inner, d_state), not positive; B, C: (batch, time, d_state);
    D, delta_bias: (d_inner,). h0: (batch, d_inner, d_state), the state before the first step, zero if it is None, as
    the model has it: only the tests give another.
    Returns y (batch, time, d_inner) and the last state (batch, d_inner, d_state).
    """
    h = u.new_zeros(u.shape[0], *A.shape) if h0 is None else h0
    steps = []
    for t in range(u.shape[1]):
        y, h = selective_scan_step(h, u[:, t], delta[:, t], A, B[:, t], C[:, t], D, z[:, t], delta_bias)
        steps.append(y)
    return torch.stack(steps, dim=1), h


# ---- one time step ---------------------------------------------------------------------------------------------


def selective_scan_step(h, u, delta, A, B, C, D, z, delta_bias):
    """One step of the recurrence, from the state h (batch, d_inner, d_state) and one step's inputs: (y, the new state).

    u, delta, z: (batch, d_inner); B, C: (batch, d_state); the rest as in `selective_scan_reference`. No input is
    changed in place.
    """
    dt = F.softplus(delta + delta_bias)
    h = torch.exp(dt.unsqueeze(-1) * A) * h + (dt * u).unsqueeze(-1) * B.unsqueeze(1)
    o = torch.einsum("bdn,bn->bd", h, C.to(h.dtype)) + D * u
    return (o * F.silu(z)).to(u.dtype), h


def conv_step(conv_state, x, weight, bias):
    """One step of the causal convolution, from the d_conv - 1 inputs before it and x (batch, d_inner).

    conv_state (batch, d_inner, d_conv - 1) holds these inputs, the oldest first, zeros before the first step. It is not
    changed in place. Returns (silu(convolution), the new conv_state).
    """
    window = torch.cat((conv_state, x.unsqueeze(-1).to(conv_state.dtype)), dim=-1)
    return F.silu((window * weight).sum(-1) + bias).to(x.dtype), window[..., 1:]


# ---- choice of back end ----------------------------------------------------------------------------------------


def choose_backend(requested, device):
    """The back end for tensors on `device`. It is printed once per process.

    `requested` is one of BACKENDS; "auto" means cpu on a CPU, and on CUDA cuda or, where Triton isn't installed or the
    GPU is too old for it, mamba-ssm if that is installed. Raises UserError where the request can't be met: no other
    back end is taken in its place.
    """
    device, requested = torch.device(device), backend_name(requested)
    if requested not in BACKENDS:
        raise UserError(f"unknown scan back end {requested!r}; choose from {', '.join(BACKENDS)}")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"no scan back end for device {device.type}; use a CPU or a CUDA device")
    backend = requested
    if requested == "auto":
        fitting = ("cpu",) if device.type == "cpu" else ("cuda", "mamba-ssm")
        backend = next((name for name in fitting if _unfit(name, device) is None), fitting[0])
    if backend in ("cuda", "mamba-ssm") and device.type == "cpu":
        raise UserError(f"scan back end {backend} needs a CUDA device; use cpu or reference on a CPU")
    if backend == "cpu" and device.type == "cuda":
        raise UserError("scan back end cpu does not run on a CUDA device; use cuda, mamba-ssm or reference there")
    missing = _unfit(backend, device) or (missing_for_cuda() if backend == "cuda" else None)
    if missing:
        others = "--scan mamba-ssm, or --scan reference" if backend == "cuda" else "--scan reference"
        raise UserError(f"scan back end {backend} needs {missing}; or choose {others}, which is slow")
    _announce(f"cpu (numba, {torch.get_num_threads()} threads)" if backend == "cpu" else backend)
    return backend


def _unfit(backend, device):
    """What a back end needs and hasn't here, in words: its package, or a newer GPU. None where it has both."""
    module = {"cpu": "numba", "cuda": "triton", "mamba-ssm": "mamba_ssm"}.get(backend)
    if module is not None and importlib.util.find_spec(module) is None:
        package = module.replace("_", "-")
        return f"the package {package}, which is not installed: pip install {package}"
    if backend == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return f"{_capability_words(LEAST_CAPABILITY)}, and {_gpu_words(device)}"
    return None


def _capability_words(least):
    return "a GPU of compute capability {}.{} or above".format(*least)


def _gpu_words(device):
    return "{} has {}.{}".format(device, *torch.cuda.get_device_capability(device))


def check_bfloat16(backend, device):
    """Raise UserError where a back end can't take the bfloat16 inputs that autocast makes on this torch.device."""
    if backend == "cuda" and torch.cuda.get_device_capability(device) < BFLOAT16_CAPABILITY:
        raise UserError(f"scan back end cuda needs {_capability_words(BFLOAT16_CAPABILITY)} for bfloat16, and "
                        f"{_gpu_words(device)}; give --no-amp, or --scan reference, which is slow")


def missing_for_cuda():
    """What this machine lacks for the back end cuda, in words that say what to install, or None.

    The scan is compiled by NVRTC. Beside it Triton, for the convolution, builds a small C file per process and kernel,
    with the compiler that CC names, else gcc or clang, against Python's headers. The usual runtime containers have
    neither compiler nor headers.
    """
    compiler = os.environ.get("CC")
    if compiler is None and not (shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler: install gcc (apt-get install gcc), or name one by the variable CC"
    if compiler is not None and not shutil.which(compiler):
        return f"a C compiler, and there is none at {compiler}, which the variable CC names; install gcc and unset CC"
    headers = os.path.join(sysconfig.get_paths(scheme="posix_prefix")["include"], "Python.h")
    if os.name == "posix" and not os.path.exists(headers):
        version = "{}.{}".format(*sys.version_info)
        return f"Python's headers, and there is no {headers}; install them (apt-get install python{version}-dev)"
    from kernels import nvrtc

    if nvrtc.libraries() is None:
        return "NVRTC, which torch's CUDA builds bring along, and which was not found: pip install nvidia-cuda-nvrtc"
    return None


@functools.cache
def _announce(choice):
    print(f"scan back end: {choice}", flush=True)


# ---- the inner part of a Mamba block ---------------------------------------------------------------------------


def mamba_inner(xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, backend):
    """What a Mamba block does between in_proj and out_proj; differentiable.

    xz (batch, time, 2 d_inner): in_proj's output, the scan's branch first, the gate's second; conv_weight
    (d_inner, d_conv) or (d_inner, 1, d_conv); conv_bias (d_inner,); x_proj_weight (dt_rank + 2 d_state, d_inner), or
    with one more column, a bias; dt_proj_weight (d_inner, dt_rank); dt_proj_bias (d_inner,); A (d_inner, d_state), not
    positive; D (d_inner,); backend: what `choose_backend` returned. Returns y (batch, time, d_inner), gated.

    For the backward pass "cpu" and "cuda" keep xz, x_proj's output and one state per chunk of steps, never one per
    step; "cpu" also keeps the convolved half of xz, which "cuda" computes again, and "cuda", with bfloat16, y, which
    out_proj keeps as well. Where xz is bfloat16 or float16, the projections are computed in that type and the
    recurrence in float32; the gradients of the weights have the weights' dtype.
    """
    parameters = conv_weight.flatten(1), conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D
    if torch._C._are_functorch_transforms_active():
        backend = "reference"  # torch.func (vmap, grad, jvp) can't look into a kernel: slower, but it works
    if backend in KERNEL_MODULES:
        if torch.compiler.is_compiling():
            return _inner_op(xz, *parameters, backend)[0]
        return _Inner.apply(xz, *parameters, backend)
    return _inner_autograd(xz, *parameters, backend)[0]


@torch.no_grad()
def mamba_inner_with_state(xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, backend):
    """`mamba_inner` without gradient, and the state after the last step, from which single steps can continue.

    Returns y (batch, time, d_inner), conv_state (batch, d_inner, d_conv - 1) for `conv_step` and h
    (batch, d_inner, d_state) for `selective_scan_step`.
    """
    parameters = conv_weight.flatten(1), conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D
    if backend in KERNEL_MODULES:
        y, h, _ = _inner_forward(xz, *parameters, backend)
    else:
        y, h = _inner_autograd(xz, *parameters, backend)
    history = conv_weight.shape[-1] - 1
    x = xz[..., : A.shape[0]].transpose(1, 2)
    conv_state = F.pad(x, (history, 0))[..., x.shape[2] :].contiguous()
    return y, conv_state, h.contiguous()


def matrix_and_bias(weight, n_in):
    """A weight (n_out, n_in) and None, or, where it has one more column, without it and that column: the bias."""
    return (weight, None) if weight.shape[1] == n_in else (weight[:, :n_in], weight[:, n_in])


def linear_of(x, weight):
    """x (…, n_in) times a weight as `matrix_and_bias` takes it, (…, n_out), computed in the type of x."""
    matrix, bias = matrix_and_bias(weight, x.shape[-1])
    return F.linear(x, matrix.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _inner_autograd(xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, backend):
    """The inner part for the back ends that autograd can differentiate as they are: (y, last state)."""
    conv, scan = {"reference": (causal_conv_reference, selective_scan_reference),
                  "mamba-ssm": (_conv_mamba_ssm, _scan_mamba_ssm)}[backend]
    x, z = xz.chunk(2, dim=-1)
    xc = conv(x, conv_weight.to(xz.dtype), conv_bias.to(xz.dtype))
    sizes = [dt_proj_weight.shape[1], A.shape[1], A.shape[1]]
    delta, B, C = linear_of(xc, x_proj_weight).split(sizes, dim=-1)
    return scan(xc, F.linear(delta, dt_proj_weight.to(xz.dtype)), A, B, C, D, z, dt_proj_bias)


def _conv_mamba_ssm(x, weight, bias):
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError:  # an optional companion of mamba-ssm
        return causal_conv_reference(x, weight, bias)
    return causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)


def _scan_mamba_ssm(u, delta, A, B, C, D, z, delta_bias):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, B, C, z = (tensor.transpose(1, 2) for tensor in (u, delta, B, C, z))
    y, h = selective_scan_fn(u, delta, A.float(), B, C, D.float(), z, delta_bias.float(), delta_softplus=True,
                             return_last_state=True)
    return y.transpose(1, 2), h


# ---- forward and backward with the kernels -----------------------------------------------------------------------


def _kernels(backend):
    """The modules of a back end that has kernels, (convolution, scan); imported when they are first asked for."""
    return [importlib.import_module(module) for module in KERNEL_MODULES[backend]]


def _inner_forward(xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, backend):
    """(y, last state, what the backward pass needs). The third is a tuple: xc, the convolved input, or nothing where
    the backward pass computes it again; x_dbl (batch, time, dt_rank + 2 d_state), x_proj's output; the states at chunk
    boundaries."""
    conv, scan = _kernels(backend)
    x, z = xz.chunk(2, dim=-1)
    xc = conv.conv_silu_forward(x, conv_weight, conv_bias)
    x_dbl = linear_of(xc, x_proj_weight)
    low_rank, B, C = _split(x_dbl, dt_proj_weight, A)
    delta = F.linear(low_rank, dt_proj_weight.to(xz.dtype))
    y, chunk_states, h = scan.scan_forward(xc, delta, A, B, C, D, z, dt_proj_bias)
    if conv.CONVOLVES_AGAIN:
        xc = xc.new_empty(0)
    return y, h, (xc, x_dbl, chunk_states)


def _needed(y, backend):
    """y, or None where the backward pass does without it, and so must not keep it."""
    return y if y.dtype in _kernels(backend)[1].NEEDS_Y else None


def _split(x_dbl, dt_proj_weight, A):
    """x_proj's output cut into the low-rank form of delta (batch, time, dt_rank), B and C (batch, time, d_state)."""
    return x_dbl.split([dt_proj_weight.shape[1], A.shape[1], A.shape[1]], dim=-1)


def _inner_backward(
    dy, xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D,
    y, xc, x_dbl, chunk_states, backend,
):
    """The gradients of xz and the parameters, from that of y."""
    conv, scan = _kernels(backend)
    x, z = xz.chunk(2, dim=-1)
    low_rank, B, C = _split(x_dbl, dt_proj_weight, A)
    dt_weight = dt_proj_weight.to(xz.dtype)
    if conv.CONVOLVES_AGAIN:
        xc = conv.conv_silu_forward(x, conv_weight, conv_bias)
    dxz = torch.empty_like(xz, memory_format=torch.contiguous_format)
    dx_dbl = torch.empty_like(x_dbl)
    dx, dz = dxz.chunk(2, dim=-1)
    delta = dx  # it lies where dx will be written at the end; as large as xc, it is computed again rather than kept
    torch.mm(low_rank.flatten(0, 1), dt_weight.T, out=delta.flatten(0, 1))
    d_low_rank, dB, dC = _split(dx_dbl, dt_proj_weight, A)
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()  # the gradient of a sum is one number, expanded with stride 0
    dxc, d_delta, dA, dD, d_dt_bias = scan.scan_backward(
        dy, xc, delta, A, B, C, D, z, dt_proj_bias, chunk_states, dz, dB, dC, y
    )
    d_delta = d_delta.flatten(0, 1)
    torch.mm(d_delta, dt_weight, out=d_low_rank.flatten(0, 1))
    d_dt_weight = d_delta.T @ low_rank.flatten(0, 1)
    x_proj_matrix, x_proj_bias = matrix_and_bias(x_proj_weight, A.shape[0])
    d_x_proj_weight = dx_dbl.flatten(0, 1).T @ xc.flatten(0, 1)
    if x_proj_bias is not None:
        d_x_proj_weight = torch.cat([d_x_proj_weight, dx_dbl.sum((0, 1))[:, None]], dim=1)
    dxc.flatten(0, 1).addmm_(dx_dbl.flatten(0, 1), x_proj_matrix.to(xz.dtype))
    d_conv_weight, d_conv_bias = conv.conv_silu_backward(x, conv_weight, conv_bias, dxc, dx)
    return (dxz, d_conv_weight.to(conv_weight.dtype), d_conv_bias.to(conv_bias.dtype),
            d_x_proj_weight.to(x_proj_weight.dtype), d_dt_weight.to(dt_proj_weight.dtype),
            d_dt_bias.to(dt_proj_bias.dtype), dA.to(A.dtype), dD.to(D.dtype))


def _without_autocast(function, first, *args):
    """function(first, *args) outside of autocast: the dtypes follow from xz's, and autocast must not change them."""
    with torch.autocast(first.device.type, enabled=False):
        return function(first, *args)


class _Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx, xz, *args):
        *parameters, ctx.backend = args
        y, _, for_backward = _without_autocast(_inner_forward, xz, *args)
        ctx.save_for_backward(xz, *parameters, _needed(y, ctx.backend), *for_backward)
        return y

    @staticmethod
    def backward(ctx, dy):
        with torch.no_grad():
            gradients = _without_autocast(_inner_backward, dy, *ctx.saved_tensors, ctx.backend)
        return *_differentiable_once(gradients, (dy, *ctx.saved_tensors)), None


def _differentiable_once(gradients, inputs):
    """The gradients as they are or, where a graph of them is asked for (create_graph=True), as a node of it whose own
    backward pass says that there is none. (torch's once_differentiable looks at dy alone, and words it otherwise.)"""
    if not (torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)):
        return gradients
    node = torch._C._functions.DelayedError(NO_SECOND_DERIVATIVE.encode(), len(gradients))
    return node(*(gradient.detach().requires_grad_() for gradient in gradients))


# The same as a custom operator, for torch.compile: it calls an operator without looking inside, where it would try to
# trace a Function. Without torch.compile the Function is used, because calling the operator takes longer: by a
# millisecond per block, forward and backward, on the host of an H100.


@torch.library.custom_op("mambasynth::mamba_inner", mutates_args=())
def _inner_op(
    xz: torch.Tensor, conv_weight: torch.Tensor, conv_bias: torch.Tensor, x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor, dt_proj_bias: torch.Tensor, A: torch.Tensor, D: torch.Tensor, backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    y, _, for_backward = _without_autocast(
        _inner_forward, xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, backend
    )
    return y, *for_backward


@_inner_op.register_fake
def _(xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, backend):
    batch, time, _ = xz.shape
    conv, scan = _kernels(backend)
    states = xz.new_empty(scan.chunk_states_shape(batch, time, *A.shape), dtype=scan.chunk_states_dtype(xz.dtype))
    y = xz.new_empty(batch, time, A.shape[0])
    xc = xz.new_empty(0) if conv.CONVOLVES_AGAIN else torch.empty_like(y)
    return y, xc, xz.new_empty(batch, time, x_proj_weight.shape[0]), states


@torch.library.custom_op("mambasynth::mamba_inner_backward", mutates_args=())
def _inner_backward_op(
    dy: torch.Tensor, xz: torch.Tensor, conv_weight: torch.Tensor, conv_bias: torch.Tensor,
    x_proj_weight: torch.Tensor, dt_proj_weight: torch.Tensor, dt_proj_bias: torch.Tensor, A: torch.Tensor,
    D: torch.Tensor, y: torch.Tensor | None, xc: torch.Tensor, x_dbl: torch.Tensor, chunk_states: torch.Tensor,
    backend: str,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:
    return _without_autocast(
        _inner_backward, dy, xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D,
        y, xc, x_dbl, chunk_states, backend,
    )


@_inner_backward_op.register_fake
def _(dy, xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, *_):
    like = (xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D)
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in like)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    y, *for_backward = output
    ctx.save_for_backward(*tensors, _needed(y, ctx.backend), *for_backward)
    # Only y has a gradient; for the outputs that are kept for the backward pass no zeros need to be made.
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 9
    return *_inner_backward_op(dy, *ctx.saved_tensors, ctx.backend), None


_inner_op.register_autograd(_backward, setup_context=_save_for_backward)
