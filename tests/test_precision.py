"""Half precision against double: predictions, gradients and whole training runs in float32, bfloat16 and float16.

What is compared is the relative error in the 2-norm, ‖value − reference‖ / ‖reference‖, with the float64 loop on a CPU
as the reference, in units of the unit roundoff u: 2⁻²⁴ (float32), 2⁻¹¹ (float16), 2⁻⁸ (bfloat16). Under autocast a
layer rounds weights and activations to half precision a few times: the loop under autocast is 1.5 u off in its
predictions, 1 u in the gradient of all parameters together and up to 3 u in that of one tensor, in which terms cancel,
alike in both types. A kernel may order and round differently: it is held to 8 u and, for one tensor, 64 u. In float32,
with TF32 off, the loop is 5 u off everywhere; the kernels take faster exponentials and sum over batch and time in
another order (the CPU's: 5 u, 33 u for one tensor), and are held to 64 u (4e-6) and 512 u (3e-5).
"""

import json

import pytest
import torch
from conftest import relative_error

import mamba_model
from mamba_model import CausalTimeSeriesMamba, horizon_mse

pytestmark = pytest.mark.usefixtures("undrawn")

UNIT_ROUNDOFF = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
TOLERANCE = {torch.float32: (64, 512), torch.float16: (8, 64), torch.bfloat16: (8, 64)}  # u: all, and one tensor
LOSS_SCALE = 2.0**8  # keeps float16 gradients off its subnormal numbers, as a gradient scaler would
HALF = (torch.float16, torch.bfloat16)
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
# The CPU's kernel knows no half precision: there the loop shows what half precision itself costs.
CASES = [("cpu", "cpu", torch.float32), *(("cpu", "reference", dtype) for dtype in HALF),
         *(pytest.param("cuda", "cuda", dtype, marks=on_gpu) for dtype in (torch.float32, *HALF))]


def model_and_windows():
    torch.manual_seed(1)
    model = CausalTimeSeriesMamba(6, d_model=64, n_layers=3, d_state=16, d_ff=128, dropout=0, max_horizon=2)
    return model, 20 * torch.randn(2, 6).cumsum(1)[:, None] * torch.rand(2, 64, 6).cumsum(1).mul(0.3).cos()


def predictions_and_gradients(model, x, dtype):
    """The predictions of both horizons (2, batch, time, features) and {parameter: gradient of the training loss}."""
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype in HALF):
        predictions = model(x)
    (LOSS_SCALE * horizon_mse(predictions, x).mean()).backward()
    stacked = torch.stack([p.detach() for p in predictions.values()]).double().cpu()
    return stacked, {name: p.grad.double().cpu() / LOSS_SCALE for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def reference():
    model, x = model_and_windows()
    model = model.double().use_scan("reference", "cpu")
    return predictions_and_gradients(model, x.double(), torch.float64)


@pytest.mark.parametrize("device, scan, dtype", CASES)
def test_predictions_and_gradients(reference, device, scan, dtype):
    model, x = model_and_windows()
    model = model.to(device).use_scan(scan, device)
    predictions, gradients = predictions_and_gradients(model, x.to(device), dtype)
    exact_predictions, exact = reference
    bound, tensor_bound = (factor * UNIT_ROUNDOFF[dtype] for factor in TOLERANCE[dtype])
    assert relative_error(predictions, exact_predictions) < bound
    flat, exact_flat = (torch.cat([g[name].flatten() for name in exact]) for g in (gradients, exact))
    assert relative_error(flat, exact_flat) < bound
    for name, gradient in gradients.items():
        assert relative_error(gradient, exact[name]) < tensor_bound, name
    if dtype in HALF:  # half precision was really used
        assert relative_error(predictions, exact_predictions) > UNIT_ROUNDOFF[dtype] / 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float16, 5e-4), (torch.bfloat16, 2e-3)])
def test_a_training_run_on_a_gpu_reaches_the_golden_curves(shared_data, tmp_path, monkeypatch, dtype, tolerance):
    """The curves of tests/golden.json, from float32 on a CPU. Autocast on a CPU comes within 2e-5 of them in float16
    and 2e-4 in bfloat16."""
    from test_golden import GOLDEN_FILE, run_training

    import masked_model_gpu_mamba_next as training

    golden = json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))["training"]
    for module in (training, mamba_model):  # training steps and validation
        monkeypatch.setattr(module, "autocast", lambda device, enabled: torch.autocast(
            device.type, dtype=dtype if dtype in HALF else torch.bfloat16, enabled=enabled))
    more = ["--device", "cuda", "--no-compile", *([] if dtype in HALF else ["--no-amp"])]
    curves = run_training(tmp_path, shared_data, *more)
    for column in curves:
        if "mse" in column or "loss" in column:
            assert curves[column] == pytest.approx(golden[column], rel=tolerance), column
