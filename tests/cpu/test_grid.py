"""One answer: tokens and logprobs are bitwise equal whatever else the engine does (DESIGN.md section 4).

Each cell runs the same requests under another configuration on the ``ref`` backend and a trained checkpoint, and
compares with each request run alone in the plainest one.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import pytest

from penstock.assemble import Assembled, build_engine
from penstock.core.engine import Engine
from penstock.core.service import Submission, Update
from penstock.spec import EngineConfig, SamplingParams

AXES: dict[str, tuple[object, ...]] = {
    "mates": ("alone", "all", "reversed"),
    "chunk": (8, 29, 512),
    "block_size": (4, 16, 64),
    "prefix": ("off", "cold", "warm"),
    "pool": ("ample", "tight"),
    "depth": (1, 2),
    "policy": ("fcfs", "priority"),
}
PLAIN = {
    "mates": "alone",
    "chunk": 512,
    "block_size": 16,
    "prefix": "off",
    "pool": "ample",
    "depth": 1,
    "policy": "fcfs",
}
STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw"

Answer = dict[tuple[str, int], tuple[list[int], list[object]]]


@dataclass(frozen=True)
class Cell:
    mates: str
    chunk: int
    block_size: int
    prefix: str
    pool: str
    depth: int
    policy: str


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


def jobs(engine: Assembled) -> list[Submission]:
    """Requests that share prefixes, in every way to draw that this build knows."""
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
    }
    cuts = (len(ids), len(ids) - 7, 21, len(ids), 5)
    return [
        Submission(id=name, tokens=tuple(ids[:cut]), params=params, seed=1000 + i, priority=i % 3)
        for i, ((name, params), cut) in enumerate(zip(kinds.items(), cuts, strict=True))
    ]


def build(folder: Path, cell: Cell) -> Assembled:
    return build_engine(
        EngineConfig(
            model=str(folder),
            device="cpu",
            backend="ref",
            dtype="float32",
            max_model_len=96,
            max_num_seqs=8,
            max_num_batched_tokens=cell.chunk,
            block_size=cell.block_size,
            enable_prefix_caching=cell.prefix != "off",
            kv_memory="4M" if cell.pool == "ample" else "164K",
            depth=cell.depth,
            scheduling_policy=cell.policy,
        )
    )


class Driver:
    """Drives an engine's loop on this thread."""

    def __init__(self, engine: Assembled) -> None:
        self.loop = Engine(engine.setup.scheduler(), engine.executor, self.deliver, engine.setup.depth)
        self.now = 0.0
        self.answers: Answer = {}

    def deliver(self, updates: list[Update]) -> None:
        for update in updates:
            assert update.error is None, update.error
            tokens, logprobs = self.answers.setdefault((update.id, update.sample), ([], []))
            tokens += update.tokens
            logprobs += update.logprobs

    def run(self, batch: list[Submission]) -> Answer:
        """Answers of a batch whose requests arrive one step apart."""
        self.answers = {}
        for submission in batch:
            self.loop.post(submission)
            self.step()
        while self.loop.busy:
            self.step()
        return self.answers

    def step(self) -> None:
        self.loop.launch(self.now)
        self.loop.land()
        self.now += 1.0


@pytest.fixture(scope="module")
def folder(test_data: Path) -> Path:
    return test_data / "models" / "stories260k"


@pytest.fixture(scope="module")
def expected(folder: Path) -> Answer:
    """Each request alone, whole prompts, nothing cached, nothing preempted."""
    engine = build(folder, Cell(**PLAIN))
    driver = Driver(engine)
    answers: Answer = {}
    for job in jobs(engine):
        answers.update(driver.run([job]))
    engine.close()
    assert len(answers) == 7 and all(len(tokens) == len(logprobs) for tokens, logprobs in answers.values())
    return answers


def check(folder: Path, cell: Cell, expected: Answer) -> dict[str, int]:
    engine = build(folder, cell)
    driver = Driver(engine)
    batch = jobs(engine)
    batch = batch[::-1] if cell.mates == "reversed" else batch
    rounds = [[job] for job in batch] if cell.mates == "alone" else [batch]
    for _ in range(2 if cell.prefix == "warm" else 1):
        got: Answer = {}
        for jobs_of_round in rounds:
            got.update(driver.run(jobs_of_round))
        assert got == expected
    counters = driver.loop.scheduler.counters
    engine.close()
    return {"preemptions": counters.preemptions, "hits": counters.prefix_hit_tokens, "copies": counters.copies}


@pytest.mark.parametrize("cell", covering_array(AXES), ids=lambda c: "-".join(str(v) for v in astuple(c)))
def test_pairwise(folder: Path, cell: Cell, expected: Answer) -> None:
    check(folder, cell, expected)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_full_product(folder: Path, expected: Answer) -> None:
    events: Counter[str] = Counter()
    for values in itertools.product(*AXES.values()):
        events.update(check(folder, Cell(*values), expected))  # type: ignore[arg-type]
    assert min(events.values()) > 0, events


def test_the_grid_can_fail(folder: Path, expected: Answer) -> None:
    """Another draw position, another seed or other KV is noticed: the comparison is not vacuous."""
    engine = build(folder, Cell(**PLAIN))
    driver = Driver(engine)
    job = jobs(engine)[1]
    got = driver.run([replace(job, seed=job.seed + 1)])
    engine.close()
    assert got[job.id, 0] != expected[job.id, 0]


def test_the_array_exercises_what_it_claims(folder: Path, expected: Answer) -> None:
    """A tight pool preempts, a warm cache hits, samples copy."""
    tight = check(folder, Cell(**{**PLAIN, "mates": "all", "pool": "tight", "prefix": "warm"}), expected)
    assert tight["preemptions"] > 0 and tight["hits"] > 0 and tight["copies"] > 0
