"""The model: a causal Mamba that predicts the next time steps of a multivariate series.

`MambaBlock` is Mamba-1 (Gu & Dao 2023, arXiv 2312.00752, section 3 and algorithm 2) with the parameter names and the
initialisation of `mamba_ssm.Mamba`, so that weights move between the two. `CausalTimeSeriesMamba` stacks blocks
between a linear input and one small head per horizon. `save_checkpoint` and `load_checkpoint` are the only ways in
and out of a `.pt` file.

The symbols of the paper, their names in the code and their shapes. The paper's sizes B, L, D, N and R are here batch,
time, d_inner = expand * d_model, d_state and dt_rank = ceil(d_model / 16).

    paper   code                      shape                       what it is
    x       u                         (batch, time, d_inner)      input of the scan: in_proj, convolution, SiLU
    -       x_dbl = x_proj(u)         (batch, time, R + 2 N)      low-rank Δ, B and C side by side
    Δ       delta, dt after softplus  (batch, time, d_inner)      step size: softplus(dt_proj(low-rank Δ))
    A       -exp(A_log)               (d_inner, d_state)          decay rates of the states, negative
    B, C    B, C                      (batch, time, d_state)      how the input enters the state, how it is read out
    D       D                         (d_inner,)                  share of the input that passes by the state
    h       h                         (batch, d_inner, d_state)   state: h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t
    y       y                         (batch, time, d_inner)      y_t = (C_t · h_t + D u_t) SiLU(z_t)
    -       z                         (batch, time, d_inner)      output gate, the second half of in_proj

Δ, B, C and z are the signals of a block: it computes them from its input at every time step, and by them it selects.
Those that `constant` names don't depend on the input: each is a vector of parameters, the same at all time steps. With
Δ, B and C constant, the recurrence is linear and time-invariant, a convolution with one kernel per channel, as in S4D
(Gu, Gupta, Goel & Ré 2022, arXiv 2206.11893; there with complex A, here with the real A of Mamba).
"""

import contextlib
import io
import math
import re
import warnings
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import cli
import dataset
import mixture_head
from kernels.selective_scan import (
    choose_backend,
    conv_step,
    linear_of,
    mamba_inner,
    mamba_inner_with_state,
    selective_scan_step,
)

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # range of the initial step sizes, as in mamba_ssm.Mamba
SIGNALS = cli.SIGNALS  # the names of Δ, B, C and z


def at_least_float32(x):
    """Half precision as float32, wider numbers as they are: for sums over many steps, where half precision fails."""
    return x.float() if x.dtype.itemsize < 4 else x


# ---- the model -------------------------------------------------------------------------------------------------


