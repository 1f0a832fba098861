"""Speed tables: this project and a peer, measured in turn in one run.

Measures, for each row of --only, both sides --repeats times after a warm-up, and prints the medians, the ratio (the
median of peer / ours over the pairs) and ours over a physical limit that is measured in the same run, with what the
goal is. What takes longer than 30 s is measured once. A peer that isn't installed is named and left out.

  scan        a Mamba block, forward and backward: mambapy, transformers and a loop over time on a CPU; mamba-ssm, small
              batches and each kernel on a GPU
  step        a training step of the whole model, against the same model with a peer's blocks
  epoch       an epoch of the training script, against DataLoader workers, one .item() a step and eager kernels
  generate    generation by the recurrence, against running the model over the whole prefix at each step
  data        making the series, and its whole script with figures, against a loop over time with a patch a step
  dimension   the Levina-Bickel estimate for all k, against one neighbour query for each k
  figures     the state strip as one image, against a patch a step and a patch a visit

Memory on a CPU is the peak of what torch allocates (the kernels' own tiles, a few KiB a thread, are not seen); on a GPU
that of torch's allocator. The peers: pip install -r requirements-bench.txt (and requirements-cuda.txt for mamba-ssm).

Examples:
  python bench.py
  python bench.py --only scan,step,epoch,generate --repeats 7 --save bench.json
"""

import argparse
from pathlib import Path

import cli

ROWS = ("scan", "step", "epoch", "generate", "data", "dimension", "figures")


def row_names(text):
    """`scan,step` as ["scan", "step"], in the order of ROWS."""
    names = text.split(",")
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no row {unknown[0]!r}; choose from {','.join(ROWS)}")
    return [name for name in ROWS if name in names]


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    what = parser.add_argument_group("what is measured")
    what.add_argument("--only", type=row_names, default=",".join(ROWS), metavar="ROW,ROW,…", help="the rows to measure")
    what.add_argument("--repeats", type=cli.positive_int, default=5, metavar="N", help="times that each side is run")
    what.add_argument("--quick", action="store_true",
                      help="tiny sizes: shows that every row runs, and its numbers mean nothing")
    cli.add_device(what)
    files = parser.add_argument_group("files")
    files.add_argument("--save", type=Path, metavar="FILE.json",
                       help="also write the numbers here, in seconds and bytes (default: not written)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # before the slow imports: --help and a bad flag answer at once

import contextlib
import copy
import csv
import dataclasses
import functools
import gc
import importlib.util
import io
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from statistics import median
from types import SimpleNamespace
from unittest import mock

for _name, _level in (("KINETO_LOG_LEVEL", "99"), ("TORCH_CPP_LOG_LEVEL", "ERROR")):
    os.environ.setdefault(_name, _level)  # read at import: torch's profiler talks to stderr otherwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import circle_process
import dataset
import estimate_dimension
import figures
import generate
import markov_circles_timeseries as circles
import masked_model_gpu_mamba_next as training
from kernels.cuda_graph import captured
from kernels.selective_scan import choose_backend
from mamba_model import CausalTimeSeriesMamba, MambaBlock
from ranks import Ranks
from run_files import files_of

REPO = Path(__file__).resolve().parent
PATIENCE = 30.0  # seconds: what takes longer is measured once
WORKERS = 4  # of the common training loop
MODEL_FLAGS = "--d-state 32 --seq-len 1024 --stride 256 --batch-size 128"  # the README's setting
SMALL_FLAGS = "--d-model 64 --n-layers 2 --d-state 16 --d-ff 128 --seq-len 256 --stride 128 --batch-size 16"
TINY_FLAGS = "--d-model 16 --n-layers 2 --d-state 4 --d-ff 16 --seq-len 32 --stride 64 --batch-size 4"

# scan: batch, time, d_model, d_state. every: of the prefix's re-runs, the share that is timed. epochs: a run of ours.
SIZES = {
    "cpu": {"scan": (8, 1024, 128, 32), "step": SMALL_FLAGS, "epoch": SMALL_FLAGS, "epochs": 4, "epoch_steps": 20_000,
            "model": {}, "seed_len": 64, "gen_len": 2048, "every": 128, "long": 100_000,
            "data": 100_000, "points": 10_000, "strip": 5000},
    "cuda": {"scan": (128, 1024, 128, 32), "step": MODEL_FLAGS, "epoch": MODEL_FLAGS, "epochs": 20,
             "epoch_steps": 100_000, "model": {}, "seed_len": 64, "gen_len": 2048, "every": 1, "long": 100_000,
             "data": 100_000, "points": 10_000, "strip": 5000},
    "quick": {"scan": (2, 48, 16, 4), "step": TINY_FLAGS, "epoch": TINY_FLAGS, "epochs": 2, "epoch_steps": 1000,
              "model": {"d_model": 16, "n_layers": 2, "d_state": 4, "d_ff": 16}, "seed_len": 8, "gen_len": 16,
              "every": 4, "long": 64, "data": 1000, "points": 300, "strip": 60},
}
SMALL_BATCHES = (1, 2, 4, 8)
SAMPLES = 3
KS = [5, 10, 20, 50, 100]
VERDICT = {True: "met", False: "MISSED", None: "not known, the machine was too busy"}


# ---------------------------------------------------------------------------------------------------------------
# Timing


class Laps:
    """A stopwatch on the device's own clock: `laps("forward")` ends the part of that name, begun when the last ended.

    On a GPU the marks are events in the stream, so that reading the clock makes nothing wait.
    """

    def __init__(self, device):
        self.device = device
        self.wait()
        self.names, self.marks = [], [self.mark()]

    def __call__(self, name):
        self.names.append(name)
        self.marks.append(self.mark())

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self):
        """{part: seconds}."""
        self.wait()
        cuda = self.device.type == "cuda"
        return {name: a.elapsed_time(b) / 1e3 if cuda else b - a
                for name, (a, b) in zip(self.names, itertools.pairwise(self.marks), strict=True)}


