"""The model's recurrence on the CPU: one Numba function that computes many generation steps of the whole model.

A step of the default model in PyTorch is about 150 small operations, whose time is mostly overhead. Here the weights
are packed once, and all steps of a segment are computed inside one compiled function, without the Python interpreter.
It computes what `CausalTimeSeriesMamba.step` computes, layer by layer in the same order; the tests compare the two.

Samples are independent of each other. They are divided into tiles of TILE samples, each on a thread of its own. All
samples of a tile use a weight while it is loaded, because reading the weights is most of the work.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from cli import UserError
from kernels.numba_cache import njit
from kernels.selective_scan import matrix_and_bias
from kernels.simd import (
    LOG2_E,
    VECTOR_BYTES,
    exp2_of_product,
    inlines_simd,
    load,
    sigmoid,
    softplus,
    store,
    sum_lanes,
    zeros_like,
)

TILE = 4  # samples that share a loaded weight


class Weights(NamedTuple):
    """A model's weights as `run_tile` reads them. Columns are rounded up to whole SIMD vectors, with zeros behind.

    The first axis of those from `norm` to `out_proj` is the layer. Matrices are packed by `pack_matrix`.
    """

    input_proj: np.ndarray
    input_bias: np.ndarray
    norm: np.ndarray  # (layers, 2, d_model) scale, shift
    in_proj: np.ndarray
    in_bias: np.ndarray  # (layers, 1, 2 d_inner) zeros but for a constant z
    conv: np.ndarray  # (layers, taps, d_inner)
    conv_bias: np.ndarray  # (layers, 1, d_inner)
    x_proj: np.ndarray
    x_bias: np.ndarray  # (layers, 1, dt_rank + 2 d_state) zeros but for a constant B and C
    dt_proj: np.ndarray
    dt_bias: np.ndarray
    A2: np.ndarray  # (layers, d_state, d_inner) A log2(e)
    D: np.ndarray
    out_proj: np.ndarray
    final_norm: np.ndarray
    head_in: np.ndarray
    head_in_bias: np.ndarray
    head_out: np.ndarray
    head_out_bias: np.ndarray  # of a mixture: K logits, K log scales, K means
    zero: np.ndarray  # a bias of zeros
    mask: np.ndarray  # (1, d_model) ones; the padding behind them is zero


class Sizes(NamedTuple):
    """The model's sizes; mixture: the components of its head, 0 for a point head, and log_reach, how far a log scale
    can move from its bias; lanes: numbers per SIMD vector; norm_eps: the epsilon of its LayerNorms."""

    feature_dim: int
    mixture: int
    log_reach: float
    d_model: int
    d_inner: int
    d_state: int
    dt_rank: int
    d_conv: int
    d_ff: int
    lanes: int
    norm_eps: float


# ---- kernels --------------------------------------------------------------------------------------------------


@njit(forceinline=True)
def affine(weight, bias, n_in, lanes, x, y):
    """y = weight x + bias for a tile of samples: x (TILE, n_in or more), y (TILE, n_out), a weight of `pack_matrix`."""
    for block in range(weight.shape[0] // n_in):
        column, row = block * lanes, block * n_in
        sum_0 = load(bias, 0, column)
        sum_1, sum_2, sum_3 = sum_0, sum_0, sum_0
        for i in range(n_in):
            w = load(weight, row + i, 0)
            sum_0 = sum_0 + w * x[0, i]
            sum_1 = sum_1 + w * x[1, i]
            sum_2 = sum_2 + w * x[2, i]
            sum_3 = sum_3 + w * x[3, i]
        store(y, 0, column, sum_0)
        store(y, 1, column, sum_1)
        store(y, 2, column, sum_2)
        store(y, 3, column, sum_3)


@njit(forceinline=True)
def layer_norm(x, scale, shift, mask, d_model, eps, lanes, y):
    """y = LayerNorm(x) for x (TILE, d_model padded); `mask` is 1 in the first d_model columns and 0 in the padding."""
    real = x.dtype.type
    for s in range(TILE):
        total = zeros_like(load(x, s, 0))
        for c in range(0, x.shape[1], lanes):
            total = total + load(x, s, c)
        mean = sum_lanes(total) / real(d_model)
        total = zeros_like(total)
        for c in range(0, x.shape[1], lanes):
            centred = (load(x, s, c) - mean) * load(mask, 0, c)
            total = total + centred * centred
        inverse = real(1) / math.sqrt(sum_lanes(total) / real(d_model) + real(eps))
        for c in range(0, x.shape[1], lanes):
            store(y, s, c, (load(x, s, c) - mean) * inverse * load(scale, 0, c) + load(shift, 0, c))


@njit(forceinline=True)
def conv(xz, state, weight, bias, taps, lanes, u):
    """u = silu(causal convolution) of x, the first half of xz.

    state (TILE * (taps - 1), d_inner) holds each sample's last inputs, the oldest first; x replaces the oldest.
    """
    past = taps - 1
    for s in range(TILE):
        for c in range(0, u.shape[1], lanes):
            x = load(xz, s, c)
            pre = load(bias, 0, c) + load(weight, past, c) * x
            for k in range(past):
                old = load(state, s * past + k, c)
                pre = pre + load(weight, k, c) * old
                if k > 0:
                    store(state, s * past + k - 1, c, old)
            if past > 0:
                store(state, s * past + past - 1, c, x)
            store(u, s, c, pre * sigmoid(pre))


@njit(forceinline=True)
def scan(n_samples, u, delta, x_dbl, xz, h, A2, D, dt_rank, d_state, lanes, y):
    """One step of the scan with its gate, in the names of selective_scan.py; delta already contains its bias.

    h (TILE * d_state, d_inner) is the state before the step, and the one after it on return.
    """
    for s in range(n_samples):
        for c in range(0, u.shape[1], lanes):
            u_c, z = load(u, s, c), load(xz, s, u.shape[1] + c)
            dt = softplus(load(delta, s, c))
            v = dt * u_c
            o = load(D, 0, c) * u_c
            for n in range(d_state):
                B, C = x_dbl[s, dt_rank + n], x_dbl[s, dt_rank + d_state + n]
                h_n = exp2_of_product(load(A2, n, c), dt) * load(h, s * d_state + n, c) + v * B
                store(h, s * d_state + n, c, h_n)
                o = o + h_n * C
            store(y, s, c, o * z * sigmoid(z))


@njit(forceinline=True)
def gelu(x):
    """The exact GELU, with the error function, in place."""
    real = x.dtype.type
    for s in range(TILE):
        for c in range(x.shape[1]):
            x[s, c] *= real(0.5) * (real(1) + math.erf(x[s, c] * real(math.sqrt(0.5))))


@njit(forceinline=True)
def mixture_mean(output, K, mean):
    """mean = the mean of the mixture that `output`, K logits, K log scales and K means, describes."""
    real = output.dtype.type
    top, total = output[0], real(0)
    for k in range(K):
        top = max(top, output[k])
    mean[:] = 0
    for k in range(K):
        weight = math.exp(output[k] - top)
        total += weight
        for j in range(len(mean)):
            mean[j] += weight * output[2 * K + k * len(mean) + j]
    mean /= total


@njit(forceinline=True)
def mixture_draw(output, bias, K, log_reach, temperature, uniform, normal, value):
    """value = mixture_head.draw of the mixture that `output` describes; temperature, a number of its type, above 0."""
    real = output.dtype.type
    top, total = output[0], real(0)
    for k in range(K):
        top = max(top, output[k])
    for k in range(K):
        total += math.exp((output[k] - top) / temperature)
    chosen, cumulative = 0, math.exp((output[0] - top) / temperature)
    while chosen < K - 1 and cumulative <= uniform * total:
        chosen += 1
        cumulative += math.exp((output[chosen] - top) / temperature)
    base = bias[K + chosen]
    log_scale = base + real(log_reach) * math.tanh((output[K + chosen] - base) / real(log_reach))
    scale = math.exp(log_scale) * math.sqrt(temperature)
    for j in range(len(value)):
        value[j] = output[2 * K + chosen * len(value) + j] + scale * normal[j]


@njit(nogil=True, cache=True, error_model="numpy")
@inlines_simd
def run_tile(w, sizes, temperature, output, conv_state, h, own, uniform, observation, burst, hidden, predictions,
             generated):
    """All steps of a segment for one tile of samples. output, conv_state and h are updated in place.

    temperature: of the type of the weights; 0 for a point head, and for a mixture whose mean is played. output:
    (TILE, n_outputs padded), the head's, of the last step. conv_state: (layers, TILE * (d_conv - 1), d_inner).
    h: (layers, TILE * d_state, d_inner). own, observation: (samples, steps, feature_dim), uniform (samples, steps),
    burst (steps,) and hidden (samples, rows, layers, d_model): the fields of generate.Draws. predictions, generated:
    like own; written.
    """
    lanes, d_model, d_state = sizes.lanes, sizes.d_model, sizes.d_state
    d_inner = w.D.shape[2]
    n_samples, n_steps, feature_dim = own.shape
    x = np.zeros((TILE, feature_dim), output.dtype)
    residual = np.zeros((TILE, w.mask.shape[1]), x.dtype)
    normed, added = np.zeros_like(residual), np.zeros_like(residual)
    xz = np.zeros((TILE, 2 * d_inner), x.dtype)
    u, delta, y = (np.zeros((TILE, d_inner), x.dtype), np.zeros((TILE, d_inner), x.dtype),
                   np.zeros((TILE, d_inner), x.dtype))
    x_dbl = np.zeros((TILE, w.x_proj.shape[1] // sizes.d_inner * lanes), x.dtype)
    wide = np.zeros((TILE, w.head_in_bias.shape[1]), x.dtype)
    for t in range(n_steps):
        for s in range(n_samples):
            mean, value = predictions[s, t], generated[s, t]
            if sizes.mixture:
                mixture_mean(output[s], sizes.mixture, mean)
            else:
                mean[:] = output[s, :feature_dim]
            if temperature > 0:
                mixture_draw(output[s], w.head_out_bias[0], sizes.mixture, sizes.log_reach, temperature,
                             uniform[s, t], own[s, t], value)
                x[s] = value + observation[s, t]
            else:
                value[:] = mean + own[s, t]
                x[s] = mean + (own[s, t] + observation[s, t])  # in this order: rounded as ever
        affine(w.input_proj, w.input_bias, sizes.feature_dim, lanes, x, residual)
        for i in range(w.A2.shape[0]):
            layer_norm(residual, w.norm[i, :1], w.norm[i, 1:], w.mask, d_model, sizes.norm_eps, lanes, normed)
            affine(w.in_proj[i], w.in_bias[i], d_model, lanes, normed, xz)
            conv(xz, conv_state[i], w.conv[i], w.conv_bias[i], sizes.d_conv, lanes, u)
            affine(w.x_proj[i], w.x_bias[i], sizes.d_inner, lanes, u, x_dbl)
            affine(w.dt_proj[i], w.dt_bias[i], sizes.dt_rank, lanes, x_dbl, delta)
            scan(n_samples, u, delta, x_dbl, xz, h[i], w.A2[i], w.D[i], sizes.dt_rank, d_state, lanes, y)
            affine(w.out_proj[i], w.zero, sizes.d_inner, lanes, y, added)
            residual += added
            if burst[t] >= 0:
                for s in range(n_samples):
                    for j in range(d_model):
                        residual[s, j] += hidden[s, burst[t], i, j]
        layer_norm(residual, w.final_norm[:1], w.final_norm[1:], w.mask, d_model, sizes.norm_eps, lanes, normed)
        affine(w.head_in, w.head_in_bias, d_model, lanes, normed, wide)
        gelu(wide)
        affine(w.head_out, w.head_out_bias, sizes.d_ff, lanes, wide, output)


# ---- packing --------------------------------------------------------------------------------------------------


def pad_last(array, lanes):
    """The array with its last axis rounded up to whole SIMD vectors, zeros behind."""
    width = -array.shape[-1] % lanes
    return np.ascontiguousarray(np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, width)]))


def pack_matrix(matrix, lanes):
    """A matrix (n_out, n_in) in the order in which `affine` reads it: (blocks of outputs * n_in, lanes).

    For each block of `lanes` outputs and each input it has one vector: the weights of these outputs for this input.
    """
    padded = pad_last(matrix.T, lanes)
    return np.ascontiguousarray(padded.reshape(len(padded), -1, lanes).transpose(1, 0, 2).reshape(-1, lanes))


def pack(model, scale_range):
    """(Weights, Sizes) of a CausalTimeSeriesMamba that lies on the CPU, in float32 or float64."""
    block = model.layers[0].mamba
    dtype = model.input_proj.weight.detach().numpy().dtype
    lanes = VECTOR_BYTES // dtype.itemsize

    def array(tensor):
        return tensor.detach().numpy()

    def row(tensor):
        return pad_last(array(tensor)[None], lanes)

    def layers(get):
        return np.stack([get(layer) for layer in model.layers])

    def in_proj(layer):
        # Each half is padded by itself, so that z begins at a whole vector.
        halves = np.split(array(layer.mamba.in_proj_parameters()[0]), 2)
        return np.concatenate([pack_matrix(half, lanes) for half in halves])

    def in_bias(layer):
        bias = layer.mamba.in_proj_parameters()[1]
        halves = np.zeros((2, block.d_inner), dtype) if bias is None else array(bias).reshape(2, -1)
        return pad_last(halves, lanes).reshape(1, -1)

    def x_proj(layer):
        matrix, bias = matrix_and_bias(layer.mamba.x_proj_weight(), block.d_inner)
        return (pack_matrix(array(matrix), lanes),
                pad_last(np.zeros((1, len(matrix)), dtype), lanes) if bias is None else row(bias))

    def dt_proj(layer):
        _, _, _, dt_weight, _, _, _ = layer.mamba.inner_parameters()
        return pack_matrix(array(dt_weight), lanes)

    def norm(module):
        return np.concatenate([row(module.weight), row(module.bias)])

    head_in, _, head_out = model.output_heads["1"]
    widest = max(2 * block.d_inner, block.dt_rank + 2 * block.d_state, model.d_model) + 2 * lanes
    weights = Weights(
        input_proj=pack_matrix(array(model.input_proj.weight), lanes), input_bias=row(model.input_proj.bias),
        norm=layers(lambda layer: norm(layer.norm)),
        in_proj=layers(in_proj), in_bias=layers(in_bias),
        conv=layers(lambda layer: pad_last(array(layer.mamba.conv1d.weight)[:, 0].T, lanes)),
        conv_bias=layers(lambda layer: row(layer.mamba.conv1d.bias)),
        x_proj=layers(lambda layer: x_proj(layer)[0]), x_bias=layers(lambda layer: x_proj(layer)[1]),
        dt_proj=layers(dt_proj),
        dt_bias=layers(lambda layer: row(layer.mamba.dt_proj.bias)),
        A2=layers(lambda layer: pad_last(-np.exp(array(layer.mamba.A_log)).T * dtype.type(LOG2_E), lanes)),
        D=layers(lambda layer: row(layer.mamba.D)),
        out_proj=layers(lambda layer: pack_matrix(array(layer.mamba.out_proj.weight), lanes)),
        final_norm=norm(model.final_norm),
        head_in=pack_matrix(array(head_in.weight), lanes), head_in_bias=row(head_in.bias),
        head_out=pack_matrix(array(head_out.weight), lanes), head_out_bias=row(head_out.bias),
        zero=np.zeros((1, widest), dtype), mask=pad_last(np.ones((1, model.d_model), dtype), lanes),
    )
    return weights, Sizes(model.feature_dim, model.mixture, math.log(scale_range), model.d_model, block.d_inner,
                          block.d_state, block.dt_rank, block.d_conv, head_in.out_features, lanes, model.final_norm.eps)


def pack_tile(output, states, samples, lanes):
    """The head's output and the states of `samples` (a slice of at most TILE) in the layout of `run_tile`."""
    def tile(tensor):
        values = tensor[samples].numpy()
        return np.pad(values, [(0, TILE - len(values))] + [(0, 0)] * (values.ndim - 1))

    conv_state, h = (np.stack([tile(state[k]) for state in states]) for k in (0, 1))
    # (layers, TILE, d_inner, k) -> (layers, TILE * k, d_inner)
    conv_state, h = (pad_last(a.transpose(0, 1, 3, 2).reshape(len(a), -1, a.shape[2]), lanes)
                     for a in (conv_state, h))
    return pad_last(tile(output), lanes), conv_state, h


