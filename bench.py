"""Speed tables: this project beside other software, measured in turn in one process.

Each row of --only measures both sides --repeats times after a warm-up, and prints the medians, the ratio (the peer's
time over ours, the median over the pairs measured in turn) and a physical limit of the machine, measured in the same
process. What takes longer than 30 s is measured once. A peer that isn't installed is named and left out.

  scan        a Mamba block, forward and backward: mambapy and transformers on a CPU; mamba-ssm, small batches and each
              kernel on a GPU
  step        a training step of the whole model, against the same model with a peer's blocks
  epoch       an epoch of the training script, against a common training loop: DataLoader workers, one .item() per step,
              no CUDA graph
  generate    generation by the recurrence, against running the model over the whole prefix at each step

Memory on a CPU is the peak of what torch allocates (the kernels' own tiles, a few KiB per thread, are not seen); on a
GPU it is the peak of torch's allocator.
The peers: pip install -r requirements-bench.txt (and requirements-cuda.txt for mamba-ssm).

Examples:
  python bench.py
  python bench.py --only scan,generate --repeats 7 --save bench.json
"""

import cli  # first: from here on Ctrl-C ends the script without a traceback

# isort: split
import argparse
import contextlib
import copy
import csv
import dataclasses
import functools
import gc
import importlib.util
import io
import itertools
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest import mock

ROWS = ("scan", "step", "epoch", "generate")


