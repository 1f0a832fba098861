"""What a training run named NAME.pt leaves behind: its names, its log, its record, its states, its figures; and how it
is opened again.

What the run computes is the training script's story; nothing here needs to be read to change that.
"""

import argparse
import contextlib
import csv
import json
import math
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import matplotlib.image
import numba
import numpy as np
import scipy
import torch

import cli
import dataset
import figures
import learned
import level_tables
import terminal
import unseen
from kernels.selective_scan import check_bfloat16
from mamba_model import open_model, read_checkpoint, save_checkpoint, stem, trained_on, validation_errors
from optimal_filter import error_rows, error_table, excess_nats, excess_percent, process_or_none, window_floors

try:
    import fcntl
except ImportError:  # not on Windows, where nothing keeps two runs apart that start at the same moment
    fcntl = None

PRINT_EVERY_SECONDS = 10  # between two lines on the progress, where there is no progress bar

# Flags that say how or where to compute, not what: --resume takes them from the command line where they are given.
FREE_ON_RESUME = ("data_dir", "num_workers", "no_compile", "no_train_eval", "scan", "device", "epochs", "log_dir",
                  "format", "style")
# Flags that --eval looks at, beside those of the windows.
USED_BY_EVAL = ("data_dir", "test_steps", "checkpoint", "eval", "device", "scan", "no_amp")
# Flags that belong to one command and not to the run: always those of the command line.
OF_THE_COMMAND = ("checkpoint", "resume", "eval")


# ---- Names ----------------------------------------------------------------------------------------------------

def files_of(checkpoint):
    """The files that the run named by `checkpoint`, a Path, owns: {role: Path}."""
    folder, name = checkpoint.parent, stem(checkpoint)
    return {"best": checkpoint, "last": folder / f"{name}_last.pt", "log": folder / f"{name}_log.csv",
            "record": folder / f"{name}_run.json", "loss": folder / f"{name}_loss.png",
            **{f"prediction_{i}": folder / f"{name}_prediction_{i}.png" for i in range(3)}}


def refuse_taken(files):
    """Raise UserError when a run of this name exists: no run overwrites another's files."""
    go_on = "go on with it by --resume, " if files["last"].exists() else ""
    for path in files.values():
        if path.exists():
            raise cli.UserError(f"{path} exists already; {go_on}choose another --checkpoint name, or remove the old "
                                "run's files")


@contextlib.contextmanager
def claimed(args, ranks):
    """A block in which this process, or on several ranks rank 0, alone may train the run that --checkpoint names.

    Raises UserError that says which process holds the name. A process that ends in any way gives it back.
    """
    lock, path = None, args.checkpoint.parent / f".{stem(args.checkpoint)}.lock"
    there_before = path.parent.exists()
    with ranks.together():
        if ranks.first and not args.resume:
            cli.output_folder(path.parent)
        if ranks.first and fcntl is not None and path.parent.is_dir():
            lock = hold(path, args.checkpoint)
    try:
        yield
    finally:
        if lock is not None:
            path.unlink(missing_ok=True)  # first: who opens it from now on makes a new file
            lock.close()
        if ranks.first and not there_before:
            with contextlib.suppress(OSError):  # a run that was refused leaves no empty folder; others have files
                path.parent.rmdir()


def hold(path, checkpoint):
    """Lock the file at `path`, made if needed, and note in it who does; returns the open file. Raises UserError."""
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - open as long as the run goes on
        try:
            # Not flock: loader processes would inherit that lock, and hold it for seconds after a crash.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = read_holder(file)
            file.close()
            raise cli.UserError(f"{checkpoint} is being trained by {holder}; let it end, or choose another "
                                "--checkpoint name") from None
        except OSError as error:
            print(f"{path} can't be locked ({error.strerror}): see to it that no other run has this name")
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()  # its holder has just removed it
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return file


def read_holder(file):
    """What the holder of a locked file has written in it, which it does in the moment after it has locked it."""
    for _ in range(20):
        file.seek(0)
        if holder := cli.one_line(file.read(200)):
            return holder
        time.sleep(0.05)
    return "another process"


# ---- Log: one row per epoch -----------------------------------------------------------------------------------

def log_columns(model, train_eval, fresh=False):
    """The columns of NAME_log.csv; train_eval: whether the training windows are evaluated after each epoch; fresh:
    whether each epoch has a series of its own, so that "steps_seen" counts time steps that are all different."""
    columns = ["epoch", "step", *(["steps_seen"] if fresh else []), "lr", "seconds", "train_loss", "val_loss"]
    for measure in model.measures:
        for kind in (f"train_{measure}", f"val_{measure}", f"floor_{measure}", MEASURES[measure][1]):
            columns += [f"{kind}_{k}" for k in model.horizons]
    return columns + (["train_eval_mse"] if train_eval else [])


