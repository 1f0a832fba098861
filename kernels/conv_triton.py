"""The causal convolution before the selective scan as Triton kernels, for CUDA GPUs: half of the back end "cuda", whose
scan is in scan_cuda.py.

Arithmetic is float32. Inputs are float32, bfloat16 or float16; float64 is refused, use another back end. Views that are
strided in batch and time are taken as they are; the last dimension must be contiguous.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.scan_cuda import ceil_div, check_inputs, on_device_of
from kernels.triton_math import sigmoid

CONVOLVES_AGAIN = True  # the backward pass computes the convolution again: it takes 2 % of the step, and no memory


class Tile(NamedTuple):
    """How the work is divided: the channels per program, its warps, and the time steps that it holds in registers at
    once."""

    channels: int
    warps: int
    steps: int


CONV_FORWARD = Tile(channels=128, warps=4, steps=32)
CONV_BACKWARD = Tile(channels=64, warps=1, steps=16)
CONV_BLOCKS = 8  # blocks of steps per program of the convolution's backward pass


@triton.jit
def _inside(first, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The indices first ... first + BLOCK - 1, and whether each is below SIZE: a constant where SIZE % BLOCK is 0."""
    i = first + tl.arange(0, BLOCK)
    return i, tl.full([BLOCK], True, tl.int1) if SIZE % BLOCK == 0 else i < SIZE


