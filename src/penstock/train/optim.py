"""Muon for the matrices of the layers, AdamW for the embedding and the norms.

Source: Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024), with
the quintic Newton-Schulz coefficients given there. Master weights and moments are float32.

Shape legend: G matrices of one shape stacked, R rows, S columns.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from penstock.train.model import fast_dtype

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(grad_GRS: Tensor, steps: int = 5) -> Tensor:
    """Return matrices near the orthogonal factors of the given ones (singular values ~ 1)."""
    a, b, c = _COEFFICIENTS
    x_GRS = grad_GRS.to(fast_dtype(grad_GRS.device))
    tall = x_GRS.shape[-2] > x_GRS.shape[-1]
    if tall:
        x_GRS = x_GRS.mT.contiguous()
    x_GRS = x_GRS / (x_GRS.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram_GRR = x_GRS @ x_GRS.mT
        poly_GRR = torch.baddbmm(gram_GRR, gram_GRR, gram_GRR, beta=b, alpha=c)
        x_GRS = torch.baddbmm(x_GRS, poly_GRR, x_GRS, beta=a)
    return x_GRS.mT if tall else x_GRS


class Muon:
    """Momentum, Newton-Schulz and decoupled weight decay on a list of matrices."""

    def __init__(self, params: Iterable[Tensor], momentum: float, weight_decay: float) -> None:
        self.params = list(params)
        self.momentum, self.weight_decay = momentum, weight_decay
        self.buffers = [torch.zeros_like(p) for p in self.params]
        shapes: dict[tuple[int, ...], list[int]] = {}
        for i, p in enumerate(self.params):
            shapes.setdefault(tuple(p.shape), []).append(i)
        self.groups = list(shapes.values())

    @torch.no_grad()
    def step(self, lr: float, momentum: float | None = None) -> None:
        """Update every matrix; ``lr`` is the root mean square step of a square matrix times
        sqrt(side), as in the source."""
        beta = self.momentum if momentum is None else momentum
        for group in self.groups:
            nesterov = []
            for i in group:
                grad = self.params[i].grad
                assert grad is not None
                self.buffers[i].lerp_(grad, 1.0 - beta)
                nesterov.append(grad.lerp(self.buffers[i], beta))
            update_GRS = orthogonalize(torch.stack(nesterov))
            rows, columns = update_GRS.shape[-2:]
            scale = max(1.0, rows / columns) ** 0.5
            for i, update in zip(group, update_GRS, strict=True):
                p = self.params[i]
                p.mul_(1.0 - lr * self.weight_decay)
                p.add_(update.to(p.dtype), alpha=-lr * scale)

    def state(self) -> dict[str, Tensor]:
        """Return the momentum buffers by index."""
        return {f"muon.{i}": b for i, b in enumerate(self.buffers)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Copy the buffers back from :meth:`state`."""
        for i, b in enumerate(self.buffers):
            b.copy_(state[f"muon.{i}"])


class AdamW:
    """Adam with decoupled weight decay (on matrices only, not on vectors)."""

    def __init__(self, params: Iterable[Tensor], betas: tuple[float, float], weight_decay: float) -> None:
        self.params = list(params)
        self.betas, self.weight_decay = betas, weight_decay
        self.first = [torch.zeros_like(p) for p in self.params]
        self.second = [torch.zeros_like(p) for p in self.params]
        self.steps = 0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every tensor; ``lr`` is the largest step of one weight."""
        self.steps += 1
        beta1, beta2 = self.betas
        fix1, fix2 = 1.0 - beta1**self.steps, 1.0 - beta2**self.steps
        for p, m, v in zip(self.params, self.first, self.second, strict=True):
            grad = p.grad
            assert grad is not None
            m.lerp_(grad, 1.0 - beta1)
            v.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
            if p.ndim > 1:
                p.mul_(1.0 - lr * self.weight_decay)
            p.addcdiv_(m, (v / fix2).sqrt_().add_(1e-10), value=-lr / fix1)

    def state(self) -> dict[str, Tensor]:
        """Return both moments by index, and the step count."""
        out = {f"adam.m.{i}": t for i, t in enumerate(self.first)}
        out.update({f"adam.v.{i}": t for i, t in enumerate(self.second)})
        out["adam.steps"] = torch.tensor(self.steps)
        return out

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Copy the moments back from :meth:`state`."""
        for i in range(len(self.params)):
            self.first[i].copy_(state[f"adam.m.{i}"])
            self.second[i].copy_(state[f"adam.v.{i}"])
        self.steps = int(state["adam.steps"].item())
