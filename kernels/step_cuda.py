"""The model's recurrence on a CUDA GPU: three Triton kernels per layer, and one CUDA graph that replays a whole step.

With a handful of samples the time of a step is all overhead: `CausalTimeSeriesMamba.step` launches some 25 small
kernels per layer. Here each projection is fused with what surrounds it. A new kernel begins only where a vector must be
complete before the next projection can read it:

    enter      the head's output -> the next value -> input projection
    into       LayerNorm -> in_proj -> convolution of one half, SiLU of the other        (in each layer)
    recur      x_proj -> dt_proj -> the scan's step -> gate                              (in each layer)
    back       out_proj -> residual, plus burst noise                                    (in each layer)
    head_in    LayerNorm -> Linear -> GELU
    head_out   Linear -> the head's output

The GPU itself counts the steps, and reads the noise of each step from a buffer. A replay therefore needs nothing from
the host, which only refills the buffers every SEGMENT steps. Arithmetic is float32.
"""

import math

import numpy as np
import torch
import triton
import triton.language as tl

from kernels.cuda_graph import captured
from kernels.selective_scan import matrix_and_bias
from kernels.triton_math import LOG2E, sigmoid, softplus_sigmoid

SEGMENT = 128  # steps that the buffers hold: so many are replayed before the host empties and refills them
ROWS = 8  # outputs of a projection per program: few, so that even one sample keeps many multiprocessors busy
TILE = 8192  # weights that a program holds at a time


# ---- kernels: one program per block of ROWS outputs and sample -----------------------------------------------


@triton.jit
def _matvec(weight, rows, n_rows, x, n_in: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    """(R,): weight[rows] x, for a weight (n_rows, n_in), K of its columns at a time."""
    total = tl.zeros((R,), tl.float32)
    for first in range(0, n_in, K):
        k = first + tl.arange(0, K)
        w = tl.load(weight + rows[:, None] * n_in + k[None, :],
                    (rows < n_rows)[:, None] & (k < n_in)[None, :], other=0.0)
        total += tl.sum(w * tl.load(x + k, k < n_in, other=0.0)[None, :], 1)
    return total


@triton.jit
def _norm_matvec(weight, rows, n_rows, x, scale, shift, n_in, eps, K: tl.constexpr):
    """(R,): weight[rows] LayerNorm(x); K >= n_in."""
    k = tl.arange(0, K)
    valid = k < n_in
    w = tl.load(weight + rows[:, None] * n_in + k[None, :], (rows < n_rows)[:, None] & valid[None, :], other=0.0)
    value = tl.load(x + k, valid, other=0.0)
    centred = tl.where(valid, value - tl.sum(value, 0) / n_in, 0.0)
    normed = centred / tl.sqrt(tl.sum(centred * centred, 0) / n_in + eps)
    normed = normed * tl.load(scale + k, valid, other=0.0) + tl.load(shift + k, valid, other=0.0)
    return tl.sum(w * normed[None, :], 1)


@triton.jit
def _tanh(x):
    return 2.0 * sigmoid(2.0 * x) - 1.0


@triton.jit
def _mixture(output, bias, n_components, n_features, uniform, normal, inverse_temperature, log_reach,
             SAMPLED: tl.constexpr, K: tl.constexpr, F: tl.constexpr):
    """(mean, value), (F,) each, of the mixture whose logits, log scales and means are `output`.

    value: mixture_head.draw of it when SAMPLED, otherwise the mean. bias: that of the head; K, F: the numbers of
    components and features, rounded up.
    """
    k, f = tl.arange(0, K), tl.arange(0, F)
    valid = k < n_components
    logits = tl.load(output + k, valid, other=float("-inf"))
    logits -= tl.max(logits, 0)
    means = tl.load(output + 2 * n_components + k[:, None] * n_features + f[None, :],
                    valid[:, None] & (f < n_features)[None, :], other=0.0)
    weights = tl.exp2(logits * LOG2E)
    mean = tl.sum(weights[:, None] * means, 0) / tl.sum(weights, 0)
    value = mean
    if SAMPLED:
        weights = tl.exp2(logits * (inverse_temperature * LOG2E))
        cumulative = tl.cumsum(weights, 0)
        below = valid & (cumulative <= uniform * tl.max(cumulative, 0))
        chosen = tl.minimum(tl.sum(below.to(tl.int32), 0), n_components - 1)
        base = tl.load(bias + n_components + chosen)
        raw = tl.load(output + n_components + chosen)
        log_scale = base + log_reach * _tanh((raw - base) / log_reach)
        scale = tl.exp2(log_scale * LOG2E) / tl.sqrt(inverse_temperature)
        value = tl.sum(tl.where((k == chosen)[:, None], means, 0.0), 0) + scale * normal
    return mean, value


@triton.jit
def _enter(output, head_bias, own, uniform, observation, predictions, generated, clock, weight, bias, residual,
           n_samples, n_features, n_outputs, n_components, d_model, inverse_temperature, log_reach,
           MIXTURE: tl.constexpr, SAMPLED: tl.constexpr, R: tl.constexpr, K: tl.constexpr, F: tl.constexpr):
    """residual = weight (the next value + burst noise) + bias; the next value is what the head's output says.

    One program also copies the prediction and the value into this step's rows of what is returned.
    """
    sample = tl.program_id(1)
    rows, f = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, F)
    place = tl.load(clock) * n_samples + sample
    cell = place * n_features + f
    noise = tl.load(own + cell, f < n_features, other=0.0)
    burst_noise = tl.load(observation + cell, f < n_features, other=0.0)
    output += sample * n_outputs
    if MIXTURE:
        mean, value = _mixture(output, head_bias, n_components, n_features, tl.load(uniform + place), noise,
                               inverse_temperature, log_reach, SAMPLED, K, F)
        read = value + burst_noise
    else:
        mean = tl.load(output + f, f < n_features, other=0.0)
        value = mean + noise
        read = mean + (noise + burst_noise)  # in this order: rounded as ever
    if tl.program_id(0) == 0:
        tl.store(predictions + cell, mean, f < n_features)
        tl.store(generated + cell, value, f < n_features)
    w = tl.load(weight + rows[:, None] * n_features + f[None, :],
                (rows < d_model)[:, None] & (f < n_features)[None, :], other=0.0)
    out = tl.sum(w * read[None, :], 1) + tl.load(bias + rows, rows < d_model, other=0.0)
    tl.store(residual + sample * d_model + rows, out, rows < d_model)


