"""Capture and replay: a replayed step has the bits of one that was run op by op, and what cannot be recorded is not."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from families import FAMILIES
from oracle import PagedDriver, build_reference
from penstock.kernels import Batch, GroupBatch, Ops, make_ops, native
from penstock.layers import Packing, Placement
from penstock.models import Decoder, load_decoder

pytestmark = pytest.mark.skipif(not native(), reason="installed without a compiler")

if native():
    from penstock.kernels.cpu.capture import MOST_ROWS, Captured

CPU = torch.device("cpu")
IN_GROUPS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
KINDS = {
    "qwen2": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1, "num_hidden_layers": 3},
    "granite": {"embedding_multiplier": 3.3, "residual_multiplier": 0.22},
    "qwen2_moe": IN_GROUPS
    | {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 3, "mlp_only_layers": []},
    "qwen3_moe": IN_GROUPS | {"moe_intermediate_size": 40, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 3},
}
"""What random configurations leave to chance: two KV groups, factors, experts of small integers, and experts whose
second linear stays plain."""


def build(family: str, folder: Path, quant: str = "none", **config: object) -> tuple[Decoder, Ops]:
    reference, ops = build_reference(family, random.Random(family), folder, **config), make_ops("cpu")
    placement = Placement(torch.float32, CPU)
    packing = Packing(ops, reference.spec, placement, quant)  # type: ignore[arg-type]
    return load_decoder(reference.folder, reference.spec, ops, placement, packing), ops


def drive(
    decoder: Decoder, ops: Ops, *, captured: bool, kv_dtype: torch.dtype | None = None
) -> tuple[list[Tensor], PagedDriver]:
    """Steps of one to many rows and requests, prompts among decodes; all logits."""
    rng = random.Random(3)
    driver = PagedDriver(decoder, ops, blocks=400, block_size=8, rng=rng, kv_dtype=kv_dtype)
    if captured:
        driver.forward = Captured(driver.forward)
    requests = [driver.request() for _ in range(9)]
    logits = []
    for counts in ([1], [3, 1, 1], [1] * 9, [40, 1, 1, 17], [MOST_ROWS, 1], [1] * 9, [MOST_ROWS - 8] + [1] * 8, [2]):
        vocab = decoder.spec.vocab_size
        work = [
            (request, [rng.randrange(vocab) for _ in range(n)]) for request, n in zip(requests, counts, strict=False)
        ]
        logits += driver.step(work)
        rng.shuffle(requests)
    return logits, driver


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize(
    ("family", "quant", "kv_dtype"),
    [(family, "none", None) for family in FAMILIES]
    + [(family, quant, torch.int8) for family in KINDS for quant in ("int8", "int4")],
)
def test_a_replay_has_the_bits_of_the_ops(
    family: str, quant: str, kv_dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """Every family is recorded."""
    decoder, ops = build(family, tmp_path, quant, **KINDS.get(family, {}))
    eager, _ = drive(decoder, ops, captured=False, kv_dtype=kv_dtype)
    replayed, driver = drive(decoder, ops, captured=True, kv_dtype=kv_dtype)
    assert all(map(torch.equal, eager, replayed))
    assert isinstance(driver.forward, Captured) and driver.forward.recording is not None


def test_memory_is_used_again(tmp_path: Path) -> None:
    """A model of 12 layers needs no more room between its calls than one of 3."""
    sizes = []
    for layers in (3, 12):
        decoder, ops = build("llama", tmp_path / str(layers), num_hidden_layers=layers)
        _, driver = drive(decoder, ops, captured=True)
        assert isinstance(driver.forward, Captured) and driver.forward.recording
        sizes.append(len(driver.forward.recording.memory))
    assert sizes[0] == sizes[1]


def test_what_torch_computes_is_not_recorded(tmp_path: Path) -> None:
    decoder, ops = build("llama", tmp_path)
    driver = PagedDriver(decoder, ops, blocks=400, block_size=8, rng=random.Random(0))
    native_alone = driver.forward

    def doubled(ids_T: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        residual_TD, delta_TD = native_alone(ids_T, batch)
        return residual_TD, 2 * delta_TD

    captured = driver.forward = Captured(doubled)
    driver.step([(driver.request(), [1, 2, 3])])
    assert isinstance(captured, Captured) and not captured.can_record and captured.recording is None


def test_a_replay_of_another_step_is_refused(tmp_path: Path) -> None:
    """A tape has addresses alone, and calls that were recorded with one size of blocks and number of groups."""
    decoder, ops = build("llama", tmp_path)
    driver = PagedDriver(decoder, ops, blocks=400, block_size=8, rng=random.Random(0))
    captured, seen = Captured(driver.forward), list[tuple[Tensor, Batch]]()
    request = driver.request()

    def noted(ids_T: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        seen.append((ids_T, batch))
        return captured(ids_T, batch)

    driver.forward = noted
    driver.step([(request, [1, 2, 3])])
    driver.step([(request, [4, 5])])
    (ids_T, batch), ((group,), one) = seen[1], (seen[1][1].groups, torch.ones(1, dtype=torch.int64))
    assert captured.replayed
    others = [
        replace(batch, positions_T=batch.positions_T[:1]),
        replace(batch, row_starts_R1=one),
        replace(batch, row_starts=[0, 1]),
        replace(batch, contexts_R=batch.contexts_R[:0]),
        replace(batch, contexts=[999]),
        replace(batch, block_size=16),
        replace(batch, groups=[]),
        replace(batch, groups=[group, group]),
        replace(batch, groups=[GroupBatch(group.slots_T[:1], group.tables_RM)]),
        replace(batch, groups=[GroupBatch(group.slots_T, group.tables_RM[:0])]),
        replace(batch, groups=[GroupBatch(group.slots_T, group.tables_RM[:, :0])]),
    ]
    for other in others:
        with pytest.raises(ValueError):
            captured(ids_T, other)
    captured(ids_T, batch)


def test_a_recording_that_fails_is_made_anew(tmp_path: Path) -> None:
    """An error in the first step leaves neither half a tape nor a thread that still records."""
    decoder, ops = build("llama", tmp_path)
    driver = PagedDriver(decoder, ops, blocks=400, block_size=8, rng=random.Random(0))
    forward, broken = driver.forward, [True]

    def flaky(ids_T: Tensor, batch: object) -> tuple[Tensor, Tensor]:
        ends = forward(ids_T, batch)  # type: ignore[arg-type]
        if broken.pop():
            raise ValueError("a cosmic ray")
        broken.append(False)
        return ends

    captured = driver.forward = Captured(flaky)
    with pytest.raises(ValueError, match="cosmic"):
        driver.step([(driver.request(), [1, 2, 3])])
    broken.append(False)
    driver.step([(driver.request(), [1, 2, 3])])
    assert isinstance(captured, Captured) and captured.recording is not None


def test_a_replay_reads_nothing_as_it_lies(tmp_path: Path) -> None:
    decoder, ops = build("llama", tmp_path)
    driver = PagedDriver(decoder, ops, blocks=400, block_size=8, rng=random.Random(0))
    captured = driver.forward = Captured(driver.forward)
    driver.step([(driver.request(), [1, 2, 3])])
    with pytest.raises(IndexError):
        driver.step([(driver.request(), [1, decoder.spec.vocab_size])])

    def narrow(name: str, batch: Batch) -> Batch:
        if name == "slots_T":
            return replace(batch, groups=[replace(group, slots_T=group.slots_T.int()) for group in batch.groups])
        return replace(batch, **{name: getattr(batch, name).int()})

    for name in ("positions_T", "row_starts_R1", "contexts_R", "slots_T"):
        driver.forward = lambda ids_T, batch, name=name: captured(ids_T, narrow(name, batch))  # type: ignore[misc]
        with pytest.raises(TypeError, match="int32"):
            driver.step([(driver.request(), [1, 2])])
    assert isinstance(captured, Captured) and captured.replayed


def test_recording_is_quick_to_import() -> None:
    """Torch's dispatch modes bring sympy and a second of waiting for the first token."""
    code = "import sys; from penstock import LLM; LLM(num_threads=1).generate('Once'); sys.exit('sympy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0
