"""Against transformers in float32: logits within TOLERANCE, greedy tokens equal wherever the reference is sure.

Named mutations of a correct model must each fail the same comparison, so that it is known to look.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.bloom import modeling_bloom as bloom
from transformers.models.mpt import modeling_mpt as mpt

from families import FAMILIES, random_config
from oracle import CPU, TOLERANCE, PagedDriver, Reference, build_reference, error, load, paged_logits
from penstock.kernels import Batch, Ops, make_ops, native
from penstock.layers import Placement, alibi_slopes
from penstock.models import Decoder, load_decoder, numerics_id
from penstock.spec.hf import read_model_spec

BACKENDS = ("ref", "torch", *(("cpu",) if native() else ()))
CHUNKS = (1, 7, 64, 10_000)
SURE = 1e-3
"""Top-2 margin of the reference below which a greedy token is a coin toss."""


@pytest.fixture(autouse=True, scope="module")
def quiet_transformers() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


def fast(chosen: Sequence[str]) -> list[object]:
    """All families; those not chosen are in `make test-all` alone."""
    return [f if f in chosen else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, seed: int, tmp_path: Path) -> None:
    """Every position's logits, at every chunk size, with strangers in the batch, through shuffled blocks; up to where
    a router's near-tie leaves the choice of an expert to the last bit."""
    rng = random.Random(f"logits {family} {seed}")
    reference = build_reference(family, rng, tmp_path)
    tokens = reference.tokens(rng, rng.choice([60, 150, 290]))
    theirs, certain = reference.logits(tokens), reference.certain(tokens)
    print(f"{len(tokens) - certain} of {len(tokens)} positions follow a near-tie of a router")
    assert theirs.std() >= 1 and certain > 0
    for backend in BACKENDS:
        ops = make_ops(backend)
        decoder = load(reference, ops)
        for chunk in CHUNKS if backend != "ref" else [CHUNKS[seed % 4]]:
            block_size = rng.choice([1, 2, 16, 64, 128])
            mates = [reference.tokens(rng, rng.randrange(1, 40)) for _ in range(rng.randrange(3))]
            ours = paged_logits(decoder, ops, tokens, chunk, block_size, seed=seed, mates=mates)
            worst = error(ours[:certain], theirs[:certain])
            print(f"{backend} differs by {worst:.1e}")
            assert worst <= TOLERANCE, (backend, chunk, block_size, reference.spec)


@pytest.mark.parametrize("family", fast(["llama", "gemma2", "mpt", "qwen2_moe", "gpt_oss"]))
def test_bits_do_not_depend_on_chunks_blocks_or_mates(family: str, tmp_path: Path) -> None:
    rng = random.Random(f"bits {family}")
    reference, ops = build_reference(family, rng, tmp_path), make_ops("ref")
    tokens, decoder = reference.tokens(rng, 140), load(reference, ops)
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
    rows = reference.logits(tokens)[prompt - 1 : -1][: max(0, reference.certain(tokens) - prompt + 1)]
    top = rows.topk(2)
    margins = (top.values[:, 0] - top.values[:, 1]).tolist()
    for step, margin in enumerate(margins):
        if margin < SURE:
            return step, True
        if int(top.indices[step, 0]) != tokens[prompt + step]:
            return step, False
    return len(margins), True


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))])
def test_greedy_tokens(seed: int, tmp_path: Path) -> None:
    """64 greedy steps of every family, 3 prompts in each batch."""
    reached = []
    for index, family in enumerate(FAMILIES):
        rng = random.Random(f"greedy {family} {seed}")
        reference = build_reference(family, rng, tmp_path / family)
        ops = make_ops(BACKENDS[(seed + index) % len(BACKENDS)])
        prompts = [reference.tokens(rng, rng.randrange(1, 40)) for _ in range(3)]
        for prompt, tokens in zip(prompts, greedy(load(reference, ops), ops, prompts, 64), strict=True):
            steps, agreed = sure_steps(reference, tokens, len(prompt))
            assert agreed, (family, seed, steps)
            reached.append(steps == 64)
    print(f"{sum(reached)} of {len(reached)} runs reach 64 steps")
    assert sum(reached) >= 0.9 * len(reached)


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


