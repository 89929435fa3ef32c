"""Runner: a StepPlan in, a StepResult out; between them one forward pass and one draw."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from penstock.base import PenstockError
from penstock.core.kv.groups import PoolSpec
from penstock.core.plan import BlockCopy, StepPlan, StepResult
from penstock.kernels import Batch, KVLayer, Ops
from penstock.models import Decoder
from penstock.runtime.inputs import Inputs, StepInputs
from penstock.runtime.memory import HostCopy, working_set
from penstock.runtime.pooling import Extras, Reporter
from penstock.sampling import RawLogprobs, RuleKit, Sampler, draw_error
from penstock.spec import ModelSpec

NOTHING: tuple[int, ...] = ()


@dataclass(slots=True)
class PendingStep:
    """A step whose work was handed to the device. ``result`` waits for it."""

    slices: int
    inputs: StepInputs
    logprobs: RawLogprobs | None
    drawn: HostCopy | None  # codes, then the columns of logprobs
    extras: Extras | None
    started: float
    forward: float = 0.0
    sample: float = 0.0
    replayed: bool = False
    errors: dict[int, PenstockError] = field(default_factory=dict)  # of rows whose rules raised

    def result(self) -> StepResult:
        tokens: list[tuple[int, ...]] = [NOTHING] * self.slices
        step = StepResult(tokens)
        waited = time.monotonic()
        if self.drawn is not None:
            codes_R, *columns = self.drawn.wait()
            codes, draws = codes_R.tolist(), self.inputs.draws
            for r, code in enumerate(codes):
                if code >= 0:
                    tokens[draws[r]] = (code,)
                else:
                    error = self.errors.get(r) or draw_error(code, int(self.inputs.positions[r]))
                    step.failed[draws[r]] = error
            if self.logprobs is not None:
                entries = self.logprobs.entries(columns)
                step.logprobs = {draws[r]: (entry,) for r, entry in entries.items() if codes[r] >= 0}
        if self.extras is not None:
            self.extras.tell(step)
        step.started, step.forward, step.replayed = self.started, self.forward, self.replayed
        step.sample = self.sample + time.monotonic() - waited
        return step


class Runner:
    """Computes plans in order on one device.

    Args:
        kv: the layers of each KV group's pool, in the order of ``spec.kv_groups()`` and of their ``layers``.
        max_num_seqs: most requests known at a time.
        device: where weights and KV are.
        kit: what the sampler makes rules of beyond the parameters of requests.
        eager: steps are not captured.
    """

    def __init__(
        self,
        decoder: Decoder,
        ops: Ops,
        kv: Sequence[list[KVLayer]],
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
        kit: RuleKit | None = None,
        eager: bool = False,
    ) -> None:
        self.decoder, self.ops, self.pools = decoder, ops, list(kv)
        layers = by_layer(decoder.spec, self.pools)

        def forward(ids_T: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
            return decoder.forward(ids_T, batch, layers)

        self.forward = forward if eager or ops.captured is None else ops.captured(forward)
        if max_model_len > decoder.spec.max_positions:  # those of which rope tables have rows
            raise ValueError(f"max_model_len {max_model_len} of a model of {decoder.spec.max_positions} positions")
        pools = [
            PoolSpec(len(pool[0].k_PBHd), group.window)
            for group, pool in zip(decoder.spec.kv_groups(), self.pools, strict=True)
        ]
        self.inputs = Inputs(max_num_seqs, max_model_len, block_size, pools, device)
        self.sampler = Sampler(max_num_seqs, decoder.spec.vocab_size, device, working_set(device), kit, ops.draw)
        self.reporter = Reporter(decoder.logits, decoder.spec.vocab_size, working_set(device))

    def run(self, plan: StepPlan) -> StepResult:
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Starts a step. On a device that works on its own this returns before the tokens exist, unless a
        request's parameters make the sampler look at values."""
        started = time.monotonic()
        self._apply(plan)
        step = self.inputs.build(plan.slices)
        rows_R = step.out_rows_R if len(step.draws) < len(step.ids_T) else None
        extras = self.reporter.wanted(plan.slices, step.batch.row_starts)
        if extras is not None:
            rows_R = torch.cat((step.out_rows_R, step.out_rows_R.new_tensor(extras.rows)))
        hidden_RD = self.decoder.hidden(*self.forward(step.ids_T, step.batch), rows_R)
        computed = time.monotonic()
        pending = PendingStep(len(plan.slices), step, None, None, extras, started, computed - started)
        pending.replayed = bool(getattr(self.forward, "replayed", False))
        if draws := len(step.draws):
            drawn = self.sampler.draw(self.decoder.logits(hidden_RD[:draws]), step.rows, step.positions)
            self.inputs.append(step, drawn.tokens_R)
            pending.logprobs, pending.errors = drawn.logprobs, drawn.errors
            pending.drawn = HostCopy([drawn.codes_R, *(drawn.logprobs.columns if drawn.logprobs else ())])
        if extras is not None:
            self.reporter.compute(extras, hidden_RD[draws:])
        pending.sample = time.monotonic() - computed
        return pending

    def _apply(self, plan: StepPlan) -> None:
        for request in plan.gone:
            self.inputs.forget(request)
            self.reporter.forget(request)
        for new in plan.new:
            row = self.inputs.place(new)
            if new.task == "generate":
                self.sampler.place(row, new)
            self.reporter.place(new)
        for change in plan.blocks:
            self.inputs.write(change)
        for group, pool in enumerate(self.pools):
            for pairs in disjoint_batches(copy for copy in plan.copies if copy.group == group):
                self.ops.copy_blocks(pool, pairs)


def by_layer(spec: ModelSpec, pools: Sequence[list[KVLayer]]) -> list[KVLayer]:
    """The pools' layers in the order of the model."""
    places = {
        index: layer
        for group, pool in zip(spec.kv_groups(), pools, strict=True)
        for index, layer in zip(group.layers, pool, strict=True)
    }
    return [places[index] for index in range(spec.layers)]


def disjoint_batches(copies: Iterable[BlockCopy]) -> Iterator[list[tuple[int, int]]]:
    """One group's copies, in order, cut so that no block is both read and written in a batch.

    A block freed by one copy may be the target of the next.
    """
    batch: list[tuple[int, int]] = []
    sources, targets = set[int](), set[int]()
    for _, src, dst in copies:
        if src in targets or dst in sources or dst in targets:
            yield batch
            batch, sources, targets = [], set(), set()
        batch.append((src, dst))
        sources.add(src)
        targets.add(dst)
    if batch:
        yield batch
