"""One answer: tokens, logprobs and vectors are bitwise equal whatever else the engine does (DESIGN.md section 4).

Each cell runs the same requests and searches under another configuration, on every backend that makes the promise and a
trained checkpoint, and compares with each of them run alone in the plainest one.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Literal

import pytest

from penstock.assemble import Assembled, build_engine
from penstock.core.engine import Engine
from penstock.core.service import Abort, Sink, Status, Submission, Update
from penstock.kernels import native
from penstock.search import BeamSearchParams, Search, SearchRun, beam_search, best_of, step_params
from penstock.spec import EngineConfig, SamplingParams, StructuredOutputs

AXES: dict[str, tuple[object, ...]] = {
    "mates": ("alone", "all", "reversed"),
    "chunk": (8, 29, 512),
    "block_size": (4, 16, 64),
    "prefix": ("off", "cold", "warm"),
    "pool": ("ample", "tight"),
    "depth": (1, 2),
    "policy": ("fcfs", "priority"),
    "threads": (1, 2, 4),
}
PLAIN = {
    "mates": "alone",
    "chunk": 512,
    "block_size": 16,
    "prefix": "off",
    "pool": "ample",
    "depth": 1,
    "policy": "fcfs",
    "threads": 1,
}
STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw"

Heard = tuple[list[int], list[object], list[object], list[object]]
"""Of one sample: tokens, logprobs, prompt logprobs, and the vector."""

Answer = dict[tuple[str, int], object]
"""(request, sample) -> Heard, (search, 0) -> its SearchOutput."""

Ask = tuple[str, Submission | Callable[[], Search]]


@dataclass(frozen=True)
class Cell:
    mates: str
    chunk: int
    block_size: int
    prefix: str
    pool: str
    depth: int
    policy: str
    threads: int


@dataclass(frozen=True)
class World:
    """A model, and what computes it."""

    folder: Path
    backend: str
    dtype: str
    kv_dtype: Literal["auto", "int8"] = "auto"


def covering_array(axes: dict[str, tuple[object, ...]], seed: int = 0) -> list[Cell]:
    """Cells in which every pair of values of two axes occurs; greedy over random candidates."""
    rng, names = random.Random(seed), list(axes)
    missing = {
        frozenset([(a, x), (b, y)]) for a, b in itertools.combinations(names, 2) for x in axes[a] for y in axes[b]
    }
    cells = []
    while missing:
        candidates = [{name: rng.choice(values) for name, values in axes.items()} for _ in range(50)]
        best = max(candidates, key=lambda c: len(missing & pairs(c)))
        if missing & pairs(best):
            missing -= pairs(best)
            cells.append(Cell(**best))  # type: ignore[arg-type]
    return cells


def pairs(values: dict[str, object]) -> set[frozenset[tuple[str, object]]]:
    return {frozenset(pair) for pair in itertools.combinations(values.items(), 2)}


def asks(engine: Assembled) -> list[Ask]:
    """What shares prefixes, in every way to draw, to report and to search that this build knows."""
    ids = engine.tokenizer.encode(STORY)
    kinds = {
        "greedy": SamplingParams(temperature=0, max_tokens=20, logprobs=3),
        "top-p": SamplingParams(temperature=0.9, top_p=0.9, max_tokens=20, logprobs=2),
        "penalties": SamplingParams(
            temperature=0.7,
            repetition_penalty=1.2,
            presence_penalty=0.5,
            frequency_penalty=0.3,
            max_tokens=20,
            logprobs=1,
            min_tokens=4,
        ),
        "n": SamplingParams(temperature=1.0, top_k=40, min_p=0.02, n=3, max_tokens=12, logprobs=1),
        "bias": SamplingParams(temperature=0.8, logit_bias={300: 4.0, 301: -50.0}, max_tokens=16, logprobs=0),
        "rules": SamplingParams(
            temperature=0.9,
            typical_p=0.8,
            dry_multiplier=0.8,
            dry_allowed_length=1,
            bad_words_ids=((300,), (412, 302)),
            allowed_token_ids=tuple(range(2, 500)),
            max_tokens=14,
            logprobs=0,
        ),
        "grammar": SamplingParams(
            temperature=1.0,
            repetition_penalty=1.1,
            max_tokens=16,
            logprobs=0,
            structured_outputs=StructuredOutputs(regex=r" (a|the)( [a-z]{2,5}){1,6}\."),
        ),
        "prompt": SamplingParams(temperature=1.0, n=2, max_tokens=4, prompt_logprobs=2),
    }
    cuts = (len(ids), len(ids) - 7, 21, len(ids), 5, len(ids) - 3, 17, len(ids))
    plain = [
        Submission(id=name, tokens=tuple(ids[:cut]), params=params, seed=1000 + i, priority=i % 3)
        for i, ((name, params), cut) in enumerate(zip(kinds.items(), cuts, strict=True))
    ]
    one = SamplingParams(max_tokens=1)
    vectors = [
        Submission(id=task, tokens=tuple(ids[:cut]), params=one, seed=0, task=task, priority=cut % 3)
        for task, cut in (("mean", len(ids)), ("last", 30))
    ]
    return [*((s.id, s) for s in (*plain, *vectors)), *searches(engine, tuple(ids))]


def searches(engine: Assembled, ids: tuple[int, ...]) -> list[Ask]:
    beams = BeamSearchParams(beam_width=3, max_tokens=6)
    step = step_params(beams, engine.vocabulary.eos_ids, engine.vocabulary.size)
    beam = Submission(id="beam", tokens=ids[:-2], params=step, seed=0, priority=1)
    several = SamplingParams(temperature=0.9, n=4, max_tokens=12, stop=[" the", "."])
    best = Submission(id="best", tokens=ids[:-9], params=several, seed=5)
    return [
        ("beam", lambda: beam_search(beam, beams, engine.vocabulary.eos_ids, 96 - len(ids))),
        ("best", lambda: best_of(best)),
    ]


def build(world: World, cell: Cell) -> Assembled:
    tight = "52K" if world.kv_dtype == "int8" else "164K" if world.dtype == "float32" else "82K"
    return build_engine(
        EngineConfig(
            model=str(world.folder),
            device="cpu",
            backend=world.backend,
            dtype=world.dtype,
            kv_dtype=world.kv_dtype,
            num_threads=cell.threads,
            max_model_len=96,
            max_num_seqs=8,
            max_num_batched_tokens=cell.chunk,
            block_size=cell.block_size,
            enable_prefix_caching=cell.prefix != "off",
            kv_memory="4M" if cell.pool == "ample" else tight,
            depth=cell.depth,
            scheduling_policy=cell.policy,
        )
    )


class Driver:
    """Drives an engine's loop on this thread, and is the Service that searches run on."""

    def __init__(self, engine: Assembled) -> None:
        self.loop = Engine(engine.setup.scheduler(), engine.executor, self.deliver, engine.setup.depth)
        self.tokenizer = engine.tokenizer
        self.now = 0.0
        self.answers: Answer = {}
        self.sinks: dict[str, Sink] = {}

    def submit(self, submission: Submission, sink: Sink) -> None:
        self.sinks[submission.id] = sink
        self.loop.post(submission)

    def abort(self, id: str, sample: int | None = None) -> None:
        self.loop.post(Abort(id, sample))

    def status(self) -> Status:
        return self.loop.scheduler.status()

    def deliver(self, updates: list[Update]) -> None:
        for update in updates:
            assert update.error is None, update.error
            self.sinks[update.id](update)

    def note(self, update: Update) -> None:
        heard = self.answers.setdefault((update.id, update.sample), ([], [], [], []))
        news = (update.tokens, update.logprobs, update.prompt_logprobs, update.vector or ())
        for sofar, new in zip(heard, news, strict=True):  # type: ignore[call-overload]
            sofar += new

    def run(self, batch: list[Ask]) -> Answer:
        """Answers of a batch whose requests arrive one step apart."""
        self.answers = {}
        runs: dict[str, SearchRun] = {}
        for name, ask in batch:
            if isinstance(ask, Submission):
                self.submit(ask, self.note)
            else:
                runs[name] = SearchRun(self, ask(), lambda update, name=name: runs[name].hear(update), self.tokenizer)
                runs[name].start()
            self.step()
        while self.loop.busy:
            self.step()
        return {**self.answers, **{(name, 0): run.outcome for name, run in runs.items()}}

    def step(self) -> None:
        self.loop.launch(self.now)
        self.loop.land()
        self.now += 1.0


