"""The model: sizes, causality, recurrence, and checkpoints in and out."""

import math
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import erf

import cli
import dataset
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


# ---- the same model written out in numpy


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer_norm(x, weights, name):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def head_by_hand(h, weights, k):
    """Final norm, then Linear, GELU, Linear."""
    h = layer_norm(h, weights, "final_norm")
    h = h @ weights[f"output_heads.{k}.0.weight"].T + weights[f"output_heads.{k}.0.bias"]
    h = h * 0.5 * (1 + erf(h / math.sqrt(2)))
    return h @ weights[f"output_heads.{k}.2.weight"].T + weights[f"output_heads.{k}.2.bias"]


def block_by_hand(x, weights, name):
    """A Mamba block, step by step: x (time, d_model) to (output, {signal: values})."""
    w = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
    d_inner, d_state = w["A_log"].shape
    d_conv, dt_rank = w["conv1d.weight"].shape[-1], w["dt_proj.weight"].shape[1]
    xz = x @ w["in_proj.weight"].T
    before, z = xz[:, :d_inner], xz[:, d_inner:]
    h, rows, s = np.zeros((d_inner, d_state)), [], {"conv": [], "delta": [], "z": z, "B": [], "C": []}
    for t in range(len(x)):
        u = w["conv1d.bias"].copy()
        for tap in range(d_conv):  # the last tap is the present step's
            past = t - (d_conv - 1) + tap
            u += w["conv1d.weight"][:, 0, tap] * before[past] if past >= 0 else 0
        u = u * sigmoid(u)
        x_dbl = w["x_proj.weight"] @ u
        low_rank, B, C = x_dbl[:dt_rank], x_dbl[dt_rank:dt_rank + d_state], x_dbl[dt_rank + d_state:]
        delta = np.log1p(np.exp(w["dt_proj.weight"] @ low_rank + w["dt_proj.bias"]))
        h = np.exp(-delta[:, None] * np.exp(w["A_log"])) * h + (delta * u)[:, None] * B[None]
        rows.append(w["out_proj.weight"] @ ((h @ C + w["D"] * u) * z[t] * sigmoid(z[t])))
        for key, value in (("conv", u), ("delta", delta), ("B", B), ("C", C)):
            s[key].append(value)
    return np.array(rows), {key: np.array(value) for key, value in s.items()}


def layers_by_hand(x, model, input_dropout, dropouts, change=lambda i, h: h):
    """The outputs of the layers for one window x (time, feature_dim); dropouts multiply where dropout acts."""
    weights = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    h = input_dropout * (x @ weights["input_proj.weight"].T + weights["input_proj.bias"])
    outputs = []
    for i in range(model.n_layers):
        y, _ = block_by_hand(layer_norm(h, weights, f"layers.{i}.norm"), weights, f"layers.{i}.mamba")
        h = change(i, h + dropouts[i] * y)
        outputs.append(h)
    return outputs, weights


@pytest.fixture
def by_hand():
    """A model whose dropouts multiply by known numbers, a window, and what both must give."""
    model = tiny(max_horizon=3, d_conv=3)
    for module, factor in ((model.dropout, 0.5), (model.layers[0].dropout, 2.0), (model.layers[1].dropout, -1.5)):
        module.forward = lambda x, factor=factor: factor * x
    x = torch.randn(1, 12, 3, dtype=torch.float64)
    outputs, weights = layers_by_hand(x[0].numpy(), model, 0.5, [2.0, -1.5])
    return model, x, outputs, {k: head_by_hand(outputs[-1], weights, k) for k in ("1", "2", "3")}


def close(tensor, array):
    np.testing.assert_allclose(tensor.detach().numpy(), array, rtol=0, atol=1e-10)


def test_every_output_is_that_of_the_model_written_out(by_hand):
    model, x, outputs, predictions = by_hand
    for found, layers in (model(x, with_layers=True), model(x, raw=True, with_layers=True), (model(x), outputs),
                          (model(x, raw=True), outputs)):
        assert list(found) == ["1", "2", "3"] and len(layers) == 2
        for k, prediction in found.items():
            close(prediction[0], predictions[k])
    for found, expected in zip(model.layer_outputs(x), outputs, strict=True):
        close(found[0], expected)
    for found, expected in zip(model.encode(x), [*outputs, predictions["1"]], strict=True):
        close(found[0], expected)
    for k, prediction in model.heads(model.layer_outputs(x)[-1]).items():
        close(prediction[0], predictions[k])


