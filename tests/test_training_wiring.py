"""Training, what joins its parts: weights and signs of losses, each flag's effect, each number of the log, each panel.

The losses, the filter and the scan have their own tests. Here a fault would be a term subtracted, a flag ignored, a
column with another column's number, a figure of the wrong weights. Expected values come from loops in this file.
"""

import contextlib
import csv
import io
import itertools
import json
import math
import os
import platform
import re
import time
from types import SimpleNamespace

import matplotlib.colors
import numpy as np
import pytest
import torch

import dataset
import figures
import mamba_model
import masked_model_gpu_mamba_next as training
import mixture_head
import optimal_filter
import run_files
from mamba_model import CausalTimeSeriesMamba, MambaBlock, load_checkpoint

pytestmark = pytest.mark.usefixtures("undrawn")

NAME = "masked_model_gpu_mamba_next"
# 21 training windows in 3 steps of 7.
TINY = ["--d-model", "16", "--n-layers", "1", "--d-state", "4", "--d-ff", "16", "--seq-len", "64", "--stride", "128",
        "--batch-size", "8", "--epochs", "2", "--warmup-epochs", "1", "--device", "cpu"]


def parsed(*flags):
    return training.parse_args([*TINY, *flags])


# ---- losses


class Given(torch.nn.Module):
    """A model whose head outputs and layer outputs are given; it remembers its input. bias: that of its mixture."""

    def __init__(self, outputs, layers, bias=None):
        super().__init__()
        self.outputs, self.layers, self.bias = outputs, layers, bias
        self.mixture = 0 if bias is None else len(bias) // 6
        self.scaling = None

    def forward(self, x, raw=False, with_layers=False):
        self.input, self.asked_for_layers = x, with_layers
        assert raw
        return (self.outputs, self.layers) if with_layers else self.outputs

    def mixture_of(self, k, output):
        return mixture_head.split(output, self.bias, 4)

    predictions = mamba_model.CausalTimeSeriesMamba.predictions


def slowness_by_loops(outputs):
    ratios = []
    for h in outputs:
        h = h.double().numpy()
        batch, steps, width = h.shape
        moved = np.mean([(h[b, t + 1, d] - h[b, t, d]) ** 2
                         for b in range(batch) for t in range(steps - 1) for d in range(width)])
        spread = np.mean([np.var(h[:, :, d].ravel(), ddof=1) for d in range(width)])
        ratios.append(moved / (spread + 1e-6))
    return np.mean(ratios)


def test_slowness_against_loops():
    torch.manual_seed(0)
    # Channels far apart and of different size: the variance within a channel is not that over all numbers.
    outputs = [torch.randn(2, 9, 3).cumsum(1) * torch.tensor([1.0, 3, 9]) + torch.tensor([0.0, 50, -20]),
               torch.randn(2, 9, 3)]
    assert training.slowness_loss(outputs).item() == pytest.approx(slowness_by_loops(outputs), rel=1e-5)


def test_contrastive_draws_are_of_the_whole_batch(monkeypatch):
    asked, randint = [], torch.randint

    def recorded(high, size, **more):
        asked.append((high, tuple(size)))
        return randint(high, size, **more)

    monkeypatch.setattr(torch, "randint", recorded)
    training.contrastive_loss([torch.randn(3, 20, 5), torch.randn(2, 6, 5)], 0.1, 7)
    assert asked == [(3, (57,)), (19, (57,)), (60, (57, 7)), (2, (10,)), (5, (10,)), (12, (10, 7))]
    asked.clear()
    training.contrastive_loss([torch.randn(8, 2000, 2)], 0.1, 7)
    assert asked == [(8, (1024,)), (1999, (1024,)), (16000, (1024, 7))]


def test_contrastive_loss_is_the_mean_over_layers():
    a, b = torch.randn(2, 6, 5), torch.randn(2, 6, 5)
    torch.manual_seed(1)
    both = training.contrastive_loss([a, b], 0.2, 4).item()
    torch.manual_seed(1)
    singles = [training.contrastive_loss([h], 0.2, 4).item() for h in (a, b)]  # the same draws, in the same order
    assert both == pytest.approx(np.mean(singles), rel=1e-5)


@pytest.mark.parametrize("slowness, contrastive", [(0, 0), (0.3, 0), (0, 0.7), (0.3, 0.7)])
def test_the_loss_is_the_sum_of_its_weighted_terms(slowness, contrastive):
    torch.manual_seed(0)
    x = torch.randn(3, 12, 4)
    predictions = {"1": torch.randn(3, 12, 4), "2": 3 * torch.randn(3, 12, 4)}
    outputs = [torch.randn(3, 12, 5), torch.randn(3, 12, 5).cumsum(1)]
    args = parsed(
        "--max-horizon", "2", "--slowness-lambda", str(slowness), "--contrastive-lambda", str(contrastive),
        "--contrastive-temp", "0.4", "--contrastive-negatives", "9")
    torch.manual_seed(5)
    model = Given(predictions, outputs)
    loss, mse = training.make_loss(args)(model, x)
    assert model.asked_for_layers == bool(slowness or contrastive)  # a compiled model pays for what nobody uses
    torch.manual_seed(5)
    info_nce = training.contrastive_loss(outputs, 0.4, 9).item()
    errors = [np.mean([(predictions[str(k)][b, t] - x[b, t + k]).square().mean().item()
                       for b in range(3) for t in range(12 - k)]) for k in (1, 2)]
    assert mse.tolist() == pytest.approx(errors, rel=1e-5) and not mse.requires_grad
    expected = np.mean(errors) + slowness * slowness_by_loops(outputs) + contrastive * info_nce
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_mixture_is_trained_by_its_likelihood_and_measured_by_its_mean_too():
    """NLL in nats per step against torch's own mixtures, in float64; the last of the terms is what is trained on."""
    torch.manual_seed(0)
    x, bias = torch.randn(3, 12, 4), torch.randn(12)
    outputs = {"1": torch.randn(3, 12, 12), "2": torch.randn(3, 12, 12)}
    layers = [torch.randn(3, 12, 5).cumsum(1)]
    args = parsed("--mixture", "2", "--max-horizon", "2", "--slowness-lambda", "0.3")
    loss, errors = training.make_loss(args)(Given(outputs, layers, bias), x)
    mse, nll = [], []
    for k in (1, 2):
        mixture = mixture_head.distribution(*mixture_head.split(outputs[str(k)][:, :-k].double(), bias.double(), 4))
        nll.append(-mixture.log_prob(x[:, k:].double()).mean().item())
        mse.append((mixture.mean - x[:, k:]).square().mean().item())
    assert errors.tolist() == pytest.approx([*mse, *nll], rel=1e-5) and not errors.requires_grad
    assert loss.item() == pytest.approx(np.mean(nll) + 0.3 * slowness_by_loops(layers), rel=1e-5)