def timed(function, device, per=1):
    """A function that runs `function` and returns the seconds it took, divided by `per`."""
    def run():
        laps = Laps(device)
        function()
        laps("all")
        return laps.seconds()["all"] / per

    return run


def interleaved(runs, repeats):
    """Call each of `runs`, {name: function that returns what it measured}, once to warm up and then in turn.

    Returns {name: list of `repeats` results}; of a run longer than PATIENCE, the one result of the warm-up, whose
    start-up doesn't count for much there.
    """
    results, slow = {name: [] for name in runs}, set()
    for name, run in runs.items():
        started = time.perf_counter()
        first = run()
        if time.perf_counter() - started > PATIENCE:
            results[name].append(first)
            slow.add(name)
    for _ in range(repeats):
        for name, run in runs.items():
            if name not in slow:
                results[name].append(run())
    return results


def settled(run):
    """`run` after an untimed one: the other side has left its own data in the caches and the allocator's pools."""
    def second():
        run()
        return run()

    return second


def ratio_of(theirs, ours):
    """How many times more the peer needs: the median over the pairs measured in turn, else that of the medians."""
    if len(theirs) == len(ours):
        return median(t / o for t, o in zip(theirs, ours, strict=True))
    return median(theirs) / median(ours)


def totals(laps):
    """The sums of dicts of seconds: one number a repeat."""
    return [sum(lap.values()) for lap in laps]


def part(laps, name):
    return [lap[name] for lap in laps]


# ---------------------------------------------------------------------------------------------------------------
# Memory and kernels


