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

from penstock.kernels import Batch, GroupBatch, KVLayer, Ops
from penstock.layers import Placement
from penstock.models import Decoder, load_decoder
from penstock.spec import ModelSpec
from penstock.spec.hf import read_model_spec

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
TOLERANCE = 2e-4
CPU = torch.device("cpu")
UNREADABLE = 2**31 - 1
LOGIT_STD = 8.0
"""Wide enough that two random logits rarely tie; errors are measured relative to the largest logit."""


@dataclass(frozen=True)
class Reference:
    folder: Path
    model: transformers.PreTrainedModel
    spec: ModelSpec

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """fp32 [len(tokens), V]."""
        with torch.inference_mode():
            return self.model(torch.tensor([list(tokens)])).logits[0]

    def tokens(self, rng: random.Random, count: int) -> list[int]:
        return [rng.randrange(self.spec.vocab_size) for _ in range(count)]


def build_reference(family: str, rng: random.Random, folder: Path, **overrides: object) -> Reference:
    """A random model of a family, saved by transformers and read back by our config reader.

    Head counts may be odd, head_dim is any even number from 8 to 128, and every weight is scaled so that attention
    is neither flat nor one-hot and the logits have a standard deviation of LOGIT_STD.
    """
    config = getattr(transformers, CONFIGS[family])(**(random_config(family, rng) | overrides))
    config._attn_implementation = "eager"
    torch.manual_seed(rng.randrange(2**31))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            _randomize(name, weight)
        probe = torch.randint(config.vocab_size, (1, 64))
        model.model.norm.weight *= LOGIT_STD / model(probe).logits.std()
    model.save_pretrained(folder)
    return Reference(folder, model, read_model_spec(folder))


CONFIGS = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}


def random_config(family: str, rng: random.Random) -> dict[str, object]:
    kv_heads, group = rng.choice([(1, 1), (1, 3), (3, 1), (2, 2), (5, 1), (3, 2), (1, 7), (2, 4)])
    heads, layers = kv_heads * group, rng.choice([2, 3])
    config: dict[str, object] = {
        "vocab_size": rng.randrange(90, 300),
        "hidden_size": heads * rng.choice([8, 12, 17]),
        "intermediate_size": rng.choice([50, 96, 129, 172]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * rng.randrange(4, 65),
        "max_position_embeddings": 512,
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "tie_word_embeddings": rng.random() < 0.5,
        "hidden_act": rng.choice(["silu", "silu", "gelu_pytorch_tanh"]),
        "rope_parameters": random_rope(rng),
    }
    if family == "llama":
        config |= {"attention_bias": rng.random() < 0.3, "mlp_bias": rng.random() < 0.3}
    if family == "mistral":
        config["sliding_window"] = rng.choice([None, 5, 32, 100])
    if family in ("qwen2", "qwen3"):
        sliding = rng.random() < 0.5
        config |= {"use_sliding_window": sliding, "sliding_window": rng.choice([7, 64]), "max_window_layers": 1}
    if family == "qwen2":  # its configuration class has no head_dim of its own
        config["hidden_size"] = heads * 2 * rng.randrange(4, 33)
        del config["head_dim"]
    if family == "qwen3":
        config["attention_bias"] = rng.random() < 0.3
    return config


def random_rope(rng: random.Random) -> dict[str, object]:
    theta = rng.choice([500.0, 10000.0, 1e6])
    return rng.choice(
        [
            {"rope_type": "default", "rope_theta": theta},
            {"rope_type": "linear", "rope_theta": theta, "factor": 2.5},
            {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ]
    )


def _randomize(name: str, weight: Tensor) -> None:
    if name.endswith("norm.weight"):
        weight.normal_(1.0, 0.3)
    elif name.endswith(".bias"):
        weight.normal_(0.0, 0.3)
    else:
        gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
        weight.normal_(0.0, 1.0 if "embed" in name else gain / weight.shape[1] ** 0.5)


def load(reference: Reference, ops: Ops, spec: ModelSpec | None = None) -> Decoder:
    return load_decoder(reference.folder, spec or reference.spec, ops, Placement(torch.float32, CPU))


@dataclass
class PagedRequest:
    tokens: list[int] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)


class PagedDriver:
    """Runs steps of many requests, as a scheduler and runner would, with no scheduler and no runner."""

    def __init__(self, decoder: Decoder, ops: Ops, *, blocks: int, block_size: int, rng: random.Random) -> None:
        self.decoder, self.ops, self.block_size = decoder, ops, block_size
        spec = decoder.spec
        self.kv: list[KVLayer | None] = [None] * spec.layers
        self.groups = spec.kv_groups()
        self.free: list[list[int]] = []
        dtype = decoder.embedding.table_VD.dtype
        for group in self.groups:
            args = (len(group.layers), blocks, block_size, group.kv_heads, group.head_dim, dtype, CPU)
            for index, layer in zip(group.layers, ops.allocate_kv(*args), strict=True):
                layer.k_PBHd[:blocks] = layer.v_PBHd[:blocks] = float("nan")
                self.kv[index] = layer
            self.free.append(rng.sample(range(blocks), blocks))

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
            hidden = self.decoder.forward(ids_T, batch, self.kv, torch.arange(len(ids_T)))
            logits = self.decoder.logits(hidden)
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
                    self.kv[layer].k_PBHd[table[index]] = self.kv[layer].v_PBHd[table[index]] = float("nan")
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
) -> Tensor:
    """fp32 [len(tokens), V], computed ``chunk`` tokens a step while ``mates`` run beside, one token a step."""
    rng = random.Random(seed)
    longest = len(tokens) + sum(map(len, mates))
    driver = PagedDriver(
        decoder, ops, blocks=longest // block_size + 2 + 2 * len(mates), block_size=block_size, rng=rng
    )
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
