"""The test series and its standard errors, against loops and repeated draws."""

import csv
import math

import numpy as np
import pytest
import torch
from conftest import TINY_DATA, TINY_MODEL

import circle_process
import dataset
import figures
import mamba_model
import masked_model_gpu_mamba_next as training
import optimal_filter
import unseen

NAME = "masked_model_gpu_mamba_next"
TINY = ["--d-model", "16", "--n-layers", "1", "--d-state", "4", "--d-ff", "16", "--seq-len", "64", "--stride", "32",
        "--batch-size", "8", "--epochs", "2", "--warmup-epochs", "1", "--device", "cpu"]


@pytest.fixture
def own_series(shared_data, tmp_path):
    """The small series as somebody's own: its values alone, of a process that nobody knows."""
    folder = tmp_path / "own"
    folder.mkdir()
    np.savez(folder / "data.npz", X=dataset.load_series(shared_data).X)
    return folder


def part_of(folder, seq_len=50, n_steps=25_000, **more):
    series = dataset.load_series(folder)
    return series, unseen.unseen_part(series, optimal_filter.process_or_none(series), seq_len, n_steps, **more)


# ---- the series, its windows and its blocks


def test_it_is_a_new_series_of_the_same_process(shared_data):
    series, part = part_of(shared_data)
    X, _, _ = circle_process.draw_series(series.process, series.config, 25_000, [unseen.SEED, 0, 0, 1])
    assert np.array_equal(part.series.X, X) and part.drawn
    assert abs(np.corrcoef(X[:2000].ravel(), series.X[:2000].ravel())[0, 1]) < 0.2
    again = circle_process.draw_series(series.process, series.config, 25_000, unseen.SEED)[0]
    fresh = dataset.FreshParts(series, 25_000, unseen.SEED, 1).draw(0)
    assert not any(np.array_equal(X[:100], other[:100]) for other in (again, fresh))
    assert part.starts.tolist() == part.first_steps.tolist() == list(range(0, 24_951, 50))
    # dwell_mean is 80: a block has 25 visits, 2,000 steps, 40 windows
    assert part.edges.tolist() == [round(500 * b / 12) for b in range(13)]
    assert part.describe() == ("test series: 25,000 steps, newly drawn; standard errors over 12 blocks of 2,083 steps")
    assert part.weights.tolist() == [(b - a) / 500 for a, b in zip(part.edges, part.edges[1:], strict=False)]
    values = np.random.default_rng(0).normal(size=(500, 2))
    for b, mean in enumerate(part.block_means(values)):
        assert mean == pytest.approx(values[part.edges[b]:part.edges[b + 1]].mean(axis=0))
    assert unseen.unseen_part(series, None, 50, 0) is None


def test_a_walking_centre_goes_no_further_than_in_the_data(script, tmp_path):
    script("markov_circles_timeseries", *TINY_DATA, "--center-walk-std", "0.5", "--n-steps", 1000, "--data-dir",
           tmp_path / "walk")
    series, part = part_of(tmp_path / "walk", 100, 2500)
    assert part.series.lengths == (1000, 1000, 500)
    for number, (first, length) in enumerate([(0, 1000), (1000, 1000), (2000, 500)]):
        X, _, _ = circle_process.draw_series(series.process, series.config, length, [unseen.SEED, number, 0, 1])
        assert np.array_equal(part.series.X[first:first + length], X)
    assert part.first_steps.tolist() == [*range(0, 1000, 100), *range(0, 1000, 100), *range(0, 500, 100)]
    errors = [optimal_filter.predict(part.process, part.series.X[start:start + 100].astype(float), (1,), "stationary",
                                     first_step=first)["squared_error"][1].mean()
              for start, first in zip(part.starts.tolist(), part.first_steps.tolist(), strict=True)]
    assert unseen.floor_blocks(part, [1])["mse"][1] == pytest.approx(np.mean(errors), rel=1e-6)


@pytest.mark.parametrize("config, n_windows, seq_len, n_blocks", [
    ({}, 100, 1000, 10), ({"dwell_mean": 400}, 976, 1024, 97), ({"dwell_mean": 1e6}, 10, 100, 1), ({}, 3, 64, 1),
    ({"dwell_mean": "x"}, 100, 1000, 10)])
