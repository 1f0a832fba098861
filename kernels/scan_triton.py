"""Selective scan and causal convolution as Triton kernels, for CUDA GPUs.

The scan of Mamba-1 (Gu & Dao 2023, arXiv 2312.00752, Algorithm 2) with everything around it fused in:

    dt_t = softplus(delta_t + delta_bias)
    h_t  = exp(dt_t A) h_{t-1} + dt_t B_t u_t            h (batch, d_inner, N)
    y_t  = (C_t . h_t + D u_t) * silu(z_t)

`batch * d_inner` recurrences are independent and fill a GPU for any batch worth training with, so each program takes
a few channels of one sequence and walks time in order, its state in registers: no parallel scan, no extra work. When
there are too few of them (a batch of 1 to 8), time is split as well: each split's end state from zero first, then the
carry over the splits, then every split on its own from its right start. The backward pass mirrors this.

The forward pass saves the state before every `CHUNK`-th step. The backward pass takes a chunk in two blocks of a few
steps: it runs forward from the saved state to the block and through it, its states held in registers, and walks it
back. The next chunk's inputs are asked for ahead of time, for there are too few warps to wait on memory. The reduction
of dB and dC over channels goes through one partial sum a program, so results do not depend on the order in which
programs finish.

Arithmetic and state are float32. Inputs are float32, bfloat16 or float16; float64 is refused: use another back end.
Shapes: u, delta, z, y (batch, time, d_inner); B, C (batch, time, N); A (d_inner, N); D, delta_bias (d_inner,). Views
strided in batch and time are taken as they are; the last dimension must be contiguous.
"""

import contextlib
import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

import cli


class Tile(NamedTuple):
    """How a kernel is cut: channels of a program (of the scan: at N = 32, `_fit` adapts it), its warps, and the time
    steps it has in registers at once."""

    channels: int
    warps: int
    steps: int


FORWARD = Tile(channels=16, warps=1, steps=4)
BACKWARD = Tile(channels=32, warps=2, steps=4)
CONV_FORWARD = Tile(channels=128, warps=4, steps=32)
CONV_BACKWARD = Tile(channels=64, warps=1, steps=16)
CONV_BLOCKS = 8  # blocks of steps a program of the convolution's backward pass goes through
CARRY_BLOCK = 32
CHUNK = 8  # steps between saved states; a multiple of the steps of every tile, and no more than two of BACKWARD's
MAX_STATE = 256
MAX_SPLITS = 64
WARPS_TO_FILL = 12  # warps a multiprocessor should have before time is left whole

INTERPRETED = triton.knobs.runtime.interpret  # which knows no assembler

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
MINUS_INF = tl.constexpr(-math.inf)


# ---------------------------------------------------------------------------------------------------- scalar functions


@triton.jit
def _softplus_sigmoid(x):
    """softplus(x) and its derivative sigmoid(x). exp(-|x|) cannot overflow; -inf gives 0 and 0, NaN stays."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    # log1p(e) / e on [0, 1], interpolated at Chebyshev points: relative error 2e-7. log(1 + e) would lose the small
    # dt that Mamba starts from, and costs more.
    p = -0.029074065387 + e * 0.0051261018962
    p = 0.077516086400 + e * p
    p = -0.13602247834 + e * p
    p = 0.19076880813 + e * p
    p = -0.24835398793 + e * p
    p = 0.33318120241 + e * p
    p = -0.49999445677 + e * p
    p = 0.99999994040 + e * p
    r = 1.0 / (1.0 + e)
    return tl.maximum(x, 0.0) + e * p, tl.where(x >= 0, r, e * r)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def _compose(a1, x1, a2, x2):
    """h -> a1 h + x1, then h -> a2 h + x2, as one such map."""
    return a2 * a1, a2 * x1 + x2


# --------------------------------------------------------------------------------------------------------------- tiles
#
# What depends on (time, channel) alone (softplus, gate, their derivatives) is computed on tiles [STEPS, CH] spread over
# all threads. The recurrence then takes the rows of such a tile one by one, replicated over the threads that share a
# channel. Registers cannot be indexed but they can be split: reshape and split cost one exchange for the whole tile.


@triton.jit
def _rows(x):
    """The rows of x [STEPS, CH] as STEPS vectors [CH]. STEPS: a power of two, at least 2."""
    parts = (tl.trans(x),)
    for level in tl.static_range(6):
        if x.shape[0] >> level > 1:
            low, high = (), ()
            for i in tl.static_range(1 << level):
                if x.shape[0] >> level == 2:
                    a, b = tl.split(parts[i])
                else:
                    a, b = tl.split(tl.reshape(parts[i], [x.shape[1], x.shape[0] >> (level + 1), 2]))
                low += (a,)
                high += (b,)
            parts = low + high
    return parts


@triton.jit
def _rows_of_two(x, y):
    """The rows of x, then those of y, through one exchange. (For a tile made from a single load the compiler would
    rather exchange what was loaded and compute on replicated data: eight times the work, here.)"""
    both = tl.permute(tl.join(x, y), [2, 0, 1])
    return _rows(tl.reshape(both, [2 * x.shape[0], x.shape[1]]))


@triton.jit
def _stack(rows, STEPS: tl.constexpr):
    """STEPS vectors [CH] as a tile [STEPS, CH]: the reverse of `_rows`."""
    parts = rows
    for level in tl.static_range(6):
        if STEPS >> level > 1:
            joined = ()
            for i in tl.static_range(STEPS >> (level + 1)):
                pair = tl.join(parts[i], parts[i + (STEPS >> (level + 1))])
                joined += (tl.reshape(pair, [rows[0].shape[0], 2 << level]),)
            parts = joined
    return tl.trans(parts[0])


@triton.jit
def _inside(first, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Indices first ... first + BLOCK - 1 and whether they are below SIZE; a constant if that is certain."""
    i = first + tl.arange(0, BLOCK)
    return i, tl.full([BLOCK], True, tl.int1) if SIZE % BLOCK == 0 else i < SIZE


