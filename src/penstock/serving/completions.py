"""POST /v1/completions"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from penstock.llm import TokensPrompt
from penstock.serving.context import Context, Generation
from penstock.serving.errors import unsupported
from penstock.serving.logprobs import completion_logprobs
from penstock.serving.schemas import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest, Usage
from penstock.text import Tokenizer


class CompletionTask:
    """One request: its prompts tokenized, ready to be answered whole or in chunks."""

    def __init__(self, request: CompletionRequest, generation: Generation) -> None:
        self.request, self.generation = request, generation
        prompts = generation.prompts if request.echo else ()
        self._echoed = [_shown(prompt, generation.context.llm.engine.tokenizer) for prompt in prompts]

    @classmethod
    async def prepare(cls, request: CompletionRequest, context: Context) -> CompletionTask:
        """Raises HTTPError and InvalidRequest before anything is computed."""
        params = request.sampling_params(context.llm.engine.recommended)
        await context.llm.compile(params)
        if request.echo and request.logprobs is not None:
            raise unsupported("echo", what="echo together with logprobs is not supported by this server")
        kept = 0
        if request.best_of is not None and request.best_of > params.n:
            kept, params = params.n, replace(params, n=request.best_of)
        special = request.add_special_tokens is not False
        prompts = []
        for prompt in request.prompts():
            prompts.append(await context.llm.tokenize(prompt, add_special_tokens=special))
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
        return self._completion([choices[index] for index in sorted(choices)], self.generation.usage())

    async def chunks(self) -> AsyncGenerator[object, None]:
        wanted = self.request.usage_wanted()
        async with aclosing(self._choices()) as pieces:
            async for piece in pieces:
                yield self._completion([piece], None) if wanted else self._completion([piece])
        if wanted:
            yield self._completion([], self.generation.usage())

    async def _choices(self) -> AsyncGenerator[CompletionChoice, None]:
        tokenizer = self.generation.context.llm.engine.tokenizer
        offsets: dict[int, int] = {}
        async with aclosing(self.generation.deltas()) as news:
            async for index, delta in news:
                text = delta.text
                if index not in offsets:
                    offsets[index] = 0
                    if self._echoed:
                        text = self._echoed[index // self.generation.choices] + text
                logprobs = None
                if delta.logprobs is not None:
                    logprobs = completion_logprobs(delta, tokenizer, offsets[index])
                    offsets[index] += sum(map(len, logprobs.tokens))
                if text or logprobs or delta.finish_reason:
                    yield CompletionChoice(index, text, logprobs, delta.finish_reason, delta.stop_reason)

    def _completion(self, choices: list[CompletionChoice], *usage: Usage | None) -> Completion:
        generation = self.generation
        return Completion(
            generation.id, "text_completion", generation.created, generation.context.name, choices, *usage
        )


def _shown(prompt: TokensPrompt, tokenizer: Tokenizer) -> str:
    text = prompt.get("prompt")
    return tokenizer.decode(prompt["prompt_token_ids"]) if text is None else text


def _join(all_of: CompletionLogprobs, more: CompletionLogprobs) -> None:
    all_of.text_offset += more.text_offset
    all_of.token_logprobs += more.token_logprobs
    all_of.tokens += more.tokens
    all_of.top_logprobs += more.top_logprobs
