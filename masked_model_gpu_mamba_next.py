"""Train a causal Mamba to predict the next time steps, with the ablations: constant signals, random or slow gates,
frozen A, several horizons, auxiliary losses, augmentation.

Reads DATA_DIR/data.npz and config.json, or your own --data. A run named NAME.pt writes, beside it: NAME.pt (the weights
with the lowest validation loss), NAME_last.pt (the last state, for --resume), NAME_log.csv (one row per epoch),
NAME_run.json (command, versions, device), NAME_loss.png and NAME_prediction_{0,1,2}.png. A name that is taken is
refused. Ctrl-C saves the state and ends. Under torchrun the processes share the windows of each step. (The script's
name was given from outside and is kept for those who use it: nothing is masked, and no GPU is needed.)

Examples:
  python masked_model_gpu_mamba_next.py --d-state 32 --seq-len 1024 --stride 256 --no-compile --no-train-eval
  python masked_model_gpu_mamba_next.py --constant delta,B,C --checkpoint model_next_lti.pt
"""

import cli  # first: from here on Ctrl-C ends the script without a traceback

# isort: split
import argparse
import copy
import math
import operator
import os
import sys
from pathlib import Path
from typing import NamedTuple

from ranks import is_first, joined, parse_command_line, run, unwrapped


def build_parser():
    parser = cli.parser(__doc__)
    data = parser.add_argument_group("data")
    cli.add_data_dir(data)
    data.add_argument("--seq-len", type=cli.positive_int, default=cli.WINDOW_DEFAULTS["seq_len"], metavar="N",
                      help="steps per window")
    data.add_argument("--stride", type=cli.positive_int, default=cli.WINDOW_DEFAULTS["stride"], metavar="N",
                      help="steps between window starts; training starts are jittered by up to one stride")
    data.add_argument("--val-fraction", type=cli.fraction, default=cli.WINDOW_DEFAULTS["val_fraction"], metavar="F",
                      help="share of the series, at its end, that is validation")
    cli.add_test_steps(data)
    data.add_argument("--fresh", action="store_true",
                      help="train each epoch on a newly drawn series of the same process and length")
    data.add_argument("--normalise", action="store_true", help="train on features of mean 0 and std 1 over the "
                      "training part (with --mixture: one std for all); errors and predictions stay in data units")
    data.add_argument("--relative", action="store_true", help="show the model each window relative to its first step, "
                      "for series that wander away")
    data.add_argument("--num-workers", type=cli.non_negative_int, default=0, metavar="N",
                      help="loader processes for a series that is read from its file or does not fit on the device")
    model = parser.add_argument_group("model")
    model.add_argument("--d-model", type=cli.positive_int, default=128, metavar="N", help="width of the model")
    model.add_argument("--n-layers", type=cli.positive_int, default=7, metavar="N", help="Mamba layers")
    model.add_argument("--d-state", type=cli.positive_int, default=32, metavar="N", help="SSM states per channel")
    model.add_argument("--d-conv", type=cli.positive_int, default=4, metavar="N", help="taps of the causal conv")
    model.add_argument("--expand", type=cli.positive_int, default=2, metavar="N", help="d_inner / d_model")
    model.add_argument("--d-ff", type=cli.positive_int, default=512, metavar="N", help="hidden width of a head")
    model.add_argument("--dropout", type=cli.probability, default=0.1, metavar="P", help="dropout probability")
    ablation = parser.add_argument_group("ablations and losses")
    ablation.add_argument("--mixture", type=cli.non_negative_int, default=0, metavar="K",
                          help="predict K Gaussians, trained by likelihood; 0: a point, trained by squared error")
    ablation.add_argument("--max-horizon", type=cli.positive_int, default=1, metavar="K",
                          help="predict 1, 2, 4, … up to K steps ahead, equal weights")
    ablation.add_argument("--gate-lr-factor", type=cli.non_negative_float, default=1.0, metavar="F",
                          help="learning rate of the gates (x_proj, dt_proj) relative to the rest; with 0 they stay "
                          "random, and delta, B and C follow the input all the same")
    ablation.add_argument("--constant", type=cli.signals, metavar="delta,B,C,z", help="signals that are learned "
                          "constants; with delta,B,C each block's SSM is a convolution (default: none)")
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
                          help="std of noise on the training input, not on its target; data units, or --normalise's")
    ablation.add_argument("--aug-rotate", action="store_true", help="rotate each training window at random")
    ablation.add_argument("--aug-rotate-eps", type=cli.positive_float, default=0.1, metavar="RAD",
                          help="size of that rotation: std of each plane's angle, radians")
    ablation.add_argument("--aug-scale", type=cli.non_negative_float, default=0.0, metavar="S",
                          help="scale each training window by exp(N(0, S²))")
    training = parser.add_argument_group("training")
    training.add_argument("--batch-size", type=cli.positive_int, default=128, metavar="N",
                          help="at most so many windows per step; an epoch is cut into equal steps")
    training.add_argument("--lr", type=cli.positive_float, default=1e-3, metavar="LR", help="peak learning rate")
    training.add_argument("--muon", action="store_true", help="update hidden weight matrices by Muon, not AdamW")
    training.add_argument("--warmup-epochs", type=cli.non_negative_float, default=10, metavar="N",
                          help="epochs of linear warm-up, before a cosine down to 0")
    training.add_argument("--epochs", type=cli.positive_int, default=500, metavar="N",
                          help="passes over the training windows")
    training.add_argument("--ema", type=cli.probability, default=0.0, metavar="DECAY",
                          help="evaluate and save a moving average of the weights, over about 1 / (1 - DECAY) steps")
    training.add_argument("--no-compile", action="store_true", help="do not use torch.compile (used on CUDA only)")
    training.add_argument("--no-amp", action="store_true", help="float32 on CUDA, not bfloat16 by autocast")
    training.add_argument("--no-train-eval", action="store_true",
                          help="do not evaluate the training windows after each epoch (log column train_eval_mse)")
    cli.add_computing(parser)
    cli.add_drawing(parser)
    files = parser.add_argument_group("files")
    files.add_argument("--checkpoint", type=Path, metavar="NAME.pt",
                       help="names the run (default: model_next.pt, with each flag in the name that isn't the default)")
    files.add_argument("--resume", action="store_true", help="go on from NAME_last.pt, with that run's flags")
    files.add_argument("--eval", nargs="*", type=Path, metavar="NAME.pt",
                       help="only print the record of this checkpoint, its validation loss and its errors on the test "
                            "series, on the data that it was trained on or --data-dir's; compare several, seed by "
                            "seed (default: --checkpoint's)")
    files.add_argument("--log-dir", type=Path, metavar="DIR",
                       help="also write scalars and figures for TensorBoard here (default: not written)")
    return parser