def error_cells(model, train_errors, val_errors, floor):
    """The cells of a row that hold errors. train_errors, val_errors: measure by measure, one number per horizon;
    floor: as from `window_floors`, or {}. A last row of errors that is no measure, but trained by, is left out."""
    cells = {}
    names = [(measure, k) for measure in model.measures for k in model.horizons]
    for (measure, k), train_error, val_error in zip(names, train_errors, val_errors, strict=False):
        optimum = floor.get(measure, {}).get(k)
        _, excess, _, _ = MEASURES[measure]
        excess_over = {"excess_percent": excess_percent, "excess_nats": excess_nats}[excess]
        cells |= {f"train_{measure}_{k}": train_error, f"val_{measure}_{k}": val_error,
                  f"floor_{measure}_{k}": optimum, f"{excess}_{k}": excess_over(val_error, optimum)}
    return cells


def log_writer(file, columns):
    """A csv writer of rows as dicts. A number is written so that it reads back the same, a missing one as nothing."""
    return csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")


def start_log(path, columns, rows):
    """Write the log with the rows so far, whole or not at all."""
    with cli.writing(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        writer = log_writer(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def append_row(path, columns, row):
    try:
        with open(path, "a", encoding="utf-8", newline="") as file:
            log_writer(file, columns).writerow(row)
    except OSError as error:
        raise cli.UserError(f"can't write {path}: {error.strerror}; free some space and go on with --resume") from None


def read_log(path, columns, last_epoch):
    """The rows of a log up to an epoch, as dicts of numbers; None where an optional column has none.

    Later rows are dropped: a run that was killed wrote them after its last state. So is a last line that was cut
    short. A line is printed when epochs are missing. Raises UserError when the file is damaged.
    """
    required = [name for name in columns if not name.startswith(("floor_", "excess_", "train_eval_"))]
    rows = [row for row in read_rows(path, required) if row["epoch"] <= last_epoch]
    if len(rows) < last_epoch:
        print(f"{path} has rows of {len(rows):,} of the {last_epoch:,} epochs so far; the curves lack the others")
    return rows


def read_rows(path, required=("epoch", "step", "val_loss")):
    """The rows of a log as dicts of numbers, None for an empty cell; none without a file. A last line that was cut
    short is dropped. Raises UserError when the file is damaged, or lacks a number in a required column."""
    rows = []
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for row in csv.DictReader(text[:text.rfind("\n") + 1].splitlines(), strict=True):
            numbers = {name: float(cell) if cell else None for name, cell in row.items()}
            numbers |= {name: float(row[name]) for name in required}
            numbers |= {name: int(row[name]) for name in ("epoch", "step", "steps_seen") if name in row}
            rows.append(numbers)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, csv.Error) as error:
        raise cli.UserError(f"{path} is damaged ({cli.one_line(error)[:160]}); mend or remove it, then go on without "
                            "the earlier rows") from None
    return rows


BAR_FORMAT = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


def bar_text(row, epochs):
    """What stands beside the bar in the epoch after the one with this row of the log (None: in the first), in so few
    words that a terminal of 80 columns shows them: the losses of the next step, whatever the horizons are."""
    epoch = f"epoch {1 if row is None else min(row['epoch'] + 1, epochs)}/{epochs}"
    if row is None:
        return epoch
    nats, percent = row.get("excess_nats_1"), row["excess_percent_1"]
    parts = [f"validation {row['val_loss']:.4f}", "" if nats is None else f"+{nats:.4f} nats",
             "" if percent is None else f"+{percent:.2f} %"]
    return f"{epoch}: {', '.join(filter(None, parts))}"


def progress_line(row, epochs, horizons):
    """One line on an epoch: its losses, and how far each horizon's MSE is above that of the optimal filter; where
    densities are predicted, also how many nats the next step's likelihood is off."""
    excess = [row[f"excess_percent_{k}"] for k in horizons]
    above = "" if excess[0] is None else f", {', '.join(f'{e:.2f}' for e in excess)} % above optimal"
    if above and len(horizons) > 1:
        above += f" at horizons {', '.join(map(str, horizons))}"
    if row.get("excess_nats_1") is not None:
        above = f", {row['excess_nats_1']:.4f} nats{above.replace(', ', ' and ', 1)}"
    return (f"epoch {row['epoch']}/{epochs}: training {row['train_loss']:.4f}, validation {row['val_loss']:.4f}{above}")


class EpochLog:
    """What is told of a run while it goes on: NAME_log.csv, TensorBoard, and a progress bar or lines; by rank 0 alone.

    `rows` are those of all epochs so far. As a context manager it closes the bar, so that what is printed afterwards
    stands below it. Raises UserError when the log of a resumed run is damaged.
    """

    def __init__(self, args, files, state, plan, ranks):
        self.path, self.epochs, self.first, self.horizons = files["log"], args.epochs, ranks.first, state.model.horizons
        self.columns = log_columns(state.model, not args.no_train_eval, args.fresh)
        self.rows, self.writer = [], None
        if args.resume:
            self.rows = read_log(self.path, self.columns, state.epoch)
            print(f"resumed at epoch {state.epoch:,}, training step {state.step:,}")
        if self.first:
            if args.log_dir is not None:
                self.writer = tensorboard_writer(args.log_dir, stem(args.checkpoint), state.epoch)
                tell_flags(self.writer, args)
            start_log(self.path, self.columns, self.rows)
            cli.write_text(files["record"], json.dumps(state.origin["record"], indent=2) + "\n")
        self.bar = terminal.Bar(plan.total_steps, BAR_FORMAT, None if self.first else True, initial=state.step)
        self.bar.set_postfix_str(bar_text(self.rows[-1] if self.rows else None, self.epochs))
        self.seconds_before = self.rows[-1]["seconds"] if self.rows else 0.0
        self.started = self.printed = time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def add(self, row):
        """Log the row of an epoch, in which it notes the seconds of training so far, those before a --resume too."""
        now = time.perf_counter()
        row["seconds"] = round(self.seconds_before + now - self.started, 3)
        self.rows.append(row)
        if not self.first:
            return
        append_row(self.path, self.columns, row)
        if self.writer is not None:
            for name in self.columns[2:]:  # all but epoch and step
                if row.get(name) is not None:
                    self.writer.add_scalar(name, row[name], row["epoch"])
            self.writer.flush()
        line = progress_line(row, self.epochs, self.horizons)
        self.bar.set_postfix_str(bar_text(row, self.epochs), refresh=False)
        is_an_end = row["epoch"] in (1, self.epochs)
        if not self.bar.disable:
            with self.bar.external_write_mode():
                print(line, flush=True)
        elif is_an_end or now - self.printed > PRINT_EVERY_SECONDS:
            print(line, flush=True)
            self.printed = now

    def add_figures(self, paths):
        """Show the figures NAME_*.png in TensorBoard too, and close it."""
        if self.writer is None:
            return
        prefix = self.path.name.removesuffix("log.csv")
        for path in (path for path in paths if path.suffix == ".png"):
            pixels = matplotlib.image.imread(path)[:, :, :3]
            self.writer.add_image(path.stem.removeprefix(prefix), pixels, self.rows[-1]["epoch"], dataformats="HWC")
        self.writer.close()


def summary_writer_class():
    """TensorBoard's writer. Raises UserError when tensorboard isn't installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise cli.UserError("--log-dir needs tensorboard; install it with: pip install tensorboard") from None
    return SummaryWriter


def tensorboard_writer(log_dir, name, epoch):
    """A writer to the folder log_dir/name, in which what an earlier writer wrote of epochs after `epoch` is hidden."""
    folder = cli.output_folder(log_dir / name)
    return summary_writer_class()(str(folder), purge_step=epoch + 1)


def tell_flags(writer, args):
    """Write the flags that have an effect as TensorBoard's hyperparameters, so that runs can be sorted by them."""
    from torch.utils.tensorboard.summary import hparams

    flags = {name: value if isinstance(value, bool | int | float) else str(value)
             for name, value in flags_to_save(args).items() if name not in cli.WITHOUT_EFFECT}
    for summary in hparams(flags, {"val_loss": None}):
        writer.file_writer.add_summary(summary)


# ---- Record: what a reader needs to repeat the run ------------------------------------------------------------

def run_record(args, device, model, world=1):
    """Command, all flags, commit, start time, seed, processes, device, back end, size and versions, as a dict."""
    launcher = ["python"]
    if world > 1:
        launcher = ["torchrun", f"--nnodes={os.environ.get('GROUP_WORLD_SIZE', 1)}",
                    f"--nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE', world)}"]
    return {"command": shlex.join([*launcher, Path(sys.argv[0]).name, *sys.argv[1:]]),
            "flags": {name: str(value) if isinstance(value, Path) else value
                      for name, value in flags_to_save(args).items()},
            "git_commit": cli.git_commit(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seed": args.seed,
            "processes": world,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
            "scan": model.backend_for(device),
            "parameters": sum(p.numel() for p in model.parameters()),
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__),
                         "cuda": torch.version.cuda, "numpy": np.__version__,
                         "scipy": scipy.__version__, "numba": numba.__version__}}