class MambaBlock(nn.Module):
    """Selective state space block: (batch, time, d_model) to the same shape, causal in time.

    constant: the names, out of SIGNALS, of those signals that don't depend on the input. A constant B, C (d_state,) or
    z (d_inner,) is a parameter of that name; a constant delta is softplus(dt_proj.bias). The rows of x_proj and in_proj
    and the weight of dt_proj that would compute them don't exist.
    The methods take `backend`, the scan's back end, as selective_scan.choose_backend returns it.
    """

    def __init__(self, d_model, d_state=16, d_conv=4, expand=2, constant=()):
        super().__init__()
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16)
        self.constant = tuple(name for name in SIGNALS if name in constant)
        self.in_proj = nn.Linear(d_model, (1 if "z" in constant else 2) * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1)
        n_varying = sum(n for name, n in self.x_dbl_sizes().items() if name not in constant)
        self.x_proj = nn.Linear(self.d_inner, n_varying, bias=False) if n_varying else None
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(self.d_inner, 1))  # A = -1, …, -d_state
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        self.init_dt()
        self.init_constants()

    @torch.no_grad()
    def init_dt(self):
        """Make the initial step sizes log-uniform in [DT_MIN, DT_MAX] where the input adds nothing to their bias."""
        nn.init.uniform_(self.dt_proj.weight, -self.dt_rank**-0.5, self.dt_rank**-0.5)
        dt = torch.exp(torch.empty(self.d_inner).uniform_(math.log(DT_MIN), math.log(DT_MAX))).clamp(min=DT_FLOOR)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def init_constants(self):
        """Make the parameters of the constant signals."""
        if "delta" in self.constant:
            self.dt_proj.register_parameter("weight", None)
        if "B" in self.constant:
            self.B = nn.Parameter(torch.ones(self.d_state))
        if "C" in self.constant:
            self.C = nn.Parameter(torch.randn(self.d_state))
        if "z" in self.constant:
            self.z = nn.Parameter(torch.ones(self.d_inner))

    def x_dbl_sizes(self):
        """How many columns of x_dbl belong to which signal; those of delta are its low-rank form."""
        return {"delta": self.dt_rank, "B": self.d_state, "C": self.d_state}

    def in_proj_parameters(self):
        """The weight (2 d_inner, d_model) and the bias of in_proj. No bias, None, unless z is constant: then z is the
        second half of the bias, and the second half of the weight is zero."""
        if "z" not in self.constant:
            return self.in_proj.weight, None
        return F.pad(self.in_proj.weight, (0, 0, 0, self.d_inner)), F.pad(self.z, (self.d_inner, 0))

    def x_proj_weight(self):
        """The weight (dt_rank + 2 d_state, d_inner) of x_proj. Where a signal is constant, its rows are zero, and one
        more column, a bias, holds its values; that of a constant delta is dt_proj's bias already."""
        sizes = self.x_dbl_sizes()
        if not sizes.keys() & set(self.constant):
            return self.x_proj.weight
        varying = [n for name, n in sizes.items() if name not in self.constant]
        computed = iter(self.x_proj.weight.split(varying) if varying else ())
        rows = []
        for name, n in sizes.items():
            if name in self.constant:
                values = self.D.new_zeros(n) if name == "delta" else getattr(self, name)
                rows.append(F.pad(values[:, None], (self.d_inner, 0)))
            else:
                rows.append(F.pad(next(computed), (0, 1)))
        return torch.cat(rows)

    def inner_parameters(self):
        """What the scan needs beside its input, in the order of selective_scan.mamba_inner."""
        A = -torch.exp(at_least_float32(self.A_log))  # (d_inner, d_state)
        dt_weight = self.dt_proj.weight
        if dt_weight is None:
            dt_weight = self.D.new_zeros(self.d_inner, self.dt_rank)
        return (self.conv1d.weight.squeeze(1), self.conv1d.bias, self.x_proj_weight(), dt_weight,
                self.dt_proj.bias, A, self.D)

    def forward(self, x, backend):
        xz = F.linear(x, *self.in_proj_parameters())              # (batch, time, 2 d_inner)
        y = mamba_inner(xz, *self.inner_parameters(), backend)    # (batch, time, d_inner)
        return self.out_proj(y)                                   # (batch, time, d_model)

    def prefill(self, x, backend):
        """Like forward, and the state after the last step: (output, (conv_state, h)). No gradient."""
        xz = F.linear(x, *self.in_proj_parameters())
        y, conv_state, h = mamba_inner_with_state(xz, *self.inner_parameters(), backend)
        return self.out_proj(y), (conv_state, h)

    def init_state(self, batch, device=None, dtype=None):
        """The state before the first step: zeros (conv_state, h)."""
        like = {"device": device or self.D.device, "dtype": dtype or self.D.dtype}
        return (torch.zeros(batch, self.d_inner, self.d_conv - 1, **like),
                torch.zeros(batch, self.d_inner, self.d_state, **like))

    def step(self, x, state):
        """One time step of the recurrence: x (batch, d_model) and the state to the output and the next state."""
        conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A, D = self.inner_parameters()
        conv_state, h = state                                     # (batch, d_inner, d_conv - 1 and d_state)
        x, z = F.linear(x, *self.in_proj_parameters()).chunk(2, dim=-1)     # (batch, d_inner) each
        u, conv_state = conv_step(conv_state, x, conv_weight, conv_bias)    # u (batch, d_inner)
        low_rank, B, C = self.split_x_dbl(linear_of(u, x_proj))   # B, C (batch, d_state)
        delta = F.linear(low_rank, dt_weight)                     # (batch, d_inner), before bias and softplus
        y, h = selective_scan_step(h, u, delta, A, B, C, D, z, dt_bias)    # y (batch, d_inner)
        return self.out_proj(y), (conv_state, h)                  # (batch, d_model)

    def split_x_dbl(self, x_dbl):
        """The output of x_proj (…, dt_rank + 2 d_state) as low-rank Δ (…, dt_rank), B and C (…, d_state)."""
        return x_dbl.split(list(self.x_dbl_sizes().values()), dim=-1)

    @torch.no_grad()
    def signals(self, x):
        """The intermediate signals of the block for x (batch, time, d_model), as a dict.

        "conv": the input of the scan, convolved and after SiLU (u in the table above); "delta": the step size after
        softplus; "z": the output gate before SiLU, each (batch, time, d_inner); "B" and "C": (batch, time, d_state).
        """
        _, _, x_proj, dt_weight, dt_bias, _, _ = self.inner_parameters()
        u, z = F.linear(x, *self.in_proj_parameters()).chunk(2, dim=-1)     # (batch, time, d_inner) each
        u = self.conv1d(u.transpose(1, 2))[..., :x.shape[1]]      # (batch, d_inner, time): what lies ahead is cut off
        u = F.silu(u).transpose(1, 2)                             # (batch, time, d_inner)
        low_rank, B, C = self.split_x_dbl(linear_of(u, x_proj))   # B, C (batch, time, d_state)
        delta = F.softplus(F.linear(low_rank, dt_weight, dt_bias))          # (batch, time, d_inner)
        return {"conv": u, "delta": delta, "z": z, "B": B, "C": C}