def parse_args(argv=None, refuse=None):
    """The flags as a Namespace; `flags_given` lists those that stand on the command line. A bad one ends the program,
    unless refuse(message) is given, which must raise."""
    parser = build_parser()
    parser.error = refuse or parser.error
    args = parser.parse_args(argv)
    if args.seq_len <= args.max_horizon:
        parser.error(f"--seq-len {args.seq_len} must be longer than the largest horizon, {args.max_horizon}")
    # argparse sets a default only where the Namespace has no value: what is not `unset` in the end was given.
    unset = object()
    marked = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    args.flags_given = sorted(name for name, value in vars(marked).items() if value is not unset)
    args.checkpoint = args.checkpoint or Path(default_name(parser, args))
    if args.checkpoint.suffix != ".pt":
        parser.error(f"--checkpoint {args.checkpoint} must end in .pt")
    if args.checkpoint.stem.endswith("_last"):
        parser.error("--checkpoint NAME_last.pt is the name of run NAME's last state; choose another")
    return args


def default_name(parser, args):
    """model_next.pt, with every flag that isn't the default, as in model_next_max_horizon64_seed2.pt: so two runs
    started side by side never meet in one file.

    --resume and --eval take other --epochs, windows or data than the run had: where no run has the name with these, it
    is the name without them.
    """
    name, plain = (cli.short_name("_".join(["model_next", *cli.flags_in_name(parser, args, without)])) + ".pt"
                   for without in ((), ("data_dir", "seq_len", "stride", "val_fraction", "test_steps", "batch_size",
                                        "epochs")))
    return plain if (args.resume or args.eval is not None) and not Path(name).exists() else name


