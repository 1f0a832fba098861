"""What every script here shares at its edges: one way to parse flags, to report an error and to write a file.

Nothing slow is imported at the top, so that `--help` and a bad flag answer at once.
"""

import argparse
import contextlib
import difflib
import functools
import hashlib
import importlib.util
import os
import platform
import re
import signal
import stat
import sys
import zlib
from pathlib import Path

# While a script of this folder imports, which takes seconds, Ctrl-C ends it as it ends a program in C. `run` makes
# it an exception again. Where another program imports this module, signals stay as they are.
_IMPORTED_BY = getattr(sys.modules.get("__main__"), "__file__", None)
_ENDS_AT_ONCE = (_IMPORTED_BY is not None and Path(_IMPORTED_BY).resolve().parent == Path(__file__).resolve().parent
                 and signal.getsignal(signal.SIGINT) is signal.default_int_handler)
if _ENDS_AT_ONCE:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# How torch uses threads and memory on a CPU; it reads these once, when it is imported. See `start`.
TORCH_ENVIRONMENT = {
    # Threads that have nothing to do go to sleep at once, or with GNU's OpenMP after a fraction of a millisecond, which
    # bridges the gap between two operations. Otherwise they would keep the cores from the threads of the scan, which
    # alternate with them.
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "10000",
    # On Linux torch asks for huge pages. A training step allocates and frees about a hundred megabytes, which would be
    # tens of thousands of small pages.
    "THP_MEM_ALLOC_ENABLE": "1",
}

# The windows that a model is trained on unless flags say otherwise: steps per window, steps between the starts of two
# windows, and the share of the series, at its end, that is validation.
WINDOW_DEFAULTS = {"seq_len": 1024, "stride": 256, "val_fraction": 0.1}
# What ends a command from outside: Ctrl-C, a scheduler, a closed terminal, a scheduler's warning before it.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
# Flags of training that say how to compute, or that name files: two runs that differ in them alone differ in nothing.
WITHOUT_EFFECT = ("checkpoint", "resume", "eval", "device", "scan", "num_workers", "no_compile", "no_train_eval",
                  "log_dir", "format", "style")
# The back ends of the selective scan, as --scan names them (kernels/selective_scan.py has them), and what they were
# called formerly: old commands and checkpoints hold such names.
BACKENDS = ("auto", "cuda", "mamba-ssm", "cpu", "reference")
FORMER_BACKENDS = {"triton": "cuda"}
CHECKSUM_BYTES = 4  # behind the data in the files of `with_checksum`
SIGNALS = ("delta", "B", "C", "z")  # what a Mamba block computes from its input at every step: see mamba_model.py
# What goes on beside what a progress line says, such as "compiling kernels"; the first entry is shown behind it.
DOING = []
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """An error that the user can mend. It is shown as one line on stderr, without a traceback; the exit code is 2."""


def start():
    """Prepare the process of a script, before its flags are parsed and before torch or matplotlib is imported.

    Called only where a script is run: a notebook that imports the same file keeps its own streams and environment.
    """
    open_streams()
    for name, value in TORCH_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["MPLBACKEND"] = "Agg"  # a Jupyter terminal names a backend that may not be installed here
    home = os.path.expanduser("~")
    if not (os.path.isabs(home) and os.access(home, os.W_OK)):
        with contextlib.suppress(OSError):  # without any folder, each library does what it can
            folder = private_folder()
            os.environ.setdefault("MPLCONFIGDIR", os.path.join(folder, "matplotlib"))
            os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(folder, "triton"))