def row_names(text):
    """The names in a text such as `scan,step` as a list in the order of ROWS; argparse reports what isn't one."""
    names = text.split(",")
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no row {unknown[0]!r}; choose from {','.join(ROWS)}")
    return [name for name in ROWS if name in names]


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    what = parser.add_argument_group("what is measured")
    what.add_argument("--only", type=row_names, default=",".join(ROWS), metavar="ROW,ROW,…", help="the rows to measure")
    what.add_argument("--repeats", type=cli.positive_int, default=5, metavar="N", help="measurements of each side")
    what.add_argument("--quick", action="store_true",
                      help="tiny sizes, to see that every row works; the numbers mean nothing")
    cli.add_device(what)
    files = parser.add_argument_group("files")
    files.add_argument("--save", type=Path, metavar="FILE.json",
                       help="also write the numbers to this file, in seconds and bytes (default: not written)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.start()
    ARGS = parse_args()  # before the slow imports: --help and a bad flag answer at once
    for _name, _level in (("KINETO_LOG_LEVEL", "99"), ("TORCH_CPP_LOG_LEVEL", "ERROR")):
        os.environ.setdefault(_name, _level)  # torch reads them at its import; its profiler writes to stderr otherwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import dataset
import generate
import markov_circles_timeseries as circles
import masked_model_gpu_mamba_next as training
from kernels.cuda_graph import captured
from kernels.selective_scan import choose_backend
from mamba_model import CausalTimeSeriesMamba, MambaBlock, autocast

PATIENCE = 30.0  # seconds: what takes longer is measured once
WORKERS = 4  # DataLoader processes of the common training loop, where there are as many cores
MODEL_FLAGS = "--d-state 32 --seq-len 1024 --stride 256 --batch-size 128"  # the README's setting
SMALL_FLAGS = "--d-model 64 --n-layers 2 --d-state 16 --d-ff 128 --seq-len 256 --stride 128 --batch-size 16"
TINY_FLAGS = "--d-model 16 --n-layers 2 --d-state 4 --d-ff 16 --seq-len 32 --stride 64 --batch-size 4"

# scan: batch, time, d_model, d_state. flags: of the training script, for the rows step and epoch; the epochs of one of
# its runs, and the length of its series. model, seed_len, gen_len: what generates, from how many steps, and how many.
# every: of the steps that re-run the prefix, one in so many is timed.
SIZES = {
    "cpu": {"scan": (8, 1024, 128, 32), "flags": SMALL_FLAGS, "epochs": 4, "epoch_steps": 20_000,
            "model": {}, "seed_len": 64, "gen_len": 2048, "every": 128},
    "cuda": {"scan": (128, 1024, 128, 32), "flags": MODEL_FLAGS, "epochs": 20, "epoch_steps": 100_000,
             "model": {}, "seed_len": 64, "gen_len": 2048, "every": 1},
    "quick": {"scan": (2, 48, 16, 4), "flags": TINY_FLAGS, "epochs": 2, "epoch_steps": 1000, "every": 4,
              "model": {"d_model": 16, "n_layers": 2, "d_state": 4, "d_ff": 16}, "seed_len": 8, "gen_len": 16},
}
SMALL_BATCHES = (1, 2, 4, 8)
SAMPLES = 3
COMPONENTS = 16  # of the mixture head beside the point head


# ---- Timing --------------------------------------------------------------------------------------------------


class Laps:
    """A stopwatch on the device's own clock. `laps("forward")` ends the lap of that name; the next one begins there.

    On a GPU the clock is read by events in the stream, which make nothing wait.
    """

    def __init__(self, device):
        self.device, self.cuda, self.names = device, device.type == "cuda", []
        if self.cuda:
            torch.cuda.synchronize(device)
        self.marks = [self.mark()]

    def __call__(self, name):
        self.names.append(name)
        self.marks.append(self.mark())

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self):
        """{name of the lap: seconds}."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return {name: a.elapsed_time(b) / 1e3 if self.cuda else b - a
                for name, (a, b) in zip(self.names, itertools.pairwise(self.marks), strict=True)}


def timed(function, device, per=1):
    """A function that calls `function` and returns the seconds that this took, divided by `per`."""
    def measure():
        laps = Laps(device)
        function()
        laps("all")
        return laps.seconds()["all"] / per

    return measure


def interleaved(measures, repeats, settle=False):
    """Call each of `measures`, {name: function that returns what it measured}, once to warm up and then in turn.

    settle: call it a first time in each turn, unmeasured, since the other side has left the caches and the memory pools
    in a state of its own. Returns {name: list of `repeats` results}. Where the warm-up took longer than PATIENCE, its
    result is the only one: at that length the start-up that it includes hardly counts.
    """
    results, slow = {name: [] for name in measures}, set()
    for name, measure in measures.items():
        started = time.perf_counter()
        first = measure()
        if time.perf_counter() - started > PATIENCE:
            results[name].append(first)
            slow.add(name)
    for _ in range(repeats):
        for name, measure in measures.items():
            if name not in slow:
                if settle:
                    measure()
                results[name].append(measure())
    return results


def lap_times(laps, name=None):
    """The seconds of the lap of this name, or of all laps together: one number per repeat."""
    return [sum(lap.values()) if name is None else lap[name] for lap in laps]


# ---- Memory and kernels --------------------------------------------------------------------------------------


def peak_memory(function, device):
    """The most bytes that torch holds at any moment while function() is called, beyond those it held before."""
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
    """(name, seconds) of each kernel and copy that function() makes the GPU execute."""
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize(device)
    return [(e.name, e.time_range.elapsed_us() / 1e6) for e in profile.events()
            if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]


# ---- What the machine can do ---------------------------------------------------------------------------------


class Limits:
    """Rates of the machine, measured when they are first asked for.

    On a CPU one thread is measured, and its rate multiplied by the number of threads. That is an upper bound of the
    rate, and other programs on the machine disturb it far less than they disturb threads that wait for each other.
    """

    def __init__(self, device, quick):
        self.device, self.quick = device, quick
        self.threads = torch.get_num_threads() if device.type == "cpu" else 1

    def fastest(self, function):
        """Seconds per call on one thread: the best of many short rounds, since every disturbance only adds time."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            function()
            best = timed(function, self.device)()
            calls = max(1, min(50, int(2e-3 / max(best, 1e-9))))
            measure = timed(lambda: [function() for _ in range(calls)], self.device, calls)
            rounds, started = 0, time.perf_counter()
            while rounds < 5 or time.perf_counter() - started < (0.01 if self.quick else 0.3):
                best, rounds = min(best, measure()), rounds + 1
            return best
        finally:
            torch.set_num_threads(threads)

    def gemms(self, shapes, dtype, passes):
        """Seconds of the matrix products (m, k) @ (k, n) for `shapes`, a list of (m, k, n); passes: "forward",
        "backward" or both. The backward pass has two products for each of the forward pass."""
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
        """Bytes per second, read plus written, of a copy that is too large for any cache."""
        n = 2**16 if self.quick else 2**28 if self.device.type == "cuda" else 2**26
        source, target = torch.ones(n, device=self.device), torch.empty(n, device=self.device)
        return 8 * n / self.fastest(lambda: target.copy_(source))

    @functools.cached_property
    def exps(self):
        """exp evaluations per second: on a CPU by torch on numbers in its cache, on a GPU on numbers in registers."""
        if self.device.type == "cuda":
            return exps_in_registers(self.fastest, self.device)
        x = torch.rand(2**12 if self.quick else 2**18)
        out = torch.empty_like(x)
        return self.threads * len(x) / self.fastest(lambda: torch.exp(x, out=out))

    def text(self):
        """The rates that have been measured, in words."""
        words = {"bandwidth": "copies {:,.0f} GB/s", "exps": "{:,.1f}e9 exp/s"}
        return ", ".join(text.format(vars(self)[name] / 1e9) for name, text in words.items() if name in vars(self))


