"""Interventions after training: signals of a model's blocks held at their mean over the data.

A signal (Δ, B, C or z, see `mamba_model`) that is held is the same at all time steps, per channel or state, as one that
`--constant` names. But the rest of the model was trained with the signal as it was, so that the error which this adds
is what the trained model loses without it, not what a model needs it for: one that is trained without it may do as
well.
"""

import copy

import torch

import dataset
import mamba_model
import representations
import unseen

MEAN_STEPS = 100_000  # of the data, about, that the means are taken over


@torch.inference_mode()
def signal_means(model, X, seq_len, last):
    """The mean of every signal over windows of X[:last], one behind the other: a list of {name: (width,)} by layer.

    The means of delta are those of the step size, after softplus.
    """
    n = max(1, last // seq_len)
    starts = [start * seq_len for start in range(0, n, max(1, n * seq_len // MEAN_STEPS))]
    device, backend = next(model.parameters()).device, model.backend_for(next(model.parameters()).device)
    sums = [dict.fromkeys(mamba_model.SIGNALS, 0.0) for _ in model.layers]
    per_batch = max(1, representations.STEPS_IN_BATCH[device.type] // seq_len)
    for first in range(0, len(starts), per_batch):
        batch = starts[first:first + per_batch]
        h = model.embed(dataset.gather(X, batch, seq_len).to(device))
        for total, layer in zip(sums, model.layers, strict=True):
            signals = layer.mamba.signals(layer.norm(h))
            for name in total:
                total[name] = total[name] + signals[name].double().mean((0, 1)) * len(batch) / len(starts)
            h = layer(h, backend)
    return [{name: value.float() for name, value in total.items()} for total in sums]


@torch.no_grad()
def held_block(block, means):
    """A MambaBlock like `block` in which the signals that `means` {name: (width,)} gives are these constants."""
    names = [name for name in mamba_model.SIGNALS if name in means or name in block.constant]
    held = mamba_model.MambaBlock(block.d_model, block.d_state, block.d_conv, block.d_inner // block.d_model, names)
    held.to(block.D.device)
    weights = dict(block.state_dict())
    if "z" in means and "z" not in block.constant:
        weights["in_proj.weight"] = weights["in_proj.weight"][:block.d_inner]
    varying = [name for name in block.x_dbl_sizes() if name not in block.constant]
    if varying:
        rows = weights.pop("x_proj.weight").split([block.x_dbl_sizes()[name] for name in varying])
        kept = [part for name, part in zip(varying, rows, strict=True) if name not in means]
        weights |= {"x_proj.weight": torch.cat(kept)} if kept else {}
    if "delta" in means:
        weights.pop("dt_proj.weight", None)
        weights["dt_proj.bias"] = means["delta"] + torch.log(-torch.expm1(-means["delta"]))  # softplus gives it back
    weights |= {name: value for name, value in means.items() if name != "delta"}
    held.load_state_dict(weights)
    return held


def held_model(model, names, means):
    """A copy of the model in which the signals `names` are held at their means, as from `signal_means`."""
    held = copy.deepcopy(model)
    for layer, own in zip(held.layers, means, strict=True):
        layer.mamba = held_block(layer.mamba, {name: own[name] for name in names})
    return held.eval()


def variants(names):
    """Which signals are held together: each of the names alone, and all of them."""
    return [(name,) for name in names] + ([tuple(names)] if len(names) > 1 else [])


def held_rows(model, part, names, means, as_trained, progress=None):
    """The model as it was trained and with signals held, on one test series: `unseen.compared`, a list of dicts.

    part: an unseen.Unseen; as_trained: the model's `unseen.as_report` on it; names: as for `variants`.
    """
    settings = {"as trained": [as_trained]}
    for held in variants(names):
        settings[f"{', '.join(held)} held"] = [unseen.as_report(held_model(model, held, means), part)]
        if progress:
            progress()
    return unseen.compared(settings)
