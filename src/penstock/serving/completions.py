"""POST /v1/completions"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from msgspec import UNSET, UnsetType

from penstock.llm import TokensPrompt
from penstock.serving.context import Context, Generation
from penstock.serving.edge import off_loop
from penstock.serving.errors import HTTPError, unsupported
from penstock.serving.logprobs import completion_logprobs, prompt_logprobs
from penstock.serving.schemas import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest, Usage
from penstock.spec import Logprob
from penstock.text import Delta, Tokenizer, gap_tokens


class CompletionTask:
    """One request: its prompts tokenized, ready to be answered whole or in chunks."""

    def __init__(self, request: CompletionRequest, generation: Generation) -> None:
        self.request, self.generation = request, generation
        prompts = generation.prompts if request.echo else ()
        self._echoed = [_shown(prompt, generation.context.llm.engine.tokenizer) for prompt in prompts]
        self._reported: list[list[dict[int, Logprob]]] = [[] for _ in prompts]

    @classmethod
    async def prepare(cls, request: CompletionRequest, context: Context) -> CompletionTask:
        """Raises HTTPError and InvalidRequest before anything is computed."""
        params = request.sampling_params(context.llm.engine.recommended)
        await context.own_llm.compile(params)
        kept = 0
        if request.best_of is not None and request.best_of > params.n:
            kept, params = params.n, replace(params, n=request.best_of)
        special = request.add_special_tokens is not False
        prompts = []
        for prompt in request.prompts():
            if not request.suffix:
                prompts.append(await context.llm.tokenize(prompt, add_special_tokens=special))
            elif not isinstance(prompt, str) or request.reports:
                raise unsupported("suffix", what="suffix goes with prompts of text, and not with echo and logprobs")
            else:
                prompts.append(await with_gap(prompt, request.suffix, context, special=special))
            await asyncio.sleep(0)  # a short prompt is tokenized here and now: let others have a turn
        identifier = f"cmpl-{uuid.uuid4().hex}"
        return cls(request, Generation(context, identifier, prompts, params, request.priority or 0, kept))

    async def whole(self) -> Completion:
        choices: dict[int, CompletionChoice] = {}
        async with aclosing(self._choices()) as pieces:
            async for piece in pieces:
                if (choice := choices.setdefault(piece.index, piece)) is not piece:
                    choice.text += piece.text
                    choice.finish_reason, choice.stop_reason = piece.finish_reason, piece.stop_reason
                    if choice.logprobs is not None and piece.logprobs is not None:
                        _join(choice.logprobs, piece.logprobs)
        return self._completion([choices[index] for index in sorted(choices)], self._usage())

    async def chunks(self) -> AsyncGenerator[object, None]:
        wanted = self.request.usage_wanted()
        async with aclosing(self._choices()) as pieces:
            async for piece in pieces:
                yield self._completion([piece], None if wanted else UNSET)
        if wanted:
            yield self._completion([], self._usage())

    def _usage(self) -> Usage:
        usage = self.generation.usage()
        if self.request.silent:
            usage.total_tokens, usage.completion_tokens = usage.prompt_tokens, 0
        return usage

    async def _choices(self) -> AsyncGenerator[CompletionChoice, None]:
        tokenizer = self.generation.context.llm.engine.tokenizer
        offsets: dict[int, int] = {}
        async with aclosing(self._news()) as news:
            async for index, delta in news:
                first, before = index not in offsets, self._before(index)
                offset = offsets.setdefault(index, len(before))
                text, logprobs = delta.text, None
                if delta.logprobs is not None:
                    logprobs = completion_logprobs(delta, tokenizer, offset)
                    offsets[index] += sum(map(len, logprobs.tokens))
                if first:
                    text = before + text
                    if logprobs is not None and self.request.echo:
                        logprobs = _join(await self._of_prompt(index), logprobs)
                if text or logprobs or delta.finish_reason:
                    yield CompletionChoice(index, text, logprobs, delta.finish_reason, delta.stop_reason)

    async def _news(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Deltas, those of a prompt whose log-probabilities are asked for only once these are known."""
        held: dict[int, list[tuple[int, Delta]]] = {}
        async with aclosing(self.generation.deltas()) as news:
            async for index, delta in news:
                if self.request.silent:
                    delta.text, delta.token_ids, delta.stop_reason = "", [], None
                    delta.logprobs = None if delta.logprobs is None else []
                    delta.finish_reason = delta.finish_reason and "length"
                prompt = index // self.generation.choices
                waiting = held.setdefault(prompt, [])
                waiting.append((index, delta))
                if self.request.reports:
                    self._reported[prompt] += delta.prompt_logprobs
                    if len(self._reported[prompt]) + 1 < len(self.generation.prompts[prompt]["prompt_token_ids"]):
                        continue
                for ready in waiting:
                    yield ready
                waiting.clear()

    def _before(self, index: int) -> str:
        """What is shown of the prompt before a choice."""
        return self._echoed[index // self.generation.choices] if self._echoed else ""

    async def _of_prompt(self, index: int) -> CompletionLogprobs:
        prompt = index // self.generation.choices
        tokens = self.generation.prompts[prompt]["prompt_token_ids"]
        tokenizer = self.generation.context.llm.engine.tokenizer
        told = partial(prompt_logprobs, tokens, self._reported[prompt], self._echoed[prompt], tokenizer)
        return await off_loop(64 * len(tokens), told)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        made, tier, kind = self.generation, self.generation.context.tier(self.request), "text_completion"
        return Completion(made.id, kind, made.created, made.context.name, choices, usage, tier, made.fingerprint)


def _shown(prompt: TokensPrompt, tokenizer: Tokenizer) -> str:
    text = prompt.get("prompt")
    return tokenizer.decode(prompt["prompt_token_ids"]) if text is None else text


async def with_gap(prompt: str, suffix: str, context: Context, *, special: bool = True) -> TokensPrompt:
    """What comes before a gap, and what after it, as the model has learned to read them. Special tokens written in them
    are ordinary text.

    Args:
        special: with what the tokenizer puts around a text.

    Raises:
        HTTPError: (unsupported_parameter) it has not learned that.
    """
    llm = context.llm
    if (gap := gap_tokens(llm.engine.tokenizer)) is None:
        raise HTTPError(
            "unsupported_parameter",
            "suffix is not supported by this model",
            why="its tokenizer has no tokens for a gap that is to be filled in",
            fix="leave it out, or use a model that was trained for it, such as Qwen2.5-Coder",
            param="suffix",
        )
    plain = {"add_special_tokens": False, "parse_special": False}
    before, after = [(await llm.tokenize(text, **plain))["prompt_token_ids"] for text in (prompt, suffix)]
    start = llm.engine.tokenizer.encode("", add_special_tokens=special)
    return TokensPrompt(prompt_token_ids=[*start, *gap.around(before, after)], prompt=prompt)


def _join(all_of: CompletionLogprobs, more: CompletionLogprobs) -> CompletionLogprobs:
    all_of.text_offset += more.text_offset
    all_of.token_logprobs += more.token_logprobs
    all_of.tokens += more.tokens
    all_of.top_logprobs += more.top_logprobs
    return all_of
