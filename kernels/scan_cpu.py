"""Selective scan and causal convolution for the CPU: Numba kernels with hand-placed SIMD.

Every function works on (batch, time, channels) tensors in float32 or float64; batch and time may be strided.
The recurrence is computed in the layout that the data has: one SIMD vector holds neighbouring channels (two
cache lines, 32 floats or 16 doubles), the state of one state index n stays in registers while time runs over a
chunk, and what that takes lies in L1. Only the states at chunk boundaries are kept for the backward
pass, which recomputes the others chunk by chunk, so memory grows with batch x time x channels only
(Gu & Dao 2023, arXiv 2312.00752, section 3.3.2, moved from GPU SRAM to CPU cache).

Why a vector type and not loops for LLVM to vectorise: the arrays may alias as far as LLVM knows, and the
run-time checks it would add around a 32-wide inner loop cost more than the loop. With <32 x float> values LLVM
has nothing to prove, and it splits them itself into what the machine has (AVX2, AVX-512, SSE, NEON).
"""

import functools
import itertools
import operator
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from llvmlite import ir
from numba import float32, float64, int64, njit, types
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

CHUNK = 48  # time steps between saved states; the loops over them touch 8 tiles of CHUNK vectors, an L1 cache
CACHE_LINE = 64  # bytes
VECTOR_BYTES = 2 * CACHE_LINE  # two registers of AVX-512: two chains of dependent operations run side by side
LOG2_E = float(np.log2(np.e))
LN_2 = float(np.log(2.0))


# ---- a SIMD vector type for Numba ----------------------------------------------------------------------------


class Vector(types.Type):
    """A SIMD vector of float32 or float64, VECTOR_BYTES long."""

    def __init__(self, dtype):
        self.dtype = dtype
        self.lanes = VECTOR_BYTES * 8 // dtype.bitwidth
        super().__init__(name=f"Vector({dtype}, {self.lanes})")


VECTORS = {float32: Vector(float32), float64: Vector(float64)}


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        element = ir.FloatType() if fe_type.dtype == float32 else ir.DoubleType()
        super().__init__(dmm, fe_type, ir.VectorType(element, fe_type.lanes))


# "contract" lets LLVM fuse a*b + c; nothing else is relaxed, so NaN and inf behave as IEEE says.
FLAGS = ("contract",)


def _splat(builder, scalar, lanes):
    vector_type = ir.VectorType(scalar.type, lanes)
    first = builder.insert_element(ir.Constant(vector_type, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(first, first, zeros)


def _constant(vector_type, value):
    return ir.Constant(vector_type, [value] * vector_type.count)


def _define_operator(op, method):
    """Makes `op` work on two vectors, and on a vector and a scalar (which is broadcast)."""
    cases = []
    for scalar, vector in VECTORS.items():
        cases += [signature(vector, *args) for args in ((vector, vector), (vector, scalar), (scalar, vector))]
    infer_global(op)(type("VectorOperator", (ConcreteTemplate,), {"key": op, "cases": cases}))

    def lower(context, builder, sig, args):
        lanes = sig.return_type.lanes
        wide = [arg if isinstance(t, Vector) else _splat(builder, arg, lanes)
                for t, arg in zip(sig.args, args, strict=True)]
        return getattr(builder, method)(*wide, flags=FLAGS)

    for types_ in ((Vector, Vector), (Vector, types.Float), (types.Float, Vector)):
        lower_builtin(op, *types_)(lower)


_define_operator(operator.add, "fadd")
_define_operator(operator.sub, "fsub")
_define_operator(operator.mul, "fmul")
_define_operator(operator.truediv, "fdiv")


def _item_pointer(context, builder, array_type, array, indices):
    array = context.make_array(array_type)(context, builder, array)
    return cgutils.get_item_pointer(context, builder, array_type, array, indices, wraparound=False)


def _vector_pointer(context, builder, array_type, array, indices):
    pointer = _item_pointer(context, builder, array_type, array, indices)
    vector_type = context.get_value_type(VECTORS[array_type.dtype])
    return builder.bitcast(pointer, vector_type.as_pointer()), array_type.dtype.bitwidth // 8


@intrinsic
def load(typingctx, array, row, column):
    """The vector that starts at array[row, column]; the array's last dimension is contiguous."""

    def codegen(context, builder, sig, args):
        pointer, align = _vector_pointer(context, builder, sig.args[0], args[0], args[1:])
        return builder.load(pointer, align=align)

    return VECTORS[array.dtype](array, int64, int64), codegen


@intrinsic
def store(typingctx, array, row, column, vector):
    """Writes the vector to array[row, column : column + lanes]."""

    def codegen(context, builder, sig, args):
        pointer, align = _vector_pointer(context, builder, sig.args[0], args[0], args[1:3])
        builder.store(args[3], pointer, align=align)
        return context.get_dummy_value()

    return types.void(array, int64, int64, vector), codegen


@intrinsic
def get(typingctx, array, row, column):
    """array[row, column] for indices that are not negative: Numba's own indexing spends instructions on the sign."""

    def codegen(context, builder, sig, args):
        return builder.load(_item_pointer(context, builder, sig.args[0], args[0], args[1:]))

    return array.dtype(array, int64, int64), codegen


@intrinsic
def prefetch(typingctx, array, row, column):
    """Asks for the cache lines of the vector that starts at array[row, column]; the place may lie outside."""

    def codegen(context, builder, sig, args):
        byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        ask = builder.module.declare_intrinsic("llvm.prefetch", [byte],
                                               ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32]))
        first = builder.bitcast(_item_pointer(context, builder, sig.args[0], args[0], args[1:]), byte)
        to_read, into_l2, data = ir.Constant(i32, 0), ir.Constant(i32, 2), ir.Constant(i32, 1)
        for offset in range(0, VECTOR_BYTES, CACHE_LINE):
            builder.call(ask, [builder.gep(first, [ir.Constant(i32, offset)]), to_read, into_l2, data])
        return context.get_dummy_value()

    return types.void(array, int64, int64), codegen


