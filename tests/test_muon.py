"""--muon: the orthogonalised step against singular value decompositions, and runs that are trained with it."""

import math

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL

import mamba_model
import masked_model_gpu_mamba_next as training
import muon

NAME = "masked_model_gpu_mamba_next"


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_singular_values(G, n_iterations=5):
    """What the iteration makes of one matrix, from its singular values: an odd polynomial of a matrix acts on them."""
    U, s, Vt = np.linalg.svd(np.asarray(G), full_matrices=False)
    s = s / np.sqrt((s ** 2).sum())
    for _ in range(n_iterations):
        s = 3.4445 * s - 4.775 * s ** 3 + 2.0315 * s ** 5
    return (U * s) @ Vt


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (3, 40), (1, 7), (7, 1)])
def test_singular_vectors_stay_and_singular_values_come_near_one(shape):
    G = drawn(3, *shape) * torch.tensor([1e-6, 1.0, 1e4], dtype=torch.float64)[:, None, None]
    X = muon.orthogonalised(G)
    np.testing.assert_allclose(X, np.stack([by_singular_values(g) for g in G]), rtol=1e-9, atol=1e-9)
    s = torch.linalg.svdvals(X)
    assert s.max() < 1.21 and (s > 0.68).all()
    torch.testing.assert_close(muon.orthogonalised(G[0]), X[0])


def test_of_small_singular_values_and_of_none():
    U, V = (torch.linalg.qr(drawn(4, 4, seed=seed))[0] for seed in (1, 2))
    s = torch.tensor([1.0, 0.1, 0.002, 1e-5], dtype=torch.float64)
    X = muon.orthogonalised(U @ s.diag() @ V)
    after = (U.mT @ X @ V.mT).diag()
    assert (after[:3] > 0.68).all() and 1e-4 < after[3] < 0.01
    assert not muon.orthogonalised(torch.zeros(2, 3, 5)).any()


def test_three_steps_against_the_formulas():
    """Two matrices of one shape and one of another by Jordan et al. 2024 with the scale of Liu et al. 2025, eq. 4; the
    vector by AdamW alone."""
    matrices = [drawn(4, 6, seed=1), drawn(4, 6, seed=2), drawn(5, 2, seed=3)]
    vector, lone = drawn(3, seed=4), drawn(3, seed=4)
    expected, momenta = [p.numpy().copy() for p in matrices], [np.zeros(p.shape) for p in matrices]
    for p in (*matrices, vector, lone):
        p.requires_grad_()
    idle = torch.ones(2, 2, requires_grad=True)  # has no gradient
    optimizer = muon.Muon([{"params": matrices[:1], "lr": 0.3, "weight_decay": 0.1, "muon": True},
                           {"params": [vector], "lr": 0.2, "weight_decay": 0.0, "muon": False},
                           {"params": [*matrices[1:], idle], "lr": 0.2, "weight_decay": 0.0, "muon": True}])
    adamw = torch.optim.AdamW([lone], lr=0.2, weight_decay=0.0)
    for step in range(3):
        for i, p in enumerate(matrices):
            p.grad = drawn(*p.shape, seed=10 * step + i)
            momenta[i] = 0.95 * momenta[i] + 0.05 * p.grad.numpy()
            update = by_singular_values(0.95 * momenta[i] + 0.05 * p.grad.numpy())
            lr, decay = (0.3, 0.1) if i == 0 else (0.2, 0.0)
            expected[i] = expected[i] * (1 - lr * decay) - lr * 0.2 * math.sqrt(max(p.shape)) * update
        vector.grad = lone.grad = drawn(3, seed=step)
        optimizer.step()
        adamw.step()
    for p, value in zip(matrices, expected, strict=True):
        np.testing.assert_allclose(p.detach(), value, rtol=1e-9, atol=1e-9)
    assert torch.equal(vector, lone) and torch.equal(idle, torch.ones(2, 2))
    assert [sorted(optimizer.state[p]) for p in matrices] == [["momentum_buffer"]] * 3
    assert len(optimizer.param_groups) == 3


