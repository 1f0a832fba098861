"""Elementary functions of the Triton kernels. Everything is float32."""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def softplus_sigmoid(x):
    """(softplus(x), sigmoid(x)), the second being the derivative of the first. exp(-|x|), from which both are made,
    cannot overflow; x = -inf gives 0 and 0, and NaN stays NaN."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    # p is log1p(e) / e on [0, 1], interpolated at Chebyshev points: relative error 2e-7. log(1 + e) would lose the
    # digits of the small dt that Mamba starts from, and takes longer.
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
