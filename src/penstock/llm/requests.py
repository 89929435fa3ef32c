"""A request from prompt to text, whoever waits for it: checked, tokenized, submitted, and its updates made readable."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, cast

from penstock.assemble import Assembled
from penstock.base import InvalidRequest, PenstockError
from penstock.core.admission import check_prompt
from penstock.core.service import Submission, Task, Update
from penstock.llm.prompts import Message, Prompt, Prompts, TokensPrompt
from penstock.spec import Logprob, RequestMetrics, RequestOutput, SamplingParams
from penstock.spec.rule_places import rule_places, unknown_rule
from penstock.spec.sampling import MAX_LOGPROBS
from penstock.text import (
    ChatTemplate,
    Completion,
    Delta,
    Tokenizer,
    prompt_logprob_entries,
    with_rule_ids,
    with_thinking_ids,
)


class Job:
    """One prompt and what has come of it."""

    def __init__(
        self, submission: Submission, prompt: str | None, tokenizer: Tokenizer, *, held: object = None
    ) -> None:
        self.submission = submission
        self.prompt = prompt
        self._held = held  # its grammar, so that the engine finds it compiled
        self.error: PenstockError | None = None
        params, tokens = submission.params, submission.tokens
        self._completions = [Completion(i, params, tokenizer, tokens) for i in range(params.n)]
        self._running = params.n
        self._metrics = RequestMetrics(arrival_time=time.monotonic())
        self._cached_tokens = 0
        self._tokenizer = tokenizer if params.detokenize else None
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None
        self._prompt_logprobs = None if params.prompt_logprobs is None else [None]

    @property
    def finished(self) -> bool:
        return all(completion.finished for completion in self._completions)

    @property
    def num_tokens(self) -> int:
        return sum(completion.num_tokens for completion in self._completions)

    @property
    def complete(self) -> bool:
        """The engine has said its last word on every sample."""
        return self._running == 0

    def apply(self, update: Update) -> Delta | None:
        """Takes in the engine's news; None if the sample was over already, by a stop string.

        A sample that failed ends with finish_reason "error", and ``error`` is set.
        """
        self._running -= update.finish_reason is not None
        of_prompt: list[dict[int, Logprob]] = []
        if update.prompt_logprobs and self._prompt_logprobs is not None:
            told = len(self._prompt_logprobs)
            tokens = self.submission.tokens[told : told + len(update.prompt_logprobs)]
            of_prompt = prompt_logprob_entries(tokens, update.prompt_logprobs, self._tokenizer)
            self._prompt_logprobs += of_prompt
        completion = self._completions[update.sample]
        if completion.finished:
            return None
        now = time.monotonic()
        if update.tokens and self._metrics.first_token_time is None:
            self._metrics.first_token_time = now
        self._cached_tokens = max(self._cached_tokens, update.cached_tokens)
        self.error = self.error or update.error
        delta = completion.extend(update.tokens, update.logprobs, update.finish_reason, update.stop_reason)
        delta.num_cached_tokens = self._cached_tokens
        delta.timing = update.timing
        delta.prompt_logprobs = of_prompt
        if self.finished and self._metrics.finished_time is None:
            self._metrics.finished_time = now
        return delta

    def output(self) -> RequestOutput:
        return RequestOutput(
            request_id=self.submission.id,
            prompt=self.prompt,
            prompt_token_ids=list(self.submission.tokens),
            outputs=[completion.output() for completion in self._completions],
            finished=self.finished,
            num_cached_tokens=self._cached_tokens,
            metrics=replace(self._metrics),
            prompt_logprobs=None if self._prompt_logprobs is None else self._prompt_logprobs.copy(),
        )


class Requests:
    """Checks, tokenizes and names the requests of one engine.

    Args:
        tenant: whose they are; cached prefixes are shared within one.
        next_seed, next_id: for requests that bring none of their own. Where callers may bring ids, a new one must be
            such that no caller has chosen it; by default they are numbers.
    """

    def __init__(
        self,
        engine: Assembled,
        next_seed: Callable[[], int],
        next_id: Callable[[], str] | None = None,
        tenant: str = "",
    ) -> None:
        self.engine = engine
        self.tenant = tenant
        self._next_seed, self._next_id = next_seed, next_id or map(str, count()).__next__
        self._longest = cast(int, engine.config.max_model_len)  # filled in by assemble.resolve
        self.prompts = Prompts(engine, self._longest)

    def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True, parse_special: bool = True) -> TokensPrompt:
        """As ``Prompts.tokenize``."""
        return self.prompts.tokenize(prompt, add_special_tokens=add_special_tokens, parse_special=parse_special)

    def tokenize_chat(
        self, messages: Sequence[Message], template: ChatTemplate | None = None, **options: Any
    ) -> TokensPrompt:
        """As ``Prompts.chat``."""
        return self.prompts.chat(messages, template, **options)

    def default_params(self) -> SamplingParams:
        """Those of a request that brings none."""
        return SamplingParams(**self.engine.recommended)

    def job(
        self, prompt: TokensPrompt, params: SamplingParams, *, request_id: str | None = None, priority: int = 0
    ) -> Job:
        """Raises InvalidRequest: invalid_parameter, unsupported_parameter, cannot_generate, no_thinking_tags, what
        ``Grammars.compile`` raises for structured outputs, and what ``submission`` raises."""
        if not isinstance(params, SamplingParams):
            raise wrong_type("sampling_params", params, "SamplingParams")
        if not self.engine.generates:
            raise InvalidRequest(
                "cannot_generate",
                f"{self.engine.name} makes vectors of texts and cannot continue them",
                fix="use embed or score, or a model that generates",
            )
        params = self._resolved(with_thinking_ids(with_rule_ids(params, self.engine.tokenizer), self.engine.tokenizer))
        wanted = params.structured_outputs
        grammar = None if wanted is None else self.engine.grammars().compile(wanted)
        ids = self._truncated(prompt["prompt_token_ids"], params)
        submission = self.submission(ids, params, request_id=request_id, priority=priority)
        return Job(submission, prompt.get("prompt"), self.engine.tokenizer, held=grammar)

    def _resolved(self, params: SamplingParams) -> SamplingParams:
        """Raises InvalidRequest: invalid_parameter, unknown_logits_rule, unsupported_parameter."""
        if params.structured_outputs is not None and params.thinking_budget is not None:
            raise InvalidRequest(
                "unsupported_parameter",
                "thinking_budget together with structured_outputs is not in this build yet",
                why="the form would have to hold for the thoughts as well",
                fix="leave one of them out",
            )
        known = [name for name, _, _ in rule_places(self.engine.config.logits_rule)]
        for name in params.logits_rules or ():
            if name not in known:
                raise unknown_rule(name, known)
        size, asked = self.engine.vocabulary.size, dict[str, Any]()
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(params, name) == -1:
                if size > MAX_LOGPROBS:
                    why = f"the vocabulary has {size} tokens, and at most {MAX_LOGPROBS} are reported"
                    raise InvalidRequest("invalid_parameter", f"{name} = -1 cannot be used", why=why)
                asked[name] = size
        return replace(params, **asked) if asked else params

    def _truncated(self, ids: Sequence[int], params: SamplingParams) -> Sequence[int]:
        """The end of a prompt, as long as ``truncate_prompt_tokens`` says."""
        kept = params.truncate_prompt_tokens
        if kept is None:
            return ids
        return ids[-(kept if kept > 0 else max(1, self._longest - max(1, params.max_tokens or 1))) :]

    def submission(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        *,
        task: Task = "generate",
        request_id: str | None = None,
        priority: int = 0,
    ) -> Submission:
        """Raises InvalidRequest: empty_prompt, token_out_of_range, prompt_too_long."""
        tokens = ids if isinstance(ids, array) else tuple(ids)
        check_prompt(tokens, self.engine.setup.limits, self.engine.vocabulary, task)
        return Submission(
            id=request_id or self._next_id(),
            tokens=tokens,
            params=params,
            seed=(self._next_seed() if params.seed is None else params.seed) % 2**64,
            priority=priority,
            task=task,
            tenant=self.tenant,
        )

    def submit(self, job: Job, sink: Callable[[Job, Update], None]) -> None:
        """``sink`` is called from the engine's thread. Raises what ``Service.submit`` raises."""
        self.engine.service.submit(job.submission, lambda update: sink(job, update))

    def apply(self, job: Job, update: Update) -> Delta | None:
        """What a caller sees of an update; None for news of a sample that is over for its caller."""
        delta = job.apply(update)
        if delta is not None and delta.finish_reason and not update.finish_reason:  # a stop string
            self.engine.service.abort(job.submission.id, update.sample)
        return delta

    def end(self, job: Job) -> None:
        """The caller is done with it; what the engine still computes for it is aborted."""
        if not job.complete:
            self.engine.service.abort(job.submission.id)


def wrong_type(name: str, value: object, wanted: str) -> InvalidRequest:
    return InvalidRequest(
        "invalid_parameter", f"{name} = {repr(value)[:60]} cannot be used", why=f"it must be {wanted}"
    )


def refuse_prompt_logprobs(params: SamplingParams) -> None:
    """Raises InvalidRequest: unsupported_parameter, where the answer has no place for them."""
    if isinstance(params, SamplingParams) and params.prompt_logprobs is not None:
        what = "prompt_logprobs have no place in a search"
        raise InvalidRequest("unsupported_parameter", what, fix="ask for them with generate")