@triton.jit
def _into(residual, scale, shift, weight, z_bias, conv_state, conv_weight, conv_bias, u, gate, d_model, d_inner, eps,
          TAPS: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    """u = silu(conv(x)) and gate = silu(z), with x, z = in_proj(LayerNorm(residual)); conv_state takes in x.

    The first half of the programs computes u, the second half the gate.
    """
    block, sample = tl.program_id(0), tl.program_id(1)
    half = tl.num_programs(0) // 2
    channel = (block % half) * R + tl.arange(0, R)
    valid = channel < d_inner
    weight += (block // half) * d_inner * d_model
    x = _norm_matvec(weight, channel, d_inner, residual + sample * d_model, scale, shift, d_model, eps, K)
    if block < half:
        past = conv_state + (sample * d_inner + channel) * (TAPS - 1)
        pre = tl.load(conv_bias + channel, valid, other=0.0)
        window = ()
        for k in tl.static_range(TAPS - 1):
            window += (tl.load(past + k, valid, other=0.0),)
            pre += window[k] * tl.load(conv_weight + channel * TAPS + k, valid, other=0.0)
        window += (x,)
        pre += x * tl.load(conv_weight + channel * TAPS + TAPS - 1, valid, other=0.0)
        # The vector is so short that every warp of the program loads all of it. No warp may store its new values
        # before every warp has loaded the old ones.
        tl.debug_barrier()
        for k in tl.static_range(TAPS - 1):
            tl.store(past + k, window[k + 1], valid)
        tl.store(u + sample * d_inner + channel, pre * sigmoid(pre), valid)
    else:
        x += tl.load(z_bias + channel, valid, other=0.0)
        tl.store(gate + sample * d_inner + channel, x * sigmoid(x), valid)


@triton.jit
def _recur(u, gate, x_proj, x_bias, dt_proj, dt_bias, A, D, h, y, d_inner: tl.constexpr, d_state, dt_rank,
           R: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr):
    """The scan's step and the gate for R channels. Every program computes all of B and C, and its own delta: to repeat
    this takes less time than to launch another kernel that does it once."""
    sample = tl.program_id(1)
    channel, n, rank = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, N), tl.arange(0, RANK)
    valid, inside = channel < d_inner, (channel < d_inner)[:, None] & (n < d_state)[None, :]
    cell = channel[:, None] * d_state + n[None, :]
    # Loaded first, because these don't depend on the projections, and arrive while those are computed.
    state = tl.load(h + sample * d_inner * d_state + cell, inside, other=0.0)
    decay = tl.load(A + cell, inside, other=0.0)
    dt_weight = tl.load(dt_proj + channel[:, None] * dt_rank + rank[None, :],
                        valid[:, None] & (rank < dt_rank)[None, :], other=0.0)
    dt = tl.load(dt_bias + channel, valid, other=0.0)
    u += sample * d_inner
    low_rank = _matvec(x_proj, rank, dt_rank, u, d_inner, RANK, K)
    B = _matvec(x_proj + dt_rank * d_inner, n, d_state, u, d_inner, N, K)
    B += tl.load(x_bias + dt_rank + n, n < d_state, other=0.0)
    C = _matvec(x_proj + (dt_rank + d_state) * d_inner, n, d_state, u, d_inner, N, K)
    C += tl.load(x_bias + dt_rank + d_state + n, n < d_state, other=0.0)
    dt, _ = softplus_sigmoid(dt + tl.sum(dt_weight * low_rank[None, :], 1))
    u_here = tl.load(u + channel, valid, other=0.0)
    state = tl.exp2(dt[:, None] * decay * LOG2E) * state + (dt * u_here)[:, None] * B[None, :]
    tl.debug_barrier()  # as in _into
    tl.store(h + sample * d_inner * d_state + cell, state, inside)
    out = tl.sum(state * C[None, :], 1) + tl.load(D + channel, valid, other=0.0) * u_here
    out *= tl.load(gate + sample * d_inner + channel, valid, other=0.0)
    tl.store(y + sample * d_inner + channel, out, valid)


@triton.jit
def _back(y, weight, residual, clock, burst, hidden, layer, n_layers, d_model, d_inner: tl.constexpr,
          R: tl.constexpr, K: tl.constexpr):
    """residual += out_proj(y), and this step's burst noise when there is one."""
    sample, n_samples = tl.program_id(1), tl.num_programs(1)
    rows = tl.program_id(0) * R + tl.arange(0, R)
    valid = rows < d_model
    row = tl.load(burst + tl.load(clock))
    out = tl.load(residual + sample * d_model + rows, valid, other=0.0)
    out += _matvec(weight, rows, d_model, y + sample * d_inner, d_inner, R, K)
    noise = hidden + ((row * n_layers + layer) * n_samples + sample) * d_model
    out += tl.load(noise + rows, valid & (row >= 0), other=0.0)
    tl.debug_barrier()  # as in _into
    tl.store(residual + sample * d_model + rows, out, valid)


@triton.jit
def _head_in(residual, scale, shift, weight, bias, wide, d_model, d_ff, eps, R: tl.constexpr, K: tl.constexpr):
    """wide = gelu(weight LayerNorm(residual) + bias)."""
    sample = tl.program_id(1)
    rows = tl.program_id(0) * R + tl.arange(0, R)
    x = _norm_matvec(weight, rows, d_ff, residual + sample * d_model, scale, shift, d_model, eps, K)
    x += tl.load(bias + rows, rows < d_ff, other=0.0)
    tl.store(wide + sample * d_ff + rows, 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476)), rows < d_ff)


