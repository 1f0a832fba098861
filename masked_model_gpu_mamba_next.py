"""Train a causal Mamba to predict the next time steps, with the ablations: frozen or slow gates, frozen A, several
horizons, auxiliary losses, augmentation.

Reads DATA_DIR/data.npz and config.json. A run named NAME.pt writes, beside it: NAME.pt (the weights with the lowest
validation loss), NAME_last.pt (the last state, for --resume), NAME_log.csv (a row an epoch), NAME_run.json (command,
versions, device), NAME_loss.png and NAME_prediction_{0,1,2}.png. A name that is taken is refused, never overwritten.
Ctrl-C saves the state and ends; under torchrun the global batch is split over the processes.

Examples:
  python masked_model_gpu_mamba_next.py --d-state 32 --seq-len 1024 --stride 256 --no-compile --no-train-eval
  python masked_model_gpu_mamba_next.py --gate-lr-factor 0 --checkpoint model_next_frozen.pt
"""

import argparse
import contextlib
import copy
import datetime
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import cli

# What makes a run an ablation: a run without --checkpoint carries those that are set in its name, so that two
# ablations started side by side never meet in one file.
ABLATION_FLAGS = ("gate_lr_factor", "freeze_A", "max_horizon", "slowness_lambda", "contrastive_lambda", "aug_noise",
                  "aug_rotate", "aug_scale")
# Flags that say how or where to compute, not what: --resume takes them from the command line.
FREE_ON_RESUME = ("checkpoint", "resume", "eval", "device", "scan", "data_dir", "num_workers", "no_compile",
                  "no_train_eval", "log_dir", "epochs")


def build_parser():
    parser = cli.parser(__doc__)
    data = parser.add_argument_group("data")
    cli.add_data_dir(data)
    data.add_argument("--seq-len", type=cli.positive_int, default=1024, metavar="N", help="steps in a window")
    data.add_argument("--stride", type=cli.positive_int, default=256, metavar="N",
                      help="steps between window starts; training starts are jittered by up to one stride")
    data.add_argument("--val-fraction", type=cli.fraction, default=0.1, metavar="F",
                      help="part of the series, at its end, kept for validation")
    data.add_argument("--num-workers", type=cli.non_negative_int, default=0, metavar="N",
                      help="loader processes for a series that is read from its file (--uncompressed) or does not "
                           "fit on the device; unused otherwise")
    model = parser.add_argument_group("model")
    model.add_argument("--d-model", type=cli.positive_int, default=128, metavar="N", help="width of the model")
    model.add_argument("--n-layers", type=cli.positive_int, default=7, metavar="N", help="Mamba layers")
    model.add_argument("--d-state", type=cli.positive_int, default=32, metavar="N", help="SSM states a channel")
    model.add_argument("--d-conv", type=cli.positive_int, default=4, metavar="N", help="taps of the causal conv")
    model.add_argument("--expand", type=cli.positive_int, default=2, metavar="N", help="d_inner / d_model")
    model.add_argument("--d-ff", type=cli.positive_int, default=512, metavar="N", help="hidden width of a head")
    model.add_argument("--dropout", type=cli.probability, default=0.1, metavar="P", help="dropout probability")
    ablation = parser.add_argument_group("ablations and losses")
    ablation.add_argument("--max-horizon", type=cli.positive_int, default=1, metavar="K",
                          help="predict 1, 2, 4, … up to K steps ahead, equal weights")
    ablation.add_argument("--gate-lr-factor", type=cli.non_negative_float, default=1.0, metavar="F",
                          help="learning rate of the gates (x_proj, dt_proj) over the others'; 0 freezes them")
    ablation.add_argument("--freeze-A", action="store_true", help="keep A_log at its initial value")
    ablation.add_argument("--slowness-lambda", type=cli.non_negative_float, default=0.0, metavar="W",
                          help="weight of the slowness loss on the layer outputs")
    ablation.add_argument("--contrastive-lambda", type=cli.non_negative_float, default=0.0, metavar="W",
                          help="weight of the InfoNCE loss between neighbouring steps of the layer outputs")
    ablation.add_argument("--contrastive-temp", type=cli.positive_float, default=0.1, metavar="T",
                          help="InfoNCE temperature")
    ablation.add_argument("--contrastive-negatives", type=cli.positive_int, default=64, metavar="N",
                          help="InfoNCE negatives for each anchor")
    ablation.add_argument("--aug-noise", type=cli.non_negative_float, default=0.0, metavar="STD",
                          help="std of the noise added to the training input (not to its target), data units")
    ablation.add_argument("--aug-rotate", action="store_true", help="rotate each training window at random")
    ablation.add_argument("--aug-rotate-eps", type=cli.positive_float, default=0.1, metavar="RAD",
                          help="size of that rotation: std of each plane's angle, radians")
    ablation.add_argument("--aug-scale", type=cli.non_negative_float, default=0.0, metavar="S",
                          help="scale each training window by exp(N(0, S²))")
    training = parser.add_argument_group("training")
    training.add_argument("--batch-size", type=cli.positive_int, default=128, metavar="N",
                          help="windows in a step at most; an epoch is cut into equal steps")
    training.add_argument("--lr", type=cli.positive_float, default=1e-3, metavar="LR", help="peak learning rate")
    training.add_argument("--warmup-epochs", type=cli.non_negative_float, default=10, metavar="N",
                          help="linear warm-up, then a cosine down to 0")
    training.add_argument("--epochs", type=cli.positive_int, default=500, metavar="N",
                          help="passes over the training windows")
    training.add_argument("--ema", type=cli.probability, default=0.0, metavar="DECAY",
                          help="evaluate and save a moving average of the weights, over about 1 / (1 - DECAY) steps; "
                               "0: the weights themselves")
    training.add_argument("--no-compile", action="store_true",
                          help="do not use torch.compile (it is used on CUDA only)")
    training.add_argument("--no-amp", action="store_true", help="float32 in place of bfloat16 autocast on CUDA")
    training.add_argument("--no-train-eval", action="store_true",
                          help="do not evaluate the training windows after each epoch (log column train_eval_mse)")
    cli.add_scan(training)
    cli.add_seed(training)
    cli.add_device(training)
    files = parser.add_argument_group("files")
    files.add_argument("--checkpoint", type=Path, metavar="NAME.pt",
                       help="names the run (default: model_next.pt, with the ablation's flags in the name if any)")
    files.add_argument("--resume", action="store_true", help="go on from NAME_last.pt, with that run's flags")
    files.add_argument("--eval", nargs="?", type=Path, const=True, metavar="NAME.pt",
                       help="only print this checkpoint's record and its validation loss "
                            "(default: that of --checkpoint)")
    files.add_argument("--log-dir", type=Path, metavar="DIR",
                       help="also write scalars and figures for TensorBoard here (default: not written)")
    return parser


