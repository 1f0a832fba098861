"""A training run with the mixture head: its log, lines, figure, --eval, --resume and comparison, in nats."""

import csv
import math

import numpy as np
import pytest
import torch

import dataset
import figures
import mamba_model
import masked_model_gpu_mamba_next as training
import optimal_filter
import run_files

pytestmark = pytest.mark.usefixtures("undrawn")

NAME = "masked_model_gpu_mamba_next"
TINY = ["--d-model", "16", "--n-layers", "1", "--d-state", "4", "--d-ff", "16", "--seq-len", "64", "--stride", "128",
        "--batch-size", "8", "--epochs", "3", "--warmup-epochs", "1", "--lr", "0.01", "--device", "cpu",
        "--mixture", "3", "--max-horizon", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mixture")


@pytest.fixture
def trained(folder, shared_data, script):
    """A folder with a run named a.pt, made once."""
    if not (folder / "a.pt").exists():
        done = script(NAME, *TINY, "--data-dir", shared_data, "--checkpoint", folder / "a.pt")
        assert done.code == 0, done
        (folder / "out.txt").write_text(done.out)
    return folder


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def independent_errors(path, series, starts):
    """({k: MSE of the mean}, {k: NLL}) of validation windows through torch's own distributions, window by window."""
    model, _ = mamba_model.load_checkpoint(path)
    mse, nll = {1: [], 2: []}, {1: [], 2: []}
    with torch.no_grad():
        for start in starts:
            x = torch.from_numpy(series.X[None, start:start + 64])
            for k, distribution in model.distribution(x).items():
                k = int(k)
                nll[k].append(-distribution.log_prob(x.roll(-k, dims=1))[:, :-k].mean().item())
                mse[k].append((distribution.mean[:, :-k] - x[:, k:]).square().mean().item())
    return tuple({k: np.mean(values) for k, values in errors.items()} for errors in (mse, nll))


def test_the_log_holds_nats_beside_squared_errors(trained, shared_data):
    log, series = rows(trained / "a_log.csv"), dataset.load_series(shared_data)
    starts = range(2700, 3000 - 63, 128)
    kinds = ["train_mse", "val_mse", "floor_mse", "excess_percent", "train_nll", "val_nll", "floor_nll", "excess_nats"]
    assert list(log[0])[6:] == [f"{kind}_{k}" for kind in kinds for k in (1, 2)] + ["train_eval_mse"]
    best = torch.load(trained / "a.pt", weights_only=True)
    row = {name: float(cell) if cell else None for name, cell in log[best["epoch"] - 1].items()}
    mse, nll = independent_errors(trained / "a.pt", series, starts)
    process = optimal_filter.process_from_series(series)
    exact = np.mean([-optimal_filter.predict(process, series.X[s:s + 64], initial="stationary")["log_likelihood"][1:]
                     for s in starts])
    for k in (1, 2):
        assert row[f"val_mse_{k}"] == pytest.approx(mse[k], rel=1e-4)
        assert row[f"val_nll_{k}"] == pytest.approx(nll[k], rel=1e-5)
    assert row["floor_nll_1"] == pytest.approx(exact, rel=1e-9) and row["floor_nll_2"] is None
    assert row["excess_nats_1"] == pytest.approx(row["val_nll_1"] - exact) and row["excess_nats_2"] is None
    assert row["excess_nats_1"] > 0
    assert row["val_loss"] == pytest.approx((nll[1] + nll[2]) / 2, rel=1e-5) == best["val_loss"]
    assert row["train_loss"] == pytest.approx((row["train_nll_1"] + row["train_nll_2"]) / 2, rel=1e-6)
    assert best["val_loss"] == min(float(r["val_loss"]) for r in log)
    assert float(log[-1]["train_nll_1"]) < float(log[0]["train_nll_1"])


def test_a_run_says_how_many_nats_it_is_off(trained):
    out, log = (trained / "out.txt").read_text(), rows(trained / "a_log.csv")
    nll, mse = float(log[-1]["excess_nats_1"]), [float(log[-1][f"excess_percent_{k}"]) for k in (1, 2)]
    assert f"{nll:.4f} nats and {mse[0]:.2f}, {mse[1]:.2f} % above optimal" in out
    assert f"NLL {float(log[-1]['floor_nll_1']):.4f} at horizon 1" in out


def test_eval_shows_both_and_no_floor_where_there_is_none(trained, shared_data, script):
    done = script(NAME, "--eval", trained / "a.pt", "--data-dir", shared_data, "--test-steps", 0)
    assert done.code == 0, done
    best = torch.load(trained / "a.pt", weights_only=True)
    row = rows(trained / "a_log.csv")[best["epoch"] - 1]
    table = [line.split() for line in done.out.splitlines()[-2:]]
    for k, cells in zip((1, 2), table, strict=True):
        assert cells[:2] == [str(k), f"{float(row[f'val_mse_{k}']):.4f}"]
        assert cells[5] == f"{float(row[f'val_nll_{k}']):.4f}"
    assert table[0][6:] == [f"{float(row['floor_nll_1']):.4f}", f"+{float(row['excess_nats_1']):.4f}", "nats"]
    assert table[1][6:] == ["–", "–"]
    assert "NLL (nats)" in done.out


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(trained, shared_data, script, folder, interrupted_after):
    argv = [*TINY, "--data-dir", shared_data, "--checkpoint", folder / "b.pt"]
    with interrupted_after(4):
        assert script(NAME, *argv).code == 130
    assert script(NAME, "--resume", "--checkpoint", folder / "b.pt").code == 0
    whole, resumed = (torch.load(folder / f"{name}.pt", weights_only=True)["model_state_dict"] for name in "ab")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for one, other in zip(rows(folder / "a_log.csv"), rows(folder / "b_log.csv"), strict=True):
        assert {**one, "seconds": ""} == {**other, "seconds": ""}


def test_the_loss_figure_has_a_row_of_panels_per_measure():
    rows = [{"epoch": i, "lr": 1e-3, "val_loss": i, **{f"{kind}_{k}": 10.0 * k + i + j for j, kind in enumerate(
        ("train_mse", "val_mse", "floor_mse", "excess_percent", "train_nll", "val_nll"))
        for k in (1, 2)}, "floor_nll_1": 40.0, "excess_nats_1": 0.5 + i, "floor_nll_2": None, "excess_nats_2": None}
        for i in (1, 2, 3)]
    fig = run_files.draw_loss(rows, [1, 2], "a")
    errors, excess = fig.axes[2:4]
    assert errors.get_ylabel() == "negative log-likelihood (nats per step)"
    lines = {line.get_label(): list(line.get_ydata()) for line in errors.get_lines()}
    assert lines["horizon 1, training"] == [row["train_nll_1"] for row in rows]
    assert lines["horizon 2, validation"] == [row["val_nll_2"] for row in rows]
    assert lines["horizon 1, optimal filter"] == [40.0, 40.0] and "horizon 2, optimal filter" not in lines
    curve, best = excess.get_lines()
    assert list(curve.get_ydata()) == [1.5, 2.5, 3.5] and list(best.get_xdata()) == [1, 1]
    assert "nats per step" in excess.get_ylabel()
    first, second = (text.get_text() for text in fig.legends[0].get_texts()[:2])
    assert first.endswith("\n1.5000 nats at best, 3.5000 nats at the end") and "nats" not in second


def test_a_mixture_starts_from_the_scale_of_the_training_steps():
    X = np.random.default_rng(0).normal(3.0, 2.0, (500, 4)).astype(np.float32)
    model = training.build_model(training.parse_args([*TINY]), 4, X)
    for head in model.output_heads.values():
        bias = head[-1].bias.detach()
        assert bias[:3].tolist() == [0.0] * 3
        assert bias[3:6].exp().tolist() == pytest.approx([math.sqrt(X.var(axis=0).mean())] * 3, rel=1e-4)
        assert bias[6:].reshape(3, 4).tolist() == [pytest.approx(X.mean(axis=0).tolist(), rel=1e-4)] * 3


def test_the_name_of_a_run_carries_its_mixture():
    assert training.parse_args(["--mixture", "16"]).checkpoint.name == "model_next_mixture16.pt"


def test_a_negative_number_of_components_is_refused(refused):
    assert "--mixture: '-1' is not a whole number, 0 or more" in refused(NAME, "--mixture", "-1")


def test_the_comparison_shows_nats(trained, shared_data, script, monkeypatch, tmp_path):
    monkeypatch.setattr(figures, "save_all", lambda figs: None)
    done = script("evaluate_representations", "--checkpoint", trained / "a.pt", trained / "a_last.pt", "--no-umap",
                  "--no-lb", "--data-dir", shared_data, "--save-dir", tmp_path)
    assert done.code == 0, done
    summary = rows(next(tmp_path.glob("compare*_summary.csv")))
    best = rows(trained / "a_log.csv")[torch.load(trained / "a.pt", weights_only=True)["epoch"] - 1]
    assert float(summary[0]["val_nll"]) == pytest.approx(float(best["val_nll_1"]), rel=1e-5)
    assert float(summary[0]["excess_nats"]) == pytest.approx(float(best["excess_nats_1"]), rel=1e-2)
    assert "nats above" in done.out and "NLL (nats)" in done.out
