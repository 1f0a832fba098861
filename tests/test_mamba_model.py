"""The model: sizes, causality, recurrence, and checkpoints in and out."""

import pickle

import pytest
import torch

import cli
import mamba_model
from mamba_model import CausalTimeSeriesMamba, load_checkpoint, save_checkpoint


def tiny(dtype=torch.float64, **sizes):
    torch.manual_seed(0)
    sizes = {"feature_dim": 3, "d_model": 16, "n_layers": 2, "d_state": 4, "d_ff": 8, **sizes}
    model = CausalTimeSeriesMamba(**sizes).to(dtype).eval()
    with torch.no_grad():  # away from the special initial values
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_default_size():
    model = CausalTimeSeriesMamba()
    assert sum(p.numel() for p in model.parameters()) == 982_420


def test_parameter_names_are_those_of_mamba_ssm():
    keys = CausalTimeSeriesMamba(n_layers=1, max_horizon=6).state_dict().keys()
    block = {"in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias",
             "A_log", "D", "out_proj.weight"}
    heads = {f"output_heads.{k}.{i}.{p}" for k in (1, 2, 4, 6) for i in (0, 2) for p in ("weight", "bias")}
    others = {f"{n}.{p}" for n in ("input_proj", "final_norm", "layers.0.norm") for p in ("weight", "bias")}
    assert set(keys) == {f"layers.0.mamba.{name}" for name in block} | heads | others


@pytest.mark.parametrize("max_horizon, horizons", [
    (1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (64, [1, 2, 4, 8, 16, 32, 64])])
def test_horizons(max_horizon, horizons):
    assert mamba_model.horizons_up_to(max_horizon) == horizons


def test_shapes_and_encode():
    model = tiny(max_horizon=2)
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    predictions, levels = model(x), model.encode(x)
    assert predictions.keys() == {"1", "2"} and predictions["2"].shape == x.shape
    assert [level.shape[-1] for level in levels] == [16, 16, 3]
    assert torch.equal(levels[-1], predictions["1"])


def test_causal():
    model = tiny()
    x = torch.randn(1, 20, 3, dtype=torch.float64)
    later = x.clone()
    later[:, 12:] += 1
    a, b = model(x)["1"], model(later)["1"]
    assert torch.equal(a[:, :12], b[:, :12]) and not torch.allclose(a[:, 12], b[:, 12])


@pytest.mark.parametrize("sizes", [{}, {"d_conv": 1}, {"d_conv": 2, "expand": 3, "d_state": 5}])
def test_steps_equal_the_parallel_run(sizes):
    model = tiny(**sizes)
    x = torch.randn(3, 40, 3, dtype=torch.float64)
    parallel, states = model(x)["1"], model.init_state(3)
    with torch.no_grad():
        for t in range(40):
            prediction, states = model.step(x[:, t], states)
            assert torch.allclose(prediction["1"], parallel[:, t], rtol=0, atol=1e-10)


def test_prefill_then_steps():
    model = tiny()
    x = torch.randn(2, 30, 3, dtype=torch.float64)
    parallel = model(x)["1"]
    prediction, states = model.prefill(x[:, :17])
    assert torch.allclose(prediction["1"], parallel[:, 16], rtol=0, atol=1e-10)
    with torch.no_grad():
        for t in range(17, 30):
            prediction, states = model.step(x[:, t], states)
            assert torch.allclose(prediction["1"], parallel[:, t], rtol=0, atol=1e-10)


def test_signals_rebuild_the_block():
    model = tiny(n_layers=1)
    block, x = model.layers[0].mamba, torch.randn(2, 11, 16, dtype=torch.float64)
    s = block.signals(x)
    A, h, ys = -torch.exp(block.A_log), torch.zeros(2, 32, 4, dtype=torch.float64), []
    for t in range(11):
        dt = s["delta"][:, t, :, None]
        h = torch.exp(dt * A) * h + dt * s["B"][:, t, None] * s["conv"][:, t, :, None]
        y = (h * s["C"][:, t, None]).sum(-1) + block.D * s["conv"][:, t]
        ys.append(y * torch.nn.functional.silu(s["z"][:, t]))
    assert torch.allclose(block.out_proj(torch.stack(ys, 1)), block(x, "cpu"), rtol=0, atol=1e-10)


def test_perturb_sees_every_layer():
    model, seen = tiny(), []

    def perturb(i, h):
        seen.append(i)
        return h + torch.arange(16.0)

    with torch.no_grad():
        plain, _ = model.step(torch.zeros(1, 3, dtype=torch.float64), model.init_state(1))
        moved, _ = model.step(torch.zeros(1, 3, dtype=torch.float64), model.init_state(1), perturb)
    assert seen == [0, 1] and not torch.allclose(plain["1"], moved["1"])


def test_initial_step_sizes():
    torch.manual_seed(0)
    dt = torch.nn.functional.softplus(CausalTimeSeriesMamba().layers[0].mamba.dt_proj.bias)
    assert dt.min() >= 0.99e-3 and dt.max() <= 0.101


# ---- checkpoints


def save(path, state_dict, **args):
    save_checkpoint(path, 3, state_dict, {}, 1.5, 2.5, {"dropout": 0.2, **args})
    return path


def test_checkpoint_round_trip(tmp_path):
    model = tiny(torch.float32, max_horizon=3)
    loaded, args = load_checkpoint(save(tmp_path / "a.pt", model.state_dict()), "cpu")
    assert args == {"dropout": 0.2} and not loaded.training and loaded.dropout.p == 0.2
    x = torch.randn(1, 8, 3)
    for k, value in model(x).items():
        assert torch.equal(value, loaded(x)[k])
    raw = torch.load(tmp_path / "a.pt", weights_only=True)
    assert {"epoch", "model_state_dict", "optimizer_state_dict", "train_loss", "val_loss", "args"} <= raw.keys()


def test_older_names_load(tmp_path):
    model = tiny(torch.float32)
    old = {"_orig_mod." + key.replace("output_heads.1.", "output_proj."): value
           for key, value in model.state_dict().items()}
    loaded, _ = load_checkpoint(save(tmp_path / "old.pt", old), "cpu")
    x = torch.randn(1, 8, 3)
    assert torch.equal(model(x)["1"], loaded(x)["1"])


def bad_state_dicts():
    good = tiny(torch.float32).state_dict()
    nan = {**good, "layers.0.mamba.D": good["layers.0.mamba.D"] * float("nan")}
    missing = {key: value for key, value in good.items() if key != "final_norm.weight"}
    narrow = {**good, "layers.1.norm.weight": torch.ones(5)}
    # Two small tensors that together ask for a matrix of terabytes, and one that claims more than it stores.
    huge = {**good, "layers.0.mamba.A_log": torch.zeros(3 * 10**5, 1), "input_proj.weight": torch.zeros(10**5, 3)}
    claimed = {**good, "layers.0.mamba.A_log": torch.zeros(1).expand(10**9, 4)}
    integer = {**good, "layers.0.mamba.D": torch.ones(32, dtype=torch.int64)}
    return {"nan": nan, "missing": missing, "narrow": narrow, "huge": huge, "claimed": claimed, "integer": integer,
            "empty": {}, "not tensors": {**good, "layers.0.mamba.D": 3}}


@pytest.mark.parametrize("name", bad_state_dicts())
def test_bad_weights(tmp_path, name):
    path = save(tmp_path / "bad.pt", bad_state_dicts()[name])
    with pytest.raises(cli.UserError, match=r"bad\.pt is no checkpoint or is damaged \(.+\); train it"):
        load_checkpoint(path, "cpu")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("pickled code was run",))