def parse_args(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.seq_len <= args.max_horizon:
        parser.error(f"--seq-len {args.seq_len} must be longer than the largest horizon, {args.max_horizon}")
    args.checkpoint = args.checkpoint or Path(default_name(parser, args))
    if args.checkpoint.suffix != ".pt":
        parser.error(f"--checkpoint {args.checkpoint} must end in .pt")
    if args.checkpoint.stem.endswith("_last"):
        parser.error("--checkpoint NAME_last.pt is the name of run NAME's last state; choose another")
    # Which flags were given, not left at their default: --resume must not silently ignore one.
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    args.given = sorted(vars(parser.parse_args(argv)))
    return args


def default_name(parser, args):
    """model_next.pt, or model_next_max_horizon64.pt and the like for an ablation."""
    parts = ["model_next"]
    for name in ABLATION_FLAGS:
        value = getattr(args, name)
        if value != parser.get_default(name):
            parts.append(name if value is True else f"{name}{value:g}")
    return "_".join(parts) + ".pt"


def parse_command_line():
    """parse_args, but under torchrun, which gives all processes the same flags, rank 0 alone answers a bad one."""
    if os.environ.get("RANK", "0") == "0":
        return parse_args()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            return parse_args()
    except SystemExit:
        time.sleep(5)  # torchrun ends all with the first that fails: that must be the one that says why
        raise


if __name__ == "__main__":
    ARGS = parse_command_line()  # before the slow imports: --help and a bad flag answer at once

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed
from tqdm import tqdm

import dataset
import figures
from mamba_model import (
    CausalTimeSeriesMamba,
    horizons_up_to,
    load_checkpoint,
    model_from_state_dict,
    read_checkpoint,
    save_checkpoint,
    stem,
)

WEIGHT_DECAY = 0.01
GRAD_CLIP = 1.0
CONTRASTIVE_ANCHORS = 1024  # anchors a layer and step: enough for a steady InfoNCE, few enough to cost nothing
SAVE_EVERY_SECONDS = 20  # between two saves of the last and the best state; also saved at every kind of end
STOP_CHECK_STEPS = 10  # steps of several GPUs between two agreements whether to stop: each waits for the device
PROCESS_TIMEOUT = datetime.timedelta(hours=2)  # the others wait while rank 0 computes the floor and evaluates
WARM_UP_CALLS = 3  # calls before a CUDA graph is captured: kernels compile and buffers settle in them


# ---------------------------------------------------------------------------------------------------------------
# Losses


def at_least_float32(x):
    """Half precision as float32, wider numbers as they are: what is summed over many steps."""
    return x.float() if x.dtype.itemsize < 4 else x


def horizon_mse(predictions, target):
    """The mean squared error of each horizon, (n_horizons,): predictions["k"][:, t] against target[:, t + k].

    predictions: {str(k): (batch, time, feature_dim)}; target (batch, time, feature_dim).
    """
    return torch.stack([F.mse_loss(at_least_float32(p[:, :-int(k)]), target[:, int(k):])
                        for k, p in predictions.items()])


def slowness_loss(outputs):
    """Mean over layers of E‖h_{t+1} − h_t‖² / Var(h): the objective of slow feature analysis (Wiskott & Sejnowski
    2002). Divided by the variance, it can't be lowered by shrinking the representation.

    outputs: list of (batch, time, d_model).
    """
    losses = []
    for h in outputs:
        h = at_least_float32(h)
        losses.append((h[:, 1:] - h[:, :-1]).square().mean() / (h.var(dim=(0, 1)).mean() + 1e-6))
    return torch.stack(losses).mean()


def contrastive_loss(outputs, temperature, n_negatives):
    """Mean over layers of InfoNCE (van den Oord et al. 2018, eq. 4) with the next step of the same window as the
    positive and steps drawn from the whole batch as negatives; cosine similarity.

    outputs: list of (batch, time, d_model).
    """
    losses = []
    for h in outputs:
        h = F.normalize(at_least_float32(h), dim=-1)
        batch, time, _ = h.shape
        n = min(CONTRASTIVE_ANCHORS, batch * (time - 1))
        rows = torch.randint(batch, (n,), device=h.device)
        steps = torch.randint(time - 1, (n,), device=h.device)
        anchors, positives = h[rows, steps], h[rows, steps + 1]
        drawn = torch.randint(batch * time, (n, n_negatives), device=h.device)
        negatives = h.reshape(batch * time, -1)[drawn]
        logits = torch.cat([(anchors * positives).sum(-1, keepdim=True),
                            torch.einsum("nd,nkd->nk", anchors, negatives)], dim=1) / temperature
        losses.append(-logits.log_softmax(dim=1)[:, 0].mean())
    return torch.stack(losses).mean()


def augment(x, noise, rotate_eps, scale):
    """Windows x (batch, time, feature_dim) to (input, target).

    Rotation and scale make another song of the same kind, so they act on both; noise acts on the input alone.
    rotate_eps None: no rotation.
    """
    batch, _, dim = x.shape
    if rotate_eps is not None:
        S = torch.randn(batch, dim, dim, device=x.device) * (rotate_eps / math.sqrt(2))
        x = x @ torch.linalg.matrix_exp(S - S.transpose(1, 2))
    if scale > 0:
        x = x * torch.exp(scale * torch.randn(batch, 1, 1, device=x.device))
    return (x + noise * torch.randn_like(x) if noise > 0 else x), x


# ---------------------------------------------------------------------------------------------------------------
# Optimiser


def parameter_groups(model, lr, gate_lr_factor, freeze_A):
    """AdamW's groups: weights with decay; A_log, D, biases and norms without; the gates (x_proj, dt_proj) at
    gate_lr_factor times the others' rate. What is frozen gets no gradient and is in no group, so that no schedule
    and no decay can move it.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        is_gate = ".x_proj." in name or ".dt_proj." in name
        if (is_gate and gate_lr_factor == 0) or (freeze_A and name.endswith(".A_log")):
            parameter.requires_grad_(False)
            continue
        factor = gate_lr_factor if is_gate else 1.0
        decay = WEIGHT_DECAY if parameter.ndim >= 2 and not name.endswith("A_log") else 0.0
        groups.setdefault((factor, decay), []).append(parameter)
    return [{"params": parameters, "lr": lr * factor, "lr_factor": factor, "weight_decay": decay}
            for (factor, decay), parameters in groups.items()]


def lr_at(step, peak, warmup_steps, total_steps):
    """Learning rate of a step, counted from 0: linear warm-up to the peak, then half a cosine down to 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        value = lr * group["lr_factor"]
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(value)  # the captured graph reads the tensor
        else:
            group["lr"] = value


# ---------------------------------------------------------------------------------------------------------------
# One step, one epoch, one evaluation


def autocast(device, enabled):
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled and device.type == "cuda")


