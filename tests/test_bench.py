"""The speed tables: what is compared computes the same; every cell of every table; limits; every row at a tiny size."""

import csv
import itertools
import json
import math
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bench
import dataset
import generate
from mamba_model import CausalTimeSeriesMamba, MambaBlock, autocast

CPU = torch.device("cpu")


class LoopBlock(MambaBlock):
    """A stand-in for a peer: our block by the loop over time, called as a peer's block is."""

    def forward(self, x, backend="reference"):
        return super().forward(x, "reference")


@pytest.fixture
def tiny_bench():
    return SimpleNamespace(device=CPU, repeats=2, limits=bench.Limits(CPU, True), size=bench.SIZES["quick"])


def tiny_model(**sizes):
    torch.manual_seed(0)
    return CausalTimeSeriesMamba(3, **{"d_model": 16, "n_layers": 2, "d_state": 4, "d_ff": 16, **sizes}).eval()


def as_tuples(lines):
    return [(line.what, line.ours, line.unit, line.peer, line.theirs, line.ratio, line.limit) for line in lines]


# ---- numbers and cells


def test_a_ratio_is_peer_over_ours_the_median_over_pairs():
    line = bench.compared("x", [1.0, 2.0, 10.0], "peer", [3.0, 8.0, 10.0])  # pairs: 3, 4, 1; of the medians: 4
    assert (line.ours, line.theirs, line.ratio, line.peer) == (2.0, 8.0, 3.0, "peer")
    once = bench.compared("x", [1.0, 2.0, 10.0], "peer", [6.0])  # against our median
    assert (once.ours, once.theirs, once.ratio, once.peer) == (2.0, 6.0, 3.0, "peer (once)")
    assert bench.compared("x", [2.0], "peer", [6.0]).peer == "peer"  # --repeats 1: nothing to be told of
    alone = bench.compared("x", [1.0, 4.0, 3.0], None, None, limit=1.5, unit="B")
    assert as_tuples([alone]) == [("x", 3.0, "B", "", None, None, 1.5)]


@pytest.mark.parametrize(("value", "unit", "text"), [
    (123.4, "s", "123 s"), (1.0, "s", "1 s"), (0.0123, "s", "12.3 ms"), (0.999, "s", "999 ms"), (2.5e-5, "s", "25 µs"),
    (5e-8, "s", "0.05 µs"), (2.5 * 2**30, "B", "2.5 GiB"), (3 * 2**20, "B", "3 MiB"), (512, "B", "0.5 KiB"),
    (0.931, "share", "93 %"), (None, "s", "")])
def test_quantities(value, unit, text):
    assert bench.quantity(value, unit) == text


def test_cells_stand_under_their_titles(capsys):
    line = bench.Line("both", 0.02, peer="mambapy", theirs=0.5, ratio=25.0, limit=0.005)
    assert dict(zip(bench.HEADER, bench.cells(line), strict=True)) == {
        "": "both", "ours": "20 ms", "peer": "mambapy", "peer's": "500 ms", "ratio": "25x", "limit": "5 ms",
        "ours / limit": "4.00x (25 %)"}
    assert bench.cells(bench.Line("memory", 2048.0, unit="B")) == ["memory", "2 KiB", "", "", "", "", ""]
    bench.show("a title", [line], ["a note"])
    title, header, _, row, note = capsys.readouterr().out.strip("\n").splitlines()
    assert (title, header.split()[0], row.split()[0], note) == ("a title", "ours", "both", "  a note")


