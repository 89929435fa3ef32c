"""Mixture of experts, one row and one expert at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.ops import Activation
from penstock.kernels.ref.arithmetic import gate_up, matvec
from penstock.kernels.types import Weight


def route_row(logits_E: Tensor, active: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """A stable sort: of equal logits the lower expert id comes first."""
    chosen_A = logits_E.sort(descending=True, stable=True).indices[:active]
    odds_E = torch.exp(logits_E - logits_E.amax())
    odds_A = odds_E[chosen_A]
    return chosen_A, odds_A / (odds_A.sum() if normalize else odds_E.sum())


def experts_row(
    x_D: Tensor,
    chosen: list[int],
    weights_A: Tensor,
    gate_up_E2FD: Weight,
    gate_up_bias_E2F: Tensor | None,
    down_EDF: Weight,
    down_bias_ED: Tensor | None,
    activation: Activation,
) -> Tensor:
    """fp32 [D]: the experts' outputs, weighted and added in slot order."""
    total_D = torch.zeros(down_EDF.shape[1], device=x_D.device)
    for slot, expert in enumerate(chosen):
        bias_2F = None if gate_up_bias_E2F is None else gate_up_bias_E2F[expert]
        inner_F = gate_up(x_D, gate_up_E2FD[expert], bias_2F, activation).to(x_D.dtype)
        bias_D = None if down_bias_ED is None else down_bias_ED[expert]
        total_D = total_D + weights_A[slot] * matvec(inner_F, down_EDF[expert], bias_D)
    return total_D
