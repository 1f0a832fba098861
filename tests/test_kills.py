"""What is left behind: after SIGKILL, in the first moments of a run, and on a full disk."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_DATA

import cli
import markov_circles_timeseries as generator
import masked_model_gpu_mamba_next as training
import run_files

pytestmark = pytest.mark.usefixtures("undrawn")

TRAIN = ["--d-model", "16", "--n-layers", "1", "--d-state", "4", "--d-ff", "16", "--seq-len", "64", "--stride", "128",
         "--batch-size", "8", "--warmup-epochs", "1", "--device", "cpu"]
NAME = "masked_model_gpu_mamba_next"


def test_random_kills():
    """A handful of what `python tests/kill_runs.py --kills 60` does at length."""
    script = Path(__file__).with_name("kill_runs.py")
    result = subprocess.run([sys.executable, script, "--kills", "4"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "4 kills: every file whole" in result.stdout, result.stdout + result.stderr


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists() or os.cpu_count() < 2, reason="needs /proc and two cores")
def test_workers_end_with_a_killed_evaluation(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, time\nimport evaluate_representations\nif __name__ == '__main__':\n"
                      "    pool = evaluate_representations.umap_pool(10, 10**6)\n"
                      "    print(pool.submit(os.getpid).result(), flush=True)\n    time.sleep(100)\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(training.__file__).parent)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as process:
        worker = int(process.stdout.readline())
        assert running(worker)
        process.kill()
    give_up = time.monotonic() + 60
    while running(worker) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not running(worker)


# ---- the first moments of a run


class Killed(BaseException):
    """Stands for SIGKILL where a test stays in one process: no handler of the scripts catches it."""


@contextlib.contextmanager
def kill_at(n):
    """A block in which the n-th file that gets its name, from 0, is the last to do so. Gives the names, in order."""
    replace, names = os.replace, []

    def deadly(part, path):
        replace(part, path)
        names.append(Path(path).name)
        if len(names) > n:
            raise Killed

    os.replace = deadly
    try:
        yield names
    finally:
        os.replace = replace


@pytest.fixture
def no_figures(monkeypatch):
    """The run's end without its figures, which take longer than the run."""
    monkeypatch.setattr(training, "finish", lambda args, files, log, *rest: log)


def train(script, shared_data, path, *more):
    return script(NAME, *TRAIN, "--epochs", "2", "--data-dir", shared_data, "--checkpoint", path, *more)


def test_a_run_killed_at_its_start_can_go_on(script, refused, shared_data, tmp_path, no_figures):
    train(script, shared_data, tmp_path / "whole" / "a.pt")
    whole = torch.load(tmp_path / "whole" / "a.pt", weights_only=True)["model_state_dict"]
    for n in range(3):
        path = tmp_path / str(n) / "a.pt"
        with kill_at(n) as names, pytest.raises(Killed):
            train(script, shared_data, path)
        assert names == ["a_last.pt", "a_log.csv", "a_run.json"][:n + 1]  # --resume works from the first file on
        line = refused(NAME, *TRAIN, "--epochs", "2", "--data-dir", shared_data, "--checkpoint", path)
        assert "exists already; go on with it by --resume" in line
        assert script(NAME, "--resume", "--checkpoint", path).code == 0
        killed = torch.load(path, weights_only=True)["model_state_dict"]
        assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_resume_without_a_run_says_how_to_start_it(refused, shared_data, tmp_path):
    line = refused(NAME, "--resume", "--checkpoint", tmp_path / "a.pt", "--data-dir", shared_data)
    assert "a_last.pt not found" in line and "leave --resume out" in line


def test_a_taken_name_without_a_state_is_not_sent_to_resume(refused, shared_data, tmp_path):
    (tmp_path / "a_log.csv").write_text("")
    line = refused(NAME, *TRAIN, "--data-dir", shared_data, "--checkpoint", tmp_path / "a.pt")
    assert "a_log.csv exists already" in line and "--resume" not in line


def test_a_cut_or_lost_log_row(script, shared_data, tmp_path, no_figures):
    train(script, shared_data, tmp_path / "a.pt")
    log = tmp_path / "a_log.csv"
    header, first, second = log.read_text().splitlines()
    log.write_text(f"{header}\n{first}\n{second}\n3,33,0.1")
    assert script(NAME, "--resume", "--checkpoint", tmp_path / "a.pt").code == 0
    assert log.read_text() == f"{header}\n{first}\n{second}\n"
    log.write_text(f"{header}\n{second}\n")
    result = script(NAME, "--resume", "--checkpoint", tmp_path / "a.pt")
    assert result.code == 0 and "has rows of 1 of the 2 epochs" in result.out
    assert log.read_text() == f"{header}\n{second}\n"


def test_a_lost_log_of_a_finished_run(script, refused, shared_data, tmp_path):
    train(script, shared_data, tmp_path / "a.pt")
    (tmp_path / "a_log.csv").unlink()
    assert "a_log.csv is lost" in refused(NAME, "--resume", "--checkpoint", tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=True)["epoch"] <= 2