def test_steps_and_prefill_are_those_of_the_model_written_out(by_hand):
    model, x, _, predictions = by_hand
    with torch.no_grad():
        first, states = model.prefill(x[:, :5])
        for k, prediction in first.items():
            close(prediction[0], predictions[k][4])
        for t in range(5, 12):
            prediction, states = model.step(x[:, t], states)
            for k in predictions:
                close(prediction[k][0], predictions[k][t])
        seen = []

        def change(i, h):
            seen.append(i)
            return h * (3 + i) + 0.1

        prediction, _ = model.step(x[:, 0], model.init_state(1), change)
    assert seen == [0, 1]
    changed, weights = layers_by_hand(x[0, :1].numpy(), model, 0.5, [2.0, -1.5], lambda i, h: h * (3 + i) + 0.1)
    for k in predictions:
        close(prediction[k], head_by_hand(changed[-1], weights, k))


def test_signals_are_those_of_the_block_written_out():
    model = tiny(n_layers=1, d_conv=3)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    weights = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    found = model.layers[0].mamba.signals(x)
    assert list(found) == ["conv", "delta", "z", "B", "C"]
    for row in range(2):
        y, expected = block_by_hand(x[row].numpy(), weights, "layers.0.mamba")
        close(model.layers[0].mamba(x, "cpu")[row], y)
        for name, values in expected.items():
            close(found[name][row], values)


def test_dropout_stands_behind_the_input_and_behind_each_block():
    model = CausalTimeSeriesMamba(3, 16, 3, 4, d_ff=8, dropout=0.3)
    places = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert places == dict.fromkeys(["dropout", "layers.0.dropout", "layers.1.dropout", "layers.2.dropout"], 0.3)


def test_layer_norm_keeps_its_type_in_an_autocast_region():
    norm = mamba_model.LayerNorm(6)
    with torch.no_grad():
        norm.weight.add_(torch.arange(6.0))
        norm.bias.add_(torch.arange(6.0))
    x = torch.randn(4, 6)
    expected = layer_norm(x.numpy(), {"n.weight": norm.weight.detach().numpy(), "n.bias": norm.bias.detach().numpy()},
                          "n")
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(x.bfloat16()).dtype == torch.bfloat16 and norm(x).dtype == torch.float32


# ---- initial values, sizes, names


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


def test_initial_step_sizes_are_log_uniform_from_a_thousandth_to_a_tenth():
    torch.manual_seed(0)
    block = mamba_model.MambaBlock(16, d_state=2, expand=1250)
    assert block.dt_proj.bias.shape == (20_000,)
    dt = np.sort(np.log1p(np.exp(block.dt_proj.bias.detach().double().numpy())))  # softplus
    assert 1e-3 * (1 - 1e-5) < dt[0] < 1e-3 * 1.002 and 0.1 * 0.998 < dt[-1] < 0.1 * (1 + 1e-5)
    evenly = np.linspace(math.log(1e-3), math.log(0.1), 20_000)
    assert np.abs(np.log(dt) - evenly).max() < 0.012 * math.log(100)


@pytest.mark.parametrize("d_model, dt_rank", [(16, 1), (17, 2), (100, 7), (128, 8)])
def test_initial_weights_of_the_gates(d_model, dt_rank):
    torch.manual_seed(0)
    block = mamba_model.MambaBlock(d_model, d_state=3, expand=6)
    weight, bound = block.dt_proj.weight.detach(), dt_rank**-0.5
    assert weight.shape == (6 * d_model, dt_rank) and block.x_proj.weight.shape == (dt_rank + 6, 6 * d_model)
    assert weight.max() <= bound and weight.min() >= -bound and weight.max() - weight.min() > 1.9 * bound
    assert block.x_proj.bias is None and block.in_proj.bias is None and block.out_proj.bias is None