@triton.jit
def _before(first, end, STEPS: tl.constexpr, EVEN: tl.constexpr):
    """Which of the steps first ... first + STEPS - 1 are before `end`; EVEN: all."""
    return tl.full([STEPS], True, tl.int1) if EVEN else first + tl.arange(0, STEPS) < end


@triton.jit
def _load_rows(
    ptr, n, mask_n, first, end, STEP: tl.constexpr, ALIGN: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr
):
    """STEPS rows of B or C, [N] each, zero from `end` on. Loaded ahead of use, in their own type: fewer registers."""
    ptr += tl.multiple_of(tl.cast(first, tl.int64) * STEP, ALIGN) + n
    rows = ()
    for k in tl.static_range(STEPS):
        if EVEN:
            rows += (tl.load(ptr + k * STEP, mask=mask_n, other=0.0),)
        else:
            rows += (tl.load(ptr + k * STEP, mask=mask_n & (first + k < end), other=0.0),)
    return rows


@triton.jit
def _load_tile(ptr, c, mask, first, other: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr):
    """Tile [STEPS, CH] of u, delta, z or dy from step `first` on, as float32."""
    ptr += tl.cast(first, tl.int64) * STEP
    return tl.load(ptr + tl.arange(0, STEPS)[:, None] * STEP + c[None, :], mask=mask, other=other).to(tl.float32)


