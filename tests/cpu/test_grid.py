"""One answer: tokens, logprobs and vectors are bitwise equal whatever else the engine does (DESIGN.md section 4).

Each cell makes the same requests and searches in another configuration and compares every one of them with itself
alone in the plainest one. What is covered is said in grid.py and gridcells.py.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import grid
from grid import AXES, CONTEXT, KINDS, MODELS, PLAIN, Asked, Cell
from gridcells import PRODUCTS, SLICES, World, arrays, product
from gridrecord import Record, added_up, counted, read
from penstock.assemble import Assembled, build_engine
from penstock.base import InvalidRequest
from penstock.core.engine import Engine
from penstock.core.plan import StepPlan
from penstock.core.request import Phase
from penstock.core.service import Abort, Sink, Status, Submission, Update
from penstock.kernels import native
from penstock.kernels.ref import RefOps
from penstock.llm.requests import Requests
from penstock.runtime.local import Launched, StepRunner
from penstock.spec import EngineConfig
from penstock.spec.hf import model_spec
from penstock.spec.quantization import GROUP, may_be_grouped
from penstock.spec.tensors import checkpoint_tensors, slot_segments
from penstock.wire import UnderWay

ARITHMETICS = {name: options for name, options in grid.ARITHMETICS.items() if options["backend"] == "ref" or native()}
LIVES = (9.0, 22.0, 31.0)
"""Steps after which an engine is lost, in cells where one is."""

Answers = dict[str, Any]


class Worlds:
    """Folders of the models, and the answers of each request alone; both are made when they are first asked for."""

    def __init__(self, trained: Path, folder: Path) -> None:
        self.trained, self.folder = trained, folder
        self.answers: dict[World, Answers] = {}
        self.record = Record(os.environ.get("GRID_RECORD"))

    def model(self, name: str) -> Path:
        config, folder = MODELS[name].config, self.folder / name
        if config is None:
            return self.trained
        if not folder.exists():
            folder.mkdir()
            for file in self.trained.glob("*token*"):
                (folder / file.name).symlink_to(file)
            (folder / "config.json").write_text(json.dumps(config))
            save_file(random_weights(config), folder / "model.safetensors", {"format": "pt"})
        return folder

    def expected(self, world: World) -> Answers:
        """Each request alone, whole prompts, nothing cached, nothing preempted."""
        if world not in self.answers:
            with Driver(self, world, PLAIN) as driver:
                self.answers[world] = driver.round(PLAIN["mates"])
        return self.answers[world]


def random_weights(config: Any) -> dict[str, torch.Tensor]:
    """Such that attention is neither flat nor one-hot, and logits are spread."""
    tensors, source = {}, torch.Generator().manual_seed(1)
    for name, shape in checkpoint_tensors(model_spec(config)).items():
        weight = torch.randn(shape, generator=source)
        if "norm" in name:
            weight = weight * 0.3 + (0.0 if "Gemma" in config["architectures"][0] else 1.0)
        elif name.endswith("bias"):
            weight *= 0.3
        elif "embed" not in name and len(shape) > 1:
            weight *= (4.0 if name == "lm_head.weight" else 1.5) / shape[-1] ** 0.5
        tensors[name] = weight
    return tensors


class Faulty:
    """Runs a model's steps; every fifth that has several requests raises when all of it is done."""

    def __init__(self, runner: StepRunner) -> None:
        self.runner, self.steps = runner, 0

    def launch(self, plan: StepPlan) -> Launched:
        launched = self.runner.launch(plan)
        self.steps += 1
        if self.steps % 5 == 0 and len(plan.slices) > 1:
            raise ValueError("a cosmic ray")
        return launched