def make_loss(args):
    """The training loss: (model, windows) to (loss, mean squared errors a horizon)."""
    rotate_eps = args.aug_rotate_eps if args.aug_rotate else None

    def loss_of(model, x):
        inputs, target = augment(x, args.aug_noise, rotate_eps, args.aug_scale)
        with autocast(x.device, not args.no_amp):
            predictions, outputs = model(inputs, with_layers=True)
        mse = horizon_mse(predictions, target)
        loss = mse.mean()
        if args.slowness_lambda:
            loss = loss + args.slowness_lambda * slowness_loss(outputs)
        if args.contrastive_lambda:
            loss = loss + args.contrastive_lambda * contrastive_loss(
                outputs, args.contrastive_temp, args.contrastive_negatives)
        return loss, mse.detach()

    return loss_of


def make_averaging(averaged, model, weight):
    """A function that moves the weights of one model towards another's by `weight`, a number on the device."""
    mine, theirs = list(averaged.parameters()), list(model.parameters())

    @torch.no_grad()
    def average():
        gaps = torch._foreach_sub(theirs, mine)
        torch._foreach_mul_(gaps, weight)
        torch._foreach_add_(mine, gaps)

    return average


def averaging_weight(step, decay):
    """What the newest weights count in their moving average after a step, counted from 0: 1 - decay, and more in the
    first steps, which would otherwise keep the initial weights in it (Tarvainen & Valpola 2017, arXiv 1703.01780)."""
    return 1 - min(decay, (1 + step) / (10 + step))


def make_step(model, loss_of, optimizer, totals, share=1.0, world=1, after=None):
    """One optimisation step on windows x, this process's `share` of the global batch; then `after()`, if given.

    Adds [loss, mse…, 1 if all losses were finite so far] to `totals` on the device: no number travels to the host in
    a step.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step(x):
        optimizer.zero_grad(set_to_none=True)
        loss, mse = loss_of(model, x)
        # The processes' gradients are averaged: weighted by its share, each window counts the same on all of them.
        (loss * (share * world)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, GRAD_CLIP)
        optimizer.step()
        totals[:-1].add_(torch.cat([loss.detach()[None], mse]) * share)
        # Once a loss isn't finite the sum never is again: the count stops at the first bad step.
        totals[-1].add_(totals[0].isfinite())
        if after is not None:
            after()

    return step


def captured(function, example, state, device):
    """`function(starts)` as a CUDA graph: one launch replays all its kernels.

    `state` are the tensors that the warm-up calls change and that are put back before the capture. Returns a
    callable that copies its argument into the graph's input and replays.
    """
    saved = [(t, t.detach().clone()) for t in state()]
    static = example.clone()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            function(static)
    torch.cuda.current_stream(device).wait_stream(stream)
    known = {id(t) for t, _ in saved}
    with torch.no_grad():
        for tensor, value in saved:
            tensor.copy_(value)
        for tensor in state():  # made by the warm-up itself: Adam's moments and step counts start at zero
            if id(tensor) not in known:
                tensor.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(static)

    def replay(starts):
        static.copy_(starts)
        graph.replay()
        return result

    replay.function = function  # and with it all tensors that it holds: the graph knows only where they lie
    return replay


def epoch_batches(train_starts, boundary, args, epoch):
    """The window starts of an epoch, (steps, batch) int64: shuffled, jittered, the same for the same seed and epoch,
    however many processes share them.

    All steps have the same size, so that one compiled or captured step serves them all; where the windows don't
    divide evenly, the last step is filled up with the epoch's first windows.
    """
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
    order = torch.from_numpy(train_starts)[torch.randperm(len(train_starts), generator=generator)]
    steps = math.ceil(len(order) / args.batch_size)
    size = math.ceil(len(order) / steps)
    order = order.repeat(math.ceil(steps * size / len(order)))[:steps * size]
    return dataset.jittered(order, boundary, args.seq_len, args.stride, generator).view(steps, size)


@torch.no_grad()
def evaluate(model, fetch, starts, batch_size, amp):
    """Mean squared error of each horizon over all windows, each counting equally: (n_horizons,) on the device.

    `fetch(starts)` gives the windows; the model must be in eval mode.
    """
    sums = []
    for part in starts.split(batch_size):
        x = fetch(part)
        with autocast(x.device, amp):
            predictions = model(x)
        sums.append(horizon_mse(predictions, x) * len(part))
    return torch.stack(sums).sum(0) / len(starts)


# ---------------------------------------------------------------------------------------------------------------
# Log, record, checkpoint files


def run_files(checkpoint):
    """The files that a run owns, by role."""
    folder, name = checkpoint.parent, stem(checkpoint)
    return {"best": checkpoint, "last": folder / f"{name}_last.pt", "log": folder / f"{name}_log.csv",
            "record": folder / f"{name}_run.json", "loss": folder / f"{name}_loss.png",
            **{f"prediction_{i}": folder / f"{name}_prediction_{i}.png" for i in range(3)}}


def log_columns(horizons, train_eval):
    columns = ["epoch", "step", "lr", "seconds", "train_loss", "val_loss"]
    for kind in ("train_mse", "val_mse", "floor_mse", "excess_percent"):
        columns += [f"{kind}_{k}" for k in horizons]
    return columns + (["train_eval_mse"] if train_eval else [])


def log_row(columns, values):
    """A CSV line; a number is written so that it reads back the same, a missing one as an empty field."""
    cells = (values.get(column) for column in columns)
    return ",".join("" if c is None else repr(c) for c in cells) + "\n"


def read_log(path, columns, last_epoch):
    """The whole rows of a log up to an epoch, as dicts: what an interrupted run wrote later is dropped."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    header, *lines = [line.split(",") for line in text.split("\n")[:-1]] or [[]]
    needed = [name for name in columns if not name.startswith(("floor_", "excess_", "train_eval_"))]
    rows, epoch = [], 0
    for cells in lines if set(needed) <= set(header) else []:
        try:
            row = {name: (int(cell) if name in ("epoch", "step") else float(cell)) if cell else None
                   for name, cell in zip(header, cells, strict=True)}
        except ValueError:
            continue
        if None not in [row[name] for name in needed] and epoch < row["epoch"] <= last_epoch:
            rows.append(row)
            epoch = row["epoch"]
    if len(rows) < last_epoch:
        print(f"{path} has whole rows of {len(rows)} of the {last_epoch} epochs so far; the curves lack the others")
    return rows