def peak_memory(function, device):
    """Bytes that torch allocates at most while function() runs, beyond what was there before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]  # freed memory counts below 0
    return max(itertools.accumulate(sizes), default=0)


def device_events(function, device):
    """(name, seconds) of each kernel and copy that function() runs on the GPU."""
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize(device)
    return [(e.name, e.time_range.elapsed_us() / 1e6) for e in profile.events()
            if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]


# ---------------------------------------------------------------------------------------------------------------
# What the machine can do


class Limits:
    """Rates of the machine, measured when first asked for.

    On a CPU one thread is measured and taken times the threads: a lower bound of the time, which other programs on the
    machine disturb far less than threads that wait for each other.
    """

    def __init__(self, device, quick):
        self.device, self.quick = device, quick
        self.threads = torch.get_num_threads() if device.type == "cpu" else 1

    def fastest(self, function):
        """Seconds of a call, on one thread: the best of many short rounds, since nothing disturbs a limit."""
        if self.device.type == "cpu" and torch.get_num_threads() > 1:
            with one_thread():
                return self.fastest(function)
        function()
        once = timed(function, self.device)()
        calls = max(1, min(50, int(2e-3 / max(once, 1e-9))))
        run = timed(lambda: [function() for _ in range(calls)], self.device, calls)
        best, started = once, time.perf_counter()
        for i in itertools.count(1):
            best = min(best, run())
            if i >= 5 and time.perf_counter() - started > (0.01 if self.quick else 0.3):
                return best

    def gemms(self, shapes, dtype, passes):
        """Seconds of the matrix products (m, k) @ (k, n); the backward pass has two of each."""
        total = 0.0
        for m, k, n in shapes:
            a, b, c = (torch.randn(s, device=self.device).to(dtype) for s in ((m, k), (k, n), (m, n)))
            if "forward" in passes:
                total += self.fastest(lambda a=a, b=b: a @ b)
            if "backward" in passes:
                total += self.fastest(lambda c=c, b=b: c @ b.T) + self.fastest(lambda c=c, a=a: a.T @ c)
        return total / self.threads

    @functools.cached_property
    def bandwidth(self):
        """Bytes a second, read and written, of a copy too large for any cache."""
        n = 2**16 if self.quick else 2**28 if self.device.type == "cuda" else 2**26
        source, target = torch.ones(n, device=self.device), torch.empty(n, device=self.device)
        return 8 * n / self.fastest(lambda: target.copy_(source))

    def reading(self, n_bytes):
        """Seconds to read n_bytes once from where that many bytes stay: the cache, if it holds them."""
        values = torch.ones(n_bytes // 4, device=self.device)
        return self.fastest(values.sum)

    @functools.cached_property
    def exps(self):
        """exp evaluations a second: on a CPU by torch, in its caches; on a GPU in registers."""
        if self.device.type == "cuda":
            return exps_in_registers(self.fastest, self.device)
        x = torch.rand(2**12 if self.quick else 2**18)
        out = torch.empty_like(x)
        return self.threads * len(x) / self.fastest(lambda: torch.exp(x, out=out))

    def text(self):
        """The rates that were used, in words."""
        measured = vars(self)
        words = [f"copies {self.bandwidth / 1e9:,.0f} GB/s"] if "bandwidth" in measured else []
        words += [f"{self.exps / 1e9:,.1f}e9 exp/s"] if "exps" in measured else []
        return ", ".join(words)


@contextlib.contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def exps_in_registers(fastest, device):
    """exp2 evaluations a second of the GPU's special-function units, by a kernel that does nothing else."""
    import triton
    import triton.language as tl

    rounds, block = 1024, 1024
    programs = 32 * torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(programs * block, device=device)

    @triton.jit
    def kernel(out, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = place.to(tl.float32) * 1e-9
        for _ in range(ROUNDS):
            x = tl.exp2(-x)
        tl.store(out + place, x)

    with torch.cuda.device(device):
        return out.numel() * rounds / fastest(lambda: kernel[(programs,)](out, ROUNDS=rounds, BLOCK=block, num_warps=4))


def block_gemms(batch, time, d_model, d_inner, d_state):
    """The matrix products (m, k, n) of a Mamba block's forward pass."""
    n, rank = batch * time, -(-d_model // 16)
    return [(n, d_model, 2 * d_inner), (n, d_inner, rank + 2 * d_state), (n, rank, d_inner), (n, d_inner, d_model)]


def kernel_limits(limits, batch, time, d_inner, d_state):
    """Seconds that each Triton kernel of scan_triton.py needs at least for bfloat16 inputs: {kernel: seconds}.

    What it reads and writes once over the bandwidth, or its exps over their rate, whichever is more: one exp for each
    state update, and two a channel and step for softplus and gate.
    """
    from kernels import scan_triton

    row, narrow = 2 * batch * time * d_inner, 2 * batch * time * d_state  # bytes of u and of B
    states = 2 * np.prod(scan_triton.chunk_states_shape(batch, time, d_inner, d_state))
    updates = batch * time * d_inner
    needs = {"_conv_forward_kernel": (2 * row, updates), "_conv_backward_kernel": (3 * row, updates),
             "_forward_kernel": (4 * row + 2 * narrow + states, updates * (d_state + 2)),
             "_backward_kernel": (7 * row + 4 * narrow + states, updates * (d_state + 2))}
    return {name: max(n_bytes / limits.bandwidth, exps / limits.exps) for name, (n_bytes, exps) in needs.items()}


def block_limits(limits, shape):
    """Seconds that a block's forward and backward pass need at least: {"forward": …, "backward": …}.

    On a CPU the matrix products and one exp a state update in each pass: the states are not kept, so the backward
    pass makes them again.
    """
    batch, time, d_model, d_state = shape
    d_inner, cuda = 2 * d_model, limits.device.type == "cuda"
    gemms = block_gemms(batch, time, d_model, d_inner, d_state)
    floor = {p: limits.gemms(gemms, torch.bfloat16 if cuda else torch.float32, p) for p in ("forward", "backward")}
    for name in floor:
        if cuda:
            kernels = kernel_limits(limits, batch, time, d_inner, d_state)
            floor[name] += kernels[f"_conv_{name}_kernel"] + kernels[f"_{name}_kernel"]
        else:
            floor[name] += batch * time * d_inner * d_state / limits.exps
    return floor


# ---------------------------------------------------------------------------------------------------------------
# Results


@dataclasses.dataclass
class Line:
    """A line of a table; numbers in seconds or bytes. min_ratio, max_ours and max_of_limit are goals."""

    what: str
    ours: float
    unit: str = "s"
    peer: str = ""
    theirs: float | None = None
    ratio: float | None = None
    limit: float | None = None
    min_ratio: float | None = None
    max_ours: float | None = None
    max_of_limit: float | None = None

    def goals(self):
        """(goal in words, whether it is met) of each; None where the limit came out slower than what it limits."""
        over = None if self.limit is None else self.ours / self.limit
        if self.min_ratio is not None and self.ratio is not None:
            yield f"ratio ≥ {self.min_ratio:g}", self.ratio >= self.min_ratio
        if self.max_ours is not None:
            yield f"≤ {quantity(self.max_ours, self.unit)}", self.ours <= self.max_ours
        if self.max_of_limit is not None and over is not None:
            yield f"≤ {self.max_of_limit:g}x limit", None if over < 1 else over <= self.max_of_limit


def compared(what, ours, peer=None, theirs=None, **more):
    """The Line of repeated measurements: `ours` and, of the peer if any, `theirs`, lists in seconds or bytes."""
    if theirs is None:
        return Line(what, median(ours), **more)
    note = "" if len(theirs) > 1 or len(ours) == 1 else " (once)"
    return Line(what, median(ours), peer=peer + note, theirs=median(theirs), ratio=ratio_of(theirs, ours), **more)


def quantity(value, unit):
    """A number of seconds, bytes or a share, readably."""
    if value is None:
        return ""
    if unit == "share":
        return f"{100 * value:.0f} %"
    steps = {"s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
             "B": ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))}[unit]
    size, name = next((step for step in steps if abs(value) >= step[0]), steps[-1])
    return f"{value / size:.3g} {name}" if value < 100 * size else f"{value / size:.0f} {name}"


def show(title, lines, notes, quick):
    def row(line):
        over = "" if line.limit is None else f"{line.ours / line.limit:.2f}x ({100 * line.limit / line.ours:.0f} %)"
        goal = "" if quick else ", ".join(f"{words}: {VERDICT[met]}" for words, met in line.goals())
        return [line.what, quantity(line.ours, line.unit), line.peer, quantity(line.theirs, line.unit),
                "" if line.ratio is None else f"{line.ratio:.3g}x", quantity(line.limit, line.unit), over, goal]

    header = ["", "ours", "peer", "peer's", "ratio", "limit", "ours / limit", "goal"]
    print(f"\n{title}\n" + cli.table(header, [row(line) for line in lines], "lrlrrrrl"))
    for note in notes:
        print(f"  {note}")
    sys.stdout.flush()


# ---------------------------------------------------------------------------------------------------------------
# Peers


def installed(package):
    return importlib.util.find_spec(package) is not None


def mambapy_block(d_model, d_state):
    from mambapy.mamba import MambaBlock, MambaConfig

    return MambaBlock(MambaConfig(d_model=d_model, n_layers=1, d_state=d_state))


