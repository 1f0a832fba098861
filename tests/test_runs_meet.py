"""Runs that meet under one name, that are ended from outside, that go on for longer, and that are moved."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import only

import cli
import dataset
import masked_model_gpu_mamba_next as training
import measures
import ranks
import run_files

pytestmark = pytest.mark.usefixtures("undrawn")

NAME = "masked_model_gpu_mamba_next"
# 21 training windows in 3 steps of 7.
TINY = ["--d-model", "16", "--n-layers", "1", "--d-state", "4", "--d-ff", "16", "--seq-len", "64", "--stride", "128",
        "--batch-size", "8", "--epochs", "3", "--warmup-epochs", "1", "--device", "cpu"]


def flags(data, path, *more):
    return [*TINY, "--data-dir", str(data), "--checkpoint", str(path), *more]


def weights(path):
    return torch.load(path, weights_only=True)["model_state_dict"]


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- two under one name


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_of_many_at_once_one_gets_the_name_and_a_crash_gives_it_back(tmp_path):
    """Processes that lock at the same moment, while earlier holders remove the file: never two at a time."""
    path, counter = tmp_path / ".a.lock", tmp_path / "held"
    begin = time.monotonic() + 0.3
    children = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                time.sleep(max(0, begin - time.monotonic()))
                for _ in range(40):
                    try:
                        file = run_files.hold(path, "a.pt")
                    except cli.UserError as error:
                        code = 0 if code == 0 or "a.pt is being trained by process " in str(error) else 3
                        continue
                    os.close(os.open(counter, os.O_CREAT | os.O_EXCL))  # fails where another is inside
                    counter.unlink()
                    path.unlink()
                    file.close()
                    code = 0
            finally:
                os._exit(code)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 8
    pid = os.fork()
    if pid == 0:
        run_files.hold(path, "a.pt")
        os._exit(9)  # as a crash: the file stays
    os.waitpid(pid, 0)
    assert path.exists()
    run_files.hold(path, "a.pt").close()


@pytest.fixture
def held(tmp_path):
    """Another process that holds the name a.pt; gives its process id."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        file = run_files.hold(tmp_path / ".a.lock", "a.pt")
        os.write(writer, b"x")
        time.sleep(60)
        file.close()
        os._exit(0)
    os.read(reader, 1)
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_name_that_another_run_holds_is_refused(script, refused, shared_data, tmp_path, request):
    assert script(NAME, *flags(shared_data, tmp_path / "a.pt")).code == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    pid = request.getfixturevalue("held")
    for more in ([], ["--resume", "--epochs", "4"]):
        line = refused(NAME, *flags(shared_data, tmp_path / "a.pt")[:-2], "--checkpoint", tmp_path / "a.pt", *more[:1])
        assert f"a.pt is being trained by process {pid} on " in line and " since 20" in line
    lock = tmp_path / ".a.lock"
    assert lock.exists()
    lock.unlink()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# ---- ended from outside


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_what_schedulers_send_saves_as_ctrl_c_does(script, shared_data, tmp_path, monkeypatch, name):
    assert threading.current_thread() is threading.main_thread()
    set_lr, steps = training.set_lr, []
    signal.signal(getattr(signal, name), signal.SIG_DFL)  # where the tests run under nohup, SIGHUP is ignored

    def ended(*args):
        steps.append(1)
        if len(steps) == 4:
            signal.raise_signal(getattr(signal, name))
        set_lr(*args)

    monkeypatch.setattr(training, "set_lr", ended)
    result = script(NAME, *flags(shared_data, tmp_path / "a.pt"))
    assert result.code == 130 and "stopped after training step 4 of 9" in result.out and result.err == ""
    assert torch.load(tmp_path / "a_last.pt", weights_only=True)["step"] == 4


def test_loader_processes_outlive_the_signals_to_the_whole_group(monkeypatch):
    monkeypatch.setattr(dataset, "fits_on", lambda device, X: False)
    X = np.arange(1000, dtype=np.float32).reshape(500, 2)
    windows, batches = dataset.Windows(X, 10, "cpu"), [[i, i + 5] for i in range(40)]
    found = []
    for batch in windows.loader(batches, 2):
        if not found:
            time.sleep(0.2)  # both are at work
            for worker in multiprocessing.active_children():
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
                    os.kill(worker.pid, number)
        found.append(batch)
    assert len(found) == 40
    assert all(torch.equal(batch, windows.cut(starts)) for batch, starts in zip(found, batches, strict=True))