def test_blocks_are_long_against_a_visit(config, n_windows, seq_len, n_blocks):
    edges = unseen.block_edges(config, n_windows, seq_len)
    assert len(edges) == n_blocks + 1 and edges[0] == 0 and edges[-1] == n_windows
    assert np.ptp(np.diff(edges)) <= 1


def test_data_of_an_unknown_process_have_their_end_held_back(script, refused, own_series, shared_data, tmp_path,
                                                             monkeypatch):
    monkeypatch.setattr(training, "finish", lambda *given: None)  # draws figures
    series = dataset.load_series(own_series)
    argv = [*TINY, "--data-dir", own_series]
    done = script(NAME, *argv, "--checkpoint", tmp_path / "a.pt")
    assert "the process isn't known: the last 150 steps are left to the test, for --eval" in done.out
    assert f"{(150 - 64) // 32 + 1} validation windows of 64 time steps from step 2,700 on" in done.out
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    assert saved["args"]["test_steps"] == 150
    done = script(NAME, "--eval", tmp_path / "a.pt")
    assert "test series: 128 steps, held back from training and from the choice of the epoch" in done.out
    model, _ = mamba_model.load_checkpoint(tmp_path / "a.pt")
    windows = torch.from_numpy(series.X[2850:2978].copy()).reshape(2, 64, 6)
    with torch.no_grad():
        mse = (model(windows)["1"][:, :-1] - windows[:, 1:]).square().mean().item()
    assert done.out.splitlines()[-1].split() == ["1", f"{mse:.4f}", "–", "–"]
    validation = (float(done.out.splitlines()[-5].split()[1]))
    log = list(csv.DictReader(open(tmp_path / "a_log.csv", newline="")))  # noqa: SIM115
    assert validation == pytest.approx(float(log[saved["epoch"] - 1]["val_mse_1"]), rel=1e-4)
    # A number of steps may be given; too large a one is refused; a run from before there was a test keeps its windows.
    done = script(NAME, *argv, "--test-steps", 70, "--checkpoint", tmp_path / "b.pt")
    assert "the last 70 steps are left" in done.out and "6 validation windows" in done.out
    line = refused(NAME, *argv, "--test-steps", 240, "--checkpoint", tmp_path / "c.pt")
    assert "--test-steps 240 must leave one window of 64 steps for validation and one for the test part" in line
    last = torch.load(tmp_path / "a_last.pt", weights_only=True)
    del last["args"]["test_steps"]
    torch.save(last, tmp_path / "a_last.pt")
    done = script(NAME, "--resume", "--epochs", 3, "--checkpoint", tmp_path / "a.pt")
    assert "8 validation windows of 64 time steps" in done.out and "left to the test" not in done.out
    done = script(NAME, "--eval", tmp_path / "a_last.pt")
    assert "no test series: the process isn't known" in done.out
    # Where a test series can be drawn, nothing is held back.
    done = script(NAME, *TINY, "--data-dir", shared_data, "--checkpoint", tmp_path / "d.pt")
    assert "8 validation windows of 64 time steps" in done.out and "left to the test" not in done.out


# ---- the errors


@pytest.mark.parametrize("mixture", [0, 2])
def test_block_means_of_model_and_filter_are_those_of_loops(shared_data, data_dir, mixture):
    torch.manual_seed(0)
    model = mamba_model.CausalTimeSeriesMamba(6, **TINY_MODEL, max_horizon=2, mixture=mixture).eval()
    series, part = part_of(data_dir, 40, 20_000)
    part = unseen.unseen_part(series, part.process, 40, 2000)
    blocks, floors = unseen.model_blocks(model, part), unseen.floor_blocks(part, [1, 2])
    assert list(blocks) == (["mse", "nll"] if mixture else ["mse"]) and len(part.edges) == 2
    x = torch.from_numpy(part.series.X.reshape(50, 40, 6))
    with torch.no_grad():
        predicted = model(x)
        for k in (1, 2):
            mse = np.mean((predicted[str(k)][:, :-k] - x[:, k:]).numpy()**2)
            assert blocks["mse"][k] == pytest.approx(mse, rel=1e-5)
            if mixture:
                density = model.distribution(x)[str(k)].log_prob(torch.roll(x, -k, 1))[:, :-k]
                assert blocks["nll"][k] == pytest.approx(-density.mean().item(), rel=1e-5)
    by_window = [optimal_filter.predict(part.process, window.numpy().astype(float), (1, 2), "stationary")
                 for window in x]
    for k in (1, 2):
        assert floors["mse"][k] == pytest.approx(np.mean([w["squared_error"][k] for w in by_window]))
    assert floors["nll"][1] == pytest.approx(-np.mean([w["log_likelihood"][1:] for w in by_window]))