class Driver:
    """Drives an engine's loop on this thread, and is the Service below the faces that people use.

    Attributes:
        interrupted: names of the requests that were preempted after their first token.
        continued: of those that went on, after their first token, when an engine was lost.
    """

    def __init__(self, worlds: Worlds, world: World, cell: Cell) -> None:
        self.cell = cell
        self.engine = build(worlds.model(world.model), grid.ARITHMETICS[world.arithmetic], cell)
        self.requests = Requests(replace(self.engine, service=self), next_seed=lambda: 0)  # type: ignore[arg-type]
        self.runner = self.engine.executor.runner  # type: ignore[union-attr]
        setup = self.engine.setup
        if cell["pool"] == "tight":  # the scheduler is told of blocks for one request and a half
            blocks = -(-3 * CONTEXT // (2 * setup.block_size))
            setup = replace(setup, pools=tuple(replace(pool, blocks=blocks) for pool in setup.pools))
        if cell["faults"] != "none":
            self.engine.executor.runner = Faulty(self.runner)  # type: ignore[attr-defined]
        self.setup, self.lives = setup, LIVES if cell["engine"] == "lost" else ()
        self.loop = Engine(setup.scheduler(), self.engine.executor, self.deliver, setup.depth)
        self.now = 0.0
        self.under_way: dict[str, UnderWay] = {}
        self.interrupted: set[str] = set()
        self.continued: list[str] = []

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def submit(self, submission: Submission, sink: Sink) -> None:
        self.under_way[submission.id] = UnderWay(submission, sink)
        self.loop.post(submission)

    def abort(self, id: str, sample: int | None = None) -> None:
        self.loop.post(Abort(id, sample))

    def status(self) -> Status:
        return self.loop.scheduler.status()

    def deliver(self, updates: list[Update]) -> None:
        for update in updates:
            assert update.error is None, update.error
            one = self.under_way[update.id]
            if one.hear(update):
                if not one.left:
                    del self.under_way[update.id]
                one.sink(update)

    def lose(self) -> None:
        """The engine is lost with all that it knew and had in flight; another begins with what was told of it."""
        lost, scheduler = self.loop, self.setup.scheduler()
        for _, ticket in lost.inflight:
            ticket.wait()
        scheduler._next_id = lost.scheduler._next_id  # the executor stays: it forgets the requests of the lost one
        scheduler._draft.plan.gone += self.runner.inputs.row_of
        self.loop = Engine(scheduler, self.engine.executor, self.deliver, self.setup.depth)
        for id, one in self.under_way.items():
            self.loop.post(continuation := one.continuation())
            self.continued += [id] * any(continuation.emitted)
        for mail in lost.inbox:
            if isinstance(mail, Abort):
                self.loop.post(mail)

    def round(self, mates: str) -> Answers:
        """Answers of all kinds, among such mates."""
        if mates == "none":
            return {name: answer for one in KINDS for name, answer in self.run([one]).items()}
        return self.run(list(KINDS)[:: -1 if mates == "reversed" else 1], leaving=mates == "leaving")

    def run(self, names: list[str], leaving: bool = False) -> Answers:
        """Answers of requests that arrive one step apart. ``leaving``: the twin of every second one comes, and goes."""
        under_way: dict[str, Asked] = {}
        twins: dict[str, tuple[Asked, int]] = {}
        for index, name in enumerate(names):
            if leaving and index % 2:
                twins[name] = KINDS[name].ask(self.requests, f"{name}.twin"), 3 * index % 13
            under_way[name] = KINDS[name].ask(self.requests, name)
            self.step(twins)
        while self.loop.busy:
            self.step(twins)
        answers = {name: one.answer() for name, one in under_way.items()}
        for name, (twin, _) in twins.items():
            for (tokens, logprobs), (all_tokens, all_logprobs) in zip(twin.said(), under_way[name].said(), strict=True):
                assert tokens == all_tokens[: len(tokens)] and logprobs == all_logprobs[: len(tokens)], name
        return answers

    def step(self, twins: dict[str, tuple[Asked, int]]) -> None:
        for name, (twin, steps) in twins.items():
            if steps == 0:
                twin.leave()
            twins[name] = twin, steps - 1
        self.loop.launch(self.now)
        for family in self.loop.scheduler.samples.values():
            waits = (r for r in family if r.emitted and r.phase in (Phase.WAITING, Phase.LEAVING))
            self.interrupted.update(request.submission.id for request in waits)
        self.loop.land()
        self.now += 1.0
        if self.now in self.lives:
            self.lose()


def build(folder: Path, arithmetic: dict[str, Any], cell: Cell) -> Assembled:
    options = {axis.option: cell[name] for name, axis in AXES.items() if axis.option}
    config = EngineConfig(
        model=str(folder),
        device="cpu",
        max_model_len=CONTEXT,
        max_num_seqs=8,
        kv_memory="6M",
        logits_rule="grid:without",
        **arithmetic,
        **options,
    )
    return build_engine(config)


@pytest.fixture(scope="module")
def worlds(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    return Worlds(test_data / "models" / "stories260k", tmp_path_factory.mktemp("grid"))


def check(worlds: Worlds, world: World, cell: Cell) -> Counter[str]:
    """Compares all answers of a cell; returns what happened on the way."""
    expected = worlds.expected(world)
    with Driver(worlds, world, cell) as driver:
        rounds = [(expected, driver.round(cell["mates"])) for _ in range(2 if cell["prefix"] else 1)]
        worlds.record.add(world, cell, rounds)
        assert [name for _, got in rounds for name in expected if got[name] != expected[name]] == []
        counters, interrupted = driver.loop.scheduler.counters, driver.interrupted
    events = Counter({f"{name} interrupted": 1 for name in interrupted})
    events.update(preempted=counters.preemptions, found=counters.prefix_hit_tokens)
    events.update(copied=counters.copies, failed=counters.failed_steps)
    events.update(f"{name} continued" for name in driver.continued)
    return events


CELLS = [
    pytest.param(world, cell, id=id, marks=[pytest.mark.slow] if slow else [])
    for id, (world, cell, slow) in arrays().items()
    if world.arithmetic in ARITHMETICS
]


@pytest.mark.parametrize(("world", "cell"), CELLS)
def test_pairs(worlds: Worlds, world: World, cell: Cell) -> None:
    check(worlds, world, cell)


@pytest.mark.slow
@pytest.mark.parametrize("sliced", SLICES, ids=str)
@pytest.mark.parametrize("world", [world for world in PRODUCTS if world.arithmetic in ARITHMETICS], ids=str)
def test_full_product(worlds: Worlds, world: World, sliced: tuple[Any, ...]) -> None:
    events = Counter[str]()
    for cell in product(world, sliced):
        events.update(check(worlds, world, cell))
    assert events["copied"] and events["found"]


def test_a_run_leaves_a_record(tmp_path: Path, worlds: Worlds) -> None:
    """Of all processes together: what was compared, and an answer that differed."""
    world, cells = World("trained", list(ARITHMETICS)[-1]), [PLAIN, PLAIN | {"mates": "all", "prefix": True}]
    expected = worlds.expected(world)
    for process, (cell, name) in enumerate(zip(cells, ("greedy", None), strict=True)):
        record = Record(str(tmp_path))
        record.file = tmp_path / f"{process}.jsonl"
        rounds = [(expected, expected | ({} if name is None else {name: None}))] * (1 + cell["prefix"])
        record.add(world, cell, rounds)
        record.add(world, cell, rounds)  # a cell that ran again counts once
    pairs = added_up(*read(tmp_path))["pairs"]
    tokens = {name: counted(answer)[0] for name, answer in expected.items()}
    assert tokens["echo"] == 1 and tokens["n = 3"] == 24 and tokens["mean vector"] == 0
    assert pairs["mates, chunk"]["none, 512"][::3] == [1, 1] and pairs["mates, chunk"]["all, 512"][::3] == [1, 0]
    assert pairs["chunk, request"]["512, n = 3"][:2] == [2, 3 * 24] and pairs["chunk, block"]["512, 16"][0] == 2
    assert pairs["mates, chunk"]["all, 512"][1] == 2 * sum(tokens.values())
    assert pairs["chunk, request"]["512, greedy"][3] == 1 and pairs["chunk, request"]["512, echo"][3] == 0
    (tmp_path / "2.jsonl").write_text('{"commit": "another", "kernels": "others"}\n')
    with pytest.raises(ValueError, match="the same kernels"):
        read(tmp_path)


@pytest.mark.parametrize("model", MODELS)
def test_the_grid_exercises_what_it_claims(worlds: Worlds, model: str) -> None:
    """A tight pool preempts, a grammar in its midst too; a warm cache hits; samples copy. Lost engines cut requests."""
    busy = PLAIN | {
        "mates": "leaving",
        "pool": "tight",
        "block": 4,
        "prefix": True,
        "policy": "priority",
        "faults": "every 5th",
    }
    events = check(worlds, World(model, list(ARITHMETICS)[-1]), busy)
    assert events["preempted"] and events["found"] and events["copied"] and events["failed"]
    assert events["json interrupted"]
    events = check(worlds, World(model, list(ARITHMETICS)[-1]), PLAIN | {"mates": "all", "chunk": 29, "engine": "lost"})
    assert all(events[f"{name} continued"] for name in ("json", "penalties", "n = 3", "rules", "thoughts"))


def test_kinds_do_what_they_say(worlds: Worlds) -> None:
    answers = worlds.expected(World("trained", list(ARITHMETICS)[-1]))
    assert list(answers) == list(KINDS) and all(answers.values())
    samples = {name: answer[0] for name, answer in answers.items() if isinstance(answer, tuple) and len(answer) == 2}
    person = json.loads(samples["json"][0].text)
    assert list(person) == ["name", "age"]
    assert re.fullmatch(r'<f>\{ *"a" *: *\d\d *\}</f>', samples["tool call"][0].text)
    assert len(answers["prompt logprobs"][1]) == 70 and len(answers["echo"][1]) == 33
    assert all(sample.stop_reason == "e" and "e" not in sample.text for sample in samples["stop strings"])
    assert len({tuple(sample.token_ids) for sample in samples["n = 3"]}) == 3
    assert "." in samples["thoughts"][0].text
    assert len(answers["beams"].candidates) == 3 and len(answers["best of 4"].candidates) == 4
    assert -1 < answers["score"] < 1


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.config is not None])
def test_small_integers_are_in_every_product(name: str) -> None:
    """Sums over heads and over the inner width have segments: groups of inputs that crossed one would stay plain."""
    spec = model_spec(MODELS[name].config)
    inner = {"down.weight": spec.ffn} if spec.moe is None else {"experts.down.weight": spec.moe.ffn}
    for slot, inputs in {"qkv.weight": spec.hidden, "out.weight": spec.heads * spec.head_dim, **inner}.items():
        assert may_be_grouped(spec, slot, inputs, GROUP), slot
    assert slot_segments(spec, "out.weight") > 1