def test_a_rotation_turns_each_plane_by_its_own_angle_of_the_given_size():
    torch.manual_seed(0)
    eye = torch.eye(4).expand(20000, 4, 4)
    turned, target = training.augment(eye, 0.0, 0.02, 0.0)
    assert turned is target
    angles = torch.stack([(turned[:, i, j] - turned[:, j, i]) / 2 for i, j in itertools.combinations(range(4), 2)])
    assert angles.std(dim=1).tolist() == pytest.approx([0.02] * 6, rel=0.03)
    assert angles.mean(dim=1).abs().max() < 0.001
    assert torch.corrcoef(angles).fill_diagonal_(0).abs().max() < 0.04
    assert torch.allclose(turned @ turned.transpose(1, 2), eye, atol=1e-5)


def test_scale_and_noise_have_the_given_size_and_act_together():
    torch.manual_seed(0)
    x = torch.ones(5000, 3, 4)
    inputs, target = training.augment(x, 0.5, None, 0.2)
    logs = target[:, 0, 0].log()
    assert logs.std().item() == pytest.approx(0.2, rel=0.05) and abs(logs.mean().item()) < 0.02
    assert torch.equal(target, target[:, :1, :1].expand_as(target))
    noise = inputs - target
    assert noise.std().item() == pytest.approx(0.5, rel=0.02) and abs(noise.mean().item()) < 0.01
    assert abs(torch.corrcoef(noise.reshape(-1, 12).T).fill_diagonal_(0)).max() < 0.06  # each number has its own


def test_the_loss_compares_with_the_target_and_feeds_the_input():
    torch.manual_seed(0)
    x = torch.randn(2, 10, 3)
    model = Given({"1": torch.zeros(2, 10, 3)}, [])
    _, mse = training.make_loss(parsed("--aug-noise", "2"))(model, x)
    assert mse.item() == pytest.approx(x[:, 1:].square().mean().item(), rel=1e-5)  # noise isn't in the target
    assert (model.input - x).std().item() == pytest.approx(2, rel=0.2)
    _, mse = training.make_loss(parsed("--aug-scale", "1"))(model, x)
    assert mse.item() == pytest.approx(model.input[:, 1:].square().mean().item(), rel=1e-5)  # the scale is
    assert not torch.allclose(model.input, x)


# ---- what learns


def test_initial_step_sizes_have_the_log_uniform_law():
    torch.manual_seed(0)
    block = MambaBlock(16, d_state=1, d_conv=1, expand=1250)  # 20,000 channels
    dt = torch.nn.functional.softplus(block.dt_proj.bias.double()).detach().sort().values
    law = torch.linspace(math.log(0.001), math.log(0.1), len(dt), dtype=torch.float64)
    assert (dt[0].log() - law[0]).abs() < 0.002 and (dt[-1].log() - law[-1]).abs() < 0.002
    assert (dt.log() - law).abs().max() < 0.07  # Kolmogorov-Smirnov: 0.015 of the range
    weight = block.dt_proj.weight.detach()
    assert block.dt_rank == 1 and 0.999 < weight.max() <= 1 and -1 <= weight.min() < -0.999


@pytest.mark.parametrize("d_model, rank", [(16, 1), (17, 2), (64, 4)])
def test_initial_step_weights_have_the_ranks_size(d_model, rank):
    torch.manual_seed(0)
    block = MambaBlock(d_model, d_state=1, expand=64)
    assert block.dt_proj.weight.shape == (64 * d_model, rank)
    edge = 1 / math.sqrt(rank)
    assert 0.99 * edge < block.dt_proj.weight.max() <= edge and -edge <= block.dt_proj.weight.min() < -0.99 * edge


