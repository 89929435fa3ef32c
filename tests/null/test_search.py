"""Searches over a real engine and a model that is a hash: what they find, and that nothing else matters."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import blake2b
from itertools import product
from typing import Any

import pytest

import toytext
from penstock.base import InvalidRequest, PenstockError
from penstock.core.admission import Limits
from penstock.core.engine import Engine
from penstock.core.kv.groups import PoolSpec
from penstock.core.plan import StepPlan
from penstock.core.service import Abort, Sink, Status, Submission, Update
from penstock.core.setup import EngineSetup
from penstock.search import (
    BeamSearchParams,
    Majority,
    Scorer,
    Search,
    SearchOutput,
    SearchRun,
    Verifier,
    beam_search,
    best_of,
    choose,
    mean_logprob,
    step_params,
)
from penstock.sim.toy import Done, ToyExecutor
from penstock.spec import CompletionOutput, SamplingParams, TokenLogprobs, Vocabulary
from penstock.text import Tokenizer

VOCAB, EOS = 6, 0
PROMPT = (3, 1, 4, 1, 5, 2, 3, 5, 2, 4)
Model = Callable[[tuple[int, ...]], Sequence[float]]
"""Prefix -> the log-probability of each token."""


@cache
def hashed(prefix: tuple[int, ...]) -> tuple[float, ...]:
    """Any two prefixes disagree."""
    logits = [byte / 48 for byte in blake2b(repr(prefix).encode(), digest_size=VOCAB).digest()]
    norm = math.log(sum(map(math.exp, logits)))
    return tuple(logit - norm for logit in logits)


def tied(prefix: tuple[int, ...]) -> tuple[float, ...]:
    """The end is unlikely, all else alike."""
    return (-9.0, *[-1.0] * (VOCAB - 1))


class Ranked(ToyExecutor):
    """A toy whose greedy draws are those of a model of log-probabilities; KV still has to be where it belongs."""

    model: Model = staticmethod(hashed)

    def submit(self, plan: StepPlan) -> Done:
        done = super().submit(plan)
        for index, (id, _, _) in enumerate(plan.slices):
            row = self.rows[id]
            if (count := row.new.params.logprobs) is not None and done.result.tokens[index]:
                prefix = tuple(row.tokens[:-1])
                every = type(self).model(prefix)
                ranked = sorted(range(VOCAB), key=lambda token: (-every[token], token))
                token = ranked[0] if row.new.params.greedy else row.tokens[-1]
                row.tokens[-1] = token
                done.result.tokens[index] = (token,)
                top = tuple((t, every[t]) for t in ranked[:count])
                done.result.logprobs[index] = (TokenLogprobs(every[token], 1 + ranked.index(token), top),)
        return done


class Tied(Ranked):
    model = staticmethod(tied)


@dataclass
class Virtual:
    """A Service that runs when it is told to, in this thread."""

    setup: EngineSetup
    kind: type[Ranked] = Ranked
    bad_row: Callable[[StepPlan, int], bool] = lambda plan, index: False
    sinks: dict[str, Sink] = field(default_factory=dict)
    submitted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        executor = self.kind(self.setup.pools, self.setup.block_size, VOCAB, bad_row=self.bad_row)
        self.engine = Engine(self.setup.scheduler(), executor, self._deliver, self.setup.depth)

    def submit(self, submission: Submission, sink: Sink) -> None:
        self.submitted.append(submission.id)
        self.sinks[submission.id] = sink
        self.engine.post(submission)

    def abort(self, id: str, sample: int | None = None) -> None:
        self.engine.post(Abort(id, sample))

    def status(self) -> Status:
        return self.engine.scheduler.status()

    def run(self) -> None:
        step = 0
        while self.engine.busy:
            self.engine.launch(float(step))
            self.engine.land()
            step += 1

    def _deliver(self, updates: list[Update]) -> None:
        for update in updates:
            self.sinks[update.id](update)


def setup(
    blocks: int = 64, block_size: int = 4, prefix_cache: bool = True, depth: int = 1, rows: int = 32
) -> EngineSetup:
    return EngineSetup(
        pools=(PoolSpec(blocks),),
        block_size=block_size,
        numerics_id=b"search",
        limits=Limits(max_batch_tokens=64, max_batch_requests=rows, max_model_len=64),
        vocabulary=Vocabulary(size=VOCAB, eos_ids=frozenset([EOS])),
        prefix_cache=prefix_cache,
        depth=depth,
    )


def found(search: Search, service: Virtual | None = None, tokenizer: Tokenizer | None = None) -> SearchOutput:
    service = service or Virtual(setup())
    run = SearchRun(service, search, lambda update: run.hear(update), tokenizer)
    run.start()
    service.run()
    assert run.outcome is not None
    assert service.status().running == service.status().waiting == 0
    return run.outcome


def beams(params: BeamSearchParams, name: str = "b", room: int = 54) -> Search:
    request = Submission(id=name, tokens=PROMPT, params=step_params(params, [EOS], VOCAB), seed=0)
    return beam_search(request, params, [EOS], room)


def samples(n: int, name: str = "s", **params: object) -> Submission:
    made = SamplingParams(n=n, **params)  # type: ignore[arg-type]
    return Submission(id=name, tokens=PROMPT, params=made, seed=7)


# -- beam search -------------------------------------------------------------------------------------------------------


def exhaustive(length: int, penalty: float, *, ends: bool) -> list[tuple[float, tuple[int, ...]]]:
    """Every completion of at most ``length`` tokens, best first."""
    every = {}
    for tokens in product(range(VOCAB), repeat=length):
        if ends and EOS in tokens:
            tokens = tokens[: tokens.index(EOS) + 1]
        total = 0.0
        for i, token in enumerate(tokens):
            total += hashed(PROMPT + tokens[:i])[token]
        every[tokens] = total / len(tokens) ** penalty
    return sorted(((score, tokens) for tokens, score in every.items()), reverse=True)


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.5])
@pytest.mark.parametrize("ends", [True, False])
def test_a_beam_as_wide_as_the_tree_finds_the_best_there_is(penalty: float, ends: bool) -> None:
    params = BeamSearchParams(
        beam_width=40, max_tokens=3, length_penalty=penalty, ignore_eos=not ends, include_stop_str_in_output=True
    )
    outcome = found(beams(params))
    best = exhaustive(3, penalty, ends=ends)
    # At the last length nothing is cut before it is ranked, so the first are exact; with an end they may stop early.
    for i in range(3):
        assert outcome.scores[i] == pytest.approx(best[i][0], abs=1e-12)
        assert tuple(outcome.candidates[i].token_ids) == best[i][1]
    assert outcome.scores == sorted(outcome.scores, reverse=True)
    assert outcome.num_tokens >= 1 + 5


def test_an_ending_candidate_leaves_its_place_to_another() -> None:
    outcome = found(beams(BeamSearchParams(beam_width=3, max_tokens=8, length_penalty=0.0)))
    stopped = [c for c in outcome.candidates if c.finish_reason == "stop"]
    assert stopped and all(EOS not in c.token_ids and len(c.logprobs or ()) == len(c.token_ids) for c in stopped)
    kept = found(
        beams(BeamSearchParams(beam_width=3, max_tokens=8, length_penalty=0.0, include_stop_str_in_output=True))
    )
    assert [c.token_ids[-1] == EOS for c in kept.candidates] == [c.finish_reason == "stop" for c in kept.candidates]
    assert kept.scores == outcome.scores
    for candidate, score in zip(kept.candidates, kept.scores, strict=True):
        assert candidate.cumulative_logprob == score  # a penalty of 0 divides by 1
        drawn = [entry[t].logprob for entry, t in zip(candidate.logprobs or (), candidate.token_ids, strict=True)]
        assert sum(drawn) == score


def test_a_search_is_over_when_no_running_beam_can_win() -> None:
    outcome = found(beams(BeamSearchParams(beam_width=3, max_tokens=40, length_penalty=0.0)))
    assert {c.finish_reason for c in outcome.candidates} == {"stop"}
    assert outcome.num_tokens < 3 * 20


def test_equal_scores_go_by_parent_and_token() -> None:
    service = Virtual(setup(), Tied)
    outcome = found(beams(BeamSearchParams(beam_width=3, max_tokens=3)), service)
    assert [c.token_ids for c in outcome.candidates] == [[1, 1, 1], [1, 1, 2], [1, 1, 3]]
    assert outcome.chosen == 0
    assert outcome.num_tokens == 1 + 3 + 3


def test_the_room_in_the_context_ends_a_search() -> None:
    outcome = found(beams(BeamSearchParams(beam_width=2, max_tokens=50, ignore_eos=True), room=4))
    assert [len(c.token_ids) for c in outcome.candidates] == [4, 4]
    assert {c.finish_reason for c in outcome.candidates} == {"length"}


WIDE = BeamSearchParams(beam_width=5, max_tokens=12, length_penalty=0.7)


@pytest.mark.parametrize(
    "changed",
    [
        setup(blocks=20),
        setup(block_size=1, blocks=200),
        setup(block_size=32, blocks=12),
        setup(prefix_cache=False),
        setup(depth=2),
        setup(rows=2),
    ],
)
def test_beams_are_the_same_however_they_are_served(changed: EngineSetup) -> None:
    alone, service = found(beams(WIDE)), Virtual(changed)
    for i in range(3):  # neighbours
        service.submit(replace(samples(2, f"n{i}", max_tokens=20), tokens=PROMPT[: 4 + i]), lambda update: None)
    assert found(beams(WIDE), service) == alone


def test_beams_share_their_blocks() -> None:
    service = Virtual(setup(block_size=1, blocks=200))
    outcome = found(beams(WIDE), service)
    counters = service.status().counters
    # A beam computes its own last token and finds what is before it, once the first has computed the prompt.
    assert counters.prompt_tokens - counters.prefix_hit_tokens == len(PROMPT) + outcome.num_tokens - 1


def test_sequences_are_shaped_as_in_vllm() -> None:
    outcome = found(beams(BeamSearchParams(beam_width=2, max_tokens=3, ignore_eos=True)))
    first, best = outcome.sequences[0], outcome.candidates[0]
    assert first.tokens == [*PROMPT, *best.token_ids]
    assert (first.cum_logprob, first.logprobs) == (best.cumulative_logprob, best.logprobs)
    assert (first.finish_reason, first.stop_reason) == ("length", None)


@pytest.mark.parametrize(
    ("params", "code"),
    [
        ({"beam_width": 0}, "invalid_parameter"),
        ({"beam_width": 65}, "invalid_parameter"),
        ({"beam_width": True}, "invalid_parameter"),
        ({"max_tokens": 0}, "invalid_parameter"),
        ({"length_penalty": math.nan}, "invalid_parameter"),
        ({"length_penalty": "1"}, "invalid_parameter"),
        ({"temperature": 0.5}, "unsupported_parameter"),
    ],
)
def test_unusable_beam_parameters(params: dict[str, object], code: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        BeamSearchParams(**({"beam_width": 2, "max_tokens": 4} | params))  # type: ignore[arg-type]
    assert error.value.code == code


def test_a_beam_too_wide_for_so_many_ends_is_refused() -> None:
    params = BeamSearchParams(beam_width=64, max_tokens=4)
    assert step_params(params, [0], 1000).logprobs == 128
    assert step_params(params, [0, 1, 2], 100).logprobs == 100
    with pytest.raises(InvalidRequest, match="at most 32 can be used"):
        step_params(params, [0, 1, 2], 1000)


# -- many samples ------------------------------------------------------------------------------------------------------


def test_best_of_chooses_by_mean_logprob() -> None:
    request = samples(8, max_tokens=6, ignore_eos=True)
    outcome = found(best_of(request))
    assert len(outcome.candidates) == 8 and outcome.num_tokens == 48
    assert outcome.scores == [(c.cumulative_logprob or 0.0) / 6 for c in outcome.candidates]
    assert outcome.scores[outcome.chosen] == max(outcome.scores)
    assert outcome.best is outcome.candidates[outcome.chosen]
    for candidate in outcome.candidates:
        entries = zip(candidate.token_ids, candidate.logprobs or (), strict=True)
        assert candidate.cumulative_logprob == sum(entry[token].logprob for token, entry in entries)


def test_samples_share_the_prompt() -> None:
    service = Virtual(setup())
    found(best_of(samples(8, max_tokens=3)), service)
    assert service.submitted == ["s"]
    assert service.status().counters.prompt_tokens - service.status().counters.prefix_hit_tokens == len(PROMPT)


def texts(*every: str, logprobs: Sequence[float] = ()) -> list[CompletionOutput]:
    values = logprobs or [-1.0] * len(every)
    return [CompletionOutput(i, t, [1, 2], v) for i, (t, v) in enumerate(zip(every, values, strict=True))]


def test_mean_logprob_is_per_token() -> None:
    long, short = CompletionOutput(0, "", [1] * 8, -4.0), CompletionOutput(1, "", [1], -1.0)
    assert mean_logprob(None, [long, short]) == [-0.5, -1.0]


def test_the_majority_is_of_answers_not_of_texts() -> None:
    every = texts("so it is 42", "7, no: 42", "12", "I do not know", "42.")
    assert Majority(r"\d+")(None, every) == [3.0, 3.0, 1.0, 0.0, 3.0]
    assert Majority(re.compile(r"is (\d+)"))(None, every) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert Majority(lambda text: len(text) > 4)(None, every) == [3.0, 3.0, 2.0, 3.0, 2.0]
    assert choose(Majority(r"\d+")(None, every)) == 0
    assert choose([0.0, 2.0, 2.0]) == 1


def test_a_verifier_sees_prompt_and_text() -> None:
    verifier = Verifier(lambda prompt, text: float(text == prompt.upper()))
    assert verifier("ab", texts("AB", "ab")) == [1.0, 0.0]


def nan(prompt: str | None, candidates: Sequence[CompletionOutput]) -> list[float]:
    return [math.nan] * len(candidates)


def too_few(prompt: str | None, candidates: Sequence[CompletionOutput]) -> list[float]:
    return [1.0]


@pytest.mark.parametrize(
    "scorer",
    [nan, too_few, lambda prompt, found: None, lambda prompt, found: ["high"] * 2, Verifier(lambda p, t: None)],
)
def test_scores_that_are_none(scorer: Scorer) -> None:
    with pytest.raises(InvalidRequest) as error:
        found(best_of(samples(2), scorer))
    assert error.value.code == "invalid_score"


@pytest.mark.parametrize("extract", ["(", 5])
def test_an_extract_that_cannot_be_used(extract: Any) -> None:
    with pytest.raises(InvalidRequest, match="a function of a text, or a regular expression") as error:
        Majority(extract)
    assert error.value.code == "invalid_parameter"


def test_candidates_end_at_stop_strings() -> None:
    request = samples(8, max_tokens=30, ignore_eos=True, stop="[INST]", skip_special_tokens=False)  # token 3
    service = Virtual(setup())
    outcome = found(best_of(request, Majority(r"[^<>|]+")), service, toytext.byte_level())
    for candidate in outcome.candidates:
        assert "[INST]" not in candidate.text
        assert (candidate.token_ids[-1] == 3) == (candidate.stop_reason == "[INST]")
    stopped = [c.token_ids[-1] == 3 for c in outcome.candidates]
    assert any(stopped)
    assert outcome.num_tokens == sum(len(c.token_ids) for c in outcome.candidates) < 8 * 30
    # The engine hears of each at once: it draws at most a token more.
    assert service.status().counters.generated_tokens <= outcome.num_tokens + sum(stopped)


# -- the run -----------------------------------------------------------------------------------------------------------


def test_a_failed_request_ends_its_search_and_no_other() -> None:
    service = Virtual(setup(), bad_row=lambda plan, index: plan.number == 4 and index == 1)
    run = SearchRun(service, beams(WIDE), lambda update: run.hear(update))
    run.start()
    with pytest.raises(PenstockError) as error:
        service.run()
    assert error.value.code == "numerical_error"
    service.run()
    assert service.status().running == service.status().waiting == 0
    assert not run.done
    assert found(beams(WIDE, "again"), service) == found(beams(WIDE))


def test_an_aborted_request_ends_its_search() -> None:
    service = Virtual(setup())
    run = SearchRun(service, best_of(samples(3, max_tokens=40, ignore_eos=True)), lambda update: run.hear(update))
    run.start()
    service.abort("s", 1)
    with pytest.raises(PenstockError) as error:
        service.run()
    assert error.value.code == "search_aborted"
    service.run()
    assert service.status().running == 0
    assert service.status().counters.generated_tokens < 10  # the other samples were ended too


def test_a_cancelled_search_leaves_nothing_behind() -> None:
    service = Virtual(setup())
    run = SearchRun(service, beams(WIDE), lambda update: run.hear(update))
    run.start()
    for step in range(3):
        service.engine.launch(float(step))
        service.engine.land()
    run.cancel()
    service.run()
    assert not run.done and service.status().running == 0
    assert len(service.submitted) == 1 + 3 * 5


def test_a_submission_that_is_refused_ends_the_search() -> None:
    service = Virtual(setup())
    request = replace(samples(2), tokens=(VOCAB,))
    run = SearchRun(service, best_of(request), lambda update: run.hear(update))
    run.start()
    with pytest.raises(InvalidRequest) as error:
        service.run()
    assert error.value.code == "token_out_of_range"