def test_batches_go_through_pipes_where_shared_memory_is_small(monkeypatch, capsys):
    monkeypatch.setattr(dataset, "fits_on", lambda device, X: False)
    X = np.random.default_rng(0).normal(size=(5000, 20)).astype(np.float32)
    batches = [[i, i + 5] for i in range(6)]
    wanted = 5 * 2 * 1000 * 20 * 4  # two workers with two batches each, and one in use
    for free, said in ((2 * wanted, 0), (wanted, 1), (0, 1)):
        monkeypatch.setattr(dataset.shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        windows = dataset.Windows(X, 1000, "cpu")
        sent = []
        monkeypatch.setattr(windows, "cut_as_array", lambda starts, cut=windows.cut: cut(starts).numpy())
        for _ in range(2):
            sent += list(windows.loader(batches, 2))
        assert all(torch.equal(batch, windows.cut(starts)) for batch, starts in zip(sent, batches * 2, strict=True))
        out = capsys.readouterr().out
        assert out.count("they go through pipes") == out.count("\n") == said
        assert windows.through_pipes == bool(said)


def test_the_last_state_is_saved_within_an_epoch(script, shared_data, tmp_path, monkeypatch):
    """A crash in mid-epoch costs what came after the last save, and the run goes on as if nothing had been."""
    script(NAME, *flags(shared_data, tmp_path / "whole.pt"))
    save_checkpoint, set_lr, saved, steps = run_files.save_checkpoint, training.set_lr, [], []

    def watched(path, **state):
        saved.append((path.name, state.get("step")))
        save_checkpoint(path, **state)

    def crash(*args):
        steps.append(1)
        if len(steps) == 6:
            raise ZeroDivisionError
        set_lr(*args)

    monkeypatch.setattr(run_files, "save_checkpoint", watched)
    monkeypatch.setattr(training, "SAVE_EVERY_SECONDS", -1)
    monkeypatch.setattr(training, "set_lr", crash)
    with pytest.raises(ZeroDivisionError):
        script(NAME, *flags(shared_data, tmp_path / "part.pt"))
    assert saved == [("part_last.pt", step) for step in (0, 1, 2)] + [("part.pt", None)] + [
        ("part_last.pt", step) for step in (3, 4, 5)]
    assert not (tmp_path / ".part.lock").exists()
    monkeypatch.undo()
    assert "resumed at epoch 1, training step 5" in script(NAME, "--resume", "--checkpoint", tmp_path / "part.pt").out
    assert same_weights(tmp_path / "whole_last.pt", tmp_path / "part_last.pt")
    assert same_weights(tmp_path / "whole.pt", tmp_path / "part.pt")
    logs = [[line.split(",") for line in (tmp_path / f"{name}_log.csv").read_text().splitlines()]
            for name in ("whole", "part")]
    seconds = logs[0][0].index("seconds")
    assert [[*row[:seconds], *row[seconds + 1:]] for row in logs[0]] == [
        [*row[:seconds], *row[seconds + 1:]] for row in logs[1]]


def test_ctrl_c_while_a_script_imports_ends_it_without_a_traceback(tmp_path):
    """The first module that takes time sends the signal. Importing a script elsewhere leaves signals as they are."""
    (tmp_path / "numpy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    folder = Path(cli.__file__).parent
    scripts = [path for path in folder.glob("*.py") if "\nif __name__ == " in path.read_text()]
    assert len(scripts) == 9
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    needed = {"report": ["a.pt"], "visualize_gates": ["--checkpoint", "a.pt"], "generate": ["--checkpoint", "a.pt"]}
    processes = [subprocess.Popen([sys.executable, path, *needed.get(path.stem, [])], env=environment, cwd=tmp_path,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE) for path in scripts]
    for process, path in zip(processes, scripts, strict=True):
        assert process.communicate() == (b"", b"") and process.returncode == -signal.SIGINT, path
    (tmp_path / "numpy.py").unlink()
    code = "import signal, cli, generate\nassert signal.getsignal(2) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(folder)}, check=True)


# ---- longer and shorter


def test_epochs_below_what_is_done_are_refused_and_more_are_announced(script, refused, shared_data, tmp_path):
    script(NAME, *flags(shared_data, tmp_path / "a.pt", "--lr", "0.004"))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    resume = (NAME, "--resume", "--checkpoint", tmp_path / "a.pt")
    line = refused(*resume, "--epochs", "2")
    assert "--epochs 2 is less than the run has behind it" in line and "give --epochs 3 or more" in line
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    out = script(*resume, "--epochs", "3").out
    assert "learning rate goes" not in out
    out = script(*resume, "--epochs", "5").out
    low, high = (0.002 * (1 + np.cos(np.pi * done / steps)) for done, steps in ((5, 6), (6, 12)))
    assert f"--epochs 5 in place of 3: the learning rate goes from {low:.3g} to {high:.3g}" in out
    assert torch.load(tmp_path / "a_last.pt", weights_only=True)["epoch"] == 5


# ---- the same again


@pytest.mark.parametrize("more", [
    "--contrastive-lambda 1 --seq-len 256", "--mixture 2 --max-horizon 2", "--slowness-lambda 1 --ema 0.5 --freeze-A",
    "--aug-noise 1 --aug-rotate --aug-scale 0.1", "--gate-lr-factor 0.1 --scan reference", "--fresh"])
def test_every_flags_run_is_bit_identical_on_two_threads(
        script, shared_data, tmp_path, monkeypatch, two_threads, more):
    monkeypatch.setattr(training, "finish", lambda *_: None)
    for name in "abc":
        assert script(NAME, *flags(shared_data, tmp_path / f"{name}.pt", "--epochs", "1", *more.split())).code == 0
    assert all(same_weights(tmp_path / "a_last.pt", tmp_path / f"{name}_last.pt") for name in "bc")


# ---- moved


def test_a_checkpoint_knows_its_data_and_its_record(script, refused, shared_data, tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    for name in ("data.npz", "config.json"):
        (project / "birds").mkdir(exist_ok=True)
        shutil.copy(shared_data / name, project / "birds" / name)
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", ["x"])
    script(NAME, *flags("birds", "a.pt"))
    command = json.loads((project / "a_run.json").read_text())["command"]
    for name in ("a.pt", "a_last.pt"):
        checkpoint = torch.load(project / name, weights_only=True)
        assert checkpoint["data_crc32"] == dataset.crc32(dataset.load_series("birds").X)
        assert checkpoint["data_dir"] == "birds" and checkpoint["args"]["data_dir"] == str(project / "birds")
        assert checkpoint["record"]["command"] == command
    monkeypatch.chdir(tmp_path)
    out = script(NAME, "--eval", project / "a.pt").out
    assert f"data: {project / 'birds'}, those that {project / 'a.pt'} was trained on" in out
    assert command in out and "warning" not in out and "horizon" in out

    # ---- the whole folder elsewhere, and a copy of the checkpoint under another name
    project.rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    shutil.copy(moved / "a.pt", moved / "best.pt")
    (moved / "best_run.json").write_text('{"command": "of another run", "started": "then"}')
    out = script(NAME, "--eval", moved / "best.pt").out
    assert f"data: {moved / 'birds'}" in out and command in out and "of another run" not in out
    assert "resumed at epoch 3" in script(NAME, "--resume", "--checkpoint", moved / "a.pt").out

    # ---- other data
    with np.load(moved / "birds/data.npz") as file:
        arrays = dict(file)
    np.savez(moved / "birds/data.npz", **{**arrays, "X": arrays["X"] + 1})
    out = script(NAME, "--eval", moved / "a.pt").out
    assert out.count("warning: ") == 1 and "was trained on other data" in out
    for name, more in (("generate", ["--seed-len", "64", "--gen-len", "20"]), ("visualize_gates", ["--layer", "1"]),
                       ("evaluate_representations", ["--no-umap", "--no-lb"])):
        result = script(name, "--checkpoint", moved / "a.pt", "--save-dir", tmp_path / "plots", *more)
        assert result.code == 0 and result.out.count("warning: ") == 1, result
    shutil.rmtree(moved / "birds")
    assert "birds/data.npz not found" in refused(NAME, "--eval", moved / "a.pt")


def test_a_checkpoint_without_these_entries_works_as_before(script, shared_data, tiny_checkpoint):
    result = script(NAME, "--eval", tiny_checkpoint, "--data-dir", shared_data)
    assert result.code == 0 and "warning" not in result.out and "no readable record" in result.out


def test_saves_within_an_epoch_are_agreed_upon_without_a_wait_per_step():
    """On several GPUs each agreement waits for the device; between two of them nothing is asked."""
    two = ranks.Ranks(torch.device("cuda"), SimpleNamespace(signal=None), 0, 2)  # no group that could answer
    assert all(two.agree(True, step) == (False, False) for step in range(1, ranks.STOP_CHECK_STEPS))
    assert ranks.Ranks(torch.device("cpu")).agree(True, 1) == (False, True)


# ---- what was measured before


def test_a_quick_look_leaves_what_was_measured_of_the_same_model(script, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "umap_embedding", lambda points, graph, seed: points[:, :2])  # not the point here
    other = tmp_path / "other.pt"
    shutil.copy(tiny_checkpoint, other)
    plots = tmp_path / "plots"
    common = ["--save-dir", plots, "--umap-points", 100, "--umap-neighbors", 10, "--lb-points", 300, "--device", "cpu"]

    def levels(name="tiny"):
        return json.loads(only(plots, f"{name}_*metrics.json").read_text())["levels"]

    assert script("evaluate_representations", "--checkpoint", tiny_checkpoint, *common).code == 0
    before = levels()
    assert len(before) == 4 and all(level["umap_silhouette"] is not None for level in before)
    for more in (["--no-umap"], ["--no-umap", "--no-lb", "--layers", "1"]):
        assert script("evaluate_representations", "--checkpoint", tiny_checkpoint, other, *common, *more).code == 0
        assert levels() == before
    assert "umap_silhouette" not in levels("other")[0]
    # Other weights, or another seed: what was measured of the old ones is not theirs.
    checkpoint = torch.load(tiny_checkpoint, weights_only=True)
    checkpoint["model_state_dict"]["input_proj.weight"] *= 2
    torch.save(checkpoint, tiny_checkpoint)
    assert script("evaluate_representations", "--checkpoint", tiny_checkpoint, *common, "--no-umap").code == 0
    assert all("umap_silhouette" not in level for level in levels())
