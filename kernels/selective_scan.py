"""The selective scan of Mamba: one interface, several back ends, and the one-step recurrence.

`mamba_inner` is everything in a Mamba block between in_proj and out_proj (Gu & Dao 2023, arXiv 2312.00752, algorithm 2
and figure 3): causal convolution, the projections that make the recurrence depend on its input, the scan and the gate.

Back ends (`choose_backend`): "cpu" (scan_cpu.py, Numba), "triton" (scan_triton.py, CUDA), "mamba-ssm" (the package of
the paper's authors, CUDA) and "reference" (a loop over time in plain torch, any device: slow, and what the others are
tested against). Numba, Triton and mamba-ssm are imported when their back end first runs, not before.
"""

import functools
import importlib
import importlib.util

import torch
import torch.nn.functional as F

from cli import UserError

BACKENDS = ("auto", "triton", "mamba-ssm", "cpu", "reference")
KERNEL_MODULES = {"cpu": "kernels.scan_cpu", "triton": "kernels.scan_triton"}


# ---- reference -------------------------------------------------------------------------------------------------


def causal_conv_reference(x, weight, bias):
    """silu(causal depthwise convolution) over time: x (batch, time, d_inner), weight (d_inner, d_conv), x_{t<0} = 0."""
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight.unsqueeze(1), bias, groups=x.shape[2])).transpose(1, 2)


def selective_scan_reference(u, delta, A, B, C, D, z=None, delta_bias=None, h0=None):
    """The recurrence as a loop over time, differentiable: the reference for values and gradients.

    With dt = softplus(delta + delta_bias) (equation 2 and section 3.2 of the paper, with the simplified
    discretisation of B that the authors' code uses):

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,    y_t = (C_t . h_t + D u_t) silu(z_t).

    u, delta, z: (batch, time, d_inner); A: (d_inner, d_state), not positive; B, C: (batch, time, d_state);
    D, delta_bias: (d_inner,); h0: (batch, d_inner, d_state), zero by default.
    Returns y (batch, time, d_inner) and the last state (batch, d_inner, d_state).
    """
    h = u.new_zeros(u.shape[0], *A.shape) if h0 is None else h0
    steps = []
    for t in range(u.shape[1]):
        y, h = selective_scan_step(h, u[:, t], delta[:, t], A, B[:, t], C[:, t], D, None if z is None else z[:, t],
                                   delta_bias)
        steps.append(y)
    return torch.stack(steps, dim=1), h


# ---- one time step ---------------------------------------------------------------------------------------------


def selective_scan_step(h, u, delta, A, B, C, D, z, delta_bias):
    """One step of the recurrence: the state h (batch, d_inner, d_state) and one time step's inputs to (y, new h).

    u, delta, z: (batch, d_inner); B, C: (batch, d_state); the rest as in `selective_scan_reference`; z and delta_bias
    may be None. The inputs are left as they are.
    """
    dt = F.softplus(delta if delta_bias is None else delta + delta_bias)
    h = torch.exp(dt.unsqueeze(-1) * A) * h + (dt * u).unsqueeze(-1) * B.unsqueeze(1)
    y = torch.einsum("bdn,bn->bd", h, C.to(h.dtype)) + D * u
    return (y if z is None else y * F.silu(z)).to(u.dtype), h


def conv_step(conv_state, x, weight, bias):
    """One step of the causal convolution: the last d_conv - 1 inputs and x (batch, d_inner) to (silu(conv), new state).

    conv_state: (batch, d_inner, d_conv - 1), oldest first, zeros before the first step. It is left as it is.
    """
    window = torch.cat((conv_state, x.unsqueeze(-1).to(conv_state.dtype)), dim=-1)
    return F.silu((window * weight).sum(-1) + bias).to(x.dtype), window[..., 1:]


# ---- choice of back end ----------------------------------------------------------------------------------------