def exps_in_registers(fastest, device):
    """exp2 evaluations per second of the GPU's special-function units, by a kernel that does nothing else."""
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
    """(m, k, n) of the matrix products in a Mamba block's forward pass: in_proj, x_proj, dt_proj, out_proj."""
    m, dt_rank = batch * time, -(-d_model // 16)
    return [(m, d_model, 2 * d_inner), (m, d_inner, dt_rank + 2 * d_state), (m, dt_rank, d_inner),
            (m, d_inner, d_model)]


def kernel_limits(limits, batch, time, d_inner, d_state):
    """The least seconds of each kernel of the back end cuda for bfloat16 inputs: {kernel: seconds}.

    Either the bytes that it reads and writes, once each, over the bandwidth, or its exps over their rate, whichever
    takes longer. There is one exp per state update, and two per channel and step for the softplus and the gate.
    """
    from kernels import scan_cuda

    row, narrow = 2 * batch * time * d_inner, 2 * batch * time * d_state  # bytes of u and of B
    states = 2 * np.prod(scan_cuda.chunk_states_shape(batch, time, d_inner, d_state))
    updates = batch * time * d_inner
    needs = {"_conv_forward_kernel": (2 * row, updates), "_conv_backward_kernel": (3 * row, updates),
             "scan_forward": (4 * row + 2 * narrow + states, updates * (d_state + 2)),
             "scan_backward": (8 * row + 4 * narrow + states, updates * (d_state + 2))}
    return {name: max(n_bytes / limits.bandwidth, exps / limits.exps) for name, (n_bytes, exps) in needs.items()}


def block_limits(limits, shape):
    """The least seconds of a block's two passes: {"forward": …, "backward": …}. shape: batch, time, d_model, d_state.

    On a CPU these are the matrix products and one exp per state update in each pass: the states aren't kept, so the
    backward pass computes them again.
    """
    batch, time, d_model, d_state = shape
    d_inner, cuda = 2 * d_model, limits.device.type == "cuda"
    gemms = block_gemms(batch, time, d_model, d_inner, d_state)
    floor = {p: limits.gemms(gemms, torch.bfloat16 if cuda else torch.float32, p) for p in ("forward", "backward")}
    for name in floor:
        if cuda:
            kernels = kernel_limits(limits, batch, time, d_inner, d_state)
            floor[name] += kernels[f"_conv_{name}_kernel"] + kernels[f"scan_{name}"]
        else:
            floor[name] += batch * time * d_inner * d_state / limits.exps
    return floor


# ---- Results -------------------------------------------------------------------------------------------------

HEADER = ["", "ours", "peer", "peer's", "ratio", "limit", "ours / limit"]


@dataclasses.dataclass
class Line:
    """A line of a table. ours, theirs and limit are in `unit`: seconds (s), bytes (B) or a share between 0 and 1."""

    what: str
    ours: float
    unit: str = "s"
    peer: str = ""
    theirs: float | None = None
    ratio: float | None = None
    limit: float | None = None


def compared(what, ours, peer=None, theirs=None, **more):
    """The Line of repeated measurements: lists of seconds or bytes, ours and, where there is a peer, theirs.

    The ratio, how many times more the peer needs, is the median over the pairs that were measured in turn, or the ratio
    of the medians where one side was measured only once.
    """
    if theirs is None:
        return Line(what, median(ours), **more)
    ratio = (median(t / o for t, o in zip(theirs, ours, strict=True)) if len(theirs) == len(ours)
             else median(theirs) / median(ours))
    note = "" if len(theirs) > 1 or len(ours) == 1 else " (once)"
    return Line(what, median(ours), peer=peer + note, theirs=median(theirs), ratio=ratio, **more)


def quantity(value, unit):
    """A number of seconds, of bytes or a share as text, with a unit that suits its size; "" for None."""
    if value is None:
        return ""
    if unit == "share":
        return f"{100 * value:.0f} %"
    steps = {"s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
             "B": ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))}[unit]
    size, name = next((step for step in steps if abs(value) >= step[0]), steps[-1])
    return f"{value / size:.3g} {name}" if value < 100 * size else f"{value / size:.0f} {name}"