# Text alone, of a model with other modalities


def test_the_text_part_of_a_multimodal_model(tmp_path: Path) -> None:
    rng = random.Random("multimodal")
    text = random_config("gemma3_text", rng)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    reference = Reference(tmp_path, model, read_model_spec(tmp_path))
    tokens, ops = reference.tokens(rng, 60), make_ops("torch")
    ours = paged_logits(load(reference, ops), ops, tokens, 16, 16)
    assert error(ours, reference.logits(tokens)) <= TOLERANCE
    # The names that other versions of transformers wrote.
    tensors = {
        re.sub(
            "^language_model.lm_head", "lm_head", re.sub("^language_model.model", "model.language_model", name)
        ): weight
        for name, weight in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(paged_logits(load(reference, ops), ops, tokens, 16, 16), ours)


# Low precision


@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_stays_near(family: str, tmp_path: Path) -> None:
    """Rounding to 8 bits of mantissa moves the logits by a few percent; a wrong dtype somewhere moves them further."""
    rng = random.Random(f"low precision {family}")
    reference = build_reference(family, rng, tmp_path, num_hidden_layers=2)
    tokens = reference.tokens(rng, 24)
    theirs = reference.model.bfloat16()(torch.tensor([tokens])).logits[0].float()
    for backend in BACKENDS:
        ops = make_ops(backend)
        decoder = load_decoder(tmp_path, reference.spec, ops, Placement(torch.bfloat16, CPU))
        embedded = reference.model.get_input_embeddings()(torch.tensor(tokens))
        if family != "granite":  # which scales outside of the embedding
            assert torch.equal(decoder.embedding(torch.tensor(tokens)), embedded)
        ours = paged_logits(decoder, ops, tokens, 7, 16)
        distance = (ours - theirs).norm() / theirs.norm()
        print(f"{backend} differs by {distance:.1%}")
        assert distance < (0.05 if reference.spec.moe is None else 0.2)  # another expert is another answer


# A rope that depends on the context served


@pytest.mark.parametrize(("served", "length"), [(64, 60), (65, 65), (512, 100)])
def test_longrope_by_the_context_served(served: int, length: int, tmp_path: Path) -> None:
    """transformers asks each sequence; we ask once, so sequences that agree on the answer must agree on the logits."""
    rng, factors = (
        random.Random("longrope"),
        {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 5.0, 9.0]},
    )
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5} | factors
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None}
    reference = build_reference(
        "phi3", rng, tmp_path, **shape, rope_parameters=rope, original_max_position_embeddings=64
    )
    spec, ops, tokens = (
        dataclasses.replace(reference.spec, max_positions=served),
        make_ops("ref"),
        reference.tokens(rng, length),
    )
    assert error(paged_logits(load(reference, ops, spec), ops, tokens, 16, 16), reference.logits(tokens)) <= TOLERANCE
    ids = {
        numerics_id(tmp_path, dataclasses.replace(spec, max_positions=n), ops, Placement(torch.float32, CPU))
        for n in (served, 64, 65, 512)
    }
    assert len(ids) == 2


# Linear position biases


@pytest.mark.parametrize("heads", [*range(1, 34), 112])
def test_slopes_are_those_of_transformers(heads: int) -> None:
    """MPT's rule, with any steepness, and BLOOM's, which sums up to the same, in another precision."""
    ours = alibi_slopes(heads, 8.0, Placement(torch.float32, CPU))
    torch.testing.assert_close(ours, bloom._get_alibi_slopes(heads, CPU), rtol=1e-5, atol=0)
    for most in (8, 16):
        theirs = mpt.build_mpt_alibi_tensor(heads, 2, most)[:, 0, 0]
        torch.testing.assert_close(-alibi_slopes(heads, most, Placement(torch.float32, CPU)), theirs, rtol=1e-6, atol=0)


