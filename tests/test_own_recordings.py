"""A user's own recordings: files of every kind, several at once, without labels and process, scaled; and that nothing
of theirs is ever overwritten."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import TINY_DATA, only

import cli
import dataset
import figures
import generate
import mamba_model
import markov_circles_timeseries as generator
import masked_model_gpu_mamba_next as training
import measures
import optimal_filter
import representations
import visualize_gates

pytestmark = pytest.mark.usefixtures("undrawn")

NAME = "masked_model_gpu_mamba_next"
TINY = ["--d-model", 8, "--n-layers", 2, "--d-state", 4, "--d-ff", 8, "--seq-len", 32, "--stride", 16, "--batch-size",
        8, "--epochs", 2, "--warmup-epochs", 0, "--no-train-eval", "--val-fraction", 0.3]
SAY_SO = ("no optimal floor", "no labels", "no song analysis")


def waves(n_steps, n_features=3, seed=0, offset=0.0):
    """Noisy sines whose features have the most different scales."""
    rng, t = np.random.default_rng(seed), np.arange(n_steps)[:, None]
    scales = 10.0 ** np.arange(n_features)
    return scales * (np.sin(t * (0.1 + 0.05 * np.arange(n_features))) + 0.1 * rng.standard_normal(
        (n_steps, n_features))) + offset * scales


@pytest.fixture
def two(tmp_path):
    """Two recordings of 300 and 200 steps as an npz, and as a folder of text tables."""
    parts = waves(300), waves(200, seed=1)
    np.savez(tmp_path / "two.npz", *parts)
    folder = tmp_path / "tables"
    folder.mkdir()
    np.savetxt(folder / "a.csv", parts[0], delimiter=",", header="x,y,z", comments="", fmt="%.9g")
    np.savetxt(folder / "b.tsv", parts[1], delimiter="\t", fmt="%.9g")
    return parts


# ---- reading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float64", "float32", "float16", "int16", "uint8", ">f8"])
def test_X_alone_is_a_valid_file(tmp_path, kind):
    X = (10 + waves(50)[:, :2]).astype(kind)
    np.savez(tmp_path / "data.npz", X=X)
    series = dataset.load_series(tmp_path)
    np.testing.assert_array_equal(series.X, X.astype(np.float32))
    assert series.X.dtype == np.float32 and series.X.flags.c_contiguous
    assert (series.states, series.thetas, series.process, series.n_circles, series.config) == (None,) * 4 + ({},)
    assert series.recordings.tolist() == [[0, 50]] and (series.n_steps, series.feature_dim) == (50, 2)


def test_a_config_beside_X_alone_is_of_other_data(data_dir):
    np.savez(data_dir / "data.npz", X=waves(50))
    assert dataset.load_series(data_dir).config == {}


@pytest.mark.parametrize("labels, numbers, told", [
    ([0, 1, 1, 2], [0, 1, 1, 2], None), ([7, 7, -1, 3], [2, 2, 0, 1], "labels: 0 is -1, 1 is 3, 2 is 7"),
    (["b", "a", "b", "c"], [1, 0, 1, 2], "labels: 0 is a, 1 is b, 2 is c"), ([5] * 4, [0] * 4, "labels: 0 is 5")])
def test_labels_are_numbered(tmp_path, capsys, labels, numbers, told):
    np.savez(tmp_path / "data.npz", X=waves(4), states=np.array(labels))
    series = dataset.load_series(tmp_path)
    assert series.states.tolist() == numbers and series.n_circles == max(numbers) + 1
    assert capsys.readouterr().out == (f"{told}\n" if told else "")


@pytest.mark.parametrize("states, words", [
    (np.zeros(5, int), "states must have shape \\(4,\\), not \\(5,\\)"), (np.zeros(4), "must hold labels"),
    (np.zeros((4, 1), int), "not \\(4, 1\\): one label per time step"),
    (np.zeros((4, 2), int), "not \\(4, 2\\): one label per time step"), (np.array(3), "not \\(\\)"),
    (np.array([None] * 4), "damaged or holds Python objects")])
def test_wrong_labels_are_refused(tmp_path, states, words):
    np.savez(tmp_path / "data.npz", X=waves(4), states=states)
    with pytest.raises(cli.UserError, match=words):
        dataset.load_series(tmp_path)


def test_too_many_labels_are_refused(tmp_path):
    np.savez(tmp_path / "data.npz", X=waves(1001), states=np.arange(1001))
    with pytest.raises(cli.UserError, match=r"1,001 different labels, and at most 1,000"):
        dataset.load_series(tmp_path)


def test_files_of_every_kind_hold_the_same(two, tmp_path):
    X = two[0].astype(np.float32)
    np.save(tmp_path / "a.npy", two[0])
    np.savez(tmp_path / "one.npz", recording=two[0])
    np.savetxt(tmp_path / "c.csv", two[0], delimiter=";", fmt="%.9g")
    (tmp_path / "bom.csv").write_text("\ufeff" + (tmp_path / "tables/a.csv").read_text().replace("\n", "\r\n"))
    for name in ("a.npy", "one.npz", "two.npz:arr_0", "tables/a.csv", "c.csv", "bom.csv"):
        series = dataset.load_series(tmp_path / name)
        np.testing.assert_allclose(series.X, X, rtol=1e-6, err_msg=name)
        assert series.recordings.tolist() == [[0, 300]]


@pytest.mark.parametrize("source", ["two.npz:arr_0,arr_1", "two.npz:arr_*", "tables"])
def test_several_recordings_lie_one_behind_the_other(two, tmp_path, capsys, source):
    series = dataset.load_series(tmp_path / source)
    np.testing.assert_allclose(series.X, np.concatenate(two).astype(np.float32), rtol=1e-6)
    assert series.recordings.tolist() == [[0, 300], [300, 500]] and series.process is None
    assert capsys.readouterr().out == f"{tmp_path / source}: 2 recordings of 300, 200 steps, 3 features\n"


def test_recordings_of_a_folder_keep_their_labels(tmp_path):
    for name, states in (("a", [2, 2, 9]), ("b", [9, 4])):
        np.savez(tmp_path / f"{name}.npz", X=waves(len(states)), states=states)
    series = dataset.load_series(tmp_path)
    assert series.states.tolist() == [0, 0, 2, 2, 1] and series.n_circles == 3
    np.save(tmp_path / "c.npy", waves(4))  # one without labels: then there are none
    assert dataset.load_series(tmp_path).states is None


def test_one_dimension_is_one_feature(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(9.0))
    assert dataset.load_series(tmp_path / "a.npy").X.shape == (9, 1)


def test_the_generators_file_can_be_named_as_a_file(shared_data):
    named, usual = dataset.load_series(shared_data / "data.npz"), dataset.load_series(shared_data)
    np.testing.assert_array_equal(named.X, usual.X)
    assert named.config == usual.config and named.process.n_circles == 4


@pytest.mark.parametrize("text, words", [
    ("1,2\n3,x\n", "line 2, column 2 holds 'x', which is no number"), ("a,b\n1,2\n3,4,5\n", "line 3 has 3 cells"),
    ("1,2\n3\n", "line 2 has 1 cells"), (",0,1\n0,1,2\n", "first column has no name"), ("", "must have shape"),
    ("a,b\n", "must have shape"), ("1;2,5\n", "line 1, column 1 holds|which is no number|must|cells"),
    ("1,2\n3,\n5,6\n", r"X holds 1 NaN .*in row 1, column 1 \(counted from 0\)"),
    ("1,2\nnan,4\ninf,nan\n", r"X holds 3 NaN .*in row 1, column 0 .*several recordings"),
    ("1_0,2\n3,4\n5,1_0\n", "line 3, column 2 holds '1_0'")])
def test_tables_that_are_none_are_refused_with_the_place(tmp_path, text, words):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(cli.UserError, match=words):
        dataset.load_series(tmp_path / "a.csv")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00\x01" * 10)
    with pytest.raises(cli.UserError, match="can't be read as a text table"):
        dataset.load_series(tmp_path / "a.csv")


@pytest.mark.parametrize("content, words", [
    (np.zeros((2, 3, 4)), r"must have shape \(n_steps, n_features\), not \(2, 3, 4\)"), (np.zeros((0, 3)), "shape"),
    (np.zeros(5, complex), "X must hold numbers"), (np.array(["a"] * 5), "X must hold numbers"),
    (np.zeros((1, 3)), "single time step"), (np.full((9, 2), 1e31), "outside"), (np.float64(3), "shape"),
    (np.array([[1], [1, 2]], dtype=object), "never unpickled; save each recording")])
@pytest.mark.parametrize("form", ["npy", "npz"])
def test_arrays_that_are_no_recording_are_refused(tmp_path, content, words, form):
    np.save(tmp_path / "a.npy", content, allow_pickle=True)
    np.savez(tmp_path / "a.npz", song=content)
    with pytest.raises(cli.UserError, match=words):
        dataset.load_series(tmp_path / f"a.{form}")


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.csv", "a.tsv"])
def test_damaged_and_missing_files_are_refused(tmp_path, name):
    with pytest.raises(cli.UserError, match="not found; check the name"):
        dataset.load_series(tmp_path / name)
    (tmp_path / name).write_bytes(b"PK\x03\x04 no numbers \x93NUMPY")
    with pytest.raises(cli.UserError, match=r"damaged|no number|text table"):
        dataset.load_series(tmp_path / name)


def test_arrays_must_be_named_where_there_are_several(two, tmp_path):
    with pytest.raises(cli.UserError, match=r"holds the arrays arr_0, arr_1; name .* --data .*two\.npz:arr_0"):
        dataset.load_series(tmp_path / "two.npz")
    with pytest.raises(cli.UserError, match=r"has no array b; it holds arr_0, arr_1"):
        dataset.load_series(tmp_path / "two.npz:arr_0,b")
    np.savez(tmp_path / "uneven.npz", a=waves(9), b=waves(9, 4))
    with pytest.raises(cli.UserError, match=r"uneven.npz:b has 4 features and .*:a has 3"):
        dataset.load_series(tmp_path / "uneven.npz:a,b")
    (tmp_path / "note.txt").write_text("1")
    with pytest.raises(cli.UserError, match=r"no recording that can be read"):
        dataset.load_series(tmp_path / "note.txt")


def test_data_and_data_dir_exclude_each_other(refused, tmp_path):
    assert "not allowed with" in refused("estimate_dimension", "--data", "a.npy", "--data-dir", "b")
    assert training.parse_args(["--data", "a.npy"]).flags_given == ["data_dir"]


# ---- windows ---------------------------------------------------------------------------------------------------

RECORDINGS = np.array([[0, 50], [50, 58], [58, 130], [130, 200]])


def test_no_window_crosses_a_border_or_the_split():
    train, val, boundary = dataset.split_windows(200, 10, 3, 0.3, RECORDINGS)
    assert boundary == 140
    owners = [set(range(*recording)) for recording in RECORDINGS.tolist()]
    inside = {start for start in range(191) for owner in owners if set(range(start, start + 10)) <= owner}
    assert set(train) <= {s for s in inside if s + 10 <= 140} and set(val) == {s for s in inside if s >= 140} & set(
        range(140, 200, 3))
    assert set(train) == {*range(0, 41, 3), *range(58, 121, 3), 130}
    ends = dataset.training_ends(RECORDINGS, boundary)
    assert ends.tolist() == [50, 58, 130, 140]
    starts = torch.from_numpy(train)
    seen = set()
    for seed in range(30):
        moved = dataset.jittered(starts, ends, 10, 9, torch.Generator().manual_seed(seed))
        assert set(moved.tolist()) <= {s for s in inside if s + 10 <= 140}
        assert ((moved - starts >= 0) & (moved - starts < 9)).all()
        seen |= set(moved.tolist())
    assert {40, 120, 130} <= seen  # the last windows of each are reached


def test_a_window_longer_than_every_recording_is_refused():
    with pytest.raises(cli.UserError, match=r"longer than every recording \(at most 72 steps\)"):
        dataset.split_windows(200, 73, 1, 0.3, RECORDINGS)
    with pytest.raises(cli.UserError, match="the validation part has 20 steps, but none of its recordings"):
        dataset.split_windows(40, 12, 1, 0.5, np.array([[0, 20], [20, 30], [30, 40]]))


def test_seeds_are_moved_into_recordings():
    starts = dataset.into_recordings(np.array([0, 45, 52, 125, 195]), 10, RECORDINGS)
    assert starts.tolist() == [0, 40, 40, 120, 190]
    for length in (1, 10, 30):  # where a recording of so many steps begins, its first window begins
        begins = [begin for begin, end in RECORDINGS.tolist() if end - begin >= length]
        assert dataset.into_recordings(np.array(begins), length, RECORDINGS).tolist() == begins
    with pytest.raises(cli.UserError, match="no recording has 73 steps; the longest has 72"):
        dataset.into_recordings(np.array([0]), 73, RECORDINGS)


def test_gates_take_samples_within_recordings():
    assert visualize_gates.sample_starts(200, 20, 0.5, RECORDINGS).tolist() == [100, 130, 150, 170]
    with pytest.raises(cli.UserError, match="every recording of the validation part has 70 steps"):
        visualize_gates.sample_starts(200, 71, 0.5, RECORDINGS)


@pytest.mark.parametrize("velocity", [False, True])
def test_levels_see_nothing_of_the_recording_before(velocity):
    torch.manual_seed(0)
    model = mamba_model.CausalTimeSeriesMamba(3, 8, 2, 4, d_ff=8).eval()
    X = waves(120).astype(np.float32)
    series = dataset.Series(X, lengths=(70, 10, 40))
    whole = dict(representations.of_steps(model, X, 32, [0, 1, 3], velocity, series.recordings))
    for depth, level in whole.items():
        alone = [dict(representations.of_steps(model, X[a:b], 32, [depth], velocity))[depth]
                 for a, b in series.recordings]
        np.testing.assert_array_equal(level, np.concatenate(alone))
    steps = representations.steps_of_rows(series, velocity)
    assert steps.tolist() == [t for t in range(120) if not velocity or t not in (0, 70, 80)]
    expected = np.diff(X, axis=0)[steps - 1] if velocity else X
    np.testing.assert_array_equal(whole[0], expected)


# ---- scaling ---------------------------------------------------------------------------------------------------


def test_the_scaling_is_that_of_each_feature():
    far = 1e5 + waves(500)[:, :1]  # as a temperature in mK or a time: it changes, though little beside its mean
    X = np.concatenate([waves(500, offset=3), far, np.full((500, 1), 7.3)], axis=1).astype(np.float32)
    scaling = dataset.scaling_of(X)
    np.testing.assert_allclose(scaling.mean, X.mean(axis=0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(scaling.std, [*X[:, :4].std(axis=0, dtype=np.float64), 1.0], rtol=1e-6)
    np.testing.assert_allclose(dataset.scaling_of(X, one_std=True).std,
                               np.sqrt(X.var(axis=0, dtype=np.float64).mean()), rtol=1e-6)


@pytest.mark.parametrize("mixture", [0, 3])
def test_an_unscaled_model_is_the_scaled_one_in_data_units(mixture):
    torch.manual_seed(0)
    model = mamba_model.CausalTimeSeriesMamba(3, 8, 1, 4, d_ff=8, max_horizon=2, mixture=mixture).eval()
    X = torch.from_numpy(waves(40, offset=2)).float()[None]
    scaling = dataset.scaling_of(X[0].numpy(), one_std=mixture > 0)
    windows = dataset.Windows(X[0].numpy(), 40, "cpu", scaling)
    mean, std = (torch.from_numpy(v).float() for v in scaling)
    z = (X - mean) / std
    torch.testing.assert_close(windows.at(torch.tensor([0])), z)
    with torch.no_grad():
        scaled = {k: p * std + mean for k, p in model(z).items()}
        errors = mamba_model.validation_errors(model.train_scaled(scaling), windows, torch.tensor([0]), 1, False)
        loss = mamba_model.validation_errors(model.train_scaled(None), windows, torch.tensor([0]), 1, False)
        plain = dataset.Windows(X[0].numpy(), 40, "cpu")
        model.unscaled(scaling)
        in_data_units = mamba_model.validation_errors(model, plain, torch.tensor([0]), 1, False)
        for k, prediction in model(X).items():
            torch.testing.assert_close(prediction, scaled[k], rtol=1e-4, atol=1e-3)
    assert errors.shape == (2 + (mixture > 0), 2)
    torch.testing.assert_close(errors[:-1], in_data_units, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(errors[-1], loss[-1])  # the row that it is trained by
    windows.X = X[0].numpy()  # as where the series isn't on the device
    torch.testing.assert_close(next(windows.loader([[0]], 0)), z)


@pytest.mark.parametrize("scaling", [
    {"mean": torch.zeros(2), "std": torch.ones(3)}, {"mean": torch.zeros(3), "std": torch.zeros(3)}, {"mean": 0},
    {"mean": torch.zeros(3), "std": torch.full((3,), torch.nan)}, 7, {"mean": torch.zeros(3), "std": torch.ones(2)},
    {"mean": torch.zeros(3), "std": torch.ones(1)}, {"mean": torch.zeros(3, 1), "std": torch.ones(3, 1)},
    {"mean": torch.zeros(()), "std": torch.ones(3)}, {"mean": torch.zeros(3), "std": torch.ones(1, 3)},
    *({"mean": torch.tensor([0, 0, value]), "std": torch.ones(3)} for value in (torch.nan, torch.inf, -torch.inf)),
    *({"mean": torch.zeros(3), "std": torch.tensor([value, 1, 1])} for value in (torch.nan, torch.inf, 0.0, -1.0))])
def test_a_scaling_that_does_not_fit_is_refused(tmp_path, scaling):
    model = mamba_model.CausalTimeSeriesMamba(3, 8, 1, 4, d_ff=8)
    mamba_model.save_checkpoint(tmp_path / "a.pt", 1, model.state_dict(), {}, 1, 1, {}, scaling=scaling)
    with pytest.raises(cli.UserError, match="no checkpoint or is damaged"):
        mamba_model.load_checkpoint(tmp_path / "a.pt")


# ---- the scripts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["alone", "two.npz:arr_*", pytest.param("tables", marks=pytest.mark.drawn)])
def test_every_script_runs_on_recordings_without_labels(two, tmp_path, script, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "state_strip", lambda *given, **more: pytest.fail("there are no circles to show"))
    monkeypatch.setattr(figures, "circle_legend", lambda *given, **more: pytest.fail("there are no circles to name"))
    flag = ["--data-dir" if source == "alone" else "--data", source]
    (tmp_path / "alone").mkdir()
    np.savez(tmp_path / "alone/data.npz", X=np.concatenate(two).astype(np.int16))
    runs = {NAME: [*TINY, "--checkpoint", "a.pt", "--normalise"],
            "evaluate_representations": ["--checkpoint", "a.pt", "--no-umap", "--lb-points", 200],
            "generate": ["--checkpoint", "a.pt", "--seed-len", 30, "--gen-len", 20],
            "visualize_gates": ["--checkpoint", "a.pt"], "estimate_dimension": ["--points", 300, "--k", 5]}
    for name, more in runs.items():
        done = script(name, *flag, *more)
        assert done.code == 0 and done.err == "", (name, done)
        assert any(words in done.out for words in SAY_SO), (name, done.out)
    printed = script(NAME, *flag, "--eval", "a.pt", "--test-steps", 0).out.splitlines()[-1].split()
    logged = (tmp_path / "a_log.csv").read_text().splitlines()
    logged = [dict(zip(logged[0].split(","), row.split(","), strict=True)) for row in logged[1:]]
    best = min(logged, key=lambda row: float(row["val_loss"]))
    assert float(printed[1]) == pytest.approx(float(best["val_mse_1"]), rel=1e-3) and printed[2:] == ["–", "–"]
    series = dataset.load_series(source)
    assert float(best["val_mse_1"]) < 3 * series.X.var()  # data units, where the loudest feature has all the variance
    assert float(best["val_loss"]) < 5 and series.X.var() > 100
    levels = json.loads(only(tmp_path / "plots", "a_*metrics.json").read_text())["levels"]
    assert {levels[0][key] for key in ("probe_accuracy", "phase_r2", "kmeans_ari", "silhouette")} == {None}
    saved = torch.load(tmp_path / "a.pt", weights_only=True)["scaling"]
    np.testing.assert_allclose(saved["std"], series.X[:350].std(axis=0, dtype=np.float64), rtol=1e-6)
    with np.load(next(tmp_path.glob("plots/a_generated*.npz"))) as song:
        assert song["generated"].std() > 10 and song["generated"].shape == (3, 20, 3)
    assert "needs the process" in script("optimal_filter", *flag).err


def test_the_true_continuation_ends_with_its_recording(two, tmp_path, script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, shown = mamba_model.CausalTimeSeriesMamba(3, 8, 1, 4, d_ff=8), []
    mamba_model.save_checkpoint("m.pt", 1, model.state_dict(), {}, 1, 1, {})
    draw = generate.draw_truth
    monkeypatch.setattr(generate, "draw_truth", lambda *given: shown.append(given[3]) or draw(*given))
    flags = ["--seed-len", 30, "--gen-len", 40, "--n-samples", 2, "--seed-offset", 260, "--data", "two.npz:arr_*"]
    done = script("generate", "--checkpoint", "m.pt", *flags)
    assert done.code == 0 and "from time steps 260, 345" in done.out, done
    (truths,) = shown
    np.testing.assert_allclose(truths[0], two[0][290:], rtol=1e-5, atol=1e-4)  # not on into the other recording
    np.testing.assert_allclose(truths[1], two[1][75:115], rtol=1e-5, atol=1e-4)


def test_a_normalised_run_goes_on_where_it_stopped(two, tmp_path, script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--data", "two.npz:arr_*", *TINY, "--normalise", "--ema", 0.5]
    script(NAME, *flags, "--checkpoint", "whole.pt")
    script(NAME, *flags, "--checkpoint", "part.pt", "--epochs", 1)
    whole, part = (torch.load(tmp_path / f"{name}_last.pt", weights_only=True) for name in ("whole", "part"))
    assert part["scaling"].keys() == {"mean", "std"} and torch.equal(part["scaling"]["std"], whole["scaling"]["std"])
    assert script(NAME, "--resume", "--checkpoint", "part.pt", "--epochs", 2).code == 0


def test_labels_bring_probes_back(tmp_path, script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    states = np.repeat(np.arange(10) % 2, 40)
    np.savez(tmp_path / "a.npz", X=waves(400) + 5 * states[:, None], states=np.array(["tut", "zip"])[states])
    torch.manual_seed(0)
    model = mamba_model.CausalTimeSeriesMamba(3, 8, 1, 4, d_ff=8)
    mamba_model.save_checkpoint(tmp_path / "m.pt", 1, model.state_dict(), {}, 1, 1,
                                {"seq_len": 32, "stride": 16, "val_fraction": 0.2})
    done = script("evaluate_representations", "--data", "a.npz", "--checkpoint", "m.pt", "--no-umap", "--no-lb")
    assert "labels: 0 is tut, 1 is zip" in done.out and "no labels" not in done.out
    level = json.loads((tmp_path / "plots/m_metrics.json").read_text())["levels"][0]
    assert level["probe_accuracy"] > 0.9 and level["phase_r2"] is None and level["silhouette"] is not None
    done = script("estimate_dimension", "--data", "a.npz", "--k", 5)
    assert [line.split()[0] for line in done.out.splitlines() if "." in line.split()[-1]][-3:-1] != []


def test_a_single_label_agrees_with_nothing():
    found = measures.cluster_scores(waves(50), np.arange(50), np.zeros(50, int), 1, 0)
    assert found == {f"kmeans_{key}": None for key in ("ari", "nmi", "ari_smooth", "nmi_smooth")}


def test_umaps_without_labels_tell_the_time():
    fig = figures.draw_umaps([waves(5, 2)] * 2, ["a", "b"], np.array([3, 9, 1, 4, 7]), None, "t")
    dots = fig.axes[0].collections[0]
    assert dots.get_array().tolist() == [3, 9, 1, 4, 7] and fig.axes[-1].get_ylabel() == "time step"


# ---- the generator, and what is not the generator's ------------------------------------------------------------


def generate_data(script, folder, *more):
    return script("markov_circles_timeseries", *TINY_DATA, "--data-dir", folder, *more)


def test_the_same_command_writes_the_same_bytes_again(data_dir, script):
    before = {path.name: path.read_bytes() for path in data_dir.iterdir()}
    assert generate_data(script, data_dir).code == 0
    assert {name: (data_dir / name).read_bytes() for name in before} == before
    assert generate_data(script, data_dir, "--uncompressed").code == 0  # the same arrays
    (data_dir / "config.json").unlink()  # as where a process was killed
    assert generate_data(script, data_dir).code == 0 and (data_dir / "config.json").exists()


@pytest.mark.parametrize("change", ["seed", "longer", "X alone", "damaged", "one value", "one label", "one angle",
                                    "more arrays"])
@pytest.mark.parametrize("mode", [[], ["--uncompressed"]])
def test_other_data_are_never_replaced(data_dir, script, rewrite_data, change, mode):
    flags = {"seed": ["--seed", 8], "longer": ["--n-steps", 3001]}.get(change, [])
    arrays = dict(np.load(data_dir / "data.npz"))
    if change == "X alone":
        np.savez(data_dir / "data.npz", X=arrays["X"])
    if change == "damaged":
        (data_dir / "data.npz").write_bytes(b"mine")
    if change == "more arrays":
        rewrite_data(notes=np.zeros(3))
    if change in ("one value", "one label", "one angle"):
        name = {"one value": "X", "one label": "states", "one angle": "thetas"}[change]
        arrays[name][-1] += -1 if arrays["states"][-1] > 0 and name == "states" else 1e-3 if name == "thetas" else 1
        rewrite_data(**{name: arrays[name]})
    before = {path.name: path.read_bytes() for path in data_dir.iterdir()}
    done = generate_data(script, data_dir, *mode, *flags)
    assert done.code == 2 and done.err.count("\n") == 1
    assert "exists already and is not what these flags make" in done.err
    assert {path.name: path.read_bytes() for path in data_dir.iterdir()} == before


def test_figures_of_data_that_are_gone_do_not_stay(data_dir, script):
    (data_dir / "umap.png").write_bytes(b"of this series")
    generate_data(script, data_dir)
    assert (data_dir / "umap.png").exists()
    (data_dir / "data.npz").unlink()
    generate_data(script, data_dir, "--seed", 9)
    assert not (data_dir / "umap.png").exists() and (data_dir / "periods.png").exists()


@pytest.mark.parametrize("damage", [{"X": None}, {"states": None}, {"radii": np.zeros(4)}])
def test_no_error_proposes_the_generator_for_a_file_that_is_there(rewrite_data, damage):
    with pytest.raises(cli.UserError) as refusal:
        dataset.load_series(rewrite_data(**damage))
    assert "markov_circles" not in str(refusal.value) and "anew" not in str(refusal.value)


# ---- a floor that isn't the data's -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def walk_that_nobody_names():
    config = generator.config_of(generator.parse_args([*TINY_DATA, "--center-walk-std", "0.3"]))
    return dataclasses.replace(generator.generate(config), config={**config, "center_walk_std": 0.0})


def test_a_floor_that_is_not_the_datas_is_left_out(walk_that_nobody_names, shared_data, capsys):
    assert optimal_filter.process_or_none(walk_that_nobody_names, "no optimal floor") is None
    out = capsys.readouterr().out
    assert out.startswith("no optimal floor: config.json does not describe these data") and out.count("\n") == 1
    true = dataset.load_series(shared_data)
    assert optimal_filter.process_or_none(true, "") is not None
    for factor in (0.85, 1.15):
        other = dataclasses.replace(true, config={**true.config, "noise_std": factor * true.config["noise_std"]})
        assert optimal_filter.process_or_none(other, "") is None, factor


@pytest.mark.parametrize("flags", [[], ["--noise-std", "0.01"], ["--noise-std", "30"], ["--center-walk-std", "0.3"],
                                   ["--ambient-dim", "2", "--dwell-mean", "5", "--min-period", "4"]])
def test_data_of_the_process_keep_their_floor(flags):
    for seed in ("1", "2"):
        argv = [*TINY_DATA, *flags, "--seed", seed]
        series = generator.generate(generator.config_of(generator.parse_args(argv)))
        assert optimal_filter.process_or_none(series, "") is not None, (flags, seed)


def test_what_begins_late_is_seen(shared_data):
    series = dataset.load_series(shared_data)
    X = series.X.copy()
    X[2800:] += 8.0
    assert optimal_filter.process_or_none(dataclasses.replace(series, X=X), "") is None


def test_of_other_recordings_nothing_counts_as_held_back(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, n in (("a", 1000), ("b", 420)):  # of a 50 steps are held back; b's validation part has 42 in all
        np.savetxt(f"{name}.csv", np.random.default_rng(n).normal(size=(n, 2)), delimiter=",")
    flags = ["--d-model", 8, "--n-layers", 1, "--d-state", 2, "--seq-len", 40, "--stride", 20, "--epochs", 1]
    done = script("masked_model_gpu_mamba_next", "--data", "a.csv", "--checkpoint", "a.pt", *flags)
    assert done.code == 0 and "the last 50 steps are left to the test" in done.out, done
    done = script("masked_model_gpu_mamba_next", "--eval", "a.pt", "--data", "b.csv")
    assert done.code == 0 and "was trained on other data" in done.out, done
    done = script("evaluate_representations", "--checkpoint", "a.pt", "--data", "b.csv", "--no-umap", "--no-lb")
    assert done.code == 0 and "no validation MSE" not in done.out, done
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"a_b.csv_metrics.json", "a_b.csv_summary.png"}