@triton.jit
def _sum_rows_kernel(
    rows, first, second, n_rows,
    FIRST: tl.constexpr, SECOND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of n_rows rows of FIRST + SECOND numbers, cut into tensors of these sizes."""
    SIZE: tl.constexpr = FIRST + SECOND
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for row in range(0, n_rows, ROWS):
        r = row + tl.arange(0, ROWS)
        mask = (r < n_rows)[:, None] & (i < SIZE)[None, :]
        total += tl.load(rows + tl.cast(r, tl.int64)[:, None] * SIZE + i[None, :], mask=mask, other=0.0)
    x = tl.sum(total, 0)
    tl.store(first + i, x, mask=i < FIRST)
    tl.store(second + i - FIRST, x, mask=(i >= FIRST) & (i < SIZE))


# ---- convolution ---------------------------------------------------------------------------------------------


@triton.jit
def _conv_forward_kernel(
    x, weight, bias, xc, x_batch, time, n_groups,
    X_STEP: tl.constexpr, D_INNER: tl.constexpr, WIDTH: tl.constexpr, CH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """silu(bias + sum_k weight[k] x[t + k - (WIDTH - 1)]), the causal convolution, for STEPS steps."""
    c, mask_c = _inside((tl.program_id(0) % n_groups) * CH, D_INNER, CH)
    t = (tl.program_id(0) // n_groups) * STEPS + tl.arange(0, STEPS)
    batch = tl.cast(tl.program_id(1), tl.int64)
    x += batch * x_batch
    pre = tl.zeros([STEPS, CH], tl.float32) + tl.load(bias + c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(WIDTH):
        s = t - (WIDTH - 1) + k
        mask = ((s >= 0) & (s < time))[:, None] & mask_c[None, :]
        x_k = tl.load(x + tl.cast(s, tl.int64)[:, None] * X_STEP + c[None, :], mask=mask, other=0.0).to(tl.float32)
        pre += x_k * tl.load(weight + c * WIDTH + k, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    out = (batch * time + t)[:, None] * D_INNER + c[None, :]
    tl.store(xc + out, (pre * sigmoid(pre)).to(xc.dtype.element_ty), mask=(t < time)[:, None] & mask_c[None, :])


@triton.jit
def _conv_backward_kernel(
    x, weight, bias, dxc, dx, sums, x_batch, dxc_batch, dx_batch, time, n_groups, n_segments,
    X_STEP: tl.constexpr, DXC_STEP: tl.constexpr, DX_STEP: tl.constexpr, D_INNER: tl.constexpr, WIDTH: tl.constexpr,
    CH: tl.constexpr, STEPS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """dx of one segment of BLOCKS * STEPS steps, and the segment's terms of dweight and dbias.

    A block of STEPS steps needs the gradient before the SiLU, dpre, for WIDTH - 1 steps behind its own as well. They
    are computed twice, so that blocks share nothing but the sums.
    """
    c, mask_c = _inside((tl.program_id(0) % n_groups) * CH, D_INNER, CH)
    segment = tl.program_id(0) // n_groups
    batch = tl.cast(tl.program_id(1), tl.int64)
    x += batch * x_batch
    dxc += batch * dxc_batch
    dx += batch * dx_batch
    shift = tl.load(bias + c, mask=mask_c, other=0.0).to(tl.float32)
    ws, dws = (), ()
    for j in tl.static_range(WIDTH):
        ws += (tl.load(weight + c * WIDTH + j, mask=mask_c, other=0.0).to(tl.float32),)
        dws += (tl.zeros([CH], tl.float32),)
    dbias_sum = tl.zeros([CH], tl.float32)
    for block in range(0, BLOCKS):
        first = (segment * BLOCKS + block) * STEPS
        xs, dpres = (), ()
        for k in tl.static_range(STEPS + 2 * (WIDTH - 1)):  # xs[k]: x at step first - (WIDTH - 1) + k
            t = first - (WIDTH - 1) + k
            row = x + tl.cast(t, tl.int64) * X_STEP + c
            xs += (tl.load(row, mask=mask_c & (t >= 0) & (t < time), other=0.0),)
        for k in tl.static_range(STEPS + WIDTH - 1):  # dpres[k]: at step first + k
            pre = shift
            for j in tl.static_range(WIDTH):
                pre += ws[j] * xs[k + j].to(tl.float32)
            gate = sigmoid(pre)
            row = dxc + tl.cast(first + k, tl.int64) * DXC_STEP + c
            dxc_k = tl.load(row, mask=mask_c & (first + k < time), other=0.0).to(tl.float32)
            dpres += (dxc_k * gate * (1.0 + pre * (1.0 - gate)),)
        for k in tl.static_range(STEPS):
            dx_k = tl.zeros([CH], tl.float32)
            grown = ()
            for j in tl.static_range(WIDTH):
                dx_k += ws[j] * dpres[k + WIDTH - 1 - j]
                grown += (dws[j] + dpres[k] * xs[k + j].to(tl.float32),)
            dws = grown
            dbias_sum += dpres[k]
            row = dx + tl.cast(first + k, tl.int64) * DX_STEP + c
            tl.store(row, dx_k.to(dx.dtype.element_ty), mask=mask_c & (first + k < time))
    sums += (batch * n_segments + segment) * (D_INNER * (WIDTH + 1))  # of this segment: dweight, then dbias
    for j in tl.static_range(WIDTH):
        tl.store(sums + c * WIDTH + j, dws[j], mask=mask_c)
    tl.store(sums + D_INNER * WIDTH + c, dbias_sum, mask=mask_c)


# ---- host side ---------------------------------------------------------------------------------------------------


def _sum_rows(rows, *shapes):
    """The sum over n of rows (n, sizes of the two shapes together), cut into two tensors of these shapes."""
    first, second = outs = [torch.empty(shape, dtype=rows.dtype, device=rows.device) for shape in shapes]
    block = 32 if len(rows) <= 512 else 8  # columns per program: fewer, so more programs, where columns are long
    _sum_rows_kernel[(ceil_div(rows.shape[1], block),)](
        rows, first, second, len(rows), first.numel(), second.numel(), ROWS=1024 // block, BLOCK=block
    )
    return outs


def conv_silu_forward(x, weight, bias, tile=CONV_FORWARD):
    """silu(causal depthwise convolution of x): x (batch, time, d_inner), weight (d_inner, width), bias (d_inner,)."""
    check_inputs(x)
    batch, time, d_inner = x.shape
    xc = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    groups = ceil_div(d_inner, tile.channels)
    with on_device_of(x):
        _conv_forward_kernel[(groups * ceil_div(time, tile.steps), batch)](
            x, weight, bias, xc, x.stride(0), time, groups, X_STEP=x.stride(1), D_INNER=d_inner,
            WIDTH=weight.shape[1], CH=tile.channels, STEPS=tile.steps, num_warps=tile.warps,
        )  # fmt: skip
    return xc


def conv_silu_backward(x, weight, bias, dxc, dx, tile=CONV_BACKWARD):
    """Write the gradient of x into dx and return (dweight, dbias) in float32, from dxc, the gradient of the result.

    The convolution before the SiLU is computed again rather than kept.
    """
    check_inputs(x, dxc, dx)
    batch, time, d_inner = x.shape
    width = weight.shape[1]
    groups = ceil_div(d_inner, tile.channels)
    segments = ceil_div(time, tile.steps * CONV_BLOCKS)
    sums = torch.empty((batch * segments, d_inner * (width + 1)), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        _conv_backward_kernel[(groups * segments, batch)](
            x, weight, bias, dxc, dx, sums, x.stride(0), dxc.stride(0), dx.stride(0), time, groups, segments,
            X_STEP=x.stride(1), DXC_STEP=dxc.stride(1), DX_STEP=dx.stride(1), D_INNER=d_inner,
            WIDTH=width, CH=tile.channels, STEPS=tile.steps, BLOCKS=CONV_BLOCKS, num_warps=tile.warps,
        )  # fmt: skip
        dweight, dbias = _sum_rows(sums, (d_inner, width), (d_inner,))
    return dweight, dbias
