"""Selective scan and causal convolution as Triton kernels, for CUDA GPUs.

The scan of Mamba-1 (Gu & Dao 2023, arXiv 2312.00752, algorithm 2) with what surrounds it fused in: softplus, the skip
term D u and the gate. The equations, forward and backward, are in selective_scan.py, and the names here are those of
the equations.

There are batch x d_inner independent recurrences: enough to fill a GPU at any batch size worth training with. So each
program takes a few channels of one sequence and walks through time in order, its state in registers; there is no
parallel scan, which would cost extra work. Where the programs are too few (batch sizes of 1 to 8), time is split as
well, in three kernels: `_ends_kernel` finds the state at the end of each split as if the split had started from zero,
`_carry_kernel` composes these into the state that each split really starts from, and then every split is computed on
its own. The backward pass does the same in reverse.

The forward pass saves the state before every CHUNK-th step. The backward pass goes through a chunk in blocks of a few
steps, from the last block to the first. For each it computes the states again, from the saved one up to the block and
through it, keeps those of the block in registers and walks back through them. The inputs of the next chunk are
prefetched, because too few warps are running to hide the latency of memory. dB and dC are sums over channels: each
program writes its own partial sum and another kernel adds them, so that results don't depend on the order in which
programs finish.

Arithmetic and state are float32. Inputs are float32, bfloat16 or float16; float64 is refused, use another back end.
Shapes: u, delta, z, y (batch, time, d_inner); B, C (batch, time, N); A (d_inner, N); D, delta_bias (d_inner,). Views
that are strided in batch and time are taken as they are; the last dimension must be contiguous.
"""

import contextlib
import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

import cli
from kernels.triton_math import LN2, LOG2E, sigmoid, softplus_sigmoid


class Tile(NamedTuple):
    """How the work is divided: the channels per program (for the scan: at N = 32, `_fit` adapts them to other N), its
    warps, and the time steps that it holds in registers at once."""

    channels: int
    warps: int
    steps: int


FORWARD = Tile(channels=16, warps=1, steps=4)
BACKWARD = Tile(channels=32, warps=2, steps=4)
CONV_FORWARD = Tile(channels=128, warps=4, steps=32)
CONV_BACKWARD = Tile(channels=64, warps=1, steps=16)
CONV_BLOCKS = 8  # blocks of steps per program of the convolution's backward pass
CARRY_BLOCK = 32  # state elements per program of the carry over splits
CHUNK = 8  # steps between saved states: a multiple of every tile's steps, at most two blocks of BACKWARD
MAX_STATE = 256
MAX_SPLITS = 64
WARPS_TO_FILL = 12  # warps that each multiprocessor should have; time is split where there are fewer

INTERPRETED = triton.knobs.runtime.interpret  # Triton's interpreter, which has no inline assembler

MINUS_INF = tl.constexpr(-math.inf)


@triton.jit
def _compose(a1, x1, a2, x2):
    """The map h -> a1 h + x1 followed by h -> a2 h + x2, as one such map: (a, x)."""
    return a2 * a1, a2 * x1 + x2


# ---- tiles ---------------------------------------------------------------------------------------------------
#
# What depends on time and channel only (softplus, the gate, their derivatives) is computed on tiles [STEPS, CH], spread
# over all threads. The recurrence then takes the rows of such a tile one by one, and each of the threads that share a
# channel needs a copy of its number. Registers can't be indexed, but a tile can be split: `_rows` takes it apart by
# reshape and split, at the price of one exchange between threads for the whole tile.


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
    """The rows of x, then those of y, by one exchange between threads.

    Split separately, a tile that is computed from a single load would be treated differently by the compiler: it would
    exchange the loaded values and let every thread repeat the arithmetic, eight times the work.
    """
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
    """The indices first ... first + BLOCK - 1, and whether each is below SIZE: a constant where SIZE % BLOCK is 0."""
    i = first + tl.arange(0, BLOCK)
    return i, tl.full([BLOCK], True, tl.int1) if SIZE % BLOCK == 0 else i < SIZE


@triton.jit
def _before(first, end, STEPS: tl.constexpr, EVEN: tl.constexpr):
    """Which of the steps first ... first + STEPS - 1 are before `end`; where EVEN, all are."""
    return tl.full([STEPS], True, tl.int1) if EVEN else first + tl.arange(0, STEPS) < end


