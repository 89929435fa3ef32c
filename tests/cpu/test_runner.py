"""The runtime against plans written by hand: whatever way a plan is cut, a request gets the tokens it gets alone."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from penstock.core.kv.groups import PoolSpec
from penstock.core.plan import NO_BLOCK, BlockCopy, NewRequest, StepFailed, StepPlan, StepResult, TableWrite
from penstock.kernels import make_ops
from penstock.layers import Placement
from penstock.models import Decoder, load_decoder
from penstock.runtime import LocalExecutor, Runner
from penstock.runtime.inputs import Inputs
from penstock.runtime.runner import disjoint_batches
from penstock.spec import ModelSpec, SamplingParams, TokenLogprobs
from penstock.spec.tensors import checkpoint_tensors

CPU = torch.device("cpu")
SPEC = ModelSpec(
    family="llama",
    vocab_size=61,
    hidden=24,
    ffn=40,
    heads=4,
    kv_heads=2,
    head_dim=8,
    windows=(None, 6, None),
    max_positions=64,
    dtype="float32",
)
SIZE, BLOCKS, MAX_LEN = 4, 64, 64
POOLS = [PoolSpec(BLOCKS, group.window) for group in SPEC.kv_groups()]
STEPS = 12

Answer = list[tuple[int, TokenLogprobs | None]]
"""Each drawn token with its log-probabilities, if asked for."""


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """Random weights, wide enough that every token of the prefix matters."""
    folder = tmp_path_factory.mktemp("random-model")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in checkpoint_tensors(SPEC).items():
        scale = 1.0 if len(shape) == 1 or "embed" in name else shape[1] ** -0.5
        tensors[name] = torch.randn(shape, generator=generator) * scale * (3.0 if name == "lm_head.weight" else 1.0)
    save_file(tensors, folder / "model.safetensors")
    return load_decoder(folder, SPEC, make_ops("ref"), Placement(torch.float32, CPU))


def make_runner(decoder: Decoder, rows: int = 6, positions: int = MAX_LEN) -> Runner:
    ops = make_ops("ref")
    kv = [
        ops.allocate_kv(len(g.layers), BLOCKS, SIZE, g.kv_heads, g.head_dim, torch.float32, CPU)
        for g in SPEC.kv_groups()
    ]
    return Runner(decoder, ops, kv, max_num_seqs=rows, max_model_len=positions, block_size=SIZE, device=CPU)


@dataclass
class Ask:
    """A request as the driver below sees it: ``known`` counts tokens, those still on their way included.

    ``told`` has the log-probabilities of prompt tokens by position, ``sent`` where its slices in flight start.
    """

    id: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    tokens: list[int] = field(default_factory=list)
    answer: Answer = field(default_factory=list)
    computed: int = 0
    known: int = 0
    tables: list[list[int]] = field(default_factory=lambda: [[], []])
    resident: bool = False
    task: str = "generate"
    vector: tuple[float, ...] | None = None
    told: dict[int, TokenLogprobs] = field(default_factory=dict)
    sent: deque[int] = field(default_factory=deque)

    @property
    def done(self) -> bool:
        return len(self.answer) >= STEPS if self.task == "generate" else self.vector is not None

    def __post_init__(self) -> None:
        self.tokens, self.known = list(self.prompt), len(self.prompt)

    def new(self) -> NewRequest:
        return NewRequest(
            id=self.id,
            tokens=tuple(self.tokens),
            prompt_len=len(self.prompt),
            tables=tuple(map(tuple, self.tables)),
            params=self.params,
            seed=self.seed,
            sample=0,
            stop_ids=(0,),
            limit=MAX_LEN,
            task=self.task,
        )


class Driver:
    """Writes plans: a scheduler without policy, whose pool hands out blocks in random order."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.free = [self.rng.sample(range(BLOCKS), BLOCKS) for _ in SPEC.kv_groups()]
        self.number = 0

    def plan(self, work: Sequence[tuple[Ask, int]], **extra: Any) -> StepPlan:
        plan = StepPlan(self.number, **extra)
        self.number += 1
        for ask, count in work:
            end = ask.computed + count
            for group, table in enumerate(ask.tables):
                first = len(table)
                while len(table) * SIZE < end:
                    table.append(self.free[group].pop())
                if ask.resident and len(table) > first:
                    plan.blocks.append(TableWrite(ask.id, group, first, tuple(table[first:])))
            if not ask.resident:
                plan.new.append(ask.new())
                ask.resident = True
            plan.slices.append((ask.id, ask.computed, count))
            ask.sent.append(end - count)
            ask.computed = end
            ask.known += end == ask.known and ask.task == "generate"
        return plan

    def commit(self, work: Sequence[tuple[Ask, int]], result: StepResult | StepFailed) -> None:
        assert isinstance(result, StepResult), result
        assert not result.failed
        assert len(result.tokens) == len(work)
        for index, ((ask, _), tokens) in enumerate(zip(work, result.tokens, strict=True)):
            for token in tokens:
                ask.tokens.append(token)
                entry = result.logprobs.get(index)
                assert (entry is not None) == (ask.params.logprobs is not None)
                ask.answer.append((token, entry[0] if entry else None))
            first = ask.sent.popleft() + 1
            ask.vector = result.vectors.get(index, ask.vector)
            ask.told.update(enumerate(result.prompt_logprobs.get(index, ()), first))