def test_floors_are_kept_and_found_again(data_dir, monkeypatch):
    series, part = part_of(data_dir, 40, 2000)
    first, calls = unseen.floor_blocks(part, [1]), []
    monkeypatch.setattr(optimal_filter, "filter_each_window", lambda *given: calls.append(given))
    again = unseen.floor_blocks(part, [1])
    assert np.array_equal(first["mse"][1], again["mse"][1]) and np.array_equal(first["nll"][1], again["nll"][1])
    for size in ((40, 1960), (50, 2000)):
        other = unseen.unseen_part(series, part.process, *size)
        with pytest.raises((TypeError, AttributeError)):
            unseen.floor_blocks(other, [1])
    assert len(calls) == 2
    text = (data_dir / "floors.json").read_text()
    (data_dir / "floors.json").write_text(text.replace("1", "2"))
    with pytest.raises((TypeError, AttributeError)):
        unseen.floor_blocks(part, [1])


def test_standard_errors_are_the_spread_over_repeated_draws():
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.5, 1.5, 60)
    weights /= weights.sum()
    found = []
    for _ in range(400):
        hard = rng.normal(size=60)
        floor = 8 + hard / math.sqrt(60) + 0.02 * rng.normal(size=60)
        mse = 1.01 * floor + 0.05 * rng.normal(size=60)
        found.append([*unseen.mean_and_error(mse, weights), *unseen.excess_and_error(mse, floor, weights)])
    mean, mean_error, excess, excess_error = np.array(found).T
    assert excess.mean() == pytest.approx(1, abs=0.02) and mean.mean() == pytest.approx(8.08, abs=0.01)
    assert mean_error.mean() == pytest.approx(mean.std(), rel=0.12)
    assert excess_error.mean() == pytest.approx(excess.std(), rel=0.12)
    equal = np.full(8, 1 / 8)
    values = rng.normal(size=8)
    assert unseen.mean_and_error(values, equal)[1] == pytest.approx(values.std(ddof=1) / math.sqrt(8))
    assert unseen.mean_and_error(values[:4], equal[:4] * 2) == (pytest.approx(values[:4].mean()), None)


def test_rows_and_their_table():
    weights = np.array([0.1, 0.2, 0.2, 0.2, 0.3])
    floor, mse = np.array([8.0, 8.1, 7.9, 8.2, 8.0]), np.array([8.1, 8.25, 7.98, 8.3, 8.14])
    nll = np.array([50.0, 50.1, 49.9, 50.2, 50.0])
    blocks = {"mse": {1: mse, 2: mse + 1}, "nll": {1: nll, 2: nll + 2}}
    floors = {"mse": {1: floor, 2: floor + 0.5}, "nll": {1: nll - 0.25 - (mse - floor)}}
    one, two = unseen.unseen_rows(blocks, floors, weights)
    assert one["test_mse"] == pytest.approx(weights @ mse) and one["optimal_mse"] == pytest.approx(weights @ floor)
    assert one["excess_percent"] == pytest.approx(100 * (weights @ mse / (weights @ floor) - 1))
    assert one["excess_nats"] == pytest.approx(0.25 + weights @ (mse - floor))
    assert one["excess_nats_error"] == pytest.approx(unseen.mean_and_error(mse - floor, weights)[1])
    assert two["horizon"] == 2 and two["excess_nats"] is two["optimal_nll"] is two["excess_nats_error"] is None
    lines = [line.split() for line in unseen.unseen_table([one, two]).splitlines()]
    assert " ".join(lines[0]) == "horizon test MSE optimal excess NLL (nats) optimal NLL above optimal"
    assert " ".join(lines[2][:10]) == "1 8.16 ± 0.06 8.04 ± 0.05 +1.47 ± 0.17"
    assert lines[3][-2:] == ["–", "–"]
    alone = unseen.unseen_rows({"mse": {1: mse}}, {}, weights)
    assert unseen.unseen_table(alone).splitlines()[2].split() == ["1", "8.16", "±", "0.06", "–", "–"]