@intrinsic
def zeros_like(typingctx, vector):
    return vector(vector), lambda context, builder, sig, args: _constant(args[0].type, 0.0)


def _halve(builder, width, x, y=None):
    """x, or x and y side by side, hold parts of `width` lanes: each one's low half plus its high half, in a row."""
    lanes = x.type.count * (1 if y is None else 2)
    low = [first + lane for first in range(0, lanes, width) for lane in range(width // 2)]
    index = ir.VectorType(ir.IntType(32), len(low))
    low, high = (builder.shuffle_vector(x, x if y is None else y, ir.Constant(index, [i + shift for i in low]))
                 for shift in (0, width // 2))
    return builder.fadd(low, high, flags=FLAGS)


@intrinsic
def sum_lanes(typingctx, vector):
    """The sum over the lanes, by halving: the order is fixed."""

    def codegen(context, builder, sig, args):
        (value,) = args
        while value.type.count > 1:
            value = _halve(builder, value.type.count, value)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return vector.dtype(vector), codegen


@intrinsic
def add_sums(typingctx, array, row, a, b):
    """array[row] += a's lanes summed to an eighth of their number, and behind them b's.

    To go on to one number each would take as many instructions again, for ever less: `finish_sums` does it at the end.
    """

    def codegen(context, builder, sig, args):
        lanes = sig.args[2].lanes
        a, b = (_halve(builder, lanes, x) for x in args[2:])
        sums = _halve(builder, lanes // 4, _halve(builder, lanes // 2, a, b))
        zero = context.get_constant(types.int64, 0)
        pointer = _item_pointer(context, builder, sig.args[0], args[0], (args[1], zero))
        pointer = builder.bitcast(pointer, sums.type.as_pointer())
        align = sig.args[0].dtype.bitwidth // 8
        builder.store(builder.fadd(builder.load(pointer, align=align), sums), pointer, align=align)
        return context.get_dummy_value()

    return types.void(array, int64, a, b), codegen


@intrinsic
def maximum(typingctx, a, b):
    """max(a, b) lane by lane; NaN in `a` stays NaN."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[1], args[0])

    return a(a, a), codegen


@intrinsic
def where_negative(typingctx, x, a, b):
    """a where x < 0, else b, lane by lane."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<", args[0], _constant(args[0].type, 0.0)), args[1], args[2])

    return a(x, a, b), codegen


# ---- elementary functions ------------------------------------------------------------------------------------


def _horner(builder, x, coefficients):
    result = _constant(x.type, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = builder.fadd(builder.fmul(result, x, flags=FLAGS), _constant(x.type, coefficient), flags=FLAGS)
    return result


def _exp2_coefficients(degree):
    """Power-series coefficients of the Chebyshev interpolant of 2^r on [-1/2, 1/2]."""
    chebyshev = np.polynomial.Chebyshev.interpolate(np.exp2, degree, domain=[-0.5, 0.5])
    return [float(c) for c in chebyshev.convert(kind=np.polynomial.Polynomial).coef]


# mantissa bits, exponent bias, degree of the polynomial for 2^r, number of terms of the atanh series
FORMATS = {float32: (23, 127, 5, 7), float64: (52, 1023, 11, 17)}


@intrinsic
def exp2_of_product(typingctx, x, y):
    """2^(x y) lane by lane for a finite x y below the largest exponent (128, 1024); 0 below the normal range.

    2^(x y) = 2^n 2^r with n = round(x y): the sum x y + 1.5 * 2^mantissa + bias has n + bias in its low bits, and
    these, moved into the exponent field, are 2^n; 2^r with |r| <= 1/2 is a polynomial. x y is fused into both sums,
    where the machine can do that: its rounding does not reach the result. The exponents here, those of decays, are
    never above 0: nothing is spent on an overflow.
    """

    def codegen(context, builder, sig, args):
        vector_type, dtype = context.get_value_type(sig.return_type), sig.return_type.dtype
        x, y = (arg if isinstance(t, Vector) else _splat(builder, arg, sig.return_type.lanes)
                for t, arg in zip(sig.args, args, strict=True))
        mantissa, bias, degree, _ = FORMATS[dtype]
        integers = ir.VectorType(ir.IntType(dtype.bitwidth), sig.return_type.lanes)
        fused = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector_type, [vector_type] * 3),
                                               f"llvm.fmuladd.v{vector_type.count}f{dtype.bitwidth}")
        shift = _constant(vector_type, 1.5 * 2.0**mantissa + bias)
        shifted = builder.call(fused, [x, y, shift])
        r = builder.call(fused, [x, y, builder.fsub(shift, shifted)])
        lowest = _constant(vector_type, 1.5 * 2.0**mantissa)  # n = -bias, whose bits are those of 0
        clamped = builder.select(builder.fcmp_ordered("<", shifted, lowest), lowest, shifted)
        bits = builder.shl(builder.bitcast(clamped, integers), _constant(integers, mantissa))
        return builder.fmul(_horner(builder, r, _exp2_coefficients(degree)), builder.bitcast(bits, vector_type))

    return (x if isinstance(x, Vector) else y)(x, y), codegen


@intrinsic
def log1p(typingctx, x):
    """log(1 + x) lane by lane for 0 <= x <= 1, as 2 atanh(s) = 2 (s + s^3/3 + s^5/5 + ...), s = x / (2 + x)."""

    def codegen(context, builder, sig, args):
        (x,) = args
        terms = FORMATS[sig.args[0].dtype][3]
        s = builder.fdiv(x, builder.fadd(x, _constant(x.type, 2.0)))
        series = _horner(builder, builder.fmul(s, s), [2.0 / (2 * k + 1) for k in range(terms)])
        return builder.fmul(s, series)

    return x(x), codegen


@njit(forceinline=True)
def sigmoid_softplus(x):
    """(sigmoid(x), softplus(x)), both from exp(-|x|)."""
    zero = zeros_like(x)
    one = zero + 1.0
    # from 1000 on, 0 in float32 and float64: so infinite x is served too
    e = exp2_of_product(maximum(zero - maximum(x, zero - x), zero - 1e3), zero + LOG2_E)
    inverse = one / (one + e)
    return where_negative(x, e * inverse, inverse), maximum(x, zero) + log1p(e)


@njit(forceinline=True)
def sigmoid(x):
    return sigmoid_softplus(x)[0]


@njit(forceinline=True)
def softplus(x):
    return sigmoid_softplus(x)[1]


@njit(forceinline=True)
def silu_slope(x, gate):
    """d silu(x) / dx, with gate = sigmoid(x)."""
    return gate + x * gate * ((zeros_like(x) + 1.0) - gate)


# ---- tiles ---------------------------------------------------------------------------------------------------
# A tile (steps, lanes) holds one vector of channels over a chunk of time. Channels past the end of the data are
# zero in it and are not stored back, so that the arithmetic never has to care where a row ends.


@njit
def empty_tiles(count, steps, lanes, like):
    """`count` tiles of like's type, each vector on cache lines of its own: one that is spread over three is slow."""
    line = CACHE_LINE // like.itemsize
    space = np.empty(count * steps * lanes + line, like.dtype)
    begin = -(space.ctypes.data // like.itemsize) % line
    return space[begin : begin + count * steps * lanes].reshape(count, steps, lanes)


@njit
def load_tile(tile, rows, begin, steps, column):
    """tile[:steps] = rows[begin : begin + steps, column : column + lanes]."""
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
    """The reverse of load_tile."""
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
    """dB, dC[begin + t, n] = the sums that `add_sums` has left in sums[n * CHUNK + t]."""
    parts = sums.shape[1] // 2
    for t in range(steps):
        for n in range(dB.shape[1]):
            left, right = get(sums, n * CHUNK + t, 0), get(sums, n * CHUNK + t, parts)
            for part in range(1, parts):
                left += get(sums, n * CHUNK + t, part)
                right += get(sums, n * CHUNK + t, parts + part)
            dB[begin + t, n], dC[begin + t, n] = left, right


@njit(forceinline=True)
def prefetch_rows(rows, begin, end, column):
    """Asks for rows[begin : end, column : column + lanes].

    A tile's lines lie a whole row apart, where no processor looks ahead by itself. All at once they would wait for each
    other: so a few at a time, while something else is computed.
    """
    for t in range(begin, end):
        prefetch(rows, t, column)


@njit
def fill_zero(tile, begin, end):
    """tile[begin:end] = 0. A loop, since Numba takes seconds to compile a slice assignment."""
    for row in range(begin, end):
        for column in range(tile.shape[1]):
            tile[row, column] = 0.0


# ---- kernels: one batch row and a range of channels each -----------------------------------------------------
# Parameters by channel come transposed and padded to whole vectors (`_pad_channels`).


@njit
def convolve(tile, weight, bias, column, steps, out):
    """out[t] = bias + sum_k weight[k] tile[t + k], before the SiLU; the tile begins taps - 1 steps earlier."""
    taps = weight.shape[0]
    for t in range(steps):
        pre = load(bias, 0, column)
        for k in range(taps):
            pre = pre + load(weight, k, column) * load(tile, t + k, 0)
        store(out, t, 0, pre)


@njit
def load_history(tile, rows, begin, steps, taps, column):
    """load_tile of `steps` steps and of the taps - 1 before them, zeros before the start."""
    missing = max(0, taps - 1 - begin)
    fill_zero(tile, 0, missing)
    load_tile(tile[missing:], rows, begin - (taps - 1) + missing, steps + taps - 1 - missing, column)


def _conv_forward_kernel(x, weight, bias, xc, index, start, stop, lanes):
    x, xc = x[index], xc[index]
    taps, time = weight.shape[0], x.shape[0]
    x_s = empty_tiles(1, CHUNK + taps - 1, lanes, x)[0]
    pre_s = empty_tiles(1, CHUNK, lanes, x)[0]
    for begin in range(0, time, CHUNK):
        steps = min(CHUNK, time - begin)
        for c in range(start, stop, lanes):
            load_history(x_s, x, begin, steps, taps, c)
            convolve(x_s, weight, bias, c, steps, pre_s)
            for t in range(steps):
                prefetch(xc, begin + t, c)
                prefetch(x, begin + t, c + lanes)
                pre = load(pre_s, t, 0)
                store(pre_s, t, 0, pre * sigmoid(pre))
            store_tile(pre_s, xc, begin, steps, c)


def _conv_backward_kernel(x, weight, bias, dxc, dx, dweight, dbias, index, start, stop, lanes):
    """dweight (taps, channels) and dbias (1, channels) are this row's own, zero on entry."""
    x, dxc, dx, dweight, dbias = x[index], dxc[index], dx[index], dweight[index], dbias[index]
    taps, time = weight.shape[0], x.shape[0]
    # dx of a chunk needs dpre of the taps - 1 steps behind it too: computed twice, they are few
    x_s = empty_tiles(1, CHUNK + 2 * (taps - 1), lanes, x)[0]
    pre_s = empty_tiles(1, CHUNK + taps - 1, lanes, x)[0]
    dpre_s = empty_tiles(1, CHUNK + taps - 1, lanes, x)[0]
    for begin in range(0, time, CHUNK):
        steps = min(CHUNK, time - begin)
        beyond = min(taps - 1, time - begin - steps)
        for c in range(start, stop, lanes):
            load_history(x_s, x, begin, steps + beyond, taps, c)
            convolve(x_s, weight, bias, c, steps + beyond, pre_s)
            load_tile(dpre_s, dxc, begin, steps + beyond, c)
            for t in range(steps + beyond):
                prefetch(dx, begin + t, c)
                prefetch(x, begin + t, c + lanes)
                prefetch(dxc, begin + t, c + lanes)
                pre = load(pre_s, t, 0)
                store(dpre_s, t, 0, load(dpre_s, t, 0) * silu_slope(pre, sigmoid(pre)))
            fill_zero(dpre_s, steps + beyond, dpre_s.shape[0])
            total = load(dbias, 0, c)
            for t in range(steps):
                total = total + load(dpre_s, t, 0)
            store(dbias, 0, c, total)
            for k in range(taps):
                total = load(dweight, k, c)
                for t in range(steps):
                    total = total + load(dpre_s, t, 0) * load(x_s, t + k, 0)
                store(dweight, k, c, total)
            for t in range(steps):
                grad = load(dpre_s, t + taps - 1, 0) * load(weight, 0, c)
                for k in range(1, taps):
                    grad = grad + load(dpre_s, t + taps - 1 - k, 0) * load(weight, k, c)
                store(pre_s, t, 0, grad)
            store_tile(pre_s, dx, begin, steps, c)


def _scan_forward_kernel(u, delta, A, B, C, D, z, bias, states, last, y, index, start, stop, lanes):
    """A (d_state, channels) holds A log2(e); states (chunks, d_state, channels): [0] is given, the rest written."""
    u, delta, z, B, C = u[index], delta[index], z[index], B[index], C[index]
    states, last, y = states[index], last[index], y[index]
    time, d_state = u.shape[0], A.shape[0]
    u_s, dt_s, dtu_s, z_s, y_s = empty_tiles(5, CHUNK, lanes, u)
    B_s, C_s = np.empty((2, d_state, CHUNK), u.dtype)
    h_s = empty_tiles(1, d_state, lanes, u)[0]
    for begin in range(0, time, CHUNK):
        steps = min(CHUNK, time - begin)
        chunk = begin // CHUNK
        next_state = states[chunk + 1] if begin + CHUNK < time else last
        share = -(-steps // d_state)  # of the rows to be prefetched, while one state index is worked on
        transpose_rows(B, begin, steps, B_s)
        transpose_rows(C, begin, steps, C_s)
        for c in range(start, stop, lanes):
            load_tile(u_s, u, begin, steps, c)
            load_tile(dt_s, delta, begin, steps, c)
            load_tile(z_s, z, begin, steps, c)
            load_tile(h_s, states[chunk], 0, d_state, c)
            for t in range(steps):
                dt = softplus(load(dt_s, t, 0) + load(bias, 0, c))
                u_t = load(u_s, t, 0)
                store(dt_s, t, 0, dt)
                store(dtu_s, t, 0, dt * u_t)
                store(y_s, t, 0, u_t * load(D, 0, c))
            for n in range(d_state):
                a_log2 = load(A, n, c)
                h = load(h_s, n, 0)
                for t in range(steps):
                    h = exp2_of_product(load(dt_s, t, 0), a_log2) * h + load(dtu_s, t, 0) * get(B_s, n, t)
                    store(y_s, t, 0, load(y_s, t, 0) + h * get(C_s, n, t))
                store(h_s, n, 0, h)
                first, beyond = begin + min(n * share, steps), begin + min((n + 1) * share, steps)
                prefetch(next_state, n, c)
                prefetch_rows(y, first, beyond, c)
                if c + lanes < stop:
                    for rows in (u, delta, z):
                        prefetch_rows(rows, first, beyond, c + lanes)
            for t in range(steps):
                gate = load(z_s, t, 0)
                store(y_s, t, 0, load(y_s, t, 0) * (gate * sigmoid(gate)))
            store_tile(h_s, next_state, 0, d_state, c)
            store_tile(y_s, y, begin, steps, c)


def _scan_backward_kernel(dy, u, delta, A, B, C, D, z, bias, states, du, ddelta, dz, dB, dC, dA, dD, dbias,
                          index, start, stop, lanes):
    """dB, dC (time, d_state): written. dA (d_state, channels), dD, dbias (1, channels): zero on entry, added to."""
    u, delta, z, dy, B, C, states = u[index], delta[index], z[index], dy[index], B[index], C[index], states[index]
    du, ddelta, dz = du[index], ddelta[index], dz[index]
    dA, dD, dbias = dA[index], dD[index], dbias[index]
    time, d_state = u.shape[0], A.shape[0]
    # dg: gradient of y before the gate; dv: gradient of v = dt u, the input of the state
    u_s, dt_s, slope_s, v_s, z_s, gate_s, y_s, dy_s, dg_s, ddt_s, dv_s, a_s = empty_tiles(12, CHUNK, lanes, u)
    h_s = empty_tiles(1, CHUNK + 1, lanes, u)[0]  # [t]: the state before step t
    B_s, C_s = np.empty((2, d_state, CHUNK), u.dtype)
    sums_s = empty_tiles(1, d_state * CHUNK, lanes // 4, u)[0]  # of dB and dC, see add_sums
    first_s = empty_tiles(1, d_state, lanes, u)[0]
    carry = np.zeros((d_state, dA.shape[1]), u.dtype)  # a_{t+1} dh_{t+1}, handed from chunk to chunk
    for chunk in range((time - 1) // CHUNK, -1, -1):
        begin = chunk * CHUNK
        steps, saved = min(CHUNK, time - begin), states[chunk]
        share = -(-steps // d_state)  # of the rows to be prefetched, while one state index is worked on
        transpose_rows(B, begin, steps, B_s)
        transpose_rows(C, begin, steps, C_s)
        fill_zero(sums_s, 0, d_state * CHUNK)
        for c in range(start, stop, lanes):
            load_tile(u_s, u, begin, steps, c)
            load_tile(dt_s, delta, begin, steps, c)
            load_tile(z_s, z, begin, steps, c)
            load_tile(dy_s, dy, begin, steps, c)
            load_tile(first_s, saved, 0, d_state, c)
            for t in range(steps):
                raw, u_t, gate = load(dt_s, t, 0) + load(bias, 0, c), load(u_s, t, 0), sigmoid(load(z_s, t, 0))
                slope, dt = sigmoid_softplus(raw)
                store(dt_s, t, 0, dt)
                store(slope_s, t, 0, slope)
                store(v_s, t, 0, dt * u_t)
                store(gate_s, t, 0, gate)
                store(y_s, t, 0, u_t * load(D, 0, c))
                store(dg_s, t, 0, load(dy_s, t, 0) * (load(z_s, t, 0) * gate))
                store(ddt_s, t, 0, zeros_like(dt))
                store(dv_s, t, 0, zeros_like(dt))
            for n in range(d_state):
                a_log2 = load(A, n, c)
                h = load(first_s, n, 0)
                store(h_s, 0, 0, h)
                for t in range(steps):
                    a = exp2_of_product(load(dt_s, t, 0), a_log2)
                    h = a * h + load(v_s, t, 0) * get(B_s, n, t)
                    store(a_s, t, 0, a)
                    store(h_s, t + 1, 0, h)
                    store(y_s, t, 0, load(y_s, t, 0) + h * get(C_s, n, t))
                carried = load(carry, n, c)
                da = load(dA, n, c)
                for t in range(steps - 1, -1, -1):
                    dg = load(dg_s, t, 0)
                    dh = carried + dg * get(C_s, n, t)
                    add_sums(sums_s, n * CHUNK + t, dh * load(v_s, t, 0), dg * h)
                    store(dv_s, t, 0, load(dv_s, t, 0) + dh * get(B_s, n, t))
                    carried = dh * load(a_s, t, 0)
                    h = load(h_s, t, 0)
                    dexponent = carried * h
                    da = da + dexponent * load(dt_s, t, 0)
                    store(ddt_s, t, 0, load(ddt_s, t, 0) + dexponent * a_log2)
                store(carry, n, c, carried)
                store(dA, n, c, da)
                first, beyond = begin + min(n * share, steps), begin + min((n + 1) * share, steps)
                for rows in (du, ddelta, dz):
                    prefetch_rows(rows, first, beyond, c)
                if c + lanes < stop:
                    prefetch(saved, n, c + lanes)
                    for rows in (u, delta, z, dy):
                        prefetch_rows(rows, first, beyond, c + lanes)
            sum_dD, sum_dbias = load(dD, 0, c), load(dbias, 0, c)
            for t in range(steps):
                u_t, dg, dv, gate = load(u_s, t, 0), load(dg_s, t, 0), load(dv_s, t, 0), load(gate_s, t, 0)
                ddt = (load(ddt_s, t, 0) * LN_2 + dv * u_t) * load(slope_s, t, 0)
                store(ddt_s, t, 0, ddt)
                store(u_s, t, 0, dv * load(dt_s, t, 0) + dg * load(D, 0, c))
                store(z_s, t, 0, load(dy_s, t, 0) * load(y_s, t, 0) * silu_slope(load(z_s, t, 0), gate))
                sum_dD = sum_dD + dg * u_t
                sum_dbias = sum_dbias + ddt
            store(dD, 0, c, sum_dD)
            store(dbias, 0, c, sum_dbias)
            store_tile(u_s, du, begin, steps, c)
            store_tile(ddt_s, ddelta, begin, steps, c)
            store_tile(z_s, dz, begin, steps, c)
        finish_sums(sums_s, begin, steps, dB, dC)


# Argument types as dimensions; int64 arguments follow. Fixed, so that contiguous and strided arrays share the code.
DIMENSIONS = {
    _conv_forward_kernel: (3, 2, 2, 3),
    _conv_backward_kernel: (3, 2, 2, 3, 3, 3, 3),
    _scan_forward_kernel: (3, 3, 2, 3, 3, 2, 3, 2, 4, 3, 3),
    _scan_backward_kernel: (3, 3, 3, 2, 3, 3, 2, 3, 2, 4, 3, 3, 3, 2, 2, 3, 3, 3),
}


@functools.cache
def _compile(kernel, dtype):
    """The kernel's machine code for float32 or float64, from Numba's disk cache where there is one."""
    real = {torch.float32: float32, torch.float64: float64}[dtype]
    arrays = [types.Array(real, ndim, "A") for ndim in DIMENSIONS[kernel]]
    sig = types.void(*arrays, int64, int64, int64, int64)
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(sig, cache=True, **options)(kernel)
    except RuntimeError:  # neither this folder nor the user's cache folder can be written
        return njit(sig, **options)(kernel)


# ---- threads -------------------------------------------------------------------------------------------------


@functools.cache
def _thread_pool(n_threads, process_id):
    """Plain threads, since the kernels release the GIL. By process id: threads do not survive a fork."""
    return ThreadPoolExecutor(n_threads, thread_name_prefix="scan")


def _run(kernel, tasks, dtype):
    """Calls the kernel once for each tuple of arguments in `tasks`, over torch.get_num_threads() threads."""
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
    work()  # this thread too: it is awake, and on a core of its own
    for helper in helpers:
        if not helper.cancel():  # one that has not begun has nothing left to do
            helper.result()


def _slices(batch, channels, lanes):
    """(start, stop) channel ranges, whole vectors, enough of them to give every thread a task."""
    n_vectors = -(-channels // lanes)
    n_slices = min(n_vectors, -(-torch.get_num_threads() // batch))
    edges = [n_vectors * i // n_slices * lanes for i in range(n_slices + 1)]
    return list(itertools.pairwise(edges))


# ---- the four functions --------------------------------------------------------------------------------------


def _lanes(tensor):
    return VECTOR_BYTES // tensor.element_size()


def _pad_channels(parameter, lanes):
    """(channels, k) or (channels,) -> (k, channels rounded up to whole vectors), zeros behind."""
    matrix = parameter.detach().reshape(parameter.shape[0], -1).T
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % lanes)).contiguous().numpy()


def _array(tensor):
    """A NumPy view; a copy only if the last dimension is not contiguous, which no caller here does."""
    tensor = tensor.detach()
    return (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).numpy()


def conv_silu_forward(x, weight, bias):
    """silu(causal depthwise convolution): x (batch, time, channels), weight (channels, taps), bias (channels,)."""
    xc = torch.empty(x.shape, dtype=x.dtype)
    lanes = _lanes(x)
    arrays = _array(x), _pad_channels(weight, lanes), _pad_channels(bias, lanes), xc.numpy()
    tasks = [(*arrays, index, start, stop, lanes)
             for index in range(x.shape[0]) for start, stop in _slices(x.shape[0], x.shape[2], lanes)]
    _run(_conv_forward_kernel, tasks, x.dtype)
    return xc


def conv_silu_backward(x, weight, bias, dxc, dx):
    """Writes the gradient of x into dx (batch, time, channels); returns those of weight and bias."""
    lanes = _lanes(x)
    weight_, bias_ = _pad_channels(weight, lanes), _pad_channels(bias, lanes)
    dweight = torch.zeros((x.shape[0], *weight_.shape), dtype=x.dtype)
    dbias = torch.zeros((x.shape[0], *bias_.shape), dtype=x.dtype)
    arrays = _array(x), weight_, bias_, _array(dxc), dx.numpy(), dweight.numpy(), dbias.numpy()
    tasks = [(*arrays, index, start, stop, lanes)
             for index in range(x.shape[0]) for start, stop in _slices(x.shape[0], x.shape[2], lanes)]
    _run(_conv_backward_kernel, tasks, x.dtype)
    channels = x.shape[2]
    return dweight.sum(0)[:, :channels].T.contiguous(), dbias.sum((0, 1))[:channels].contiguous()


def chunk_states_shape(batch, time, d_inner, d_state):
    """Shape of the states that `scan_forward` keeps for `scan_backward`."""
    return batch, -(-time // CHUNK), d_state, d_inner


def chunk_states_dtype(dtype):
    """Type of those states for inputs of type `dtype`."""
    return dtype


def scan_forward(u, delta, A, B, C, D, z, delta_bias, h0=None):
    """Selective scan: with dt = softplus(delta + delta_bias),

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,    y_t = (C_t . h_t + D u_t) silu(z_t).

    u, delta, z (batch, time, d_inner); A (d_inner, d_state); B, C (batch, time, d_state); D, delta_bias (d_inner,);
    h0 (batch, d_inner, d_state), zero by default. Returns y like u, the states at chunk starts
    (`chunk_states_shape`), and the last state (batch, d_inner, d_state).
    """
    batch, time, d_inner = u.shape
    lanes = _lanes(u)
    states = torch.empty(chunk_states_shape(batch, time, d_inner, A.shape[1]), dtype=u.dtype)
    states[:, 0] = 0 if h0 is None else h0.transpose(1, 2)
    last = torch.empty((batch, A.shape[1], d_inner), dtype=u.dtype)
    y = torch.empty(u.shape, dtype=u.dtype)
    arrays = (_array(u), _array(delta), _pad_channels(A * LOG2_E, lanes), _array(B), _array(C),
              _pad_channels(D, lanes), _array(z), _pad_channels(delta_bias, lanes),
              states.numpy(), last.numpy(), y.numpy())
    tasks = [(*arrays, index, start, stop, lanes)
             for index in range(batch) for start, stop in _slices(batch, d_inner, lanes)]
    _run(_scan_forward_kernel, tasks, u.dtype)
    return y, states, last.transpose(1, 2)


def scan_backward(dy, u, delta, A, B, C, D, z, delta_bias, chunk_states, dz, dB, dC, h0=None):
    """Gradients of `scan_forward`'s y. Writes dz, dB, dC into the given views; returns (du, ddelta, dA, dD, dbias).

    ddelta is the gradient of the raw delta, before bias and softplus. h0 is already in chunk_states; it gets no
    gradient.
    """
    batch, _, d_inner = u.shape
    lanes = _lanes(u)
    ranges = _slices(batch, d_inner, lanes)
    du, ddelta = torch.empty(u.shape, dtype=u.dtype), torch.empty(u.shape, dtype=u.dtype)
    A_, D_, bias_ = (_pad_channels(p, lanes) for p in (A * LOG2_E, D, delta_bias))
    dA, dD, dbias = (torch.zeros((batch, *p.shape), dtype=u.dtype) for p in (A_, D_, bias_))
    # B and C are shared by the channels: each task sums over its own, then the tasks are added in a fixed order
    shared = len(ranges) > 1
    dB_parts, dC_parts = (torch.empty((len(ranges), *whole.shape), dtype=u.dtype) if shared else whole[None]
                          for whole in (dB, dC))
    arrays = (_array(dy), _array(u), _array(delta), A_, _array(B), _array(C), D_, _array(z), bias_,
              chunk_states.numpy(), du.numpy(), ddelta.numpy(), dz.numpy())
    tasks = [(*arrays, dB_parts[i, index].numpy(), dC_parts[i, index].numpy(), dA.numpy(), dD.numpy(),
              dbias.numpy(), index, start, stop, lanes)
             for index in range(batch) for i, (start, stop) in enumerate(ranges)]
    _run(_scan_backward_kernel, tasks, u.dtype)
    if shared:
        torch.sum(dB_parts, 0, out=dB)
        torch.sum(dC_parts, 0, out=dC)
    return (du, ddelta, dA.sum(0)[:, :d_inner].T.contiguous(), dD.sum((0, 1))[:d_inner].contiguous(),
            dbias.sum((0, 1))[:d_inner].contiguous())