if __name__ == "__main__":
    ARGS = parse_command_line(parse_args)  # before the slow imports: --help and a bad flag answer at once

import torch
import torch.nn.functional as F

import dataset
import figures
import mixture_head
import run_files
import terminal
import unseen
from kernels.cuda_graph import captured
from kernels.selective_scan import check_bfloat16
from mamba_model import (
    CausalTimeSeriesMamba,
    at_least_float32,
    autocast,
    horizon_errors,
    model_from_state_dict,
    open_model,
    reason,
    stem,
    validation_errors,
)
from muon import Muon, state_shapes

WEIGHT_DECAY = 0.01
GRAD_CLIP = 1.0
HIDDEN = ("in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight", ".0.weight")  # matrices for Muon
CONTRASTIVE_ANCHORS = 1024  # per layer and step: enough for a steady InfoNCE, few enough to cost nothing
SAVE_EVERY_SECONDS = 20  # between two saves of the last and the best state; also saved at every kind of end


# ---- Losses ---------------------------------------------------------------------------------------------------

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
        batch, n_steps, _ = h.shape
        n = min(CONTRASTIVE_ANCHORS, batch * (n_steps - 1))
        rows = torch.randint(batch, (n,), device=h.device)
        steps = torch.randint(n_steps - 1, (n,), device=h.device)
        # As a look-up in a table: with indices that repeat, its gradient is summed in a fixed order, that of indexing
        # by whichever thread comes first.
        flat = h.reshape(batch * n_steps, -1)
        anchors, positives = (F.embedding(rows * n_steps + steps + i, flat) for i in (0, 1))
        drawn = torch.randint(batch * n_steps, (n, n_negatives), device=h.device)
        negatives = F.embedding(drawn, flat)
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


def make_loss(args):
    """The training loss: a function of (model, windows) that gives (loss, `horizon_errors` as one row).

    What a model is trained by is the last of its measures: the likelihood of a mixture, the squared error of a point.
    """
    needs_layers = args.slowness_lambda > 0 or args.contrastive_lambda > 0

    def loss_of(model, x):
        inputs, target = augment(x, args.aug_noise, args.aug_rotate_eps if args.aug_rotate else None, args.aug_scale)
        with autocast(x.device, not args.no_amp):
            outputs = model(inputs, raw=True, with_layers=needs_layers)
        outputs, layers = outputs if needs_layers else (outputs, None)
        errors = horizon_errors(unwrapped(model), outputs, target)
        loss = errors[-1].mean()
        if args.slowness_lambda:
            loss = loss + args.slowness_lambda * slowness_loss(layers)
        if args.contrastive_lambda:
            loss = loss + args.contrastive_lambda * contrastive_loss(
                layers, args.contrastive_temp, args.contrastive_negatives)
        return loss, errors.detach().flatten()

    return loss_of


# ---- What learns, and how fast --------------------------------------------------------------------------------

def build_model(args, feature_dim, X=None):
    """A new model; X (n_steps, feature_dim): training steps from whose mean and scale a mixture's components start.

    Those of a relative model start from the differences over half a window.
    """
    torch.manual_seed(args.seed)  # the same initial weights on every device: they are drawn on the CPU
    model = CausalTimeSeriesMamba(feature_dim, args.d_model, args.n_layers, args.d_state, args.d_conv, args.expand,
                                  args.d_ff, args.dropout, args.max_horizon, args.mixture,
                                  (args.constant or "").split(","), args.relative)
    if args.mixture and X is not None:
        half = args.seq_len // 2
        mixture_head.start_at_data(model.output_heads.values(), X[half:] - X[:-half] if args.relative else X)
    return model


