"""Attention with its scores written out, for caps, sinks and slopes, which the library's attention does not know."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SCORES_AT_ONCE = 1 << 24
"""fp32 scores held together: 64 MiB."""


class Scoring(NamedTuple):
    """What becomes of q k^T: a factor, a cap, slopes over the distance; and the logits of keys that have no value."""

    scale: float
    softcap: float | None
    sinks_N: Tensor | None
    slopes_N: Tensor | None

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks_N is None and self.slopes_N is None


def scored(
    q_bHgtd: Tensor, k_bHnd: Tensor, v_bHnd: Tensor, mask_tn: Tensor | None, scoring: Scoring, *, causal: bool = False
) -> Tensor:
    """As stored [b, H, g, t, d]; g query heads share a KV head, and ``mask_tn`` broadcasts to [b, H, g, t, n]."""
    (b, heads, g, rows), keys = q_bHgtd.shape[:4], k_bHnd.shape[2]
    if causal:
        mask_tn = torch.ones(rows, keys, dtype=torch.bool, device=q_bHgtd.device).tril()
    k_bHdn, v_bHnd = k_bHnd.float().transpose(2, 3), v_bHnd.float()
    out_bHgtd = torch.empty_like(q_bHgtd)
    piece = max(1, SCORES_AT_ONCE // (b * heads * g * keys))
    for start in range(0, rows, piece):
        q_bHgpd = q_bHgtd[:, :, :, start : start + piece]
        scores = (q_bHgpd.flatten(2, 3).float() @ k_bHdn).mul_(scoring.scale).view(b, heads, g, -1, keys)
        if scoring.softcap is not None:
            scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
        mask_pn = mask_tn if mask_tn is None or mask_tn.shape[-2] == 1 else mask_tn[..., start : start + piece, :]
        if scoring.slopes_N is not None:
            scores.addcmul_(scoring.slopes_N.view(heads, g, 1, 1), _distances(keys, mask_pn, scores.device))
        if mask_pn is not None:
            scores.masked_fill_(~mask_pn, float("-inf"))
        total = _exp_(scores, scoring.sinks_N)
        out_bHgtd[:, :, :, start : start + piece] = (scores.flatten(2, 3) @ v_bHnd).view_as(q_bHgpd) / total
    return out_bHgtd


def _distances(keys: int, mask_pn: Tensor | None, device: torch.device) -> Tensor:
    """fp32, of each key from its row's own, which is the last that the row sees."""
    at_n = torch.arange(keys, dtype=torch.float32, device=device)
    return at_n - (keys - 1 if mask_pn is None else at_n.where(mask_pn, 0).amax(-1, keepdim=True))


def _exp_(scores_bHgpn: Tensor, sinks_N: Tensor | None) -> Tensor:
    """Scores to weights, in place; returns their sums, the sinks' weights among them."""
    top = scores_bHgpn.amax(-1, keepdim=True)
    if sinks_N is None:
        return scores_bHgpn.sub_(top).exp_().sum(-1, keepdim=True)
    sinks_Hg11 = sinks_N.float().view(*scores_bHgpn.shape[1:3], 1, 1)
    top = top.maximum(sinks_Hg11)
    return scores_bHgpn.sub_(top).exp_().sum(-1, keepdim=True) + (sinks_Hg11 - top).exp()
