"""K and V in int8: how far the answers move, and that an engine stores them so."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch

from oracle import CPU, paged_logits
from penstock import LLM, SamplingParams
from penstock.assemble import build_engine
from penstock.kernels import make_ops, native
from penstock.models import Placement, load_decoder
from penstock.spec import EngineConfig
from penstock.spec.hf import read_model_spec
from penstock.spec.location import BUNDLED
from penstock.text import load_tokenizer

TEXT = (
    "Once upon a time there was an old lighthouse on a small island. Every evening the keeper climbed the stairs, "
    "lit the lamp and looked out over the water. One night a storm came up, and the wind was so strong that the "
    "windows shook. "
    "The keeper saw a little boat among the waves. He rang the bell as loudly as he could, and the people in the boat "
    "heard it and turned towards the harbour. In the morning they came to thank him and brought him bread and honey."
)
KL_BOUND = 1e-4
"""Nats a token, in the mean. Measured: 1.4e-5 on both backends."""

BACKENDS = ["ref", *(["cpu"] if native() else [])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bundled_model_says_nearly_the_same(backend: str) -> None:
    ops, spec = make_ops(backend), read_model_spec(BUNDLED)
    decoder = load_decoder(BUNDLED, spec, ops, Placement(torch.float32, CPU))
    ids = load_tokenizer(BUNDLED, spec.vocab_size).encode(TEXT)[: 60 if backend == "ref" else None]
    plain, int8 = (paged_logits(decoder, ops, ids, 32, 16, kv_dtype=kv).log_softmax(-1) for kv in (None, torch.int8))
    kl = float((plain.exp() * (plain - int8)).sum(-1).mean())
    assert 0 < kl < KL_BOUND, kl


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_engine_stores_int8(backend: Literal["ref", "cpu"]) -> None:
    """A pool of the same bytes holds more blocks, under other names, and answers."""
    plain = EngineConfig(backend=backend, dtype="float32", kv_memory="8M", max_model_len=128, num_threads=1)
    engines = [build_engine(config) for config in (plain, replace(plain, kv_dtype="int8"))]
    try:
        (blocks, more), roots = (e.setup.pools[0].blocks for e in engines), {e.setup.numerics_id for e in engines}
        assert more > 3 * blocks and len(roots) == 2
    finally:
        for engine in engines:
            engine.close()
    with LLM(backend=backend, kv_dtype="int8", kv_memory="8M", max_model_len=128, num_threads=1) as llm:
        (out,) = llm.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=5))
    assert len(out.outputs[0].token_ids) == 5