def parameter_groups(model, lr, gate_lr_factor, freeze_A, muon=False):
    """The optimiser's parameter groups: weights decay, but A_log, D, biases, constants, norms do not. What makes delta,
    B and C (x_proj and dt_proj, or the constants in their place) learns at gate_lr_factor times the rate of the others.
    A frozen parameter gets no gradient and is in no group, so that neither the schedule nor the decay can move it. With
    muon the matrices of the hidden layers are in groups of their own; those of the first and last layer stay AdamW's.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        is_gate = ".x_proj." in name or ".dt_proj." in name or name.endswith((".mamba.B", ".mamba.C"))
        if (is_gate and gate_lr_factor == 0) or (freeze_A and name.endswith(".A_log")):
            parameter.requires_grad_(False)
            continue
        decay = WEIGHT_DECAY if parameter.ndim >= 2 and not name.endswith("A_log") else 0.0
        kind = gate_lr_factor if is_gate else 1.0, decay, muon and name.endswith(HIDDEN)
        groups.setdefault(kind, []).append(parameter)
    return [{"params": parameters, "lr": lr * factor, "lr_factor": factor, "weight_decay": decay, "muon": hidden}
            for (factor, decay, hidden), parameters in groups.items()]


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


def build_optimizer(groups, lr, device):
    """AdamW, or Muon if a group asks for it; on CUDA with step counts and rates on the device: a graph reads them."""
    cuda = device.type == "cuda"
    kind = Muon if any(group["muon"] for group in groups) else torch.optim.AdamW
    for group in groups:
        group["lr"] = torch.tensor(group["lr"], device=device) if cuda else group["lr"]
    return kind(groups, lr=torch.tensor(lr, device=device) if cuda else lr, fused=True, capturable=cuda)


def averaging_weight(step, decay):
    """The weight of the newest parameters in their moving average after a step, counted from 0: 1 - decay, but more in
    the first steps, so that the average soon forgets the initial ones (Tarvainen & Valpola 2017, arXiv 1703.01780)."""
    return 1 - min(decay, (1 + step) / (10 + step))


class Plan:
    """The steps of a run: which windows each sees, at what learning rate, and from which seed.

    All follows from the flags and the lengths of the series and its recordings, so that a run which is resumed, or
    spread over several ranks, takes the same steps. held_back: how many steps at the end are left to the test. Raises
    UserError when the series is too short.
    """

    def __init__(self, args, n_steps, recordings=None, held_back=0):
        self.args, self.held_back = args, held_back
        self.train_starts, self.val_starts, self.boundary = dataset.split_windows(
            n_steps, args.seq_len, args.stride, args.val_fraction, recordings, held_back)
        self.ends = self.boundary if recordings is None else dataset.training_ends(recordings, self.boundary)
        self.steps_per_epoch, self.batch_size = self.batches(0).shape
        self.total_steps = args.epochs * self.steps_per_epoch
        self.warmup_steps = round(args.warmup_epochs * self.steps_per_epoch)

    def batches(self, epoch):
        """The window starts of each step of an epoch, (steps_per_epoch, batch_size)."""
        a = self.args
        return dataset.epoch_batches(self.train_starts, self.ends, a.seq_len, a.stride, a.batch_size, a.seed, epoch)

    def lr(self, step, epochs=None):
        """The learning rate of a step, counted from 0; epochs: those of another plan, for comparison."""
        return lr_at(step, self.args.lr, self.warmup_steps, (epochs or self.args.epochs) * self.steps_per_epoch)

    def seed(self, step, rank):
        """Every step has its own seed: a run that is resumed in mid-epoch draws the same dropout and noise."""
        return ((self.args.seed * 1_000_003 + step) * 1_009 + rank) % 2**63

    def print(self):
        print(f"{cli.count(len(self.train_starts), 'training window')} in "
              f"{cli.count(self.steps_per_epoch, 'training step')} of {self.batch_size:,}, "
              f"{cli.count(len(self.val_starts), 'validation window')} of {self.args.seq_len:,} time steps from step "
              f"{self.boundary:,} on")
        if self.held_back:
            print(f"the process isn't known: the last {self.held_back:,} steps are left to the test, for --eval")
        if self.warmup_steps > self.total_steps:
            print(f"--warmup-epochs {self.args.warmup_epochs:g} is longer than the run: the learning rate rises to "
                  f"{self.lr(self.total_steps - 1):.3g}, not to --lr {self.args.lr:g}")


# ---- A step, and an evaluation --------------------------------------------------------------------------------

def make_averaging(averaged, model, weight):
    """A function that moves the weights of `averaged` towards those of `model` by `weight`, a number on the device."""
    averages, newest = list(averaged.parameters()), list(model.parameters())

    @torch.no_grad()
    def average():
        gaps = torch._foreach_sub(newest, averages)
        torch._foreach_mul_(gaps, weight)
        torch._foreach_add_(averages, gaps)

    return average


def make_step(model, loss_of, optimizer, totals, share=1.0, sum_gradients=None, after=None):
    """One optimisation step on windows x, this rank's `share` of the step's windows; then `after()`, if given.

    sum_gradients: a function of the parameters that sums their gradients over the ranks; None with one rank. Adds
    [loss, errors…, 1 if all losses were finite so far] to `totals` on the device: no number goes to the host.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step(x):
        optimizer.zero_grad(set_to_none=True)
        loss, errors = loss_of(model, x)
        # The ranks' gradients are summed: weighted by its share, each window counts the same on all of them.
        (loss * share).backward()
        if sum_gradients is not None:
            sum_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, GRAD_CLIP)
        optimizer.step()
        totals[:-1].add_(torch.cat([loss.detach()[None], errors]) * share)
        # Once a loss isn't finite, the sum never is again: the count stops at the first bad step.
        totals[-1].add_(totals[0].isfinite())
        if after is not None:
            after()

    return step