class LayerNorm(nn.LayerNorm):
    """Layer norm whose output has the type of its input.

    In an autocast region torch's own converts to float32 and back: three passes over memory, where this takes one.
    The statistics are computed in float32 either way.
    """

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class MambaLayer(nn.Module):
    """Pre-norm residual layer: x + dropout(MambaBlock(LayerNorm(x)))."""

    def __init__(self, d_model, d_state, d_conv, expand, dropout, constant=()):
        super().__init__()
        self.norm = LayerNorm(d_model)
        self.mamba = MambaBlock(d_model, d_state, d_conv, expand, constant)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, backend):
        return x + self.dropout(self.mamba(self.norm(x), backend))

    def prefill(self, x, backend):
        y, state = self.mamba.prefill(self.norm(x), backend)
        return x + self.dropout(y), state

    def step(self, x, state):
        y, state = self.mamba.step(self.norm(x), state)
        return x + self.dropout(y), state


def horizons_up_to(max_horizon):
    """The horizons a model predicts: the powers of two up to max_horizon, and max_horizon itself."""
    return sorted({1 << i for i in range(max_horizon.bit_length())} | {max_horizon})


class CausalTimeSeriesMamba(nn.Module):
    """Predicts x[t + k] from x[0…t] for every time step t and horizon k.

    `forward(x)`, x (batch, time, feature_dim), returns {str(k): (batch, time, feature_dim)}; `encode(x)` returns the
    outputs of the layers in order and the horizon-1 prediction last. `init_state`, `prefill` and `step` run the same
    model as a recurrence, whose cost per time step does not grow with the number of steps before it.

    mixture: 0, or the number of Gaussians per prediction (see mixture_head). Then `distribution(x)` gives the whole
    predicted distribution, and a prediction is its mean.
    constant: the names, out of SIGNALS, of the signals that are learned constants in every block (see MambaBlock).
    relative: the model sees each window as what it differs from its own first step, so that where the series has
    wandered to makes no difference (reversible instance normalisation, Kim et al. 2022, by one step in place of the
    mean, which later steps would give away). Windows come and predictions leave in data units all the same; only the
    recurrence is in these differences, from `prefill` on.
    """

    def __init__(self, feature_dim=20, d_model=128, n_layers=7, d_state=32, d_conv=4, expand=2, d_ff=512,
                 dropout=0.1, max_horizon=1, mixture=0, constant=(), relative=False):
        super().__init__()
        self.feature_dim, self.d_model, self.n_layers = feature_dim, d_model, n_layers
        self.horizons, self.mixture = horizons_up_to(max_horizon), mixture
        self.input_proj = nn.Linear(feature_dim, d_model)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            MambaLayer(d_model, d_state, d_conv, expand, dropout, constant) for _ in range(n_layers))
        self.final_norm = LayerNorm(d_model)
        n_outputs = mixture_head.n_outputs(mixture, feature_dim)
        self.output_heads = nn.ModuleDict({
            str(k): nn.Sequential(nn.Linear(d_model, d_ff), nn.GELU(), nn.Linear(d_ff, n_outputs))
            for k in self.horizons})
        # A tensor, so that it stands in a checkpoint.
        self.register_buffer("relative", torch.ones(()) if relative else None)
        self.backends = {}
        self.scaling = None

    @property
    def measures(self):
        """What the model is measured by, and trained by the last of: "mse", and "nll" where it predicts densities.
        A model with a `scaling` is trained by another row of `horizon_errors`."""
        return ("mse", "nll") if self.mixture else ("mse",)

    @property
    def n_error_rows(self):
        return len(self.measures) + (self.scaling is not None)

    def errors_by_horizon(self, errors):
        """`horizon_errors`, a tensor, as {measure: {horizon: number}}."""
        return {measure: dict(zip(self.horizons, row, strict=True))
                for measure, row in zip(self.measures, errors.tolist(), strict=False)}

    def train_scaled(self, scaling):
        """Say that the model sees its data through this dataset.Scaling (--normalise): its `horizon_errors` are then in
        data units all the same. None: it sees them as they are. Returns the model itself."""
        self.scaling = None if scaling is None else torch.tensor(
            scaling.std, dtype=torch.float32, device=self.input_proj.weight.device)
        return self

    @torch.no_grad()
    def unscaled(self, scaling):
        """The model of the data themselves, out of one that was trained through this dataset.Scaling.

        Its first and its last layers are linear: they take over what the scaling did. A mixture needs one std for all
        features. Returns the model itself.
        """
        mean, std = (torch.as_tensor(values, dtype=torch.float64) for values in scaling)
        if self.relative is not None:
            mean = torch.zeros_like(mean)  # a difference has lost it
        first = self.input_proj
        weight = first.weight.double() / std
        first.bias.copy_(first.bias.double() - weight @ mean)
        first.weight.copy_(weight)
        K = self.mixture
        for head in self.output_heads.values():
            last, points = head[-1], slice(2 * K, None)  # behind a mixture's logits and log scales
            stds, means = std.repeat(max(K, 1)), mean.repeat(max(K, 1))
            last.weight[points] = (last.weight[points].double() * stds[:, None]).float()
            last.bias[points] = (last.bias[points].double() * stds + means).float()
            last.bias[K:2 * K] += std[0].log()
        return self

    def use_scan(self, requested, device):
        """Choose the scan's back end for this kind of device, by name as --scan has it; returns the model itself.

        Raises UserError when that back end isn't there.
        """
        self.backends[torch.device(device).type] = choose_backend(requested, torch.device(device))
        return self

    def backend_for(self, device):
        """The scan's back end for a torch.device: the one chosen by `use_scan`, otherwise that of "auto"."""
        if device.type not in self.backends:
            self.use_scan("auto", device)
        return self.backends[device.type]

    def embed(self, x):
        """What the first layer sees of windows x (batch, time, feature_dim): (batch, time, d_model)."""
        return self.input_proj(x if self.relative is None else x - x[:, :1])

    def layer_outputs(self, x):
        """The outputs of all layers, a list of (batch, time, d_model)."""
        backend = self.backend_for(x.device)
        h, outputs = self.dropout(self.embed(x)), []              # h (batch, time, d_model)
        for layer in self.layers:
            h = layer(h, backend)
            outputs.append(h)
        return outputs

    def heads(self, h, x=None):
        """The outputs of the heads, {str(k): (…, n_outputs)}, for the last layer's output h (…, d_model).

        Those of a point head are the predictions; those of a mixture describe a distribution: see `mixture_of`.
        x: the windows that h is of, for outputs in data units; None leaves those of a relative model as differences.
        """
        h = self.final_norm(h)
        outputs = {k: head(h) for k, head in self.output_heads.items()}
        if x is None or self.relative is None:
            return outputs
        # The predictions of all components move by the first step, the logits and log scales before them by 0.
        shift = F.pad(x[:, :1].repeat(1, 1, max(self.mixture, 1)), (2 * self.mixture, 0))
        return {k: at_least_float32(output) + shift for k, output in outputs.items()}

    def mixture_of(self, k, outputs):
        """(logits, log_scales, means) of the mixture that the outputs of the head for horizon k (a str) describe."""
        return mixture_head.split(outputs, self.output_heads[k][-1].bias, self.feature_dim)

    def predictions(self, outputs):
        """The predictions {str(k): (…, feature_dim)} that head outputs {str(k): (…, n_outputs)} stand for."""
        if not self.mixture:
            return outputs
        mixtures = {k: self.mixture_of(k, output) for k, output in outputs.items()}
        return {k: mixture_head.mean(logits, means) for k, (logits, _, means) in mixtures.items()}

    def forward(self, x, raw=False, with_layers=False):
        """The predictions, {str(k): (batch, time, feature_dim)}; entry k at time t predicts x[t + k].

        raw: in their place the outputs of `heads`, of which losses are made. with_layers: a pair, these and the list of
        the layer outputs, each (batch, time, d_model). To ask for what no loss uses costs memory in a compiled model:
        its backward pass is given zeros as the gradient of every output.
        """
        layers = self.layer_outputs(x)
        outputs = self.heads(layers[-1], x)
        outputs = outputs if raw else self.predictions(outputs)
        return (outputs, layers) if with_layers else outputs

    def distribution(self, x):
        """The predicted distributions, {str(k): torch.distributions.MixtureSameFamily over x[t + k]}, each of batch
        shape (batch, time). Raises ValueError for a point head, which predicts none."""
        if not self.mixture:
            raise ValueError("this model has a point head (mixture=0), which predicts no distribution")
        outputs = self.forward(x, raw=True)
        return {k: mixture_head.distribution(*self.mixture_of(k, output)) for k, output in outputs.items()}

    def encode(self, x):
        """The outputs of the layers in order, each (batch, time, d_model), then the horizon-1 prediction."""
        layers = self.layer_outputs(x)
        return [*layers, self.predictions(self.heads(layers[-1], x))["1"]]

    def init_state(self, batch, device=None, dtype=None):
        """The recurrent state before the first step: a list of one (conv_state, h) per layer."""
        return [layer.mamba.init_state(batch, device, dtype) for layer in self.layers]

    @torch.no_grad()
    def prefill(self, x):
        """Run all time steps of x (batch, time, feature_dim) at once.

        Returns the head outputs after the last step, {str(k): (batch, n_outputs)} as `step` does, and the states from
        which `step` goes on. Those of a relative model, and all that `step` takes and gives afterwards, are differences
        from x[:, 0].
        """
        backend = self.backend_for(x.device)
        h, states = self.dropout(self.embed(x)), []
        for layer in self.layers:
            h, state = layer.prefill(h, backend)
            states.append(state)
        return self.heads(h[:, -1]), states

    def step(self, x, states, perturb=None):
        """One time step: x (batch, feature_dim) and the states to (head outputs, next states).

        The head outputs are those of `heads`, {str(k): (batch, n_outputs)}: the predictions of a point head.
        `perturb(i, h)`, when given, may change the output h (batch, d_model) of layer i, counted from 0, before the
        next layer sees it.
        """
        h, next_states = self.dropout(self.input_proj(x)), []
        for i, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            h, state = layer.step(h, state)
            if perturb is not None:
                h = perturb(i, h)
            next_states.append(state)
        return self.heads(h), next_states