def start_log(path, columns, rows):
    cli.write_text(path, ",".join(columns) + "\n" + "".join(log_row(columns, row) for row in rows))


def run_record(args, device, model, world=1):
    """What a reader needs to repeat the run: command, commit, versions, device, seed."""
    import numba
    import scipy

    try:
        described = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True,
                                   text=True, cwd=Path(__file__).parent, timeout=10)
        commit = described.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        commit = None
    launcher = ["python"]
    if world > 1:
        launcher = ["torchrun", f"--nnodes={os.environ.get('GROUP_WORLD_SIZE', 1)}",
                    f"--nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE', world)}"]
    return {"command": shlex.join([*launcher, Path(sys.argv[0]).name, *sys.argv[1:]]), "git_commit": commit,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "seed": args.seed, "processes": world,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
            "scan": model.backend_for(device), "parameters": sum(p.numel() for p in model.parameters()),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
                         "numpy": np.__version__, "scipy": scipy.__version__, "numba": numba.__version__}}


def read_record(path):
    """NAME_run.json as a dict, or None when it is missing or damaged: a record is no reason to refuse a checkpoint."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def write_record(path, record, resumed_at=None):
    """The record of the run's first start; each --resume is added to its list "resumed" with the step it began at."""
    old = read_record(path) if resumed_at is not None else None
    if old is not None:
        earlier = old.get("resumed")
        resumed = [*(earlier if isinstance(earlier, list) else []), {"step": resumed_at, **record}]
        record = {**old, "resumed": resumed}
    cli.write_text(path, json.dumps(record, indent=2) + "\n")


def print_record(path):
    """The record, a line an entry, and a line for each time the run was resumed."""
    record = read_record(path)
    if record is None:
        print(f"no readable record of the run at {path}")
        return
    resumed = record.pop("resumed", [])
    for key, value in record.items():
        parts = [f"{k} {v}" for k, v in value.items() if v is not None] if isinstance(value, dict) else [str(value)]
        print(f"{key:12} {', '.join(parts)}")
    for again in resumed if isinstance(resumed, list) else []:
        if isinstance(again, dict):
            print(f"{'resumed':12} at step {again.get('step')}, {again.get('started')}, commit "
                  f"{again.get('git_commit')}, on {again.get('device')}: {again.get('command')}")


def refuse_taken(files):
    go_on = "go on with it by --resume, " if files["last"].exists() else ""
    for path in files.values():
        if path.exists():
            raise cli.UserError(f"{path} exists already; {go_on}choose another --checkpoint name, or remove the old "
                                "run's files")


