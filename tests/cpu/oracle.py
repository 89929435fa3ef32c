"""The oracle: small random models in transformers' float32, and a driver that runs ours over a paged cache.

The driver is hostile on purpose: the pool starts as NaN, blocks come in shuffled order, blocks that left a
window are poisoned, and table entries that must not be read point outside the pool.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor

from families import CONFIGS, random_config
from penstock.kernels import Batch, Forward, GroupBatch, KVLayer, Ops
from penstock.layers import Placement
from penstock.models import Decoder, load_decoder
from penstock.spec import ModelSpec
from penstock.spec.hf import read_model_spec

TOLERANCE = 2e-4
CPU = torch.device("cpu")
UNREADABLE = 2**31 - 1
LOGIT_STD = 8.0
"""Wide enough that two random logits rarely tie; errors are measured relative to the largest logit."""
WIDE = ("q_proj", "k_proj", "qkv_proj", "Wqkv", "query_key_value", "router", "mlp.gate.weight")
"""Linears whose outputs are spread further."""
TIE = 2e-5
"""Distance of two router logits, of standard deviation near 1, below which float32 may choose either expert."""


@dataclass(frozen=True)
class Reference:
    folder: Path
    model: transformers.PreTrainedModel
    spec: ModelSpec

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """fp32 [len(tokens), V]."""
        with torch.inference_mode():
            return self.model(torch.tensor([list(tokens)])).logits[0]

    def certain(self, tokens: Sequence[int]) -> int:
        """Leading positions that no near-tie of a router has touched; later ones may read another expert's K and V."""
        certain = len(tokens)
        for logits_TE, active in self._routed(tokens):
            top_TA = logits_TE.sort(descending=True).values[:, : active + 1]
            if top_TA.shape[1] > active:
                near = (top_TA[:, active - 1] - top_TA[:, active] < TIE).nonzero()
                certain = min([certain, *near[:1, 0].tolist()])
        return certain

    def tokens(self, rng: random.Random, count: int) -> list[int]:
        return [rng.randrange(self.spec.vocab_size) for _ in range(count)]

    def _routed(self, tokens: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Logits of each sparse layer's router, and how many experts it chooses."""
        seen: list[tuple[Tensor, int]] = []
        routers = [m for m in self.model.modules() if type(m).__name__.endswith("TopKRouter")]
        hooks = [m.register_forward_hook(lambda m, _, out: seen.append((out[0], m.top_k))) for m in routers]
        if routers:
            self.logits(tokens)
        for hook in hooks:
            hook.remove()
        return seen


def build_reference(family: str, rng: random.Random, folder: Path, **overrides: object) -> Reference:
    """A random model of a family, saved by transformers and read back by our config reader.

    Every weight is scaled so that attention is neither flat nor one-hot and the logits have a standard deviation of
    LOGIT_STD before they are capped.
    """
    config = getattr(transformers, CONFIGS[family])(**(random_config(family, rng) | overrides))
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(rng.randrange(2**31))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            _randomize(family, name, weight)
        _spread_logits(family, model)
    model.save_pretrained(folder)
    return Reference(folder, model, read_model_spec(folder))


def _randomize(family: str, name: str, weight: Tensor) -> None:
    if ("norm" in name or "ln_f" in name) and name.endswith("weight"):
        weight.normal_(0.0 if family.startswith("gemma") else 1.0, 0.3)
    elif name.endswith("bias"):
        weight.normal_(0.0, 0.3)
    elif name.endswith("sinks"):
        weight.normal_(1.0, 1.0)
    elif "embed" in name or "wte" in name:
        weight.normal_(0.0, weight.shape[1] ** -0.5 if family.startswith("gemma") else 1.0)
    else:
        wide = any(part in name for part in WIDE)
        fan_in = weight.shape[-2] if family == "gpt_oss" and "experts" in name else weight.shape[-1]
        weight.normal_(0.0, (1.5 if wide else 1.0) / fan_in**0.5)


def _spread_logits(family: str, model: transformers.PreTrainedModel) -> None:
    """Through the final norm, whose weight Gemma stores less one."""
    norm = next(m for name, m in model.base_model.named_children() if name in ("norm", "norm_f", "ln_f"))
    config, cap = model.config, getattr(model.config, "final_logit_softcapping", None)
    config.final_logit_softcapping = None
    factor = LOGIT_STD / model(torch.randint(config.vocab_size, (1, 64))).logits.std()
    for name, weight in norm.named_parameters():
        offset = 1.0 if family.startswith("gemma") and name == "weight" else 0.0
        weight.copy_((weight + offset) * factor - offset)
    config.final_logit_softcapping = cap


def load(reference: Reference, ops: Ops, spec: ModelSpec | None = None) -> Decoder:
    return load_decoder(reference.folder, spec or reference.spec, ops, Placement(torch.float32, CPU))


@dataclass
class PagedRequest:
    tokens: list[int] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)


def poison(layer: KVLayer | None, blocks: int | slice) -> None:
    """NaN, and codes that a scale of NaN makes so."""
    assert layer is not None
    for pool in layer.pools():
        pool[blocks] = 127 if pool.dtype == torch.int8 else float("nan")


