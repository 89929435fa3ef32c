"""Against transformers in float32: logits within TOLERANCE, greedy tokens equal wherever the reference is sure.

Eight named mutations of a correct model must each fail the same comparison, so that it is known to look.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from oracle import CPU, FAMILIES, TOLERANCE, PagedDriver, Reference, build_reference, error, load, paged_logits
from penstock.kernels import Batch, Ops, make_ops
from penstock.layers import Placement
from penstock.models import Decoder, load_decoder
from penstock.spec.hf import read_model_spec

BACKENDS = ("ref", "torch")
CHUNKS = (1, 7, 64, 10_000)
SURE = 1e-3
"""Top-2 margin of the reference below which a greedy token is a coin toss."""


@pytest.fixture(autouse=True, scope="module")
def quiet_transformers() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 40))])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, seed: int, tmp_path: Path) -> None:
    """Every position's logits, at every chunk size, with strangers in the batch, through shuffled blocks."""
    rng = random.Random(f"logits {family} {seed}")
    reference = build_reference(family, rng, tmp_path)
    tokens = reference.tokens(rng, rng.choice([60, 150, 290]))
    theirs = reference.logits(tokens)
    assert theirs.std() >= 1
    for backend in BACKENDS:
        ops = make_ops(backend)
        decoder = load(reference, ops)
        for chunk in CHUNKS if backend == "torch" else [CHUNKS[seed % 4]]:
            block_size = rng.choice([1, 2, 16, 64, 128])
            mates = [reference.tokens(rng, rng.randrange(1, 40)) for _ in range(rng.randrange(3))]
            ours = paged_logits(decoder, ops, tokens, chunk, block_size, seed=seed, mates=mates)
            worst = error(ours, theirs)
            print(f"{backend} differs by {worst:.1e}")
            assert worst <= TOLERANCE, (backend, chunk, block_size, reference.spec)


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_do_not_depend_on_chunks_blocks_or_mates(family: str, tmp_path: Path) -> None:
    rng = random.Random(f"bits {family}")
    reference, ops = build_reference(family, rng, tmp_path), make_ops("ref")
    tokens, decoder = reference.tokens(rng, 150), load(reference, ops)
    alone = paged_logits(decoder, ops, tokens, 10_000, 16)
    for chunk, block_size in ((1, 128), (7, 1), (64, 32)):
        mates = [reference.tokens(rng, 30) for _ in range(2)]
        assert torch.equal(alone, paged_logits(decoder, ops, tokens, chunk, block_size, seed=chunk, mates=mates))