@triton.jit
def _head_out(wide, weight, bias, output, clock, d_ff: tl.constexpr, n_outputs, R: tl.constexpr, K: tl.constexpr):
    """The head's next output. One program moves the clock on: no other program of this kernel reads it."""
    sample = tl.program_id(1)
    rows = tl.program_id(0) * R + tl.arange(0, R)
    out = _matvec(weight, rows, n_outputs, wide + sample * d_ff, d_ff, R, K)
    out += tl.load(bias + rows, rows < n_outputs, other=0.0)
    tl.store(output + sample * n_outputs + rows, out, rows < n_outputs)
    if (tl.program_id(0) == 0) & (sample == 0):
        tl.store(clock, tl.load(clock) + 1)


# ---- one step --------------------------------------------------------------------------------------------------


def allocate(model, n):
    """The tensors, beside the weights, that the kernels of a step read and write, for n samples: {name: tensor(s)}."""
    device = model.input_proj.weight.device
    d_inner, d_model = model.layers[0].mamba.d_inner, model.d_model

    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device=device)

    return {
        "output": zeros(n, model.output_heads["1"][-1].out_features), "states": model.init_state(n),
        "clock": zeros(1, dtype=torch.int32), "uniform": zeros(SEGMENT, n),
        **{name: zeros(SEGMENT, n, model.feature_dim) for name in ("own", "observation", "predictions", "generated")},
        "burst": zeros(SEGMENT, dtype=torch.int32) - 1, "hidden": zeros(SEGMENT, model.n_layers, n, d_model),
        "residual": zeros(n, d_model), "u": zeros(n, d_inner), "gate": zeros(n, d_inner), "y": zeros(n, d_inner),
        "wide": zeros(n, model.output_heads["1"][0].out_features),
        "projections": [projections(layer.mamba) for layer in model.layers],
    }


