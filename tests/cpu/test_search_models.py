"""Beam search against transformers, and the searches of LLM and AsyncLLM."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch

from oracle import Reference, build_reference
from penstock import LLM, AsyncLLM, BeamSearchParams, Majority, SamplingParams, SearchOutput, Verifier
from penstock.assemble import load_executor
from penstock.base import InvalidRequest
from penstock.core.service import Submission, Update
from penstock.runtime.service import LocalService
from penstock.search import SearchRun, beam_search, step_params
from penstock.spec import EngineConfig, Vocabulary

WIDTHS_AND_PENALTIES = [(1, 1.0), (2, 0.0), (3, 1.0), (4, -1.0), (5, 2.0), (8, 0.5)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return build_reference("llama", random.Random(11), tmp_path_factory.mktemp("beams"))


@pytest.fixture(scope="module")
def service(reference: Reference) -> Iterator[LocalService]:
    config = EngineConfig(
        device="cpu", backend="ref", dtype="float32", max_model_len=96, num_threads=1, kv_memory="64M", block_size=8
    )
    loaded = load_executor(reference.folder, config, Vocabulary(size=reference.spec.vocab_size))
    service = LocalService(loaded.setup.scheduler(), loaded.executor)
    yield service
    service.close()


def ours(
    service: LocalService, prompt: list[int], params: BeamSearchParams, eos: list[int], vocab: int
) -> SearchOutput:
    request = Submission(id="b", tokens=tuple(prompt), params=step_params(params, eos, vocab), seed=0)
    news: SimpleQueue[Update] = SimpleQueue()
    run = SearchRun(service, beam_search(request, params, eos, 64), news.put)
    run.start()
    while run.outcome is None:
        run.hear(news.get(timeout=60))
    return run.outcome


def theirs(
    reference: Reference, prompt: list[int], params: BeamSearchParams, eos: list[int]
) -> list[tuple[list[int], float]]:
    """(tokens up to the end, score), best first."""
    with torch.inference_mode():
        out = reference.model.generate(
            torch.tensor([prompt]),
            num_beams=params.beam_width,
            num_return_sequences=params.beam_width,
            max_new_tokens=params.max_tokens,
            length_penalty=params.length_penalty,
            early_stopping=False,
            do_sample=False,
            eos_token_id=eos or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=params.beam_width > 1,
        )
    rows = [row[len(prompt) :].tolist() for row in out.sequences]
    cut = [row[: next((i + 1 for i, t in enumerate(row) if t in eos), len(row))] for row in rows]
    scores = out.sequences_scores.tolist() if params.beam_width > 1 else [float("nan")]
    return list(zip(cut, scores, strict=True))


def compare(outcome: SearchOutput, expected: Sequence[tuple[list[int], float]]) -> int:
    """How many candidates ended before the last token was drawn."""
    assert [c.token_ids for c in outcome.candidates] == [tokens for tokens, _ in expected]
    for score, (_, their_score) in zip(outcome.scores, expected, strict=True):
        assert their_score != their_score or score == pytest.approx(their_score, rel=1e-4)
    return sum(c.finish_reason == "stop" for c in outcome.candidates)


@pytest.mark.parametrize(("width", "penalty"), WIDTHS_AND_PENALTIES)
def test_beams_are_those_of_transformers(
    reference: Reference, service: LocalService, width: int, penalty: float
) -> None:
    vocab, ended = reference.spec.vocab_size, 0
    params = BeamSearchParams(beam_width=width, max_tokens=10, length_penalty=penalty, include_stop_str_in_output=True)
    rng = random.Random(width)
    for prompt in (reference.tokens(rng, 5), reference.tokens(rng, 11)):
        free = ours(service, prompt, params, [], vocab)
        compare(free, theirs(reference, prompt, params, []))
        # One and two ends, of tokens that the beams are known to come by.
        seen = Counter(token for c in free.candidates for token in c.token_ids[2:8])
        for eos in ([seen.most_common()[0][0]], sorted(token for token, _ in seen.most_common()[-2:])):
            ended += compare(ours(service, prompt, params, eos, vocab), theirs(reference, prompt, params, eos))
    assert ended > 0


# -- the faces ---------------------------------------------------------------------------------------------------------

START = "Once upon a time"


@pytest.fixture(scope="module")
def llm(test_data: Path) -> Iterator[LLM]:
    model = str(test_data / "models" / "stories260k")
    with LLM(model, backend="ref", dtype="float32", kv_memory="16M", num_threads=1) as llm:
        yield llm


def test_llm_beam_search(llm: LLM) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=8)
    first, second = llm.beam_search([START, "The cat"], params)
    assert first.prompt == START and second.prompt == "The cat"
    for outcome in (first, second):
        assert len(outcome.sequences) == 3 and outcome.chosen == 0
        best = outcome.sequences[0]
        assert best.text == (outcome.prompt or "") + outcome.best.text
        assert llm.get_tokenizer().decode(best.tokens) == best.text
        assert all(next(iter(entry.values())).decoded_token for entry in best.logprobs)
    greedy = llm.generate(START, SamplingParams(temperature=0, max_tokens=8, logprobs=0))[0].outputs[0]
    assert first.scores[0] >= (greedy.cumulative_logprob or 0.0) / 8
    narrow = llm.beam_search(START, BeamSearchParams(beam_width=1, max_tokens=8))[0]
    assert narrow.best.token_ids == greedy.token_ids and narrow.best.text == greedy.text
    limited = llm.beam_search([START, "The cat", "A dog"], params, concurrency_limit=1)
    assert limited[:2] == [first, second]
    ids = llm.beam_search({"prompt_token_ids": first.prompt_token_ids}, params)[0]
    assert ids.candidates == first.candidates and ids.prompt == START
    with pytest.raises(InvalidRequest, match="BeamSearchParams"):
        llm.beam_search(START, SamplingParams())  # type: ignore[arg-type]
    for limit in (0, -1, 1.5):  # the last two waited for ever
        with pytest.raises(InvalidRequest, match="concurrency_limit"):
            llm.beam_search([START, "The cat"], params, concurrency_limit=limit)  # type: ignore[arg-type]


def test_llm_chooses_among_samples(llm: LLM) -> None:
    params = SamplingParams(n=6, max_tokens=6, seed=4, logprobs=0)
    plain = llm.generate(START, params)[0]
    by_logprob = llm.best_of(START, params)[0]
    assert by_logprob.candidates == plain.outputs
    assert by_logprob.best.cumulative_logprob == max(c.cumulative_logprob or 0.0 for c in plain.outputs)
    longest = llm.best_of(START, params, by=Verifier(lambda prompt, text: len(prompt + text)))[0]
    assert longest.scores == [float(len(START + c.text)) for c in plain.outputs]
    votes = llm.self_consistency([START], params, r"\w+")[0]
    assert votes == llm.best_of(START, params, by=Majority(r"\w+"))[0]
    assert max(votes.scores) == votes.scores[votes.chosen]
    with pytest.raises(InvalidRequest, match="by = None"):
        llm.best_of(START, params, by=None)  # type: ignore[arg-type]


def test_prompt_logprobs_are_refused_where_nobody_would_see_them(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="Ask for them with generate") as error:
        llm.best_of(START, SamplingParams(prompt_logprobs=1, max_tokens=2))
    assert error.value.code == "unsupported_parameter"


def test_prompt_logprobs_come_in_a_stream(llm: LLM) -> None:
    params = SamplingParams(prompt_logprobs=1, max_tokens=2, temperature=0, n=2)
    whole = llm.generate(START, params)[0].prompt_logprobs
    assert whole is not None
    streamed = [entry for delta in llm.stream(START, params) for entry in delta.prompt_logprobs]
    assert [None, *streamed] == whole and len(whole) > 3


def test_an_id_in_use_is_refused_and_goes_on(llm: LLM) -> None:
    online = AsyncLLM(llm.engine)
    wide, params = BeamSearchParams(beam_width=2, max_tokens=12), SamplingParams(n=2, max_tokens=40)

    async def twice() -> None:
        for ask in (
            lambda: online.beam_search(START, wide, "mine"),
            lambda: online.best_of(START, params, "mine"),
            lambda: online.embed("a b " * 100, request_id="mine"),
        ):
            first, second = await asyncio.gather(ask(), ask(), return_exceptions=True)
            assert not isinstance(first, BaseException)
            assert isinstance(second, InvalidRequest) and second.code == "duplicate_request_id"

    asyncio.run(twice())


def test_async_searches_are_the_same(test_data: Path, llm: LLM) -> None:
    engine = EngineConfig(
        model=str(test_data / "models" / "stories260k"), backend="ref", dtype="float32", kv_memory="16M", num_threads=1
    )
    beams, params = BeamSearchParams(beam_width=3, max_tokens=8), SamplingParams(n=4, max_tokens=6, seed=4)

    async def searches() -> tuple[SearchOutput, ...]:
        online = AsyncLLM(engine)
        try:
            with pytest.raises(TimeoutError):  # a search that nobody waits for any more leaves nothing behind
                wide = BeamSearchParams(beam_width=8, max_tokens=400, ignore_eos=True)
                await asyncio.wait_for(online.beam_search(START, wide), 0.05)
            return await asyncio.gather(
                online.beam_search(START, beams),
                online.best_of(START, params),
                online.self_consistency(START, params, r"\w+"),
            )
        finally:
            online.close()

    assert list(asyncio.run(searches())) == [
        *llm.beam_search(START, beams),
        *llm.best_of(START, params),
        *llm.self_consistency(START, params, r"\w+"),
    ]
