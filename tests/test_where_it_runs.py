"""Terminals, interpreters and notebooks that differ from the developer's."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import only

import cli

REPO = Path(cli.__file__).parent
SCRIPTS = sorted(path.stem for path in REPO.glob("*.py") if "\ndef parse_args(" in path.read_text(encoding="utf-8"))
FOREIGN_BACKEND = {"MPLBACKEND": "module://matplotlib_inline_that_is_not_here.backend_inline"}


def python(*words, shell_end="", **environment):
    """Python as a shell would start it; shell_end: redirections such as `>&-`."""
    command = f"{shlex.join((sys.executable, *words))} {shell_end}"
    return subprocess.run(["sh", "-c", command], cwd=REPO, env={**os.environ, **environment}, capture_output=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_on_a_terminal_that_knows_ascii_only_without_docstrings(name):
    done = python("-OO", f"{name}.py", "--help", PYTHONIOENCODING="ascii", **FOREIGN_BACKEND)
    assert done.returncode == 0 and b"usage: " in done.stdout and done.stderr == b""
    assert done.stdout.isascii()


def test_a_script_ends_well_with_closed_streams(shared_data, tmp_path):
    done = python("estimate_dimension.py", "--data-dir", str(shared_data), "--save-dir", str(tmp_path),
                  "--points", "99", "--k", "5", shell_end="<&- >&- 2>&-", **FOREIGN_BACKEND)
    assert done.returncode == 0, done.stderr
    # What was printed hasn't ended up in a file that was opened in the place of the closed stream.
    assert only(tmp_path, "dimension*.png").read_bytes().startswith(b"\x89PNG")
    assert only(tmp_path, "dimension*.json").read_text().startswith("{")


def test_a_line_of_stderr_does_not_need_stdout():
    done = python("estimate_dimension.py", "--nonsense", shell_end=">&-", PYTHONIOENCODING="cp437")
    assert done.returncode == 2 and done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1


def test_start_opens_closed_streams():
    code = "import cli; cli.start(); print('out'); import os; print(os.open('/dev/null', 0) > 2)"
    assert python("-c", code, shell_end="<&- 2>&-").stdout == b"out\nTrue\n"


def test_without_a_home_libraries_keep_their_caches_in_a_private_folder(tmp_path):
    code = "import os, cli; cli.start(); print(os.environ['MPLCONFIGDIR'], os.environ['TRITON_CACHE_DIR'])"
    others = {"HOME": "/nonexistent", "TMPDIR": str(tmp_path)}
    folder = tmp_path / f"mambasynth-{os.getuid()}"
    done = python("-c", code, MPLCONFIGDIR="mine", **others)
    assert done.stdout.split() == [b"mine", f"{folder}/triton".encode()]
    assert folder.stat().st_mode & 0o777 == 0o700


def test_importing_changes_nothing_that_a_notebook_has():
    """Every module and script, imported as a notebook does: style, signals, threads and environment stay."""
    modules = [*sorted(path.stem for path in REPO.glob("*.py")), "kernels.scan_cpu", "kernels.step_cpu"]
    code = f"""
import os, signal, matplotlib, torch
def state():
    return (dict(matplotlib.rcParams), [signal.getsignal(s) for s in signal.valid_signals()], torch.get_num_threads(),
            torch.get_num_interop_threads(), torch.get_default_dtype(), dict(os.environ))
before = state()
import importlib
for name in {modules}:
    importlib.import_module(name)
import figures
figures.new_figure()
assert [a == b for a, b in zip(before, state())] == [True] * 6, [a == b for a, b in zip(before, state())]
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr.decode()


def test_a_stdout_that_is_full_is_named():
    done = python("estimate_dimension.py", "--help", shell_end=">/dev/full")
    assert done.returncode != 0 or done.stderr == b""
    code = "import cli; cli.start(); cli.run(lambda args: print('x' * 10), None)"
    done = python("-c", code, shell_end=">/dev/full")
    assert done.returncode == 2 and done.stderr.startswith(b"error: can't write to stdout: No space left on device")


def test_a_lazy_module_is_the_module():
    code = ("import sys, cli; lazy = cli.imported_when_used('wave'); assert type(lazy).__name__ == '_LazyModule'; "
            "import wave; assert wave is lazy; print(wave.open.__name__, cli.imported_when_used('sys') is sys)")
    assert python("-c", code).stdout == b"open True\n"