# ---- how wrong a model is --------------------------------------------------------------------------------------


def autocast(device, enabled):
    """A region in which matrix products on a GPU take bfloat16; on a CPU, or when not enabled, nothing changes."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled and device.type == "cuda")


def horizon_mse(predictions, target):
    """The mean squared error per horizon, (n_horizons,): predictions["k"][:, t] against target[:, t + k].

    predictions: {str(k): (batch, time, feature_dim)}; target (batch, time, feature_dim).
    """
    return torch.stack([F.mse_loss(at_least_float32(p[:, :-int(k)]), target[:, int(k):])
                        for k, p in predictions.items()])


def horizon_errors(model, outputs, target):
    """The errors of head outputs, (n_measures, n_horizons): a row for each of model.measures.

    outputs: as from `forward(x, raw=True)`; target (batch, time, feature_dim). Row "mse" is the mean squared
    error of the predictions; row "nll", where the model predicts densities, their negative log-likelihood in nats per
    time step, computed in float32 whatever autocast does. A model with a `scaling` gets these in data units,
    and as one more row the error that it is trained by, in which each feature counts by its own std.
    """
    predictions, scale = model.predictions(outputs), model.scaling
    in_its_units = [horizon_mse(predictions, target)]
    errors = in_its_units if scale is None else [horizon_mse(
        {k: at_least_float32(p) * scale for k, p in predictions.items()}, target * scale)]
    if model.mixture:
        densities = [mixture_head.log_density(*model.mixture_of(k, output[:, :-int(k)]), target[:, int(k):])
                     for k, output in outputs.items()]
        nll = -torch.stack([density.mean() for density in densities])
        in_its_units = [nll]
        errors.append(nll if scale is None else nll + scale.log().sum())
    return torch.stack(errors if scale is None else errors + in_its_units)


@torch.no_grad()
def validation_errors(model, windows, starts, batch_size, amp):
    """`horizon_errors` over all windows, each counting equally: (n_measures, n_horizons) on the device.

    windows: a dataset.Windows; starts: (n_windows,) int64 on windows.starts_device; the model must be in eval mode.
    No number travels to the host, so a CUDA graph can capture the whole function.
    """
    sums = []
    for batch in starts.split(batch_size):
        x = windows.at(batch)
        with autocast(x.device, amp):
            outputs = model(x, raw=True)
        sums.append(horizon_errors(model, outputs, x) * len(batch))
    return torch.stack(sums).sum(0) / len(starts)


@torch.no_grad()
def window_errors(model, windows, starts, batch_size):
    """`horizon_errors` of each window by itself, (n_windows, n_measures, n_horizons) float64 on the CPU.

    Arguments as for `validation_errors`. Computed in float32.
    """
    errors = []
    for batch in starts.split(batch_size):
        x = windows.at(batch)
        outputs = model(x, raw=True)
        for i in range(len(batch)):
            one = {k: output[i:i + 1] for k, output in outputs.items()}
            errors.append(horizon_errors(model, one, x[i:i + 1]))
    return torch.stack(errors).double().cpu()


# ---- checkpoints -----------------------------------------------------------------------------------------------


def modern_keys(state_dict):
    """State-dict keys of older files (`_orig_mod.` of torch.compile, `output_proj.` before there were horizons)
    under today's names."""
    return {re.sub(r"^output_proj\.", "output_heads.1.", key.removeprefix("_orig_mod.")): value
            for key, value in state_dict.items()}


