"""--constant: signals of the blocks that are learned constants, in every way in which a model is computed."""

import numpy as np
import pytest
import torch

import cli
import generate
import mamba_model
import masked_model_gpu_mamba_next as training
from kernels import step_cpu
from kernels.selective_scan import _inner_op, matrix_and_bias

pytestmark = pytest.mark.usefixtures("undrawn")

NAME = "masked_model_gpu_mamba_next"
SUBSETS = ["delta", "B", "C", "z", "B,C", "delta,B,C", "delta,B,C,z"]
SIZES = {"delta": lambda b: b.d_inner, "B": lambda b: b.d_state, "C": lambda b: b.d_state, "z": lambda b: b.d_inner}


def tiny(constant, dtype=torch.float64, **sizes):
    """A model whose parameters are away from their special initial values."""
    torch.manual_seed(0)
    sizes = {"feature_dim": 3, "d_model": 32, "n_layers": 2, "d_state": 4, "d_ff": 8, **sizes}
    model = mamba_model.CausalTimeSeriesMamba(**sizes, constant=constant.split(",")).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model




@pytest.mark.parametrize("constant", SUBSETS)
def test_constant_signals_are_their_parameters_and_the_others_follow_the_input(constant):
    block = tiny(constant).layers[0].mamba
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    signals = block.signals(x)
    for name in cli.SIGNALS:
        varies = (signals[name] - signals[name][0, 0]).abs().max() > 1e-3
        assert varies == (name not in constant.split(",")), name
    parameters = {"delta": torch.nn.functional.softplus(block.dt_proj.bias),
                  **{name: getattr(block, name, None) for name in "BCz"}}
    for name in constant.split(","):
        assert torch.equal(signals[name], parameters[name].expand_as(signals[name]))


def test_the_initial_values_of_constants():
    """B and z are ones, C is drawn from the standard normal law."""
    torch.manual_seed(0)
    block = mamba_model.MambaBlock(16, d_state=100_000, expand=1, constant=("B", "C", "z"))
    assert (block.B == 1).all() and (block.z == 1).all()
    assert block.C.mean().item() == pytest.approx(0, abs=0.01) and block.C.std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("constant", SUBSETS)
def test_only_what_is_used_is_a_parameter(constant):
    full, model = tiny("z,delta").layers[0].mamba, tiny(constant)
    names = constant.split(",")
    for layer in model.layers:
        block = layer.mamba
        shapes = {key: tuple(value.shape) for key, value in block.state_dict().items()}
        x_rows = sum(n for name, n in {"delta": 2, "B": 4, "C": 4}.items() if name not in names)
        wanted = {"in_proj.weight": (64 if "z" in names else 128, 32), "conv1d.weight": (64, 1, 4),
                  "conv1d.bias": (64,), "dt_proj.bias": (64,), "A_log": (64, 4), "D": (64,),
                  "out_proj.weight": (32, 64),
                  **({"x_proj.weight": (x_rows, 64)} if x_rows else {}),
                  **({} if "delta" in names else {"dt_proj.weight": (64, 2)}),
                  **{name: (SIZES[name](full),) for name in names if name != "delta"}}
        assert shapes == wanted
    predictions = model(torch.randn(2, 20, 3, dtype=torch.float64))["1"]
    predictions.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("constant", SUBSETS)
def test_every_back_end_and_the_recurrence_compute_the_same(constant):
    model = tiny(constant)
    x = torch.randn(2, 70, 3, dtype=torch.float64)
    outputs, gradients = {}, {}
    for backend in ("cpu", "reference"):
        model.use_scan(backend, "cpu").zero_grad()
        outputs[backend] = model(x)["1"]
        outputs[backend].square().sum().backward()
        gradients[backend] = [p.grad.clone() for p in model.parameters()]
    assert torch.allclose(outputs["cpu"], outputs["reference"], rtol=0, atol=1e-10)
    for one, other in zip(*gradients.values(), strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-10)
    with torch.no_grad():
        prediction, states = model.use_scan("cpu", "cpu").prefill(x[:, :50])
        for t in range(50, 70):
            assert torch.allclose(prediction["1"], outputs["cpu"][:, t - 1], rtol=0, atol=1e-10)
            prediction, states = model.step(x[:, t], states)


def test_with_delta_b_and_c_constant_a_block_is_a_convolution():
    """Its scan against np.convolve with the kernel of the SSM: K_j = Δ Σ_n C_n exp(Δ A_n)^j B_n, plus D at j = 0."""
    block = tiny("delta,B,C").layers[1].mamba
    x = torch.randn(1, 40, 32, dtype=torch.float64)
    signals = {name: values[0].numpy() for name, values in block.signals(x).items()}
    A, D = -np.exp(block.A_log.detach().numpy()), block.D.detach().numpy()
    B, C, delta = (getattr(block, name).detach().numpy() if name != "delta" else
                   np.log1p(np.exp(block.dt_proj.bias.detach().numpy())) for name in ("B", "C", "delta"))
    y = np.empty((40, 64))
    for d in range(64):
        kernel = np.array([delta[d] * np.sum(C * np.exp(delta[d] * A[d] * j) * B) for j in range(40)])
        kernel[0] += D[d]
        y[:, d] = np.convolve(signals["conv"][:, d], kernel)[:40]
    y *= signals["z"] / (1 + np.exp(-signals["z"]))
    expected = y @ block.out_proj.weight.detach().numpy().T
    np.testing.assert_allclose(block(x, "cpu")[0].detach().numpy(), expected, rtol=0, atol=1e-10)


