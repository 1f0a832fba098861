"""Selective scan and causal convolution for the CPU: Numba kernels with hand-placed SIMD.

Every function works on (batch, time, channels) tensors; batch and time may be strided. The kernels know float32 and
float64; bfloat16 and float16 are computed in float32, and the results have the type of the inputs again. The
equations, forward and backward, are in selective_scan.py, and the names here are those of the equations.

The recurrence is computed in the layout that the data has. One SIMD vector holds neighbouring channels (32 floats or 16
doubles, see simd.py). Time is cut into chunks of CHUNK steps. Within a chunk one state index n after the other is
worked on: its state stays in a register while time runs over the chunk, and all that this loop reads and writes lies in
the L1 cache. Only the states at chunk boundaries are kept for the backward pass, which recomputes the others chunk by
chunk. Memory therefore grows with batch x time x channels, not with the number of states (Gu & Dao 2023,
arXiv 2312.00752, section 3.3.2, where the fast memory is the GPU's SRAM instead of the CPU's cache).
"""

import functools
import itertools
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import float32, float64, int64, types

from kernels.numba_cache import njit
from kernels.simd import (
    CACHE_LINE,
    LOG2_E,
    VECTOR_BYTES,
    add_sums,
    exp2_of_product,
    get,
    inlines_simd,
    load,
    prefetch,
    sigmoid,
    sigmoid_softplus,
    silu_slope,
    softplus,
    store,
    zeros_like,
)

CHUNK = 48  # time steps between saved states; the loops over them touch 8 tiles of CHUNK vectors: an L1 cache
CONVOLVES_AGAIN = False  # the backward pass takes the convolved input as the forward pass has kept it
NEEDS_Y = ()  # dtypes of which the backward pass takes y, the forward pass's output: none
LN_2 = float(np.log(2.0))


# ---- tiles ---------------------------------------------------------------------------------------------------
# A tile (steps, lanes) holds one vector of channels over a chunk of time. Where the channels end within a vector, the
# lanes behind them are zero in the tile and are not stored back, so the arithmetic can always take whole vectors.