def model_from_state_dict(state_dict, dropout=0.1):
    """Build the model whose shapes these tensors have, and load them in float32.

    The sizes come from the tensors, not from the flags beside them: a file can't ask for more memory than it fills.
    Raises some exception (which one depends on where it shows) when the tensors don't make up a model, hold NaN or
    infinity, or declare more numbers than the file holds. Call it inside `reading`.
    """
    state_dict = modern_keys(state_dict)
    # A tensor is a view of a storage, and views may repeat it: without a check, a small file could describe huge ones.
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state_dict.values()}
    if sum(value.numel() * value.itemsize for value in state_dict.values()) > sum(storages.values()):
        raise ValueError("its tensors declare more numbers than the file holds")
    for key, value in state_dict.items():
        weights = value.float().contiguous()
        if not (value.is_floating_point() and value.numel() and weights.isfinite().all()):
            raise ValueError(f"{key} is empty or holds something other than finite numbers")
        state_dict[key] = weights

    d_model, feature_dim = state_dict["input_proj.weight"].shape
    d_inner, d_state = state_dict["layers.0.mamba.A_log"].shape
    d_conv = state_dict["layers.0.mamba.conv1d.weight"].shape[-1]
    d_ff = state_dict["output_heads.1.0.weight"].shape[0]
    n_layers = len({m[1] for key in state_dict if (m := re.match(r"layers\.(\d+)\.", key))})
    mixture = mixture_head.n_components(state_dict["output_heads.1.2.weight"].shape[0], feature_dim)
    max_horizon = max(int(m[1]) for key in state_dict if (m := re.match(r"output_heads\.(\d+)\.", key)))
    constant = {name for name in SIGNALS if f"layers.0.mamba.{name}" in state_dict}
    if "layers.0.mamba.dt_proj.weight" not in state_dict:
        constant.add("delta")
    # On the meta device the model takes no memory until it takes over the file's tensors.
    with torch.device("meta"):
        model = CausalTimeSeriesMamba(feature_dim, d_model, n_layers, d_state, d_conv, d_inner // d_model, d_ff,
                                      dropout, max_horizon, mixture, constant, relative="relative" in state_dict)
    model.load_state_dict(state_dict, assign=True)
    return model.requires_grad_()


