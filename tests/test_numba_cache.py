"""Numba's cache costs a compilation where it can't be used, and never the command."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from numba.core import caching, config

import cli
from kernels import numba_cache

REPO = Path(__file__).resolve().parent.parent
SOURCE = """
import numba

@numba.njit(cache=True)
def double(x):
    return 2 * x

@numba.njit("int64(int64)", cache=True)
def triple(x):
    return 3 * x

@numba.vectorize(cache=True)
def quadruple(x):
    return 4 * x
"""


@pytest.fixture
def load(tmp_path):
    """A function that imports SOURCE anew, as umap is imported, and checks that its functions work."""
    path = tmp_path / "lib" / "somebody_elses.py"
    path.parent.mkdir()
    path.write_text(SOURCE)

    numba_cache.install()

    def load():
        spec = importlib.util.spec_from_file_location("somebody_elses", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.double(4) == 8 and module.triple(5) == 15
        assert module.quadruple(np.arange(3)).tolist() == [0, 4, 8]
        return module

    load.cache = path.parent / "__pycache__"
    return load


def hits(module):
    return [sum(function.stats.cache_hits.values()) for function in (module.double, module.triple)]


def files(folder):
    return {path.name: path.read_bytes() for pattern in ("*.nbi", "*.nbc") for path in folder.rglob(pattern)}


def test_functions_are_kept_and_found(load):
    assert hits(load()) == [0, 0]
    assert len(files(load.cache)) == 6
    assert hits(load()) == [1, 1]


def damages(content):
    yield b""
    yield content[: len(content) // 2]
    yield b"\0" * len(content)
    yield b"garbage" * 20
    middle = len(content) // 2
    yield content[:middle] + bytes(64) + content[middle + 64 :]  # a hole: machine code that would be executed


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_damaged_files_cost_a_compilation_and_are_replaced(load, kind):
    load()
    paths = sorted(load.cache.glob(f"*.{kind}"))
    for contents in zip(*(damages(path.read_bytes()) for path in paths), strict=True):
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        assert hits(load()) == [0, 0]
        assert hits(load()) == [1, 1]


def test_a_folder_in_the_place_of_a_file(load):
    load()
    for path in load.cache.glob("*.nb?"):
        path.unlink()
        path.mkdir()
    assert hits(load()) == hits(load()) == [0, 0]


def test_a_full_disk_costs_the_cache_only(load, monkeypatch):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "_open_for_write", full)
    assert hits(load()) == hits(load()) == [0, 0]
    assert files(load.cache) == {}


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No place beside the source, and none in the home; returns the temporary folder."""
    for locator in (caching.InTreeCacheLocator, caching._CacheLocator):
        ensure = locator.ensure_cache_path

        def refuse(self, ensure=ensure):
            if not self.get_cache_path().startswith(str(tmp_path / "temporary")):
                raise PermissionError("read-only")
            ensure(self)

        monkeypatch.setattr(locator, "ensure_cache_path", refuse)
    monkeypatch.setattr(config, "CACHE_DIR", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


def test_the_last_resort_is_a_folder_of_this_user_alone(load, nowhere):
    assert hits(load()) == [0, 0]
    (folder,) = nowhere.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700 and len(files(folder)) == 6
    assert hits(load()) == [1, 1]


def test_a_folder_that_others_can_write_to_is_not_taken(load, nowhere):
    folder = Path(cli.private_folder())
    folder.chmod(0o777)
    assert hits(load()) == hits(load()) == [0, 0]
    assert list(folder.iterdir()) == []


def test_no_place_at_all(load, nowhere):
    nowhere.rmdir()
    nowhere.write_text("a file")
    assert hits(load()) == hits(load()) == [0, 0]


def test_without_a_home_no_folder_named_tilde(load, nowhere, monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(nowhere)
    load()
    assert not (nowhere / "~").exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0 or not shutil.which("setpriv"),
                    reason="takes another user's rights, which only root can")
def test_a_read_only_checkout_of_a_user_without_a_home():
    """As in a container: the process can write nowhere but in the temporary folder, and then not even there."""
    with tempfile.TemporaryDirectory() as folder:
        checkout, temporary = Path(folder, "checkout"), Path(folder, "temporary")
        shutil.copytree(REPO / "kernels", checkout / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPO / "cli.py", checkout)
        (checkout / "somebody_elses.py").write_text(SOURCE)
        temporary.mkdir()
        subprocess.run(["chmod", "-R", "u=rwX,go=rX", folder], check=True)
        code = "import kernels.numba_cache, somebody_elses as module; print(module.double(4), module.quadruple(1.0))"
        environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "NUMBA_CACHE_DIR")}
        for mode in (0o777, 0o755):
            temporary.chmod(mode)
            done = subprocess.run(
                ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", sys.executable, "-c", code],
                cwd=checkout, env={**environment, "TMPDIR": str(temporary)}, capture_output=True, text=True)
            assert (done.returncode, done.stdout) == (0, "8 4.0\n"), done.stderr
        assert [path.name for path in temporary.iterdir()] == ["mambasynth-12345"]
        assert len(files(temporary)) == 6