def transformers_block(d_model, d_state):
    import transformers
    from transformers.models.mamba.modeling_mamba import MambaMixer

    transformers.logging.set_verbosity_error()
    config = transformers.MambaConfig(hidden_size=d_model, state_size=d_state, num_hidden_layers=1, use_mambapy=False)
    return MambaMixer(config, layer_idx=0)


def mamba_ssm_block(d_model, d_state):
    from mamba_ssm.modules.mamba_simple import Mamba

    return Mamba(d_model, d_state=d_state)


PEERS = {"cpu": {"mambapy": ("mambapy", mambapy_block), "transformers": ("transformers", transformers_block)},
         "cuda": {"mamba-ssm": ("mamba_ssm", mamba_ssm_block)}}


def find_peers(device):
    """({name: make_block(d_model, d_state)} of the device's peers that are installed, a note on each other)."""
    peers, missing = {}, []
    for name, (package, make_block) in PEERS[device.type].items():
        if installed(package):
            peers[name] = make_block
        else:
            file = "requirements-cuda.txt" if device.type == "cuda" else "requirements-bench.txt"
            missing.append(f"{name} is not installed and left out; install it with: pip install -r {file}")
    return peers, missing


class PeerBlock(nn.Module):
    """A peer's block with our block's weights and call: all of them share the names of mamba_ssm.Mamba."""

    def __init__(self, make_block, ours):
        super().__init__()
        self.block = make_block(ours.d_model, ours.d_state)
        self.block.load_state_dict(ours.state_dict())

    def forward(self, x, backend):
        return self.block(x)


def with_blocks_of(make_block, model):
    """A copy of a CausalTimeSeriesMamba whose Mamba blocks are the peer's."""
    theirs = copy.deepcopy(model)
    for layer in theirs.layers:
        layer.mamba = PeerBlock(make_block, layer.mamba)
    return theirs.to(next(model.parameters()).device)


# ---------------------------------------------------------------------------------------------------------------
# scan


def block_pass(block, x, backend, amp):
    """A function that runs block(x) forward and backward and returns {"forward": seconds, "backward": seconds}."""
    gradient = torch.randn(x.shape, device=x.device, dtype=torch.bfloat16 if amp else x.dtype)

    def run():
        x.grad = None
        block.zero_grad(set_to_none=True)
        laps = Laps(x.device)
        with training.autocast(x.device, amp):
            y = block(x, backend)
        laps("forward")
        y.backward(gradient.to(y.dtype))
        laps("backward")
        return laps.seconds()

    return run


def replayed_pass(block, x, backend):
    """The same, in bfloat16 and as the replay of a CUDA graph, as the training script runs it: seconds."""
    gradient = torch.randn(x.shape, device=x.device)

    def both(x):
        block.zero_grad(set_to_none=True)
        with training.autocast(x.device, True):
            y = block(x, backend)
        y.backward(gradient.to(y.dtype))

    replay = captured(both, x.detach().requires_grad_(False), list, x.device)
    return timed(lambda: replay(x), x.device)


def pass_lines(found, peer, floor):
    """Lines of the forward and the backward pass, of ours and of one peer, if any."""
    return [compared(name, part(found["ours"], name), peer, peer and part(found[peer], name), limit=floor[name])
            for name in ("forward", "backward")]


def memory_line(runs, peer, device, **goal):
    theirs = peer and [peak_memory(runs[peer], device)]
    return compared("peak memory", [peak_memory(runs["ours"], device)], peer, theirs, unit="B", **goal)


def difference(block, ours, x, backend, amp):
    """Relative difference of a block's output from ours, over the first sequence."""
    with torch.no_grad(), training.autocast(x.device, amp):
        a, b = block(x[:1], backend).float(), ours(x[:1], backend).float()
    return float((a - b).norm() / b.norm())


def measure_scan(bench):
    device, cuda = bench.device, bench.device.type == "cuda"
    batch, time, d_model, d_state = shape = bench.size["scan"]
    torch.manual_seed(0)
    ours = MambaBlock(d_model, d_state).to(device)
    backend = choose_backend("auto", device)
    x = torch.randn(batch, time, d_model, device=device, requires_grad=True)
    peers, notes = find_peers(device)
    blocks = {name: PeerBlock(make_block, ours).to(device) for name, make_block in peers.items()}
    for name, block in blocks.items():
        notes.append(f"{name}, same weights: output differs by {difference(block, ours, x, backend, cuda):.1e}")
    slow = blocks.pop("transformers", None)
    runs = {"ours": block_pass(ours, x, backend, cuda)}
    runs |= {name: block_pass(block, x, backend, cuda) for name, block in blocks.items()}
    found = interleaved({name: settled(run) for name, run in runs.items()}, bench.repeats)
    floor = block_limits(bench.limits, shape)
    best = next(iter(blocks), None)
    lines = pass_lines(found, best, floor)
    lines.append(compared("both", totals(found["ours"]), best, best and totals(found[best]), limit=sum(floor.values()),
                          min_ratio=None if cuda else 5, max_of_limit=None if cuda else 2))
    lines.append(memory_line(runs, best, device, min_ratio=1 if cuda else 3))
    if cuda:
        lines += kernel_lines(bench, runs["ours"], shape)
        lines += small_batch_lines(bench, ours, blocks, backend)
        notes.append("limit: matrix products at their measured rate; each kernel's bytes or exps, whichever takes "
                     f"longer ({bench.limits.text()})")
    else:
        lines += slow_lines(bench, ours, slow, x, backend)
        notes.append("limit: the block's matrix products, and one exp a state update in each pass "
                     f"({bench.limits.text()})")
    kind = "bfloat16" if cuda else "float32"
    return f"scan: a Mamba block, {batch} x {time}, d_model {d_model}, d_state {d_state}, {kind}", lines, notes