def choose_backend(requested, device):
    """The back end for tensors on `device`; prints it once a process.

    `requested` is one of BACKENDS; "auto" takes triton, else mamba-ssm, on CUDA, and cpu on a CPU.
    Raises UserError when the request can't be honoured; nothing else is taken in its place.
    """
    device_type = torch.device(device).type
    if requested not in BACKENDS:
        raise UserError(f"unknown scan back end {requested!r}; choose from {', '.join(BACKENDS)}")
    if device_type not in ("cpu", "cuda"):
        raise UserError(f"no scan back end for device {device_type}; use a CPU or a CUDA device")
    backend = requested
    if requested == "auto":
        fitting = ("cpu",) if device_type == "cpu" else ("triton", "mamba-ssm")
        backend = next((name for name in fitting if _installed(name)), None)
        if backend is None:
            wanted = "numba" if device_type == "cpu" else "triton (comes with torch for CUDA) or mamba-ssm"
            raise UserError(f"no scan back end for {device_type}: {wanted} is not installed; pip install it, or ask "
                            "for the slow back end named reference")
    if backend in ("triton", "mamba-ssm") and device_type == "cpu":
        raise UserError(f"scan back end {backend} needs a CUDA device; use cpu or reference on a CPU")
    if backend == "cpu" and device_type == "cuda":
        raise UserError("scan back end cpu does not run on a CUDA device; use triton, mamba-ssm or reference there")
    if not _installed(backend):
        package = {"cpu": "numba"}.get(backend, backend)
        raise UserError(f"scan back end {backend} needs the package {package}, which is not installed; "
                        f"pip install {package}")
    _announce(f"cpu (numba, {torch.get_num_threads()} threads)" if backend == "cpu" else backend)
    return backend


def _installed(backend):
    modules = {"cpu": "numba", "triton": "triton", "mamba-ssm": "mamba_ssm"}
    return backend not in modules or importlib.util.find_spec(modules[backend]) is not None


@functools.cache
def _announce(choice):
    print(f"scan back end: {choice}", flush=True)


# ---- the inner part of a Mamba block ---------------------------------------------------------------------------


def mamba_inner(xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, backend):
    """What a Mamba block does between in_proj and out_proj; differentiable.

    xz (batch, time, 2 d_inner): in_proj's output, the scan's branch first, the gate's second; conv_weight
    (d_inner, d_conv) or (d_inner, 1, d_conv); conv_bias (d_inner,); x_proj_weight (dt_rank + 2 d_state, d_inner);
    dt_proj_weight (d_inner, dt_rank); dt_proj_bias (d_inner,); A (d_inner, d_state), not positive; D (d_inner,);
    backend: what `choose_backend` returned. Returns y (batch, time, d_inner), gated.

    "cpu" and "triton" keep xz, the convolved half of it, x_proj's output and one state a chunk of steps for the
    backward pass, never a state a step. xz in bf16 or fp16 is computed with the projections' weights cast to that, the
    recurrence in float32, and weight gradients come back in the weights' type.
    """
    parameters = conv_weight.flatten(1), conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D
    if backend in KERNEL_MODULES:
        if torch.compiler.is_compiling():
            return _inner_op(xz, *parameters, backend)[0]
        return _Inner.apply(xz, *parameters, backend)
    return _inner_autograd(xz, *parameters, backend)[0]


@torch.no_grad()
def mamba_inner_with_state(xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, backend):
    """`mamba_inner` without gradient, and the state behind the last step, from which single steps can go on.

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


def _inner_autograd(xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, backend):
    """The inner part for back ends that bring their own autograd: (y, last state)."""
    conv, scan = {"reference": (causal_conv_reference, selective_scan_reference),
                  "mamba-ssm": (_conv_mamba_ssm, _scan_mamba_ssm)}[backend]
    x, z = xz.chunk(2, dim=-1)
    xc = conv(x, conv_weight.to(xz.dtype), conv_bias.to(xz.dtype))
    sizes = [dt_proj_weight.shape[1], A.shape[1], A.shape[1]]
    delta, B, C = F.linear(xc, x_proj_weight.to(xz.dtype)).split(sizes, dim=-1)
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
    return importlib.import_module(KERNEL_MODULES[backend])


def _inner_forward(xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, backend):
    """(y, last state, what the backward pass needs): xc, the convolved input; x_dbl (batch, time, dt_rank + 2 d_state),
    x_proj's output; the states at chunk boundaries."""
    kernels = _kernels(backend)
    x, z = xz.chunk(2, dim=-1)
    xc = kernels.conv_silu_forward(x, conv_weight, conv_bias)
    x_dbl = F.linear(xc, x_proj_weight.to(xz.dtype))
    low_rank, B, C = _split(x_dbl, dt_proj_weight, A)
    delta = F.linear(low_rank, dt_proj_weight.to(xz.dtype))
    y, chunk_states, h = kernels.scan_forward(xc, delta, A, B, C, D, z, dt_proj_bias)
    return y, h, (xc, x_dbl, chunk_states)


def _split(x_dbl, dt_proj_weight, A):
    return x_dbl.split([dt_proj_weight.shape[1], A.shape[1], A.shape[1]], dim=-1)