def test_sides_take_turns_and_a_slow_one_is_measured_once(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def measure(name, seconds):
        order.append(name)
        now[0] += seconds
        return seconds

    sides = {"a": lambda: measure("a", 1.0), "b": lambda: measure("b", bench.PATIENCE + 1),
             "c": lambda: measure("c", 2.0)}
    assert bench.interleaved(sides, 2) == {"a": [1.0, 1.0], "b": [bench.PATIENCE + 1], "c": [2.0, 2.0]}
    assert order == ["a", "b", "c", "a", "c", "a", "c"]


def test_a_settled_measurement_is_the_second_of_two():
    ticks = itertools.count()
    found = bench.interleaved({"a": lambda: next(ticks), "b": lambda: next(ticks)}, 2, settle=True)
    assert found == {"a": [3, 7], "b": [5, 9]}  # after the warm-up, 0 and 1


def test_laps_split_the_time_between_the_parts(monkeypatch):
    ticks = iter([10.0, 12.0, 17.0, 20.0, 28.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(ticks))
    laps = bench.Laps(CPU)
    laps("forward")
    laps("backward")
    assert laps.seconds() == {"forward": 2.0, "backward": 5.0}
    assert bench.timed(lambda: None, CPU, per=4)() == 2.0


def test_lap_times_and_lines():
    found = {"ours": [{"forward": 1.0, "backward": 2.0}, {"forward": 3.0, "backward": 5.0}],
             "peer": [{"forward": 4.0, "backward": 8.0}, {"forward": 6.0, "backward": 20.0}]}
    assert bench.lap_times(found["ours"], "backward") == [2.0, 5.0] and bench.lap_times(found["ours"]) == [3.0, 8.0]
    assert as_tuples(bench.lap_lines(found, "peer", {"forward": 0.5, "backward": 0.25}, "both")) == [
        ("forward", 2.0, "s", "peer", 5.0, 3.0, 0.5), ("backward", 3.5, "s", "peer", 14.0, 4.0, 0.25),
        ("both", 5.5, "s", "peer", 19.0, (12 / 3 + 26 / 8) / 2, 0.75)]
    alone = bench.lap_lines({"ours": [{"forward": 1.0, "optimiser": 2.0}]}, None, {"forward": 0.5}, "step")
    assert as_tuples(alone) == [("forward", 1.0, "s", "", None, None, 0.5),
                                ("optimiser", 2.0, "s", "", None, None, None), ("step", 3.0, "s", "", None, None, 0.5)]


def test_peak_memory_counts_what_lives_at_once():
    size, floats = 4 * 2**20, 2**20

    def allocate():
        a = torch.empty(floats)
        del a
        return torch.empty(floats), torch.empty(floats)

    assert bench.peak_memory(allocate, CPU) == pytest.approx(2 * size, rel=0.01)
    line = bench.memory_line({"ours": allocate, "peer": lambda: torch.empty(floats)}, "peer", CPU)
    assert line.unit == "B" and line.ours == pytest.approx(2 * size, rel=0.01)
    assert line.theirs == pytest.approx(size, rel=0.01) and line.ratio == pytest.approx(0.5, rel=0.02)
    assert bench.memory_line({"ours": allocate}, None, CPU).theirs is None


# ---- limits


def test_a_limit_is_one_thread_times_the_threads(two_threads):
    limits, seen = bench.Limits(CPU, True), []
    limits.fastest(lambda: seen.append(torch.get_num_threads()))
    assert set(seen) == {1} and torch.get_num_threads() == 2
    limits.fastest = lambda function: 1.0
    assert limits.gemms([(4, 3, 2)], torch.float32, ("forward", "backward")) == 3 / 2
    assert limits.exps == 2 * 2**12 and limits.bandwidth == 8 * 2**16  # a copy reads and writes 4 bytes per number
    assert limits.text() == "copies 0 GB/s, 0.0e9 exp/s"


def test_a_limit_is_the_fastest_of_many_calls(monkeypatch):
    times = iter([5e-3, 4e-3, 3e-3, 6e-3, 7e-3, 8e-3])
    monkeypatch.setattr(bench, "timed", lambda function, device, per=1: lambda: next(times))
    limits = bench.Limits(CPU, True)
    monkeypatch.setattr(bench.time, "perf_counter", itertools.count().__next__)  # the time is up: five rounds suffice
    assert limits.fastest(lambda: None) == 3e-3


def test_products_of_each_pass_have_the_right_shapes():
    limits, shapes = bench.Limits(CPU, True), []
    limits.threads, limits.fastest = 1, lambda function: shapes.append(tuple(function().shape)) or 1.0
    assert limits.gemms([(4, 3, 2)], torch.float32, "forward") == 1.0 and shapes == [(4, 2)]
    assert limits.gemms([(4, 3, 2)], torch.float32, "backward") == 2.0 and shapes[1:] == [(4, 3), (3, 2)]


def test_block_gemms_are_the_products_that_a_block_computes():
    """Counted by torch itself on the forward pass; 2 m k n operations each, and the convolution's."""
    from torch.utils.flop_counter import FlopCounterMode

    batch, time_, d_model, d_state = 2, 24, 32, 8
    block = MambaBlock(d_model, d_state)
    with FlopCounterMode(display=False) as counter:
        for projection, width in ((block.in_proj, d_model), (block.x_proj, block.d_inner),
                                  (block.dt_proj, block.dt_rank), (block.out_proj, block.d_inner)):
            projection(torch.randn(batch, time_, width))
    shapes = bench.block_gemms(batch, time_, d_model, block.d_inner, d_state)
    assert sum(2 * math.prod(shape) for shape in shapes) == counter.get_total_flops()


class KnownLimits:
    """Limits of a machine whose rates are known: a product of matrices takes 1 s per million multiplications."""

    def __init__(self, device_type="cpu"):
        self.device, self.exps, self.bandwidth = SimpleNamespace(type=device_type), 1e3, 1e4

    def gemms(self, shapes, dtype, passes):
        assert dtype == (torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        return sum(math.prod(shape) for shape in shapes) / 1e6 * {"forward": 1, "backward": 2}[passes]

    def fastest(self, function):
        return float(function()) / 1e4  # a sum of ones: their number


def test_limits_of_a_block_and_of_a_training_step():
    batch, time_, d_model, d_state = 2, 5, 32, 4
    products = batch * time_ * (32 * 128 + 64 * (2 + 8) + 2 * 64 + 64 * 32) / 1e6
    exps = batch * time_ * 64 * 4 / 1e3
    block = bench.block_limits(KnownLimits(), (batch, time_, d_model, d_state))
    assert block == pytest.approx({"forward": products + exps, "backward": 2 * products + exps})
    args = SimpleNamespace(seq_len=time_, d_model=d_model, d_state=d_state, n_layers=3, d_ff=50)
    ends = batch * time_ * (7 * 32 + 32 * 50 + 50 * 7) / 1e6
    assert bench.step_limits(KnownLimits(), args, batch, 7) == pytest.approx(
        {"forward": 3 * block["forward"] + ends, "backward": 3 * block["backward"] + 2 * ends})


def test_limits_of_the_kernels_on_a_gpu(monkeypatch):
    """Bytes over the bandwidth or exps over their rate, whichever takes longer; bfloat16 has two bytes."""
    from kernels import scan_cuda

    monkeypatch.setattr(scan_cuda, "chunk_states_shape",
                        lambda batch, time_, d_inner, n: (batch, -(-time_ // 8), d_inner, n))
    batch, time_, d_inner, n = 2, 16, 64, 4
    row, narrow, states = 2 * batch * time_ * d_inner, 2 * batch * time_ * n, 2 * batch * 2 * d_inner * n
    n_bytes = {"_conv_forward_kernel": 2 * row, "_conv_backward_kernel": 3 * row,
               "scan_forward": 4 * row + 2 * narrow + states, "scan_backward": 8 * row + 4 * narrow + states}
    limits = KnownLimits("cuda")
    limits.exps = 1e12
    expected = {name: count / 1e4 for name, count in n_bytes.items()}
    assert bench.kernel_limits(limits, batch, time_, d_inner, n) == pytest.approx(expected)
    products = batch * time_ * (32 * 128 + 64 * (2 + 8) + 2 * 64 + 64 * 32) / 1e6
    assert bench.block_limits(limits, (batch, time_, 32, n)) == pytest.approx({
        "forward": products + expected["_conv_forward_kernel"] + expected["scan_forward"],
        "backward": 2 * products + expected["_conv_backward_kernel"] + expected["scan_backward"]})
    limits.exps, limits.bandwidth = 1e3, 1e12
    updates = batch * time_ * d_inner / 1e3
    assert list(bench.kernel_limits(limits, batch, time_, d_inner, n).values()) == pytest.approx(
        [updates, updates, updates * (n + 2), updates * (n + 2)])


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_limit_of_a_generation_step(device_type):
    model = tiny_model()
    n_bytes = 4 * sum(p.numel() for p in model.parameters())
    exps = 5 * sum(layer.mamba.d_inner * 4 for layer in model.layers)  # five samples, d_state 4
    seconds = n_bytes / 1e4 if device_type == "cuda" else n_bytes / 4 / 1e4
    assert bench.generation_limit(KnownLimits(device_type), model, 5) == pytest.approx(seconds + exps / 1e3)


# ---- what is compared computes the same


def test_the_prefix_generator_agrees_with_the_recurrence():
    model = tiny_model()
    seed = np.random.default_rng(0).standard_normal((2, 10, 3)).astype(np.float32)
    series, _ = bench.generate_by_prefix(model, torch.from_numpy(seed), 20)
    np.testing.assert_allclose(series, generate.generate(model, seed, 20)[0], rtol=1e-4, atol=1e-5)


def test_prefix_steps_left_out_count_at_the_length_of_the_one_that_was_computed(monkeypatch):
    model, lengths = tiny_model(n_layers=1), []

    class Counted(bench.Laps):
        def seconds(self):
            return {"step": float(lengths[-1])}

    model.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    monkeypatch.setattr(bench, "Laps", Counted)
    series, total = bench.generate_by_prefix(model, torch.zeros(1, 5, 3), 10, every=4)
    assert series.shape == (1, 10, 3) and lengths == [5, 9, 13]
    assert total == 4 * 5 + 4 * 9 + 2 * 13


def test_a_peer_block_takes_our_weights():
    ours = MambaBlock(16, 4)
    theirs = bench.PeerBlock(MambaBlock, ours)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.block.named_parameters(), strict=True):
        assert torch.equal(a, b) and a is not b, name
    model = tiny_model()
    copy = bench.with_blocks_of(LoopBlock, model)
    assert all(isinstance(layer.mamba.block, LoopBlock) for layer in copy.layers)
    assert all(isinstance(layer.mamba, MambaBlock) for layer in model.layers)  # ours is left as it is
    x = torch.randn(2, 9, 3)
    assert torch.allclose(copy.eval()(x)["1"], model(x)["1"], atol=1e-5)


def test_a_pass_runs_both_ways_on_both_sides():
    block, x = MambaBlock(8, 2), torch.randn(2, 5, 8, requires_grad=True)
    seconds = bench.block_pass(block, x, "reference", False)()
    assert list(seconds) == ["forward", "backward"] and min(seconds.values()) > 0
    assert x.grad is not None and all(p.grad is not None for p in block.parameters())


def test_a_training_step_is_measured_in_its_three_parts():
    args = bench.training_flags(bench.TINY_FLAGS, lr=0.01)
    assert args.lr == 0.01 and args.batch_size == 4 and args.no_compile and args.no_train_eval
    model = bench.training.build_model(args, 3).train()
    before = [p.detach().clone() for p in model.parameters()]
    seconds = bench.step_pass(model, torch.randn(4, 32, 3), args)()
    assert list(seconds) == ["forward", "backward", "optimiser"]
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_what_is_captured_is_the_training_scripts_step(monkeypatch):
    """On a CPU, with a stand-in for the capture that calls the function as the warm-up does."""
    captures = []

    def captured(function, example, state, device):
        function(example)
        captures.append([function, example, state(), device])
        return function

    monkeypatch.setattr(bench, "captured", captured)
    args, x = bench.training_flags(bench.TINY_FLAGS), torch.randn(4, 32, 3)
    model = bench.training.build_model(args, 3).train()
    before = [p.detach().clone() for p in model.parameters()]
    assert bench.replayed_step(model, x, args)() > 0
    (_, example, state, device), = captures
    assert example is x and device == CPU
    parameters = list(model.parameters())
    assert all(a is b for a, b in zip(state, parameters, strict=False)) and state[len(parameters)].shape == (3,)
    assert len(state) == 4 * len(parameters) + 1  # the sums; Adam's two moments and step count of each parameter
    assert any(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    block = MambaBlock(8, 2)
    assert bench.replayed_pass(block, torch.randn(2, 5, 8), "reference")() > 0
    assert all(p.grad is not None for p in block.parameters()) and captures[1][2] == []


class Affine(nn.Module):
    """The smallest model with the call of ours."""

    def __init__(self):
        super().__init__()
        self.linear, self.modes = nn.Linear(3, 3), []

    def forward(self, x):
        self.modes.append(self.training)
        return {"1": self.linear(x)}


def test_the_common_training_loop_learns_on_every_window_and_adds_all_losses(monkeypatch):
    """Against the same epoch written out here, with one batch, so that the order of the windows doesn't matter."""
    monkeypatch.setattr(bench, "WORKERS", 0)
    loader, shuffled = torch.utils.data.DataLoader, []

    def make_loader(windows, batch_size, persistent_workers, **more):  # without processes nothing can be persistent
        shuffled.append(more["shuffle"])
        return loader(windows, batch_size, **more)

    monkeypatch.setattr(torch.utils.data, "DataLoader", make_loader)
    X = np.random.default_rng(0).standard_normal((400, 3)).astype(np.float32)
    series = SimpleNamespace(X=X, n_steps=400)
    args = SimpleNamespace(seq_len=20, stride=10, val_fraction=0.2, batch_size=64, lr=0.01)
    torch.manual_seed(0)
    model = Affine()
    reference = Affine()
    reference.load_state_dict(model.state_dict())
    train, val, _ = dataset.split_windows(400, 20, 10, 0.2)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=bench.training.WEIGHT_DECAY)

    def loss_on(starts):
        x = torch.stack([torch.from_numpy(X[start:start + 20]) for start in starts])
        with autocast(CPU, True):
            prediction = reference(x)["1"]
        return F.mse_loss(prediction[:, :-1].float(), x[:, 1:])

    expected = loss_on(train)
    expected.backward()
    nn.utils.clip_grad_norm_(reference.parameters(), bench.training.GRAD_CLIP)
    optimizer.step()
    expected = expected.item() + loss_on(val).item()
    assert bench.common_training(series, args, model, CPU)() == pytest.approx(expected, rel=1e-5)
    assert model.modes == [True, False] and shuffled == [True, False]  # training, then validation
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_seconds_per_epoch_come_from_the_log_without_the_first(monkeypatch, tmp_path):
    def main(args):
        assert (args.epochs, args.data_dir, args.checkpoint.parent) == (4, tmp_path, tmp_path)
        signal.signal(signal.SIGINT, lambda number, frame: None)
        with open(args.checkpoint.with_name(f"{args.checkpoint.stem}_log.csv"), "w", newline="") as file:
            csv.writer(file).writerows([["epoch", "seconds"], [1, 10.0], [2, 12.5], [3, 14.0], [4, 16.0]])

    monkeypatch.setattr(bench.training, "main", main)
    handler = signal.getsignal(signal.SIGINT)
    assert bench.train_by_script(tmp_path, bench.TINY_FLAGS, CPU, 4) == 2.0
    assert signal.getsignal(signal.SIGINT) is handler


def test_the_busy_share_leaves_out_what_both_runs_have(monkeypatch):
    """Kernels take 3 s at the start and 0.5 s per epoch; an epoch takes 2 s."""
    monkeypatch.setattr(bench, "train_by_script", lambda folder, flags, device, epochs: epochs)
    monkeypatch.setattr(bench, "device_events", lambda function, device: [("start", 3.0), ("steps", 0.5 * function())])
    assert bench.busy_share("folder", "flags", CPU, 10, 2.0) == 0.25


# ---- each row, with known times: every line of its table


def known_pass(block, x, backend, amp):
    """Seconds that tell who was measured: ours 1, by the loop over time 3, a peer's 5, and half as much backward."""
    seconds = {"cpu": 1.0, "reference": 3.0}[backend] if isinstance(block, MambaBlock) else 5.0
    return lambda: {"forward": seconds * len(x), "backward": seconds * len(x) / 2}


def test_lines_of_the_row_scan(monkeypatch, tiny_bench):
    monkeypatch.setitem(bench.PEERS, "cpu", {"stand-in": ("torch", LoopBlock), "transformers": ("torch", LoopBlock)})
    monkeypatch.setattr(bench, "block_pass", known_pass)
    monkeypatch.setattr(bench, "peak_memory", lambda function, device: 100 * function()["forward"])
    monkeypatch.setattr(bench, "block_limits",
                        lambda limits, shape: {"forward": shape[0] / 8, "backward": shape[0] / 4})
    title, lines, notes = bench.measure_scan(tiny_bench)
    assert title == "scan: a Mamba block, 2 x 48, d_model 16, d_state 4, float32"
    assert as_tuples(lines) == [
        ("forward", 2.0, "s", "stand-in", 10.0, 5.0, 0.25), ("backward", 1.0, "s", "stand-in", 5.0, 5.0, 0.5),
        ("both", 3.0, "s", "stand-in", 15.0, 5.0, 0.75), ("peak memory", 200.0, "B", "stand-in", 1000.0, 5.0, None),
        ("both, one sequence", 1.5, "s", "transformers", 7.5, 5.0, 0.375)]
    assert [note.split(",")[0] for note in notes[:2]] == ["stand-in", "transformers"]
    assert all(float(note.rpartition(" ")[2]) < 1e-5 for note in notes[:2])  # how far the outputs are apart


def test_lines_of_the_row_step(monkeypatch, tiny_bench):
    def known_step(model, x, args):
        assert model.training and x.shape == (4, 32, 20)
        seconds = 3.0 if isinstance(model.layers[0].mamba, bench.PeerBlock) else 1.0
        return lambda: {"forward": seconds, "backward": 2 * seconds, "optimiser": 4.0}

    monkeypatch.setitem(bench.PEERS, "cpu", {"stand-in": ("torch", LoopBlock), "transformers": ("torch", None)})
    monkeypatch.setattr(bench, "step_pass", known_step)
    monkeypatch.setattr(bench, "peak_memory", lambda function, device: 100 * function()["forward"])
    monkeypatch.setattr(bench, "step_limits", lambda *args: {"forward": 0.5, "backward": 0.25})
    title, lines, _ = bench.measure_step(tiny_bench)
    assert title == "step: training, 4 x 32, 2 layers, d_model 16, d_state 4"
    assert as_tuples(lines) == [
        ("forward", 1.0, "s", "stand-in", 3.0, 3.0, 0.5), ("backward", 2.0, "s", "stand-in", 6.0, 3.0, 0.25),
        ("optimiser", 4.0, "s", "stand-in", 4.0, 1.0, None), ("step", 7.0, "s", "stand-in", 13.0, 13 / 7, 0.75),
        ("peak memory", 100.0, "B", "stand-in", 300.0, 3.0, None)]


def test_lines_of_the_row_epoch(monkeypatch, tiny_bench):
    def train_by_script(folder, flags, device, epochs):
        series = dataset.load_series(Path(folder))  # what the script would train on
        assert (series.n_steps, flags, device, epochs) == (1000, bench.TINY_FLAGS, CPU, 2)
        return 0.25

    def common_training(series, args, model, device):
        assert series.n_steps == 1000 and isinstance(model.layers[0].mamba, MambaBlock)
        return lambda: None

    monkeypatch.setattr(bench, "train_by_script", train_by_script)
    monkeypatch.setattr(bench, "common_training", common_training)
    monkeypatch.setattr(bench, "timed", lambda function, device: lambda: 1.0)
    title, lines, notes = bench.measure_epoch(tiny_bench)
    # of 900 steps training windows begin at 0, 64, …, 832; of the 100 behind them one window in two strides
    assert title == "epoch: 14 training windows in 4 steps, 2 validation windows of 32 steps, 2 layers" and not notes
    assert as_tuples(lines) == [("epoch", 0.25, "s", "DataLoader, our cpu blocks", 1.0, 4.0, None)]


def test_lines_of_the_row_generate(monkeypatch, tiny_bench):
    now = [0.0]

    def known_generate(model, seed, n_steps, temperature=0.0):
        assert seed.shape == (3, 8, 20)
        assert (model.mixture, temperature) in ((0, 0.0), (16, 1.0))
        now[0] += n_steps / (25 if temperature else 32)
        return seed, np.ones((3, n_steps, 20), np.float32)

    def known_prefix(model, seed, n_steps, every=1):
        assert seed.shape == (3, 8, 20) and every == (1 if n_steps == 8 else 4)
        return torch.full((3, n_steps, 20), 1.5), n_steps / 2

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(bench.generate, "generate", known_generate)
    monkeypatch.setattr(bench, "generate_by_prefix", known_prefix)
    monkeypatch.setattr(bench, "generation_limit", lambda limits, model, n: (0.002 if model.mixture else 0.001) * n)

    title, lines, notes = bench.measure_generate(tiny_bench)
    assert title == "generate: 3 samples, 2 layers, d_model 16"
    assert as_tuples(lines) == [
        ("one of 16 steps", 1 / 32, "s", "prefix re-run, our scan", 0.5, 16.0, 0.003),
        ("the same, mixture of 16", pytest.approx(1 / 25), "s", "point head", 1 / 32, pytest.approx(25 / 32), 0.006)]
    assert "both ways agree to 5.0e-01 over the first 8 steps" in notes


# ---- the script


@pytest.fixture
def known_rows(monkeypatch):
    """Rows that measure nothing; returns the list of (row, bench) in the order in which they are asked for."""
    asked = []

    def measure(name, bench_):
        asked.append((name, bench_))
        return f"{name}: known", [bench.Line("a line", 0.5, peer="peer", theirs=1.0, ratio=2.0, limit=0.25)], ["a note"]

    for name in bench.ROWS:
        monkeypatch.setitem(bench.MEASURE, name, lambda bench_, name=name: measure(name, bench_))
    return asked


def test_the_rows_measure_what_they_are_called():
    assert bench.ROWS == ("scan", "step", "epoch", "generate")
    assert [measure.__name__ for measure in map(bench.MEASURE.get, bench.ROWS)] == [
        f"measure_{name}" for name in bench.ROWS]


def test_flags_choose_rows_repeats_and_sizes(script, known_rows):
    assert script("bench", "--device", "cpu").code == 0
    assert [name for name, _ in known_rows] == list(bench.ROWS)
    assert all(b.repeats == 5 and b.size is bench.SIZES["cpu"] and not b.limits.quick for _, b in known_rows)
    known_rows.clear()
    assert script("bench", "--device", "cpu", "--only", "generate,scan", "--repeats", "3", "--quick").code == 0
    assert [name for name, _ in known_rows] == ["scan", "generate"]  # the order of the rows, not of the flag
    assert all(b.repeats == 3 and b.size is bench.SIZES["quick"] and b.limits.quick for _, b in known_rows)
    assert all(b.device == CPU for _, b in known_rows)


def test_what_is_saved_is_what_is_printed(script, tmp_path, known_rows, monkeypatch):
    path, written = tmp_path / "new" / "bench.json", []
    write_text = bench.cli.write_text
    monkeypatch.setattr(bench.cli, "write_text", lambda path, text: written.append(text) or write_text(path, text))
    result = script("bench", "--device", "cpu", "--only", "scan,step", "--repeats", "2", "--save", path)
    assert result.code == 0 and result.out.endswith(f"\nwrote {path}\n") and len(written) == 2  # after each row
    saved = json.loads(path.read_text())
    assert list(json.loads(written[0])["rows"]) == ["scan"] and list(saved["rows"]) == ["scan", "step"]
    assert (saved["repeats"], saved["quick"]) == (2, False)
    line = {"what": "a line", "ours": 0.5, "unit": "s", "peer": "peer", "theirs": 1.0, "ratio": 2.0, "limit": 0.25}
    row = saved["rows"]["step"]
    assert (row["title"], row["lines"], row["notes"]) == ("step: known", [line], ["a note"]) and row["seconds"] >= 0
    assert "\nstep: known\n" in result.out and "a note" in result.out
    machine = saved["machine"]
    assert machine["torch"] == torch.__version__ and machine["threads"] == torch.get_num_threads()
    assert machine["device"].split()[1] == "CPU," and result.out.startswith(f"device {machine['device']}, threads ")


def test_nothing_is_saved_unless_asked_for(script, tmp_path, known_rows, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = script("bench", "--device", "cpu", "--only", "scan")
    assert "wrote" not in result.out and not list(tmp_path.iterdir())


def test_every_row_really_measures(script, tmp_path):
    path = tmp_path / "bench.json"
    started = time.perf_counter()
    result = script("bench", "--quick", "--repeats", "1", "--device", "cpu", "--save", path)
    elapsed = time.perf_counter() - started
    assert result.code == 0, result
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == list(bench.ROWS)
    assert 0 < sum(row["seconds"] for row in rows.values()) < elapsed
    for name, row in rows.items():
        assert row["title"].startswith(name) and row["lines"], name
        for line in row["lines"]:
            assert math.isfinite(line["ours"]) and 0 < line["ours"] < (elapsed if line["unit"] == "s" else 2**40)
    assert all(line["limit"] > 0 for line in rows["scan"]["lines"] if line["unit"] == "s")


def test_a_missing_peer_is_one_clear_line_and_no_error(script, monkeypatch):
    for name, (_, make_block) in bench.PEERS["cpu"].items():
        monkeypatch.setitem(bench.PEERS["cpu"], name, ("no_such_package", make_block))
    result = script("bench", "--quick", "--repeats", "1", "--device", "cpu", "--only", "scan")
    assert result.code == 0
    for name in ("mambapy", "transformers"):
        (line,) = (line for line in result.out.splitlines() if name in line)
        assert "not installed" in line and "pip install -r requirements-bench.txt" in line
    peers, (note,) = bench.find_peers(torch.device("cuda"))
    assert not peers and "pip install -r requirements-cuda.txt" in note


def test_the_peer_on_a_gpu_is_named_by_its_form(monkeypatch):
    """mamba-ssm is one fused function only with causal-conv1d: a slower form is never shown as the peer."""
    installed = {"mamba_ssm", "causal_conv1d"}
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: name if name in installed else None)
    peers, notes = bench.find_peers(torch.device("cuda"))
    assert list(peers) == ["mamba-ssm + causal-conv1d"] and not notes
    assert peers["mamba-ssm + causal-conv1d"] is bench.mamba_ssm_block
    installed.remove("causal_conv1d")
    peers, (note,) = bench.find_peers(torch.device("cuda"))
    assert list(peers) == ["mamba-ssm, slow form"] and "without causal-conv1d" in note


def test_bad_flags_are_refused(refused, tmp_path):
    assert "no row 'scam'" in refused("bench", "--only", "scan,scam") and "scan,step" in refused("bench", "--only", "")
    assert "no row 'figures'" in refused("bench", "--only", "figures")
    assert "--repeats" in refused("bench", "--repeats", "0")
    taken = tmp_path / "file"
    taken.write_text("")
    assert "can't write" in refused("bench", "--quick", "--only", "scan", "--save", taken / "x.json")