def test_a_step_is_adamw_on_clipped_gradients():
    """Three steps against AdamW written out (Loshchilov & Hutter 2019, algorithm 2) in float64."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).double()
    parameters = [p.detach().clone().numpy() for p in model.parameters()]
    optimizer = training.build_optimizer(
        [{"params": [model.weight], "lr": 0.1, "lr_factor": 1.0, "weight_decay": 0.01, "muon": False},
         {"params": [model.bias], "lr": 0.05, "lr_factor": 0.5, "weight_decay": 0.0, "muon": False}], 0.1,
        torch.device("cpu"))
    totals = torch.zeros(3, dtype=torch.float64)

    def loss_of(model, x):
        loss = size * (model(x) ** 2).sum()
        return loss, loss.detach()[None] / 4

    step = training.make_step(model, loss_of, optimizer, totals)
    first, second = [np.zeros_like(p) for p in parameters], [np.zeros_like(p) for p in parameters]
    losses, clipped = [], []
    for t, lr in enumerate((0.1, 0.2, 0.05), start=1):
        training.set_lr(optimizer, lr)
        # Adam is blind to a common factor of all gradients: the limit of 1 shows only beside a step that is below it.
        size = 1e-3 if t == 2 else 1
        x = torch.randn(5, 3, dtype=torch.float64)
        y = x.numpy() @ parameters[0].T + parameters[1]
        losses.append(size * (y ** 2).sum())
        gradients = [size * 2 * y.T @ x.numpy(), size * 2 * y.sum(axis=0)]
        norm = max(1, math.sqrt(sum((g ** 2).sum() for g in gradients)))
        clipped.append(norm > 1)
        step(x)
        for i, (rate, decay) in enumerate(((lr, 0.01), (lr / 2, 0.0))):
            g = gradients[i] / norm
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g ** 2
            parameters[i] = parameters[i] * (1 - rate * decay) - rate * (first[i] / (1 - 0.9 ** t)) / (
                np.sqrt(second[i] / (1 - 0.999 ** t)) + 1e-8)
            found = list(model.parameters())[i].detach().numpy()
            assert np.allclose(found, parameters[i], rtol=0, atol=1e-6), (t, i)
    assert totals.tolist() == pytest.approx([sum(losses), sum(losses) / 4, 3], rel=1e-6)
    assert clipped == [True, False, True]


@pytest.mark.parametrize("share, of_the_other", [(1.0, 0.0), (4 / 7, 3 / 7), (3 / 7, 4 / 7)])
def test_a_share_of_a_step_counts_by_its_windows(share, of_the_other):
    """The ranks' gradients are summed: this rank adds its share of the whole, and steps by the sum."""
    parameter, totals = torch.nn.Parameter(torch.zeros(())), torch.zeros(3)

    def with_the_other(parameters):
        assert [p.grad.item() for p in parameters] == pytest.approx([0.25 * share])
        parameters[0].grad += 0.25 * of_the_other

    step = training.make_step(None, lambda model, x: (0.25 * parameter + 3, torch.full((1,), 5.0)),
                              torch.optim.SGD([parameter], 1.0), totals, share, with_the_other)
    step(None)
    assert parameter.item() == pytest.approx(-0.25)
    assert totals.tolist() == pytest.approx([3 * share, 5 * share, 1])


def test_the_weight_of_the_newest_parameters_in_their_average():
    assert [training.averaging_weight(step, 0.9) for step in (0, 1, 8, 80, 10**6)] == pytest.approx(
        [9 / 10, 9 / 11, 9 / 18, 0.1, 0.1])


def test_the_learning_rate_against_its_formula():
    expected = [3.0 * (s + 1) / 4 if s < 4 else 1.5 * (1 + math.cos(math.pi * (s - 4) / 16)) for s in range(20)]
    assert [training.lr_at(s, 3.0, 4, 20) for s in range(20)] == pytest.approx(expected)


def test_a_checkpoint_names_its_data_as_seen_from_its_own_folder(tmp_path):
    args = parsed("--data-dir", str(tmp_path / "birds"), "--checkpoint", str(tmp_path / "runs" / "a.pt"))
    state = training.RunState(args, training.build_model(args, 3), 5, 123)
    assert (state.origin["data_dir"], state.origin["data_crc32"]) == (os.path.join("..", "birds"), 123)