class Runner(NamedTuple):
    batches: callable
    train_step: callable
    evaluate: callable


def make_runner(args, state, plan, series, windows, ranks):
    """What the device does in a run: eager, compiled, over several ranks, or as CUDA graphs; its user can't tell which.

    batches(epoch, first) yields what train_step takes, from step `first` of the epoch on: window starts where the
    series lies on the device, otherwise the windows, which loader processes cut out. evaluate() gives the validation
    errors, measure by measure and per horizon, and then, unless --no-train-eval, the mean MSE of the training windows,
    in one tensor on the device.
    """
    device = ranks.device
    model = torch.compile(state.model) if device.type == "cuda" and not args.no_compile else state.model
    share = ranks.share(plan.batch_size)
    step_on_windows = make_step(
        model, make_loss(args), state.optimizer, state.totals,
        (share.stop - share.start) / plan.batch_size, ranks.sum_gradients,
        make_averaging(state.averaged, state.model, state.averaging_weight) if args.ema else None)

    def step_on_starts(starts):
        step_on_windows(windows.at(starts))

    def measure(starts):
        return validation_errors(state.averaged, windows, starts, args.batch_size, not args.no_amp)

    fresh = dataset.FreshParts(series, plan.boundary, args.seed, args.epochs) if args.fresh else None

    def batches(epoch, first):
        if fresh is not None:
            windows.put(fresh.part(epoch))
        starts = plan.batches(epoch)[first:, share]
        return starts.to(device) if windows.on_device else windows.loader(starts.tolist(), args.num_workers)

    train_step = step_on_starts if windows.on_device else step_on_windows
    val_starts, train_starts = (torch.from_numpy(starts).to(windows.starts_device)
                                for starts in (plan.val_starts, plan.train_starts))
    measure_val = measure_train = measure
    if device.type == "cuda" and windows.on_device:
        # One launch per step in place of hundreds: a small model on a GPU is bound by launches, not by arithmetic.
        state.model.train()
        train_step = captured(train_step, batches(0, 0)[0], state.tensors, device)
        state.model.eval()
        measure_val = captured(measure, val_starts, list, device)
        measure_train = None if args.no_train_eval else captured(measure, train_starts, list, device)

    def evaluate():
        if not ranks.first:  # rank 0 evaluates, and tells the others
            return torch.zeros(len(state.totals) - 2 + (not args.no_train_eval), device=device)
        errors = measure_val(val_starts).flatten()
        return errors if args.no_train_eval else torch.cat([errors, measure_train(train_starts)[0].mean()[None]])

    return Runner(batches, train_step, evaluate)