@pytest.mark.parametrize("value, error, form, text", [
    (0.19734, 0.0042, "+.2f", "+0.197 ± 0.004 %"), (0.19734, 0.0149, "", "0.197 ± 0.015 %"),
    (0.19734, 0.0196, "", "0.20 ± 0.02 %"), (-12.3, 3.4, "+.2f", "-12 ± 3 %"), (1234.5, 210.0, "", "1234 ± 210 %"),
    (1.5, None, "+.2f", "+1.50 %"), (1.5, 0.0, ".3f", "1.500 %"), (None, 0.1, "", "–"), (2.0, 1.0, "", "2.0 ± 1.0 %")])
def test_no_more_digits_than_the_standard_error_supports(value, error, form, text):
    assert unseen.with_error(value, error, form, " %") == text


def test_eval_prints_the_errors_on_the_test_series(script, tiny_checkpoint, shared_data):
    out = script(NAME, "--eval", tiny_checkpoint, "--test-steps", 25_000).out
    _, part = part_of(shared_data, 128, 25_000)
    model, _ = mamba_model.load_checkpoint(tiny_checkpoint)
    rows = unseen.unseen_rows(unseen.model_blocks(model, part), unseen.floor_blocks(part, [1]), part.weights)
    assert out.endswith(f"{part.describe()}\n{unseen.unseen_table(rows)}\n") and "±" in out.splitlines()[-1]
    assert "test series" not in script(NAME, "--eval", tiny_checkpoint, "--test-steps", 0).out
    assert f"{unseen.TEST_STEPS // 128 * 128:,} steps, newly drawn" in script(NAME, "--eval", tiny_checkpoint).out


def test_settings_are_compared_on_the_same_blocks():
    rng, weights = np.random.default_rng(0), np.full(8, 1 / 8)
    floor = rng.normal(8, 0.1, 8)
    models = [floor + rng.normal(0.1 + shift, 0.02, 8) for shift in (0, 0.01, 0.2, 0.22, 0.24)]
    nlls = [50 + model for model in models]

    def report(i, floors=True):
        return {"blocks": {"mse": {"1": models[i].tolist()}, "nll": {"1": nlls[i].tolist()}},
                "weights": weights.tolist(),
                "floors": {"mse": {"1": floor.tolist()}, "nll": {"1": (floor + 50).tolist()}} if floors else {}}

    elsewhere = report(0)
    elsewhere["floors"]["mse"]["1"] = (1.001 * floor).tolist()
    rounded = report(1)
    rounded["floors"]["mse"]["1"] = (floor * (1 + 1e-15)).tolist()  # as the filter of more horizons gives it
    first, second, other, moved, horizons = unseen.compared({
        "full": [report(0), report(1)], "lti": [report(2), report(3), report(4)], "else": [report(0, False)],
        "elsewhere": [elsewhere], "horizons": [rounded]})
    assert (moved["compared_with"], horizons["compared_with"]) == (None, "full")
    scale = 100 / floor.mean()
    assert (first["setting"], first["seeds"], first["compared_with"]) == ("full", 2, None)
    assert "difference_percent" not in first and "excess_percent" not in other and other["compared_with"] is None
    assert (second["seeds"], second["compared_with"]) == (3, "full")
    means = [np.mean(models[:2], axis=0), np.mean(models[2:], axis=0)]
    seeds = [np.var([m.mean() for m in models[:2]], ddof=1) / 2, np.var([m.mean() for m in models[2:]], ddof=1) / 3]
    for row, values, variance, key in (
            (first, means[0] - floor, seeds[0], "excess_percent"),
            (second, means[1] - floor, seeds[1], "excess_percent"),
            (second, means[1] - means[0], sum(seeds), "difference_percent")):
        assert row[key] == pytest.approx(scale * values.mean())
        assert row[f"{key}_error"] == pytest.approx(scale * math.sqrt(values.var(ddof=1) / 8 + variance))
    assert second["difference_nats"] == pytest.approx((means[1] - means[0]).mean())
    assert first["excess_nats"] == pytest.approx((means[0] - floor).mean())
    lines = unseen.compared_table([first, second]).splitlines()
    assert lines[0].split("  ")[0] == "on the test series" and "above the first (nats)" in lines[0]
    assert lines[2].split()[:2] == ["full", "2"] and lines[2].split()[-1] == "–"
    assert unseen.with_error(second["difference_percent"], second["difference_percent_error"], "+.2f", " %") in lines[3]