@pytest.mark.parametrize("name", ["top-p", "json", "n = 3", "best of 4"])
def test_the_grid_can_fail(worlds: Worlds, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another seed is noticed: the comparison is not vacuous."""
    world = World("experts", list(ARITHMETICS)[-1])
    expected = worlds.expected(world)
    monkeypatch.setattr(grid, "number", lambda name: 5)
    with Driver(worlds, world, PLAIN) as driver:
        assert driver.run([name])[name] != expected[name]


def test_the_grid_sees_a_row_that_knows_its_batch(worlds: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that is off by some last bits for each row beside its own is told by the size of the chunks."""
    norm, answers = RefOps.norm, []
    monkeypatch.setattr(RefOps, "norm", lambda ops, x, *rest: norm(ops, x, *rest) * (1 + len(x) * 2**-22))
    for chunk in (512, 8):
        with Driver(worlds, World("norms", "ref float32"), PLAIN | {"chunk": chunk}) as driver:
            answers.append(driver.run(["greedy"]))
    assert answers[0] != answers[1]


@pytest.mark.parametrize("pair", grid.REFUSED, ids=lambda pair: f"{pair.one} and {pair.other}")
def test_what_cannot_be_had_is_refused(worlds: Worlds, pair: grid.Refused) -> None:
    with Driver(worlds, World("trained", list(ARITHMETICS)[-1]), PLAIN) as driver:
        with pytest.raises(InvalidRequest) as caught:
            pair.attempt(driver.requests)
        assert caught.value.code == pair.code