def test_the_log_keeps_its_rows_when_a_resumed_run_has_other_columns(script, shared_data, tmp_path, no_figures):
    train(script, shared_data, tmp_path / "a.pt")
    before = (tmp_path / "a_log.csv").read_text().splitlines()
    script(NAME, "--resume", "--checkpoint", tmp_path / "a.pt", "--no-train-eval")
    after = (tmp_path / "a_log.csv").read_text().splitlines()
    assert len(after) == 3 and all(long.startswith(short) for long, short in zip(before, after, strict=True))


def test_new_data_never_lie_beside_an_older_config(data_dir):
    argv = [*TINY_DATA, "--data-dir", str(data_dir), "--n-steps", "4000"]
    (data_dir / "data.npz").unlink()  # while it is there, it is not replaced
    with kill_at(0) as names, pytest.raises(Killed):
        generator.main(generator.parse_args(argv))
    assert names == ["data.npz"]
    with np.load(data_dir / "data.npz") as file:
        assert file["X"].shape == (4000, 6)
    assert not (data_dir / "config.json").exists()
    generator.main(generator.parse_args(argv))
    assert json.loads((data_dir / "config.json").read_text())["n_steps"] == 4000


# ---- a full disk


@pytest.fixture
def full_disk():
    """`with full_disk(n)`: no file can grow beyond n bytes. Python ignores SIGXFSZ, so writing raises OSError."""

    class Limit:
        def __init__(self, n_bytes):
            self.n_bytes = n_bytes

        def __enter__(self):
            self.old = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.n_bytes, self.old[1]))

        def __exit__(self, *error):
            resource.setrlimit(resource.RLIMIT_FSIZE, self.old)

    return Limit


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_generation_on_a_full_disk_keeps_the_older_data(refused, data_dir, full_disk):
    before = contents(data_dir)
    for n_bytes in (3_000, 10_000):
        with full_disk(n_bytes):
            line = refused("markov_circles_timeseries", *TINY_DATA, "--data-dir", data_dir)
        assert "can't write" in line and "data.npz" in line and "free some space" in line
        assert contents(data_dir) == before


def test_training_on_a_full_disk(script, refused, shared_data, tmp_path, full_disk, no_figures, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY_SECONDS", 0)
    train(script, shared_data, tmp_path / "whole" / "a.pt", "--epochs", "4")
    flags = (*TRAIN, "--epochs", "4", "--data-dir", shared_data, "--checkpoint", tmp_path / "a.pt")
    with full_disk(5_000):
        line = refused(NAME, *flags)
    assert "can't write" in line and [path.name for path in tmp_path.iterdir()] == ["whole"]  # not even begun

    save, saved, limit = run_files.save_checkpoint, [], full_disk(5_000)

    def save_while_there_is_room(path, *args, **more):
        if saved.count("a.pt") == 2 and saved[-1] == "a.pt":  # the best of the second epoch, but not its last state
            limit.__enter__()
        save(path, *args, **more)
        saved.append(path.name)

    monkeypatch.setattr(run_files, "save_checkpoint", save_while_there_is_room)
    try:
        line = refused(NAME, *flags)
    finally:
        limit.__exit__()
    monkeypatch.setattr(run_files, "save_checkpoint", save)
    assert "can't write" in line and "a_last.pt" in line and not list(tmp_path.glob(".*"))
    assert torch.load(tmp_path / "a_last.pt", weights_only=True)["epoch"] == 1
    assert torch.load(tmp_path / "a.pt", weights_only=True)["epoch"] == 2
    assert script(NAME, "--resume", "--checkpoint", tmp_path / "a.pt").code == 0
    for name in ("a.pt", "a_last.pt"):
        whole, mended = (torch.load(folder / name, weights_only=True)["model_state_dict"]
                         for folder in (tmp_path / "whole", tmp_path))
        assert all(torch.equal(whole[key], mended[key]) for key in whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_row_on_a_full_disk():
    with pytest.raises(cli.UserError, match="No space left on device; free some space and go on with --resume"):
        run_files.append_row(Path("/dev/full"), ["epoch"], {"epoch": 1})


@pytest.mark.drawn
@pytest.mark.parametrize("name, flags, n_bytes", [
    ("generate", ["--gen-len", "100", "--seed-len", "64"], 1000),
    ("generate", ["--gen-len", "100", "--seed-len", "64"], 40_000),  # enough for the arrays, not for a figure
    ("visualize_gates", ["--layer", "1"], 10_000),
    ("evaluate_representations", ["--no-umap", "--no-lb", "--layers", "1"], 10_000),
    ("optimal_filter", ["--seq-len", "100"], 10_000)])
def test_evaluation_on_a_full_disk(refused, shared_data, tiny_checkpoint, tmp_path, full_disk, name, flags, n_bytes):
    plots = tmp_path / "plots"
    checkpoint = [] if name == "optimal_filter" else ["--checkpoint", tiny_checkpoint]
    with full_disk(n_bytes):
        line = refused(name, *checkpoint, "--data-dir", shared_data, "--save-dir", plots, *flags)
    assert "can't write" in line and "free some space" in line
    assert not list(plots.glob(".*")) and all(path.stat().st_size <= n_bytes for path in plots.iterdir())