def test_initial_decay_rates_and_skip():
    block = mamba_model.MambaBlock(16, d_state=5, expand=2)
    whole = np.arange(1, 6)
    np.testing.assert_allclose(block.A_log.detach().numpy(), np.tile(np.log(whole), (32, 1)), rtol=1e-6)
    np.testing.assert_array_equal(block.D.detach().numpy(), np.ones(32))
    *_, A, D = block.inner_parameters()
    np.testing.assert_allclose(A.detach().numpy(), np.tile(-whole, (32, 1)), rtol=1e-6)
    assert D is block.D
    half = mamba_model.MambaBlock(16, d_state=5).bfloat16()
    assert half.inner_parameters()[-2].dtype == torch.float32 and block.double().inner_parameters()[-2].dtype == (
        torch.float64)


def test_the_state_before_the_first_step_is_zero():
    model = CausalTimeSeriesMamba(3, 16, 2, 4, d_conv=3, d_ff=8)
    states = model.init_state(5, dtype=torch.float64)
    assert len(states) == 2
    for conv_state, h in states:
        assert conv_state.shape == (5, 32, 2) and h.shape == (5, 32, 4)
        assert not conv_state.any() and not h.any() and h.dtype == conv_state.dtype == torch.float64
    assert model.init_state(1)[0][1].dtype == torch.float32


def test_the_scan_is_chosen_per_kind_of_device(monkeypatch):
    asked = []
    monkeypatch.setattr(mamba_model, "choose_backend", lambda name, device: asked.append((name, device)) or "reference")
    model, cpu = tiny(), torch.device("cpu")
    assert model.use_scan("cpu", "cpu") is model and model.backend_for(cpu) == "reference" == model.backend_for(cpu)
    assert asked == [("cpu", cpu)]
    tiny().backend_for(cpu)
    assert asked[1:] == [("auto", cpu)]
    seen = []
    monkeypatch.setattr(mamba_model, "mamba_inner", lambda xz, *rest: seen.append(rest[-1]) or xz[..., :32])
    model(torch.zeros(1, 4, 3, dtype=torch.float64))
    assert seen == ["reference", "reference"]


# ---- errors of a model


def test_horizon_mse_compares_each_prediction_with_the_step_that_it_predicts():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 10, 2))
    predictions = {k: rng.standard_normal((3, 10, 2)) for k in ("1", "4")}
    expected = [np.mean([(predictions[k][b, t] - x[b, t + int(k)])**2 for b in range(3) for t in range(10 - int(k))])
                for k in predictions]
    found = mamba_model.horizon_mse({k: torch.from_numpy(p) for k, p in predictions.items()}, torch.from_numpy(x))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    half = {"1": torch.from_numpy(predictions["1"]).bfloat16()}
    assert mamba_model.horizon_mse(half, torch.from_numpy(x).float()).dtype == torch.float32


def test_validation_errors_count_every_window_once(monkeypatch):
    model = tiny(torch.float32, max_horizon=2)
    X = np.cumsum(np.random.default_rng(0).standard_normal((100, 3)), axis=0).astype(np.float32)
    windows, starts = dataset.Windows(X, 20, "cpu"), torch.tensor([0, 7, 33, 60, 80])
    regions = []
    real = mamba_model.autocast
    monkeypatch.setattr(mamba_model, "autocast", lambda device, amp: regions.append((device.type, amp)) or real(
        device, amp))
    found = {batch: mamba_model.validation_errors(model, windows, starts, batch, batch == 2) for batch in (2, 5)}
    assert regions == [("cpu", True)] * 3 + [("cpu", False)]
    with torch.no_grad():
        expected = [np.mean([((model(torch.from_numpy(X[None, s:s + 20]))[str(k)][0, :-k].numpy()
                               - X[s + k:s + 20])**2).mean() for s in starts.tolist()]) for k in (1, 2)]
    for value in found.values():
        np.testing.assert_allclose(value.numpy(), [expected], rtol=1e-5)
        assert not value.requires_grad


def test_autocast_is_bfloat16_and_only_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: (args, kwargs))
    for kind, wanted, enabled in (("cpu", True, False), ("cuda", True, True), ("cuda", False, False)):
        assert mamba_model.autocast(torch.device(kind), wanted) == (
            (kind,), {"dtype": torch.bfloat16, "enabled": enabled})


