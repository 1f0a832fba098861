"""Muon: AdamW, but every direction of a weight matrix takes a step of the same size.

K. Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", with the step sizes of J. Liu et al.
2025, "Muon is scalable for LLM training" (arXiv 2502.16982, eq. 4), so that the learning rates of AdamW fit. torch has
an optimiser of this name too. It reads the learning rate back to the host, which a CUDA graph can't, and takes one
matrix at a time.
"""

import math

import torch

MOMENTUM = 0.95
RMS_OF_ADAMW = 0.2  # of the entries of an update, before the learning rate


def orthogonalised(G, n_iterations=5):
    """The matrices G = U diag(s) Vᵀ with singular values brought near 1: about U Vᵀ. G: (..., rows, columns).

    The iteration applies the polynomial 3.4445 s − 4.775 s³ + 2.0315 s⁵ to all singular values at once, by matrix
    products alone (Jordan et al. 2024). It ends with values between 0.68 and 1.21 where s is at least 0.002 of the
    Frobenius norm; smaller ones stay smaller. That is all the accuracy that an update needs.
    """
    tall = G.shape[-2] > G.shape[-1]
    X = G.mT if tall else G  # the products are then of the shorter side's size
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(n_iterations):
        gram = X @ X.mT
        X = 3.4445 * X + (-4.775 * gram + 2.0315 * gram @ gram) @ X
    return X.mT if tall else X


class Muon(torch.optim.AdamW):
    """AdamW, but for the groups with a true "muon": these hold matrices, whose momentum is orthogonalised.

    The arguments are those of AdamW; each group must have the key. The state of such a matrix is its "momentum_buffer".
    """

    def __setstate__(self, state):
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's own asks every state for its step count

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self.step_matrices(group)
        return loss

    def step_matrices(self, group):
        by_shape = {}  # matrices of one shape go through the iteration together
        for p in group["params"]:
            if p.grad is not None:
                by_shape.setdefault(p.shape, []).append(p)
        for shape, matrices in by_shape.items():
            for p in matrices:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum_buffer"] for p in matrices]
            gradients = [p.grad for p in matrices]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov
            updates = orthogonalised(torch.stack(ahead)) * (RMS_OF_ADAMW * math.sqrt(max(shape)) * group["lr"])
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(matrices, list(updates))


def state_shapes(optimizer):
    """What "state" of the state_dict() of an AdamW or a Muon holds after a step: {i: {name: shape}} of parameter i."""
    shapes = [{"momentum_buffer": p.shape} if group["muon"] else
              {"step": torch.Size([]), "exp_avg": p.shape, "exp_avg_sq": p.shape}
              for group in optimizer.param_groups for p in group["params"]]
    return dict(enumerate(shapes))
