"""A SIMD vector type for Numba, with the elementary functions that the CPU kernels need.

A value of type `Vector` is VECTOR_BYTES long: 32 floats or 16 doubles, the numbers of as many neighbouring channels.
Arithmetic on it works lane by lane, and a scalar operand is broadcast to all lanes.

Why a vector type, rather than loops that LLVM vectorises by itself: LLVM has to assume that the arrays overlap, and
the checks at run time with which it would guard a loop of 32 passes cost more than the loop. On values of type
<32 x float> there is nothing to prove. LLVM splits them into what the machine has (AVX2, AVX-512, SSE, NEON).
"""

import operator
import zlib
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import float32, float64, int64, types
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from kernels.numba_cache import njit

CACHE_LINE = 64  # bytes
VECTOR_BYTES = 2 * CACHE_LINE  # two registers of AVX-512: two chains of dependent operations run side by side
LOG2_E = float(np.log2(np.e))
SIMD_SOURCE = zlib.crc32(Path(__file__).read_bytes())


def inlines_simd(kernel):
    """For kernels that Numba keeps on disk, below `njit(cache=True)`: compile them anew when this file changes.

    The functions of this file are inlined into the kernels of scan_cpu.py and step_cpu.py. Numba takes a kernel's
    machine code from its cache as long as the kernel's own file is the same: it doesn't notice a change in this one.
    The cache's file is named after the kernel, though. With this file's checksum in the name, machine code that was
    made from another version of this file isn't found.
    """
    kernel.__qualname__ += f"_{SIMD_SOURCE:08x}"
    return kernel


# ---- the type -------------------------------------------------------------------------------------------------


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


# "contract" allows LLVM to fuse a * b + c. Nothing else is relaxed: NaN and infinity behave as IEEE 754 says.
FLAGS = ("contract",)


def _splat(builder, scalar, lanes):
    """A vector with `scalar` in every lane."""
    vector_type = ir.VectorType(scalar.type, lanes)
    first = builder.insert_element(ir.Constant(vector_type, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(first, first, zeros)


def _constant(vector_type, value):
    return ir.Constant(vector_type, [value] * vector_type.count)


def _define_operator(op, method):
    """Let `op` take two vectors, or a vector and a scalar, as LLVM's instruction `method`."""
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
    """The address of array[indices], for indices that are not negative."""
    array = context.make_array(array_type)(context, builder, array)
    return cgutils.get_item_pointer(context, builder, array_type, array, indices, wraparound=False)


def _vector_pointer(context, builder, array_type, array, indices):
    """The same as the address of a vector, and the alignment that is certain for it: that of one number."""
    pointer = _item_pointer(context, builder, array_type, array, indices)
    vector_type = context.get_value_type(VECTORS[array_type.dtype])
    return builder.bitcast(pointer, vector_type.as_pointer()), array_type.dtype.bitwidth // 8


@intrinsic
def load(typingctx, array, row, column):
    """array[row, column : column + lanes] as a vector; the array's last dimension must be contiguous."""

    def codegen(context, builder, sig, args):
        pointer, align = _vector_pointer(context, builder, sig.args[0], args[0], args[1:])
        return builder.load(pointer, align=align)

    return VECTORS[array.dtype](array, int64, int64), codegen


@intrinsic
def store(typingctx, array, row, column, vector):
    """array[row, column : column + lanes] = vector."""

    def codegen(context, builder, sig, args):
        pointer, align = _vector_pointer(context, builder, sig.args[0], args[0], args[1:3])
        builder.store(args[3], pointer, align=align)
        return context.get_dummy_value()

    return types.void(array, int64, int64, vector), codegen


@intrinsic
def get(typingctx, array, row, column):
    """array[row, column] for indices that are not negative. Numba's own indexing also handles negative indices, and
    spends instructions on telling which they are."""

    def codegen(context, builder, sig, args):
        return builder.load(_item_pointer(context, builder, sig.args[0], args[0], args[1:]))

    return array.dtype(array, int64, int64), codegen


@intrinsic
def prefetch(typingctx, array, row, column):
    """Start to bring array[row, column : column + lanes] into the L2 cache; it may lie outside the array."""

    def codegen(context, builder, sig, args):
        byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        prefetch_line = builder.module.declare_intrinsic("llvm.prefetch", [byte],
                                                         ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32]))
        first = builder.bitcast(_item_pointer(context, builder, sig.args[0], args[0], args[1:]), byte)
        to_read, into_l2, data = ir.Constant(i32, 0), ir.Constant(i32, 2), ir.Constant(i32, 1)
        for offset in range(0, VECTOR_BYTES, CACHE_LINE):
            builder.call(prefetch_line, [builder.gep(first, [ir.Constant(i32, offset)]), to_read, into_l2, data])
        return context.get_dummy_value()

    return types.void(array, int64, int64), codegen