def test_at_least_float32():
    for dtype, wanted in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32),
                          (torch.float32, torch.float32), (torch.float64, torch.float64)):
        assert mamba_model.at_least_float32(torch.ones(1, dtype=dtype)).dtype == wanted


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
    one_nan, one_infinity = good["layers.1.mamba.D"].clone(), good["input_proj.bias"].clone()
    one_nan[3], one_infinity[-1] = float("nan"), float("inf")
    missing = {key: value for key, value in good.items() if key != "final_norm.weight"}
    narrow = {**good, "layers.1.norm.weight": torch.ones(5)}
    # Two small tensors that together ask for a matrix of terabytes, and one that claims more than it stores.
    huge = {**good, "layers.0.mamba.A_log": torch.zeros(3 * 10**5, 1), "input_proj.weight": torch.zeros(10**5, 3)}
    claimed = {**good, "layers.0.mamba.A_log": torch.zeros(1).expand(10**9, 4)}
    integer = {**good, "layers.0.mamba.D": torch.ones(32, dtype=torch.int64)}
    return {"nan": nan, "one nan": {**good, "layers.1.mamba.D": one_nan},
            "one infinity": {**good, "input_proj.bias": one_infinity}, "missing": missing, "narrow": narrow,
            "huge": huge, "claimed": claimed, "integer": integer, "empty": {},
            "not tensors": {**good, "layers.0.mamba.D": 3}}


@pytest.mark.parametrize("value", [torch.zeros(0), torch.ones(32, dtype=torch.int64), torch.ones(32, dtype=torch.bool),
                                   torch.full((32,), math.nan), torch.full((32,), -math.inf)])
def test_weights_that_are_no_finite_numbers_are_named(value):
    with pytest.raises(ValueError, match=r"mamba\.D is empty or holds something other than finite numbers"):
        mamba_model.model_from_state_dict({**tiny(torch.float32).state_dict(), "layers.0.mamba.D": value})


@pytest.mark.parametrize("name", bad_state_dicts())
def test_bad_weights(tmp_path, name):
    path = save(tmp_path / "bad.pt", bad_state_dicts()[name])
    with pytest.raises(cli.UserError, match=r"bad\.pt is no checkpoint or is damaged \(.+\); train it"):
        load_checkpoint(path, "cpu")


def flags_and_dropout(tmp_path, args):
    save_checkpoint(tmp_path / "a.pt", 1, tiny(torch.float32).state_dict(), {}, 0.0, 0.0, args)
    model, loaded = load_checkpoint(tmp_path / "a.pt", "cpu")
    return loaded, {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}


def test_flags_and_dropout_come_from_the_file(tmp_path):
    assert flags_and_dropout(tmp_path, {"dropout": 0.25, "data_dir": Path("some") / "where", "epochs": 3}) == (
        {"dropout": 0.25, "data_dir": str(Path("some") / "where"), "epochs": 3}, {0.25})
    assert flags_and_dropout(tmp_path, {}) == ({}, {0.1})


def test_what_save_checkpoint_writes(tmp_path):
    weights = tiny(torch.float32).state_dict()
    save_checkpoint(tmp_path / "a.pt", 7, weights, {"state": 1}, 2.5, 3.5, {"lr": 0.1}, step=9)
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    for key, value in saved.pop("model_state_dict").items():
        assert torch.equal(value, weights[key])
    assert saved == {"epoch": 7, "optimizer_state_dict": {"state": 1}, "train_loss": 2.5, "val_loss": 3.5,
                     "args": {"lr": 0.1}, "step": 9}