class PagedDriver:
    """Runs steps of many requests, as a scheduler and runner would, with no scheduler and no runner."""

    def __init__(
        self,
        decoder: Decoder,
        ops: Ops,
        *,
        blocks: int,
        block_size: int,
        rng: random.Random,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.decoder, self.ops, self.block_size = decoder, ops, block_size
        spec = decoder.spec
        self.kv: list[KVLayer | None] = [None] * spec.layers
        self.groups = spec.kv_groups()
        self.free: list[list[int]] = []
        dtype = kv_dtype or decoder.embedding.dtype
        for group in self.groups:
            args = (len(group.layers), blocks, block_size, group.kv_heads, group.head_dim, dtype, CPU)
            for index, layer in zip(group.layers, ops.allocate_kv(*args), strict=True):
                poison(layer, slice(blocks))
                self.kv[index] = layer
            self.free.append(rng.sample(range(blocks), blocks))
        self.forward: Forward = lambda ids_T, batch: decoder.forward(ids_T, batch, self.kv)

    def request(self) -> PagedRequest:
        return PagedRequest([], [[] for _ in self.groups])

    def step(self, work: Sequence[tuple[PagedRequest, Sequence[int]]]) -> list[Tensor]:
        """Appends tokens to requests, all in one batch; returns each one's logits [count, V]."""
        positions: list[int] = []
        starts = [0]
        for request, new in work:
            positions += range(len(request.tokens), len(request.tokens) + len(new))
            starts.append(len(positions))
            request.tokens += new
        contexts = [len(request.tokens) for request, _ in work]
        batch = Batch(
            positions_T=torch.tensor(positions),
            row_starts=starts,
            row_starts_R1=torch.tensor(starts),
            contexts=contexts,
            contexts_R=torch.tensor(contexts),
            block_size=self.block_size,
            groups=[self._group(g, work) for g in range(len(self.groups))],
        )
        ids_T = torch.tensor([token for _, new in work for token in new])
        with torch.inference_mode():
            ends = self.forward(ids_T, batch)
            logits = self.decoder.logits(self.decoder.hidden(*ends, torch.arange(len(ids_T))))
        return list(logits.split([len(new) for _, new in work]))

    def _group(self, g: int, work: Sequence[tuple[PagedRequest, Sequence[int]]]) -> GroupBatch:
        slots: list[int] = []
        for request, new in work:
            table = request.tables[g]
            while len(table) * self.block_size < len(request.tokens):
                table.append(self.free[g].pop())
            first = len(request.tokens) - len(new)
            self._drop(g, table, first)
            slots += [
                table[p // self.block_size] * self.block_size + p % self.block_size
                for p in range(first, len(request.tokens))
            ]
        width = max(len(request.tables[g]) for request, _ in work)
        rows = [request.tables[g] + [UNREADABLE] * (width - len(request.tables[g])) for request, _ in work]
        return GroupBatch(torch.tensor(slots), torch.tensor(rows, dtype=torch.int32))

    def _drop(self, g: int, table: list[int], first: int) -> None:
        """Frees and poisons the blocks that no query from position ``first`` on can see."""
        window = self.groups[g].window
        if window is None:
            return
        for index in range(max(0, first - window + 1) // self.block_size):
            if table[index] != UNREADABLE:
                for layer in self.groups[g].layers:
                    poison(self.kv[layer], table[index])
                self.free[g].insert(0, table[index])
                table[index] = UNREADABLE


def paged_logits(
    decoder: Decoder,
    ops: Ops,
    tokens: Sequence[int],
    chunk: int,
    block_size: int,
    *,
    seed: int = 0,
    mates: Sequence[Sequence[int]] = (),
    kv_dtype: torch.dtype | None = None,
) -> Tensor:
    """fp32 [len(tokens), V], computed ``chunk`` tokens a step while ``mates`` run beside, one token a step."""
    rng = random.Random(seed)
    longest = len(tokens) + sum(map(len, mates))
    blocks = longest // block_size + 2 + 2 * len(mates)
    driver = PagedDriver(decoder, ops, blocks=blocks, block_size=block_size, rng=rng, kv_dtype=kv_dtype)
    request, others = driver.request(), [(driver.request(), mate) for mate in mates]
    out = []
    for start in range(0, len(tokens), chunk):
        work = [(request, list(tokens[start : start + chunk]))]
        for other, mate in others:
            if len(other.tokens) < len(mate):
                work.insert(rng.randrange(len(work) + 1), (other, [mate[len(other.tokens)]]))
        place = next(i for i, (who, _) in enumerate(work) if who is request)
        out.append(driver.step(work)[place])
    return torch.cat(out)


def error(ours_TV: Tensor, theirs_TV: Tensor) -> float:
    """Largest over the rows of max|a - b| / max|b|; infinite if anything is not finite."""
    if not torch.isfinite(ours_TV).all():
        return float("inf")
    return float(((ours_TV - theirs_TV).abs().amax(-1) / theirs_TV.abs().amax(-1)).max())