def slow_lines(bench, ours, transformers, x, backend):
    """Lines of what walks through time step by step, on one sequence: transformers takes minutes for a few."""
    one = x[:1].detach().requires_grad_()
    runs = {"ours": block_pass(ours, one, backend, False), "loop over time": block_pass(ours, one, "reference", False)}
    if transformers is not None:
        runs["transformers"] = block_pass(transformers, one, backend, False)
    found = interleaved(runs, bench.repeats)
    limit = sum(block_limits(bench.limits, (1, *bench.size["scan"][1:])).values())
    return [compared("both, one sequence", totals(found["ours"]), name, totals(found[name]), limit=limit)
            for name in list(runs)[1:]]


def kernel_lines(bench, run, shape):
    """A Line for each kernel of our block: the time of a call. The matrix products and what is small are one line."""
    batch, time, d_model, d_state = shape
    least = kernel_limits(bench.limits, batch, time, 2 * d_model, d_state)
    rounds = 5
    events = device_events(lambda: [run() for _ in range(rounds)], bench.device)
    lines, rest = [], sum(seconds for _, seconds in events) / rounds
    for kernel, limit in least.items():
        calls = [seconds for name, seconds in events if name == kernel]
        if calls:
            lines.append(Line(f"{kernel} x {len(calls) // rounds}", median(calls), limit=limit))
            rest -= sum(calls) / rounds
    gemms = bench.limits.gemms(block_gemms(batch, time, d_model, 2 * d_model, d_state), torch.bfloat16,
                               ("forward", "backward"))
    return [*lines, Line("products, sums, casts", rest, limit=gemms)]


def small_batch_lines(bench, ours, blocks, backend):
    _, time, d_model, _ = bench.size["scan"]
    lines = []
    for batch in SMALL_BATCHES:
        x = torch.randn(batch, time, d_model, device=bench.device)
        for how in ("eager", "graph"):
            runs = {}
            for name, block in {"ours": ours, **blocks}.items():
                eager = block_pass(block, x.clone().requires_grad_(), backend, True)
                runs[name] = (replayed_pass(block, x, backend) if how == "graph"
                              else lambda eager=eager: sum(eager().values()))
            found = interleaved(runs, bench.repeats)
            name = next(iter(blocks), None)
            lines.append(compared(f"both, batch {batch}, {how}", found["ours"], name, found.get(name), min_ratio=1))
    return lines


# ---------------------------------------------------------------------------------------------------------------
# step


def training_flags(text, **more):
    """Flags of the training script, parsed."""
    words = [word for name, value in more.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return training.parse_args([*text.split(), "--no-compile", "--no-train-eval", *words])


def step_pass(model, x, args):
    """A function that runs one training step and returns the seconds of its three parts."""
    loss_of = training.make_loss(args)
    optimizer = training.build_optimizer(training.parameter_groups(model, args.lr, 1.0, False), args.lr, x.device)

    def run():
        laps = Laps(x.device)
        optimizer.zero_grad(set_to_none=True)
        loss, _ = loss_of(model, x)
        laps("forward")
        loss.backward()
        laps("backward")
        nn.utils.clip_grad_norm_(model.parameters(), training.GRAD_CLIP)
        optimizer.step()
        laps("optimiser")
        return laps.seconds()

    return run


def replayed_step(model, x, args, compiled=False):
    """The step as the training script captures it in a CUDA graph: seconds."""
    optimizer = training.build_optimizer(training.parameter_groups(model, args.lr, 1.0, False), args.lr, x.device)
    sums = torch.zeros(3, device=x.device)
    step = training.make_step(torch.compile(model) if compiled else model, training.make_loss(args), optimizer, sums)
    replay = captured(step, x, lambda: [
        *model.parameters(), sums, *(t for state in optimizer.state.values() for t in state.values())], x.device)
    return timed(lambda: replay(x), x.device)


def step_limits(limits, args, batch, features):
    """Seconds of the blocks' limits and of the heads' matrix products, a pass."""
    floor = block_limits(limits, (batch, args.seq_len, args.d_model, args.d_state))
    n, dtype = batch * args.seq_len, torch.bfloat16 if limits.device.type == "cuda" else torch.float32
    ends = [(n, features, args.d_model), (n, args.d_model, args.d_ff), (n, args.d_ff, features)]
    return {name: args.n_layers * seconds + limits.gemms(ends, dtype, name) for name, seconds in floor.items()}


def measure_step(bench):
    device, cuda, features = bench.device, bench.device.type == "cuda", 20
    args = training_flags(bench.size["step"], device=device)
    x = torch.randn(args.batch_size, args.seq_len, features, device=device)
    model = training.build_model(args, features).to(device).train()
    peers, notes = find_peers(device)
    peers.pop("transformers", None)  # minutes a step
    runs = {"ours": step_pass(model, x, args)}
    runs |= {name: step_pass(with_blocks_of(make_block, model).train(), x, args) for name, make_block in peers.items()}
    graphs = {"step as one CUDA graph": replayed_step(model, x, args),
              "step compiled, as one CUDA graph": replayed_step(model, x, args, compiled=True)} if cuda else {}
    found, floor = interleaved(runs | graphs, bench.repeats), step_limits(bench.limits, args, args.batch_size, features)
    name = next(iter(peers), None)
    lines = pass_lines(found, name, floor)
    lines.append(compared("optimiser", part(found["ours"], "optimiser"), name,
                          name and part(found[name], "optimiser")))
    theirs, limit = name and totals(found[name]), sum(floor.values())
    lines.append(compared("step", totals(found["ours"]), name, theirs, limit=limit))
    lines += [compared(how, found[how], name, theirs, limit=limit, max_ours=26e-3, min_ratio=3) for how in graphs]
    lines.append(memory_line(runs, name, device, min_ratio=1))
    notes.append(f"limit: the blocks as in the row scan, and the heads' matrix products ({bench.limits.text()})")
    return (f"step: training, {args.batch_size} x {args.seq_len}, {args.n_layers} layers, d_model {args.d_model}, "
            f"d_state {args.d_state}"), lines, notes


# ---------------------------------------------------------------------------------------------------------------
# epoch


class Windows(torch.utils.data.Dataset):
    """Windows of X, one an item, each moved forward by up to `jitter` steps at random."""

    def __init__(self, X, starts, seq_len, jitter):
        self.X, self.starts, self.seq_len, self.jitter = torch.from_numpy(X), starts.tolist(), seq_len, jitter

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i):
        first = self.starts[i] + (int(torch.randint(self.jitter, ())) if self.jitter else 0)
        return self.X[min(first, len(self.X) - self.seq_len):][:self.seq_len]