@pytest.mark.parametrize("form", ["no args", "no horizons", "compiled", "float16", "float64"])
def test_every_older_form_loads(tmp_path, form):
    model = tiny(torch.float32)
    weights = model.state_dict()
    if form == "no horizons":
        weights = {key.replace("output_heads.1.", "output_proj."): value for key, value in weights.items()}
    elif form == "compiled":
        weights = {f"_orig_mod.{key}": value for key, value in weights.items()}
    elif form in ("float16", "float64"):
        weights = {key: value.to(getattr(torch, form)) for key, value in weights.items()}
    torch.save({"model_state_dict": weights, **({} if form == "no args" else {"args": {"dropout": 0.0}})},
               tmp_path / "old.pt")
    loaded, args = load_checkpoint(tmp_path / "old.pt", "cpu")
    assert args == ({} if form == "no args" else {"dropout": 0.0})
    for key, value in model.state_dict().items():
        assert loaded.state_dict()[key].dtype == torch.float32
        assert torch.allclose(loaded.state_dict()[key], value, rtol=1e-3 if form == "float16" else 0, atol=0)
    assert all(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training


def test_a_compressed_archive_is_no_checkpoint(tmp_path):
    save(tmp_path / "a.pt", tiny(torch.float32).state_dict())
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, member in content.items():
            archive.writestr(name, member)
    with pytest.raises(cli.UserError, match=r"b\.pt is no checkpoint or is damaged \(.* is compressed\)"):
        load_checkpoint(tmp_path / "b.pt", "cpu")


def test_a_flipped_bit_in_a_weight_is_named(tmp_path):
    content = bytearray(save(tmp_path / "a.pt", tiny(torch.float32).state_dict()).read_bytes())
    weight = tiny(torch.float32).state_dict()["layers.1.mamba.in_proj.weight"].numpy().tobytes()
    content[content.index(weight) + 1000] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(cli.UserError, match=r"the bytes of a?.*/data/\d+ are not those that were written"):
        load_checkpoint(tmp_path / "a.pt", "cpu")


def test_an_error_inside_reading_is_one_user_error_but_for_a_full_gpu():
    message = r"^m\.pt is no checkpoint or is damaged \(it has no 'x'\); train it anew"
    with pytest.raises(cli.UserError, match=message), mamba_model.reading("m.pt"):
        _ = {}["x"]
    with pytest.raises(cli.UserError, match=r"^as it is$"), mamba_model.reading("m.pt"):
        raise cli.UserError("as it is")
    with pytest.raises(torch.OutOfMemoryError), mamba_model.reading("m.pt"):
        raise torch.OutOfMemoryError


def test_many_views_of_one_storage_take_no_memory(tmp_path):
    """Views that repeat a small file's numbers, transposed so that each would be copied."""
    one = torch.ones(1000, 1000)
    weights = {f"layers.{i}.norm.weight": one.t() for i in range(500)}  # 2 GB once copied
    with pytest.raises(cli.UserError, match="declare more numbers than the file holds"):
        load_checkpoint(save(tmp_path / "a.pt", weights), "cpu")


def test_open_model(tmp_path, shared_data, tiny_checkpoint, monkeypatch):
    model, args, series = mamba_model.open_model(tiny_checkpoint, shared_data, "cpu", "reference")
    assert model.backends == {"cpu": "reference"} and args["seq_len"] == 128 and series.X.shape == (3000, 6)
    for key, value in torch.load(tiny_checkpoint, weights_only=True)["model_state_dict"].items():
        assert torch.equal(model.state_dict()[key], value)
    monkeypatch.setattr(dataset, "load_series", lambda folder: pytest.fail("it was loaded already"))
    assert mamba_model.open_model(tiny_checkpoint, None, "cpu", "auto", series)[2] is series
    other = save(tmp_path / "other.pt", tiny(torch.float32).state_dict())
    with pytest.raises(cli.UserError, match=r"other\.pt predicts 3 features but the data have 6; give the --data-dir"):
        mamba_model.open_model(other, None, "cpu", "auto", series)
    with pytest.raises(cli.UserError, match="scan back end cuda needs a CUDA device"):
        mamba_model.open_model(tiny_checkpoint, None, "cpu", "cuda", series)


def test_stem():
    assert mamba_model.stem("runs/a.b_last.pt") == "a.b_last"


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


def test_stepping_a_bfloat16_model_on_a_cpu_is_refused_in_words():
    import generate

    model = CausalTimeSeriesMamba(3, d_model=8, n_layers=1, d_state=4).eval().bfloat16().use_scan("cpu", "cpu")
    with pytest.raises(cli.UserError, match="float32 or float64, and this model is in bfloat16; give"):
        generate.generate(model, np.zeros((1, 8, 3), np.float32), 4)


def test_the_data_that_a_checkpoint_names_come_before_those_beside_it(tmp_path):
    named, beside = tmp_path / "project" / "birds", tmp_path / "copy" / "birds"
    for folder in (named, beside):
        folder.mkdir(parents=True)
    checkpoint = {"args": {"data_dir": str(named)}, "data_dir": "birds"}
    assert mamba_model.trained_on(tmp_path / "copy" / "a.pt", checkpoint) == named
    named.rmdir()
    assert mamba_model.trained_on(tmp_path / "copy" / "a.pt", checkpoint) == beside
    beside.rmdir()
    assert mamba_model.trained_on(tmp_path / "copy" / "a.pt", checkpoint) == named  # to be missed under this name