def asks() -> list[Ask]:
    """Prompts of many lengths; every kind of parameter that keeps state or draws noise."""
    rng = random.Random(5)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "logprobs": 0},
        {"temperature": 1.2, "top_k": 12, "min_p": 0.01, "repetition_penalty": 1.2, "logprobs": 3},
        {"temperature": 0.0, "presence_penalty": 1.5, "frequency_penalty": 2.0, "min_tokens": 9},
    ]
    return [
        Ask(10 + i, [rng.randrange(61) for _ in range(length)], SamplingParams(max_tokens=99, **kind), seed=i)
        for i, (kind, length) in enumerate(zip(kinds, (7, 1, 13, 4, 9), strict=True))
    ]


def run(decoder: Decoder, requests: list[Ask], seed: int, longest: int, width: int) -> list[Answer]:
    """Random subsets of the requests in random order and random chunks, until each has all it wanted."""
    executor, driver = LocalExecutor(make_runner(decoder, rows=12)), Driver(seed)
    while left := [ask for ask in requests if not ask.done]:
        chosen = driver.rng.sample(left, min(len(left), driver.rng.randint(1, width)))
        work = [(ask, min(ask.known - ask.computed, driver.rng.randint(1, longest))) for ask in chosen]
        driver.commit(work, executor.submit(driver.plan(work)).wait())
    executor.close()
    return [ask.answer for ask in requests]


@pytest.fixture(scope="module")
def alone(decoder: Decoder) -> list[Answer]:
    """Each request by itself, its tokens computed one by one."""
    return [run(decoder, [ask], seed=0, longest=1, width=1)[0] for ask in asks()]


def test_answers_are_worth_comparing(decoder: Decoder, alone: list[Answer]) -> None:
    assert len({tuple(token for token, _ in answer) for answer in alone}) == len(alone)
    assert all(len(set(answer)) > 3 for answer in alone)
    assert all(token != 0 for token, _ in alone[4][:9])  # min_tokens
    other = asks()[0]
    other.tokens[0] = other.prompt[0] = (other.prompt[0] + 1) % SPEC.vocab_size
    assert run(decoder, [other], seed=0, longest=1, width=1)[0][0] != alone[0][0]  # the far end of the prompt is seen


@pytest.mark.parametrize(("seed", "longest"), [(1, 1), (2, 3), (3, 6), (4, 20)])
def test_mixed_and_chunked_equals_alone(decoder: Decoder, alone: list[Answer], seed: int, longest: int) -> None:
    assert run(decoder, asks(), seed, longest, width=5) == alone


@pytest.mark.parametrize("overlap", [False, True])
def test_owed_tokens_are_taken_from_the_runner(decoder: Decoder, alone: list[Answer], overlap: bool) -> None:
    """Two plans in flight: every decode is planned before its input token came back."""
    executor, driver, requests = LocalExecutor(make_runner(decoder), overlap=overlap), Driver(6), asks()
    flight: list[tuple[list[tuple[Ask, int]], Any]] = []
    while True:
        left = [ask for ask in requests if ask.known - len(ask.prompt) < STEPS]
        if not left and not flight:
            break
        if left:
            work = [(ask, min(ask.known - ask.computed, 5)) for ask in left]
            flight.append((work, executor.submit(driver.plan(work))))
        if len(flight) == 2 or not left:
            work, ticket = flight.pop(0)
            driver.commit(work, ticket.wait())
    executor.close()
    assert [ask.answer for ask in requests] == alone