def cells(line):
    """A Line as the cells of a table's row, under HEADER."""
    over = "" if line.limit is None else f"{line.ours / line.limit:.2f}x ({100 * line.limit / line.ours:.0f} %)"
    return [line.what, quantity(line.ours, line.unit), line.peer, quantity(line.theirs, line.unit),
            "" if line.ratio is None else f"{line.ratio:.3g}x", quantity(line.limit, line.unit), over]


def show(title, lines, notes):
    """Print a row's table and the notes below it."""
    print(f"\n{title}\n" + cli.table(HEADER, [cells(line) for line in lines], "lrlrrrr"))
    for note in notes:
        print(f"  {note}")
    sys.stdout.flush()


# ---- Peers ---------------------------------------------------------------------------------------------------


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
    """{name: make_block(d_model, d_state)} of the device's peers that are installed, and a note on each that isn't.

    mamba-ssm has two forms: with causal-conv1d its block is one fused function. The name says which was found.
    """
    known, file = PEERS[device.type], "requirements-cuda.txt" if device.type == "cuda" else "requirements-bench.txt"
    peers, notes = {}, []
    for name, (package, make_block) in known.items():
        if not importlib.util.find_spec(package):
            notes.append(f"{name} is not installed and left out; install it with: pip install -r {file}")
        elif name == "mamba-ssm" and not importlib.util.find_spec("causal_conv1d"):
            peers["mamba-ssm, slow form"] = make_block
            notes.append("mamba-ssm is measured without causal-conv1d, which isn't installed: not its fastest form")
        else:
            peers["mamba-ssm + causal-conv1d" if name == "mamba-ssm" else name] = make_block
    return peers, notes


class PeerBlock(nn.Module):
    """A peer's block with our block's weights, called as ours is. All of them name weights as mamba_ssm.Mamba does."""

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


# ---- scan ----------------------------------------------------------------------------------------------------


def block_pass(block, x, backend, amp):
    """A function that runs block(x) forward and backward and returns {"forward": seconds, "backward": seconds}."""
    gradient = torch.randn(x.shape, device=x.device, dtype=torch.bfloat16 if amp else x.dtype)

    def measure():
        x.grad = None
        block.zero_grad(set_to_none=True)
        laps = Laps(x.device)
        with autocast(x.device, amp):
            y = block(x, backend)
        laps("forward")
        y.backward(gradient.to(y.dtype))
        laps("backward")
        return laps.seconds()

    return measure


def replayed_pass(block, x, backend):
    """A function that runs both passes of the block in bfloat16 as one CUDA graph and returns the seconds they take."""
    gradient = torch.randn(x.shape, device=x.device)

    def both_passes(x):
        block.zero_grad(set_to_none=True)
        with autocast(x.device, True):
            y = block(x, backend)
        y.backward(gradient.to(y.dtype))

    replay = captured(both_passes, x.detach(), list, x.device)
    return timed(lambda: replay(x), x.device)