@triton.jit
def _load_rows(
    ptr, n, mask_n, first, end, STEP: tl.constexpr, ALIGN: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr
):
    """STEPS rows of B or C, [N] each, zero from `end` on. They are loaded ahead of use and kept in their own dtype,
    which takes fewer registers than float32."""
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
    """Start to bring LENGTH elements from ptr + t * STEP on into the L2 cache, for t = first ... first + ROWS - 1, as
    far as these steps lie within the series."""
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
    """The reverse of `_load_tile`, in the dtype of ptr."""
    ptr += tl.cast(first, tl.int64) * STEP
    tl.store(ptr + tl.arange(0, STEPS)[:, None] * STEP + c[None, :], x.to(ptr.dtype.element_ty), mask=mask)


# ---- scan ----------------------------------------------------------------------------------------------------


@triton.jit
def _place(n_groups, n_splits, split_len, time):
    """This program's sequence, split, group of channels, first step and end. Neighbouring programs have neighbouring
    groups, because these share rows of B and C, and cache lines of u, delta and z."""
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
    """The end of each split as if it had started from zero, and the sum of its dt, which gives its decay.

    Forward (x = u): h after the last step. In reverse (x = dy, and B is C): the carry out of the first step.
    """
    batch, split, group, start, end = _place(n_groups, n_splits, split_len, time)
    c, mask_c = _inside(group * CH, D_INNER, CH)
    n, mask_n = _inside(0, N_STATE, N)
    mask = mask_c[:, None] & mask_n[None, :]
    x += batch * x_batch
    delta += batch * delta_batch
    z += batch * z_batch
    B += tl.multiple_of(batch * B_batch, ALIGN)
    A2 = tl.load(A + c[:, None] * N_STATE + n[None, :], mask=mask, other=0.0) * LOG2E
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
        dt, _ = softplus_sigmoid(_load_tile(delta, c, tile, first, MINUS_INF, DELTA_STEP, STEPS) + bias[None, :])
        Bs = _load_rows(B, n, mask_n, first, end, B_STEP, ALIGN, STEPS, EVEN)
        if REVERSE:
            z_tile = _load_tile(z, c, tile, first, 0.0, Z_STEP, STEPS)
            x_tile *= z_tile * sigmoid(z_tile)
        else:
            x_tile *= dt
        dt_sum += dt
        rows = _rows_of_two(dt, x_tile)
        for k in tl.static_range(STEPS):
            if REVERSE:
                h += rows[2 * STEPS - 1 - k][:, None] * Bs[STEPS - 1 - k].to(tl.float32)[None, :]
                h *= tl.exp2(rows[STEPS - 1 - k][:, None] * A2)
            else:
                h = tl.exp2(rows[k][:, None] * A2) * h + rows[STEPS + k][:, None] * Bs[k].to(tl.float32)[None, :]
    row = (batch * n_splits + split) * D_INNER
    tl.store(ends + row * N_STATE + c[:, None] * N_STATE + n[None, :], h, mask=mask)
    tl.store(dt_sums + row + c, tl.sum(dt_sum, 0), mask=mask_c)