def common_arrangement(series, args, model, device):
    """A function that trains `model` for one epoch as most code of this kind does: worker processes that gather the
    windows one by one, a loss read back at each step, eager kernels, validation batch by batch. It is kept fair:
    the workers live on from epoch to epoch and memory is pinned."""
    train, val, boundary = dataset.split_windows(series.n_steps, args.seq_len, args.stride, args.val_fraction)
    load = functools.partial(torch.utils.data.DataLoader, batch_size=args.batch_size, num_workers=WORKERS,
                             pin_memory=device.type == "cuda", persistent_workers=True)
    train_loader = load(Windows(series.X[:boundary], train, args.seq_len, args.stride), shuffle=True)
    val_loader = load(Windows(series.X, val, args.seq_len, 0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=training.WEIGHT_DECAY)

    def loss_of(x):
        x = x.to(device, non_blocking=True)
        with training.autocast(device, True):
            prediction = model(x)["1"]
        return F.mse_loss(prediction[:, :-1].float(), x[:, 1:])

    def epoch():
        model.train()
        total = 0.0
        for x in train_loader:
            optimizer.zero_grad()
            loss = loss_of(x)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), training.GRAD_CLIP)
            optimizer.step()
            total += loss.item()
        model.eval()
        with torch.no_grad():
            for x in val_loader:
                total += loss_of(x).item()
        return total

    return epoch


def run_script(folder, flags, device, epochs):
    """Train as the script does, in this process, and read from its log the seconds an epoch takes."""
    checkpoint = Path(folder) / f"run_{time.monotonic_ns()}.pt"
    args = training_flags(flags, device=device, data_dir=folder, checkpoint=checkpoint, epochs=epochs)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        training.train(args, Ranks(device))
    with open(files_of(checkpoint)["log"], newline="") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    return (seconds[-1] - seconds[0]) / (len(seconds) - 1)