def lap_lines(found, peer, floor, whole):
    """A Line per lap and one, named `whole`, of all laps together: ours and, unless it is None, the peer's.

    found: what `interleaved` returned; floor: the limits of the laps that have one, {name: seconds}.
    """
    return [compared(name or whole, lap_times(found["ours"], name), peer, peer and lap_times(found[peer], name),
                     limit=floor.get(name) if name else sum(floor.values())) for name in [*found["ours"][0], None]]


def memory_line(measures, peer, device):
    """The Line of the peak memory of measures["ours"] and, unless it is None, of the peer's."""
    return compared("peak memory", [peak_memory(measures["ours"], device)], peer,
                    peer and [peak_memory(measures[peer], device)], unit="B")


def measure_scan(bench):
    """The row `scan`: (title, lines, notes)."""
    device, cuda = bench.device, bench.device.type == "cuda"
    batch, time, d_model, d_state = shape = bench.size["scan"]
    torch.manual_seed(0)
    ours = MambaBlock(d_model, d_state).to(device)
    backend = choose_backend("auto", device)
    x = torch.randn(batch, time, d_model, device=device, requires_grad=True)
    peers, notes = find_peers(device)
    blocks = {name: PeerBlock(make_block, ours).to(device) for name, make_block in peers.items()}
    for name, block in blocks.items():
        with torch.no_grad(), autocast(device, cuda):
            theirs, y = block(x[:1], backend).float(), ours(x[:1], backend).float()
        notes.append(f"{name}, same weights: output differs by {float((theirs - y).norm() / y.norm()):.1e}")
    transformers = blocks.pop("transformers", None)  # it takes minutes: measured on one sequence only
    measures = {"ours": block_pass(ours, x, backend, cuda)}
    measures |= {name: block_pass(block, x, backend, cuda) for name, block in blocks.items()}
    found, peer = interleaved(measures, bench.repeats, settle=True), next(iter(blocks), None)
    lines = lap_lines(found, peer, block_limits(bench.limits, shape), "both")
    lines.append(memory_line(measures, peer, device))
    if cuda:
        lines += kernel_lines(bench, measures["ours"], shape) + small_batch_lines(bench, ours, blocks, backend)
        limit = "matrix products at their measured rate, and each kernel's bytes or exps, whichever takes longer"
    else:
        lines += [] if transformers is None else [transformers_line(bench, ours, transformers, x, backend)]
        limit = "the block's matrix products, and one exp per state update in each pass"
    notes.append(f"limit: {limit} ({bench.limits.text()})")
    kind = "bfloat16" if cuda else "float32"
    return f"scan: a Mamba block, {batch} x {time}, d_model {d_model}, d_state {d_state}, {kind}", lines, notes


def transformers_line(bench, ours, theirs, x, backend):
    """The Line of the block of transformers, which walks through time in Python, on the first sequence of x only."""
    one = x[:1].detach().requires_grad_()
    found = interleaved({name: block_pass(block, one, backend, False)
                         for name, block in (("ours", ours), ("theirs", theirs))}, bench.repeats)
    limit = sum(block_limits(bench.limits, (1, *bench.size["scan"][1:])).values())
    return compared("both, one sequence", lap_times(found["ours"]), "transformers", lap_times(found["theirs"]),
                    limit=limit)


def kernel_lines(bench, measure, shape):
    """A Line per kernel of our block: the seconds of one call. All else that the GPU does is one Line."""
    batch, time, d_model, d_state = shape
    limits = kernel_limits(bench.limits, batch, time, 2 * d_model, d_state)
    rounds = 5
    events = device_events(lambda: [measure() for _ in range(rounds)], bench.device)
    lines, rest = [], sum(seconds for _, seconds in events) / rounds
    for kernel, limit in limits.items():
        calls = [seconds for name, seconds in events if name == kernel]
        if calls:
            lines.append(Line(f"{kernel} x {len(calls) // rounds}", median(calls), limit=limit))
            rest -= sum(calls) / rounds
    gemms = bench.limits.gemms(block_gemms(batch, time, d_model, 2 * d_model, d_state), torch.bfloat16,
                               ("forward", "backward"))
    return [*lines, Line("products, sums, casts", rest, limit=gemms)]