@contextlib.contextmanager
def reading(path):
    """Turns whatever goes wrong in this block with the checkpoint at `path` into one UserError.

    Warnings are silent inside, since what is wrong with the file is said once. A GPU without memory says nothing
    against the file: that error passes.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (cli.UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # zipfile and torch let out whatever they stumble over in a hostile file
        raise cli.UserError(f"{path} is no checkpoint or is damaged ({reason(error)}); train it anew or give another "
                            "--checkpoint") from None


def reason(error):
    """The first sentence of a library's error: torch's advice on unpickling is long, and wrong here."""
    if "weights_only" in str(error) or "Weights only" in str(error):
        return "it holds pickled objects, which are never run"
    if isinstance(error, KeyError):
        return f"it has no {cli.one_line(error)[:160]}"
    return cli.one_line(error).split(". ")[0][:160] or type(error).__name__


def read_checkpoint(path, device="cpu"):
    """The dict of a checkpoint file, loaded without unpickling code; "args" is empty in files that have none.

    Raises UserError when the file is missing, damaged or no checkpoint.
    """
    if not Path(path).is_file():
        raise cli.UserError(f"{path} not found; train it first with: python masked_model_gpu_mamba_next.py "
                            f"--checkpoint {path}")
    with reading(path):
        check_archive(path)
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        checkpoint["args"] = dict(checkpoint.get("args", {}))
        # A number too long for Python to print fails here, not where it is shown.
        str([checkpoint["args"], checkpoint.get("epoch")])
        return checkpoint


def check_archive(path):
    """Raise an error unless the file is an archive as torch.save writes it, with every byte as it was written.

    torch.load looks at no checksum, so a flipped bit in a weight would load. It takes the memory that the archive's
    directory asks for, which is real where nothing is compressed and the checksums are right.
    """
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise ValueError(f"{info.filename} is compressed")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the bytes of {damaged} are not those that were written")


def load_checkpoint(path, device="cpu"):
    """Load a checkpoint for use: (model in eval mode on `device`, the flags of its training as a plain dict).

    Files from mamba-ssm training load on a CPU and the reverse; older key names load too. Raises UserError when the
    file is missing, damaged, holds pickled code or is no model of this project.
    """
    return model_of(read_checkpoint(path, device), path, device)


def model_of(checkpoint, path, device):
    """`load_checkpoint` of a file that is read already, by `read_checkpoint`."""
    args = checkpoint["args"]
    with reading(path):
        model = model_from_state_dict(checkpoint["model_state_dict"], args.get("dropout", 0.1))
        if "scaling" in checkpoint:
            model.unscaled(saved_scaling(checkpoint["scaling"], model.feature_dim))
        return model.to(device).eval(), args


def saved_scaling(saved, feature_dim):
    """The dataset.Scaling in a checkpoint, a dict of two tensors. Raises an error when it makes none."""
    scaling = dataset.Scaling(*(saved[name].double().cpu() for name in ("mean", "std")))
    shapes = [tuple(values.shape) for values in scaling]
    if shapes != [(feature_dim,)] * 2 or not all(v.isfinite().all() for v in scaling) or not (scaling.std > 0).all():
        raise ValueError("its scaling does not fit its weights")
    return scaling


def open_model(path, data_dir, device, scan, series=None):
    """Load a checkpoint and the data that it is used on: (model, the flags of its training, the dataset.Series).

    data_dir: as from --data-dir, or None for the data that it was trained on; scan: the back end as --scan names it.
    series: the data, when they are loaded already. A line says when they aren't those of its training. A model that was
    trained with --normalise comes as one of the data themselves. Raises UserError when either is missing or damaged,
    when they don't fit each other or when the back end isn't there.
    """
    checkpoint = read_checkpoint(path, device)
    model, args = model_of(checkpoint, path, device)
    model.use_scan(scan, device)
    own = trained_on(path, checkpoint)
    if series is None:
        if data_dir is None:
            print(f"data: {own}, those that {path} was trained on")
        series = dataset.load_series(data_dir or own)
    dataset.check_fits_model(series, model, path)
    crc32 = checkpoint.get("data_crc32")
    if isinstance(crc32, int) and crc32 != dataset.data_crc32(series):
        print(f"warning: {path} was trained on other data ({args.get('data_dir')}): its numbers on these say little "
              "about it")
        args = {**args, "test_steps": 0}  # of these data training held nothing back
    return model, {**args, "data_dir": str(own)} if "data_dir" in args else args, series


def data_suffix(series, args):
    """What names of files say of the data that a model is used on: nothing for those of its training, or where these
    aren't known. args: the flags of its training; series: both as from `open_model`."""
    known = series.source is not None and "data_dir" in args
    name = cli.data_name(series.source, args["data_dir"], Path(args["data_dir"]).parent) if known else ""
    return f"_{name}" if name else ""


