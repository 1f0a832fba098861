"""The speed tables: what is compared computes the same; ratios, limits and goals; every row at a tiny size."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import bench
import dataset
import estimate_dimension
import figures
import generate
import markov_circles_timeseries as circles
from mamba_model import CausalTimeSeriesMamba, MambaBlock

CPU = torch.device("cpu")


# ---- arithmetic


def test_a_ratio_is_the_median_over_pairs_not_of_the_medians():
    ours, theirs = [1.0, 2.0, 10.0], [3.0, 8.0, 10.0]  # pairs: 3, 4, 1
    assert bench.ratio_of(theirs, ours) == 3.0
    assert bench.ratio_of([6.0], ours) == 3.0  # measured once: against our median


def test_goals_are_met_at_their_bound_and_missed_beyond():
    def goals(**more):
        return dict(bench.Line("x", 2.0, **more).goals())

    assert goals(ratio=5.0, min_ratio=5) == {"ratio ≥ 5": True}
    assert goals(ratio=4.9, min_ratio=5) == {"ratio ≥ 5": False}
    assert goals(max_ours=1.9) == {"≤ 1.9 s": False}
    assert goals(max_ours=2.0, limit=1.0, max_of_limit=2) == {"≤ 2 s": True, "≤ 2x limit": True}
    assert goals(limit=0.9, max_of_limit=2) == {"≤ 2x limit": False}
    assert goals(limit=3.0, max_of_limit=2) == {"≤ 2x limit": None}  # a limit that is beaten is none
    assert goals(min_ratio=5, max_of_limit=2) == {}  # no peer, no limit: nothing to say


@pytest.mark.parametrize(("value", "unit", "text"), [
    (0.0123, "s", "12.3 ms"), (2.5e-5, "s", "25 µs"), (123.4, "s", "123 s"), (3 * 2**20, "B", "3 MiB"),
    (0.931, "share", "93 %"), (None, "s", "")])
def test_quantities(value, unit, text):
    assert bench.quantity(value, unit) == text


def test_runs_take_turns_and_a_slow_one_is_measured_once(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def run(name, seconds):
        order.append(name)
        now[0] += seconds
        return seconds

    found = bench.interleaved({"a": lambda: run("a", 1.0), "b": lambda: run("b", bench.PATIENCE + 1),
                               "c": lambda: run("c", 2.0)}, 2)
    assert order == ["a", "b", "c", "a", "c", "a", "c"]
    assert found == {"a": [1.0, 1.0], "b": [bench.PATIENCE + 1], "c": [2.0, 2.0]}
    line = bench.compared("x", found["a"], "b", found["b"])
    assert line.peer == "b (once)" and line.ratio == bench.PATIENCE + 1


def test_laps_split_the_time_between_the_parts(monkeypatch):
    ticks = iter([10.0, 12.0, 17.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(ticks))
    laps = bench.Laps(CPU)
    laps("forward")
    laps("backward")
    assert laps.seconds() == {"forward": 2.0, "backward": 5.0}


def test_a_limit_is_one_thread_times_the_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        limits, seen = bench.Limits(CPU, True), []
        limits.fastest(lambda: seen.append(torch.get_num_threads()))
        assert set(seen) == {1} and torch.get_num_threads() == 2
        limits.fastest = lambda function: 1.0
        assert limits.gemms([(4, 3, 2)], torch.float32, ("forward", "backward")) == 3 / 2
        assert limits.exps == 2 * 2**12
    finally:
        torch.set_num_threads(threads)


def test_peak_memory_counts_what_lives_at_once():
    size, floats = 4 * 2**20, 2**20

    def run():
        a = torch.empty(floats)
        del a
        return torch.empty(floats), torch.empty(floats)

    assert bench.peak_memory(run, CPU) == pytest.approx(2 * size, rel=0.01)


def test_block_gemms_are_the_products_that_a_block_runs():
    """Counted by torch itself on the forward pass; 2 m k n operations each, and the convolution's."""
    from torch.utils.flop_counter import FlopCounterMode

    batch, time, d_model, d_state = 2, 24, 32, 8
    block = MambaBlock(d_model, d_state)
    with FlopCounterMode(display=False) as counter:
        for projection, width in ((block.in_proj, d_model), (block.x_proj, block.d_inner),
                                  (block.dt_proj, block.dt_rank), (block.out_proj, block.d_inner)):
            projection(torch.randn(batch, time, width))
    shapes = bench.block_gemms(batch, time, d_model, block.d_inner, d_state)
    assert sum(2 * math.prod(shape) for shape in shapes) == counter.get_total_flops()


