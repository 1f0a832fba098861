"""What every script here shares at its edges: one way to parse flags, to report an error and to write a file.

No heavy import at the top, so that `--help` and a bad flag answer at once.
"""

import argparse
import contextlib
import os
import platform
import re
import sys
from pathlib import Path

# How torch runs on a CPU, read when it is imported. Its threads sleep when they have nothing to do (GNU's after a
# fraction of a millisecond, the gap between two operations): the scan's own, which alternate with them, need the cores.
# What it allocates lies in huge pages (Linux): a step of training asks for a hundred megabytes and gives them back, as
# tens of thousands of small pages otherwise.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# The windows that a model is trained on unless flags say otherwise: steps per window, steps between the starts of two
# windows, and the share of the series, at its end, that is validation.
WINDOW_DEFAULTS = {"seq_len": 1024, "stride": 256, "val_fraction": 0.1}
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Something the user can mend. Shown as one line on stderr, exit code 2, no traceback."""


def run(main, args):
    """Run a script's `main(args)` and turn what the user can mend into one line on stderr and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without our signs, a file's odd name: no reason to end
    try:
        main(args)
        sys.stdout.flush()  # here, where a full disk or a reader that has left can still be told of
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted; nothing half-written is left behind", EXIT_INTERRUPTED)
    except BrokenPipeError:
        silence_stdout()  # the reader of our output (`| head`) has left
        sys.exit(1)
    except OSError as error:
        # Files are written by `writing`, which says more; what gets here is stdout on a full disk and the like.
        where = f" {error.filename}" if error.filename else ""
        fail(f"can't read or write{where}: {error.strerror or one_line(error)}; free some space or check the path")
    except MemoryError as error:
        fail(f"out of memory ({one_line(error) or 'allocation failed'}); use smaller sizes")
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        fail("out of memory on the device; use a smaller --batch-size or --seq-len")


def fail(message, code=EXIT_BAD_INPUT):
    """Print `error: message` as one line on stderr and exit."""
    try:
        sys.stdout.flush()
    except OSError:
        silence_stdout()
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(code)


def silence_stdout():
    """Point stdout elsewhere, so that what it still holds raises nothing at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(message):
    return " ".join(str(message).split())


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message}; see {self.prog} --help")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Adds each flag's default as it would be typed. A switch has none to show; where leaving a flag out means more
    than a value, its help says so itself."""

    def _get_help_string(self, action):
        default = action.default
        if default is None or default is False or default is argparse.SUPPRESS:
            return action.help
        values = default if isinstance(default, list) else [default]
        return f"{action.help} (default: {' '.join(map(str, values))})"


def parser(doc):
    """An argument parser whose help is the script's docstring, its `Examples:` moved to the end.

    A wrong flag ends with one line on stderr and exit code 2; flags can't be abbreviated, so that a script in
    a paper's appendix means the same next year.
    """
    description, _, examples = doc.partition("Examples:")
    return _Parser(
        description=description.strip(),
        epilog=f"examples:{examples}".rstrip(),
        formatter_class=_Formatter,
        allow_abbrev=False,
    )


def _number(kind, accepts, wanted):
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return convert


INFINITY = float("inf")
LARGEST_INT = 10**30  # beyond all use, and small enough to be divided as a float
positive_int = _number(int, lambda v: 0 < v <= LARGEST_INT, "a whole number above 0 (and not above 1e30)")
non_negative_int = _number(int, lambda v: 0 <= v <= LARGEST_INT, "a whole number, 0 or more (and not above 1e30)")
positive_float = _number(float, lambda v: 0 < v < INFINITY, "a number above 0")
non_negative_float = _number(float, lambda v: 0 <= v < INFINITY, "a number, 0 or more")
seed = _number(int, lambda v: 0 <= v < 2**32, "a whole number from 0 to 4294967295")
fraction = _number(float, lambda v: 0 < v < 1, "a number between 0 and 1 (both excluded)")
probability = _number(float, lambda v: 0 <= v < 1, "a number from 0 up to, not including, 1")


def add_data_dir(group):
    group.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR",
                       help="folder with data.npz and config.json")


def add_save_dir(group, default="plots"):
    group.add_argument("--save-dir", type=Path, default=Path(default), metavar="DIR",
                       help="folder for figures and tables, made if needed")


def add_seed(group):
    group.add_argument("--seed", type=seed, default=42, metavar="N", help="random seed")


def add_device(group):
    group.add_argument("--device", default="auto", metavar="NAME",
                       help="auto (CUDA when there is a GPU), cpu, cuda or cuda:N")


def add_scan(group):
    group.add_argument("--scan", default="auto", choices=["auto", "triton", "mamba-ssm", "cpu", "reference"],
                       help="back end of the selective scan; auto: triton on a GPU, cpu elsewhere")


def add_computing(parser):
    """The group of flags that say how to compute: --seed, --device and --scan."""
    group = parser.add_argument_group("computing")
    add_seed(group)
    add_device(group)
    add_scan(group)


def pick_device(name):
    """`--device` as a torch.device. Raises UserError when it isn't there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is no device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: no CUDA GPU is usable here; use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name}: there are only {torch.cuda.device_count()} GPUs, counted from 0")
    return device


def output_folder(path):
    """Make the folder `path` and check that files can be made in it, before any work is spent.

    Also removes what a killed run of this machine left half-written in it.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = _beside(path / "probe")
        probe.touch()
        probe.unlink()
        remove_leftovers(path)
    except OSError as error:
        raise UserError(f"can't write to folder {path}: {error.strerror}; choose another folder") from None
    return path


def _beside(path):
    # Hidden, same suffix (savefig and np.savez read it), one name a process: machines may share the folder.
    return path.with_name(f".{path.stem}.{_host()}.{os.getpid()}.part{path.suffix}")


def _host():
    return re.sub(r"\W", "-", platform.node()) or "localhost"


def remove_leftovers(folder):
    """Remove the half-written files in `folder` of processes of this machine that are no more (kill -9, power cut)."""
    pattern = re.compile(rf"\..*\.{re.escape(_host())}\.(\d+)\.part(\.[^.]*)?")
    for path in folder.iterdir():
        match = pattern.fullmatch(path.name)
        if match and not _alive(int(match[1])):
            path.unlink(missing_ok=True)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass  # another user's, or no process id at all: not ours to judge
    return True


@contextlib.contextmanager
def writing(path):
    """Give a path beside `path` to write to; it becomes `path` only if the block ends well.

    So a file is whole or not there, and an older file stays until the new one is complete; after a power cut too.
    Raises UserError when the disk is full or the folder can't be written to.
    """
    path = Path(path)
    part = _beside(path)
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or one_line(error)}; "
                        "free some space or choose another folder") from None
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone; the first error is the one to tell
            part.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file, whole or not at all."""
    with writing(path) as part:
        part.write_text(text, encoding="utf-8")


def table(header, rows, align=None):
    """A plain text table: `header` a list of titles, `rows` lists of already formatted cells.

    Columns are right-aligned but for the first; `align` (a string of l and r) says otherwise.
    """
    rows = [[str(cell) for cell in row] for row in [header, *rows]]
    align = align or "l" + "r" * (len(header) - 1)
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if a == "l" else cell.rjust(w)
                 for cell, w, a in zip(row, widths, align, strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)