def measure_epoch(bench):
    device, cuda = bench.device, bench.device.type == "cuda"
    flags, epochs = bench.size["epoch"], bench.size["epochs"]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # on fewer cores than workers
        config = circles.config_of(circles.parse_args(["--n-steps", str(bench.size["epoch_steps"])]))
        series = circles.generate(config)
        with contextlib.redirect_stdout(io.StringIO()):
            circles.save(series, Path(folder))
        args = training_flags(flags, device=device)
        model = training.build_model(args, series.feature_dim).to(device)
        # On a CPU both sides have our blocks: this row is about the loop around them.
        peers, notes = find_peers(device) if cuda else ({}, [])
        blocks = next(iter(peers), f"our {'triton' if cuda else 'cpu'}")
        if peers:
            model = with_blocks_of(peers[blocks], model)
        common = common_arrangement(series, args, model, device)
        runs = {"ours": lambda: run_script(folder, flags, device, epochs), "common": timed(common, device)}
        found = interleaved(runs, bench.repeats)
        lines = [compared("epoch", found["ours"], f"DataLoader, {blocks} blocks", found["common"],
                          max_ours=0.09 if cuda else None)]
        if cuda:
            few, many = (sum(seconds for _, seconds in device_events(
                lambda n=n: run_script(folder, flags, device, n), device)) for n in (2, 2 + epochs))
            busy = (many - few) / epochs / lines[0].ours
            lines.append(Line("GPU busy", busy, unit="share"))
            notes.append(f"GPU busy: kernel time of {epochs} epochs, profiled, over the time they take unprofiled "
                         f"(goal ≥ 90 %: {'met' if busy >= 0.9 else 'MISSED'})")
    train, val, _ = dataset.split_windows(series.n_steps, args.seq_len, args.stride, args.val_fraction)
    steps = -(-len(train) // args.batch_size)
    return (f"epoch: {len(train)} training windows in {steps} steps, {len(val)} validation windows of {args.seq_len} "
            f"steps, {args.n_layers} layers"), lines, notes


# ---------------------------------------------------------------------------------------------------------------
# generate


@torch.inference_mode()
def generate_by_prefix(model, seed, n_steps, every=1):
    """Generate by running the model over the whole series so far at each step; seed (n, time, features), a tensor.

    Returns the series and the seconds that all steps take. With `every` above 1 only every so-many-th step is run,
    its time counted that often, and its prediction repeated: lengths and times are those of the full run.
    """
    x, total = seed, 0.0
    for first in range(0, n_steps, every):
        count = min(every, n_steps - first)
        laps = Laps(seed.device)
        prediction = model(x)["1"][:, -1:]
        x = torch.cat([x, prediction], dim=1)
        laps("step")
        total += count * laps.seconds()["step"]
        if count > 1:
            x = torch.cat([x, prediction.expand(-1, count - 1, -1)], dim=1)
    return x[:, seed.shape[1]:], total


def generation_limit(limits, model, n):
    """Seconds a step needs at least: reading every weight once, and one exp a state."""
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    A = [layer.mamba.A_log.numel() for layer in model.layers]
    read = weights / limits.bandwidth if limits.device.type == "cuda" else limits.reading(weights)
    return read + n * sum(A) / limits.exps


def measure_generate(bench):
    device, size, cuda = bench.device, bench.size, bench.device.type == "cuda"
    n_steps, every = size["gen_len"], size["every"]
    torch.manual_seed(0)
    model = CausalTimeSeriesMamba(**size["model"]).to(device).eval()
    peers, notes = find_peers(device) if cuda else ({}, [])
    blocks = next(iter(peers), "our scan")
    peer = with_blocks_of(peers[blocks], model).eval() if peers else model
    seed = np.random.default_rng(0).standard_normal((SAMPLES, size["seed_len"], model.feature_dim)).astype(np.float32)
    seed_on_device = torch.from_numpy(seed).to(device)
    recurrence, prefix = generate.generate(model, seed, 8)[1], generate_by_prefix(peer, seed_on_device, 8)[0]
    error = np.linalg.norm(recurrence - prefix.cpu().numpy()) / np.linalg.norm(recurrence)
    found = interleaved({
        "ours": timed(lambda: generate.generate(model, seed, n_steps), device, n_steps),
        "prefix": lambda: generate_by_prefix(peer, seed_on_device, n_steps, every)[1] / n_steps}, bench.repeats)
    limit = generation_limit(bench.limits, model, SAMPLES)
    lines = [compared(f"a step of {n_steps}", found["ours"], f"prefix re-run, {blocks}", found["prefix"],
                      limit=limit, min_ratio=40 if cuda else 20, max_ours=0.15e-3 if cuda else None)]
    elapsed = {}

    def run(n):
        elapsed[n] = timed(lambda: generate.generate(model, seed, n), device)()

    long, short = [peak_memory(lambda n=n: run(n), device) for n in (size["long"], n_steps)]
    lines.append(Line(f"all {size['long']} steps", elapsed[size["long"]], limit=limit * size["long"]))
    lines.append(Line(f"memory, {size['long']} steps", long, unit="B", peer=f"ours, {n_steps} steps", theirs=short,
                      ratio=short / long))
    if every > 1:
        notes.append(f"prefix: every {every}th step is run, at its true length, and counts {every} times")
    notes += [f"both ways agree to {error:.1e} over the first 8 steps",
              f"limit: all weights read once a step, one exp a state ({bench.limits.text()})",
              "memory: what torch allocates, beside the result"]
    return f"generate: {SAMPLES} samples, {model.n_layers} layers, d_model {model.d_model}", lines, notes


# ---------------------------------------------------------------------------------------------------------------
# data


def generate_by_step(config, block_values=None):
    """The same process as markov_circles_timeseries.generate, one step at a time; a dataset.Series."""
    rng = np.random.default_rng(config["seed"])
    process = circle_process.draw_process(config)
    X = np.zeros((config["n_steps"], config["ambient_dim"]), np.float32)
    states, thetas = np.zeros(len(X), np.int64), np.zeros(len(X))
    circle, left, step = rng.integers(config["n_circles"]), 0, 0
    for t in range(len(X)):
        if left == 0:
            if t > 0:
                circle = rng.choice(config["n_circles"], p=process.transition_matrix[circle])
            dwell = rng.normal(config["dwell_mean"], config["dwell_std"])
            left, step = max(1, round(dwell / process.periods[circle])) * process.periods[circle], 0
        theta = (process.entry_angles[circle] + 2 * np.pi * step / process.periods[circle]) % (2 * np.pi)
        v1, v2 = process.planes[circle]
        X[t] = process.radii[circle] * (np.cos(theta) * v1 + np.sin(theta) * v2)
        X[t] += rng.normal(0, config["noise_std"], config["ambient_dim"])
        states[t], thetas[t] = circle, theta
        left, step = left - 1, step + 1
    return dataset.Series(X, states, thetas, process, dict(config))


def strip_by_step(ax, states, n_circles, start=0, label="circle"):
    """figures.state_strip with a patch for each step."""
    colors = figures.circle_colors(n_circles)
    for t, state in enumerate(states):
        ax.axvspan(start + t - 0.5, start + t + 0.5, color=colors[state], linewidth=0)
    ax.set_yticks([])
    ax.set_ylabel(label)


def strip_by_visit(ax, states, n_circles, start=0, label="circle"):
    """figures.state_strip with a patch for each visit."""
    colors = figures.circle_colors(n_circles)
    for state, first, length in zip(*dataset.runs(np.asarray(states)), strict=True):
        ax.axvspan(start + first - 0.5, start + first + length - 0.5, color=colors[state], linewidth=0)
    ax.set_yticks([])
    ax.set_ylabel(label)


def script_by_step(argv):
    """The generator's whole script with both of its loops over time put back."""
    with (mock.patch.object(circles, "generate", generate_by_step),
          mock.patch.object(figures, "state_strip", strip_by_step)):
        circles.main(circles.parse_args(argv))


def process_of(command):
    """A function that runs a command in a process of its own and raises if it fails."""
    return lambda: subprocess.run(command, check=True, cwd=REPO, stdout=subprocess.DEVNULL)


def measure_data(bench):
    cpu, n = torch.device("cpu"), bench.size["data"]
    config = circles.config_of(circles.parse_args(["--n-steps", str(n)]))
    found = interleaved({"ours": timed(lambda: circles.generate(config), cpu),
                         "loop": timed(lambda: generate_by_step(config), cpu)}, bench.repeats)
    rng, noise = np.random.default_rng(0), np.empty((n, config["ambient_dim"]), np.float32)
    limit = bench.limits.fastest(lambda: rng.standard_normal(out=noise, dtype=np.float32))
    lines = [compared("generate()", found["ours"], "loop over time", found["loop"], limit=limit)]
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--no-umap", "--n-steps", str(n), "--data-dir", folder]
        start = "import sys, bench; bench.script_by_step(sys.argv[1:])"
        # `import bench` alone, with torch, would count against the loop: the generator doesn't need torch.
        found = interleaved({
            "ours": timed(process_of([sys.executable, "markov_circles_timeseries.py", *flags]), cpu),
            "loop": timed(process_of([sys.executable, "-c", start, *flags]), cpu),
            "imports": timed(process_of([sys.executable, "-c", "import bench"]), cpu),
            "own imports": timed(process_of([sys.executable, "-c", "import markov_circles_timeseries"]), cpu)},
            bench.repeats)
    extra = median(found["imports"]) - median(found["own imports"])
    lines.append(compared("whole script, figures, no UMAP", found["ours"], "loop, a patch a step",
                          [seconds - extra for seconds in found["loop"]], limit=median(found["own imports"]),
                          min_ratio=5))
    return f"data: {n} steps", lines, [
        "limit of generate(): drawing its noise; of the script: start and imports",
        f"the loop's script starts through bench.py: the {extra:.1f} s that this takes longer are subtracted"]


# ---------------------------------------------------------------------------------------------------------------
# dimension, figures


def dimension_by_query(points, ks):
    """Levina-Bickel with one neighbour query for each k."""
    from sklearn.neighbors import NearestNeighbors

    found = {}
    for k in ks:
        distances, _ = NearestNeighbors(n_neighbors=k + 1).fit(points).kneighbors(points)
        logs = np.log(distances[:, 1:].astype(np.float64))
        found[k] = float(1 / (logs[:, -1:] - logs[:, :-1]).mean(axis=1).mean())
    return found


def measure_dimension(bench):
    cpu, n = torch.device("cpu"), bench.size["points"]
    config = circles.config_of(circles.parse_args(["--n-steps", str(n)]))
    points = circles.generate(config).X
    ours, plain = estimate_dimension.levina_bickel(points, KS), dimension_by_query(points, KS)
    found = interleaved({"ours": timed(lambda: estimate_dimension.levina_bickel(points, KS), cpu),
                         "queries": timed(lambda: dimension_by_query(points, KS), cpu)}, bench.repeats)
    blocks = -(-n // 2**10)  # of the table of all pairs, which as a whole could be too large
    limit = blocks * Limits(cpu, False).gemms([(2**10, points.shape[1], n)], torch.float32, "forward")
    lines = [compared(f"k = {', '.join(map(str, KS))}", found["ours"], f"{len(KS)} queries", found["queries"],
                      limit=limit)]
    worst = max(abs(ours[k] / plain[k] - 1) for k in KS)
    return f"dimension: {n} points", lines, [f"both estimates agree to {worst:.1e}",
                                             "limit: the products of all pairs of points"]


def draw_strip(strip, states):
    """A figure with a strip of `states`, written as a PNG to memory."""
    fig, axes = figures.new_figure(panel=(10, 1))
    strip(axes[0, 0], states, 10)
    axes[0, 0].set_xlim(0, len(states))
    fig.savefig(io.BytesIO())


def measure_figures(bench):
    cpu, n = torch.device("cpu"), bench.size["strip"]
    states = circles.generate(circles.config_of(circles.parse_args(["--n-steps", str(n)]))).states
    strips = {"ours": figures.state_strip, "a patch a step": strip_by_step, "a patch a visit": strip_by_visit,
              "nothing": lambda ax, states, n_circles: None}
    found = interleaved({name: timed(lambda strip=strip: draw_strip(strip, states), cpu)
                         for name, strip in strips.items()}, bench.repeats)
    lines = [compared("one image", found["ours"], name, found[name], limit=median(found["nothing"]))
             for name in ("a patch a step", "a patch a visit")]
    return f"figures: the strip of {n} states", lines, ["limit: the same figure without a strip"]


# ---------------------------------------------------------------------------------------------------------------


MEASURE = {"scan": measure_scan, "step": measure_step, "epoch": measure_epoch, "generate": measure_generate,
           "data": measure_data, "dimension": measure_dimension, "figures": measure_figures}


def machine(device):
    """What the numbers were taken on."""
    name = (torch.cuda.get_device_name(device) if device.type == "cuda" else
            f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}")
    return {"device": name, "threads": torch.get_num_threads(), "python": platform.python_version(),
            "torch": torch.__version__, "load": round(os.getloadavg()[0], 1)}


def main(args):
    device = cli.pick_device(args.device)
    if args.save is not None:
        cli.output_folder(args.save.parent)
    bench = SimpleNamespace(device=device, repeats=args.repeats, limits=Limits(device, args.quick),
                            size=SIZES["quick" if args.quick else device.type])
    report = {"machine": machine(device), "repeats": args.repeats, "quick": args.quick, "rows": {}}
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    for name in args.only:
        started = time.perf_counter()
        title, lines, notes = MEASURE[name](bench)
        show(title, lines, notes, args.quick)
        report["rows"][name] = {"title": title, "seconds": time.perf_counter() - started, "notes": notes,
                                "lines": [dataclasses.asdict(line) for line in lines]}
        if args.save is not None:
            cli.write_text(args.save, json.dumps(report, indent=2) + "\n")
    if args.save is not None:
        print(f"\nwrote {args.save}")


if __name__ == "__main__":
    cli.run(main, ARGS)