WORLDS = [("ref", "float32"), ("ref", "float32", "int8")]
if native():
    WORLDS += [("cpu", "float32"), ("cpu", "bfloat16"), ("cpu", "bfloat16", "int8")]


@pytest.fixture(scope="module", params=WORLDS, ids="-".join)
def world(request: pytest.FixtureRequest, test_data: Path) -> World:
    return World(test_data / "models" / "stories260k", *request.param)


@pytest.fixture(scope="module")
def expected(world: World) -> Answer:
    """Each request alone, whole prompts, nothing cached, nothing preempted."""
    engine = build(world, Cell(**PLAIN))
    driver = Driver(engine)
    answers: Answer = {}
    for ask in asks(engine):
        answers.update(driver.run([ask]))
    engine.close()
    assert len(answers) == 15 and all(answers.values())
    heard = {name: answer for (name, sample), answer in answers.items() if sample == 0 and isinstance(answer, tuple)}
    assert heard["mean"][3] and heard["last"][3] and len(heard["prompt"][2]) == len(engine.tokenizer.encode(STORY)) - 1
    assert answers["beam", 0].num_tokens > 6 and len(answers["best", 0].candidates) == 4  # type: ignore[attr-defined]
    return answers


def check(world: World, cell: Cell, expected: Answer) -> dict[str, int]:
    engine = build(world, cell)
    driver = Driver(engine)
    batch = asks(engine)
    batch = batch[::-1] if cell.mates == "reversed" else batch
    rounds = [[ask] for ask in batch] if cell.mates == "alone" else [batch]
    for _ in range(2 if cell.prefix == "warm" else 1):
        got: Answer = {}
        for asked in rounds:
            got.update(driver.run(asked))
        for name, answer in expected.items():
            assert got[name] == answer, name
    counters = driver.loop.scheduler.counters
    engine.close()
    return {"preemptions": counters.preemptions, "hits": counters.prefix_hit_tokens, "copies": counters.copies}