def open_streams():
    """Make stdout and stderr fit to be written to: a closed one (`>&-`) goes to nowhere, and a sign that the terminal's
    encoding doesn't know becomes a question mark."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # otherwise the next file to be opened would get this number, and what is printed with it
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
        if number and hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")


def private_folder():
    """A folder in the temporary directory that nobody but this user can read or write; made if needed.

    For caches of machine code, which is executed, where the user has no home. Raises OSError when it can't be had.
    """
    import tempfile

    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    folder = os.path.join(tempfile.gettempdir(), f"mambasynth-{user}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{folder} is no folder")
    if hasattr(os, "getuid") and (found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077):
        raise PermissionError(f"{folder} belongs to somebody else or can be changed by others")
    return folder


def with_checksum(data):
    """Bytes for a file of such a cache: damaged machine code would be executed, so its checksum stands behind it."""
    return data + zlib.crc32(data).to_bytes(CHECKSUM_BYTES, "little")


def without_checksum(data):
    """The bytes that `with_checksum` was given, or None where they or their checksum are damaged."""
    data, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    return data if zlib.crc32(data).to_bytes(CHECKSUM_BYTES, "little") == checksum else None


def run(main, args):
    """Run a script's `main(args)`; an error that the user can mend becomes one line on stderr and exit code 2."""
    if _ENDS_AT_ONCE and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with _running(args):
            main(args)
        sys.stdout.flush()  # here a full disk, or a reader that has left, can still be reported
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted; nothing half-written is left behind", EXIT_INTERRUPTED)
    except BrokenPipeError:
        silence_stdout()  # the reader of our output (`| head`) has left
        sys.exit(1)
    except OSError as error:
        # Files are written by `writing`, which says more. This is for the rest, such as stdout on a full disk.
        where = f"read or write {error.filename}" if error.filename else "read or write"
        try:
            print(end="" if error.filename else "\n", flush=True)  # only by writing can a full stdout be told
        except OSError:
            where = "write to stdout"
        fail(f"can't {where}: {error.strerror or one_line(error)}; free some space or check the path")
    except MemoryError as error:
        fail(f"out of memory ({one_line(error) or 'allocation failed'}); use smaller sizes")
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        fail("out of memory on the device; use a smaller --batch-size or --seq-len")


# The flags of the script that runs, for what all its files share: format and style of figures, and their origin.
_FLAGS = {}


@contextlib.contextmanager
def _running(args):
    _FLAGS.update(vars(args) if args is not None else {}, running=True)
    try:
        yield
    finally:
        _FLAGS.clear()


def drawing_flags():
    """--format and --style of the script that runs; ("png", None) in a notebook and in scripts without them."""
    return _FLAGS.get("format", "png"), _FLAGS.get("style")


@functools.cache
def git_commit():
    """The commit of this project's folder, with "-dirty" where files differ from it, or None when git doesn't know."""
    import subprocess

    try:
        described = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True,
                                   text=True, cwd=Path(__file__).parent, timeout=10)
        return described.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def reads_data(folder):
    """Remember the folder of the data that the running script reads, for `made_by`."""
    if _FLAGS:
        _FLAGS["data"] = folder


def made_by():
    """Where a file comes from, for its metadata: {"command": …, "commit": …, "data": …}; {} in a notebook."""
    import shlex

    if not _FLAGS:
        return {}
    data = _FLAGS.get("data") or _FLAGS.get("data_dir")
    return {"command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": git_commit(),
            "data": None if data is None else str(data)}


def fail(message, code=EXIT_BAD_INPUT):
    """Print `error: message` as one line on stderr and exit."""
    try:
        sys.stdout.flush()
    except OSError:
        silence_stdout()
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(code)


def imported_when_used(name):
    """The module `name`, which is executed only when something of it is first used.

    For a module that takes long to import in a script that imports everything on top, so that --help answers at once.
    """
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_style(draw):
    """Decorates a function that draws a Figure: the style of figures.py holds until the function returns."""

    @functools.wraps(draw)
    def drawn(*args, **kwargs):
        import matplotlib

        import figures

        with matplotlib.rc_context(figures.STYLE):
            return draw(*args, **kwargs)

    return drawn


