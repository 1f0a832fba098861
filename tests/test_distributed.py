"""Training by several processes under torchrun: the same weights as one process, one voice, and a common end.

Run as a script, this file is a worker: the training script with a fault built in, or in float64.
"""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "masked_model_gpu_mamba_next.py"
# 21 training windows in 3 steps of 7: two processes can't halve them.
TINY = ["--d-model", "16", "--n-layers", "2", "--d-state", "4", "--d-ff", "16", "--seq-len", "64", "--stride", "128",
        "--batch-size", "8", "--epochs", "3", "--warmup-epochs", "1", "--dropout", "0", "--device", "cpu"]


# ---- the worker


def work(fault, argv):
    """The training script's own main, in this process: in float64, or with a fault on one process."""
    import cli
    import dataset
    import masked_model_gpu_mamba_next as training
    import run_files

    sys.argv = ["masked_model_gpu_mamba_next.py", *argv]
    rank, steps = int(os.environ.get("RANK", 0)), [0]
    load_series, set_lr, rebuild = dataset.load_series, training.set_lr, training.model_from_state_dict

    def load_float64(data_dir):
        series = load_series(data_dir)
        return dataclasses.replace(series, X=series.X.astype(np.float64))

    def rebuild_float64(state_dict, dropout):
        model = rebuild(state_dict, dropout).double()
        model.load_state_dict(state_dict)
        return model

    def faulty_set_lr(optimizer, lr):
        steps[0] += 1
        if fault == "stop" and rank == 1 and steps[0] == 5:
            signal.raise_signal(signal.SIGTERM)
        if fault == "vanish" and rank == 1 and steps[0] == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "slow":
            print(f"step {steps[0]}", flush=True)
            time.sleep(0.2)
        set_lr(optimizer, float("nan") if fault == "nan" and steps[0] == 5 else lr)

    def full_disk(path, columns, row):
        raise cli.UserError(f"can't write {path}: no space left on device")

    if fault == "stop":
        training.SAVE_EVERY_SECONDS = -1  # saves after each step, too, change nothing
    if fault in ("float64", "stop"):
        torch.set_default_dtype(torch.float64)
        dataset.load_series, training.model_from_state_dict = load_float64, rebuild_float64  # those in use are float32
        training.finish = lambda *_: None  # draws with a float32 model
    if fault == "no data" and rank == 1:
        argv = [*argv, "--data-dir", "nowhere"]
    if fault == "full disk":
        run_files.append_row = full_disk
    training.set_lr = faulty_set_lr
    training.run(training.main, training.parse_args(argv))


# ---- the tests