@triton.jit
def _carry_kernel(
    ends, dt_sums, A, h0, starts, n_elements, n_splits,
    N_STATE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, HAS_H0: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What each split starts from, given all ends and decays of `_ends_kernel`: an exclusive scan over the splits."""
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
    """y, the states before each chunk and, by the last split, the last state; in blocks of STEPS steps."""
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
    A2 = tl.load(A + state, mask=mask, other=0.0) * LOG2E
    skip = tl.load(D + c, mask=mask_c, other=0.0)
    bias = tl.load(delta_bias + c, mask=mask_c, other=0.0)
    if HAS_STARTS:
        h = tl.load(starts + (batch * n_splits + split) * (D_INNER * N_STATE) + state, mask=mask, other=0.0)
    else:
        h = tl.zeros([CH, N], tl.float32)
    for first in range(start, end, STEPS):
        # Before each chunk: save the state for the backward pass, and prefetch the inputs of the next chunk.
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
        dt, _ = softplus_sigmoid(_load_tile(delta, c, tile, first, MINUS_INF, DELTA_STEP, STEPS) + bias[None, :])
        Bs = _load_rows(B, n, mask_n, first, end, B_STEP, ALIGN, STEPS, EVEN)
        Cs = _load_rows(C, n, mask_n, first, end, C_STEP, ALIGN, STEPS, EVEN)
        # The recurrence, step by step: h = a h + v B. rows: those of dt, then those of v = dt u.
        rows = _rows_of_two(dt, dt * u_tile)
        Ch = ()  # C_t . h_t, one row [CH] per step
        for k in tl.static_range(STEPS):
            h = tl.exp2(rows[k][:, None] * A2) * h + rows[STEPS + k][:, None] * Bs[k].to(tl.float32)[None, :]
            Ch += (tl.sum(h * Cs[k].to(tl.float32)[None, :], 1),)
        o_tile = _stack(Ch, STEPS) + skip[None, :] * u_tile
        _store_tile(y, o_tile * z_tile * sigmoid(z_tile), c, tile, first, D_INNER, STEPS)
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
    """The equations of selective_scan.py under their names, over chunks and in each over blocks of STEPS steps, from
    the last to the first. `starts` holds the carry into the last step of each split."""
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
    A2 = tl.load(A + state, mask=mask, other=0.0) * LOG2E
    skip = tl.load(D + c, mask=mask_c, other=0.0)
    bias = tl.load(delta_bias + c, mask=mask_c, other=0.0)
    split_row = (batch * n_splits + split) * D_INNER
    if HAS_STARTS:
        carry = tl.load(starts + split_row * N_STATE + state, mask=mask, other=0.0)
    else:
        carry = tl.zeros([CH, N], tl.float32)
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
            # ---- forward once more, from the saved state to the start of the block
            h = tl.load(states + row + state, mask=mask, other=0.0).to(tl.float32)
            for block in range(0, last_block - back):
                first = chunk_start + block * STEPS
                tile = tl.full([STEPS, CH], True, tl.int1) & mask_c[None, :]
                u_tile = _load_tile(u, c, tile, first, 0.0, U_STEP, STEPS)
                dt, _ = softplus_sigmoid(_load_tile(delta, c, tile, first, 0.0, DELTA_STEP, STEPS) + bias[None, :])
                Bs = _load_rows(B, n, mask_n, first, end, B_STEP, ALIGN, STEPS, True)
                rows = _rows_of_two(dt, dt * u_tile)
                for k in tl.static_range(STEPS):
                    h = tl.exp2(rows[k][:, None] * A2) * h + rows[STEPS + k][:, None] * Bs[k].to(tl.float32)[None, :]
            # ---- what doesn't depend on the state, for the block: dt and its slope, v = dt u, the gate, do
            first = chunk_start + (last_block - back) * STEPS
            tile = _before(first, end, STEPS, EVEN)[:, None] & mask_c[None, :]
            u_tile = _load_tile(u, c, tile, first, 0.0, U_STEP, STEPS)
            z_tile = _load_tile(z, c, tile, first, 0.0, Z_STEP, STEPS)
            dy_tile = _load_tile(dy, c, tile, first, 0.0, DY_STEP, STEPS)
            raw = _load_tile(delta, c, tile, first, MINUS_INF, DELTA_STEP, STEPS) + bias[None, :]
            Bs = _load_rows(B, n, mask_n, first, end, B_STEP, ALIGN, STEPS, EVEN)
            Cs = _load_rows(C, n, mask_n, first, end, C_STEP, ALIGN, STEPS, EVEN)
            dt, slope = softplus_sigmoid(raw)
            gate = sigmoid(z_tile)
            do_tile = dy_tile * z_tile * gate
            rows, do_rows = _rows_of_two(dt, dt * u_tile), _rows(do_tile)  # rows: those of dt, then those of v
            # ---- forward through the block, keeping a and h of every step; hs[k] is the state before step k
            hs, a_steps = (h,), ()
            for k in tl.static_range(STEPS):
                a = tl.exp2(rows[k][:, None] * A2)
                hs += (a * hs[k] + rows[STEPS + k][:, None] * Bs[k].to(tl.float32)[None, :],)
                a_steps += (a,)
            # ---- backward through the recurrence: dh, what it gives dB, dC, dv, dA and ddt, and the next carry
            Ch, dv, deA2 = (), (), ()  # sums over the states, one row [CH] per step: C . h, dh . B, de . A2
            dBs, dCs = (), ()  # terms of dB and dC, [CH, N] per step
            for j in tl.static_range(STEPS):
                B_k = Bs[STEPS - 1 - j].to(tl.float32)[None, :]
                C_k = Cs[STEPS - 1 - j].to(tl.float32)[None, :]
                dt_k, do_k = rows[STEPS - 1 - j][:, None], do_rows[STEPS - 1 - j][:, None]
                dh = carry + do_k * C_k
                Ch = (tl.sum(hs[STEPS - j] * C_k, 1),) + Ch
                dv = (tl.sum(dh * B_k, 1),) + dv
                dBs = (dh * rows[2 * STEPS - 1 - j][:, None],) + dBs
                dCs = (hs[STEPS - j] * do_k,) + dCs
                carry = dh * a_steps[STEPS - 1 - j]
                de = carry * hs[STEPS - 1 - j]
                dA_sum += de * dt_k
                deA2 = (tl.sum(de * A2, 1),) + deA2
            # ---- dB and dC of this program's channels; du, ddelta, dz; the sums over time
            _store_sums(dBC, dBs, n, mask_n, first, end, N, LANES, 2 * N_STATE, STEPS, EVEN)
            _store_sums(dBC + N_STATE, dCs, n, mask_n, first, end, N, LANES, 2 * N_STATE, STEPS, EVEN)
            dv_tile = _stack(dv, STEPS)
            ddelta_tile = (u_tile * dv_tile + LN2 * _stack(deA2, STEPS)) * slope  # A = A2 ln 2
            dz_tile = dy_tile * (_stack(Ch, STEPS) + skip[None, :] * u_tile) * gate * (1.0 + z_tile * (1.0 - gate))
            dD_sum += do_tile * u_tile
            dbias_sum += ddelta_tile
            _store_tile(du, dt * dv_tile + skip[None, :] * do_tile, c, tile, first, D_INNER, STEPS)
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
    """Stores the sums over channels of STEPS tensors [CH, N] as rows.

    Each thread first adds up the channels that it holds; then LANES partial sums are left per row. A plain tl.sum would
    shuffle each of them between threads log2(LANES) times. Here they are stacked over the steps and split, so all of
    them travel in one exchange and are added in registers.
    """
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
    for group in tl.range(0, n_groups, loop_unroll_factor=8):  # eight loads under way at once
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


# ---- host side -----------------------------------------------------------------------------------------------


def _check(*tensors):
    """Raise UserError for tensors that the kernels would compute wrongly: another dtype, strided channels."""
    for tensor in tensors:
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise cli.UserError(f"the Triton scan takes float32, bfloat16 or float16, not {tensor.dtype}; "
                                "use the reference back end")  # fmt: skip
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise cli.UserError("the Triton scan needs contiguous channels; pass (batch, time, channels) tensors")


def _on(tensor):
    """A context in which the tensor's device is the current one, on which Triton launches kernels."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def _ceil_div(a, b):
    """a / b rounded up. triton.cdiv does the same but takes ten times as long, and a launch needs a dozen of these."""
    return -(-a // b)


def _power_of_2(n):
    """The smallest power of two that is at least n. (triton.next_power_of_2 is slow like triton.cdiv.)"""
    return 1 << (n - 1).bit_length()


@functools.cache
def _processors(device):
    """The number of multiprocessors of a GPU; 1 on a CPU, in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _fit(tile, A):
    """The tile adapted to this d_inner and N: as many state elements per thread as at N = 32."""
    d_inner, n_state = A.shape
    if n_state > MAX_STATE:
        raise cli.UserError(f"the Triton scan takes d_state up to {MAX_STATE}, not {n_state}")
    N = _power_of_2(n_state)
    channels = min(max(tile.channels * 32 // N, 1), _power_of_2(d_inner))
    warps = min(tile.warps, max(1, tile.warps * channels * N // (tile.channels * 32)))
    return tile._replace(channels=channels, warps=warps)


def _split_time(batch, time, d_inner, tile, device):
    """(groups of channels, splits of time, steps per split). Time is only split where too few warps would be busy."""
    groups = _ceil_div(d_inner, tile.channels)
    wanted = _ceil_div(WARPS_TO_FILL * _processors(device), batch * groups * tile.warps)
    chunks = _ceil_div(time, CHUNK)
    chunks_each = _ceil_div(chunks, min(wanted, MAX_SPLITS, chunks))
    return groups, _ceil_div(chunks, chunks_each), chunks_each * CHUNK


def _constants(A, time, tile, *rows):
    """The compile-time arguments that all scan kernels share. `rows`: the tensors that are loaded by rows, B and C."""
    d_inner, n_state = A.shape
    # The largest power of two that divides the row strides: how wide a load may be.
    align = math.gcd(16, *(stride for tensor in rows for stride in tensor.stride()[:-1]))
    return {"D_INNER": d_inner, "N_STATE": n_state, "N": _power_of_2(n_state), "CH": tile.channels,
            "STEPS": tile.steps, "ALIGN": align, "EVEN": time % tile.steps == 0, "num_warps": tile.warps}  # fmt: skip


def _can_prefetch(d_inner, tile):
    """Whether to prefetch: only if all groups of channels are whole, so that no address lies behind a tensor's end."""
    return not INTERPRETED and d_inner % tile.channels == 0


def _lanes(tile, states, N):
    """How many threads share the channels of a program. Triton gives each thread 16 bytes of a saved state's row."""
    return min(tile.channels, tile.warps * max(1, 32 * (16 // states.element_size()) // N))


def _split_starts(x, delta, z, B, A, delta_bias, h0, cut, constants, reverse):
    """What each split starts from, (batch, splits, d_inner, N); with a single split that is h0, which may be None.

    cut: what `_split_time` returned. x and B in reverse: dy and C, see `_ends_kernel`.
    """
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
    """The sum over n of rows (n, sizes of the two or three shapes together), cut into tensors of these shapes."""
    outs = [torch.empty(shape, dtype=rows.dtype, device=rows.device) for shape in shapes]
    sizes = [*(out.numel() for out in outs), 0][:3]
    block = 32 if len(rows) <= 512 else 8  # columns per program: fewer, so more programs, where columns are long
    _sum_rows_kernel[(_ceil_div(rows.shape[1], block),)](
        rows, *[*outs, outs[0]][:3], len(rows), *sizes, ROWS=1024 // block, BLOCK=block
    )
    return outs


def chunk_states_shape(batch, time, d_inner, n_state):
    """Shape of the states that `scan_forward` keeps for `scan_backward`."""
    return batch, _ceil_div(time, CHUNK), d_inner, n_state


def chunk_states_dtype(dtype):
    """Dtype of those states, and of the partial sums of dB and dC, for inputs of type `dtype`.

    bfloat16 where the inputs are, since these are rounded as coarsely themselves; float32 otherwise.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def scan_forward(u, delta, A, B, C, D, z, delta_bias, h0=None, tile=FORWARD):
    """The scan of selective_scan.py: (y, chunk_states, h_last); the shapes are in the docstring of this module.

    h0 (batch, d_inner, N), float32, is the state before the first step, zero if it is None, as the model has it: only
    the tests give another. h_last is the last state, alike. chunk_states: the states before steps 0, CHUNK, 2 CHUNK, …
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


def scan_backward(dy, u, delta, A, B, C, D, z, delta_bias, chunk_states, dz, dB, dC, tile=BACKWARD):
    """The gradients of `scan_forward`'s inputs from dy, that of its y, and the chunk_states that it returned.

    Writes dz, dB and dC into the views given; returns (du, ddelta, dA, dD, ddelta_bias): du, ddelta in u's dtype, the
    others in float32.
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
    """silu(causal depthwise convolution of x): x (batch, time, d_inner), weight (d_inner, width), bias (d_inner,)."""
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
    """Write the gradient of x into dx and return (dweight, dbias) in float32, from dxc, the gradient of the result.

    The convolution before the SiLU is computed again rather than kept.
    """
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