def moments_of(parameters):
    return {i: {"step": torch.ones(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.ones_like(p)}
            for i, p in enumerate(parameters)}


@pytest.mark.parametrize("change, fits", [
    ({}, True), ({"step": 10, "epoch": 2}, True), ({"step": 14, "epoch": 2}, True), ({"step": 15, "epoch": 2}, False),
    ({"step": 9, "epoch": 2}, False), ({"step": -5, "epoch": -1}, False), ({"step": 10.0, "epoch": 2}, False),
    ({"epoch": math.nan}, False), ({"totals": 1}, False), ({"totals": -1}, False), ({"moments": None}, False),
    ({"step": 0, "epoch": 0, "moments": None}, True), ({"step": 0, "epoch": 0, "moments": "few"}, False),
    ({"moments": "few"}, False), ({"moments": "more"}, False), ({"moments": "narrow"}, False),
    ({"moments": "unnamed"}, False)])
def test_a_state_is_taken_over_only_whole(change, fits):
    args, change = parsed(), dict(change)
    state, good = (training.RunState(args, training.build_model(args, 3), 5, 123) for _ in range(2))
    moments = moments_of([p for group in state.optimizer.param_groups for p in group["params"]])
    match change.pop("moments", "whole"):
        case None:
            moments = {}
        case "few":
            moments.pop(0)
        case "more":
            moments[len(moments)] = moments[0]
        case "narrow":
            moments[0]["exp_avg"] = torch.zeros(1)
        case "unnamed":
            moments[0].pop("exp_avg_sq")
    totals = torch.ones(len(good.totals) + change.pop("totals", 0))
    saved = {**good.state_dict(), "step": 5, "epoch": 1, "totals": totals, "optimizer_state_dict": {"state": moments}}
    saved |= change
    if fits:
        state.restore(saved)
        assert state.step == saved["step"] and state.totals.eq(1).all()
        assert len(state.optimizer.state) == len(moments)
    else:
        with pytest.raises((ValueError, TypeError)):
            state.restore(saved)


@pytest.mark.parametrize("flags, message", [
    (["--max-horizon", "63"], None), (["--max-horizon", "64"], "must be longer than the largest horizon, 64"),
    (["--checkpoint", "a.pth"], "must end in .pt"), (["--checkpoint", "a"], "must end in .pt"),
    (["--checkpoint", "a_last.pt"], "choose another"), (["--checkpoint", "a_last_b.pt"], None)])
def test_flags_that_make_no_run_are_refused(flags, message, capsys):
    if message is None:
        parsed(*flags)
    else:
        with pytest.raises(SystemExit):
            parsed(*flags)
        assert message in capsys.readouterr().err


def test_a_warm_up_may_end_within_an_epoch():
    plan = training.Plan(parsed("--seq-len", "10", "--stride", "10", "--batch-size", "3", "--epochs", "4",
                                "--warmup-epochs", "1.5", "--lr", "0.5"), 200)
    assert (plan.steps_per_epoch, plan.warmup_steps, plan.total_steps) == (6, 9, 24)  # 18 windows
    assert [plan.lr(step) for step in (0, 8, 9)] == pytest.approx([0.5 / 9, 0.5, 0.5])


# ---- a run, watched


def watch_runs(patch):
    """From here on every step of a run is recorded in a list, and every figure that it saves in a dict: both."""
    steps, figs, rates = [], {}, []
    make_loss, set_lr = training.make_loss, training.set_lr

    def watched_make_loss(args):
        loss_of = make_loss(args)

        def watched(model, x):
            inputs = []
            hook = model.register_forward_pre_hook(lambda module, words: inputs.append(words[0].clone()))
            before = {name: value.clone() for name, value in model.state_dict().items()}
            loss, mse = loss_of(model, x)
            hook.remove()
            steps.append(SimpleNamespace(
                x=x.clone(), input=inputs[0], loss=loss.item(), mse=mse.tolist(), weights=before,
                dropout=[m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)],
                training=model.training, rates=rates[-1]))
            return loss, mse

        return watched

    def watched_set_lr(optimizer, lr):
        set_lr(optimizer, lr)
        rates.append([(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups])

    patch.setattr(training, "make_loss", watched_make_loss)
    patch.setattr(training, "set_lr", watched_set_lr)
    patch.setattr(figures, "save_all", lambda drawn: figs.update({path.name: fig for path, fig in drawn.items()}))
    return steps, figs


@pytest.fixture
def watch(monkeypatch):
    return lambda: watch_runs(monkeypatch)


def log_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# What a flag may change: each of these is compared between a run without and a run with it.
def facts_of(steps, folder):
    last = torch.load(folder / "a_last.pt", weights_only=True)
    log = log_rows(folder / "a_log.csv")
    return {
        "sizes": {name: tuple(value.shape) for name, value in last["model_state_dict"].items()},
        "initial weights": {name: value.numpy().tobytes() for name, value in steps[0].weights.items()},
        "windows": [step.x.numpy().tobytes() for step in steps],
        "input": (steps[0].input - steps[0].x).numpy().round(4).tobytes(),
        "rates": [step.rates for step in steps],
        "dropout": steps[0].dropout,
        "auxiliary loss": round(steps[0].loss - float(np.mean(steps[0].mse)), 5),
        "floor": [value for name, value in log[0].items() if name.startswith("floor_")],
        "columns": list(log[0]),
        "epochs": len(log),
        "average": "ema_state_dict" in last,
        "scan": json.loads((folder / "a_run.json").read_text())["scan"],
    }


SIZE = {"sizes", "initial weights"}
EFFECTS = [  # flags of both runs, flags of the second, what they change
    ([], ["--seq-len", "32"], {"windows", "input", "floor"}),
    ([], ["--stride", "64"], {"windows", "rates", "floor"}),
    ([], ["--val-fraction", "0.2"], {"windows", "floor"}),
    ([], ["--d-model", "32"], SIZE), ([], ["--d-state", "8"], SIZE), ([], ["--d-conv", "3"], SIZE),
    ([], ["--expand", "1"], SIZE), ([], ["--d-ff", "8"], SIZE),
    ([], ["--n-layers", "2"], SIZE | {"rates", "dropout"}),
    ([], ["--dropout", "0.3"], {"dropout"}),
    ([], ["--max-horizon", "2"], SIZE | {"rates", "columns", "floor"}),
    ([], ["--gate-lr-factor", "0.5"], {"rates"}), ([], ["--gate-lr-factor", "0"], {"rates"}),
    ([], ["--freeze-A"], {"rates"}), ([], ["--constant", "B"], SIZE | {"rates"}),
    ([], ["--slowness-lambda", "0.5"], {"auxiliary loss"}),
    ([], ["--contrastive-lambda", "0.5"], {"auxiliary loss"}),
    ([], ["--contrastive-temp", "0.5", "--contrastive-negatives", "3", "--aug-rotate-eps", "1"], set()),
    (["--contrastive-lambda", "0.5"], ["--contrastive-temp", "0.5"], {"auxiliary loss"}),
    (["--contrastive-lambda", "0.5"], ["--contrastive-negatives", "3"], {"auxiliary loss"}),
    ([], ["--aug-noise", "1"], {"input"}), ([], ["--aug-rotate"], {"input"}), ([], ["--aug-scale", "0.2"], {"input"}),
    (["--aug-rotate"], ["--aug-rotate-eps", "0.3"], {"input"}),
    ([], ["--batch-size", "3"], {"windows", "input", "rates"}),
    ([], ["--lr", "0.01"], {"rates"}), ([], ["--muon"], {"rates"}), ([], ["--warmup-epochs", "0"], {"rates"}),
    ([], ["--epochs", "3"], {"epochs", "windows", "rates"}),
    ([], ["--ema", "0.5"], {"average"}),
    ([], ["--no-compile", "--no-amp"], set()),
    ([], ["--no-train-eval"], {"columns"}),
    ([], ["--scan", "reference"], {"scan"}),
    (["--aug-noise", "1"], ["--seed", "43"], {"initial weights", "windows", "input"}),
]


@pytest.fixture(scope="module")
def facts_seen():
    """The facts of the runs without the flag, which most rows of the table share."""
    return {}


@pytest.mark.parametrize("common, flags, changed", EFFECTS, ids=lambda value: "_".join(sorted(value)) or "none")
def test_a_flag_changes_what_it_says_and_nothing_else(script, shared_data, tmp_path, watch, monkeypatch, facts_seen,
                                                      common, flags, changed):
    monkeypatch.setattr(training, "finish", lambda *_: None)
    steps, _ = watch()

    def facts(folder, *more):
        steps.clear()
        result = script(NAME, *TINY, "--data-dir", shared_data, "--checkpoint", folder / "a.pt", *common, *more)
        assert result.code == 0, result
        assert all(step.training for step in steps)
        return facts_of(steps, folder)

    plain = facts_seen.get(tuple(common)) or facts(tmp_path / "plain")
    facts_seen[tuple(common)] = plain
    other = facts(tmp_path / "other", *flags)
    assert {name for name in plain if plain[name] != other[name]} == changed


def test_the_step_seed_decides_the_dropout(script, shared_data, tmp_path, watch, monkeypatch):
    """From the same weights and windows, two seeds drop other channels, and one seed the same ones."""
    monkeypatch.setattr(training, "finish", lambda *_: None)
    build_model = training.build_model
    monkeypatch.setattr(training, "build_model",
                        lambda args, *size: build_model(SimpleNamespace(**{**vars(args), "seed": 1}), *size))
    losses = []
    for i, seed in enumerate((3, 3, 4)):
        steps, _ = watch()
        script(NAME, *TINY, "--data-dir", shared_data, "--checkpoint", tmp_path / f"{i}.pt", "--seed", seed,
               "--dropout", "0.5", "--lr", "1e-30", "--epochs", "1")
        losses.append([step.loss for step in steps])
        order = np.argsort([float(step.x.sum()) for step in steps])
        losses[-1] = [losses[-1][i] for i in order]
    assert losses[0] == losses[1] and losses[0] != losses[2]


HORIZONS = (1, 2, 3)
EPOCHS = 4


@pytest.fixture(scope="module")
def watched_run(shared_data, tmp_path_factory):
    """A run whose last epoch makes the weights worse, and everything that it did, wrote and drew."""
    folder, out, before = tmp_path_factory.mktemp("watched"), io.StringIO(), time.time()
    argv = [*TINY, "--data-dir", str(shared_data), "--checkpoint", str(folder / "run.pt"), "--epochs", str(EPOCHS),
            "--max-horizon", "3", "--slowness-lambda", "0.5", "--seed", "5", "--lr", "0.01"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr("sys.argv", [f"{NAME}.py", *argv])
        steps, figs = watch_runs(patch)
        set_lr = training.set_lr
        patch.setattr(training, "set_lr", lambda optimizer, lr: set_lr(optimizer, 0.3 if len(steps) >= 9 else lr))
        training.main(training.parse_args(argv))
    return SimpleNamespace(steps=steps, figs=figs, out=out.getvalue(), folder=folder, seconds=time.time() - before,
                           log=log_rows(folder / "run_log.csv"), series=dataset.load_series(shared_data),
                           best=torch.load(folder / "run.pt", weights_only=True),
                           last=torch.load(folder / "run_last.pt", weights_only=True))


def errors_by_loops(checkpoint, series, starts):
    """The MSE of each horizon over windows of 64 steps, by a plain loop over windows."""
    model = CausalTimeSeriesMamba(6, 16, 1, 4, d_ff=16, max_horizon=3)
    model.load_state_dict(checkpoint["model_state_dict"])
    model.eval()
    errors = {k: [] for k in HORIZONS}
    for start in starts:
        x = series.X[start:start + 64]
        with torch.no_grad():
            predictions = model(torch.from_numpy(x)[None])
        for k in HORIZONS:
            errors[k].append(np.mean((predictions[str(k)][0, :-k].numpy().astype(float) - x[k:]) ** 2))
    return [np.mean(errors[k]) for k in HORIZONS]


TRAIN_STARTS, VAL_STARTS = range(0, 2700 - 63, 128), range(2700, 3000 - 63, 128)


def test_every_number_of_the_log(watched_run):
    run = watched_run
    floor = optimal_filter.window_floors(optimal_filter.process_from_series(run.series), run.series,
                                      np.array(VAL_STARTS), 64, HORIZONS)
    names = ["epoch", "step", "lr", "seconds", "train_loss", "val_loss"]
    for kind in ("train_mse", "val_mse", "floor_mse", "excess_percent"):
        names += [f"{kind}_{k}" for k in HORIZONS]
    assert list(run.log[0]) == [*names, "train_eval_mse"] and len(run.log) == EPOCHS
    for i, row in enumerate(run.log):
        steps = run.steps[3 * i:3 * i + 3]
        assert row["epoch"] == str(i + 1) and row["step"] == str(3 * i + 3)
        s = 3 * i + 2  # the last step of the epoch, from 0; 3 of warm-up, 12 in all
        assert float(row["lr"]) == pytest.approx(0.01 if s < 3 else 0.005 * (1 + math.cos(math.pi * (s - 3) / 9)))
        assert float(row["train_loss"]) == pytest.approx(np.mean([step.loss for step in steps]), rel=1e-6)
        mses = [float(row[f"train_mse_{k}"]) for k in HORIZONS]
        assert mses == pytest.approx(np.mean([step.mse for step in steps], axis=0).tolist(), rel=1e-6)
        assert float(row["train_loss"]) > np.mean(mses) + 0.01  # the slowness term is in one and not in the others
        assert float(row["val_loss"]) == pytest.approx(np.mean([float(row[f"val_mse_{k}"]) for k in HORIZONS]))
        for k in HORIZONS:
            assert float(row[f"floor_mse_{k}"]) == pytest.approx(floor["mse"][k], rel=1e-9)
            assert float(row[f"excess_percent_{k}"]) == pytest.approx(
                100 * (float(row[f"val_mse_{k}"]) / floor["mse"][k] - 1), rel=1e-6)
    for s, step in enumerate(run.steps[:9]):  # the last epoch's are the fixture's
        assert step.rates[0][0] == pytest.approx(0.01 * (s + 1) / 3 if s < 3 else
                                                 0.005 * (1 + math.cos(math.pi * (s - 3) / 9)))
    seconds = [float(row["seconds"]) for row in run.log]
    assert seconds[0] > 0 and sorted(seconds) == seconds and seconds[-1] <= run.seconds
    # The best epoch's weights are in run.pt, the last one's in run_last.pt: both give what the log says of them.
    for checkpoint, row in ((run.best, run.log[run.best["epoch"] - 1]), (run.last, run.log[-1])):
        found = [float(row[f"val_mse_{k}"]) for k in HORIZONS]
        assert found == pytest.approx(errors_by_loops(checkpoint, run.series, VAL_STARTS), rel=1e-4)
        trained = np.mean(errors_by_loops(checkpoint, run.series, TRAIN_STARTS))
        assert float(row["train_eval_mse"]) == pytest.approx(trained, rel=1e-4)
        assert checkpoint["train_loss"] == float(row["train_loss"])
        assert checkpoint["val_loss"] == float(row["val_loss"])
    losses = [float(row["val_loss"]) for row in run.log]
    assert run.best["epoch"] == 1 + int(np.argmin(losses)) < EPOCHS and run.last["best_loss"] == min(losses)


def test_every_entry_of_the_record(watched_run):
    record = json.loads((watched_run.folder / "run_run.json").read_text())
    assert set(record) == {"command", "flags", "git_commit", "started", "seed", "processes", "device", "scan",
                           "parameters", "versions"}
    assert record["command"].startswith(f"python {NAME}.py --d-model 16 --n-layers 1 ") and record["seed"] == 5
    assert record["command"].endswith(" --lr 0.01") and record["processes"] == 1
    assert record["device"] == f"cpu ({platform.machine()})" and record["scan"] == "cpu"
    assert record["parameters"] == sum(v.numel() for v in watched_run.last["model_state_dict"].values())
    started = time.mktime(time.strptime(record["started"][:19], "%Y-%m-%dT%H:%M:%S"))
    assert abs(started - time.time()) < 600
    flags = {**record["flags"], "epochs": watched_run.best["args"]["epochs"]}
    assert flags == watched_run.best["args"] == watched_run.last["args"] and flags["d_conv"] == 4 and flags["seed"] == 5
    assert watched_run.best["record"] == watched_run.last["record"] == record
    versions = record["versions"]
    assert versions["python"] == platform.python_version() and versions["torch"] == torch.__version__
    assert versions["numpy"] == np.__version__ and versions["cuda"] == torch.version.cuda
    assert set(versions) == {"python", "torch", "cuda", "numpy", "scipy", "numba"}


def test_what_is_printed_of_a_run(watched_run):
    def line(row):
        excess = ", ".join(f"{float(row[f'excess_percent_{k}']):.2f}" for k in HORIZONS)
        return (f"epoch {row['epoch']}/{EPOCHS}: training {float(row['train_loss']):.4f}, validation "
                f"{float(row['val_loss']):.4f}, {excess} % above optimal at horizons {', '.join(map(str, HORIZONS))}")

    run = watched_run
    lines = run.out.splitlines()
    n = sum(v.numel() for v in run.last["model_state_dict"].values())
    assert f"{run.folder / 'run.pt'}: {n:,} parameters on cpu" in lines
    assert ("21 training windows in 3 training steps of 7, 2 validation windows of 64 time steps from step 2,700 on"
            in lines)
    for row in (run.log[0], run.log[-1]):
        assert line(row) in lines
    assert f"best: {line(run.log[run.best['epoch'] - 1])}" in lines
    assert lines[-1] == "wrote " + ", ".join(str(run.folder / name) for name in (
        "run.pt", "run_last.pt", "run_log.csv", "run_run.json"))


def test_the_table_of_eval(script, shared_data, watched_run):
    run = watched_run
    out = script(NAME, "--eval", run.folder / "run.pt", "--data-dir", shared_data, "--test-steps", 0).out
    n = sum(v.numel() for v in run.last["model_state_dict"].values())
    assert f"{run.folder / 'run.pt'}: epoch {run.best['epoch']}, {n:,} parameters" in out
    table = [re.split(r" {2,}", line.strip()) for line in out.splitlines()[-5:]]
    assert table[0] == ["horizon", "validation MSE", "optimal", "excess"]
    row = run.log[run.best["epoch"] - 1]
    for k, cells in zip(HORIZONS, table[2:], strict=True):
        assert cells == [str(k), f"{float(row[f'val_mse_{k}']):.4f}", f"{float(row[f'floor_mse_{k}']):.4f}",
                         f"{float(row[f'excess_percent_{k}']):+.2f} %"]
    assert "ignored" not in out
    # The windows are the run's own, unless a flag says otherwise; flags that only training has are said to be ignored.
    out = script(NAME, "--eval", run.folder / "run.pt", "--data-dir", shared_data, "--stride", "50", "--test-steps",
                 0, "--lr", "1e-3", "--freeze-A", "--no-amp").out
    assert "--eval trains nothing: --freeze-A, --lr ignored\n" in out
    other = errors_by_loops(run.best, run.series, range(2700, 3000 - 63, 50))
    found = [float(re.split(r" {2,}", line.strip())[1]) for line in out.splitlines()[-3:]]
    assert found == pytest.approx(other, rel=1e-3) and found[0] != pytest.approx(float(row["val_mse_1"]), rel=1e-3)


def test_the_loss_figure(watched_run):
    run = watched_run
    fig = run.figs["run_loss.png"]
    left, right, rate = fig.axes
    epochs = list(range(1, EPOCHS + 1))
    assert fig._suptitle.get_text() == "run"
    assert (left.get_title(), left.get_xlabel(), left.get_ylabel(), left.get_yscale()) == (
        "Loss", "epoch", "mean squared error (data units²)", "log")
    assert (right.get_title(), right.get_xlabel(), right.get_ylabel(), right.get_yscale()) == (
        "Excess over the optimal filter", "epoch", "validation MSE over the filter's − 1 (%)", "log")
    colors, entries = figures.run_colors(3), []
    for i, k in enumerate(HORIZONS):
        column = {kind: [float(row[f"{kind}_{k}"]) for row in run.log]
                  for kind in ("train_mse", "val_mse", "floor_mse", "excess_percent")}
        trained, validated, floor = left.get_lines()[3 * i:3 * i + 3]
        assert trained.get_label() == f"horizon {k}, training"
        assert validated.get_label() == f"horizon {k}, validation"
        assert floor.get_label() == f"horizon {k}, optimal filter" and floor.get_linestyle() == ":"
        for line, kind in ((trained, "train_mse"), (validated, "val_mse")):
            assert list(line.get_xdata()) == epochs and list(line.get_ydata()) == column[kind]
        assert set(floor.get_ydata()) == set(column["floor_mse"])
        excess = right.get_lines()[i]
        assert list(excess.get_xdata()) == epochs and list(excess.get_ydata()) == column["excess_percent"]
        low, end = min(column["excess_percent"]), column["excess_percent"][-1]
        entries.append(f"horizon {k}\n{low:.2f} % at best, {end:.2f} % at the end")
        assert excess.get_label() == f"horizon {k}" and low < end
        for line in (trained, validated, floor, excess):
            assert np.allclose(matplotlib.colors.to_rgb(line.get_color()), colors[i])
        assert trained.get_alpha() == 0.4 and validated.get_alpha() is None
    best = min(run.log, key=lambda row: float(row["val_loss"]))["epoch"]
    entries += ["training", "validation", "optimal filter", f"best epoch ({best})", "learning rate"]
    legend, = fig.legends
    assert [text.get_text() for text in legend.get_texts()] == entries
    for line, color in zip(legend.get_lines(), colors, strict=False):
        assert np.allclose(matplotlib.colors.to_rgb(line.get_color()), color)
    assert legend.get_lines()[3].get_alpha() == 0.4 and legend.get_lines()[4].get_alpha() is None
    assert legend.get_lines()[5].get_linestyle() == ":" and legend.get_lines()[6].get_linestyle() == "--"
    for ax in (left, right):
        assert ax.get_legend() is None and ax.get_xlim() == (1, EPOCHS)
        assert list(ax.get_lines()[-1].get_xdata()) == [int(best)] * 2
        assert ax.get_lines()[-1].get_linestyle() == "--"
    assert rate.get_ylabel() == "learning rate" and rate.get_ylim()[0] == 0
    drawn, = rate.get_lines()
    assert list(drawn.get_xdata()) == epochs and list(drawn.get_ydata()) == [float(row["lr"]) for row in run.log]


@pytest.mark.parametrize("first, last, ticks", [(1, 3, [1, 2, 3]), (1, 10, [1, 2, 4, 6, 8, 10]), (4, 4, [4]),
                                                (1, 40, [1, 5, 10, 15, 20, 25, 30, 35, 40]),
                                                (7, 9, [7, 8, 9])])
def test_the_axis_of_epochs_begins_at_the_first_one(first, last, ticks):
    _, axes = figures.new_figure()
    run_files.epoch_axis(axes[0, 0], first, last)
    assert list(axes[0, 0].get_xticks()) == ticks
    assert axes[0, 0].get_xlim() == ((first, last) if last > first else (first - 0.5, first + 0.5))


def test_the_legend_of_many_horizons_covers_no_curve():
    horizons = [1, 2, 4, 8, 16, 32, 64]
    rows = [{"epoch": i, "lr": 1e-3, "val_loss": 1.0, **{f"{kind}_{k}": 5.0 + i for k in horizons for kind in (
        "train_mse", "val_mse", "floor_mse", "excess_percent")}} for i in (1, 2)]
    fig = figures.laid_out(run_files.draw_loss(rows, horizons, "a"))
    fig.canvas.draw()
    legend = fig.legends[0].get_window_extent()
    assert not any(ax.get_tightbbox().overlaps(legend) for ax in fig.axes)
    assert legend.x0 >= 0 and legend.x1 <= fig.bbox.x1 and legend.y0 >= 0


def test_the_loss_figure_of_one_horizon_without_a_floor():
    row = {"epoch": 1, "lr": 1e-3, "val_loss": 4.0, "train_mse_1": 3.0, "val_mse_1": 4.0, "floor_mse_1": None}
    fig = run_files.draw_loss([row], [1], "a")
    assert [(line.get_label(), list(line.get_ydata()), line.get_marker()) for line in fig.axes[0].get_lines()[:2]] == [
        ("training", [3.0], "o"), ("validation", [4.0], "o")]
    assert [text.get_text() for text in fig.legends[0].get_texts()] == [
        "horizon 1", "training", "validation", "best epoch (1)", "learning rate"]


@pytest.mark.parametrize("i, start", [(0, 2700), (1, 2700), (2, 2828)])  # two windows: their middle is the first
def test_the_prediction_figures(watched_run, i, start):
    run = watched_run
    fig = run.figs[f"run_prediction_{i}.png"]
    strip, data, predicted, error = fig.axes[:4]
    end, first = start + 64, start + 1  # the first step of a window is predicted by nothing
    model, _ = load_checkpoint(run.folder / "run.pt", "cpu")  # the best, not the last
    window = run.series.X[start:end]
    with torch.no_grad():
        prediction = model(torch.from_numpy(window)[None])["1"][0, :-1].numpy()
    window = window[1:]
    for ax, values, name in ((data, window, "data"), (predicted, prediction, "predicted"),
                             (error, prediction - window, "error")):
        image, = ax.images
        assert np.allclose(image.get_array(), values.T, atol=1e-4), name  # (feature, time): time to the right
        assert image.origin == "lower" and image.get_extent() == [first - 0.5, end - 0.5, -0.5, 5.5]
        assert ax.get_ylabel() == f"{name}\nfeature"
        assert image.get_clim() == pytest.approx((-np.percentile(abs(window), 99), np.percentile(abs(window), 99)))
        assert image.colorbar.ax.get_ylabel() == "data units" and image.get_cmap().name == "RdBu_r"
    image, = strip.images
    assert image.get_extent() == [first - 0.5, end - 0.5, 0, 1]
    assert np.allclose(image.get_array()[0], figures.circle_colors(4)[run.series.states[first:end]])
    assert error.get_xlabel() == "time step" and data.get_xlim() == error.get_xlim()
    assert fig._suptitle.get_text() == f"run: next-step prediction, validation window {i}"
    legend, = fig.legends
    assert [t.get_text() for t in legend.get_texts()] == [str(c) for c in sorted(set(run.series.states[first:end]))]


def test_figures_show_three_windows_and_no_more_than_512_steps(monkeypatch, tmp_path, script, shared_data, watch):
    _, figs = watch()
    script(NAME, *TINY, "--data-dir", shared_data, "--checkpoint", tmp_path / "a.pt", "--seq-len", "700",
           "--val-fraction", "0.4", "--epochs", "1", "--no-train-eval")
    for i, start in enumerate((1800, 2056, 2184)):  # of 1800, 1928, 2056, 2184: the first, a middle one and the last
        extent = figs[f"a_prediction_{i}.png"].axes[1].images[0].get_extent()
        assert extent[:2] == [start + 700 - 512 - 0.5, start + 700 - 0.5]


def test_the_figures_use_the_average(script, shared_data, tmp_path, watch):
    """With --ema, NAME.pt holds the average, the log is measured with it, and the figures are drawn with it."""
    _, figs = watch()
    result = script(NAME, *TINY, "--data-dir", shared_data, "--checkpoint", tmp_path / "a.pt", "--ema", "0.9",
                    "--max-horizon", "3", "--lr", "0.01")
    assert result.code == 0, result
    series, last = dataset.load_series(shared_data), torch.load(tmp_path / "a_last.pt", weights_only=True)
    average = {"model_state_dict": last["ema_state_dict"]}
    row = log_rows(tmp_path / "a_log.csv")[-1]
    assert [float(row[f"val_mse_{k}"]) for k in HORIZONS] == pytest.approx(
        errors_by_loops(average, series, VAL_STARTS), rel=1e-4)
    assert float(row["train_eval_mse"]) == pytest.approx(np.mean(errors_by_loops(average, series, TRAIN_STARTS)), 1e-4)
    model, _ = load_checkpoint(tmp_path / "a.pt", "cpu")
    with torch.no_grad():
        prediction = model(torch.from_numpy(series.X[2700:2764])[None])["1"][0, :-1].numpy()
    assert np.allclose(figs["a_prediction_0.png"].axes[2].images[0].get_array(), prediction.T, atol=1e-4)


def test_the_seed_of_batches_and_their_jitter():
    starts = np.arange(0, 800, 16)

    def batches_of(epoch, seed=42):
        return dataset.epoch_batches(starts, 810, 10, 16, 128, seed, epoch)

    batches = batches_of(0)
    shift = np.sort(batches.flatten().numpy())[:, None] - starts[None]
    assert ((shift >= 0) & (shift < 16)).any(axis=1).all() and batches.max() <= 800
    seen = np.concatenate([batches_of(e).flatten().numpy() % 16 for e in range(40)])
    counts = np.bincount(seen, minlength=16)
    assert counts.min() > 80 and counts.max() < 190  # each shift as often as the others
    assert not torch.equal(batches, batches_of(0, seed=1))
    assert not torch.equal(batches_of(1, seed=1), batches_of(0, seed=2))  # no epoch of one seed is one of another


def test_flags_given_are_known_from_defaults():
    assert training.parse_args([]).flags_given == []
    args = training.parse_args(["--lr", "0.001", "--no-amp", "--checkpoint", "b.pt", "--scan", "auto"])
    assert args.flags_given == ["checkpoint", "lr", "no_amp", "scan"] and args.lr == 0.001 and args.no_amp


def test_a_progress_line_without_a_floor():
    row = {"epoch": 3, "train_loss": 1.23456, "val_loss": 2.34567, "excess_percent_1": None}
    assert run_files.progress_line(row, 7, [1]) == "epoch 3/7: training 1.2346, validation 2.3457"


def test_a_progress_line_names_its_horizons_where_there_are_several():
    row = {"epoch": 3, "train_loss": 1.0, "val_loss": 2.0, "excess_percent_1": 1.234, "excess_percent_4": 5.0}
    start = "epoch 3/7: training 1.0000, validation 2.0000"
    assert run_files.progress_line(row, 7, [1]) == f"{start}, 1.23 % above optimal"
    assert run_files.progress_line(row, 7, [1, 4]) == f"{start}, 1.23, 5.00 % above optimal at horizons 1, 4"
