"""--fresh: every epoch has a series of its own, the same for the same seed, resumed or not."""

import csv
import threading

import numpy as np
import pytest
import torch
from conftest import TINY_DATA

import circle_process
import dataset
import masked_model_gpu_mamba_next as training

pytestmark = pytest.mark.usefixtures("undrawn")

NAME = "masked_model_gpu_mamba_next"
TINY = ["--d-model", "16", "--n-layers", "1", "--d-state", "4", "--d-ff", "16", "--seq-len", "64", "--stride", "128",
        "--batch-size", "8", "--epochs", "3", "--warmup-epochs", "1", "--device", "cpu"]


def rows(path):
    with open(path, newline="") as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file)]


def weights(path):
    return torch.load(path, weights_only=True)["model_state_dict"]


def test_each_part_is_another_series_of_the_same_process(shared_data):
    series = dataset.load_series(shared_data)
    parts = [dataset.FreshParts(series, 2700, 7, 3).part(epoch) for epoch in range(3)]
    for epoch, part in enumerate(parts):
        X, states, thetas = circle_process.draw_series(series.process, series.config, 2700, [7, epoch, 2700])
        assert np.array_equal(part, X) and part.dtype == np.float32
        # Noise around the points of the same circles
        residual = X - circle_process.points(series.process, states, thetas)
        assert residual.std() == pytest.approx(series.config["noise_std"], rel=0.02)
    for one, other in ((parts[0], parts[1]), (parts[1], parts[2]), (parts[0], series.X[:2700])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.2
    assert not np.array_equal(parts[0], dataset.FreshParts(series, 2700, 8, 3).part(0))


def test_parts_come_in_any_order_and_none_is_drawn_past_the_end(shared_data, monkeypatch):
    series, drawn = dataset.load_series(shared_data), []
    draw = dataset.FreshParts.draw
    monkeypatch.setattr(dataset.FreshParts, "draw", lambda self, epoch: drawn.append(epoch) or draw(self, epoch))
    fresh = dataset.FreshParts(series, 500, 1, 4)
    third, fourth = fresh.part(2), fresh.part(3)
    fresh.pool.shutdown()
    assert sorted(drawn) == [2, 3] and not np.array_equal(third, fourth)


def test_several_parts_are_drawn_at_once_and_are_the_same(shared_data, monkeypatch):
    series, together = dataset.load_series(shared_data), threading.Barrier(3, timeout=20)
    one_by_one = dataset.FreshParts(series, 500, 1, 6)
    monkeypatch.setattr(dataset, "n_cores", lambda: 4)
    draw = dataset.FreshParts.draw
    monkeypatch.setattr(dataset.FreshParts, "draw", lambda self, epoch: together.wait() >= 0 and draw(self, epoch))
    at_once = dataset.FreshParts(series, 500, 1, 6)
    assert at_once.ahead == 3  # the barrier opens when three are drawn at the same time
    parts = [at_once.part(epoch) for epoch in range(6)]
    monkeypatch.undo()
    assert all(np.array_equal(part, one_by_one.part(epoch)) for epoch, part in enumerate(parts))
    # A run that is resumed keeps nothing that was drawn for the epochs before.
    one_by_one.part(0)
    one_by_one.part(3)
    assert 0 < len(one_by_one.drawn) <= 2 and min(one_by_one.drawn) == 4


@pytest.mark.parametrize("n_cores, n_steps, ahead", [(1, 500, 1), (2, 500, 1), (3, 500, 2), (64, 500, 4),
                                                     (64, 16_000_000, 2), (64, 10**9, 1)])
def test_cores_and_memory_bound_how_many_are_drawn_ahead(shared_data, monkeypatch, n_cores, n_steps, ahead):
    monkeypatch.setattr(dataset, "n_cores", lambda: n_cores)
    assert dataset.FreshParts(dataset.load_series(shared_data), n_steps, 1, 4).ahead == ahead  # 6 features of 4 bytes


def test_training_sees_the_parts_and_validation_the_data(script, shared_data, tmp_path, monkeypatch):
    seen, make_step = [], training.make_step

    def watched(*args):
        step = make_step(*args)
        return lambda x: (seen.append(x.clone()), step(x))

    monkeypatch.setattr(training, "make_step", watched)
    done = script(NAME, *TINY, "--fresh", "--data-dir", shared_data, "--checkpoint", tmp_path / "a.pt")
    assert done.code == 0, done
    assert "each epoch has a new series of 2,700 steps: 8,100 different steps in all" in done.out
    series = dataset.load_series(shared_data)
    fresh = dataset.FreshParts(series, 2700, 42, 3)
    steps_per_epoch = len(seen) // 3
    for epoch in range(3):
        part = torch.from_numpy(fresh.part(epoch))
        for x in seen[epoch * steps_per_epoch:(epoch + 1) * steps_per_epoch]:
            for window in x:
                (first,) = (part == window[0]).all(dim=1).nonzero()[0].tolist()
                assert torch.equal(part[first:first + 64], window)
    log = rows(tmp_path / "a_log.csv")
    assert [row["steps_seen"] for row in log] == ["2700", "5400", "8100"]
    # --eval, which reads the data's file, finds the validation error that the run has logged.
    best = torch.load(tmp_path / "a.pt", weights_only=True)["epoch"]
    done = script(NAME, "--eval", tmp_path / "a.pt", "--data-dir", shared_data)
    assert f"{float(log[best - 1]['val_mse_1']):.4f}" in done.out


def test_a_resumed_run_sees_the_same_series(script, shared_data, tmp_path, interrupted_after):
    argv = [*TINY, "--fresh", "--data-dir", shared_data]
    assert script(NAME, *argv, "--checkpoint", tmp_path / "a.pt").code == 0
    with interrupted_after(5):
        assert script(NAME, *argv, "--checkpoint", tmp_path / "b.pt").code == 130
    assert script(NAME, "--resume", "--checkpoint", tmp_path / "b.pt").code == 0
    one, other = weights(tmp_path / "a.pt"), weights(tmp_path / "b.pt")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert rows(tmp_path / "a_log.csv") == rows(tmp_path / "b_log.csv")


def test_walking_and_drifting_processes_are_drawn_too(script, tmp_path):
    data = tmp_path / "walk"
    assert script("markov_circles_timeseries", *TINY_DATA, "--center-walk-std", "0.5", "--drift", "--data-dir",
                  data).code == 0
    series = dataset.load_series(data)
    part = dataset.FreshParts(series, 3000, 1, 1).part(0)
    fixed = circle_process.draw_series(series.process, {**series.config, "center_walk_std": 0.0, "drift": False}, 3000,
                                       [1, 0, 3000])[0]
    assert np.abs(part - fixed)[-500:].mean() > 1


def test_an_unknown_process_is_refused(refused, rewrite_data, tmp_path):
    folder = rewrite_data(config={"dwell_mean": None})
    (folder / "config.json").write_text("{}")
    line = refused(NAME, *TINY, "--fresh", "--data-dir", folder, "--checkpoint", tmp_path / "a.pt")
    assert "--fresh" in line and "dwell_mean, dwell_std, noise_std missing" in line
    assert not list(tmp_path.glob("a*"))


def test_nothing_is_seen_twice_so_training_and_validation_agree(script, tmp_path):
    """A model that would learn a short series by heart has the same error on both sides."""
    data = tmp_path / "data"
    script("markov_circles_timeseries", *TINY_DATA, "--n-steps", "4000", "--data-dir", data)
    gaps = {}
    for name, more in (("again", []), ("fresh", ["--fresh"])):
        argv = [*TINY, "--epochs", "30", "--lr", "0.01", "--dropout", "0", "--val-fraction", "0.5", "--stride", "32",
                "--d-model", "32", "--no-train-eval", *more]
        assert script(NAME, *argv, "--data-dir", data, "--checkpoint", tmp_path / f"{name}.pt").code == 0
        last = rows(tmp_path / f"{name}_log.csv")[-5:]
        gaps[name] = np.mean([float(row["val_mse_1"]) / float(row["train_mse_1"]) - 1 for row in last])
    assert gaps["again"] > 0.15 and abs(gaps["fresh"]) < 0.1, gaps