@pytest.mark.parametrize("cell", covering_array(AXES), ids=lambda c: "-".join(str(v) for v in astuple(c)))
def test_pairwise(world: World, cell: Cell, expected: Answer) -> None:
    check(world, cell, expected)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("half", [0, 1])
def test_full_product(world: World, expected: Answer, half: int) -> None:
    """Of all axes but the threads, whose number goes round."""
    events: Counter[str] = Counter()
    others = {name: values for name, values in AXES.items() if name != "threads"}
    for index, values in enumerate(itertools.product(*others.values())):
        if index % 2 == half:
            threads = AXES["threads"][index // 2 % 3]
            events.update(check(world, Cell(*values, threads), expected))  # type: ignore[arg-type]
    assert min(events.values()) > 0, events


def test_the_grid_can_fail(world: World, expected: Answer) -> None:
    """Another draw position, another seed or other KV is noticed: the comparison is not vacuous."""
    engine = build(world, Cell(**PLAIN))
    driver = Driver(engine)
    name, ask = asks(engine)[1]
    assert isinstance(ask, Submission)
    got = driver.run([(name, replace(ask, seed=ask.seed + 1))])
    engine.close()
    assert got[name, 0] != expected[name, 0]


def test_the_array_exercises_what_it_claims(world: World, expected: Answer) -> None:
    """A tight pool preempts, a warm cache hits, samples copy."""
    tight = check(world, Cell(**{**PLAIN, "mates": "all", "pool": "tight", "prefix": "warm"}), expected)
    assert tight["preemptions"] > 0 and tight["hits"] > 0 and tight["copies"] > 0