def stepper(model, n, sampling):
    """The recurrence for n samples: advance(draws, start) -> (predictions, generated), see generate.py.

    start: the head's output (n, n_outputs) and the states, as `model.prefill` returns them.
    """
    dtype = str(model.input_proj.weight.dtype).removeprefix("torch.")
    if dtype not in ("float32", "float64"):
        raise UserError(f"generation on a CPU computes in float32 or float64, and this model is in {dtype}; give "
                        "model.float()")
    weights, sizes = pack(model, sampling.scale_range)
    tiles = [slice(first, min(first + TILE, n)) for first in range(0, n, TILE)]
    packed = {}
    pool = ThreadPoolExecutor(min(len(tiles), os.cpu_count() or 1))

    def advance(draws, start):
        predictions, generated = np.empty_like(draws.own), np.empty_like(draws.own)
        real = draws.own.dtype.type

        def run(rows):
            if start is not None:
                packed[rows.start] = pack_tile(*start, rows, sizes.lanes)
            run_tile(weights, sizes, real(sampling.temperature), *packed[rows.start], draws.own[rows],
                     draws.uniform[rows], draws.observation[rows], draws.burst, draws.hidden[rows], predictions[rows],
                     generated[rows])

        list(pool.map(run, tiles))
        return predictions, generated

    return advance