def read_last(path):
    """NAME_last.pt: (its dict, its model, its flags). Raises UserError when a run can't go on from it."""
    if not path.is_file():
        raise cli.UserError(f"--resume: {path} not found, so there is no run to go on with; leave --resume out to "
                            "start it")
    saved, (model, args) = read_checkpoint(path), load_checkpoint(path)
    kinds = {"epoch": int, "step": int, "best_loss": float, "data_crc32": int, "totals": torch.Tensor,
             "optimizer_state_dict": dict}
    bad = [name for name, kind in kinds.items()
           if not isinstance(saved.get(name), kind) or isinstance(saved[name], bool)]
    bad += [name for name in ("train_loss", "val_loss") if not isinstance(saved.get(name, ""), float | None)]
    if bad:
        raise cli.UserError(f"--resume: {path} lacks a valid {bad[0]}: it is no last state of a run; start it anew")
    flags = valid_flags(args, path)
    block, head = model.layers[0].mamba, model.output_heads["1"]
    sizes = {"d_model": model.d_model, "n_layers": model.n_layers, "d_state": block.d_state, "d_conv": block.d_conv,
             "expand": block.d_inner // model.d_model, "d_ff": head[0].out_features, "max_horizon": model.horizons[-1]}
    for name, size in sizes.items():
        if flags[name] != size:
            raise cli.UserError(f"--resume: {path} is damaged: its {name} is {flags[name]}, that of its weights "
                                f"{size}; start the run anew")
    if flags["ema"]:
        try:
            averaged = model_from_state_dict(saved["ema_state_dict"]).state_dict()
            fits = [(k, v.shape) for k, v in averaged.items()] == [(k, v.shape) for k, v in model.state_dict().items()]
        except Exception:  # which one, depends on where what is wrong shows
            fits = False
        if not fits:
            raise cli.UserError(f"--resume: {path} is damaged: its averaged weights do not fit the others; start the "
                                "run anew")
    return saved, model, flags


def valid_flags(saved, path, names=None):
    """The flags (all, or those in names) that a checkpoint's args hold, each as the command line would take it; one
    that came later has its default. Raises UserError."""
    flags = {}
    for action in build_parser()._actions:
        name = action.dest
        if name == "help" or (names is not None and name not in names):
            continue
        value, kind = saved.get(name, action.default), action.type or str
        try:
            if value is not action.default and action.nargs != "?":
                if action.nargs == 0:
                    valid = isinstance(value, bool)
                else:
                    valid = kind(str(value)) == (Path(value) if kind is Path else value)
                if not valid or (action.choices and value not in action.choices):
                    raise ValueError
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            raise cli.UserError(f"{path} is damaged or no checkpoint of this script: its args hold no valid "
                                f"{name}") from None
        flags[name] = value
    return flags


def check_optimizer_state(saved, optimizer, path):
    """Raise UserError unless a checkpoint's optimiser state is empty at step 0 or fits every parameter."""
    state = saved["optimizer_state_dict"].get("state")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fits = isinstance(state, dict) and (state.keys() == set(range(len(parameters))) or saved["step"] == len(state) == 0)
    for i, parameter in enumerate(parameters if fits and state else []):
        entry = state[i] if isinstance(state[i], dict) else {}
        shapes = {"step": torch.Size([]), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        fits = fits and entry.keys() == shapes.keys() and all(
            isinstance(t, torch.Tensor) and t.layout == torch.strided and t.shape == shapes[name]
            and t.is_floating_point() and t.is_contiguous() and bool(t.isfinite().all()) for name, t in entry.items())
    if not fits:
        raise cli.UserError(f"--resume: {path} is damaged: its optimiser state does not fit its weights; start the run "
                            "anew")


def flags_for_resume(args, saved):
    """The saved run's flags, with what --resume may change taken from the command line.

    Raises UserError when a flag given now contradicts the run.
    """
    flags = dict(saved)
    for name, value in vars(args).items():
        if name == "given":
            continue
        if name in FREE_ON_RESUME and (name in args.given or name not in saved or name in ("resume", "checkpoint")):
            flags[name] = value
        elif name in args.given and name not in FREE_ON_RESUME and name in saved and value != saved[name]:
            raise cli.UserError(f"--resume: the run was started with --{name.replace('_', '-')} {saved[name]}, not "
                                f"{value}; leave the flag out, or start another run")
    for name in ("data_dir", "log_dir"):
        flags[name] = Path(flags[name]) if isinstance(flags.get(name), str) else flags.get(name)
    return argparse.Namespace(**flags, given=args.given)


# ---------------------------------------------------------------------------------------------------------------
# Floor and figures


def floors(series, starts, seq_len, horizons):
    """The exact filter's MSE a horizon on the same windows, {k: mse}, after a line that says what it is.

    Empty, after the reason, when the process isn't known (drifting data, no config.json).
    """
    from optimal_filter import process_or_none, window_mse

    process = process_or_none(series, "no optimal floor")
    if process is None:
        return {}
    mse = window_mse(process, series, starts, seq_len, horizons)
    print("optimal filter on the validation windows: " + ", ".join(
        f"MSE {value:.4f} at horizon {k}" for k, value in mse.items()))
    return mse


def excess_percent(mse, floor):
    """How far an MSE is above the optimal one, in percent."""
    return None if floor is None else 100 * (mse / floor - 1)


def draw_loss(path, rows, horizons, title):
    """Training and validation MSE a horizon against the epoch, and the excess over the optimal filter."""
    has_floor = rows[-1].get(f"floor_mse_{horizons[0]}") is not None
    fig, axes = figures.new_figure(1, 2 if has_floor else 1, (5.5, 4), title)
    colors = figures.circle_colors(max(len(horizons), 2))
    epochs = [row["epoch"] for row in rows]
    for k, color in zip(horizons, colors, strict=False):
        name = f"horizon {k}, " if len(horizons) > 1 else ""
        ax = axes[0, 0]
        ax.plot(epochs, [row[f"train_mse_{k}"] for row in rows], color=color, alpha=0.4, label=f"{name}training")
        ax.plot(epochs, [row[f"val_mse_{k}"] for row in rows], color=color, label=f"{name}validation")
        if has_floor:
            ax.axhline(rows[-1][f"floor_mse_{k}"], color=color, linestyle=":", label=f"{name}optimal filter")
            excess = [row[f"excess_percent_{k}"] for row in rows]
            label = f"{name}best {min(excess):.2f} %, {excess[-1]:.2f} % at the end"
            axes[0, 1].plot(epochs, excess, color=color, label=label)
    axes[0, 0].set(xlabel="epoch", ylabel="mean squared error (data units²)", yscale="log", title="Loss")
    axes[0, 0].legend(fontsize=7 if len(horizons) > 2 else 9)
    if has_floor:
        axes[0, 1].set(xlabel="epoch", ylabel="validation MSE over the filter's − 1 (%)", yscale="log",
                       title="Excess over the optimal filter")
        axes[0, 1].legend(fontsize=7 if len(horizons) > 2 else 9)
    for ax in axes.ravel():
        ax.xaxis.get_major_locator().set_params(integer=True)
        low, high = ax.get_ylim()
        figures.log_ticks(ax.yaxis, (1, 2, 5) if high > 10 * low else (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8))
        if len(rows) == 1:
            for line in ax.get_lines():
                line.set_marker("o")
    figures.save(fig, path)


def draw_prediction(path, window, prediction, states, n_circles, start, title):
    """One validation window: circles, data, next-step prediction, error, each (time, feature_dim) for the same time
    steps from `start` on."""
    fig, axes = figures.new_figure(4, 1, (9, 1.9), title, sharex=True,
                                   gridspec_kw={"height_ratios": [0.25, 1, 1, 1]})
    figures.state_strip(axes[0, 0], states, n_circles, start)
    high = float(np.percentile(np.abs(window), 99))
    for ax, values, name in ((axes[1, 0], window, "data"), (axes[2, 0], prediction, "predicted"),
                             (axes[3, 0], prediction - window, "error")):
        figures.heatmap_panel(fig, ax, values, start, f"{name}\nfeature", cmap="RdBu_r", limits=(-high, high),
                              unit="data units")
    axes[3, 0].set_xlabel("time step")
    present = sorted(set(states.tolist()))
    figures.circle_legend(fig, n_circles, present)
    figures.save(fig, path)


@torch.no_grad()
def predict_windows(model, x):
    """Next-step predictions of the windows x as numpy, aligned with what they predict: row t - 1 predicts x[:, t]."""
    return model(x)["1"][:, :-1].float().cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------
# The run


class Stop:
    """Remembers a Ctrl-C or a SIGTERM until the step in flight is done."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.remember)

    def remember(self, number, frame):
        if self.signal is not None:
            raise KeyboardInterrupt  # the second Ctrl-C doesn't wait for the step
        self.signal = number


def join_processes(device_name):
    """(rank, world, device): under torchrun one of several processes, otherwise (0, 1, --device)."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1, cli.pick_device(device_name)
    local, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    try:
        if missing:
            raise cli.UserError(f"WORLD_SIZE is set but {', '.join(missing)} not; start several processes by torchrun")
        device = cli.pick_device(device_name)
        if device.type == "cuda":
            if here > torch.cuda.device_count():
                raise cli.UserError(f"{here} processes on a machine with {torch.cuda.device_count()} GPUs; start one "
                                    f"a GPU: torchrun --nproc-per-node={torch.cuda.device_count()}")
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
    except cli.UserError:
        if local > 0:
            sys.exit(cli.EXIT_BAD_INPUT)  # the machine's first process says it
        raise
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PROCESS_TIMEOUT)
    return distributed.get_rank(), distributed.get_world_size(), device


@contextlib.contextmanager
def together(rank, world, bar=None):
    """A UserError in this block, on whichever process, ends them all, and rank 0 says it below the progress bar.

    Otherwise the others would wait for ever in their next collective for one that has left. So all processes enter
    the block, and nothing in it waits for another process after something that may fail.
    """
    error = None
    try:
        yield
    except cli.UserError as raised:
        error = raised
        if bar is not None:
            bar.close()
    if world > 1:
        lines = [None] * world
        distributed.all_gather_object(lines, error and str(error))
        failed = [r for r in range(world) if lines[r] is not None]
        if failed and rank > 0:
            sys.exit(cli.EXIT_BAD_INPUT)
        if failed and failed[0] > 0:
            error = cli.UserError(f"process {failed[0]} of 0…{world - 1}: {lines[failed[0]]}")
    if error is not None:
        raise error


def sum_totals(totals, world):
    """Sum the totals of make_step over the processes; of the counts of good steps the smallest is what all had."""
    if world > 1:
        good = totals[-1:].clone()
        distributed.all_reduce(totals)
        distributed.all_reduce(good, distributed.ReduceOp.MIN)
        totals[-1:] = good


def build_model(args, feature_dim):
    torch.manual_seed(args.seed)  # the same initial weights on every device: they are drawn on the CPU
    return CausalTimeSeriesMamba(feature_dim, args.d_model, args.n_layers, args.d_state, args.d_conv, args.expand,
                                 args.d_ff, args.dropout, args.max_horizon)


def build_optimizer(groups, lr, device):
    """AdamW in one fused kernel; on CUDA with its step count and learning rates on the device, for the graph."""
    cuda = device.type == "cuda"
    for group in groups:
        group["lr"] = torch.tensor(group["lr"], device=device) if cuda else group["lr"]
    return torch.optim.AdamW(groups, lr=torch.tensor(lr, device=device) if cuda else lr, fused=True, capturable=cuda)


def snapshot(state, into=None):
    """A copy of a (nested) state dict that later steps don't change; into `into`, an earlier copy, if there is one: so
    all tensors are copied by a few kernels, where one each would keep a GPU waiting for milliseconds."""
    old, new = [], []

    def copied(value, kept):
        if isinstance(value, torch.Tensor) and kept is not None:
            old.append(kept)
            new.append(value.detach())
            return kept
        if isinstance(value, torch.Tensor):
            return value.detach().clone()
        if isinstance(value, dict):
            return {key: copied(item, None if kept is None else kept[key]) for key, item in value.items()}
        if isinstance(value, list):
            return [copied(item, None if kept is None else kept[i]) for i, item in enumerate(value)]
        return value

    result = copied(state, into)
    if old:
        torch._foreach_copy_(old, new)
    return result


def print_evaluation(args):
    """--eval: the record of a checkpoint's run and its validation loss on the data of --data-dir."""
    path = args.checkpoint if args.eval is True else args.eval
    device = cli.pick_device(args.device)
    checkpoint, (model, saved) = read_checkpoint(path), load_checkpoint(path, device)
    model.use_scan(args.scan, device)
    series = dataset.load_series(args.data_dir)
    dataset.check_fits_model(series, model, path)
    print_record(run_files(path)["record"])
    names = ("seq_len", "stride", "val_fraction", "batch_size")
    size = {name: getattr(args, name) if name in args.given else value
            for name, value in valid_flags(saved, path, names).items()}
    _, val_starts, _ = dataset.split_windows(series.n_steps, size["seq_len"], size["stride"], size["val_fraction"])
    if size["seq_len"] <= model.horizons[-1]:
        raise cli.UserError(f"--seq-len {size['seq_len']} must be longer than the largest horizon, "
                            f"{model.horizons[-1]}")

    def fetch(starts):
        return dataset.gather(series.X, starts, size["seq_len"]).to(device)

    mse = evaluate(model, fetch, torch.from_numpy(val_starts), size["batch_size"], not args.no_amp).tolist()
    floor = floors(series, val_starts, size["seq_len"], model.horizons)
    print(f"{path}: epoch {checkpoint.get('epoch')}, {sum(p.numel() for p in model.parameters()):,} parameters")
    rows = [[k, f"{m:.4f}", f"{floor[k]:.4f}" if floor else "–",
             f"{excess_percent(m, floor[k]):.2f} %" if floor else "–"]
            for k, m in zip(model.horizons, mse, strict=True)]
    print(cli.table(["horizon", "validation MSE", "optimal", "excess"], rows))


def main(args):
    if args.eval is not None:
        if os.environ.get("RANK", "0") == "0":
            print_evaluation(args)
        return
    stop = Stop()
    rank, world, device = join_processes(args.device)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - rank 0 alone speaks
    try:
        train(args, stop, rank, world, device)
    except RuntimeError as error:
        if world == 1 or not (isinstance(error, distributed.DistError) or "gloo" in str(error)):
            raise
        raise cli.UserError(f"process {rank} of 0…{world - 1} lost the others: one of them has ended") from None
    except (cli.UserError, SystemExit):  # on all processes alike
        leave_processes()
        raise
    leave_processes()


def train(args, stop, rank, world, device):
    files, saved = run_files(args.checkpoint), None
    with together(rank, world):
        if args.log_dir is not None:
            summary_writer_class()
        if args.resume:
            saved, restored, saved_flags = read_last(files["last"])
            args = flags_for_resume(args, saved_flags)
        elif rank == 0:
            refuse_taken(files)
        if rank == 0:
            cli.output_folder(args.checkpoint.parent)
        flags = {key: value for key, value in vars(args).items() if key != "given"}

        # Data
        series = dataset.load_series(args.data_dir)
        fingerprint = dataset.crc32(series.X)
        if saved is not None and saved["data_crc32"] != fingerprint:
            raise cli.UserError(f"--resume: {args.data_dir} is not the data that {files['last']} was trained on; "
                                "give the right --data-dir")
        train_starts, val_starts, boundary = dataset.split_windows(
            series.n_steps, args.seq_len, args.stride, args.val_fraction)
        resident = dataset.fits_on(device, series.X)
        X = dataset.to_device(series.X, device) if resident else series.X
        home = device if resident else torch.device("cpu")  # where windows are cut out of X
        if args.num_workers and resident:
            print(f"--num-workers {args.num_workers} is not used: the series fits on {device}")
        if args.seq_len <= args.max_horizon:
            raise cli.UserError(f"--seq-len {args.seq_len} must be longer than the largest horizon, {args.max_horizon}")
        steps_an_epoch, batch = epoch_batches(train_starts, boundary, args, 0).shape
        if batch < world:
            raise cli.UserError(f"more processes ({world}) than windows in a step ({batch}); start fewer, or use a "
                                "larger --batch-size or more data")

        # Model and optimiser
        model = build_model(args, series.feature_dim).to(device).use_scan(args.scan, device)
        averaged = copy.deepcopy(model).requires_grad_(False).eval() if args.ema else model
        optimizer = build_optimizer(
            parameter_groups(model, args.lr, args.gate_lr_factor, args.freeze_A), args.lr, device)
        totals = torch.zeros(2 + len(model.horizons), device=device)
        if saved is not None:
            check_optimizer_state(saved, optimizer, files["last"])
            if saved["totals"].shape != totals.shape or not 0 <= saved["epoch"] == saved["step"] // steps_an_epoch:
                raise cli.UserError(f"--resume: {files['last']} is damaged: its step, epoch and totals do not fit; "
                                    "start the run anew")
            model.load_state_dict(restored.state_dict())
            if args.ema:
                averaged.load_state_dict(saved["ema_state_dict"])
            optimizer.load_state_dict({"state": saved["optimizer_state_dict"]["state"],
                                       "param_groups": optimizer.state_dict()["param_groups"]})

    def fetch(starts):
        return dataset.gather(X, starts, args.seq_len).to(device)

    horizons = horizons_up_to(args.max_horizon)
    use_compile = device.type == "cuda" and not args.no_compile
    runner = torch.compile(model) if use_compile else model
    if world > 1:
        runner = torch.nn.parallel.DistributedDataParallel(
            runner, device_ids=[device] if device.type == "cuda" else None)
    part = torch.arange(batch).tensor_split(world)[rank]  # this process's windows of each step
    weight = torch.zeros((), device=device)  # a number on the device, like the learning rate: the graph reads it
    step = make_step(runner, make_loss(args), optimizer, totals, len(part) / batch, world,
                     make_averaging(averaged, model, weight) if args.ema else None)

    total_steps, warmup_steps = args.epochs * steps_an_epoch, round(args.warmup_epochs * steps_an_epoch)
    val_on_device = torch.from_numpy(val_starts).to(home)
    train_on_device = torch.from_numpy(train_starts).to(home)
    print(f"{args.checkpoint}: {sum(p.numel() for p in model.parameters()):,} parameters on {device}"
          + (f", {world} processes" if world > 1 else ""))
    print(f"{len(train_starts)} training windows in {steps_an_epoch} steps of {batch}, {len(val_starts)} validation "
          f"windows of {args.seq_len} steps from step {boundary} on")
    if warmup_steps > total_steps:
        print(f"--warmup-epochs {args.warmup_epochs:g} is longer than the run: the learning rate rises to "
              f"{lr_at(total_steps - 1, args.lr, warmup_steps, total_steps):.3g}, not to --lr {args.lr:g}")

    def run_step(starts):
        step(fetch(starts))

    def run_evaluation(starts):
        return evaluate(averaged, fetch, starts, args.batch_size, not args.no_amp)

    graphs = device.type == "cuda" and resident and world == 1
    if graphs:
        # One launch a step in place of hundreds: on a GPU a small model is bound by launches, not by arithmetic.
        model.train()
        run_step = captured(run_step, torch.zeros(batch, dtype=torch.int64, device=device), lambda: [
            *model.parameters(), *averaged.parameters(), totals,
            *(t for s in optimizer.state.values() for t in s.values())], device)
        model.eval()
        evaluate_train = captured(run_evaluation, train_on_device, list, device) if not args.no_train_eval else None
        run_evaluation = captured(run_evaluation, val_on_device, list, device)
    else:
        evaluate_train = run_evaluation

    # Where the run stands
    global_step, best_loss, best, kept, val_loss, train_loss = 0, math.inf, None, None, None, None
    columns, rows = log_columns(horizons, not args.no_train_eval), []
    if saved is not None:
        global_step, best_loss = saved["step"], saved["best_loss"]
        val_loss, train_loss = saved["val_loss"], saved["train_loss"]
        totals.copy_(saved["totals"])
        if rank > 0:
            totals[:-1] = 0  # they are summed over the processes
        rows = read_log(files["log"], columns, saved["epoch"])
        print(f"resumed at epoch {saved['epoch']}, step {global_step}")

    def save_best():
        if best is not None and rank == 0:
            save_checkpoint(files["best"], args=flags, **best)

    def save_last():
        if rank == 0:
            save_best()  # first: a last state never remembers a best one that isn't on the disk
            save_checkpoint(files["last"], epoch=global_step // steps_an_epoch, model_state_dict=model.state_dict(),
                            optimizer_state_dict=optimizer.state_dict(), train_loss=train_loss, val_loss=val_loss,
                            args=flags, step=global_step, totals=totals.cpu(), best_loss=best_loss,
                            data_crc32=fingerprint,
                            **({"ema_state_dict": averaged.state_dict()} if args.ema else {}))

    def check_finite(epoch, good, finite):
        """Raise UserError when fewer than all steps of this epoch had a finite loss, `good` of them, or when what
        they led to isn't `finite`."""
        if finite and good == global_step - epoch * steps_an_epoch:
            return
        save_best()
        bad = min(epoch * steps_an_epoch + round(good), global_step - 1)
        kept, at = (files["best"], "the lowest validation loss") if files["best"].exists() else (
            files["last"], f"the state {'at the start' if last_good == 0 else f'after step {last_good}'}")
        raise cli.UserError(f"the loss became NaN or infinite at step {bad + 1} (epoch {epoch + 1}, learning rate "
                            f"{lr_at(bad, args.lr, warmup_steps, total_steps):.3g}); the last good checkpoint is "
                            f"{kept} ({at}); start anew with a smaller --lr")

    floor, writer = {}, None
    with together(rank, world):
        if rank == 0:
            floor = floors(series, val_starts, args.seq_len, horizons)
            if args.log_dir is not None:
                writer = tensorboard_writer(args.log_dir, stem(args.checkpoint), global_step // steps_an_epoch)
            if saved is None:
                save_last()  # the run's first file: from here on the name is taken, and --resume works
            start_log(files["log"], columns, rows)
            write_record(files["record"], run_record(args, device, model, world), global_step if args.resume else None)
    last_good = global_step
    bar = tqdm(total=total_steps, initial=global_step, unit="step", disable=rank > 0 or not sys.stderr.isatty(),
               mininterval=0.5, dynamic_ncols=True)
    last_save = last_print = started = time.perf_counter()
    seconds_before = rows[-1]["seconds"] if rows else 0.0

    # The loop
    for epoch in range(global_step // steps_an_epoch, args.epochs):
        batches = epoch_batches(train_starts, boundary, args, epoch)
        mine = batches[:, part].to(home)
        first = global_step - epoch * steps_an_epoch
        loader = None if resident else dataset.host_batches(
            series.X, mine[first:].tolist(), args.seq_len, device, args.num_workers)
        model.train()
        for i in range(first, steps_an_epoch):
            lr = lr_at(global_step, args.lr, warmup_steps, total_steps)
            set_lr(optimizer, lr)
            if args.ema:
                weight.fill_(averaging_weight(global_step, args.ema))
            x = next(loader) if loader is not None else None
            # Every step has its own seed: a run resumed in mid-epoch draws the same dropout. (A loader draws a seed
            # for its processes when it starts: so after it.)
            torch.manual_seed(((args.seed * 1_000_003 + global_step) * 1_009 + rank) % 2**63)
            if loader is None:
                run_step(mine[i])
            else:
                step(x)
            global_step += 1
            bar.update()
            if i + 1 < steps_an_epoch and should_stop(stop, world, device, i + 1):
                break
        with together(rank, world, bar):
            if global_step == (epoch + 1) * steps_an_epoch:
                model.eval()
                sum_totals(totals, world)
                val = run_evaluation(val_on_device) if rank == 0 else torch.zeros(len(horizons), device=device)
                train_eval = evaluate_train(train_on_device).mean() if rank == 0 and not args.no_train_eval else val[0]
                numbers = torch.cat([totals, val, train_eval[None]])
                if world > 1:
                    distributed.broadcast(numbers, 0)
                numbers = numbers.tolist()  # the epoch's only wait for the device
                train_loss, *train_mse = (total / steps_an_epoch for total in numbers[:1 + len(horizons)])
                good, *val_mse, train_eval = numbers[1 + len(horizons):]
                val_loss = sum(val_mse) / len(val_mse)
                check_finite(epoch, good, math.isfinite(val_loss))
                totals.zero_()
                row = {"epoch": epoch + 1, "step": global_step, "lr": lr,
                       "seconds": round(seconds_before + time.perf_counter() - started, 3),
                       "train_loss": train_loss, "val_loss": val_loss, "train_eval_mse": train_eval}
                for h, k in enumerate(horizons):
                    row |= {f"train_mse_{k}": train_mse[h], f"val_mse_{k}": val_mse[h], f"floor_mse_{k}": floor.get(k),
                            f"excess_percent_{k}": excess_percent(val_mse[h], floor.get(k))}
                rows.append(row)
                if rank == 0:
                    append_row(files["log"], columns, row)
                if val_loss < best_loss:
                    best_loss = val_loss
                    kept = snapshot({"model_state_dict": averaged.state_dict(),
                                     "optimizer_state_dict": optimizer.state_dict()}, kept)
                    best = {"epoch": epoch + 1, "train_loss": train_loss, "val_loss": val_loss, **kept}
                if writer is not None:
                    for name in columns[2:]:
                        if row.get(name) is not None:
                            writer.add_scalar(name, row[name], epoch + 1)
                    writer.flush()
                line = progress_line(row, args.epochs, horizons)
                bar.set_postfix_str(line)
                if bar.disable and (epoch + 1 == args.epochs or epoch == 0 or time.perf_counter() - last_print > 10):
                    print(line, flush=True)
                    last_print = time.perf_counter()
        stopping = should_stop(stop, world, device)
        with together(rank, world, bar):
            if stopping and global_step < (epoch + 1) * steps_an_epoch:
                sum_totals(totals, world)
                # What is saved must be worth resuming.
                check_finite(epoch, totals[-1].item(), all(p.isfinite().all() for p in model.parameters()))
            if stopping or time.perf_counter() - last_save > SAVE_EVERY_SECONDS:
                save_last()
                best, last_save, last_good = None, time.perf_counter(), global_step
        if stopping:
            bar.close()
            print(f"stopped after step {global_step} of {total_steps}; {files['last']} is saved, go on with --resume")
            sys.exit(cli.EXIT_INTERRUPTED)
    bar.close()
    with together(rank, world):
        save_last()
        if rank == 0:
            finish(args, files, rows, horizons, series, fetch, val_starts, device, writer)


def progress_line(row, epochs, horizons):
    """One line on an epoch: losses, and how far each horizon is above the optimal filter."""
    excess = [row[f"excess_percent_{k}"] for k in horizons]
    above = "" if excess[0] is None else f", {', '.join(f'{e:.2f}' for e in excess)} % above optimal"
    return (f"epoch {row['epoch']}/{epochs}: training {row['train_loss']:.4f}, validation {row['val_loss']:.4f}{above}")


def append_row(path, columns, row):
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(log_row(columns, row))
    except OSError as error:
        raise cli.UserError(f"can't write {path}: {error.strerror}; free some space and go on with --resume") from None


def should_stop(stop, world, device, step=0):
    """Whether any process was asked to stop; all of them must agree, or the others would wait for ever. Within an
    epoch several GPUs ask each other only now and then."""
    if world == 1:
        return stop.signal is not None
    if device.type == "cuda" and step % STOP_CHECK_STEPS:
        return False
    flag = torch.tensor(float(stop.signal is not None), device=device)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return flag.item() > 0


def leave_processes():
    if distributed.is_initialized():
        distributed.destroy_process_group()


def summary_writer_class():
    """TensorBoard's writer. Raises UserError when tensorboard isn't installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise cli.UserError("--log-dir needs tensorboard; install it with: pip install tensorboard") from None
    return SummaryWriter


def tensorboard_writer(log_dir, name, epoch):
    """A writer to log_dir/name; of an earlier writer's epochs those after `epoch` are no longer shown."""
    folder = cli.output_folder(log_dir / name)
    return summary_writer_class()(str(folder), purge_step=epoch + 1)


def add_figures(writer, files, step):
    """The figures that were written to files, as TensorBoard images."""
    import matplotlib.image

    for role, path in files.items():
        if path.suffix == ".png":
            writer.add_image(role, matplotlib.image.imread(path)[:, :, :3], step, dataformats="HWC")


def finish(args, files, rows, horizons, series, fetch, val_starts, device, writer):
    """The figures, from the best weights."""
    name = stem(args.checkpoint)
    if not rows:
        raise cli.UserError(f"{files['log']} is lost or damaged, and the run has no epoch left to train: its curve "
                            f"can't be drawn; {files['best']} is unharmed")
    draw_loss(files["loss"], rows, horizons, name)
    model, _ = load_checkpoint(files["best"], device)
    model.use_scan(args.scan, device)
    picks = val_starts[np.linspace(0, len(val_starts) - 1, 3).round().astype(int)]
    x = fetch(torch.from_numpy(picks).to(device))
    predictions, x = predict_windows(model, x), x.cpu().numpy()
    shown = min(args.seq_len - 1, 512)
    for i, first in enumerate(picks.tolist()):
        end = first + args.seq_len
        draw_prediction(files[f"prediction_{i}"], x[i, -shown:], predictions[i, -shown:],
                        series.states[end - shown:end], series.n_circles, end - shown,
                        f"{name}: next-step prediction, validation window {i}")
    if writer is not None:
        add_figures(writer, files, rows[-1]["epoch"])
        writer.close()
    best = min(rows, key=lambda row: row["val_loss"])
    print(f"best: {progress_line(best, args.epochs, horizons)}")
    print(f"wrote {files['best']}, {files['last']}, {files['log']}, {files['record']}")


def run(args):
    """cli.run of main. One of several processes then ends at once: the threads that torch talks to the others with may
    still run, and the interpreter's tear-down would abort on them, with words of its own on stderr."""
    code = None
    try:
        cli.run(main, args)
    except SystemExit as end:
        code = end.code
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


if __name__ == "__main__":
    run(ARGS)