@intrinsic
def zeros_like(typingctx, vector):
    """A vector of zeros, of the type of `vector`."""
    return vector(vector), lambda context, builder, sig, args: _constant(args[0].type, 0.0)


def _halve(builder, width, x, y=None):
    """Cut x, or x and y side by side, into groups of `width` lanes, and add each group's high half to its low half.

    Returns the sums in the order of the groups: a vector half as long as what was given.
    """
    lanes = x.type.count * (1 if y is None else 2)
    low = [first + lane for first in range(0, lanes, width) for lane in range(width // 2)]
    index = ir.VectorType(ir.IntType(32), len(low))
    low, high = (builder.shuffle_vector(x, x if y is None else y, ir.Constant(index, [i + shift for i in low]))
                 for shift in (0, width // 2))
    return builder.fadd(low, high, flags=FLAGS)


@intrinsic
def sum_lanes(typingctx, vector):
    """The sum over the lanes. The upper half is added to the lower until one is left, so the order is fixed."""

    def codegen(context, builder, sig, args):
        (value,) = args
        while value.type.count > 1:
            value = _halve(builder, value.type.count, value)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return vector.dtype(vector), codegen


@intrinsic
def add_sums(typingctx, array, row, a, b):
    """Add to array[row] the partial sums over the lanes of a, and behind them those of b.

    Each of the two vectors is summed up to an eighth of its lanes only, and array[row] has a quarter of the lanes. To
    go on down to one number would take twice the instructions, at every call; `scan_cpu.finish_sums` instead adds up
    the accumulated eighths, once per chunk of time.
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
    """max(a, b) lane by lane; where `a` is NaN, the result is NaN."""

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
    """The polynomial with these coefficients, the constant first, at x."""
    result = _constant(x.type, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = builder.fadd(builder.fmul(result, x, flags=FLAGS), _constant(x.type, coefficient), flags=FLAGS)
    return result


def _exp2_coefficients(degree):
    """Power-series coefficients of the Chebyshev interpolant of 2^r on [-1/2, 1/2]."""
    chebyshev = np.polynomial.Chebyshev.interpolate(np.exp2, degree, domain=[-0.5, 0.5])
    return [float(c) for c in chebyshev.convert(kind=np.polynomial.Polynomial).coef]


# mantissa bits, exponent bias, degree of the polynomial for 2^r, number of terms of the series for log1p
FORMATS = {float32: (23, 127, 5, 7), float64: (52, 1023, 11, 17)}


@intrinsic
def exp2_of_product(typingctx, x, y):
    """2^(x y) lane by lane, for x y below the largest exponent (128, 1024); 0 below the normal range, -inf included.

    2^(x y) = 2^n 2^r with n = round(x y) and |r| <= 1/2. In the number x y + 1.5 * 2^mantissa + bias the low bits are
    those of n + bias; moved into the exponent field, they make 2^n. 2^r is a polynomial. Both sums are fused
    multiply-adds where the machine has them, so the rounding of the product x y doesn't reach the result. The exponents
    here are those of decays, never above 0: no instruction is spent on an overflow.
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
        bits = builder.shl(builder.bitcast(shifted, integers), _constant(integers, mantissa))
        power = builder.fmul(_horner(builder, r, _exp2_coefficients(degree)), builder.bitcast(bits, vector_type))
        # Below n = -bias there is no such exponent field. Far below, r is no remainder either and may be infinite.
        lowest = _constant(vector_type, 1.5 * 2.0**mantissa)
        return builder.select(builder.fcmp_ordered("<", shifted, lowest), _constant(vector_type, 0.0), power)

    return (x if isinstance(x, Vector) else y)(x, y), codegen


@intrinsic
def log1p(typingctx, x):
    """log(1 + x) lane by lane for 0 <= x <= 1: 2 atanh(s) = 2 (s + s^3/3 + s^5/5 + ...) with s = x / (2 + x)."""

    def codegen(context, builder, sig, args):
        (x,) = args
        terms = FORMATS[sig.args[0].dtype][3]
        s = builder.fdiv(x, builder.fadd(x, _constant(x.type, 2.0)))
        series = _horner(builder, builder.fmul(s, s), [2.0 / (2 * k + 1) for k in range(terms)])
        return builder.fmul(s, series)

    return x(x), codegen


@njit(forceinline=True)
def sigmoid_softplus(x):
    """(sigmoid(x), softplus(x)) lane by lane, both from exp(-|x|), which cannot overflow."""
    zero = zeros_like(x)
    one = zero + 1.0
    # exp(-1000) is 0 in float32 and float64. Limiting |x| to 1000 so changes nothing, and serves infinite x too.
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
    """The derivative of silu at x, where gate = sigmoid(x)."""
    return gate + x * gate * ((zeros_like(x) + 1.0) - gate)