def greedy(decoder: Decoder, ops: Ops, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Appends ``count`` tokens to each prompt, all prompts in one batch."""
    blocks = 1 + sum(len(prompt) + count for prompt in prompts) // 8
    driver = PagedDriver(decoder, ops, blocks=blocks + len(prompts), block_size=8, rng=random.Random(1))
    requests = [driver.request() for _ in prompts]
    new = prompts
    for _ in range(count):
        logits = driver.step(list(zip(requests, new, strict=True)))
        new = [[int(rows[-1].argmax())] for rows in logits]
    return [request.tokens + last for request, last in zip(requests, new, strict=True)]


def sure_steps(reference: Reference, tokens: list[int], prompt: int) -> tuple[int, bool]:
    """(steps, agreed): how many greedy steps the reference shares before its own margin is below SURE."""
    rows = reference.logits(tokens)[prompt - 1 : -1]
    top = rows.topk(2)
    margins = (top.values[:, 0] - top.values[:, 1]).tolist()
    for step, margin in enumerate(margins):
        if margin < SURE:
            return step, True
        if int(top.indices[step, 0]) != tokens[prompt + step]:
            return step, False
    return len(margins), True


def test_greedy_tokens(tmp_path: Path) -> None:
    """64 greedy steps of 48 runs, 3 prompts in each batch."""
    reached = []
    for seed in range(4):
        for family in FAMILIES:
            rng = random.Random(f"greedy {family} {seed}")
            reference = build_reference(family, rng, tmp_path / f"{family}{seed}")
            ops = make_ops(BACKENDS[seed % 2])
            prompts = [reference.tokens(rng, rng.randrange(1, 40)) for _ in range(3)]
            for prompt, tokens in zip(prompts, greedy(load(reference, ops), ops, prompts, 64), strict=True):
                steps, agreed = sure_steps(reference, tokens, len(prompt))
                assert agreed, (family, seed, steps)
                reached.append(steps == 64)
    assert sum(reached) >= 0.95 * len(reached), f"{sum(reached)} of {len(reached)}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_trained_checkpoint_tells_the_same_story(backend: str, test_data: Path) -> None:
    folder = test_data / "models" / "stories260k"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids
    with torch.inference_mode():
        theirs = model.generate(prompt, do_sample=False, max_new_tokens=200, eos_token_id=None)[0].tolist()
    ops = make_ops(backend)
    decoder = load_decoder(folder, read_model_spec(folder), ops, Placement(torch.float32, CPU))
    assert greedy(decoder, ops, [prompt[0].tolist()], 200)[0] == theirs
    assert tokenizer.decode(theirs).startswith("<s> Once upon a time, there was a little girl")


# The eight mutations


class Altered:
    """Ops with some of its operations replaced."""

    def __init__(self, ops: Ops, **replaced: Callable[..., Any]) -> None:
        self._ops, self._replaced = ops, replaced

    def __getattr__(self, name: str) -> Any:
        return self._replaced.get(name) or getattr(self._ops, name)


def with_spec(reference: Reference, ops: Ops, **changes: Any) -> Decoder:
    return load(reference, ops, dataclasses.replace(reference.spec, **changes))


def rope_theta(reference: Reference, ops: Ops) -> Decoder:
    rope = reference.spec.rope
    return with_spec(reference, ops, rope=dataclasses.replace(rope, theta=rope.theta * 1.02))


def window_off_by_one(reference: Reference, ops: Ops) -> Decoder:
    return with_spec(reference, ops, windows=tuple(w and w + 1 for w in reference.spec.windows))


def qk_norm_off(reference: Reference, ops: Ops) -> Decoder:
    decoder = load(reference, ops)
    for block in decoder.blocks:
        block.attention.norms = None
    return decoder


def norm_order(reference: Reference, ops: Ops) -> Decoder:
    """Normalizes what is added, not the sum."""

    def add_norm(delta: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
        total = residual + ops.norm(delta, weight, eps)
        return total, total

    return load(reference, Altered(ops, add_norm=add_norm))


def gqa_map(reference: Reference, ops: Ops) -> Decoder:
    """Query head n reads KV head n mod H, not n // (N / H)."""
    spec = reference.spec
    order = torch.arange(spec.heads).view(-1, spec.kv_heads).t().flatten()

    def attention(q_TNd: torch.Tensor, *args: Any) -> torch.Tensor:
        out = ops.attention(q_TNd[:, order].contiguous(), *args).view(q_TNd.shape)
        return out[:, order.argsort()].flatten(1)

    return load(reference, Altered(ops, attention=attention))


def scaling(reference: Reference, ops: Ops) -> Decoder:
    decoder = load(reference, ops)
    for block in decoder.blocks:
        block.attention.scale *= 1.01
    return decoder


def tied_head(reference: Reference, ops: Ops) -> Decoder:
    """The head of an untied model reads the embedding table."""
    decoder = load(reference, ops)
    decoder.head.weight_VD = decoder.embedding.table_VD
    return decoder


def position_offset(reference: Reference, ops: Ops) -> Decoder:
    """Rows of a chunk after the first are rotated one position late."""

    def late(qkv: torch.Tensor, norms: Any, eps: float, rope: torch.Tensor, kv: Any, batch: Batch, group: int) -> Any:
        positions = batch.positions_T + (batch.positions_T[0] > 0)
        shifted = dataclasses.replace(batch, positions_T=positions)
        return ops.qk_norm_rope_write(qkv, norms, eps, rope, kv, shifted, group)

    return load(reference, Altered(ops, qk_norm_rope_write=late))


MUTATIONS: dict[Callable[[Reference, Ops], Decoder], tuple[str, dict[str, Any]]] = {
    rope_theta: ("llama", {}),
    window_off_by_one: ("mistral", {"sliding_window": 20}),
    qk_norm_off: ("qwen3", {}),
    norm_order: ("llama", {}),
    gqa_map: ("llama", {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}),
    scaling: ("qwen2", {}),
    tied_head: ("llama", {"tie_word_embeddings": False}),
    position_offset: ("mistral", {}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__)
def test_mutations_are_caught(mutate: Callable[[Reference, Ops], Decoder], backend: str, tmp_path: Path) -> None:
    family, overrides = MUTATIONS[mutate]
    rng = random.Random(f"mutations {family}")
    reference, ops = build_reference(family, rng, tmp_path, **overrides), make_ops(backend)
    tokens = reference.tokens(rng, 60)
    theirs = reference.logits(tokens)
    assert error(paged_logits(load(reference, ops), ops, tokens, 16, 16), theirs) <= TOLERANCE
    assert error(paged_logits(mutate(reference, ops), ops, tokens, 16, 16), theirs) > 10 * TOLERANCE