def projections(block):
    """(in_proj, the bias of z, x_proj, its bias, dt_proj, A) of a block, as the kernels read them: a signal that is
    constant has rows of zeros and its values in the bias, which is zero for the others."""
    _, _, x_proj, dt_proj, _, A, _ = block.inner_parameters()
    in_proj, in_bias = block.in_proj_parameters()
    x_proj, x_bias = matrix_and_bias(x_proj, block.d_inner)
    z_bias = A.new_zeros(block.d_inner) if in_bias is None else in_bias[block.d_inner:]
    x_bias = A.new_zeros(len(x_proj)) if x_bias is None else x_bias
    return [tensor.detach().contiguous() for tensor in (in_proj, z_bias, x_proj, x_bias, dt_proj, A)]


def step_launcher(model, buffers, n, sampling):
    """A function that launches the kernels of one step on `buffers`, the tensors of `allocate`."""
    b, block, d_model = buffers, model.layers[0].mamba, model.d_model
    d_inner, d_state, dt_rank = block.d_inner, block.d_state, block.dt_rank
    head_in, _, head_out = model.output_heads["1"]
    power = triton.next_power_of_2
    K, sampled = power(d_model), sampling.temperature > 0
    inverse_temperature = 1 / sampling.temperature if sampled else 1.0

    def columns(rows, n_in):
        """How many columns a program takes at a time, so that it holds TILE weights of `rows` rows."""
        return min(power(n_in), max(TILE // rows, 16))

    def grid(n_out, halves=1):
        return halves * triton.cdiv(n_out, ROWS), n

    def launch():
        _enter[grid(d_model)](
            b["output"], head_out.bias, b["own"], b["uniform"], b["observation"], b["predictions"], b["generated"],
            b["clock"], model.input_proj.weight, model.input_proj.bias, b["residual"], n, model.feature_dim,
            head_out.out_features, model.mixture, d_model, inverse_temperature, math.log(sampling.scale_range),
            MIXTURE=model.mixture > 0, SAMPLED=sampled, R=ROWS, K=power(model.mixture or 1), F=power(model.feature_dim))
        for i, (layer, (conv_state, h)) in enumerate(zip(model.layers, b["states"], strict=True)):
            m, (in_proj, z_bias, x_proj, x_bias, dt_proj, A) = layer.mamba, b["projections"][i]
            _into[grid(d_inner, 2)](
                b["residual"], layer.norm.weight, layer.norm.bias, in_proj, z_bias, conv_state, m.conv1d.weight,
                m.conv1d.bias, b["u"], b["gate"], d_model, d_inner, layer.norm.eps, TAPS=m.d_conv, R=ROWS, K=K)
            _recur[grid(d_inner)](
                b["u"], b["gate"], x_proj, x_bias, dt_proj, m.dt_proj.bias, A, m.D, h, b["y"], d_inner, d_state,
                dt_rank, R=ROWS, N=power(d_state), RANK=power(dt_rank), K=columns(power(d_state), d_inner))
            _back[grid(d_model)](
                b["y"], m.out_proj.weight, b["residual"], b["clock"], b["burst"], b["hidden"], i, model.n_layers,
                d_model, d_inner, R=ROWS, K=columns(ROWS, d_inner))
        _head_in[grid(head_in.out_features)](
            b["residual"], model.final_norm.weight, model.final_norm.bias, head_in.weight, head_in.bias, b["wide"],
            d_model, head_in.out_features, model.final_norm.eps, R=ROWS, K=K)
        _head_out[grid(head_out.out_features)](
            b["wide"], head_out.weight, head_out.bias, b["output"], b["clock"], head_in.out_features,
            head_out.out_features, R=ROWS, K=columns(ROWS, head_in.out_features))

    return launch


@torch.inference_mode()
def stepper(model, n, sampling):
    """The recurrence for n samples: advance(draws, start) -> (predictions, generated), see generate.py.

    start: the head's output (n, n_outputs) and the states, as `model.prefill` returns them. The state of the recurrence
    lives in the graph's buffers from one call to the next.
    """
    device = model.input_proj.weight.device
    b = allocate(model, n)
    launch = step_launcher(model, b, n, sampling)
    # On a CPU the kernels run in Triton's interpreter, without a graph. The warm-up before a capture leaves its own
    # values in the buffers; the first call of `advance` has a start, which replaces them.
    step = captured(launch, None, list, device) if device.type == "cuda" else launch

    @torch.inference_mode()
    def advance(draws, start):
        if start is not None:
            output, states = start
            b["output"].copy_(output)
            for layer_buffers, layer_states in zip(b["states"], states, strict=True):
                for buffer, values in zip(layer_buffers, layer_states, strict=True):
                    buffer.copy_(values)
        predictions, generated = np.empty_like(draws.own), np.empty_like(draws.own)
        for first in range(0, len(draws.burst), SEGMENT):
            segment = slice(first, first + SEGMENT)
            steps = fill_buffers(b, draws, segment)
            for _ in range(steps):
                step()
            for name, result in (("predictions", predictions), ("generated", generated)):
                result[:, segment] = b[name][:steps].transpose(0, 1).cpu().numpy()
        return predictions, generated

    return advance


def fill_buffers(buffers, draws, segment):
    """Put the random numbers of the steps in `segment`, a slice, into the buffers, the clock at 0; how many steps."""
    burst_rows = torch.as_tensor(draws.burst[segment], dtype=torch.int32)
    steps = len(burst_rows)
    buffers["clock"].zero_()
    for name in ("own", "uniform", "observation"):
        values = torch.as_tensor(getattr(draws, name)[:, segment])
        buffers[name][:steps].copy_(values.transpose(0, 1))
    # The rows of `hidden` that this segment needs follow each other. They go to the front of their buffer, and
    # `burst_rows` counts from there.
    in_burst = burst_rows >= 0
    if in_burst.any():
        first_row = int(burst_rows[in_burst][0])
        values = draws.hidden[:, first_row:first_row + int(in_burst.sum())]
        buffers["hidden"][:values.shape[1]].copy_(torch.as_tensor(values).permute(1, 2, 0, 3))
        burst_rows = torch.where(in_burst, burst_rows - first_row, -1)
    buffers["burst"][:steps].copy_(burst_rows)
    return steps