# ---- What is saved --------------------------------------------------------------------------------------------

class RunState:
    """Where a run stands: exactly what NAME_last.pt holds. `step` counts the steps taken, `totals` are the sums of
    make_step over the epoch so far, `train_loss` and `val_loss` are those of the last epoch (None in the first).
    `averaged` has the weights that are evaluated and kept: with --ema a moving average, otherwise it is `model` itself.
    """

    def __init__(self, args, model, steps_per_epoch, data_crc32, scaling=None):
        device = next(model.parameters()).device
        self.flags = run_files.flags_to_save(args)
        self.model, self.steps_per_epoch = model, steps_per_epoch
        # Where the run comes from: in both of its checkpoints, so that either is understood wherever it is copied to.
        self.origin = {"data_crc32": data_crc32, "record": None,
                       "data_dir": os.path.relpath(args.data_dir, args.checkpoint.parent),
                       **({} if scaling is None else {"scaling": scaling.tensors()})}
        self.averaged = copy.deepcopy(model).requires_grad_(False).eval() if args.ema else model
        self.optimizer = build_optimizer(
            parameter_groups(model, args.lr, args.gate_lr_factor, args.freeze_A, args.muon), args.lr, device)
        self.totals = torch.zeros(2 + model.n_error_rows * len(model.horizons), device=device)
        self.averaging_weight = torch.zeros((), device=device)  # set before each step; on the device, for the graph
        self.step, self.best_loss, self.train_loss, self.val_loss = 0, math.inf, None, None

    @property
    def epoch(self):
        """How many epochs are whole."""
        return self.step // self.steps_per_epoch

    def tensors(self):
        """All tensors that a training step changes."""
        return [*self.model.parameters(), *self.averaged.parameters(), self.totals,
                *(tensor for moments in self.optimizer.state.values() for tensor in moments.values())]

    def state_dict(self):
        """The state in the words of save_checkpoint."""
        state = {"epoch": self.epoch, "model_state_dict": self.model.state_dict(),
                 "optimizer_state_dict": self.optimizer.state_dict(), "train_loss": self.train_loss,
                 "val_loss": self.val_loss, "args": self.flags, "step": self.step, "totals": self.totals.cpu(),
                 "best_loss": self.best_loss, **self.origin}
        if self.averaged is not self.model:
            state["ema_state_dict"] = self.averaged.state_dict()
        return state

    def restore(self, saved):
        """Take over all but the model's weights from a state_dict(). Raises an error of some kind if it doesn't fit."""
        if self.averaged is not self.model:
            self.averaged.load_state_dict(model_from_state_dict(saved["ema_state_dict"]).state_dict())
        moments = saved["optimizer_state_dict"]["state"]
        shapes = {i: {name: tensor.shape for name, tensor in entry.items()} for i, entry in moments.items()}
        if shapes != (state_shapes(self.optimizer) if moments or saved["step"] else {}):  # none before the first step
            raise ValueError("its optimiser state does not fit its weights")
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.step = operator.index(saved["step"])
        if saved["totals"].shape != self.totals.shape or not 0 <= saved["epoch"] == self.epoch:
            raise ValueError("its step, epoch and totals do not fit")
        self.totals.copy_(saved["totals"])
        self.best_loss = float(saved["best_loss"])
        self.train_loss, self.val_loss = saved["train_loss"], saved["val_loss"]