@pytest.mark.parametrize("content", [
    b"", b"hello", pickle.dumps(Bomb()), pickle.dumps({"a": 1}), b"PK\x03\x04" + b"\0" * 90])
def test_files_that_are_no_checkpoint(tmp_path, content):
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(cli.UserError, match="no checkpoint"):
        load_checkpoint(tmp_path / "bad.pt", "cpu")


def test_pickled_code_is_never_run(tmp_path):
    torch.save({"model_state_dict": {}, "args": {"x": Bomb()}}, tmp_path / "bad.pt")
    with pytest.raises(cli.UserError, match="pickled objects"):
        load_checkpoint(tmp_path / "bad.pt", "cpu")


@pytest.mark.parametrize("content", [3, [], {}, {"model_state_dict": 4}, {"model_state_dict": {}, "args": [1]}])
def test_wrong_structure(tmp_path, content):
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(cli.UserError, match="no checkpoint or is damaged"):
        load_checkpoint(tmp_path / "bad.pt", "cpu")


def test_truncated_checkpoint(tmp_path):
    path = save(tmp_path / "a.pt", tiny(torch.float32).state_dict())
    content = path.read_bytes()
    for part in (0.1, 0.5, 0.99):
        path.write_bytes(content[:int(len(content) * part)])
        with pytest.raises(cli.UserError, match="no checkpoint"):
            load_checkpoint(path, "cpu")


def test_missing_checkpoint(tmp_path):
    with pytest.raises(cli.UserError, match="not found"):
        load_checkpoint(tmp_path / "none.pt", "cpu")


def test_a_failed_save_keeps_the_old_file(tmp_path):
    path = save(tmp_path / "a.pt", tiny(torch.float32).state_dict())
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_checkpoint(path, 1, {}, {}, 0.0, 0.0, {"f": lambda: 0})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.pt"]