def read_record(path):
    """NAME_run.json as a dict, or None when it is missing or damaged: that is no reason to refuse a checkpoint."""
    try:
        return whole_record(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None


def whole_record(record):
    """A record with its list of later starts, or None when it is none."""
    try:
        return {**record, "resumed": [{**again} for again in record.get("resumed", [])]}
    except (TypeError, AttributeError):
        return None


def record_of_start(args, ranks, state, path, saved):
    """The record of this start of the run: of the first one as it is, of a later one in the list "resumed" of the
    first one's. path: of NAME_run.json; saved: the content of NAME_last.pt, or None at the first start."""
    record = run_record(args, ranks.device, state.model, ranks.world)
    first = None if saved is None else read_record(path) or whole_record(saved.get("record"))
    return record if first is None else {**first, "resumed": [*first["resumed"], {"step": state.step, **record}]}


def print_record(path, saved):
    """Print the record of a checkpoint's run: one line per entry, and one per start of a resumed run.

    path: where its NAME_run.json would lie; saved: the record in the checkpoint, or None. That in the file is newer,
    but it is another run's where the checkpoint is a copy under another name.
    """
    record, own = read_record(path), whole_record(saved)
    if record is None or (own is not None and str(record.get("started")) != str(own.get("started"))):
        record = own
    if record is None:
        print(f"no readable record of the run at {path}")
        return
    for key, value in record.items():
        if key != "resumed":
            value = f"{value:,}" if key == "parameters" and isinstance(value, int) else value
            parts = [f"{k} {v}" for k, v in value.items() if v is not None] if isinstance(value, dict) else [str(value)]
            print(f"{key:12} {', '.join(parts)}")
    for again in record["resumed"]:
        print(f"{'resumed':12} at step {again.get('step')}, {again.get('started')}, commit {again.get('git_commit')}, "
              f"on {again.get('device')}: {again.get('command')}")


# ---- Opening a run: its flags, and its last state if it goes on -----------------------------------------------

def flags_to_save(args):
    """All flags as a dict; the data by their full path, which holds wherever a later command is started."""
    return {name: Path(os.path.abspath(value)) if name == "data_dir" else value
            for name, value in vars(args).items() if name != "flags_given"}


def saved_flags(saved, path, parse_args):
    """The flags in the args of a checkpoint, as a Namespace: put into words and parsed as a command line would be.

    So each value is of the right kind, and a flag that came after the checkpoint has its default. saved: the dict;
    parse_args(words, refuse) parses a list of words and calls refuse(message) where they are wrong. Raises UserError.
    """
    def refuse(message):
        raise cli.UserError(f"{path} is damaged or no checkpoint of this script: of the flags in it, {message}")

    words = []
    for name, default in vars(parse_args([])).items():
        value = saved.get(name, default)
        if name in OF_THE_COMMAND or name == "flags_given" or value is None or value is False:
            continue
        word = cli.flag_of(name)
        words.append(word if value is True else f"{word}={value}")
    return parse_args(words, refuse)


def flags_for_resume(args, saved):
    """The flags to go on with: the run's own, `saved`, but for what the command line, `args`, may change.

    Raises UserError when a flag on the command line contradicts the run.
    """
    flags = vars(saved) | {name: getattr(args, name) for name in OF_THE_COMMAND}
    for name in args.flags_given:
        value = getattr(args, name)
        if name in FREE_ON_RESUME:
            flags[name] = value
        elif name not in OF_THE_COMMAND and value != flags[name]:
            raise cli.UserError(f"--resume: the run was started with {cli.flag_of(name)} {flags[name]}, not "
                                f"{value}; leave the flag out, or start another run")
    return argparse.Namespace(**flags)


def open_run(args, files, first, parse_args):
    """(flags, content of NAME_last.pt): of a new run, whose name is free, (args, None); of one that goes on, its own.

    first: whether this is rank 0, which alone looks at the files of a new run; parse_args: see saved_flags. Raises
    UserError.
    """
    if args.log_dir is not None:
        summary_writer_class()
    saved = None
    if args.resume:
        if not files["last"].is_file():
            raise cli.UserError(f"--resume: {files['last']} not found, so there is no run to go on with; leave "
                                "--resume out to start it")
        saved = read_checkpoint(files["last"])
        own = saved_flags(saved["args"], files["last"], parse_args)
        own.data_dir = trained_on(files["last"], saved)
        args = flags_for_resume(args, own)
    elif first:
        refuse_taken(files)
    if first:
        cli.output_folder(args.checkpoint.parent)
    return args, saved


def check_resumed(plan, step, epochs_before):
    """Raise UserError when the run has taken more than the plan's steps; say so when the learning rate will jump.

    step: how many were taken; epochs_before: how many epochs were planned when they were.
    """
    epochs = plan.args.epochs
    if step > plan.total_steps:
        done = math.ceil(step / plan.steps_per_epoch)
        raise cli.UserError(f"--epochs {epochs} is less than the run has behind it: epoch {done} has begun; give "
                            f"--epochs {done} or more")
    if epochs != epochs_before and 0 < step < plan.total_steps:
        print(f"--epochs {epochs} in place of {epochs_before}: the learning rate goes from "
              f"{plan.lr(step - 1, epochs_before):.3g} to {plan.lr(step):.3g}, as if {epochs} had been planned")


# ---- A finished run, or one that goes on: what --eval prints ----------------------------------------------------

def floors(series, starts, seq_len, model, n_learned=0):
    """The exact filter's errors on these windows, as from `window_floors`; those that the model has are printed, and
    those of an observer who learns the process from the first n_learned steps.

    Empty, after a line with the reason, when the process isn't known (no config.json, no noise).
    """
    process = process_or_none(series, "no optimal floor")
    if process is None:
        return {}
    learner = learned.learner_of(series, n_learned) if n_learned else None
    observers = {"optimal filter": process}
    if learner is not None:
        observers[f"the same filter with the process learned from {n_learned:,} labelled steps"] = learner.process
    found = [window_floors(observer, series, starts, seq_len, model.horizons) for observer in observers.values()]
    for name, floor in zip(observers, found, strict=True):
        print(f"{name} on the validation windows: " + ", ".join(
            f"{measure.upper()} {value:.4f} at horizon {k}" for measure in model.measures
            for k, value in floor[measure].items()))
    return found[0]


def print_evaluations(args, parse_args):
    """--eval: what `print_evaluation` says of each checkpoint and, of several, their errors on the test series side by
    side, which are also drawn and written as CSV beside the first one."""
    paths = args.eval or [args.checkpoint]
    reports = [print_evaluation(path, args, parse_args, alone=len(paths) == 1) for path in paths]
    rows = unseen.compared(level_tables.test_settings(reports)) if len(paths) > 1 else []
    if rows:
        print("\n" + unseen.compared_table(rows))
        name = paths[0].parent / cli.short_name("_".join(["compare", *map(stem, paths), "test"]))
        cli.write_text(name.with_name(f"{name.name}.csv"), level_tables.comparison_csv(rows))
        print(f"wrote {name}.csv")
        figures.save(unseen.draw_compared(rows), name.with_name(f"{name.name}.png"))


def print_evaluation(path, args, parse_args, alone=True):
    """The record of the run of the checkpoint at `path`, its validation loss and its errors on the test series, on its
    own data or those of --data-dir. Returns {"name", "trained_with": its flags, "test": as from `unseen.as_report`}.

    parse_args: see saved_flags. The exact filter's errors are printed too; the record only where it stands alone.
    """
    device = cli.pick_device(args.device)
    data_dir = args.data_dir if "data_dir" in args.flags_given else None
    model, saved, series = open_model(path, data_dir, device, args.scan)
    checkpoint = read_checkpoint(path)
    amp = not (args.no_amp or "scaling" in checkpoint)  # data far from 0 need float32
    if amp:
        check_bfloat16(model.backend_for(device), device)
    if alone:
        print_record(files_of(path)["record"], checkpoint.get("record"))
    # The windows of training, unless a flag says otherwise
    used = ("seq_len", "stride", "val_fraction", "batch_size")
    ignored = [name for name in args.flags_given if name not in (*used, *USED_BY_EVAL)]
    if ignored:
        print(f"--eval trains nothing: {', '.join(map(cli.flag_of, ignored))} ignored")
    trained = saved_flags({name: saved[name] for name in used if name in saved}, path, parse_args)
    seq_len, stride, val_fraction, batch_size = (
        getattr(args if name in args.flags_given else trained, name) for name in used)
    if seq_len <= model.horizons[-1]:
        raise cli.UserError(f"--seq-len {seq_len} must be longer than the largest horizon, {model.horizons[-1]}")
    process = process_or_none(series)
    held_back = unseen.left_to_the_test(saved, series, process)
    _, val_starts, boundary = dataset.split_windows(series.n_steps, seq_len, stride, val_fraction, series.recordings,
                                                    held_back)
    windows = dataset.Windows(series.X, seq_len, device)
    errors = validation_errors(model, windows, torch.from_numpy(val_starts).to(windows.starts_device), batch_size,
                               amp)
    floor = floors(series, val_starts, seq_len, model)
    print(f"{path}: epoch {checkpoint.get('epoch')}, {sum(p.numel() for p in model.parameters()):,} parameters")
    print(error_table(error_rows(model.errors_by_horizon(errors), floor)))
    tested, report = unseen.unseen_part(series, process, seq_len, args.test_steps, held_back), None
    if tested is not None:
        crc32 = checkpoint.get("data_crc32")  # anything may stand in a file
        its_data = process is not None and isinstance(crc32, int) and crc32 == dataset.data_crc32(series)
        learner = learned.learner_of(series, boundary) if its_data and saved.get("fresh") is not True else None
        report = unseen.as_report(model, tested, learner)
        unseen.print_report(report)
    return {"name": stem(path), "trained_with": saved, "test": report}


# ---- The best and the last state ------------------------------------------------------------------------------

class Saver:
    """Writes a run's NAME.pt and NAME_last.pt, on rank 0, and knows which of them can be trusted.

    The best state is copied when its epoch ends and written when the last state is, as both take a while.
    """

    def __init__(self, state, plan, files, ranks):
        self.state, self.plan, self.files, self.ranks, self.first = state, plan, files, ranks, ranks.first
        self.best, self.best_weights = None, None  # what is still to be written to NAME.pt; the copy, to be renewed
        self.saved_step, self.saved_at = state.step, time.perf_counter()

    def keep_best(self):
        """Copy the state if its validation loss is the lowest so far."""
        state = self.state
        if state.val_loss >= state.best_loss:
            return
        state.best_loss = state.val_loss
        if self.first:
            self.best_weights = snapshot({"model_state_dict": state.averaged.state_dict(),
                                          "optimizer_state_dict": state.optimizer.state_dict()}, self.best_weights)
            self.best = {"epoch": state.epoch, "train_loss": state.train_loss, "val_loss": state.val_loss,
                         "args": state.flags, **state.origin, **self.best_weights}

    def save_best(self):
        if self.best is not None:
            save_checkpoint(self.files["best"], **self.best)
            self.best = None

    def save(self):
        """Write both files. The best one first: a last state never remembers a best one that isn't on the disk."""
        if self.first:
            self.save_best()
            save_checkpoint(self.files["last"], **self.state.state_dict())
        self.saved_step, self.saved_at = self.state.step, time.perf_counter()

    def save_in_epoch(self):
        """Save when an epoch isn't whole: its totals are scattered over the ranks, and nobody has looked whether it
        has diverged. Raises UserError when it has, and leaves the older state."""
        self.ranks.sum_totals(self.state.totals)
        finite = all(p.isfinite().all() for p in self.state.model.parameters())
        self.check_finite(self.state.totals[-1].item(), finite)
        self.save()
        self.ranks.divide_totals(self.state.totals)

    def seconds_since(self):
        """Seconds since the last state was saved."""
        return time.perf_counter() - self.saved_at

    def check_finite(self, finite_steps, finite):
        """Raise UserError when this epoch's loss was finite in its first `finite_steps` steps only, or when what they
        led to isn't `finite`; the error names the step, and the checkpoint that is still good."""
        epoch = (self.state.step - 1) // self.plan.steps_per_epoch  # the one in which the last step was
        begin = epoch * self.plan.steps_per_epoch
        if finite and finite_steps == self.state.step - begin:
            return
        self.save_best()
        bad_step = min(begin + round(finite_steps), self.state.step - 1)
        if self.files["best"].exists():
            last_good = f"{self.files['best']} (the lowest validation loss)"
        elif self.saved_step == 0:
            last_good = f"{self.files['last']} (the state at the start)"
        else:
            last_good = f"{self.files['last']} (the state after step {self.saved_step})"
        raise cli.UserError(f"the loss became NaN or infinite at step {bad_step + 1} (epoch {epoch + 1}, learning rate "
                            f"{self.plan.lr(bad_step):.3g}); the last good checkpoint is {last_good}; start anew "
                            "with a smaller --lr")


def snapshot(state, into=None):
    """A copy of a (nested) state dict that later steps don't change.

    into: an earlier copy, which is renewed. All its tensors are then copied by a few kernels; a new clone would launch
    one kernel per tensor, milliseconds in all on a GPU.
    """
    copies, values = [], []

    def copied(value, earlier):
        if isinstance(value, torch.Tensor) and earlier is not None:
            copies.append(earlier)
            values.append(value.detach())
            return earlier
        if isinstance(value, torch.Tensor):
            return value.detach().clone()
        if isinstance(value, dict):
            return {key: copied(item, None if earlier is None else earlier[key]) for key, item in value.items()}
        if isinstance(value, list):
            return [copied(item, None if earlier is None else earlier[i]) for i, item in enumerate(value)]
        return value

    result = copied(state, into)
    if copies:
        torch._foreach_copy_(copies, values)
    return result


# ---- Figures --------------------------------------------------------------------------------------------------

# Of each measure: its axis label; of its excess over the optimal filter: the column of the log, unit and axis label
MEASURES = {
    "mse": ("mean squared error (data units²)", "excess_percent", " %", "MSE over the filter's − 1 (%)"),
    "nll": ("negative log-likelihood (nats per step)", "excess_nats", " nats", "NLL over the filter's (nats per step)"),
}


@cli.in_style
def draw_loss(rows, horizons, title):
    """Per measure of the log and per horizon against the epoch: training and validation error, and the validation
    error's excess over the optimal filter where that is known; the learning rate; and the best epoch in all panels."""
    measures = [measure for measure in MEASURES if f"val_{measure}_{horizons[0]}" in rows[-1]]
    has_floor = rows[-1].get(f"floor_mse_{horizons[0]}") is not None
    fig, axes = figures.new_figure(len(measures), 2 if has_floor else 1, (5.2, 4), title)
    best = min(rows, key=lambda row: row["val_loss"])["epoch"]
    for measure, panels in zip(measures, axes, strict=True):
        error_curves(panels[0], rows, horizons, measure)
        if has_floor:
            excess_curves(panels[1], rows, horizons, measure)
        for ax in panels:
            ax.axvline(best, color="0.6", linestyle="--", linewidth=1, zorder=0, label=f"best epoch ({best:,})")
            epoch_axis(ax, rows[0]["epoch"], rows[-1]["epoch"])
            if ax.get_yscale() == "log":
                figures.log_ticks_for_range(ax)
            if len(rows) == 1:
                for line in ax.get_lines():
                    line.set_marker("o" if len(line.get_xdata()) == 1 else "")
    learning_rate(axes[0, 0], rows)
    fig.legend(handles=loss_handles(rows, horizons, measures, best, has_floor), loc="outside right upper",
               fontsize=8, ncols=1 + (len(horizons) - 1) // 12)
    return fig


def error_curves(ax, rows, horizons, measure):
    epochs = [row["epoch"] for row in rows]
    for k, color in zip(horizons, figures.run_colors(len(horizons)), strict=True):
        name = f"horizon {k}, " if len(horizons) > 1 else ""
        ax.plot(epochs, [row[f"train_{measure}_{k}"] for row in rows], color=color, alpha=0.4, label=f"{name}training")
        ax.plot(epochs, [row[f"val_{measure}_{k}"] for row in rows], color=color, label=f"{name}validation")
        floor = rows[-1].get(f"floor_{measure}_{k}")
        if floor is not None:
            ax.axhline(floor, color=color, linestyle=":", label=f"{name}optimal filter")
    # A likelihood has no natural zero, so only an MSE is drawn on a logarithmic axis.
    ax.set(ylabel=MEASURES[measure][0], yscale="log" if measure == "mse" else "linear", title="Loss")


def excess_curves(ax, rows, horizons, measure):
    _, column, _, ylabel = MEASURES[measure]
    epochs = [row["epoch"] for row in rows]
    for k, color in zip(horizons, figures.run_colors(len(horizons)), strict=True):
        excess = [row[f"{column}_{k}"] for row in rows]
        if None not in excess:  # the filter's likelihood is known one step ahead only
            ax.plot(epochs, excess, color=color, label=f"horizon {k}")
    ax.set(ylabel=f"validation {ylabel}", yscale="log", title="Excess over the optimal filter")


def epoch_axis(ax, first, last):
    """An axis of epochs from the first to the last, with ticks at the first one and at round numbers."""
    step = next(round_number * 10**power for power in range(10) for round_number in (1, 2, 5)
                if last - first < 9 * round_number * 10**power)
    ax.set(xlabel="epoch", xlim=(first, last) if last > first else (first - 0.5, first + 0.5),
           xticks=[first, *(tick for tick in range(step, last + 1, step) if tick - first >= step / 2)])


def learning_rate(ax, rows):
    """The learning rate at the end of each epoch, in grey behind the curves of `ax`, on an axis at its right."""
    right = ax.twinx()
    right.plot([row["epoch"] for row in rows], [row["lr"] for row in rows], color="0.6", linewidth=0.8,
               marker="o" if len(rows) == 1 else None)
    right.set(ylim=(0, None))
    right.set_ylabel("learning rate", color="0.5")
    right.tick_params(axis="y", colors="0.5")
    right.ticklabel_format(axis="y", scilimits=(-2, 2))
    right.set_zorder(ax.get_zorder() - 1)
    ax.patch.set_visible(False)


def loss_handles(rows, horizons, measures, best, has_floor):
    """The entries of the loss figure's legend: each horizon with its excess, then what the kinds of lines mean."""
    line = figures.Line2D
    handles = []
    for k, color in zip(horizons, figures.run_colors(len(horizons)), strict=True):
        label = f"horizon {k}"
        for measure in measures:
            _, column, unit, _ = MEASURES[measure]
            excess = [row.get(f"{column}_{k}") for row in rows]
            if None not in excess:
                digits = 2 if measure == "mse" else 4
                label += f"\n{min(excess):.{digits}f}{unit} at best, {excess[-1]:.{digits}f}{unit} at the end"
        handles.append(line([], [], color=color, label=label))
    handles += [line([], [], color="0.3", alpha=0.4, label="training"), line([], [], color="0.3", label="validation")]
    if has_floor:
        handles.append(line([], [], color="0.3", linestyle=":", label="optimal filter"))
    return [*handles, line([], [], color="0.6", linestyle="--", linewidth=1, label=f"best epoch ({best:,})"),
            line([], [], color="0.6", linewidth=0.8, label="learning rate")]


STEPS_SHOWN = 512  # at most, in the figure of a window


def draw_predictions(files, model, series, val_starts, seq_len, name):
    """{path: Figure} of three validation windows, evenly spread; model: on the data themselves, in eval mode.

    files: as from `files_of`; val_starts: the first steps of all validation windows; name: the run's, for the titles.
    """
    first_steps = val_starts[np.linspace(0, len(val_starts) - 1, 3).round().astype(int)]
    x = dataset.gather(series.X, first_steps, seq_len)
    predictions = model(x.to(next(model.parameters()).device))["1"][:, :-1].cpu().numpy()  # number t - 1 is of x[:, t]
    x, shown, drawn = x.numpy(), min(seq_len - 1, STEPS_SHOWN), {}
    for i, end in enumerate((first_steps + seq_len).tolist()):
        states = None if series.states is None else series.states[end - shown:end]
        drawn[files[f"prediction_{i}"]] = draw_prediction(
            x[i, -shown:], predictions[i, -shown:], states, series.n_circles, end - shown,
            f"{name}: next-step prediction, validation window {i}")
    return drawn


@cli.in_style
def draw_prediction(window, prediction, states, n_circles, start, title):
    """One validation window: its circles, data, next-step prediction, and error (prediction minus data).

    window, prediction: (time, feature_dim); states: (time,), or None without labels; all for the same time steps, from
    `start` on.
    """
    fig, axes = figures.new_figure(4, 1, (9, 1.9), title, sharex=True,
                                   gridspec_kw={"height_ratios": [0.25, 1, 1, 1]})
    if states is None:
        figures.leave_out(axes[0, 0])
    else:
        figures.state_strip(axes[0, 0], states, n_circles, start)
        figures.circle_legend(fig, n_circles, sorted(set(states.tolist())))
    high = float(np.percentile(np.abs(window), 99))
    for ax, values, name in ((axes[1, 0], window, "data"), (axes[2, 0], prediction, "predicted"),
                             (axes[3, 0], prediction - window, "error")):
        figures.heatmap_panel(fig, ax, values, start, f"{name}\nfeature", cmap="RdBu_r", limits=(-high, high),
                              unit="data units")
    axes[3, 0].set_xlabel("time step")
    return fig
