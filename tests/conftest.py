"""What the tests share: tiny data, tiny checkpoints, and a script run in this process as a shell would run it."""

import os

# One thread, here and in the processes that tests start: on arrays as small as theirs a second one only waits, and it
# takes a core from the test that runs beside. NumPy and torch read this when they are imported.
os.environ["OMP_NUM_THREADS"] = "1"

# isort: split
import base64
import contextlib
import importlib
import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cli
import figures
import mamba_model
import unseen

TINY_DATA = ["--no-umap", "--n-steps", "3000", "--n-circles", "4", "--ambient-dim", "6", "--min-period", "10",
             "--max-period", "40", "--dwell-mean", "80", "--dwell-std", "20", "--seed", "7"]
unseen.TEST_STEPS = 2_000  # of the test series, where a test says nothing else; a million would take half a minute
TINY_MODEL = {"d_model": 16, "n_layers": 2, "d_state": 4, "d_ff": 16}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Hide the GPU from every test that isn't marked `gpu`: the others test what happens on a CPU, on any machine."""
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("gpu") is None:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes that it starts
        return (yield)


ONE_PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQ"
                             "DwAEhQGAhKmMIQAAAABJRU5ErkJggg==")  # as a PNG


@pytest.fixture
def undrawn(request):
    """Figures are made and their files written, but with one pixel in each: to lay out and draw the four of a tiny
    training takes ten times as long as the training. A test that is marked `drawn` gets its figures all the same."""
    def save_all(figs):
        form, _ = cli.drawing_flags()
        paths = [Path(path).with_suffix(f".{form}") for path in figs]
        for path in paths:
            with cli.writing(path) as part:
                part.write_bytes(ONE_PIXEL)
            print(f"wrote {path}")
        return paths

    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("drawn") is None:
            patch.setattr(figures, "save_all", save_all)
        yield


@pytest.fixture
def two_threads():
    """Two threads for torch and the kernels, for tests of what threads could change."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def script(capfd):
    """A function: `script("generate", "--gen-len", 5)` runs that script's parse_args and main in this process, which
    saves the seconds that importing torch takes. It returns code, out and err as a shell would see them."""

    def run(name, *argv):
        capfd.readouterr()
        module, code = importlib.import_module(name), 0
        argv = [str(word) for word in argv]
        old_argv, sys.argv = sys.argv, [f"{name}.py", *argv]
        try:
            cli.run(module.main, module.parse_args(argv))
        except SystemExit as error:
            code = error.code or 0
        finally:
            sys.argv = old_argv
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.fixture
def refused(script):
    """Like `script`, for bad input: checks that the exit code is 2 and that stderr has one line, and returns it."""

    def run(name, *argv):
        result = script(name, *argv)
        assert result.code == 2, result
        assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
        return result.err

    return run


@pytest.fixture
def interrupted_after(monkeypatch):
    """`with interrupted_after(4):` a training that runs in the block gets a Ctrl-C in its fourth step."""
    import masked_model_gpu_mamba_next as training

    @contextlib.contextmanager
    def block(n_steps):
        make_step, taken = training.make_step, [0]

        def stopping(*args):
            step = make_step(*args)

            def watched(x):
                step(x)
                taken[0] += 1
                if taken[0] == n_steps:
                    signal.raise_signal(signal.SIGINT)

            return watched

        with monkeypatch.context() as patch:
            patch.setattr(training, "make_step", stopping)
            yield

    return block


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory):
    """A folder with a small series, made once; tests must not write to it."""
    import markov_circles_timeseries as generator

    folder = tmp_path_factory.mktemp("data")
    generator.main(generator.parse_args([*TINY_DATA, "--data-dir", str(folder)]))
    return folder


@pytest.fixture
def data_dir(shared_data, tmp_path):
    """A copy of the small series that the test may damage."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("data.npz", "config.json"):
        (folder / name).write_bytes((shared_data / name).read_bytes())
    return folder


@pytest.fixture
def rewrite_data(data_dir):
    """A function that replaces arrays of data.npz (None removes one) or entries of config.json; returns the folder."""

    def rewrite(config=None, **arrays):
        with np.load(data_dir / "data.npz") as file:
            content = {**{name: file[name] for name in file.files}, **arrays}
        np.savez(data_dir / "data.npz", **{name: a for name, a in content.items() if a is not None})
        if config is not None:
            old = json.loads((data_dir / "config.json").read_text())
            (data_dir / "config.json").write_text(json.dumps({**old, **config}))
        return data_dir

    return rewrite


@pytest.fixture
def tiny_checkpoint(tmp_path, shared_data):
    """The path of an untrained checkpoint that fits the small series, and says that it was trained on it."""
    torch.manual_seed(0)
    model = mamba_model.CausalTimeSeriesMamba(6, **TINY_MODEL)
    path = tmp_path / "tiny.pt"
    mamba_model.save_checkpoint(path, 1, model.state_dict(), {}, 1.0, 1.0,
                                {**TINY_MODEL, "seq_len": 128, "stride": 64, "val_fraction": 0.1, "dropout": 0.1,
                                 "data_dir": str(shared_data)})
    return path


def only(folder, pattern):
    """The only file of this pattern in the folder; names of files tell the data's folder, which pytest names."""
    (path,) = folder.glob(pattern)
    return path


def arrays_of(series):
    """The arrays of a dataset.Series under their names in data.npz."""
    long, short = ("X", "states", "thetas"), ("transition_matrix", "radii", "entry_angles", "periods", "planes")
    return {**{name: getattr(series, name) for name in long},
            **{name: getattr(series.process, name) for name in short}}


def relative_error(value, reference):
    return float((value - reference).norm() / reference.norm())