def small_batch_lines(bench, ours, blocks, backend):
    """Lines of both passes at small batch sizes, launched from Python ("eager") and as one CUDA graph."""
    _, time, d_model, _ = bench.size["scan"]
    peer, lines = next(iter(blocks), None), []
    for batch in SMALL_BATCHES:
        x = torch.randn(batch, time, d_model, device=bench.device)
        sides = {"ours": ours, **blocks}.items()
        found = interleaved({name: block_pass(block, x.clone().requires_grad_(), backend, True)
                             for name, block in sides}, bench.repeats)
        lines.append(compared(f"both, batch {batch}, eager", lap_times(found["ours"]), peer,
                              peer and lap_times(found[peer])))
        found = interleaved({name: replayed_pass(block, x, backend) for name, block in sides}, bench.repeats)
        lines.append(compared(f"both, batch {batch}, graph", found["ours"], peer, found.get(peer)))
    return lines


# ---- step ----------------------------------------------------------------------------------------------------


def training_flags(text, **more):
    """The training script's flags in `text` and `more`, parsed."""
    words = [word for name, value in more.items() for word in (cli.flag_of(name), str(value))]
    return training.parse_args([*text.split(), "--no-compile", "--no-train-eval", *words])


def step_pass(model, x, args):
    """A function that runs one training step and returns the seconds of its three parts."""
    loss_of = training.make_loss(args)
    optimizer = training.build_optimizer(training.parameter_groups(model, args.lr, 1.0, False), args.lr, x.device)

    def measure():
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

    return measure


def replayed_step(model, x, args, compiled=False):
    """A function that runs the training script's step as one CUDA graph and returns the seconds it takes."""
    optimizer = training.build_optimizer(training.parameter_groups(model, args.lr, 1.0, False), args.lr, x.device)
    sums = torch.zeros(3, device=x.device)
    step = training.make_step(torch.compile(model) if compiled else model, training.make_loss(args), optimizer, sums)
    replay = captured(step, x, lambda: [
        *model.parameters(), sums, *(t for state in optimizer.state.values() for t in state.values())], x.device)
    return timed(lambda: replay(x), x.device)


def step_limits(limits, args, batch, features):
    """The least seconds of each pass of a training step: those of the blocks and the matrix products of the ends."""
    floor = block_limits(limits, (batch, args.seq_len, args.d_model, args.d_state))
    m, dtype = batch * args.seq_len, torch.bfloat16 if limits.device.type == "cuda" else torch.float32
    ends = [(m, features, args.d_model), (m, args.d_model, args.d_ff), (m, args.d_ff, features)]
    return {name: args.n_layers * seconds + limits.gemms(ends, dtype, name) for name, seconds in floor.items()}


def measure_step(bench):
    """The row `step`: (title, lines, notes)."""
    device, cuda, features = bench.device, bench.device.type == "cuda", 20
    args = training_flags(bench.size["flags"], device=device)
    x = torch.randn(args.batch_size, args.seq_len, features, device=device)
    model = training.build_model(args, features).to(device).train()
    peers, notes = find_peers(device)
    peers.pop("transformers", None)  # it would take minutes per step
    models = {"ours": model} | {name: with_blocks_of(make_block, model).train() for name, make_block in peers.items()}
    measures = {name: step_pass(each, x, args) for name, each in models.items()}
    floor, peer = step_limits(bench.limits, args, args.batch_size, features), next(iter(peers), None)
    graphs, theirs = {}, None
    if cuda:
        graphs = {"step as one CUDA graph": replayed_step(model, x, args),
                  "step compiled, as one CUDA graph": replayed_step(model, x, args, compiled=True)}
    if cuda and peer:
        theirs = f"{peer}, CUDA graph"
        measures[theirs] = replayed_step(models[peer], x, args)
    found = interleaved(measures | graphs, bench.repeats)
    lines = lap_lines(found, peer, floor, "step")
    lines += [compared(how, found[how], theirs, found.get(theirs), limit=sum(floor.values())) for how in graphs]
    lines.append(memory_line(measures, peer, device))
    notes.append(f"limit: blocks as in the row scan, the matrix products around them ({bench.limits.text()})")
    return (f"step: training, {args.batch_size} x {args.seq_len}, {args.n_layers} layers, d_model {args.d_model}, "
            f"d_state {args.d_state}"), lines, notes