def silence_stdout():
    """Point stdout to nowhere, so that the text in its buffer raises no error when Python flushes it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(message):
    """The message with every run of white space, line breaks included, as one blank."""
    return " ".join(str(message).split())


def n_cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count(n, noun, plural=None):
    """A number of things in words: "1 visit", "1,234 visits"."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message}{self.meant(message)}; see {self.prog} --help")

    def meant(self, message):
        """What a message on flags that don't exist adds: the flags whose names are nearest, if any are near."""
        unknown = [word.partition("=")[0] for word in str(message).partition("unrecognized arguments: ")[2].split()
                   if word.startswith("--")]
        near = [match for word in unknown
                for match in difflib.get_close_matches(word, self._option_string_actions, n=1, cutoff=0.75)]
        return f"; did you mean {' and '.join(near)}?" if near else ""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Adds each flag's default as it would be typed. A switch has none to show. Where the default is None, the flag's
    own help says what happens without it."""

    def _get_help_string(self, action):
        default = action.default
        if default is None or default is False or default is argparse.SUPPRESS:
            return action.help
        values = default if isinstance(default, list) else [default]
        return f"{action.help} (default: {' '.join(map(str, values))})"


def parser(doc):
    """An argument parser whose help is the script's docstring, with its `Examples:` moved to the end.

    A wrong flag ends the script with one line on stderr and exit code 2. Flags can't be abbreviated: a new flag would
    make old abbreviations ambiguous, and a command in a paper's appendix should mean the same next year.
    """
    description, _, examples = (doc or "").partition("Examples:")  # `python -OO` drops docstrings
    return _Parser(
        description=description.strip(),
        epilog=f"examples:{examples}".rstrip() if examples else None,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )


def _number(kind, accepts, wanted):
    """A `type` for argparse: text to a number of this kind that `accepts` says yes to; `wanted` describes it."""
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


def signals(text):
    """An argparse type: some of SIGNALS with commas between them, as in "delta,B"; returned in their order."""
    names = text.split(",")
    if not set(names) <= set(SIGNALS):
        raise argparse.ArgumentTypeError(f"{text!r} must be one or more of {','.join(SIGNALS)}, with commas between")
    return ",".join(name for name in SIGNALS if name in names)


def add_data_dir(group, of_checkpoint=False, own=True):
    """--data-dir and, where `own` recordings may take its place, --data; both give `data_dir`. of_checkpoint: without
    either, None, for the data that the checkpoint was trained on."""
    either = group.add_mutually_exclusive_group() if own else group
    either.add_argument("--data-dir", type=Path, default=None if of_checkpoint else Path("data"), metavar="DIR",
                        help="folder with data.npz and config.json"
                             + (" (default: the data that the model was trained on)" if of_checkpoint else ""))
    if own:
        either.add_argument("--data", type=Path, dest="data_dir", default=argparse.SUPPRESS, metavar="FILE",
                            help="your own recordings in place of --data-dir: a .npy, .npz, .csv or .tsv file with one "
                                 "row per time step, FILE.npz:NAME,NAME for some of its arrays, or a folder of such "
                                 "files (default: none)")


def add_save_dir(group, default="plots"):
    group.add_argument("--save-dir", type=Path, default=Path(default), metavar="DIR",
                       help="folder for figures and tables, made if needed")


def add_test_steps(group):
    group.add_argument("--test-steps", type=non_negative_int, metavar="N", help="steps of the test series, on which "
                       "results are measured; 0: none (default: 1,000,000, newly drawn; of data whose process isn't "
                       "known half of the validation part, the last)")


def add_drawing(parser):
    """The group of flags of every script that draws: --format and --style."""
    group = parser.add_argument_group("figures")
    group.add_argument("--format", default="png", choices=["png", "pdf", "svg"], help="file format of the figures")
    group.add_argument("--style", choices=["paper", "talk"],
                       help="paper: at most 7 inches wide; talk: as large as a slide of 13.3 x 7.5 inches; no text "
                            "is below 8 points, or 14.5 on a slide (default: the size that suits a screen)")


def add_seed(group):
    group.add_argument("--seed", type=seed, default=42, metavar="N", help="random seed")


def add_device(group):
    group.add_argument("--device", default="auto", metavar="NAME",
                       help="auto (CUDA when there is a GPU), cpu, cuda or cuda:N")


def add_scan(group):
    group.add_argument("--scan", default="auto", choices=BACKENDS, type=backend_name,
                       help="back end of the selective scan; auto: cuda on a GPU, cpu elsewhere")


def backend_name(name):
    """The name that a back end of the scan has today."""
    return FORMER_BACKENDS.get(name, name)


def add_computing(parser):
    """The group of flags that say how to compute: --seed, --device and --scan."""
    group = parser.add_argument_group("computing")
    add_seed(group)
    add_device(group)
    add_scan(group)


def pick_device(name):
    """`--device` as a torch.device. Raises UserError when this machine has no such device."""
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
            raise UserError(f"--device {name} is beyond the {count(torch.cuda.device_count(), 'GPU')} here, counted "
                            "from 0")
    return device


def output_folder(path):
    """Make the folder `path`, and check that files can be made in it before work is spent; returns it as a Path.

    Also removes half-written files that a killed process of this machine left in it. Raises UserError.
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
    """The path to write to before a file is whole: beside it, hidden, with the same suffix (savefig and np.savez look
    at it), and named after machine and process, since several may share the folder."""
    return path.with_name(f".{path.stem}.{_host()}.{os.getpid()}.part{path.suffix}")