def test_it_goes_where_torchs_own_goes():
    """torch's rounds to bfloat16, so the two agree within that."""
    ours, theirs = (torch.nn.Parameter(drawn(16, 8).float()) for _ in range(2))
    groups = [{"params": [ours], "weight_decay": 0.01, "muon": True}]
    pair = (muon.Muon(groups, lr=0.1),
            torch.optim.Muon([theirs], lr=0.1, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"))
    for step in range(4):
        ours.grad = theirs.grad = drawn(16, 8, seed=step).float()
        for optimizer in pair:
            optimizer.step()
    start = drawn(16, 8).float()
    assert (ours - theirs).norm() < 0.03 * (theirs - start).norm()


def test_rates_on_the_device_do_what_numbers_do():
    """On a GPU the rates are tensors, which a captured graph reads anew at each step."""
    results = []
    for kind in (float, lambda lr: torch.tensor(lr, dtype=torch.float64)):
        p = torch.nn.Parameter(drawn(4, 3))
        optimizer = muon.Muon([{"params": [p], "lr": kind(0.1), "lr_factor": 1.0, "weight_decay": 0.01,
                                "muon": True}])
        for step, lr in enumerate((0.1, 0.3)):
            training.set_lr(optimizer, lr)
            p.grad = drawn(4, 3, seed=step)
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_no_number_goes_to_the_host():
    """A CUDA graph can't read one back; nor can tensors without values, whose use as a number is an error."""
    p = torch.nn.Parameter(torch.empty(4, 3, device="meta"))
    p.grad = torch.empty(4, 3, device="meta")
    rate = torch.empty((), device="meta")
    group = {"params": [p], "lr": rate, "weight_decay": 0.01, "muon": True}
    with pytest.raises(RuntimeError, match="meta"):
        rate.item()
    optimizer = muon.Muon([group])
    optimizer.param_groups[0]["lr"] = rate
    with torch.no_grad():
        optimizer.step_matrices(optimizer.param_groups[0])
    assert optimizer.state[p]["momentum_buffer"].shape == p.shape


def test_the_matrices_of_hidden_layers_and_nothing_else():
    model = mamba_model.CausalTimeSeriesMamba(3, **TINY_MODEL, mixture=2)
    name_of = {id(p): name for name, p in model.named_parameters()}
    groups = training.parameter_groups(model, 1.0, 0.5, False, muon=True)
    kinds = {name_of[id(p)]: group for group in groups for p in group["params"]}
    assert kinds.keys() == set(name_of.values())
    for name, group in kinds.items():
        shape = model.get_parameter(name).shape
        first_or_last = name in ("input_proj.weight", "output_heads.1.2.weight")
        assert group["muon"] == (len(shape) == 2 and "A_log" not in name and not first_or_last), name
        assert group["lr_factor"] == (0.5 if "x_proj" in name or "dt_proj" in name else 1.0)
    assert isinstance(training.build_optimizer(groups, 1.0, torch.device("cpu")), muon.Muon)
    plain = training.parameter_groups(model, 1.0, 0.5, False)
    assert not any(group["muon"] for group in plain)
    assert type(training.build_optimizer(plain, 1.0, torch.device("cpu"))) is torch.optim.AdamW


def flags(data, checkpoint, *more):
    return ["--data-dir", data, "--checkpoint", checkpoint, "--seq-len", "64", "--stride", "64", "--d-model", "8",
            "--n-layers", "2", "--d-state", "4", "--d-ff", "8", "--batch-size", "4", "--epochs", "3", "--warmup-epochs",
            "1", "--lr", "0.01", "--muon", *more]


def saved(path):
    return torch.load(path, weights_only=True)


def test_a_run_that_is_resumed_ends_in_the_same_bits(script, refused, shared_data, tmp_path, interrupted_after):
    assert script(NAME, *flags(shared_data, tmp_path / "whole.pt", "--ema", "0.5")).code == 0
    with interrupted_after(5):
        assert script(NAME, *flags(shared_data, tmp_path / "part.pt", "--ema", "0.5")).code == 130
    assert saved(tmp_path / "part_last.pt")["step"] == 5
    assert script(NAME, "--resume", "--checkpoint", tmp_path / "part.pt").code == 0
    whole, part = saved(tmp_path / "whole_last.pt"), saved(tmp_path / "part_last.pt")
    assert part["args"]["muon"] is True
    for key in ("model_state_dict", "ema_state_dict"):
        for name, tensor in whole[key].items():
            assert torch.equal(tensor, part[key][name]), name
    states = [run["optimizer_state_dict"]["state"] for run in (whole, part)]
    assert any("momentum_buffer" in entry for entry in states[0].values())
    for one, other in zip(*(state.values() for state in states), strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert script(NAME, "--eval", tmp_path / "part.pt", "--test-steps", "0").code == 0

    # Moments of AdamW in the place of a momentum, or none, are no state of this run.
    i = next(i for i, entry in states[1].items() if "momentum_buffer" in entry)
    for damage in ({}, {"momentum_buffer": torch.zeros(1)}, {"step": torch.ones(()), "exp_avg": torch.zeros(1)}):
        part["optimizer_state_dict"]["state"][i] = damage
        torch.save(part, tmp_path / "part_last.pt")
        assert "is damaged" in refused(NAME, "--resume", "--checkpoint", tmp_path / "part.pt", "--epochs", "9")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_captured_run_on_a_gpu_learns_what_a_cpu_does(script, shared_data, tmp_path):
    for name, *more in (("cpu.pt", "--device", "cpu"), ("gpu.pt", "--device", "cuda", "--no-amp", "--no-compile")):
        assert script(NAME, *flags(shared_data, tmp_path / name, "--dropout", "0", *more)).code == 0
    cpu, gpu = (saved(tmp_path / name)["model_state_dict"] for name in ("cpu.pt", "gpu.pt"))
    for name, tensor in cpu.items():
        torch.testing.assert_close(gpu[name].cpu(), tensor, rtol=1e-3, atol=1e-4)