@triton.jit
def _prefetch(ptr, first, time, STEP: tl.constexpr, ROWS: tl.constexpr, LENGTH: tl.constexpr):
    """Ask for LENGTH elements from ptr + t * STEP on, of the steps t = first ... first + ROWS - 1 within the series."""
    SECTOR: tl.constexpr = 256 // ptr.dtype.element_ty.primitive_bitwidth  # elements in 32 bytes
    SECTORS: tl.constexpr = triton.next_power_of_2((LENGTH + SECTOR - 1) // SECTOR + 1)
    row = tl.minimum(tl.maximum(first + tl.arange(0, ROWS), 0), time - 1)
    at = tl.minimum(tl.arange(0, SECTORS) * SECTOR, LENGTH - 1)
    address = (ptr + tl.cast(row, tl.int64)[:, None] * STEP + at[None, :]).to(tl.int64, bitcast=True)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _store_tile(ptr, x, c, mask, first, STEP: tl.constexpr, STEPS: tl.constexpr):
    ptr += tl.cast(first, tl.int64) * STEP
    tl.store(ptr + tl.arange(0, STEPS)[:, None] * STEP + c[None, :], x.to(ptr.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------------------- scan


@triton.jit
def _place(n_groups, n_splits, split_len, time):
    """This program's sequence, split, group of channels, first and end step. Groups run fastest: programs side by side
    share rows of B and C, and cache lines of u, delta and z."""
    pid = tl.program_id(0)
    split = (pid // n_groups) % n_splits
    start = split * split_len
    batch = tl.cast(pid // (n_groups * n_splits), tl.int64)
    return batch, split, pid % n_groups, start, tl.minimum(start + split_len, time)


@triton.jit
def _ends_kernel(
    x, delta, z, B, A, delta_bias, ends, dt_sums, x_batch, delta_batch, z_batch, B_batch,
    time, n_groups, n_splits, split_len,
    X_STEP: tl.constexpr, DELTA_STEP: tl.constexpr, Z_STEP: tl.constexpr, B_STEP: tl.constexpr,
    D_INNER: tl.constexpr, N_STATE: tl.constexpr, N: tl.constexpr, CH: tl.constexpr, STEPS: tl.constexpr,
    ALIGN: tl.constexpr, EVEN: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Each split alone, from zero: forward, the state after its last step (x = u); in reverse, the gradient of the
    state before its first step (x = dy, B = C). Also the sum of dt, which gives the decay over the split."""
    batch, split, group, start, end = _place(n_groups, n_splits, split_len, time)
    c, mask_c = _inside(group * CH, D_INNER, CH)
    n, mask_n = _inside(0, N_STATE, N)
    mask = mask_c[:, None] & mask_n[None, :]
    x += batch * x_batch
    delta += batch * delta_batch
    z += batch * z_batch
    B += tl.multiple_of(batch * B_batch, ALIGN)
    a2 = tl.load(A + c[:, None] * N_STATE + n[None, :], mask=mask, other=0.0) * LOG2E
    bias = tl.load(delta_bias + c, mask=mask_c, other=0.0)
    h = tl.zeros([CH, N], tl.float32)
    dt_sum = tl.zeros([STEPS, CH], tl.float32)
    blocks = tl.cdiv(end - start, STEPS)
    for i in range(0, blocks):
        first = start + i * STEPS
        if REVERSE:
            first = start + (blocks - 1 - i) * STEPS
        tile = _before(first, end, STEPS, EVEN)[:, None] & mask_c[None, :]
        x_tile = _load_tile(x, c, tile, first, 0.0, X_STEP, STEPS)
        # Beyond the end delta is -inf, so that dt = 0 and the state stays what it is.
        dt, _ = _softplus_sigmoid(_load_tile(delta, c, tile, first, MINUS_INF, DELTA_STEP, STEPS) + bias[None, :])
        Bs = _load_rows(B, n, mask_n, first, end, B_STEP, ALIGN, STEPS, EVEN)
        if REVERSE:
            z_tile = _load_tile(z, c, tile, first, 0.0, Z_STEP, STEPS)
            x_tile *= z_tile * _sigmoid(z_tile)
        else:
            x_tile *= dt
        dt_sum += dt
        rows = _rows_of_two(dt, x_tile)
        for k in tl.static_range(STEPS):
            if REVERSE:
                h += rows[2 * STEPS - 1 - k][:, None] * Bs[STEPS - 1 - k].to(tl.float32)[None, :]
                h *= tl.exp2(rows[STEPS - 1 - k][:, None] * a2)
            else:
                h = tl.exp2(rows[k][:, None] * a2) * h + rows[STEPS + k][:, None] * Bs[k].to(tl.float32)[None, :]
    row = (batch * n_splits + split) * D_INNER
    tl.store(ends + row * N_STATE + c[:, None] * N_STATE + n[None, :], h, mask=mask)
    tl.store(dt_sums + row + c, tl.sum(dt_sum, 0), mask=mask_c)


@triton.jit
def _carry_kernel(
    ends, dt_sums, A, h0, starts, n_elements, n_splits,
    N_STATE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, HAS_H0: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """From every split's own end and decay to the value each split starts from: an exclusive scan over the splits."""
    batch = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, SPLITS)
    mask_e = e < n_elements
    mask = (s < n_splits)[:, None] & mask_e[None, :]
    at = (batch * n_splits + s)[:, None] * n_elements + e[None, :]
    dt_at = (batch * n_splits + s)[:, None] * (n_elements // N_STATE) + (e // N_STATE)[None, :]
    decay = tl.exp2(tl.load(dt_sums + dt_at, mask=mask, other=0.0) * (tl.load(A + e, mask=mask_e) * LOG2E)[None, :])
    end = tl.load(ends + at, mask=mask, other=0.0)
    decay, end = tl.associative_scan((decay, end), 0, _compose, reverse=REVERSE)
    first = tl.zeros([BLOCK], tl.float32)
    if HAS_H0:
        first += tl.load(h0 + batch * n_elements + e, mask=mask_e, other=0.0)
        end += decay * first[None, :]
    if REVERSE:
        tl.store(starts + at - n_elements, end, mask=mask & (s > 0)[:, None])
        tl.store(starts + (batch * n_splits + n_splits - 1) * n_elements + e, first, mask=mask_e)
    else:
        tl.store(starts + at + n_elements, end, mask=mask & (s < n_splits - 1)[:, None])
        tl.store(starts + batch * n_splits * n_elements + e, first, mask=mask_e)


@triton.jit
def _forward_kernel(
    u, delta, z, B, C, A, D, delta_bias, starts, y, states, h_last,
    u_batch, delta_batch, z_batch, B_batch, C_batch, time, n_groups, n_splits, split_len,
    U_STEP: tl.constexpr, DELTA_STEP: tl.constexpr, Z_STEP: tl.constexpr, B_STEP: tl.constexpr, C_STEP: tl.constexpr,
    D_INNER: tl.constexpr, N_STATE: tl.constexpr, N: tl.constexpr, CH: tl.constexpr, STEPS: tl.constexpr,
    ALIGN: tl.constexpr, EVEN: tl.constexpr, CHUNK: tl.constexpr, HAS_STARTS: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    batch, split, group, start, end = _place(n_groups, n_splits, split_len, time)
    c, mask_c = _inside(group * CH, D_INNER, CH)
    n, mask_n = _inside(0, N_STATE, N)
    mask = mask_c[:, None] & mask_n[None, :]
    state = c[:, None] * N_STATE + n[None, :]
    u += batch * u_batch
    delta += batch * delta_batch
    z += batch * z_batch
    B += tl.multiple_of(batch * B_batch, ALIGN)
    C += tl.multiple_of(batch * C_batch, ALIGN)
    y += batch * time * D_INNER
    states += batch * tl.cdiv(time, CHUNK) * (D_INNER * N_STATE)
    a2 = tl.load(A + state, mask=mask, other=0.0) * LOG2E
    skip = tl.load(D + c, mask=mask_c, other=0.0)
    bias = tl.load(delta_bias + c, mask=mask_c, other=0.0)
    if HAS_STARTS:
        h = tl.load(starts + (batch * n_splits + split) * (D_INNER * N_STATE) + state, mask=mask, other=0.0)
    else:
        h = tl.zeros([CH, N], tl.float32)
    for first in range(start, end, STEPS):
        if first % CHUNK == 0:
            row = tl.cast(first // CHUNK, tl.int64) * (D_INNER * N_STATE)
            tl.store(states + row + state, h.to(states.dtype.element_ty), mask=mask)
            if PREFETCH:
                ahead = first + CHUNK
                _prefetch(u + group * CH, ahead, time, U_STEP, CHUNK, CH)
                _prefetch(delta + group * CH, ahead, time, DELTA_STEP, CHUNK, CH)
                _prefetch(z + group * CH, ahead, time, Z_STEP, CHUNK, CH)
                _prefetch(B, ahead, time, B_STEP, CHUNK, N_STATE)
                _prefetch(C, ahead, time, C_STEP, CHUNK, N_STATE)
        tile = _before(first, end, STEPS, EVEN)[:, None] & mask_c[None, :]
        u_tile = _load_tile(u, c, tile, first, 0.0, U_STEP, STEPS)
        z_tile = _load_tile(z, c, tile, first, 0.0, Z_STEP, STEPS)
        # Beyond the end delta is -inf, so that dt = 0 and the state stays what it is.
        dt, _ = _softplus_sigmoid(_load_tile(delta, c, tile, first, MINUS_INF, DELTA_STEP, STEPS) + bias[None, :])
        Bs = _load_rows(B, n, mask_n, first, end, B_STEP, ALIGN, STEPS, EVEN)
        Cs = _load_rows(C, n, mask_n, first, end, C_STEP, ALIGN, STEPS, EVEN)
        rows = _rows_of_two(dt, dt * u_tile)
        Ch = ()
        for k in tl.static_range(STEPS):
            h = tl.exp2(rows[k][:, None] * a2) * h + rows[STEPS + k][:, None] * Bs[k].to(tl.float32)[None, :]
            Ch += (tl.sum(h * Cs[k].to(tl.float32)[None, :], 1),)
        y_tile = (_stack(Ch, STEPS) + skip[None, :] * u_tile) * z_tile * _sigmoid(z_tile)
        _store_tile(y, y_tile, c, tile, first, D_INNER, STEPS)
    if split == n_splits - 1:
        tl.store(h_last + batch * (D_INNER * N_STATE) + state, h, mask=mask)


@triton.jit
def _backward_kernel(
    dy, u, delta, z, B, C, A, D, delta_bias, states, starts, du, ddelta, dz, dBC, sums,
    dy_batch, u_batch, delta_batch, z_batch, B_batch, C_batch, dz_batch, n_batch, time, n_groups, n_splits, split_len,
    DY_STEP: tl.constexpr, U_STEP: tl.constexpr, DELTA_STEP: tl.constexpr, Z_STEP: tl.constexpr, B_STEP: tl.constexpr,
    C_STEP: tl.constexpr, DZ_STEP: tl.constexpr,
    D_INNER: tl.constexpr, N_STATE: tl.constexpr, N: tl.constexpr, CH: tl.constexpr, STEPS: tl.constexpr,
    ALIGN: tl.constexpr, EVEN: tl.constexpr, CHUNK: tl.constexpr, HAS_STARTS: tl.constexpr,
    LANES: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """Walks chunks, and in them blocks of STEPS steps, from the last to the first. ga is exp(dt_{t+1} A) times the
    gradient of h_{t+1}: what step t receives from later steps; `starts` holds it for the end of each split."""
    batch, split, group, start, end = _place(n_groups, n_splits, split_len, time)
    c, mask_c = _inside(group * CH, D_INNER, CH)
    n, mask_n = _inside(0, N_STATE, N)
    mask = mask_c[:, None] & mask_n[None, :]
    state = c[:, None] * N_STATE + n[None, :]
    dy += batch * dy_batch
    u += batch * u_batch
    delta += batch * delta_batch
    z += batch * z_batch
    B += tl.multiple_of(batch * B_batch, ALIGN)
    C += tl.multiple_of(batch * C_batch, ALIGN)
    dz += batch * dz_batch
    du += batch * time * D_INNER
    ddelta += batch * time * D_INNER
    dBC += (group * n_batch + batch) * time * (2 * N_STATE)
    states += batch * tl.cdiv(time, CHUNK) * (D_INNER * N_STATE)
    a2 = tl.load(A + state, mask=mask, other=0.0) * LOG2E
    skip = tl.load(D + c, mask=mask_c, other=0.0)
    bias = tl.load(delta_bias + c, mask=mask_c, other=0.0)
    split_row = (batch * n_splits + split) * D_INNER
    if HAS_STARTS:
        ga = tl.load(starts + split_row * N_STATE + state, mask=mask, other=0.0)
    else:
        ga = tl.zeros([CH, N], tl.float32)
    dA_sum = tl.zeros([CH, N], tl.float32)
    dD_sum = tl.zeros([STEPS, CH], tl.float32)
    dbias_sum = tl.zeros([STEPS, CH], tl.float32)
    chunks = tl.cdiv(end - start, CHUNK)
    for i in range(0, chunks):
        chunk_start = start + (chunks - 1 - i) * CHUNK
        last_block = (tl.minimum(chunk_start + CHUNK, end) - chunk_start - 1) // STEPS
        row = tl.cast(chunk_start // CHUNK, tl.int64) * (D_INNER * N_STATE)
        if PREFETCH:
            ahead = chunk_start - CHUNK
            _prefetch(u + group * CH, ahead, time, U_STEP, CHUNK, CH)
            _prefetch(delta + group * CH, ahead, time, DELTA_STEP, CHUNK, CH)
            _prefetch(z + group * CH, ahead, time, Z_STEP, CHUNK, CH)
            _prefetch(dy + group * CH, ahead, time, DY_STEP, CHUNK, CH)
            _prefetch(B, ahead, time, B_STEP, CHUNK, N_STATE)
            _prefetch(C, ahead, time, C_STEP, CHUNK, N_STATE)
            _prefetch(states + group * (CH * N_STATE), ahead // CHUNK, time, D_INNER * N_STATE, 1, CH * N_STATE)
        for back in range(0, last_block + 1):
            h = tl.load(states + row + state, mask=mask, other=0.0).to(tl.float32)
            for block in range(0, last_block - back):
                first = chunk_start + block * STEPS
                tile = tl.full([STEPS, CH], True, tl.int1) & mask_c[None, :]
                u_tile = _load_tile(u, c, tile, first, 0.0, U_STEP, STEPS)
                dt, _ = _softplus_sigmoid(_load_tile(delta, c, tile, first, 0.0, DELTA_STEP, STEPS) + bias[None, :])
                Bs = _load_rows(B, n, mask_n, first, end, B_STEP, ALIGN, STEPS, True)
                rows = _rows_of_two(dt, dt * u_tile)
                for k in tl.static_range(STEPS):
                    h = tl.exp2(rows[k][:, None] * a2) * h + rows[STEPS + k][:, None] * Bs[k].to(tl.float32)[None, :]
            first = chunk_start + (last_block - back) * STEPS
            tile = _before(first, end, STEPS, EVEN)[:, None] & mask_c[None, :]
            u_tile = _load_tile(u, c, tile, first, 0.0, U_STEP, STEPS)
            z_tile = _load_tile(z, c, tile, first, 0.0, Z_STEP, STEPS)
            dy_tile = _load_tile(dy, c, tile, first, 0.0, DY_STEP, STEPS)
            x = _load_tile(delta, c, tile, first, MINUS_INF, DELTA_STEP, STEPS) + bias[None, :]
            Bs = _load_rows(B, n, mask_n, first, end, B_STEP, ALIGN, STEPS, EVEN)
            Cs = _load_rows(C, n, mask_n, first, end, C_STEP, ALIGN, STEPS, EVEN)
            dt, slope = _softplus_sigmoid(x)
            gate = _sigmoid(z_tile)
            dyg = dy_tile * z_tile * gate  # the gradient of y before the gate
            rows, dygs = _rows_of_two(dt, dt * u_tile), _rows(dyg)
            hs, decays = (h,), ()
            for k in tl.static_range(STEPS):
                decay = tl.exp2(rows[k][:, None] * a2)
                hs += (decay * hs[k] + rows[STEPS + k][:, None] * Bs[k].to(tl.float32)[None, :],)
                decays += (decay,)
            Ch, gB, gaAh = (), (), ()
            dBs, dCs = (), ()
            for j in tl.static_range(STEPS):
                B_k = Bs[STEPS - 1 - j].to(tl.float32)[None, :]
                C_k = Cs[STEPS - 1 - j].to(tl.float32)[None, :]
                dt_k, dyg_k = rows[STEPS - 1 - j][:, None], dygs[STEPS - 1 - j][:, None]
                g = ga + dyg_k * C_k
                Ch = (tl.sum(hs[STEPS - j] * C_k, 1),) + Ch
                gB = (tl.sum(g * B_k, 1),) + gB
                dBs = (g * rows[2 * STEPS - 1 - j][:, None],) + dBs
                dCs = (hs[STEPS - j] * dyg_k,) + dCs
                ga = g * decays[STEPS - 1 - j]
                gah = ga * hs[STEPS - 1 - j]
                dA_sum += gah * dt_k
                gaAh = (tl.sum(gah * a2, 1),) + gaAh
            _store_sums(dBC, dBs, n, mask_n, first, end, N, LANES, 2 * N_STATE, STEPS, EVEN)
            _store_sums(dBC + N_STATE, dCs, n, mask_n, first, end, N, LANES, 2 * N_STATE, STEPS, EVEN)
            gB_tile = _stack(gB, STEPS)
            ddelta_tile = (u_tile * gB_tile + LN2 * _stack(gaAh, STEPS)) * slope
            dz_tile = dy_tile * (_stack(Ch, STEPS) + skip[None, :] * u_tile) * gate * (1.0 + z_tile * (1.0 - gate))
            dD_sum += dyg * u_tile
            dbias_sum += ddelta_tile
            _store_tile(du, dt * gB_tile + skip[None, :] * dyg, c, tile, first, D_INNER, STEPS)
            _store_tile(ddelta, ddelta_tile, c, tile, first, D_INNER, STEPS)
            _store_tile(dz, dz_tile, c, tile, first, DZ_STEP, STEPS)
    sums += split_row * (N_STATE + 2)  # of this sequence and split: dA, then dD, then the gradient of delta_bias
    tl.store(sums + state, dA_sum, mask=mask)
    tl.store(sums + D_INNER * N_STATE + c, tl.sum(dD_sum, 0), mask=mask_c)
    tl.store(sums + D_INNER * (N_STATE + 1) + c, tl.sum(dbias_sum, 0), mask=mask_c)


@triton.jit
def _store_sums(
    ptr, rows, n, mask_n, first, end,
    N: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Sums over channels of STEPS tensors [CH, N], stored as rows. Each thread first adds up the channels it has; LANES
    partial sums are left. A plain sum would shuffle each of them log2(LANES) times; stacked over the steps and split,
    they all travel in one exchange and are added in registers."""
    parts = ()
    for k in tl.static_range(STEPS):
        parts += (tl.sum(tl.reshape(rows[k], [rows[k].shape[0] // LANES, LANES, N]), 0),)
    for level in tl.static_range(6):
        if STEPS >> level > 1:
            joined = ()
            for i in tl.static_range(STEPS >> (level + 1)):
                pair = tl.join(parts[i], parts[i + (STEPS >> (level + 1))])
                joined += (tl.reshape(pair, [LANES, N, 2 << level]),)
            parts = joined
    x = tl.permute(parts[0], [2, 1, 0])
    for level in tl.static_range(10):
        if LANES >> level > 2:
            a, b = tl.split(tl.reshape(x, [STEPS, N, LANES >> (level + 1), 2]))
            x = a + b
    if LANES == 1:
        x = tl.reshape(x, [STEPS, N])
    else:
        a, b = tl.split(x)
        x = a + b
    mask = _before(first, end, STEPS, EVEN)[:, None] & mask_n[None, :]
    ptr += tl.cast(first, tl.int64) * STEP
    tl.store(ptr + tl.arange(0, STEPS)[:, None] * STEP + n[None, :], x, mask=mask)


@triton.jit
def _sum_groups_kernel(
    dBC, dB, dC, dB_batch, dB_step, dC_batch, dC_step, n_rows, time, n_groups,
    N_STATE: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dB and dC from the partial sums (n_groups, batch * time, 2, N) of the groups of channels."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, N)
    mask = (row < n_rows)[:, None] & (n < N_STATE)[None, :]
    dB_sum = tl.zeros([ROWS, N], tl.float32)
    dC_sum = tl.zeros([ROWS, N], tl.float32)
    for group in tl.range(0, n_groups, loop_unroll_factor=8):  # eight loads under way, not one after the other
        at = dBC + (tl.cast(group, tl.int64) * n_rows + row)[:, None] * (2 * N_STATE) + n[None, :]
        dB_sum += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        dC_sum += tl.load(at + N_STATE, mask=mask, other=0.0).to(tl.float32)
    b, t = row // time, row % time
    tl.store(dB + (b * dB_batch + t * dB_step)[:, None] + n[None, :], dB_sum.to(dB.dtype.element_ty), mask=mask)
    tl.store(dC + (b * dC_batch + t * dC_step)[:, None] + n[None, :], dC_sum.to(dC.dtype.element_ty), mask=mask)


@triton.jit
def _sum_rows_kernel(
    rows, first, second, third, n_rows,
    FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of n_rows rows of FIRST + SECOND + THIRD numbers, cut into tensors of these sizes."""
    SIZE: tl.constexpr = FIRST + SECOND + THIRD
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for row in range(0, n_rows, ROWS):
        r = row + tl.arange(0, ROWS)
        mask = (r < n_rows)[:, None] & (i < SIZE)[None, :]
        total += tl.load(rows + tl.cast(r, tl.int64)[:, None] * SIZE + i[None, :], mask=mask, other=0.0)
    x = tl.sum(total, 0)
    tl.store(first + i, x, mask=i < FIRST)
    tl.store(second + i - FIRST, x, mask=(i >= FIRST) & (i < FIRST + SECOND))
    if THIRD > 0:
        tl.store(third + i - (FIRST + SECOND), x, mask=(i >= FIRST + SECOND) & (i < SIZE))


# -------------------------------------------------------------------------------------------------------- convolution


@triton.jit
def _conv_forward_kernel(
    x, weight, bias, xc, x_batch, time, n_groups,
    X_STEP: tl.constexpr, D_INNER: tl.constexpr, WIDTH: tl.constexpr, CH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
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
    tl.store(xc + out, (pre * _sigmoid(pre)).to(xc.dtype.element_ty), mask=(t < time)[:, None] & mask_c[None, :])


@triton.jit
def _conv_backward_kernel(
    x, weight, bias, dxc, dx, sums, x_batch, dxc_batch, dx_batch, time, n_groups, n_segments,
    X_STEP: tl.constexpr, DXC_STEP: tl.constexpr, DX_STEP: tl.constexpr, D_INNER: tl.constexpr, WIDTH: tl.constexpr,
    CH: tl.constexpr, STEPS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One segment of BLOCKS * STEPS steps. A block needs the gradient before the activation for WIDTH - 1 steps past
    its own: computed again there, so that blocks share nothing but the sums."""
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
        for k in tl.static_range(STEPS + WIDTH - 1):
            pre = shift
            for j in tl.static_range(WIDTH):
                pre += ws[j] * xs[k + j].to(tl.float32)
            gate = _sigmoid(pre)
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


# ---------------------------------------------------------------------------------------------------------- host side


def _check(*tensors):
    """Refuse what the kernels do not compute rather than compute something else."""
    for tensor in tensors:
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise cli.UserError(f"the Triton scan takes float32, bfloat16 or float16, not {tensor.dtype}; "
                                "use the reference back end")  # fmt: skip
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise cli.UserError("the Triton scan needs contiguous channels; pass (batch, time, channels) tensors")


def _on(tensor):
    """Triton launches on the current device: make it the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def _ceil_div(a, b):
    """As triton.cdiv, which serves kernels too and takes ten times as long: a launch computes a dozen."""
    return -(-a // b)


def _power_of_2(n):
    """The smallest power of two that is at least n; as triton.next_power_of_2."""
    return 1 << (n - 1).bit_length()


@functools.cache
def _processors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _fit(tile, A):
    """The tile for this d_inner and N: as many state elements a thread as at N = 32, whatever N is."""
    d_inner, n_state = A.shape
    if n_state > MAX_STATE:
        raise cli.UserError(f"the Triton scan takes d_state up to {MAX_STATE}, not {n_state}")
    N = _power_of_2(n_state)
    channels = min(max(tile.channels * 32 // N, 1), _power_of_2(d_inner))
    warps = min(tile.warps, max(1, tile.warps * channels * N // (tile.channels * 32)))
    return tile._replace(channels=channels, warps=warps)


def _split_time(batch, time, d_inner, tile, device):
    """(groups of channels, splits of time, steps a split): time stays whole unless too few warps would be busy."""
    groups = _ceil_div(d_inner, tile.channels)
    wanted = _ceil_div(WARPS_TO_FILL * _processors(device), batch * groups * tile.warps)
    chunks = _ceil_div(time, CHUNK)
    chunks_each = _ceil_div(chunks, min(wanted, MAX_SPLITS, chunks))
    return groups, _ceil_div(chunks, chunks_each), chunks_each * CHUNK


def _constants(A, time, tile, *rows):
    """The compile-time arguments that all scan kernels share; `rows` are the tensors loaded row by row, B and C."""
    d_inner, n_state = A.shape
    # The largest power of two that divides the row strides: how wide a load may be.
    align = math.gcd(16, *(stride for tensor in rows for stride in tensor.stride()[:-1]))
    return {"D_INNER": d_inner, "N_STATE": n_state, "N": _power_of_2(n_state), "CH": tile.channels,
            "STEPS": tile.steps, "ALIGN": align, "EVEN": time % tile.steps == 0, "num_warps": tile.warps}  # fmt: skip


def _can_prefetch(d_inner, tile):
    """Whole groups of channels only: nothing is asked for that lies behind the end of a tensor."""
    return not INTERPRETED and d_inner % tile.channels == 0


def _lanes(tile, states, N):
    """How many threads share the channels of a program: Triton gives each a 16-byte word of a saved state's row."""
    return min(tile.channels, tile.warps * max(1, 32 * (16 // states.element_size()) // N))


def _split_starts(x, delta, z, B, A, delta_bias, h0, cut, constants, reverse):
    """What each split starts from, (batch, splits, d_inner, N): h0, possibly None, if there is only one."""
    batch, time, d_inner = x.shape
    groups, splits, split_len = cut
    if splits == 1:
        return h0
    ends = torch.empty((batch, splits, *A.shape), dtype=torch.float32, device=x.device)
    starts = torch.empty_like(ends)
    dt_sums = torch.empty((batch, splits, d_inner), dtype=torch.float32, device=x.device)
    _ends_kernel[(groups * splits * batch,)](
        x, delta, z, B, A, delta_bias, ends, dt_sums, x.stride(0), delta.stride(0), z.stride(0), B.stride(0),
        time, groups, splits, split_len,
        X_STEP=x.stride(1), DELTA_STEP=delta.stride(1), Z_STEP=z.stride(1), B_STEP=B.stride(1), REVERSE=reverse,
        **constants,
    )  # fmt: skip
    _carry_kernel[(_ceil_div(A.numel(), CARRY_BLOCK), batch)](
        ends, dt_sums, A, h0, starts, A.numel(), splits, N_STATE=A.shape[1], SPLITS=_power_of_2(splits),
        BLOCK=CARRY_BLOCK, HAS_H0=h0 is not None, REVERSE=reverse, num_warps=1,
    )  # fmt: skip
    return starts


def _sum_rows(rows, *shapes):
    """rows (n, the sizes of the 2 or 3 shapes together), summed over n, as tensors of these shapes: in one kernel."""
    outs = [torch.empty(shape, dtype=rows.dtype, device=rows.device) for shape in shapes]
    sizes = [*(out.numel() for out in outs), 0][:3]
    block = 32 if len(rows) <= 512 else 8  # few and long columns: more programs
    _sum_rows_kernel[(_ceil_div(rows.shape[1], block),)](
        rows, *[*outs, outs[0]][:3], len(rows), *sizes, ROWS=1024 // block, BLOCK=block
    )
    return outs


def chunk_states_shape(batch, time, d_inner, n_state):
    """Shape of the states that `scan_forward` keeps for `scan_backward`."""
    return batch, _ceil_div(time, CHUNK), d_inner, n_state


def chunk_states_dtype(dtype):
    """Their type, and that of the partial sums of dB and dC, for inputs of type `dtype`: bfloat16 inputs are rounded as
    coarsely themselves, else float32."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def scan_forward(u, delta, A, B, C, D, z, delta_bias, h0=None, tile=FORWARD):
    """Selective scan: (y, chunk_states, h_last); the module's docstring has the recurrence and the shapes.

    h0, h_last: (batch, d_inner, N) float32. chunk_states: the state before steps 0, CHUNK, 2 CHUNK, ...
    """
    _check(u, delta, z, B, C)
    batch, time, d_inner = u.shape
    tile = _fit(tile, A)
    cut = groups, splits, split_len = _split_time(batch, time, d_inner, tile, u.device)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    shape = chunk_states_shape(batch, time, *A.shape)
    states = torch.empty(shape, dtype=chunk_states_dtype(u.dtype), device=u.device)
    h_last = torch.empty((batch, *A.shape), dtype=torch.float32, device=u.device)
    constants = _constants(A, time, tile, B, C)
    with _on(u):
        starts = _split_starts(u, delta, z, B, A, delta_bias, h0, cut, constants, reverse=False)
        _forward_kernel[(groups * splits * batch,)](
            u, delta, z, B, C, A, D, delta_bias, starts, y, states, h_last,
            u.stride(0), delta.stride(0), z.stride(0), B.stride(0), C.stride(0), time, groups, splits, split_len,
            U_STEP=u.stride(1), DELTA_STEP=delta.stride(1), Z_STEP=z.stride(1), B_STEP=B.stride(1), C_STEP=C.stride(1),
            CHUNK=CHUNK, HAS_STARTS=starts is not None, PREFETCH=_can_prefetch(d_inner, tile), **constants,
        )  # fmt: skip
    return y, states, h_last


def scan_backward(dy, u, delta, A, B, C, D, z, delta_bias, chunk_states, dz, dB, dC, h0=None, tile=BACKWARD):
    """Gradients of `scan_forward`'s y: dz, dB, dC into the views given, (du, ddelta, dA, dD, ddelta_bias) returned.

    ddelta is the gradient of delta before the bias and the softplus. du, ddelta have u's dtype; dA, dD, ddelta_bias are
    float32. h0 is not read: the first of chunk_states is that state.
    """
    _check(dy, u, delta, z, B, C, dz, dB, dC)
    batch, time, d_inner = u.shape
    n_state = A.shape[1]
    tile = _fit(tile, A)
    cut = groups, splits, split_len = _split_time(batch, time, d_inner, tile, u.device)
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    ddelta = torch.empty_like(du)
    dBC = torch.empty((groups, batch, time, 2 * n_state), dtype=chunk_states_dtype(u.dtype), device=u.device)
    sums = torch.empty((batch * splits, d_inner * (n_state + 2)), dtype=torch.float32, device=u.device)
    constants = _constants(A, time, tile, B, C)
    with _on(u):
        starts = _split_starts(dy, delta, z, C, A, delta_bias, None, cut, constants, reverse=True)
        _backward_kernel[(groups * splits * batch,)](
            dy, u, delta, z, B, C, A, D, delta_bias, chunk_states, starts, du, ddelta, dz, dBC, sums,
            dy.stride(0), u.stride(0), delta.stride(0), z.stride(0), B.stride(0), C.stride(0), dz.stride(0),
            batch, time, groups, splits, split_len,
            DY_STEP=dy.stride(1), U_STEP=u.stride(1), DELTA_STEP=delta.stride(1), Z_STEP=z.stride(1),
            B_STEP=B.stride(1), C_STEP=C.stride(1), DZ_STEP=dz.stride(1),
            CHUNK=CHUNK, HAS_STARTS=starts is not None, LANES=_lanes(tile, chunk_states, constants["N"]),
            PREFETCH=_can_prefetch(d_inner, tile), **constants,
        )  # fmt: skip
        rows = max(1, 512 // constants["N"])
        _sum_groups_kernel[(_ceil_div(batch * time, rows),)](
            dBC, dB, dC, dB.stride(0), dB.stride(1), dC.stride(0), dC.stride(1), batch * time, time, groups,
            N_STATE=n_state, N=constants["N"], ROWS=rows,
        )  # fmt: skip
        dA, dD, ddelta_bias = _sum_rows(sums, A.shape, (d_inner,), (d_inner,))
    return du, ddelta, dA, dD, ddelta_bias


def conv_silu_forward(x, weight, bias, tile=CONV_FORWARD):
    """silu(causal depthwise convolution of x): x (b, t, d_inner), weight (d_inner, width), bias (d_inner,)."""
    _check(x)
    batch, time, d_inner = x.shape
    xc = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    groups = _ceil_div(d_inner, tile.channels)
    with _on(x):
        _conv_forward_kernel[(groups * _ceil_div(time, tile.steps), batch)](
            x, weight, bias, xc, x.stride(0), time, groups, X_STEP=x.stride(1), D_INNER=d_inner,
            WIDTH=weight.shape[1], CH=tile.channels, STEPS=tile.steps, num_warps=tile.warps,
        )  # fmt: skip
    return xc


def conv_silu_backward(x, weight, bias, dxc, dx, tile=CONV_BACKWARD):
    """Write the gradient of x into dx; return (dweight, dbias) in float32. The pre-activation is recomputed."""
    _check(x, dxc, dx)
    batch, time, d_inner = x.shape
    width = weight.shape[1]
    groups = _ceil_div(d_inner, tile.channels)
    segments = _ceil_div(time, tile.steps * CONV_BLOCKS)
    sums = torch.empty((batch * segments, d_inner * (width + 1)), dtype=torch.float32, device=x.device)
    with _on(x):
        _conv_backward_kernel[(groups * segments, batch)](
            x, weight, bias, dxc, dx, sums, x.stride(0), dxc.stride(0), dx.stride(0), time, groups, segments,
            X_STEP=x.stride(1), DXC_STEP=dxc.stride(1), DX_STEP=dx.stride(1), D_INNER=d_inner,
            WIDTH=width, CH=tile.channels, STEPS=tile.steps, BLOCKS=CONV_BLOCKS, num_warps=tile.warps,
        )  # fmt: skip
        dweight, dbias = _sum_rows(sums, (d_inner, width), (d_inner,))
    return dweight, dbias