def _host():
    return re.sub(r"\W", "-", platform.node()) or "localhost"


def remove_leftovers(folder):
    """Remove half-written files in `folder` whose process, on this machine, has ended (kill -9, a power cut)."""
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
        pass  # another user's process, or a number that is no process id: leave the file alone
    return True


@contextlib.contextmanager
def writing(path):
    """Gives a temporary path beside `path` to write to; the file becomes `path` only if the block ends well.

    So a file is whole or not there, and an older file stays until the new one is complete, even through a power cut.
    Raises UserError when the disk is full or the folder can't be written to.
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or one_line(error)}; "
                        "free some space or choose another folder") from None
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone, and the first error is the one to report
            temporary.unlink(missing_ok=True)


def flags_in_name(parser, args, without=()):
    """The parts of a file's name that say which flags have an effect and aren't the default, like `seed2`."""
    parts = []
    defaults = {action.dest: parser._get_value(action, action.default) if isinstance(action.default, str)
                else action.default for action in parser._actions}
    for name, value in vars(args).items():
        if name not in defaults or name in (*WITHOUT_EFFECT, *without) or value == defaults[name]:
            continue
        if name == "data_dir":  # of training, which refuses a name that is taken: it needs no hash
            parts += [word for word in [data_name(value, plain_in=Path(value).parent)] if word]
        else:
            parts.append(name if value is True else f"{name}{value_name(value)}")
    return parts


def flag_of(name):
    """The flag as it is typed, of its name in the Namespace."""
    return f"--{name.replace('_', '-')}"


def value_name(value):
    """A number, or several, as short as it can be without another value getting the same name."""
    if isinstance(value, list | tuple):
        return "-".join(map(value_name, value))
    if isinstance(value, str):
        return re.sub(r"[^\w.-]+", "-", value)
    short = f"{value:g}"
    return short if float(short) == value else repr(value).removesuffix(".0")


def named_after(name, parser, args, without=()):
    """The stem of a file's name: `name`, what `flags_in_name` adds, and what `data_name` does: so commands that differ
    in what changes the result never write the same file."""
    is_file = RECORDING.search(str(args.data_dir))
    parts = [*flags_in_name(parser, args, ("save_dir", "data_dir", *without)),
             data_name(args.data_dir, plain_in="." if is_file else "data")]
    return short_name("_".join([name, *filter(None, parts)]))


RECORDING = re.compile(r"\.(npy|npz|csv|tsv)(?=$|:)", re.IGNORECASE)  # the ending of a file, or before its arrays


def data_name(data_dir, default="data", plain_in="data"):
    """What data are called in the names of files: nothing where they are those of the folder `default`, otherwise by
    the name of their file or folder, or of a folder that is called data, too, by that of the folder around it.

    A short hash of the full path follows, which tells /a/songs from /b/songs, unless they lie in the folder `plain_in`.
    """
    path = Path(os.path.abspath(data_dir))
    if path == Path(os.path.abspath(default)):
        return ""
    name = re.sub(r"[^\w.-]+", "-", path.parent.name if path.name == "data" else path.name) or "data"
    if path.parent == Path(os.path.abspath(plain_in)):
        return name
    return f"{name}-{hashlib.sha256(str(path).encode()).hexdigest()[:4]}"


def short_name(name, longest=108):
    """A file name's stem as it is, or, where it is too long for a file name, cut and ended by a hash of all of it."""
    if len(name) <= longest:
        return name
    return f"{name[:longest]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def write_text(path, text):
    """Write a text file, whole or not at all."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, report, **options):
    """Write a dict as a JSON file, whole or not at all; "made_by" in it tells command, commit and data. The options
    are json.dumps's."""
    import json

    origin = {"made_by": made_by()} if made_by() else {}
    write_text(path, json.dumps({**report, **origin}, indent=2, **options) + "\n")


def table(header, rows, align=None):
    """A plain text table, as one string. header: a list of titles; rows: lists of cells, already formatted.

    The first column is left-aligned, the others right-aligned, unless `align` (one letter l or r per column) says
    otherwise.
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