def open_state(args, saved, path, series, plan, device, scaling=None):
    """The state of a new run, or of the one that `saved` describes, the content of NAME_last.pt at `path`.

    A restored model has the sizes of the saved tensors, and so no more memory than the file fills. Raises UserError.
    """
    data_crc32 = dataset.data_crc32(series)
    if saved is None:
        X = dataset.scaled(series.X[:min(plan.boundary, mixture_head.STEPS_FOR_SCALE)], scaling)
        model = build_model(args, series.feature_dim, X).to(device).use_scan(args.scan, device).train_scaled(scaling)
        return RunState(args, model, plan.steps_per_epoch, data_crc32, scaling)
    try:
        if saved["data_crc32"] != data_crc32:
            raise cli.UserError(f"--resume: {args.data_dir} is not the data that {path} was trained on; give the right "
                                "--data-dir")
        model = model_from_state_dict(saved["model_state_dict"], args.dropout).to(device).use_scan(args.scan, device)
        dataset.check_fits_model(series, model, path)
        state = RunState(args, model.train_scaled(scaling), plan.steps_per_epoch, data_crc32, scaling)
        state.restore(saved)
        return state
    except (cli.UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # which one it is, depends on where what is wrong shows
        raise cli.UserError(f"--resume: {path} is no last state of a run, or is damaged ({reason(error)}); start the "
                            "run anew") from None


# ---- The run --------------------------------------------------------------------------------------------------

def prepare(args, files, ranks):
    """(flags, series, windows, plan, state) of a run that is about to start or to go on. Raises UserError."""
    args, saved = run_files.open_run(args, files, ranks.first, parse_args)
    series = dataset.load_series(args.data_dir)
    plan = Plan(args, series.n_steps, series.recordings, unseen.held_back(args, series, resumed=saved is not None))
    if plan.batch_size < ranks.world:
        raise cli.UserError(f"more processes ({ranks.world}) than windows in a step ({plan.batch_size}); start fewer, "
                            "or use a larger --batch-size or more data")
    windows, scaling = dataset.training_windows(args, series, plan.boundary, ranks.device)
    if args.num_workers and windows.on_device:
        print(f"--num-workers {args.num_workers} is not used: the series fits on {ranks.device}")
    state = open_state(args, saved, files["last"], series, plan, ranks.device, scaling)
    if saved is not None:
        run_files.check_resumed(plan, state.step, int(saved["args"].get("epochs", args.epochs)))
    if not args.no_amp:
        check_bfloat16(state.model.backend_for(ranks.device), ranks.device)
    state.origin["record"] = run_files.record_of_start(args, ranks, state, files["record"], saved)
    ranks.divide_totals(state.totals)
    return args, series, windows, plan, state


def train(args, ranks):
    """The whole run. Raises UserError, and SystemExit when it was interrupted."""
    # ---- Data, and what learns
    files = run_files.files_of(args.checkpoint)
    with ranks.together():
        args, series, windows, plan, state = prepare(args, files, ranks)
    with terminal.busy("preparing the training step"):  # on a GPU it is compiled and captured
        runner = make_runner(args, state, plan, series, windows, ranks)
    saver = run_files.Saver(state, plan, files, ranks)
    print(f"{args.checkpoint}: {sum(p.numel() for p in state.model.parameters()):,} parameters on {ranks.device}"
          + (f", {ranks.world} processes" if ranks.world > 1 else ""))
    plan.print()

    # ---- The floor, and the first files: the last state comes first, as --resume works from then on
    with ranks.together():
        floor = run_files.floors(series, plan.val_starts, args.seq_len, state.model,
                                 0 if args.fresh else plan.boundary) if ranks.first else {}
        if not args.resume:
            saver.save()
        log = run_files.EpochLog(args, files, state, plan, ranks)

    # ---- The loop
    stopping = False
    with log:
        for epoch in range(state.epoch, args.epochs):
            whole = train_epoch(epoch, state, plan, runner, saver, log.bar)
            with ranks.together():
                if whole:
                    row, finite_steps = end_of_epoch(state, plan, runner, floor, ranks)
                    saver.check_finite(finite_steps, math.isfinite(state.val_loss))
                    log.add(row)
                    saver.keep_best()
            stopping = ranks.should_stop()
            with ranks.together():
                if stopping and not whole:
                    saver.save_in_epoch()
                elif stopping or saver.seconds_since() > SAVE_EVERY_SECONDS:
                    saver.save()
            if stopping:
                break

    # ---- The end
    if stopping:
        print(f"stopped after training step {state.step:,} of {plan.total_steps:,}; "
              f"{files['last']} is saved, go on with --resume")
        sys.exit(cli.EXIT_INTERRUPTED)
    with ranks.together():
        saver.save()
        if ranks.first:
            finish(args, files, log, series, ranks.device, plan.val_starts)


def train_epoch(epoch, state, plan, runner, saver, bar):
    """Take the steps that are left of an epoch, until all ranks agree to stop. Returns whether the epoch is whole."""
    ranks = saver.ranks
    state.model.train()
    for batch in runner.batches(epoch, first=state.step - epoch * plan.steps_per_epoch):
        set_lr(state.optimizer, plan.lr(state.step))
        if plan.args.ema:
            state.averaging_weight.fill_(averaging_weight(state.step, plan.args.ema))
        torch.manual_seed(plan.seed(state.step, ranks.rank))  # here: a loader, when it starts, draws a number itself
        runner.train_step(batch)
        state.step += 1
        bar.update()
        steps_taken = state.step - epoch * plan.steps_per_epoch
        if steps_taken < plan.steps_per_epoch:
            stopping, due = ranks.agree(saver.seconds_since() > SAVE_EVERY_SECONDS, steps_taken)
            if stopping:
                return False
            if due:
                with ranks.together():
                    saver.save_in_epoch()
    return True


def end_of_epoch(state, plan, runner, floor, ranks):
    """Measure a whole epoch, and set its totals back to zero. Returns (its row of the log, how many of its steps had a
    finite loss), the same on all ranks. floor: as from `window_floors`, or {} where it isn't known."""
    model, n = state.model, len(state.totals) - 2  # n: the errors, one per measure and horizon
    model.eval()
    ranks.sum_totals(state.totals)
    numbers = torch.cat([state.totals, runner.evaluate()])
    ranks.broadcast(numbers)
    numbers = numbers.tolist()  # the epoch's only wait for the device
    state.train_loss, *train_errors = (total / plan.steps_per_epoch for total in numbers[:1 + n])
    finite_steps, val_errors, train_eval = numbers[1 + n], numbers[2 + n:2 + 2 * n], numbers[2 + 2 * n:]
    trained_by = val_errors[-len(model.horizons):]
    state.val_loss = sum(trained_by) / len(trained_by)
    state.totals.zero_()
    row = {"epoch": state.epoch, "step": state.step, "steps_seen": state.epoch * plan.boundary,
           "lr": plan.lr(state.step - 1), "train_loss": state.train_loss, "val_loss": state.val_loss,
           "train_eval_mse": train_eval[0] if train_eval else None}
    return row | run_files.error_cells(model, train_errors, val_errors, floor), finite_steps


# ---- Figures -----------------------------------------------------------------------------------

@torch.no_grad()
def finish(args, files, log, series, device, val_starts):
    """Draw the figures, from the best weights, and say where everything is. Raises UserError when the log is lost."""
    if not log.rows:
        raise cli.UserError(f"{files['log']} is lost, and the run has no epoch left to train: its curve can't be "
                            f"drawn; {files['best']} is unharmed")
    name = stem(args.checkpoint)
    model, _, _ = open_model(files["best"], args.data_dir, device, args.scan, series)
    drawn = {files["loss"]: run_files.draw_loss(log.rows, model.horizons, name),
             **run_files.draw_predictions(files, model, series, val_starts, args.seq_len, name)}
    log.add_figures(figures.save_all(drawn))
    best = min(log.rows, key=lambda row: row["val_loss"])
    print(f"best: {run_files.progress_line(best, args.epochs, model.horizons)}")
    print(f"wrote {files['best']}, {files['last']}, {files['log']}, {files['record']}")


# ---- The script -----------------------------------------------------------------------------------------------

def main(args):
    if args.eval is None:
        with joined(args.device) as ranks, run_files.claimed(args, ranks):
            train(args, ranks)
    elif is_first():
        run_files.print_evaluations(args, parse_args)


if __name__ == "__main__":
    run(main, ARGS)
