"""What LLM and AsyncLLM share of a search, and how a script waits for several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from queue import SimpleQueue

from penstock.core.service import Update
from penstock.llm.prompts import TokensPrompt
from penstock.llm.requests import Requests, refuse_prompt_logprobs, wrong_type
from penstock.search import BeamSearchParams, Scorer, Search, SearchOutput, SearchRun, beam_search, best_of, step_params
from penstock.spec import SamplingParams
from penstock.text import Tokenizer


def beams_of(
    requests: Requests, prompt: TokensPrompt, params: BeamSearchParams, request_id: str | None = None, priority: int = 0
) -> Search:
    """A beam search whose candidates have their texts.

    Raises:
        InvalidRequest: as ``Requests.job`` and ``search.step_params``.
    """
    if not isinstance(params, BeamSearchParams):
        raise wrong_type("params", params, "BeamSearchParams")
    engine, vocabulary = requests.engine, requests.engine.vocabulary
    step = step_params(params, vocabulary.eos_ids, vocabulary.size)
    submission = requests.job(prompt, step, request_id=request_id, priority=priority).submission
    room = engine.setup.limits.max_model_len - len(submission.tokens)
    text = _text_of(prompt, engine.tokenizer)
    return _readable(beam_search(submission, params, vocabulary.eos_ids, room, text), engine.tokenizer)


def samples_of(
    requests: Requests,
    prompt: TokensPrompt,
    params: SamplingParams,
    scorer: Scorer,
    request_id: str | None = None,
    priority: int = 0,
) -> Search:
    """Best of ``params.n``. Raises InvalidRequest as ``Requests.job``; unsupported_parameter."""
    if not callable(scorer):
        raise wrong_type("by", scorer, "a function of a prompt and its candidates")
    refuse_prompt_logprobs(params)
    job = requests.job(prompt, params, request_id=request_id, priority=priority)
    return best_of(job.submission, scorer, _text_of(prompt, requests.engine.tokenizer))


def run_searches(requests: Requests, searches: Sequence[Search], limit: int | None = None) -> list[SearchOutput]:
    """Runs searches side by side, at most ``limit`` at a time, and waits for all. The first error ends them all.

    Raises:
        InvalidRequest: (invalid_parameter) the limit is no positive integer; what the searches raise.
    """
    if limit is not None and (type(limit) is not int or limit < 1):
        raise wrong_type("concurrency_limit", limit, "a positive integer")
    news: SimpleQueue[tuple[SearchRun, Update]] = SimpleQueue()

    def make(search: Search) -> SearchRun:
        engine = requests.engine
        run: SearchRun = SearchRun(engine.service, search, lambda update: news.put((run, update)), engine.tokenizer)
        return run

    runs = [make(search) for search in searches]
    waiting: Iterator[SearchRun] = iter(runs)
    try:
        for _, run in zip(range(limit or len(runs)), waiting, strict=False):
            run.start()
        while not all(run.done for run in runs):
            run, update = news.get()
            was_done = run.done
            run.hear(update)
            if run.done and not was_done and (following := next(waiting, None)):
                following.start()
    finally:
        for run in runs:
            run.cancel()
    return [run.outcome for run in runs if run.outcome is not None]


def _text_of(prompt: TokensPrompt, tokenizer: Tokenizer) -> str:
    text = prompt.get("prompt")
    return tokenizer.decode(prompt["prompt_token_ids"]) if text is None else text


def _readable(search: Search, tokenizer: Tokenizer) -> Search:
    """The same search; the candidates it returns get their texts."""
    outcome = yield from search
    for candidate in outcome.candidates:
        detokenizer = tokenizer.detokenizer(after=outcome.prompt_token_ids)
        candidate.text = "".join(map(detokenizer.feed, candidate.token_ids)) + detokenizer.flush()
    return outcome
