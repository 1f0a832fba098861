"""Training: losses against brute force, what is frozen stays frozen, resuming, files and refusals."""

import csv
import io
import itertools
import json
import math
import signal
import sys
import threading
import types

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import TINY_DATA

import cli
import dataset
import figures
import masked_model_gpu_mamba_next as training
import run_files
from mamba_model import CausalTimeSeriesMamba, load_checkpoint

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = ["--d-model", "16", "--n-layers", "2", "--d-state", "4", "--d-ff", "16", "--seq-len", "64", "--stride", "128",
        "--batch-size", "8", "--epochs", "3", "--warmup-epochs", "1", "--device", "cpu"]


def flags(shared_data, path, *more):
    return [*TINY, "--data-dir", str(shared_data), "--checkpoint", str(path), *more]


def weights(path):
    return torch.load(path, weights_only=True)["model_state_dict"]


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- pure functions


def test_slowness_is_blind_to_scale_and_zero_for_constants():
    h = torch.randn(2, 50, 4).cumsum(1)
    assert training.slowness_loss([h]).item() == pytest.approx(training.slowness_loss([7 * h]).item(), rel=1e-4)
    assert training.slowness_loss([torch.randn(2, 1, 4).expand(2, 50, 4)]).item() == pytest.approx(0, abs=1e-6)
    assert training.slowness_loss([torch.randn(4, 5000, 4)]).item() == pytest.approx(2, rel=0.05)