# MXFP4


def test_packed_experts_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    rng = random.Random("mxfp4")
    reference = build_reference("gpt_oss", rng, tmp_path, hidden_size=64, intermediate_size=96, num_local_experts=3)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, weight in list(tensors.items()):
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(122, 125, (experts, rows, columns // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        weight = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        reference.model.get_parameter(name).data.copy_(weight)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    reference = dataclasses.replace(reference, spec=read_model_spec(tmp_path))
    tokens = reference.tokens(rng, 60)
    for backend in BACKENDS:
        ops = make_ops(backend)
        ours = paged_logits(load(reference, ops), ops, tokens, 16, 16)
        certain = reference.certain(tokens)
        assert error(ours[:certain], reference.logits(tokens)[:certain]) <= TOLERANCE


# The mutations


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

    def add_norm(delta: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, _: float) -> Any:
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


def softcap_off(reference: Reference, ops: Ops) -> Decoder:
    return with_spec(reference, ops, attn_softcap=None)


def logit_softcap_off(reference: Reference, ops: Ops) -> Decoder:
    return with_spec(reference, ops, logit_softcap=None)


def expert_order(reference: Reference, ops: Ops) -> Decoder:
    """One layer's experts have their neighbour's gate and up."""
    decoder = load(reference, ops)
    experts = decoder.blocks[-1].ffn.experts
    experts.gate_up_E2FD = experts.gate_up_E2FD.roll(1, 0)
    return decoder


def sink_off(reference: Reference, ops: Ops) -> Decoder:
    decoder = load(reference, ops)
    for block in decoder.blocks:
        block.attention.sinks_N = None
    return decoder


def slopes_halved(reference: Reference, ops: Ops) -> Decoder:
    decoder = load(reference, ops)
    for block in decoder.blocks:
        block.attention.slopes_N = block.attention.slopes_N / 2
    return decoder


def slope_of_another_head(reference: Reference, ops: Ops) -> Decoder:
    decoder = load(reference, ops)
    for block in decoder.blocks:
        block.attention.slopes_N = block.attention.slopes_N.roll(1)
    return decoder


MUTATIONS: dict[Callable[[Reference, Ops], Decoder], tuple[str, dict[str, Any]]] = {
    rope_theta: ("llama", {}),
    window_off_by_one: ("mistral", {"sliding_window": 20}),
    qk_norm_off: ("qwen3", {}),
    norm_order: ("llama", {}),
    gqa_map: ("llama", {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}),
    scaling: ("qwen2", {}),
    tied_head: ("llama", {"tie_word_embeddings": False}),
    position_offset: ("mistral", {}),
    softcap_off: ("gemma2", {"attn_logit_softcapping": 5.0}),
    logit_softcap_off: ("gemma2", {"final_logit_softcapping": 30.0}),
    expert_order: ("qwen3_moe", {"mlp_only_layers": [], "decoder_sparse_step": 1}),
    sink_off: ("gpt_oss", {}),
    slopes_halved: ("mpt", {}),
    slope_of_another_head: ("bloom", {"num_attention_heads": 6, "hidden_size": 60}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__)
def test_mutations_are_caught(mutate: Callable[[Reference, Ops], Decoder], backend: str, tmp_path: Path) -> None:
    family, overrides = MUTATIONS[mutate]
    rng = random.Random(f"mutations {family}")
    reference, ops = build_reference(family, rng, tmp_path, **overrides), make_ops(backend)
    tokens = reference.tokens(rng, 60)
    assert reference.certain(tokens) == len(tokens)
    theirs = reference.logits(tokens)
    assert error(paged_logits(load(reference, ops), ops, tokens, 16, 16), theirs) <= TOLERANCE
    assert error(paged_logits(mutate(reference, ops), ops, tokens, 16, 16), theirs) > 10 * TOLERANCE