def _inner_backward(
    dy, xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D,
    xc, x_dbl, chunk_states, backend,
):
    """The gradients of xz and the parameters, from that of y."""
    kernels = _kernels(backend)
    x, z = xz.chunk(2, dim=-1)
    low_rank, B, C = _split(x_dbl, dt_proj_weight, A)
    dt_weight = dt_proj_weight.to(xz.dtype)
    delta = F.linear(low_rank, dt_weight)  # as large as xc, but far cheaper to make again: so not kept
    dxz = torch.empty_like(xz, memory_format=torch.contiguous_format)
    dx_dbl = torch.empty_like(x_dbl)
    dx, dz = dxz.chunk(2, dim=-1)
    d_low_rank, dB, dC = _split(dx_dbl, dt_proj_weight, A)
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()  # the gradient of a sum comes as one expanded number
    dxc, d_delta, dA, dD, d_dt_bias = kernels.scan_backward(
        dy, xc, delta, A, B, C, D, z, dt_proj_bias, chunk_states, dz, dB, dC
    )
    d_delta = d_delta.flatten(0, 1)
    torch.mm(d_delta, dt_weight, out=d_low_rank.flatten(0, 1))
    d_dt_weight = d_delta.T @ low_rank.flatten(0, 1)
    d_x_proj_weight = dx_dbl.flatten(0, 1).T @ xc.flatten(0, 1)
    dxc.flatten(0, 1).addmm_(dx_dbl.flatten(0, 1), x_proj_weight.to(xz.dtype))
    d_conv_weight, d_conv_bias = kernels.conv_silu_backward(x, conv_weight, conv_bias, dxc, dx)
    return (dxz, d_conv_weight.to(conv_weight.dtype), d_conv_bias.to(conv_bias.dtype),
            d_x_proj_weight.to(x_proj_weight.dtype), d_dt_weight.to(dt_proj_weight.dtype),
            d_dt_bias.to(dt_proj_bias.dtype), dA.to(A.dtype), dD.to(D.dtype))


def _without_autocast(function, first, *args):
    """The types are settled by xz's: an autocast region around the call must not change them once more."""
    with torch.autocast(first.device.type, enabled=False):
        return function(first, *args)


class _Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx, xz, *args):
        *parameters, ctx.backend = args
        y, _, kept = _without_autocast(_inner_forward, xz, *args)
        ctx.save_for_backward(xz, *parameters, *kept)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return *_without_autocast(_inner_backward, dy, *ctx.saved_tensors, ctx.backend), None


# The same for torch.compile, which takes an operator as it is where it would try to look into a Function. (Plain Python
# calls the Function: on an H100's host that took a millisecond less for a block, forward and backward.)


@torch.library.custom_op("mambasynth::mamba_inner", mutates_args=())
def _inner_op(
    xz: torch.Tensor, conv_weight: torch.Tensor, conv_bias: torch.Tensor, x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor, dt_proj_bias: torch.Tensor, A: torch.Tensor, D: torch.Tensor, backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    y, _, kept = _without_autocast(
        _inner_forward, xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, backend
    )
    return y, *kept


@_inner_op.register_fake
def _(xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, backend):
    batch, time, _ = xz.shape
    kernels = _kernels(backend)
    states = xz.new_empty(kernels.chunk_states_shape(batch, time, *A.shape), dtype=kernels.chunk_states_dtype(xz.dtype))
    y, xc = (xz.new_empty(batch, time, A.shape[0]) for _ in range(2))
    return y, xc, xz.new_empty(batch, time, x_proj_weight.shape[0]), states


@torch.library.custom_op("mambasynth::mamba_inner_backward", mutates_args=())
def _inner_backward_op(
    dy: torch.Tensor, xz: torch.Tensor, conv_weight: torch.Tensor, conv_bias: torch.Tensor,
    x_proj_weight: torch.Tensor, dt_proj_weight: torch.Tensor, dt_proj_bias: torch.Tensor, A: torch.Tensor,
    D: torch.Tensor, xc: torch.Tensor, x_dbl: torch.Tensor, chunk_states: torch.Tensor, backend: str,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:
    return _without_autocast(
        _inner_backward, dy, xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D,
        xc, x_dbl, chunk_states, backend,
    )


@_inner_backward_op.register_fake
def _(dy, xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, *_):
    like = (xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D)
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in like)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)  # no zeros for what is kept for the backward pass, which nothing outside uses


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 9
    return *_inner_backward_op(dy, *ctx.saved_tensors, ctx.backend), None


_inner_op.register_autograd(_backward, setup_context=_save_for_backward)