def test_the_operator_for_compilation_takes_a_bias_of_x_proj():
    block = tiny("B", torch.float32).layers[0].mamba
    parameters = [p.detach().requires_grad_() for p in block.inner_parameters()]
    xz = torch.randn(2, 9, 128, requires_grad=True)
    torch.library.opcheck(_inner_op, (xz, *parameters, "cpu"),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_a_weight_may_have_a_bias_as_its_last_column():
    weight = torch.arange(12.0).reshape(3, 4)
    assert matrix_and_bias(weight, 4)[1] is None and matrix_and_bias(weight, 4)[0] is weight
    matrix, bias = matrix_and_bias(weight, 3)
    assert torch.equal(matrix, weight[:, :3]) and bias.tolist() == [3, 7, 11]


@pytest.mark.parametrize("constant", SUBSETS)
@pytest.mark.parametrize("mixture", [0, 3])
def test_generation_steps_are_those_of_the_model(monkeypatch, constant, mixture):
    model = tiny(constant, torch.float32, mixture=mixture).use_scan("cpu", "cpu")
    seed = np.random.default_rng(0).normal(size=(2, 30, 3)).astype(np.float32)
    songs = []
    for stepper in (generate.loop_stepper, step_cpu.stepper):
        monkeypatch.setattr(generate, "choose_stepper", lambda model, stepper=stepper: stepper)
        songs.append(generate.generate(model, seed, 40)[0])
    assert np.abs(songs[0]).max() > 0.01
    np.testing.assert_allclose(songs[1], songs[0], rtol=0, atol=1e-4 * np.abs(songs[0]).max())


@pytest.mark.parametrize("constant", ["", *SUBSETS])
def test_a_checkpoint_tells_what_is_constant(tmp_path, constant):
    model = tiny(constant, torch.float32)
    mamba_model.save_checkpoint(tmp_path / "a.pt", 1, model.state_dict(), {}, 1.0, 1.0, {})
    loaded, _ = mamba_model.load_checkpoint(tmp_path / "a.pt")
    assert loaded.layers[0].mamba.constant == loaded.layers[1].mamba.constant == tuple(
        name for name in constant.split(",") if name)
    x = torch.randn(1, 20, 3)
    assert torch.equal(loaded(x)["1"], model(x)["1"])


def test_a_checkpoint_whose_layers_differ_is_refused(tmp_path):
    state = tiny("B", torch.float32).state_dict()
    del state["layers.1.mamba.B"]
    mamba_model.save_checkpoint(tmp_path / "a.pt", 1, state, {}, 1.0, 1.0, {})
    with pytest.raises(cli.UserError, match="is no checkpoint or is damaged"):
        mamba_model.load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("text, kept, name", [
    ("delta", "delta", "delta"), ("C,B,delta", "delta,B,C", "delta-B-C"), ("z,z", "z", "z")])
def test_the_flag(text, kept, name):
    args = training.parse_args(["--constant", text])
    assert args.constant == kept and str(args.checkpoint) == f"model_next_constant{name}.pt"


@pytest.mark.parametrize("text", ["", "A", "delta,", "b,c", "delta B"])
def test_other_names_are_refused(refused, text):
    assert "must be one or more of delta,B,C,z" in refused(NAME, "--constant", text)


def test_the_gates_learning_rate_is_that_of_their_constants():
    model = tiny("delta,B,z")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = training.parameter_groups(model, 1.0, 0.01, False)
    found = {names[id(p)]: (g["lr_factor"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found["layers.0.mamba.B"] == found["layers.0.mamba.dt_proj.bias"] == (0.01, 0.0)
    assert found["layers.0.mamba.z"] == (1.0, 0.0) and found["layers.0.mamba.x_proj.weight"] == (0.01, 0.01)
    frozen = {names[id(p)] for g in training.parameter_groups(model, 1.0, 0.0, False) for p in g["params"]}
    assert found.keys() - frozen == {f"layers.{i}.mamba.{name}" for i in (0, 1)
                                     for name in ("B", "dt_proj.bias", "x_proj.weight")}
    model = tiny("C")
    (gate,) = [g for g in training.parameter_groups(model, 1.0, 0.01, False)
               if any(p is model.layers[0].mamba.C for p in g["params"])]
    assert (gate["lr_factor"], gate["weight_decay"]) == (0.01, 0.0)


def test_a_run_trains_its_constants_is_resumed_and_draws_its_gates(script, shared_data, tmp_path, interrupted_after):
    argv = ["--d-model", "16", "--n-layers", "2", "--d-state", "4", "--d-ff", "16", "--seq-len", "64", "--stride",
            "128", "--batch-size", "8", "--epochs", "3", "--warmup-epochs", "1", "--device", "cpu", "--mixture", "2",
            "--constant", "delta,B,C,z", "--data-dir", shared_data]
    assert script(NAME, *argv, "--checkpoint", tmp_path / "a.pt").code == 0
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    assert saved["args"]["constant"] == "delta,B,C,z"
    initial = training.build_model(training.parse_args([str(word) for word in argv]), 6).state_dict()
    assert saved["model_state_dict"].keys() == initial.keys()
    for name in ("B", "C", "z", "dt_proj.bias"):
        assert not torch.equal(saved["model_state_dict"][f"layers.1.mamba.{name}"], initial[f"layers.1.mamba.{name}"])
    with interrupted_after(5):
        assert script(NAME, *argv, "--checkpoint", tmp_path / "b.pt").code == 130
    assert script(NAME, "--resume", "--checkpoint", tmp_path / "b.pt").code == 0
    one, other = (torch.load(tmp_path / name, weights_only=True)["model_state_dict"] for name in ("a.pt", "b.pt"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    done = script("visualize_gates", "--checkpoint", tmp_path / "a.pt", "--data-dir", shared_data, "--save-dir",
                  tmp_path)
    assert done.code == 0 and list(tmp_path.glob("a_gates*.png")), done