# ---- epoch ---------------------------------------------------------------------------------------------------


def common_training(series, args, model, device):
    """A function that trains `model` for one epoch as most code of this kind does, and returns the sum of the losses.

    Worker processes gather the windows one by one, each step reads its loss back, kernels are launched one by one, and
    validation goes batch by batch. It is kept fair: the workers live on between epochs, and memory is pinned.
    """
    X = torch.from_numpy(series.X)
    train, val, _ = dataset.split_windows(series.n_steps, args.seq_len, args.stride, args.val_fraction)
    train_loader, val_loader = (torch.utils.data.DataLoader(
        [X[start:start + args.seq_len] for start in starts.tolist()], args.batch_size, shuffle=shuffle,
        num_workers=min(WORKERS, os.cpu_count()), pin_memory=device.type == "cuda", persistent_workers=True)
        for starts, shuffle in ((train, True), (val, False)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=training.WEIGHT_DECAY)

    def epoch():
        total = 0.0
        for loader, learning in ((train_loader, True), (val_loader, False)):
            model.train(learning)
            for x in loader:
                x = x.to(device, non_blocking=True)
                with torch.set_grad_enabled(learning), autocast(device, True):
                    prediction = model(x)["1"]
                loss = F.mse_loss(prediction[:, :-1].float(), x[:, 1:])
                if learning:
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(model.parameters(), training.GRAD_CLIP)
                    optimizer.step()
                total += loss.item()
        return total

    return epoch


def train_by_script(folder, flags, device, epochs):
    """Train as the training script does, in this process, and return the seconds per epoch, from the run's log.

    The first epoch is left out: it includes compiling and the capture of the CUDA graph.
    """
    name = f"run_{time.monotonic_ns()}"
    args = training_flags(flags, device=device, data_dir=folder, checkpoint=Path(folder) / f"{name}.pt", epochs=epochs)
    # Training would handle Ctrl-C itself, from then on: here it must go on ending this script at once.
    with (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()),
          mock.patch("signal.signal")):
        training.main(args)
    with open(Path(folder) / f"{name}_log.csv", newline="") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    return (seconds[-1] - seconds[0]) / (len(seconds) - 1)


def busy_share(folder, flags, device, epochs, seconds_per_epoch):
    """The share of an epoch's time in which the GPU computes: the time of all its kernels, profiled, over the time that
    an epoch takes unprofiled. Two runs of different length are profiled, so that their common start cancels out."""
    few, many = (sum(seconds for _, seconds in device_events(
        lambda n=n: train_by_script(folder, flags, device, n), device)) for n in (2, 2 + epochs))
    return (many - few) / epochs / seconds_per_epoch


def measure_epoch(bench):
    """The row `epoch`: (title, lines, notes)."""
    device, cuda = bench.device, bench.device.type == "cuda"
    flags, epochs = bench.size["flags"], bench.size["epochs"]
    args = training_flags(flags, device=device)
    with tempfile.TemporaryDirectory() as folder:
        steps = ["--n-steps", str(bench.size["epoch_steps"])]
        series = circles.generate(circles.config_of(circles.parse_args(steps)))
        with contextlib.redirect_stdout(io.StringIO()):
            circles.save(series, Path(folder))
        model = training.build_model(args, series.feature_dim).to(device)
        # On a CPU the peer has our blocks too: there this row is about the loop around them.
        peers, notes = find_peers(device) if cuda else ({}, [])
        blocks = next(iter(peers), f"our {'cuda' if cuda else 'cpu'}")
        if peers:
            model = with_blocks_of(peers[blocks], model)
        found = interleaved({"ours": lambda: train_by_script(folder, flags, device, epochs),
                             "common": timed(common_training(series, args, model, device), device)}, bench.repeats)
        lines = [compared("epoch", found["ours"], f"DataLoader, {blocks} blocks", found["common"])]
        if cuda:
            busy = busy_share(folder, flags, device, epochs, lines[0].ours)
            lines.append(Line("GPU busy", busy, unit="share"))
            notes.append(f"GPU busy: kernel time of {epochs} epochs, profiled, over the time they take unprofiled")
    train, val, _ = dataset.split_windows(series.n_steps, args.seq_len, args.stride, args.val_fraction)
    return (f"epoch: {len(train)} training windows in {-(-len(train) // args.batch_size)} steps, {len(val)} validation "
            f"windows of {args.seq_len} steps, {args.n_layers} layers"), lines, notes