@njit
def empty_tiles(count, steps, lanes, like):
    """`count` tiles of like's dtype, aligned to cache lines: otherwise each vector touches three lines, not two."""
    line = CACHE_LINE // like.itemsize
    space = np.empty(count * steps * lanes + line, like.dtype)
    begin = -(space.ctypes.data // like.itemsize) % line
    return space[begin : begin + count * steps * lanes].reshape(count, steps, lanes)


@njit
def load_tile(tile, rows, begin, steps, column):
    """tile[:steps] = rows[begin : begin + steps, column : column + lanes], zero in columns that `rows` doesn't have."""
    lanes = tile.shape[1]
    if column + lanes <= rows.shape[1]:
        for t in range(steps):
            store(tile, t, 0, load(rows, begin + t, column))
    else:
        for t in range(steps):
            for lane in range(lanes):
                tile[t, lane] = rows[begin + t, column + lane] if column + lane < rows.shape[1] else 0.0


@njit
def store_tile(tile, rows, begin, steps, column):
    """The reverse of load_tile: rows[begin : begin + steps, column : column + lanes] = tile[:steps]."""
    if column + tile.shape[1] <= rows.shape[1]:
        for t in range(steps):
            store(rows, begin + t, column, load(tile, t, 0))
    else:
        for t in range(steps):
            for lane in range(rows.shape[1] - column):
                rows[begin + t, column + lane] = tile[t, lane]


@njit
def transpose_rows(rows, begin, steps, out):
    """out[:, :steps] = rows[begin : begin + steps].T, so that time is contiguous."""
    for t in range(steps):
        for n in range(rows.shape[1]):
            out[n, t] = rows[begin + t, n]


@njit
def finish_sums(sums, begin, steps, dB, dC):
    """Write dB[begin + t, n] and dC[begin + t, n] from the partial sums that `add_sums` left in sums[n * CHUNK + t]."""
    parts = sums.shape[1] // 2
    for t in range(steps):
        for n in range(dB.shape[1]):
            dB_sum, dC_sum = get(sums, n * CHUNK + t, 0), get(sums, n * CHUNK + t, parts)
            for part in range(1, parts):
                dB_sum += get(sums, n * CHUNK + t, part)
                dC_sum += get(sums, n * CHUNK + t, parts + part)
            dB[begin + t, n], dC[begin + t, n] = dB_sum, dC_sum


@njit(forceinline=True)
def prefetch_rows(rows, begin, end, column):
    """Start to bring rows[begin : end, column : column + lanes] into the cache.

    The cache lines of a tile lie a whole row apart, a pattern that no processor foresees by itself. Asked for all at
    once, they would wait for each other, so the callers ask for a few at a time while they compute something else.
    """
    for t in range(begin, end):
        prefetch(rows, t, column)


@njit
def fill_zero(tile, begin, end):
    """tile[begin:end] = 0. Written as a loop because Numba takes seconds to compile the slice assignment."""
    for row in range(begin, end):
        for column in range(tile.shape[1]):
            tile[row, column] = 0.0


# ---- kernels: one batch row and a range of channels per call -------------------------------------------------
# Parameters with one value per channel come transposed and padded to whole vectors (`_pad_channels`).


@njit
def convolve(tile, weight, bias, column, steps, out):
    """out[t] = bias + sum_k weight[k] tile[t + k], before the SiLU; the tile begins taps - 1 steps before out does."""
    taps = weight.shape[0]
    for t in range(steps):
        pre = load(bias, 0, column)
        for k in range(taps):
            pre = pre + load(weight, k, column) * load(tile, t + k, 0)
        store(out, t, 0, pre)


@njit
def load_history(tile, rows, begin, steps, taps, column):
    """load_tile for the steps begin - (taps - 1) ... begin + steps - 1, zero before the start of the sequence."""
    missing = max(0, taps - 1 - begin)
    fill_zero(tile, 0, missing)
    load_tile(tile[missing:], rows, begin - (taps - 1) + missing, steps + taps - 1 - missing, column)


@inlines_simd
def _conv_forward_kernel(x, weight, bias, xc, index, start, stop, lanes):
    """xc[index, :, start:stop] = silu(convolution of x); weight (taps, channels), bias (1, channels)."""
    x, xc = x[index], xc[index]
    taps, time = weight.shape[0], x.shape[0]
    x_tile = empty_tiles(1, CHUNK + taps - 1, lanes, x)[0]
    pre_tile = empty_tiles(1, CHUNK, lanes, x)[0]
    for begin in range(0, time, CHUNK):
        steps = min(CHUNK, time - begin)
        for c in range(start, stop, lanes):
            load_history(x_tile, x, begin, steps, taps, c)
            convolve(x_tile, weight, bias, c, steps, pre_tile)
            for t in range(steps):
                prefetch(xc, begin + t, c)
                prefetch(x, begin + t, c + lanes)
                pre = load(pre_tile, t, 0)
                store(pre_tile, t, 0, pre * sigmoid(pre))
            store_tile(pre_tile, xc, begin, steps, c)


@inlines_simd
def _conv_backward_kernel(x, weight, bias, dxc, dx, dweight, dbias, index, start, stop, lanes):
    """Writes dx[index, :, start:stop]. dweight (batch, taps, channels) and dbias (batch, 1, channels) are added to:
    zero on entry, and each batch row has its own."""
    x, dxc, dx, dweight, dbias = x[index], dxc[index], dx[index], dweight[index], dbias[index]
    taps, time = weight.shape[0], x.shape[0]
    # dx[t] needs dpre[t] ... dpre[t + taps - 1]. The last of these belong to the next chunk and are computed twice:
    # they are few.
    x_tile = empty_tiles(1, CHUNK + 2 * (taps - 1), lanes, x)[0]
    pre_tile = empty_tiles(1, CHUNK + taps - 1, lanes, x)[0]
    dpre_tile = empty_tiles(1, CHUNK + taps - 1, lanes, x)[0]
    for begin in range(0, time, CHUNK):
        steps = min(CHUNK, time - begin)
        beyond = min(taps - 1, time - begin - steps)
        for c in range(start, stop, lanes):
            # dpre: the convolution again, and the gradient through the SiLU; zero beyond the end of the sequence
            load_history(x_tile, x, begin, steps + beyond, taps, c)
            convolve(x_tile, weight, bias, c, steps + beyond, pre_tile)
            load_tile(dpre_tile, dxc, begin, steps + beyond, c)
            for t in range(steps + beyond):
                prefetch(dx, begin + t, c)
                prefetch(x, begin + t, c + lanes)
                prefetch(dxc, begin + t, c + lanes)
                pre = load(pre_tile, t, 0)
                store(dpre_tile, t, 0, load(dpre_tile, t, 0) * silu_slope(pre, sigmoid(pre)))
            fill_zero(dpre_tile, steps + beyond, dpre_tile.shape[0])
            # the sums over time: dbias = sum_t dpre[t], dweight[k] = sum_t dpre[t] x[t + k - (taps - 1)]
            total = load(dbias, 0, c)
            for t in range(steps):
                total = total + load(dpre_tile, t, 0)
            store(dbias, 0, c, total)
            for k in range(taps):
                total = load(dweight, k, c)
                for t in range(steps):
                    total = total + load(dpre_tile, t, 0) * load(x_tile, t + k, 0)
                store(dweight, k, c, total)
            # dx[t] = sum_k weight[k] dpre[t + (taps - 1) - k], written over pre, which is no longer needed
            for t in range(steps):
                grad = load(dpre_tile, t + taps - 1, 0) * load(weight, 0, c)
                for k in range(1, taps):
                    grad = grad + load(dpre_tile, t + taps - 1 - k, 0) * load(weight, k, c)
                store(pre_tile, t, 0, grad)
            store_tile(pre_tile, dx, begin, steps, c)


@inlines_simd
def _scan_forward_kernel(u, delta, A2, B, C, D, z, delta_bias, states, last, y, index, start, stop, lanes):
    """Writes y and last[index, :, start:stop], and the states (batch, chunks, d_state, channels) before each chunk but
    the first, which is given. A2 (d_state, channels) is A log2(e)."""
    u, delta, z, B, C = u[index], delta[index], z[index], B[index], C[index]
    states, last, y = states[index], last[index], y[index]
    time, d_state = u.shape[0], A2.shape[0]
    u_tile, dt_tile, v_tile, z_tile, o_tile = empty_tiles(5, CHUNK, lanes, u)
    B_rows, C_rows = np.empty((2, d_state, CHUNK), u.dtype)
    h_tile = empty_tiles(1, d_state, lanes, u)[0]
    for begin in range(0, time, CHUNK):
        steps = min(CHUNK, time - begin)
        chunk = begin // CHUNK
        next_state = states[chunk + 1] if begin + CHUNK < time else last
        share = -(-steps // d_state)  # rows to prefetch while one state index is worked on
        transpose_rows(B, begin, steps, B_rows)
        transpose_rows(C, begin, steps, C_rows)
        for c in range(start, stop, lanes):
            # ---- what doesn't depend on the state: dt, v = dt u, and D u as the first term of o
            load_tile(u_tile, u, begin, steps, c)
            load_tile(dt_tile, delta, begin, steps, c)
            load_tile(z_tile, z, begin, steps, c)
            load_tile(h_tile, states[chunk], 0, d_state, c)
            for t in range(steps):
                dt = softplus(load(dt_tile, t, 0) + load(delta_bias, 0, c))
                u_t = load(u_tile, t, 0)
                store(dt_tile, t, 0, dt)
                store(v_tile, t, 0, dt * u_t)
                store(o_tile, t, 0, u_t * load(D, 0, c))
            # ---- the recurrence, one state index after the other: h = a h + v B, o += C h
            for n in range(d_state):
                A2_n = load(A2, n, c)
                h = load(h_tile, n, 0)
                for t in range(steps):
                    h = exp2_of_product(load(dt_tile, t, 0), A2_n) * h + load(v_tile, t, 0) * get(B_rows, n, t)
                    store(o_tile, t, 0, load(o_tile, t, 0) + h * get(C_rows, n, t))
                store(h_tile, n, 0, h)
                first, beyond = begin + min(n * share, steps), begin + min((n + 1) * share, steps)
                prefetch(next_state, n, c)
                prefetch_rows(y, first, beyond, c)
                if c + lanes < stop:
                    for rows in (u, delta, z):
                        prefetch_rows(rows, first, beyond, c + lanes)
            # ---- the gate: y = o silu(z), written over o
            for t in range(steps):
                z_t = load(z_tile, t, 0)
                store(o_tile, t, 0, load(o_tile, t, 0) * (z_t * sigmoid(z_t)))
            store_tile(h_tile, next_state, 0, d_state, c)
            store_tile(o_tile, y, begin, steps, c)


@inlines_simd
def _scan_backward_kernel(dy, u, delta, A2, B, C, D, z, delta_bias, states, du, ddelta, dz, dB, dC, dA, dD, ddelta_bias,
                          index, start, stop, lanes):
    """The equations of selective_scan.py under their names, over chunks from the last to the first.

    dB, dC (time, d_state) are written: the sums over this call's channels. dA (batch, d_state, channels), dD and
    ddelta_bias (batch, 1, channels) are added to: zero on entry, and each batch row has its own.
    """
    u, delta, z, dy, B, C, states = u[index], delta[index], z[index], dy[index], B[index], C[index], states[index]
    du, ddelta, dz = du[index], ddelta[index], dz[index]
    dA, dD, ddelta_bias = dA[index], dD[index], ddelta_bias[index]
    time, d_state = u.shape[0], A2.shape[0]
    tiles = empty_tiles(12, CHUNK, lanes, u)
    u_tile, dt_tile, slope_tile, v_tile, z_tile, gate_tile = tiles[0], tiles[1], tiles[2], tiles[3], tiles[4], tiles[5]
    o_tile, dy_tile, do_tile, ddt_tile, dv_tile, a_tile = tiles[6], tiles[7], tiles[8], tiles[9], tiles[10], tiles[11]
    h_tile = empty_tiles(1, CHUNK + 1, lanes, u)[0]  # of one state index; h_tile[t] is the state before step t
    first_tile = empty_tiles(1, d_state, lanes, u)[0]  # the state before the chunk, of all state indices
    B_rows, C_rows = np.empty((2, d_state, CHUNK), u.dtype)
    sums = empty_tiles(1, d_state * CHUNK, lanes // 4, u)[0]  # partial sums of dB and dC, see add_sums
    carries = np.zeros((d_state, dA.shape[1]), u.dtype)  # the carry of each state, handed from chunk to chunk
    for chunk in range((time - 1) // CHUNK, -1, -1):
        begin = chunk * CHUNK
        steps, saved = min(CHUNK, time - begin), states[chunk]
        share = -(-steps // d_state)  # rows to prefetch while one state index is worked on
        transpose_rows(B, begin, steps, B_rows)
        transpose_rows(C, begin, steps, C_rows)
        fill_zero(sums, 0, d_state * CHUNK)
        for c in range(start, stop, lanes):
            # ---- what doesn't depend on the state: dt and its slope, v = dt u, the gate, do = dy silu(z); and the
            # first terms of the sums over the state indices: D u of o, zero of ddt and dv
            load_tile(u_tile, u, begin, steps, c)
            load_tile(dt_tile, delta, begin, steps, c)
            load_tile(z_tile, z, begin, steps, c)
            load_tile(dy_tile, dy, begin, steps, c)
            load_tile(first_tile, saved, 0, d_state, c)
            for t in range(steps):
                u_t, z_t = load(u_tile, t, 0), load(z_tile, t, 0)
                gate = sigmoid(z_t)
                slope, dt = sigmoid_softplus(load(dt_tile, t, 0) + load(delta_bias, 0, c))
                store(dt_tile, t, 0, dt)
                store(slope_tile, t, 0, slope)
                store(v_tile, t, 0, dt * u_t)
                store(gate_tile, t, 0, gate)
                store(o_tile, t, 0, u_t * load(D, 0, c))
                store(do_tile, t, 0, load(dy_tile, t, 0) * (z_t * gate))
                store(ddt_tile, t, 0, zeros_like(dt))
                store(dv_tile, t, 0, zeros_like(dt))
            for n in range(d_state):
                # ---- forward once more, from the saved state: h and a of every step, which the way back needs
                A2_n = load(A2, n, c)
                h = load(first_tile, n, 0)
                store(h_tile, 0, 0, h)
                for t in range(steps):
                    a = exp2_of_product(load(dt_tile, t, 0), A2_n)
                    h = a * h + load(v_tile, t, 0) * get(B_rows, n, t)
                    store(a_tile, t, 0, a)
                    store(h_tile, t + 1, 0, h)
                    store(o_tile, t, 0, load(o_tile, t, 0) + h * get(C_rows, n, t))
                # ---- backward through the recurrence: dh, what it gives dB, dC, dv, dA and ddt, and the next carry.
                # h begins as the state after the last step.
                carry = load(carries, n, c)
                dA_n = load(dA, n, c)
                for t in range(steps - 1, -1, -1):
                    do = load(do_tile, t, 0)
                    dh = carry + do * get(C_rows, n, t)
                    add_sums(sums, n * CHUNK + t, dh * load(v_tile, t, 0), do * h)  # dB, dC
                    store(dv_tile, t, 0, load(dv_tile, t, 0) + dh * get(B_rows, n, t))
                    carry = dh * load(a_tile, t, 0)
                    h = load(h_tile, t, 0)
                    de = carry * h
                    dA_n = dA_n + de * load(dt_tile, t, 0)
                    store(ddt_tile, t, 0, load(ddt_tile, t, 0) + de * A2_n)  # times ln 2 below: A = A2 ln 2
                store(carries, n, c, carry)
                store(dA, n, c, dA_n)
                first, beyond = begin + min(n * share, steps), begin + min((n + 1) * share, steps)
                for rows in (du, ddelta, dz):
                    prefetch_rows(rows, first, beyond, c)
                if c + lanes < stop:
                    prefetch(saved, n, c + lanes)
                    for rows in (u, delta, z, dy):
                        prefetch_rows(rows, first, beyond, c + lanes)
            # ---- from the sums over all state indices: ddelta, du and dz, each written over a tile that is no longer
            # needed, and the sums over time, dD and ddelta_bias
            dD_sum, dbias_sum = load(dD, 0, c), load(ddelta_bias, 0, c)
            for t in range(steps):
                u_t, do, dv, gate = load(u_tile, t, 0), load(do_tile, t, 0), load(dv_tile, t, 0), load(gate_tile, t, 0)
                ddelta_t = (load(ddt_tile, t, 0) * LN_2 + dv * u_t) * load(slope_tile, t, 0)
                store(ddt_tile, t, 0, ddelta_t)
                store(u_tile, t, 0, dv * load(dt_tile, t, 0) + do * load(D, 0, c))
                store(z_tile, t, 0, load(dy_tile, t, 0) * load(o_tile, t, 0) * silu_slope(load(z_tile, t, 0), gate))
                dD_sum = dD_sum + do * u_t
                dbias_sum = dbias_sum + ddelta_t
            store(dD, 0, c, dD_sum)
            store(ddelta_bias, 0, c, dbias_sum)
            store_tile(u_tile, du, begin, steps, c)
            store_tile(ddt_tile, ddelta, begin, steps, c)
            store_tile(z_tile, dz, begin, steps, c)
        finish_sums(sums, begin, steps, dB, dC)


# The number of dimensions of each array argument; four int64 follow. All arrays are declared as strided, so that one
# compiled kernel serves contiguous and strided ones.
DIMENSIONS = {
    _conv_forward_kernel: (3, 2, 2, 3),
    _conv_backward_kernel: (3, 2, 2, 3, 3, 3, 3),
    _scan_forward_kernel: (3, 3, 2, 3, 3, 2, 3, 2, 4, 3, 3),
    _scan_backward_kernel: (3, 3, 3, 2, 3, 3, 2, 3, 2, 4, 3, 3, 3, 2, 2, 3, 3, 3),
}


COMPILING = threading.Lock()
ARRAY_TYPES = []  # of the arrays that a kernel may be called with; see _compile


@functools.cache
def _compile(kernel, dtype):
    """The kernel compiled for float32 or float64, or taken from Numba's cache on disk; called with COMPILING held.

    A contiguous array has another type than a strided one. Numba learns at the first call that it can be given to the
    kernel, and it may forget the type again meanwhile, so that two threads that make this call at the same time can end
    in "No matching definition for argument type(s)". So it is told here, and the types are kept.
    """
    real = {torch.float32: float32, torch.float64: float64}[dtype]
    strided, *contiguous = [[types.Array(real, ndim, layout) for ndim in DIMENSIONS[kernel]] for layout in "ACF"]
    sig = types.void(*strided, int64, int64, int64, int64)
    compiled = njit(sig, cache=True, nogil=True, error_model="numpy")(kernel)
    for actual in contiguous:
        ARRAY_TYPES.extend(actual)
        compiled.typingctx.install_possible_conversions(actual, strided)
    return compiled


# ---- threads -------------------------------------------------------------------------------------------------


@functools.cache
def _thread_pool(n_threads, process_id):
    """Plain threads, since the kernels release the GIL. The process id is an argument because threads don't survive a
    fork: a forked process gets a pool of its own."""
    return ThreadPoolExecutor(n_threads, thread_name_prefix="scan")


def _call_in_threads(kernel, tasks, dtype):
    """Call the kernel once for each tuple of arguments in `tasks`, on up to torch.get_num_threads() threads."""
    with COMPILING:
        compiled = _compile(kernel, dtype)
    waiting = deque(tasks)

    def work():
        while True:
            try:
                task = waiting.popleft()
            except IndexError:
                return
            compiled(*task)

    n_helpers = min(torch.get_num_threads(), len(tasks)) - 1
    helpers = [_thread_pool(n_helpers, os.getpid()).submit(work) for _ in range(n_helpers)]
    work()  # this thread works too: it is awake already, where the helpers have to be woken
    for helper in helpers:
        if not helper.cancel():  # a helper that hasn't begun has nothing left to do, and is not waited for
            helper.result()


def _slices(batch, channels, lanes):
    """(start, stop) ranges of channels in whole vectors, enough of them that every thread gets a task."""
    n_vectors = -(-channels // lanes)
    n_slices = min(n_vectors, -(-torch.get_num_threads() // batch))
    edges = [n_vectors * i // n_slices * lanes for i in range(n_slices + 1)]
    return list(itertools.pairwise(edges))


# ---- the four functions --------------------------------------------------------------------------------------


def _lanes(tensor):
    return VECTOR_BYTES // tensor.element_size()


def _real(dtype):
    """The dtype in which tensors of this dtype are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _widened(*tensors):
    """The tensors in the dtype in which the first of them is computed."""
    return [tensor.to(_real(tensors[0].dtype)) for tensor in tensors]


def _pad_channels(parameter, lanes):
    """(channels, k) or (channels,) to an array (k, channels rounded up to whole vectors), zeros behind the channels."""
    matrix = parameter.detach().reshape(parameter.shape[0], -1).T
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % lanes)).contiguous().numpy()


def _array(tensor):
    """The tensor as a NumPy view, or as a copy if its last dimension isn't contiguous (no caller here has such)."""
    tensor = tensor.detach()
    return (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).numpy()


def conv_silu_forward(x, weight, bias):
    """silu(causal depthwise convolution of x): x (batch, time, channels), weight (channels, taps), bias (channels,)."""
    if x.dtype != _real(x.dtype):
        return conv_silu_forward(*_widened(x, weight, bias)).to(x.dtype)
    xc = torch.empty(x.shape, dtype=x.dtype)
    lanes = _lanes(x)
    arrays = _array(x), _pad_channels(weight, lanes), _pad_channels(bias, lanes), xc.numpy()
    tasks = [(*arrays, index, start, stop, lanes)
             for index in range(x.shape[0]) for start, stop in _slices(x.shape[0], x.shape[2], lanes)]
    _call_in_threads(_conv_forward_kernel, tasks, x.dtype)
    return xc


def conv_silu_backward(x, weight, bias, dxc, dx):
    """Write the gradient of x into dx (batch, time, channels), and return those of weight and bias, from dxc, that of
    `conv_silu_forward`'s result."""
    if x.dtype != _real(x.dtype):
        wide = torch.empty(dx.shape, dtype=_real(x.dtype))
        gradients = conv_silu_backward(*_widened(x, weight, bias, dxc), wide)
        dx.copy_(wide)
        return gradients
    lanes = _lanes(x)
    weight_, bias_ = _pad_channels(weight, lanes), _pad_channels(bias, lanes)
    dweight = torch.zeros((x.shape[0], *weight_.shape), dtype=x.dtype)
    dbias = torch.zeros((x.shape[0], *bias_.shape), dtype=x.dtype)
    arrays = _array(x), weight_, bias_, _array(dxc), dx.numpy(), dweight.numpy(), dbias.numpy()
    tasks = [(*arrays, index, start, stop, lanes)
             for index in range(x.shape[0]) for start, stop in _slices(x.shape[0], x.shape[2], lanes)]
    _call_in_threads(_conv_backward_kernel, tasks, x.dtype)
    channels = x.shape[2]
    return dweight.sum(0)[:, :channels].T.contiguous(), dbias.sum((0, 1))[:channels].contiguous()


def chunk_states_shape(batch, time, d_inner, d_state):
    """Shape of the states that `scan_forward` keeps for `scan_backward`."""
    return batch, -(-time // CHUNK), d_state, d_inner


def chunk_states_dtype(dtype):
    """Dtype of those states for inputs of type `dtype`."""
    return _real(dtype)


def scan_forward(u, delta, A, B, C, D, z, delta_bias, h0=None):
    """The scan of selective_scan.py: returns y, the states that the backward pass needs, and the last state.

    u, delta, z (batch, time, d_inner); A (d_inner, d_state); B, C (batch, time, d_state); D, delta_bias (d_inner,).
    h0 (batch, d_inner, d_state) is the state before the first step, zero if it is None, as the model has it: only the
    tests give another. y has u's shape, the states `chunk_states_shape`, the last state h0's shape.
    """
    if u.dtype != _real(u.dtype):
        h0 = None if h0 is None else h0.to(_real(u.dtype))
        y, states, last = scan_forward(*_widened(u, delta, A, B, C, D, z, delta_bias), h0)
        return y.to(u.dtype), states, last
    batch, time, d_inner = u.shape
    lanes = _lanes(u)
    states = torch.empty(chunk_states_shape(batch, time, d_inner, A.shape[1]), dtype=u.dtype)
    states[:, 0] = 0 if h0 is None else h0.transpose(1, 2)
    last = torch.empty((batch, A.shape[1], d_inner), dtype=u.dtype)
    y = torch.empty(u.shape, dtype=u.dtype)
    A2, D_, bias_ = (_pad_channels(parameter, lanes) for parameter in (A * LOG2_E, D, delta_bias))
    arrays = (_array(u), _array(delta), A2, _array(B), _array(C), D_, _array(z), bias_,
              states.numpy(), last.numpy(), y.numpy())
    tasks = [(*arrays, index, start, stop, lanes)
             for index in range(batch) for start, stop in _slices(batch, d_inner, lanes)]
    _call_in_threads(_scan_forward_kernel, tasks, u.dtype)
    return y, states, last.transpose(1, 2)


def scan_backward(dy, u, delta, A, B, C, D, z, delta_bias, chunk_states, dz, dB, dC, y=None):
    """The gradients of `scan_forward`'s inputs from dy, that of its y, and the states that it returned. y isn't needed.

    Writes dz, dB and dC into the views given; returns (du, ddelta, dA, dD, ddelta_bias).
    """
    if u.dtype != _real(u.dtype):
        wide = [torch.empty(view.shape, dtype=_real(u.dtype)) for view in (dz, dB, dC)]
        du, ddelta, *of_parameters = scan_backward(
            *_widened(dy, u, delta, A, B, C, D, z, delta_bias), chunk_states, *wide)
        for view, value in zip((dz, dB, dC), wide, strict=True):
            view.copy_(value)
        return du.to(u.dtype), ddelta.to(u.dtype), *of_parameters
    batch, _, d_inner = u.shape
    lanes = _lanes(u)
    ranges = _slices(batch, d_inner, lanes)
    du, ddelta = torch.empty(u.shape, dtype=u.dtype), torch.empty(u.shape, dtype=u.dtype)
    A2, D_, bias_ = (_pad_channels(parameter, lanes) for parameter in (A * LOG2_E, D, delta_bias))
    dA, dD, dbias = (torch.zeros((batch, *parameter.shape), dtype=u.dtype) for parameter in (A2, D_, bias_))
    # B and C are shared by all channels. Each task sums over its own channels, and the sums of the tasks are added in a
    # fixed order, so that the result doesn't depend on which thread is faster.
    several = len(ranges) > 1
    dB_parts, dC_parts = (torch.empty((len(ranges), *whole.shape), dtype=u.dtype) if several else whole[None]
                          for whole in (dB, dC))
    arrays = (_array(dy), _array(u), _array(delta), A2, _array(B), _array(C), D_, _array(z), bias_,
              chunk_states.numpy(), du.numpy(), ddelta.numpy(), dz.numpy())
    tasks = [(*arrays, dB_parts[i, index].numpy(), dC_parts[i, index].numpy(), dA.numpy(), dD.numpy(),
              dbias.numpy(), index, start, stop, lanes)
             for index in range(batch) for i, (start, stop) in enumerate(ranges)]
    _call_in_threads(_scan_backward_kernel, tasks, u.dtype)
    if several:
        torch.sum(dB_parts, 0, out=dB)
        torch.sum(dC_parts, 0, out=dC)
    return (du, ddelta, dA.sum(0)[:, :d_inner].T.contiguous(), dD.sum((0, 1))[:d_inner].contiguous(),
            dbias.sum((0, 1))[:d_inner].contiguous())