def test_windows_of_eval_are_longer_than_the_largest_horizon(script, tiny_checkpoint, tmp_path):
    model = mamba_model.CausalTimeSeriesMamba(6, **TINY_MODEL, max_horizon=4)
    flags = {**mamba_model.read_checkpoint(tiny_checkpoint)["args"], "max_horizon": 4}
    mamba_model.save_checkpoint(tmp_path / "a.pt", 1, model.state_dict(), {}, 1.0, 1.0, flags)
    refused = script(NAME, "--eval", tmp_path / "a.pt", "--seq-len", 4, "--test-steps", 0)
    assert refused.code == 2 and "must be longer than the largest horizon, 4" in refused.err
    assert script(NAME, "--eval", tmp_path / "a.pt", "--seq-len", 5, "--test-steps", 0).code == 0


def test_eval_of_several_compares_them_by_setting(script, tiny_checkpoint, shared_data, tmp_path, monkeypatch):
    """Two seeds of one setting and a third model: one table, one CSV and one figure, beside the first checkpoint."""
    saved, drawn = torch.load(tiny_checkpoint, weights_only=True), []
    for seed, shift in ((1, 0.0), (2, 0.01), (3, 0.1)):
        state = {name: value + shift for name, value in saved["model_state_dict"].items()}
        mamba_model.save_checkpoint(tmp_path / f"m{seed}.pt", 1, state, {}, 1.0, 1.0,
                                    {**saved["args"], "seed": seed, "freeze_A": seed == 3})
    monkeypatch.setattr(figures, "save", lambda fig, path: drawn.append((fig, path)))
    paths = [tmp_path / f"m{seed}.pt" for seed in (1, 2, 3)]
    out = script(NAME, "--eval", *paths, "--test-steps", 15_000).out
    _, part = part_of(shared_data, 128, 15_000)
    reports = [unseen.as_report(mamba_model.load_checkpoint(path)[0], part) for path in paths]
    rows = unseen.compared({"m1": reports[:2], "m3": reports[2:]})
    assert out.count("test series: 14,976 steps") == 3 and f"\n{unseen.compared_table(rows)}\nwrote " in out
    table = list(csv.DictReader((tmp_path / "compare_m1_m2_m3_test.csv").read_text().splitlines()))
    assert [row["setting"] for row in table] == ["m1", "m3"] and [row["seeds"] for row in table] == ["2", "1"]
    assert float(table[1]["difference_percent"]) == rows[1]["difference_percent"]
    ((fig, path),) = drawn
    assert path == tmp_path / "compare_m1_m2_m3_test.png"
    (ax,) = fig.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["m1 (2 seeds)", "m3"]
    assert ax.get_ylim() == (1.5, -0.5)  # from above, as in the table
    for place, (container, row) in enumerate(zip(ax.containers, rows, strict=True)):
        low, high = container[2][0].get_segments()[0][:, 0]
        assert (low + high) / 2 == pytest.approx(row["excess_percent"])
        assert (high - low) / 2 == pytest.approx(row["excess_percent_error"])
        assert container[0].get_ydata().tolist() == [place]
    assert ax.get_xlabel() == "MSE above the exact filter (%)\nmean ± standard error"


def test_errors_that_differ_much_are_drawn_on_a_logarithmic_axis():
    def panels(values, key="excess_percent"):
        rows = [{"setting": "x", "seeds": 1, key: value, f"{key}_error": 0.01} for value in values]
        return [ax.get_xscale() for ax in unseen.draw_compared(rows).axes]

    assert panels([0.2, 1.1]) == ["log"] and panels([0.2, 0.9]) == ["linear"]
    assert panels([-0.2, 1.1]) == ["linear"]  # a model by chance better than the filter
    assert panels([0.2, 1.1], "difference_percent") == ["linear"]