def test_contrastive_loss_against_brute_force(monkeypatch):
    h = torch.randn(3, 20, 5)
    drawn = []
    original = torch.randint

    def record(*args, **kwargs):
        drawn.append(original(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(torch, "randint", record)
    loss = training.contrastive_loss([h], 0.3, 6).item()
    rows, steps, negatives = drawn
    unit = h / h.norm(dim=-1, keepdim=True)
    flat, total = unit.reshape(60, 5), 0.0
    for i, (r, s) in enumerate(zip(rows.tolist(), steps.tolist(), strict=True)):
        positive = math.exp(float(unit[r, s] @ unit[r, s + 1]) / 0.3)
        others = sum(math.exp(float(unit[r, s] @ flat[j]) / 0.3) for j in negatives[i].tolist())
        total -= math.log(positive / (positive + others))
    assert loss == pytest.approx(total / len(steps), rel=1e-4)


def test_augmentation():
    torch.manual_seed(0)
    x = torch.randn(4, 100, 6)
    inputs, target = training.augment(x, 0.0, None, 0.0)
    assert inputs is x and target is x
    inputs, target = training.augment(x, 0.5, None, 0.0)
    assert target is x and (inputs - x).std().item() == pytest.approx(0.5, rel=0.1)
    inputs, target = training.augment(x, 0.0, 0.3, 0.0)
    assert torch.equal(inputs, target) and not torch.allclose(inputs, x)
    assert torch.allclose(inputs.norm(dim=-1), x.norm(dim=-1), rtol=1e-4)  # a rotation keeps lengths
    inputs, _ = training.augment(x, 0.0, None, 0.2)
    ratio = inputs / x
    assert torch.allclose(ratio, ratio[:, :1, :1].expand_as(ratio), rtol=1e-4) and ratio.std() > 0.05


def test_learning_rate_schedule():
    values = [training.lr_at(step, 2.0, 10, 110) for step in range(110)]
    assert values[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert values[10] == 2.0 and values[60] == pytest.approx(1.0)
    assert all(a > b for a, b in itertools.pairwise(values[10:])) and 0 < values[-1] < 0.001
    assert training.lr_at(0, 1.0, 0, 1) == 1.0


def test_parameter_groups():
    model = CausalTimeSeriesMamba(3, 16, 2, 4, d_ff=8)
    groups = training.parameter_groups(model, 1.0, 0.01, False)
    name_of = {id(p): name for name, p in model.named_parameters()}
    seen = {}
    for group in groups:
        for parameter in group["params"]:
            seen[name_of[id(parameter)]] = group
    assert seen.keys() == dict(model.named_parameters()).keys()
    for name, group in seen.items():
        gate = "x_proj" in name or "dt_proj" in name
        undecayed = name.endswith(("A_log", ".D", "bias")) or "norm" in name
        assert group["lr_factor"] == (0.01 if gate else 1.0), name
        assert group["weight_decay"] == (0.0 if undecayed else training.WEIGHT_DECAY), name


def test_slow_gates_keep_their_ratio_through_the_whole_schedule():
    model = CausalTimeSeriesMamba(3, 16, 1, 4, d_ff=8)
    optimizer = torch.optim.AdamW(training.parameter_groups(model, 1e-3, 0.01, False))
    for step in range(100):
        training.set_lr(optimizer, training.lr_at(step, 1e-3, 10, 100))
        rates = {group["lr_factor"]: group["lr"] for group in optimizer.param_groups}
        assert rates[0.01] == rates[1.0] * 0.01


@pytest.mark.parametrize("n, batch", [(10, 4), (12, 4), (3, 8), (11, 3), (1, 8)])
def test_an_epoch_sees_every_window_in_equal_steps(n, batch):
    starts = np.arange(n) * 100

    def batches_of(epoch):
        return dataset.epoch_batches(starts, n * 100 + 10, 10, 1, batch, 42, epoch)

    batches = batches_of(0)
    assert set(batches.flatten().tolist()) == set(starts.tolist())
    assert batches.shape[1] <= batch
    assert batches.numel() - n < batches.shape[0]  # almost nothing is seen twice
    assert torch.equal(batches, batches_of(0))
    assert n < 3 or not torch.equal(batches, batches_of(1))


def test_snapshot_copies_and_renews_the_copy_in_place():
    state = {"a": torch.zeros(3), "group": [{"lr": 0.1, "step": torch.tensor(1.0)}]}
    first = run_files.snapshot(state)
    state["a"] += 5
    state["group"][0] |= {"lr": 0.2, "step": torch.tensor(2.0)}
    assert first["a"].tolist() == [0, 0, 0] and first["group"][0] == {"lr": 0.1, "step": torch.tensor(1.0)}
    second = run_files.snapshot(state, first)
    assert second["a"] is first["a"] and second["a"].tolist() == [5, 5, 5]
    assert second["group"][0] == {"lr": 0.2, "step": torch.tensor(2.0)}
    state["a"] += 1
    assert second["a"].tolist() == [5, 5, 5]


# ---- whole runs


@pytest.mark.drawn
def test_a_run_and_its_files(script, shared_data, tmp_path):
    result = script("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "run.pt", "--max-horizon", "3"))
    assert result.code == 0 and "above optimal" in result.out
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["run.pt", "run_last.pt", "run_log.csv", "run_run.json", "run_loss.png",
         *(f"run_prediction_{i}.png" for i in range(3))])
    log = rows(tmp_path / "run_log.csv")
    assert [row["epoch"] for row in log] == ["1", "2", "3"]
    for row in log:
        mses = [float(row[f"val_mse_{k}"]) for k in (1, 2, 3)]
        assert float(row["val_loss"]) == pytest.approx(np.mean(mses))
        for k, mse in zip((1, 2, 3), mses, strict=True):
            assert float(row[f"excess_percent_{k}"]) == pytest.approx(100 * (mse / float(row[f"floor_mse_{k}"]) - 1))
            assert mse > float(row[f"floor_mse_{k}"])  # below the exact filter there is only a leak
    best = min(log, key=lambda row: float(row["val_loss"]))
    checkpoint = torch.load(tmp_path / "run.pt", weights_only=True)
    assert checkpoint["epoch"] == int(best["epoch"]) and checkpoint["val_loss"] == float(best["val_loss"])
    assert checkpoint["args"]["max_horizon"] == 3
    record = json.loads((tmp_path / "run_run.json").read_text())
    assert record["seed"] == 42 and "--max-horizon 3" in record["command"]
    result = script("masked_model_gpu_mamba_next", "--eval", tmp_path / "run.pt", "--data-dir", shared_data)
    assert result.code == 0 and f"{float(best['val_mse_1']):.4f}" in result.out and record["command"] in result.out


def test_training_learns(script, shared_data, tmp_path):
    script("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "a.pt", "--epochs", "15", "--lr", "0.01"))
    log = rows(tmp_path / "a_log.csv")
    assert float(log[-1]["val_loss"]) < 0.8 * float(log[0]["val_loss"])


@pytest.mark.parametrize("more, frozen", [
    (["--gate-lr-factor", "0"], (".x_proj.", ".dt_proj.")), (["--freeze-A"], (".A_log",)),
    (["--gate-lr-factor", "0", "--freeze-A"], (".x_proj.", ".dt_proj.", ".A_log"))])
def test_what_is_frozen_stays_bit_identical(script, shared_data, tmp_path, more, frozen):
    argv = flags(shared_data, tmp_path / "a.pt", *more)
    assert script("masked_model_gpu_mamba_next", *argv).code == 0
    initial = training.build_model(training.parse_args(argv), 6).state_dict()
    for path in (tmp_path / "a.pt", tmp_path / "a_last.pt"):
        for name, value in weights(path).items():
            same = torch.equal(value, initial[name])
            assert same == any(part in name for part in frozen), name
    record = json.loads((tmp_path / "a_run.json").read_text())  # of the size of the model, whatever of it learns
    assert record["parameters"] == sum(value.numel() for value in initial.values())


def test_ema_averages_the_weights_of_all_steps(script, shared_data, tmp_path, monkeypatch):
    """The saved weights against a float64 loop over those after each step, taken from a run without --ema."""
    seen, make_step = [], training.make_step

    def watched(model, *args):
        step = make_step(model, *args)

        def run(x):
            step(x)
            seen.append(snapshot_of(model))

        seen.append(snapshot_of(model))
        return run

    def snapshot_of(model):
        return {name: value.double().clone() for name, value in model.state_dict().items()}

    monkeypatch.setattr(training, "make_step", watched)
    script("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "plain.pt"))
    monkeypatch.undo()
    average, *rest = seen
    for i, new in enumerate(rest):
        decay = min(0.6, (1 + i) / (10 + i))
        average = {name: decay * average[name] + (1 - decay) * new[name] for name in new}
    script("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "ema.pt", "--ema", "0.6"))
    last = torch.load(tmp_path / "ema_last.pt", weights_only=True)
    plain = weights(tmp_path / "plain_last.pt")
    best = torch.load(tmp_path / "ema.pt", weights_only=True)
    assert best["epoch"] == 3  # so it is the last epoch's average that was kept
    for name, value in last["model_state_dict"].items():
        assert torch.equal(value, plain[name])
        assert (last["ema_state_dict"][name] - average[name]).abs().max() < 1e-6
        assert torch.equal(best["model_state_dict"][name], last["ema_state_dict"][name])
    assert not torch.equal(best["model_state_dict"]["input_proj.weight"], plain["input_proj.weight"])
    printed = script("masked_model_gpu_mamba_next", "--eval", tmp_path / "ema.pt", "--data-dir", shared_data).out
    assert f"{best['val_loss']:.4f}" in printed


def test_resume_refuses_damaged_averages_and_moments(script, refused, shared_data, tmp_path):
    script("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "a.pt", "--ema", "0.6"))
    whole = (tmp_path / "a_last.pt").read_bytes()
    for damage in (lambda state: state.pop("ema_state_dict"),
                   lambda state: state["ema_state_dict"].pop("input_proj.weight"),
                   lambda state: state["ema_state_dict"]["input_proj.weight"].fill_(math.nan),
                   lambda state: state["optimizer_state_dict"]["state"].clear(),
                   lambda state: state["optimizer_state_dict"]["state"].pop(3),
                   lambda state: state["optimizer_state_dict"]["state"][0].pop("exp_avg_sq"),
                   lambda state: state["optimizer_state_dict"]["state"][0]["exp_avg"].resize_(2)):
        state = torch.load(io.BytesIO(whole), weights_only=True)
        damage(state)
        torch.save(state, tmp_path / "a_last.pt")
        line = refused("masked_model_gpu_mamba_next", "--resume", "--checkpoint", tmp_path / "a.pt", "--epochs", "4")
        assert "a_last.pt is no last state of a run, or is damaged" in line and "start the run anew" in line


def test_no_train_eval_and_no_compile(script, shared_data, tmp_path):
    script("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "a.pt"))
    script("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "b.pt", "--no-train-eval", "--no-compile"))
    assert "train_eval_mse" in rows(tmp_path / "a_log.csv")[0]
    assert "train_eval_mse" not in rows(tmp_path / "b_log.csv")[0]
    for name, value in weights(tmp_path / "a_last.pt").items():
        assert torch.equal(value, weights(tmp_path / "b_last.pt")[name])


def interrupt_after(monkeypatch, steps):
    """Deliver a real SIGINT to this process during the given training step."""
    original, count = training.set_lr, [0]

    def set_lr(*args):
        count[0] += 1
        if count[0] == steps:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(training, "set_lr", set_lr)


@pytest.mark.parametrize("stop_at, more", [  # 3 steps an epoch: in the first, at its end, at the second's end
    (1, []), (3, []), (6, []), (4, ["--ema", "0.8"])])
def test_interrupted_and_resumed_equals_uninterrupted(script, shared_data, tmp_path, monkeypatch, stop_at, more):
    assert threading.current_thread() is threading.main_thread()
    script("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "whole.pt", *more))
    interrupt_after(monkeypatch, stop_at)
    result = script("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "part.pt", *more))
    assert result.code == 130 and f"stopped after training step {stop_at} of 9" in result.out and result.err == ""
    monkeypatch.undo()
    result = script("masked_model_gpu_mamba_next", "--resume", "--checkpoint", tmp_path / "part.pt")
    assert result.code == 0 and "resumed" in result.out
    for end in (".pt", "_last.pt"):
        whole, part = weights(tmp_path / f"whole{end}"), weights(tmp_path / f"part{end}")
        assert all(torch.equal(whole[name], part[name]) for name in whole)
    strip = [[row[c] for c in row if c != "seconds"] for row in rows(tmp_path / "whole_log.csv")]
    assert strip == [[row[c] for c in row if c != "seconds"] for row in rows(tmp_path / "part_log.csv")]


@pytest.fixture(scope="module")
def mapped_data(shared_data, tmp_path_factory):
    """The small series as one that is read from its file."""
    import markov_circles_timeseries as generator

    folder = tmp_path_factory.mktemp("mapped")
    generator.main(generator.parse_args([*TINY_DATA, "--uncompressed", "--data-dir", str(folder)]))
    assert dataset.mapping_of(dataset.load_series(folder).X) is not None
    return folder


def test_loader_processes_change_nothing(script, shared_data, mapped_data, tmp_path, monkeypatch):
    """Nor does where the data live, nor an interruption in mid-epoch: the same windows, the same dropout."""
    script("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "memory.pt", "--num-workers", "2"))
    result = script("masked_model_gpu_mamba_next", *flags(mapped_data, tmp_path / "mapped.pt"))
    assert result.code == 0, result.err
    interrupt_after(monkeypatch, 4)
    result = script("masked_model_gpu_mamba_next", *flags(mapped_data, tmp_path / "workers.pt", "--num-workers", "2"))
    assert "stopped after training step 4" in result.out and "not used" not in result.out
    monkeypatch.undo()
    result = script("masked_model_gpu_mamba_next", "--resume", "--checkpoint", tmp_path / "workers.pt")
    assert result.code == 0, result.err
    expected = weights(tmp_path / "memory_last.pt")
    for name in ("mapped", "workers"):
        found = weights(tmp_path / f"{name}_last.pt")
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


def test_resume_refuses_other_flags_and_other_data(script, refused, shared_data, data_dir, rewrite_data, tmp_path):
    script("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "a.pt"))
    resume = ("masked_model_gpu_mamba_next", "--resume", "--checkpoint", tmp_path / "a.pt")
    assert "started with --lr 0.001" in refused(*resume, "--lr", "0.5")
    rewrite_data(X=dataset.load_series(shared_data).X + 1)
    assert "is not the data" in refused(*resume, "--data-dir", data_dir)
    assert "not found" in refused("masked_model_gpu_mamba_next", "--resume", "--checkpoint", tmp_path / "none.pt")


def test_a_taken_name_is_refused_and_untouched(script, refused, shared_data, tmp_path):
    script("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "a.pt"))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert "exists already" in refused("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "a.pt"))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_default_names_keep_runs_apart(tmp_path, monkeypatch):
    """Whatever changes the result is in the name, and what doesn't is not."""
    monkeypatch.chdir(tmp_path)

    def name(*argv):
        return training.parse_args(argv).checkpoint.name

    seed_command = "--d-state 32 --seq-len 1024 --stride 256 --no-compile --no-train-eval"
    assert name() == name(*seed_command.split(), "--num-workers", "3", "--scan", "reference", "--device", "cpu",
                          "--log-dir", "x", "--data-dir", "./data") == "model_next.pt"
    for argv, end in (("--max-horizon 64", "max_horizon64"), ("--gate-lr-factor 0", "gate_lr_factor0"),
                      ("--gate-lr-factor 0.01", "gate_lr_factor0.01"), ("--freeze-A", "freeze_A"),
                      ("--constant C,delta", "constantdelta-C"),
                      ("--seed 2", "seed2"), ("--lr 3e-4 --seed 1234567", "lr0.0003_seed1234567"),
                      ("--lr 0.00012345678", "lr0.00012345678"), ("--epochs 3 --no-amp", "epochs3_no_amp"),
                      ("--data-dir data/subspace4", "subspace4"), ("--data-dir a/my_birds/data", "my_birds")):
        assert name(*argv.split()) == f"model_next_{end}.pt"
    flags = {action.dest: action for action in training.build_parser()._actions}
    for dest in set(flags) - {*cli.WITHOUT_EFFECT, "help", "data", "data_dir"}:
        action = flags[dest]
        value = "0.37" if action.type in (cli.probability, cli.fraction) else "B" if dest == "constant" else str(
            (action.default or 0) * 2 + 2)
        assert dest in name(action.option_strings[0], *([] if action.nargs == 0 else [value])), dest
    long = name(*[word for flag in ("--aug-noise", "--aug-scale", "--aug-rotate-eps", "--contrastive-lambda", "--lr",
                                    "--slowness-lambda", "--contrastive-temp") for word in (flag, "0.123456789")])
    assert len(long) < 130
    # What goes on or is looked at has the flags of its own start.
    assert name("--resume", "--epochs", "9") == name("--eval", "--seq-len", "512") == "model_next.pt"
    assert name("--eval", "--test-steps", "9") == "model_next.pt"
    (tmp_path / "model_next_epochs9.pt").touch()
    assert name("--resume", "--epochs", "9") == "model_next_epochs9.pt"


def test_divergence_names_step_rate_and_checkpoint(refused, shared_data, tmp_path):
    line = refused("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "a.pt", "--lr", "1e30"))
    assert "NaN or infinite at step" in line and "learning rate" in line
    assert f"the last good checkpoint is {tmp_path / 'a_last.pt'} (the state at the start)" in line
    model, _ = load_checkpoint(tmp_path / "a_last.pt", "cpu")
    assert all(p.isfinite().all() for p in model.parameters())


def poison_step(monkeypatch, bad, then=lambda: None):
    """Make the weights NaN by the update of step `bad`, counted from 1: the loss is NaN from the next one on."""
    original, count = training.set_lr, [0]

    def set_lr(optimizer, lr):
        count[0] += 1
        original(optimizer, float("nan") if count[0] == bad else lr)
        if count[0] == bad + 1:
            then()

    monkeypatch.setattr(training, "set_lr", set_lr)


@pytest.mark.parametrize("saved_each_epoch", [True, False])
def test_the_last_good_checkpoint_is_good(script, refused, shared_data, tmp_path, monkeypatch, saved_each_epoch):
    monkeypatch.setattr(training, "SAVE_EVERY_SECONDS", 0 if saved_each_epoch else 1000)
    script("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "good.pt", "--lr", "0.01"))
    poison_step(monkeypatch, 4)  # the first of the second epoch's three
    line = refused("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "bad.pt", "--lr", "0.01"))
    # A save looks at the weights first, which the poisoned step has spoiled; without it the next step's loss tells.
    step = 3 if saved_each_epoch else 4
    rate = training.lr_at(step, 0.01, 3, 9)
    assert f"at step {step + 1} (epoch 2, learning rate {rate:.3g})" in line and f"{tmp_path / 'bad.pt'} (" in line
    bad = torch.load(tmp_path / "bad.pt", weights_only=True)
    assert bad["epoch"] == 1 and bad["val_loss"] == float(rows(tmp_path / "good_log.csv")[0]["val_loss"])
    assert all(value.isfinite().all() for value in bad["model_state_dict"].values())
    last = torch.load(tmp_path / "bad_last.pt", weights_only=True)
    assert last["step"] == (3 if saved_each_epoch else 0)
    assert all(value.isfinite().all() for value in last["model_state_dict"].values())


@pytest.mark.parametrize("steps_later", [0, 1])
def test_an_interruption_does_not_save_what_diverged(refused, shared_data, tmp_path, monkeypatch, steps_later):
    """Neither when the loss is NaN already, nor when only the weights are."""
    poison_step(monkeypatch, 1, (lambda: signal.raise_signal(signal.SIGINT)) if steps_later else lambda: None)
    if not steps_later:
        interrupt_after(monkeypatch, 1)
    line = refused("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "a.pt"))
    assert f"at step {1 + steps_later} (epoch 1" in line
    last = torch.load(tmp_path / "a_last.pt", weights_only=True)
    assert last["step"] == 0 and all(value.isfinite().all() for value in last["model_state_dict"].values())


def test_divergence_after_resuming_in_mid_epoch(script, refused, shared_data, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 4)
    script("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "a.pt"))
    monkeypatch.undo()
    poison_step(monkeypatch, 1)
    line = refused("masked_model_gpu_mamba_next", "--resume", "--checkpoint", tmp_path / "a.pt")
    assert "at step 6 (epoch 2" in line and str(tmp_path / "a.pt") in line


def test_divergence_before_the_first_epoch_ends_names_the_state_that_was_saved(script, refused, shared_data, tmp_path,
                                                                               monkeypatch):
    interrupt_after(monkeypatch, 2)
    script("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "a.pt"))
    monkeypatch.undo()
    original = training.set_lr
    monkeypatch.setattr(training, "set_lr", lambda optimizer, lr: original(optimizer, math.inf))
    line = refused("masked_model_gpu_mamba_next", "--resume", "--checkpoint", tmp_path / "a.pt")
    assert f"the last good checkpoint is {tmp_path / 'a_last.pt'} (the state after step 2)" in line


def test_a_run_resumed_and_stopped_before_its_epoch_ends_keeps_its_losses(script, shared_data, tmp_path, monkeypatch):
    resume = ["--resume", "--checkpoint", tmp_path / "a.pt"]
    for steps, more in ((4, flags(shared_data, tmp_path / "a.pt")), (1, resume)):
        interrupt_after(monkeypatch, steps)
        assert script("masked_model_gpu_mamba_next", *more).code == 130
        monkeypatch.undo()
    last, (row,) = torch.load(tmp_path / "a_last.pt", weights_only=True), rows(tmp_path / "a_log.csv")
    assert last["step"] == 5 and last["best_loss"] == float(row["val_loss"])
    assert (last["train_loss"], last["val_loss"]) == (float(row["train_loss"]), float(row["val_loss"]))


def test_a_resumed_run_replaces_its_best_weights_only_by_better_ones(script, shared_data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "finish", lambda *_: None)
    script("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "a.pt", "--lr", "0.01"))
    before = (tmp_path / "a.pt").read_bytes()
    original = training.set_lr
    monkeypatch.setattr(training, "set_lr", lambda optimizer, lr: original(optimizer, 0.3))
    resume = ("masked_model_gpu_mamba_next", "--resume", "--checkpoint", tmp_path / "a.pt", "--epochs", "5")
    assert script(*resume).code == 0
    log = [float(row["val_loss"]) for row in rows(tmp_path / "a_log.csv")]
    assert len(log) == 5 and min(log) == min(log[:3]) and (tmp_path / "a.pt").read_bytes() == before


def test_the_count_of_good_steps_ends_at_the_first_bad_one():
    """Even when a later loss is finite again."""
    parameter = torch.nn.Parameter(torch.ones(()))
    losses = iter([1.0, float("inf"), 2.0, 3.0])
    totals = torch.zeros(3)
    step = training.make_step(None, lambda model, x: (parameter * 0 + next(losses), torch.ones(1)),
                              torch.optim.SGD([parameter], 0.1), totals)
    for _ in range(4):
        step(None)
    assert totals[-1] == 1 and not totals[0].isfinite()


# ---- following a run


class WriterStub:
    """What the script uses of torch.utils.tensorboard.SummaryWriter, remembered."""

    def __init__(self, log_dir, purge_step=None):
        self.log_dir, self.purge_step, self.scalars, self.images, self.closed = log_dir, purge_step, [], {}, False
        self.summaries, self.file_writer = [], types.SimpleNamespace(add_summary=lambda s: self.summaries.append(s))

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))

    def add_image(self, tag, image, step, dataformats):
        self.images[tag] = (image, step, dataformats)

    def flush(self):
        pass

    def close(self):
        self.closed = True


@pytest.mark.drawn
def test_log_dir_has_every_curve_and_figure(script, shared_data, tmp_path, monkeypatch):
    made = []

    def make(*args, **kwargs):
        made.append(WriterStub(*args, **kwargs))
        return made[-1]

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=make))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.summary", types.SimpleNamespace(
        hparams=lambda flags, metrics: (flags, metrics)))
    argv = flags(shared_data, tmp_path / "a.pt", "--log-dir", str(tmp_path / "logs"), "--max-horizon", "2")
    assert script("masked_model_gpu_mamba_next", *argv).code == 0
    writer, = made
    assert writer.log_dir == str(tmp_path / "logs" / "a") and writer.closed
    hyperparameters, metrics = writer.summaries  # by which runs can be sorted
    assert {"val_loss"} == set(metrics) and not set(hyperparameters) & {"device", "checkpoint", "resume", "log_dir"}
    assert (hyperparameters["max_horizon"], hyperparameters["freeze_A"], hyperparameters["lr"]) == (2, False, 1e-3)
    assert hyperparameters["data_dir"] == str(shared_data)
    log = rows(tmp_path / "a_log.csv")
    expected = {(name, float(row[name]), int(row["epoch"])) for row in log for name in row
                if name not in ("epoch", "step")}
    assert set(writer.scalars) == expected and len(writer.scalars) == len(expected)
    assert writer.images.keys() == {"loss", "prediction_0", "prediction_1", "prediction_2"}
    for tag, (image, step, dataformats) in writer.images.items():
        assert step == 3 and dataformats == "HWC"
        assert np.array_equal(image, matplotlib.image.imread(tmp_path / f"a_{tag}.png")[..., :3])
    script("masked_model_gpu_mamba_next", "--resume", "--checkpoint", tmp_path / "a.pt", "--epochs", "4")
    assert made[1].purge_step == 4 and {step for _, _, step in made[1].scalars} == {4}


def test_log_dir_without_tensorboard_takes_nothing(refused, shared_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    argv = flags(shared_data, tmp_path / "out" / "a.pt", "--log-dir", str(tmp_path / "logs"))
    assert "pip install tensorboard" in refused("masked_model_gpu_mamba_next", *argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.drawn
def test_the_csv_alone_redraws_the_curves(script, shared_data, tmp_path):
    script("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "a.pt", "--max-horizon", "2"))
    columns = run_files.log_columns(types.SimpleNamespace(horizons=[1, 2], measures=("mse",)), True)
    log = run_files.read_log(tmp_path / "a_log.csv", columns, 3)
    figures.save(run_files.draw_loss(log, [1, 2], "a"), tmp_path / "again.png")
    again, drawn = (matplotlib.image.imread(tmp_path / name) for name in ("again.png", "a_loss.png"))
    assert np.array_equal(again, drawn)  # their metadata differ


def test_the_record_keeps_every_start(script, shared_data, tmp_path):
    script("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "a.pt", "--seed", "5"))
    first = json.loads((tmp_path / "a_run.json").read_text())
    assert first["seed"] == 5 and first["versions"]["torch"] == torch.__version__ and "cpu" in first["device"]
    assert first["git_commit"] is None or len(first["git_commit"]) >= 12
    for epochs in ("4", "5"):
        script("masked_model_gpu_mamba_next", "--resume", "--checkpoint", tmp_path / "a.pt", "--epochs", epochs)
    record = json.loads((tmp_path / "a_run.json").read_text())
    resumed = record.pop("resumed")
    assert record == first and [again["step"] for again in resumed] == [9, 12]
    assert [again["command"].endswith(f"--epochs {n}") for again, n in zip(resumed, (4, 5), strict=True)] == [True] * 2
    out = script("masked_model_gpu_mamba_next", "--eval", tmp_path / "a.pt", "--data-dir", shared_data).out
    for text in (first["command"], first["started"], f"torch {torch.__version__}", first["device"], "at step 12",
                 resumed[1]["command"]):
        assert text in out


def test_a_warm_up_longer_than_the_run_is_said(script, shared_data, tmp_path):
    result = script("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "a.pt", "--warmup-epochs", "6"))
    assert "longer than the run: the learning rate rises to 0.0005, not to --lr 0.001" in result.out
    assert float(rows(tmp_path / "a_log.csv")[-1]["lr"]) == pytest.approx(0.0005)


# ---- bad input


@pytest.mark.parametrize("more, message", [
    (["--seq-len", "4000"], "longer than the series"), (["--seq-len", "400"], "validation part has 300 steps"),
    (["--seq-len", "64", "--max-horizon", "64"], "longer than the largest horizon"),
    (["--epochs", "0"], "above 0"), (["--d-model", "-1"], "above 0"), (["--lr", "nan"], "above 0"),
    (["--dropout", "1"], "from 0 up to"), (["--val-fraction", "1"], "between 0 and 1"), (["--no-such-flag"], "--help"),
    (["--epoch", "3"], "--help"), (["--device", "tpu"], "is no device"), (["--checkpoint", "a.txt"], "must end in .pt"),
    (["--scan", "cuda"], "CUDA"), (["--checkpoint", "/dev/null/a.pt"], "can't write"),
    (["--checkpoint", "a_last.pt"], "choose another")])
def test_bad_flags(refused, shared_data, tmp_path, more, message):
    assert message in refused("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "a.pt"), *more)
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_without_bfloat16(refused, script, shared_data, tmp_path, monkeypatch):
    """It is refused before anything is written, unless --no-amp is given."""
    def refuse(backend, device):
        raise cli.UserError(f"back end {backend}, device {device}: give --no-amp")

    for module in (training, run_files):
        monkeypatch.setattr(module, "check_bfloat16", refuse)
    argv = flags(shared_data, tmp_path / "a.pt", "--epochs", "1", "--warmup-epochs", "0")
    assert "back end cpu, device cpu: give --no-amp" in refused("masked_model_gpu_mamba_next", *argv)
    assert list(tmp_path.iterdir()) == []
    assert script("masked_model_gpu_mamba_next", *argv, "--no-amp").code == 0
    evaluate = "--eval", tmp_path / "a.pt", "--device", "cpu", "--test-steps", "0"
    assert "give --no-amp" in refused("masked_model_gpu_mamba_next", *evaluate)
    assert script("masked_model_gpu_mamba_next", *evaluate, "--no-amp").code == 0


def test_cuda_without_a_gpu(refused, shared_data, tmp_path):
    argv = flags(shared_data, tmp_path / "a.pt", "--device", "cuda")
    assert "no CUDA GPU" in refused("masked_model_gpu_mamba_next", *argv)


def test_bad_data_leaves_nothing(refused, rewrite_data, shared_data, tmp_path):
    X = dataset.load_series(shared_data).X.copy()
    X[5, 2] = np.nan
    out = tmp_path / "out"
    assert "NaN" in refused("masked_model_gpu_mamba_next", *flags(rewrite_data(X=X), out / "a.pt"))
    assert not any(out.glob("*"))