def start(tmp_path, program, *argv, processes=2):
    """Start a program under torchrun, the output of each process in a file of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               "--redirects=3", f"--log-dir={tmp_path / 'output'}", str(program), *map(str, argv)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"  # no test depends on how this machine resolves its own name
    return subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outputs(tmp_path, stream):
    """What each process wrote in the latest start, by rank."""
    latest = max((tmp_path / "output").glob("*/attempt_0"), key=os.path.getmtime)
    return [(latest / str(rank) / f"{stream}.log").read_text() for rank in range(len(list(latest.iterdir())))]


def torchrun(tmp_path, program, *argv, processes=2):
    process = start(tmp_path, program, *argv, processes=processes)
    try:
        _, report = process.communicate(timeout=100)
    finally:
        process.kill()
    return SimpleNamespace(code=process.returncode, report=report, out=outputs(tmp_path, "stdout"),
                           err=outputs(tmp_path, "stderr"))


def flags(data, path, *more):
    return [*TINY, "--data-dir", data, "--checkpoint", path, *more]


def assert_same_state(path, other, tolerance):
    saved, expected = (torch.load(p, weights_only=True) for p in (path, other))
    assert saved["step"] == expected["step"]
    for name, value in expected["model_state_dict"].items():
        assert torch.allclose(saved["model_state_dict"][name], value, rtol=0, atol=tolerance), name
    for loss in ("val_loss", "train_loss"):
        assert saved[loss] == pytest.approx(expected[loss], rel=max(tolerance / 10, 1e-7)), loss


def assert_same_log(path, other, tolerance):
    """Every number of every epoch but the time that it took."""
    logs = []
    for log in (path, other):
        with open(log, newline="") as file:
            logs.append([{name: float(cell) for name, cell in row.items() if name != "seconds"}
                         for row in csv.DictReader(file)])
    for found, expected in zip(*logs, strict=True):
        assert found == pytest.approx(expected, rel=tolerance)


def test_two_processes_end_with_the_weights_of_one(shared_data, tmp_path):
    argv = flags(shared_data, "one.pt", "--max-horizon", "2")
    worker = [sys.executable, __file__, "float64"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*worker, *map(str, argv)], env=env, cwd=tmp_path, check=True, capture_output=True)
    initial = torch.load(tmp_path / "one.pt", weights_only=True)["model_state_dict"]["input_proj.weight"]
    assert initial.dtype == torch.float64

    argv[argv.index("one.pt")] = "two.pt"
    result = torchrun(tmp_path, __file__, "float64", *argv)
    assert result.code == 0, result.err
    assert_same_state(tmp_path / "two_last.pt", tmp_path / "one_last.pt", 1e-8)
    assert_same_log(tmp_path / "two_log.csv", tmp_path / "one_log.csv", 1e-7)

    # Stopped by a signal to the second process alone, in the middle of an epoch, and resumed.
    argv[argv.index("two.pt")] = "part.pt"
    result = torchrun(tmp_path, __file__, "stop", *argv)
    assert "stopped after training step 5 of 9" in result.out[0] and result.err == ["", ""]
    result = torchrun(tmp_path, __file__, "float64", "--resume", "--checkpoint", "part.pt")
    assert result.code == 0 and "resumed at epoch 1, training step 5" in result.out[0], result.err
    assert_same_state(tmp_path / "part_last.pt", tmp_path / "one_last.pt", 1e-8)
    assert_same_log(tmp_path / "part_log.csv", tmp_path / "one_log.csv", 1e-7)  # the resumed epoch's means too


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_gpus_end_with_the_weights_of_one(shared_data, tmp_path):
    """Each GPU replays its step, with the exchange of the gradients in it, as one CUDA graph."""
    argv = flags(shared_data, "one.pt", "--device", "cuda", "--no-amp", "--no-compile")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, SCRIPT, *map(str, argv)], env=env, cwd=tmp_path, check=True, capture_output=True)
    argv[argv.index("one.pt")] = "two.pt"
    result = torchrun(tmp_path, SCRIPT, *argv)
    assert result.code == 0, result.err
    assert_same_state(tmp_path / "two_last.pt", tmp_path / "one_last.pt", 1e-3)
    assert_same_log(tmp_path / "two_log.csv", tmp_path / "one_log.csv", 1e-4)


def test_the_script_under_torchrun(script, shared_data, tmp_path):
    result = torchrun(tmp_path, SCRIPT, *flags(shared_data, "run.pt"))
    assert result.code == 0 and result.err == ["", ""], result
    assert result.out[1] == "" and "2 processes" in result.out[0] and result.out[0].count("epoch 3/3") == 2  # and best
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "output") == sorted(
        ["run.pt", "run_last.pt", "run_log.csv", "run_run.json", "run_loss.png",
         *(f"run_prediction_{i}.png" for i in range(3))])
    record = json.loads((tmp_path / "run_run.json").read_text())
    assert record["command"].startswith("torchrun --nnodes=1 --nproc-per-node=2 masked_model_gpu_mamba_next.py")
    assert record["processes"] == 2
    script("masked_model_gpu_mamba_next", *flags(shared_data, tmp_path / "one.pt"))
    assert_same_log(tmp_path / "run_log.csv", tmp_path / "one_log.csv", 1e-4)


@pytest.mark.parametrize("fault, more, message", [
    ("none", ["--batch-size", "many"], "argument --batch-size"),
    ("none", ["--batch-size", "1"], "more processes (2) than windows in a step (1)"),
    ("no data", [], "process 1 of 0…1: nowhere/data.npz not found"),
    ("full disk", [], "no space left"),
    ("nan", [], "NaN or infinite at step 6 (epoch 2")])
def test_a_fault_on_one_process_ends_all_with_one_line(shared_data, tmp_path, fault, more, message):
    program = [SCRIPT] if fault == "none" else [__file__, fault]
    result = torchrun(tmp_path, *program, *flags(shared_data, "run.pt", *more))
    assert result.code != 0 and result.err[1] == "" and result.out[1] == ""
    assert message in result.err[0] and result.err[0].startswith("error: ") and result.err[0].count("\n") == 1


def test_a_process_that_vanishes_takes_the_others_along(shared_data, tmp_path):
    result = torchrun(tmp_path, __file__, "vanish", *flags(shared_data, "run.pt"))
    assert result.code != 0 and "process 0 of 0…1 lost the others" in result.err[0] and "Traceback" not in result.err[0]
    assert torch.load(tmp_path / "run_last.pt", weights_only=True)["step"] == 0  # whole, from before


def test_sigterm_to_torchrun_saves_the_state(shared_data, tmp_path):
    process = start(tmp_path, __file__, "slow", *flags(shared_data, "run.pt", "--epochs", "1000"))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(
            "\nstep 3\n" in file.read_text() for file in (tmp_path / "output").glob("*/attempt_0/0/stdout.log")):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    out, err = outputs(tmp_path, "stdout"), outputs(tmp_path, "stderr")
    assert "go on with --resume" in out[0] and err == ["", ""]
    step = torch.load(tmp_path / "run_last.pt", weights_only=True)["step"]
    assert step >= 2 and f"stopped after training step {step} of 3,000" in out[0]


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2:])