# ---- the baselines compute what they are compared with


def test_the_prefix_generator_agrees_with_the_recurrence():
    torch.manual_seed(0)
    model = CausalTimeSeriesMamba(3, d_model=16, n_layers=2, d_state=4, d_ff=16).eval()
    seed = np.random.default_rng(0).standard_normal((2, 10, 3)).astype(np.float32)
    series, _ = bench.generate_by_prefix(model, torch.from_numpy(seed), 20)
    np.testing.assert_allclose(series, generate.generate(model, seed, 20)[0], rtol=1e-4, atol=1e-5)


def test_prefix_steps_left_out_count_at_the_length_of_the_one_that_ran(monkeypatch):
    model = CausalTimeSeriesMamba(3, d_model=16, n_layers=1, d_state=4, d_ff=16).eval()
    lengths = []

    class Counted(bench.Laps):
        def seconds(self):
            return {"step": float(lengths[-1])}

    model.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    monkeypatch.setattr(bench, "Laps", Counted)
    series, total = bench.generate_by_prefix(model, torch.zeros(1, 5, 3), 10, every=4)
    assert series.shape == (1, 10, 3) and lengths == [5, 9, 13]
    assert total == 4 * 5 + 4 * 9 + 2 * 13


def test_the_generator_by_step_draws_from_the_same_process():
    config = circles.config_of(circles.parse_args(["--n-steps", "4000", "--noise-std", "0.5"]))
    series = bench.generate_by_step(config)
    r, plane = series.process.radii[series.states], series.process.planes[series.states]
    point = r[:, None] * (np.cos(series.thetas)[:, None] * plane[:, 0] + np.sin(series.thetas)[:, None] * plane[:, 1])
    assert (series.X - point).std() == pytest.approx(0.5, rel=0.05)
    visited, _, lengths = dataset.runs(series.states)
    assert (lengths[:-1] % series.process.periods[visited[:-1]] == 0).all()
    assert (series.process.transition_matrix[visited[:-1], visited[1:]] > 0).all()


def test_one_query_a_k_gives_the_same_dimension():
    points = np.random.default_rng(0).standard_normal((500, 4)).astype(np.float32)
    assert bench.dimension_by_query(points, [5, 10]) == pytest.approx(
        estimate_dimension.levina_bickel(points, [5, 10]), rel=1e-5)