def test_a_request_taken_anew_goes_on_as_if_nothing_had_happened(decoder: Decoder, alone: list[Answer]) -> None:
    """Preempted in the middle, recomputed from scratch in other blocks and another row, penalties rebuilt."""
    executor, driver, requests = LocalExecutor(make_runner(decoder)), Driver(7), asks()
    preemptions = 0
    while any(len(ask.answer) < STEPS for ask in requests):
        gone = [999]  # unknown ids are ignored
        for ask in requests:
            if ask.resident and driver.rng.random() < 0.1:
                preemptions += 1
                gone.append(ask.id)
                for free, table in zip(driver.free, ask.tables, strict=True):
                    free[:0] = table
                    table.clear()
                ask.resident, ask.computed = False, 0
        work = [(ask, ask.known - ask.computed) for ask in requests if len(ask.answer) < STEPS]
        driver.rng.shuffle(work)
        driver.commit(work, executor.submit(driver.plan(work, gone=gone)).wait())
    assert preemptions >= 5
    assert [ask.answer for ask in requests] == alone


def test_blocks_behind_the_window_may_be_gone(decoder: Decoder, alone: list[Answer]) -> None:
    """The windowed group's old entries become NO_BLOCK, and the executor hears of it on the next introduction."""
    executor, driver = LocalExecutor(make_runner(decoder)), Driver(8)
    ask = asks()[2]
    while len(ask.answer) < STEPS:
        for index in range(max(0, ask.computed - 5) // SIZE):
            ask.tables[1][index] = NO_BLOCK
        ask.resident = ask.resident and len(ask.answer) % 3 > 0
        work = [(ask, ask.known - ask.computed)]
        driver.commit(work, executor.submit(driver.plan(work)).wait())
    assert ask.tables[1].count(NO_BLOCK) == 4
    assert ask.answer == alone[2]


def placed(full: tuple[int, ...], windowed: tuple[int, ...]) -> Inputs:
    """One request of 13 tokens, of id 1."""
    inputs, ask = Inputs(2, MAX_LEN, SIZE, POOLS, CPU), asks()[2]
    new = replace(ask.new(), id=1, tokens=tuple(range(13)), prompt_len=13, tables=(full, windowed))
    inputs.place(new)
    return inputs


@pytest.mark.parametrize(
    ("windowed", "start", "count", "bad"),
    [
        ((9, 9, 3, 4), 6, 7, False),
        ((NO_BLOCK, 9, 3, 4), 9, 4, False),  # of the window of 6 positions, 4 is the first
        ((NO_BLOCK, 9, 3, 4), 8, 4, True),
        ((9, NO_BLOCK, 3, 4), 9, 4, True),
        ((NO_BLOCK, NO_BLOCK, 3, 4), 6, 5, True),
        ((NO_BLOCK, 9, 3), 9, 3, False),
        ((NO_BLOCK, 9, 3, NO_BLOCK), 9, 4, True),
        ((NO_BLOCK, 9, 3), 9, 4, True),
    ],
)
def test_no_step_reads_or_writes_where_there_is_no_block(
    windowed: tuple[int, ...], start: int, count: int, bad: bool
) -> None:
    inputs = placed((5, 6, 7, 8), windowed)
    if bad:
        with pytest.raises(ValueError, match="no block for a position"):
            inputs.build([(1, start, count)])
        return
    groups = inputs.build([(1, start, count)]).batch.groups
    for group, table in zip(groups, ((5, 6, 7, 8), windowed), strict=True):
        at = range(start, start + count)
        assert group.slots_T.tolist() == [table[p // SIZE] * SIZE + p % SIZE for p in at]


def test_blocks_that_a_pool_does_not_have_come_into_no_table() -> None:
    placed((5, 6, 7, BLOCKS - 1), (0, 9, 3, 4))
    for bad in (BLOCKS, -2, 2**31 - 1):
        for tables in (((5, bad), (3, 4)), ((5, 6), (bad, 4))):
            with pytest.raises(ValueError, match=f"in a pool of {BLOCKS}"):
                placed(*tables)
        for group in (0, 1):
            with pytest.raises(ValueError, match=f"in a pool of {BLOCKS}"):
                placed((5, 6), (3, 4)).write(TableWrite(1, group, 1, (7, bad)))


def test_nobody_has_the_blocks_of_who_had_the_row_before() -> None:
    """A change of a table that does not come, by a fault of the scheduler's, is an error and no read of other KV."""
    inputs, two = placed((5, 6, 7, 8), (1, 2, 3, 4)), replace(asks()[2].new(), id=2, tables=((9,), (9,)))
    inputs.place(two)
    inputs.forget(1)
    inputs.place(replace(two, id=3))
    for request in (2, 3):
        with pytest.raises(ValueError, match="no block for a position"):
            inputs.build([(request, 4, 1)])
    inputs.write(TableWrite(3, 0, 1, (10,)))
    inputs.write(TableWrite(3, 1, 1, (10,)))
    assert inputs.build([(3, 4, 1)]).batch.groups[0].slots_T.tolist() == [40]


@pytest.mark.parametrize("span", [(-1, 2), (3, 0), (3, -1)])
def test_slices_are_of_positions_that_there_are(span: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="slices"):
        placed((5, 6, 7, 8), (0, 9, 3, 4)).build([(1, 0, 4), (1, *span)])


def test_a_runner_has_no_more_positions_than_its_rope_tables(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="65"):
        make_runner(decoder, positions=MAX_LEN + 1)


def test_a_shared_block_is_copied_before_it_is_written(decoder: Decoder, alone: list[Answer]) -> None:
    """The second sample reads the first one's prompt and gets a copy of its unfinished block in every group."""
    executor, driver = LocalExecutor(make_runner(decoder)), Driver(9)
    first = asks()[0]
    second = Ask(99, first.prompt, SamplingParams(temperature=1.0, max_tokens=99), seed=3)
    work = [(first, 7)]
    driver.commit(work, executor.submit(driver.plan(work)).wait())
    shared = len(first.prompt) - 1  # the last prompt token is computed by each
    copies = []
    for group, table in enumerate(first.tables):
        own = driver.free[group].pop()
        copies.append(BlockCopy(group, table[-1], own))
        second.tables[group] = [*table[:-1], own]
    second.computed = shared
    work = [(second, 1), (first, 1)]
    driver.commit(work, executor.submit(driver.plan(work, copies=copies)).wait())
    while len(second.answer) < STEPS:
        work = [(first, 1), (second, 1)]
        driver.commit(work, executor.submit(driver.plan(work)).wait())
    lonely = Ask(99, first.prompt, second.params, seed=3)
    assert second.answer == run(decoder, [lonely], seed=0, longest=1, width=1)[0]
    assert first.answer[:STEPS] == alone[0]


def test_copies_are_cut_where_one_rests_on_another() -> None:
    copies = [BlockCopy(0, 1, 2), BlockCopy(0, 1, 3), BlockCopy(0, 4, 1), BlockCopy(0, 1, 5), BlockCopy(0, 6, 5)]
    assert list(disjoint_batches(copies)) == [[(1, 2), (1, 3)], [(4, 1)], [(1, 5)], [(6, 5)]]
    assert list(disjoint_batches([])) == []


class Breaks:
    """A decoder that can raise in the middle of a forward pass, or spoil a row of logits."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.spec = decoder, decoder.spec
        self.error: Exception | None = None
        self.spoil: dict[int, float] = {}
        self.spoil_hidden: dict[int, float] = {}

    def forward(self, ids_T: Tensor, batch: Any, kv: Any) -> tuple[Tensor, Tensor]:
        ends = self.decoder.forward(ids_T, batch, kv)  # K and V are written
        if self.error:
            raise self.error
        return ends

    def hidden(self, residual_TD: Tensor, delta_TD: Tensor, rows_R: Tensor) -> Tensor:
        out = self.decoder.hidden(residual_TD, delta_TD, rows_R)
        for row, value in self.spoil_hidden.items():
            out[row, 0] = value
        return out

    def logits(self, hidden_RD: Tensor) -> Tensor:
        logits = self.decoder.logits(hidden_RD)
        for row, value in self.spoil.items():
            logits[row, 5] = value
        return logits


@pytest.mark.parametrize("overlap", [False, True])
def test_a_failed_step_leaves_nothing_behind(
    decoder: Decoder, alone: list[Answer], overlap: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A step raises with another in flight behind it; its requests are introduced anew and go on."""
    breaks: Any = Breaks(decoder)
    executor, driver, requests = LocalExecutor(make_runner(breaks), overlap=overlap), Driver(10), asks()
    failures = 0
    while any(len(ask.answer) < STEPS for ask in requests):
        work = [(ask, min(ask.known - ask.computed, 6)) for ask in requests if len(ask.answer) < STEPS]
        before = [(ask, ask.computed, ask.known) for ask in requests]
        fails = driver.rng.random() < 0.4
        breaks.error = ValueError("a cosmic ray") if fails else None
        tickets = [executor.submit(driver.plan(work))]
        if not fails:
            driver.commit(work, tickets[0].wait())
            continue
        failures += 1
        tickets.append(executor.submit(driver.plan([(ask, 1) for ask, _ in work if ask.computed < ask.known])))
        for ticket in tickets:
            result = ticket.wait()
            assert isinstance(result, StepFailed)
            assert result.error.code == "step_failed"
        assert "ValueError: a cosmic ray" in str(tickets[0].wait().error)  # type: ignore[union-attr]
        for ask, computed, known in before:
            ask.resident, ask.computed, ask.known = False, computed, known
    executor.close()
    assert failures > 3
    assert any("a cosmic ray" in str(record.exc_info) for record in caplog.records)
    assert [ask.answer for ask in requests] == alone


def test_a_slice_ahead_of_its_tokens_fails_the_step(decoder: Decoder) -> None:
    executor, driver = LocalExecutor(make_runner(decoder)), Driver()
    ask = asks()[0]
    driver.plan([(ask, 7)])  # never submitted
    ask.resident = False
    result = executor.submit(driver.plan([(ask, 1)])).wait()
    assert isinstance(result, StepFailed) and "token_unknown" in str(result.error)


# -- what is told besides tokens -----------------------------------------------------------------------------------


def mixed_asks() -> list[Ask]:
    """Vectors of each kind and prompts with log-probabilities, among requests that only generate."""
    rng, requests = random.Random(12), asks()[:3]
    for i, (task, length) in enumerate((("mean", 19), ("last", 11), ("cls", 6), ("mean", 1), ("last", 1))):
        requests.append(Ask(30 + i, [rng.randrange(61) for _ in range(length)], SamplingParams(), seed=0, task=task))
    for i, (top, length) in enumerate(((0, 1), (2, 9), (5, 17), (-1, 4))):
        params = SamplingParams(temperature=0.0, prompt_logprobs=top, logprobs=1, max_tokens=99)
        requests.append(Ask(40 + i, [rng.randrange(61) for _ in range(length)], params, seed=0))
    return requests


def all_told(requests: list[Ask]) -> list[tuple[Answer, tuple[float, ...] | None, dict[int, TokenLogprobs]]]:
    for ask in requests:
        assert ask.task == "generate" or (not ask.answer and not ask.told)
        asked = ask.params.prompt_logprobs
        assert len(ask.told) == (0 if asked is None else len(ask.prompt) - 1)
        assert all(len(entry.top) == (asked if asked >= 0 else SPEC.vocab_size) for entry in ask.told.values())
    return [(ask.answer[:STEPS], ask.vector, dict(sorted(ask.told.items()))) for ask in requests]


@pytest.fixture(scope="module")
def told_alone(decoder: Decoder) -> list[Any]:
    """Each request by itself, whole."""
    requests = mixed_asks()
    for ask in requests:
        run(decoder, [ask], seed=0, longest=99, width=1)
    return all_told(requests)


@pytest.mark.parametrize(("seed", "longest"), [(1, 1), (2, 7), (3, 64)])
def test_vectors_and_prompt_logprobs_do_not_depend_on_slices_or_mates(
    decoder: Decoder, told_alone: list[Any], seed: int, longest: int
) -> None:
    requests = mixed_asks()
    run(decoder, requests, seed, longest, width=len(requests))
    assert all_told(requests) == told_alone
    assert len({vector for _, vector, _ in told_alone if vector}) == 5


def test_vectors_and_prompt_logprobs_after_preemptions(decoder: Decoder, told_alone: list[Any]) -> None:
    """Two plans in flight, and now and then a request is taken anew, from its first position on."""
    executor, driver, requests = LocalExecutor(make_runner(decoder, rows=12), overlap=True), Driver(13), mixed_asks()
    flight: deque[tuple[list[tuple[Ask, int]], Any]] = deque()
    preemptions = 0

    def land() -> None:
        work, ticket = flight.popleft()
        driver.commit(work, ticket.wait())

    while flight or not all(ask.done for ask in requests):
        work = [
            (ask, min(ask.known - ask.computed, 4)) for ask in requests if not ask.done and ask.computed < ask.known
        ]
        if work:
            flight.append((work, executor.submit(driver.plan(work))))
        if len(flight) == 2 or not work:
            land()
        for ask in requests:
            if ask.resident and not ask.done and not ask.answer and preemptions < 9 and driver.rng.random() < 0.3:
                preemptions += 1
                while flight:
                    land()
                ask.resident, ask.computed, ask.known = ask.done, 0, len(ask.tokens)
    executor.close()
    assert preemptions == 9
    assert all_told(requests) == told_alone


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_with_bad_logits_fails_alone(decoder: Decoder, alone: list[Answer], value: float) -> None:
    breaks: Any = Breaks(decoder)
    executor, driver, requests = LocalExecutor(make_runner(breaks)), Driver(11), asks()
    idle = Ask(77, [1, 2, 3, 4], SamplingParams(), seed=0)
    work = [(idle, 3), *((ask, len(ask.prompt)) for ask in requests)]  # the first slice draws nothing
    breaks.spoil = {2: value}  # the third row that draws, so slice 3
    result = executor.submit(driver.plan(work)).wait()
    assert isinstance(result, StepResult)
    assert [len(tokens) for tokens in result.tokens] == [0, 1, 1, 0, 1, 1]
    assert {index: error.code for index, error in result.failed.items()} == {3: "numerical_error"}
    assert [tokens[0] for tokens in result.tokens if tokens] == [alone[i][0][0] for i in (0, 1, 3, 4)]
    assert sorted(result.logprobs) == [1, 4]
    assert result.forward > 0 and result.sample > 0


def test_a_prompt_or_vector_of_bad_numbers_fails_alone(decoder: Decoder, told_alone: list[Any]) -> None:
    breaks: Any = Breaks(decoder)
    executor, driver, requests = LocalExecutor(make_runner(breaks, rows=12)), Driver(14), mixed_asks()
    mean, last, reported = requests[3], requests[4], requests[9]
    breaks.spoil, breaks.spoil_hidden = {2: torch.inf}, {0: torch.nan}  # rows: 1 of last, 19 of mean; 5 to report
    result = executor.submit(driver.plan([(reported, 5), (last, 11), (mean, 19)])).wait()
    assert isinstance(result, StepResult)
    assert {index: error.code for index, error in result.failed.items()} == {0: "numerical_error", 1: "numerical_error"}
    assert "at position 3" in str(result.failed[0])
    assert not result.prompt_logprobs and result.vectors == {2: told_alone[3][1]}


def test_a_step_without_a_draw(decoder: Decoder) -> None:
    executor, driver = LocalExecutor(make_runner(decoder)), Driver()
    result = executor.submit(driver.plan([(asks()[0], 3), (asks()[2], 5)])).wait()
    assert isinstance(result, StepResult)
    assert list(result.tokens) == [(), ()] and not result.logprobs and not result.failed


def test_rows_are_reused_and_their_number_is_a_limit(decoder: Decoder) -> None:
    inputs = Inputs(2, MAX_LEN, SIZE, POOLS, CPU)
    one, two, three = (ask.new() for ask in asks()[:3])
    rows = {inputs.place(one), inputs.place(two)}
    assert inputs.place(one) in rows
    inputs.forget(12345)
    with pytest.raises(Exception, match="executor_full"):
        inputs.place(three)
    inputs.forget(two.id)
    assert inputs.place(three) in rows
