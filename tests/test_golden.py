"""Golden numbers at a fixed seed on a CPU: what the generator draws, what training reaches, and the measures.

Whole numbers are compared by hash: NumPy's and PyTorch's random streams and whole-number arithmetic are the same on
every machine. Floating-point numbers are not, to the last bit: sine, exp, QR and matrix products round differently from
one CPU, BLAS or thread count to the next. So the series is compared by projections that every number enters, to 1e-6
of their size: 10 roundings of float32, and far less than a change of the process would make. The curves of float32
training are compared to 3e-5: one or two threads, the native kernel or the reference loop, and libraries with or
without AVX agree to 2e-7, while other initial weights change the curves by 1e-1. There is no dropout in the run, as its
random stream depends on how torch was built.

A change that means to change these numbers replaces them: `python tests/test_golden.py` writes golden.json anew.
"""

import csv
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

TRAINING = ["--d-model", "16", "--n-layers", "2", "--d-state", "4", "--d-ff", "16", "--seq-len", "64", "--stride", "64",
            "--batch-size", "8", "--epochs", "4", "--warmup-epochs", "1", "--lr", "0.01", "--dropout", "0",
            "--max-horizon", "4", "--device", "cpu", "--seed", "3"]
GOLDEN_FILE = Path(__file__).parent / "golden.json"


def series_numbers(data_dir):
    """(hash of the whole numbers, projections of the floating-point ones) of a data set."""
    import dataset

    series = dataset.load_series(data_dir)
    digest = hashlib.sha256()
    for array in (series.states, series.process.periods, np.array(series.X.shape)):
        digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    waves = np.cos(np.outer([0.1, 1.7], np.arange(series.n_steps)))
    values = {"X": np.asarray(series.X, dtype=np.float64),
              "position": np.stack([np.cos(series.thetas), np.sin(series.thetas)], axis=1)}
    projections = {name: (waves @ value / series.n_steps).ravel().tolist() for name, value in values.items()}
    for name in ("radii", "entry_angles"):
        projections[name] = getattr(series.process, name).tolist()
    projections["transition_matrix"] = (series.process.transition_matrix @ np.arange(series.n_circles)).tolist()
    return digest.hexdigest(), projections


def training_numbers(folder):
    """The curves in a run's log: {column: value of each epoch}."""
    with open(folder / "golden_log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {column: [float(row[column]) for row in rows] for column in rows[0] if column not in ("epoch", "seconds")}


def run_training(folder, data_dir, *more):
    import masked_model_gpu_mamba_next as training

    argv = [*TRAINING, "--data-dir", str(data_dir), "--checkpoint", str(folder / "golden.pt"), *more]
    training.main(training.parse_args(argv))
    return training_numbers(folder)


def measured_dimension(data_dir):
    """The Levina-Bickel dimension of the series, with 5 and 20 neighbours."""
    import dataset
    import estimate_dimension

    return list(estimate_dimension.levina_bickel(dataset.load_series(data_dir).X, [5, 20]).values())


def gate_numbers(data_dir):
    """What the gates of an untrained model do with the start of the series: the mean and the mean square of each of
    their signals, layer by layer, and the predictions' mean square. A step size 1 % off moves them by about as much."""
    import torch

    import dataset
    from mamba_model import CausalTimeSeriesMamba

    torch.manual_seed(3)
    model = CausalTimeSeriesMamba(6, 32, 2, 4, d_ff=16, max_horizon=2).eval()
    x = torch.from_numpy(dataset.load_series(data_dir).X[None, :256].copy())
    numbers = {}
    with torch.no_grad():
        inputs = [model.input_proj(x), *model.layer_outputs(x)]
        for i, (layer, h) in enumerate(zip(model.layers, inputs, strict=False), start=1):
            for name, values in layer.mamba.signals(layer.norm(h)).items():
                numbers[f"layer {i}, {name}"] = [values.double().mean().item(), values.double().square().mean().item()]
        for k, prediction in model(x).items():
            numbers[f"prediction {k}"] = [prediction.double().mean().item(), prediction.double().square().mean().item()]
    return numbers


def all_numbers(folder, data_dir):
    digest, projections = series_numbers(data_dir)
    return {"hash": digest, "series": projections, "training": run_training(folder, data_dir),
            "dimension": measured_dimension(data_dir), "gates": gate_numbers(data_dir)}


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))


def test_the_series(shared_data, golden):
    digest, projections = series_numbers(shared_data)
    assert digest == golden["hash"]
    assert projections.keys() == golden["series"].keys()
    for name, values in projections.items():
        size = np.abs(golden["series"][name]).max()
        assert values == pytest.approx(golden["series"][name], rel=0, abs=1e-6 * size), name


@pytest.mark.parametrize("scan", ["cpu", "reference"])
def test_the_curves_of_a_training_run(shared_data, tmp_path, golden, scan):
    curves = run_training(tmp_path, shared_data, "--scan", scan)
    assert curves.keys() == golden["training"].keys()
    for column, values in curves.items():
        # The excess is a ratio near 1 minus 1: its error is that of the ratio.
        size = [100 + v if column.startswith("excess") else v for v in golden["training"][column]]
        for value, expected, scale in zip(values, golden["training"][column], size, strict=True):
            assert value == pytest.approx(expected, rel=0, abs=3e-5 * scale), column


def test_the_gates_of_an_untrained_model(shared_data, golden):
    numbers = gate_numbers(shared_data)
    assert numbers.keys() == golden["gates"].keys()
    for name, values in numbers.items():
        size = golden["gates"][name][1] ** 0.5
        assert values == pytest.approx(golden["gates"][name], rel=0, abs=1e-4 * max(size, size**2)), name


def test_the_dimension(shared_data, golden):
    assert measured_dimension(shared_data) == pytest.approx(golden["dimension"], rel=1e-4)


if __name__ == "__main__":
    import sys

    sys.path[:0] = [str(Path(__file__).parents[1])]
    from conftest import TINY_DATA

    import markov_circles_timeseries as generator

    with tempfile.TemporaryDirectory() as name:
        generator.main(generator.parse_args([*TINY_DATA, "--data-dir", name]))
        GOLDEN_FILE.write_text(json.dumps(all_numbers(Path(name), name), indent=1) + "\n", encoding="utf-8")