@pytest.mark.parametrize("strip", [bench.strip_by_step, bench.strip_by_visit])
def test_the_other_strips_show_the_same_colours(strip):
    states = np.repeat([3, 0, 2, 3], 25)

    def pixels(draw):
        fig, axes = figures.new_figure(panel=(4, 1))
        draw(axes[0, 0], states, 4)
        axes[0, 0].set(xlim=(-0.5, len(states) - 0.5), ylim=(0, 1))
        axes[0, 0].set_axis_off()
        fig.canvas.draw()
        image = np.asarray(fig.canvas.buffer_rgba())[..., :3]
        width = image.shape[1]
        return [tuple(image[image.shape[0] // 2, int(width * f)]) for f in (0.15, 0.4, 0.6, 0.85)]

    assert pixels(strip) == pixels(figures.state_strip)


def test_a_peer_block_takes_our_weights():
    ours = MambaBlock(16, 4)
    theirs = bench.PeerBlock(MambaBlock, ours)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.block.named_parameters(), strict=True):
        assert torch.equal(a, b) and a is not b, name


# ---- the script


def test_every_row_runs_and_is_saved(script, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "process_of", lambda command: lambda: None)  # the whole scripts: tested below
    path = tmp_path / "bench.json"
    result = script("bench", "--quick", "--repeats", "1", "--device", "cpu", "--save", path)
    assert result.code == 0, result
    saved = json.loads(path.read_text())
    assert list(saved["rows"]) == list(bench.ROWS) and saved["quick"]
    for name, row in saved["rows"].items():
        assert f"\n{name}: " in result.out and row["lines"], name
        assert row["title"].startswith(name)
        for line in row["lines"]:
            assert math.isfinite(line["ours"]) and line["ours"] >= 0
    assert "limit" in result.out and "MISSED" not in result.out  # tiny sizes say nothing about goals
    scan = saved["rows"]["scan"]["lines"]
    assert {line["peer"] for line in scan} >= {"loop over time"}
    assert all(line["limit"] > 0 for line in scan if line["unit"] == "s")


def test_a_missing_peer_is_one_clear_line_and_no_error(script, monkeypatch):
    monkeypatch.setattr(bench, "installed", lambda package: False)
    result = script("bench", "--quick", "--repeats", "1", "--device", "cpu", "--only", "scan")
    assert result.code == 0
    for name in ("mambapy", "transformers"):
        (line,) = (line for line in result.out.splitlines() if name in line)
        assert "not installed" in line and "pip install -r requirements-bench.txt" in line


def test_a_peer_that_is_installed_is_measured(script, monkeypatch):
    """A stand-in with the weights' names: the row must run it, compare its output and its memory."""
    monkeypatch.setitem(bench.PEERS, "cpu", {"stand-in": ("torch", Reference)})
    result = script("bench", "--quick", "--repeats", "1", "--device", "cpu", "--only", "step,scan")
    assert result.code == 0
    assert result.out.index("\nscan: ") < result.out.index("\nstep: ")  # the order of the rows
    (note,) = (line for line in result.out.splitlines() if "output differs by" in line)
    assert float(note.rpartition(" ")[2]) < 1e-5
    cells = [line.split() for line in result.out.splitlines() if line.startswith("peak memory")]
    assert len(cells) == 2 and all(row[4] == "stand-in" and float(row[7].rstrip("x")) > 1 for row in cells)


class Reference(MambaBlock):
    """Our block by the loop over time, called as a peer's block is."""

    def forward(self, x, backend="reference"):
        return super().forward(x, "reference")


def test_the_plain_script_makes_the_same_files(tmp_path, capsys):
    flags = ["--no-umap", "--n-steps", "600", "--data-dir"]
    bench.script_by_step([*flags, str(tmp_path / "plain")])
    circles.main(circles.parse_args([*flags, str(tmp_path / "ours")]))
    names = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("plain", "ours")]
    assert names[0] == names[1] and len(names[0]) >= 6
    assert circles.generate is not bench.generate_by_step and figures.state_strip is not bench.strip_by_step


def test_a_process_that_fails_is_no_measurement():
    bench.process_of([sys.executable, "-c", "pass"])()
    with pytest.raises(subprocess.CalledProcessError):
        bench.process_of([sys.executable, "-c", "raise SystemExit(3)"])()


def test_bad_flags_are_refused(refused, tmp_path):
    assert "no row 'scam'" in refused("bench", "--only", "scan,scam") and "scan,step" in refused("bench", "--only", "")
    assert "--repeats" in refused("bench", "--repeats", "0")
    taken = tmp_path / "file"
    taken.write_text("")
    assert "can't write" in refused("bench", "--quick", "--only", "figures", "--save", taken / "x.json")