def trained_on(path, checkpoint):
    """The path of the data that a model was trained on; checkpoint: its file at `path`, as from `read_checkpoint`.

    The file gives it in two ways, seen from the root (in older files from where training was started) and from the
    file's own folder: so the data are also found when the whole project was moved.
    """
    named, from_file = checkpoint["args"].get("data_dir"), checkpoint.get("data_dir")
    named = Path(named if isinstance(named, str) else "data")
    seen_from_file = Path(path).parent / (from_file if isinstance(from_file, str) else named)
    # FILE.npz:NAME names an array within a file.
    return next((where for where in (named, seen_from_file)
                 if where.exists() or Path(str(where).rpartition(":")[0]).is_file()), named)


def save_checkpoint(path, epoch, model_state_dict, optimizer_state_dict, train_loss, val_loss, args, **resume):
    """Write a checkpoint, whole or not at all. args: a plain dict of all flags; resume: what only resuming needs."""
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in args.items()}
    content = io.BytesIO()  # in memory first: on a full disk torch's own writer ends in a RuntimeError
    torch.save({"epoch": epoch, "model_state_dict": model_state_dict, "optimizer_state_dict": optimizer_state_dict,
                "train_loss": train_loss, "val_loss": val_loss, "args": plain, **resume}, content)
    with cli.writing(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def stem(checkpoint):
    """`NAME` of NAME.pt: the first part of the names of all files that belong to this checkpoint."""
    return Path(checkpoint).name.removesuffix(".pt")