# ---- generate ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def generate_by_prefix(model, seed, n_steps, every=1):
    """Generate by running the model over the whole series so far at each step; seed (n, time, features), a tensor.

    Returns the generated series (n, n_steps, features) and the seconds that all steps take. With `every` above 1 one in
    so many steps is computed, its time counted that often and its prediction repeated, so that lengths stay true.
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
    """The least seconds per step of n samples: every weight is read once, and there is one exp per state and sample.

    On a CPU the weights are read from where so many bytes lie when they are read at each step: a cache that holds them.
    """
    n_bytes = sum(p.numel() * p.itemsize for p in model.parameters())
    n_states = sum(layer.mamba.A_log.numel() for layer in model.layers)
    reading = (n_bytes / limits.bandwidth if limits.device.type == "cuda" else
               limits.fastest(torch.ones(n_bytes // 4).sum))
    return reading + n * n_states / limits.exps


def measure_generate(bench):
    """The row `generate`: (title, lines, notes)."""
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
    mixture = CausalTimeSeriesMamba(**size["model"], mixture=COMPONENTS).to(device).eval()
    generate.generate(mixture, seed, 8, temperature=1.0)  # compiles
    found = interleaved({
        "ours": timed(lambda: generate.generate(model, seed, n_steps), device, n_steps),
        "mixture": timed(lambda: generate.generate(mixture, seed, n_steps, temperature=1.0), device, n_steps),
        "prefix": lambda: generate_by_prefix(peer, seed_on_device, n_steps, every)[1] / n_steps}, bench.repeats)
    lines = [compared(f"one of {n_steps} steps", found["ours"], f"prefix re-run, {blocks}", found["prefix"],
                      limit=generation_limit(bench.limits, model, SAMPLES)),
             compared(f"the same, mixture of {COMPONENTS}", found["mixture"], "point head", found["ours"],
                      limit=generation_limit(bench.limits, mixture, SAMPLES))]
    if every > 1:
        notes.append(f"prefix: one step in {every} is computed, at its true length, and counts {every} times")
    notes += [f"both ways agree to {error:.1e} over the first 8 steps",
              f"limit: all weights read once per step, one exp per state ({bench.limits.text()})"]
    return f"generate: {SAMPLES} samples, {model.n_layers} layers, d_model {model.d_model}", lines, notes


MEASURE = {"scan": measure_scan, "step": measure_step, "epoch": measure_epoch, "generate": measure_generate}


def main(args):
    """Measure the rows of --only, print each as a table, and write --save after every row."""
    device = cli.pick_device(args.device)
    if args.save is not None:
        cli.output_folder(args.save.parent)
    bench = SimpleNamespace(device=device, repeats=args.repeats, limits=Limits(device, args.quick),
                            size=SIZES["quick" if args.quick else device.type])
    name = (torch.cuda.get_device_name(device) if device.type == "cuda" else
            f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}")
    machine = {"device": name, "threads": torch.get_num_threads(), "python": platform.python_version(),
               "torch": torch.__version__, "load": round(os.getloadavg()[0], 1)}
    report = {"machine": machine, "repeats": args.repeats, "quick": args.quick, "rows": {}}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    for name in args.only:
        started = time.perf_counter()
        title, lines, notes = MEASURE[name](bench)
        show(title, lines, notes)
        report["rows"][name] = {"title": title, "seconds": time.perf_counter() - started, "notes": notes,
                                "lines": [dataclasses.asdict(line) for line in lines]}
        if args.save is not None:
            cli.write_json(args.save, report)
    if args.save is not None:
        print(f"\nwrote {args.save}")


if __name__ == "__main__":
    cli.run(main, ARGS)
