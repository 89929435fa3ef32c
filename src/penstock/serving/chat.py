"""POST /v1/chat/completions"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from penstock.serving.context import Context, Generation
from penstock.serving.errors import unsupported
from penstock.serving.logprobs import chat_logprobs
from penstock.serving.schemas import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    Usage,
)
from penstock.text import Delta


class ChatTask:
    """One request: its conversation rendered and tokenized, ready to be answered whole or in chunks."""

    def __init__(self, request: ChatRequest, generation: Generation) -> None:
        self.request, self.generation = request, generation

    @classmethod
    async def prepare(cls, request: ChatRequest, context: Context) -> ChatTask:
        """Raises HTTPError and InvalidRequest before anything is computed."""
        params = request.sampling_params(context.llm.engine.recommended)
        await context.llm.compile(params)
        prompt = await context.llm.tokenize_chat(messages_of(request))
        identifier = f"chatcmpl-{uuid.uuid4().hex}"
        return cls(request, Generation(context, identifier, [prompt], params, request.priority or 0))

    async def whole(self) -> ChatCompletion:
        choices: dict[int, ChatChoice] = {}
        async with aclosing(self.generation.deltas()) as news:
            async for index, delta in news:
                logprobs = self._logprobs(delta)
                message = AssistantMessage(delta.text)
                new = ChatChoice(index, message, logprobs, delta.finish_reason, delta.stop_reason)
                if (choice := choices.setdefault(index, new)) is not new:
                    choice.message.content += delta.text
                    choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
                    if choice.logprobs is not None and logprobs is not None:
                        choice.logprobs.content += logprobs.content
        ordered = [choices[index] for index in sorted(choices)]
        return self._completion("chat.completion", ordered, self.generation.usage())

    async def chunks(self) -> AsyncGenerator[object, None]:
        """The role first; then text; the reason it ended comes with an empty delta."""
        started: set[int] = set()
        async with aclosing(self.generation.deltas()) as news:
            async for index, delta in news:
                if index not in started:
                    started.add(index)
                    yield self._chunk(ChatChunkChoice(index, ChatDelta(role="assistant", content=""), None, None))
                if delta.text or delta.logprobs:
                    logprobs = self._logprobs(delta)
                    yield self._chunk(ChatChunkChoice(index, ChatDelta(content=delta.text), logprobs, None))
                if delta.finish_reason is not None:
                    ended = ChatChunkChoice(index, ChatDelta(), None, delta.finish_reason, delta.stop_reason)
                    yield self._chunk(ended)
        if self.request.usage_wanted():
            yield self._completion("chat.completion.chunk", [], self.generation.usage())

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        tokenizer = self.generation.context.llm.engine.tokenizer
        return chat_logprobs(delta, tokenizer, self.request.top_logprobs or 0) if self.request.logprobs else None

    def _chunk(self, choice: ChatChunkChoice) -> ChatCompletion:
        usage = (None,) if self.request.usage_wanted() else ()
        return self._completion("chat.completion.chunk", [choice], *usage)

    def _completion(
        self, kind: str, choices: list[ChatChoice] | list[ChatChunkChoice], *usage: Usage | None
    ) -> ChatCompletion:
        generation = self.generation
        return ChatCompletion(generation.id, kind, generation.created, generation.context.name, choices, *usage)


def messages_of(request: ChatRequest) -> list[dict[str, str]]:
    """Messages as templates read them: text parts joined by newlines, absent fields left out."""
    return [_plain(message, f"messages[{i}]") for i, message in enumerate(request.messages)]


def _plain(message: ChatMessage, place: str) -> dict[str, str]:
    if message.tool_calls:
        raise unsupported(f"{place}.tool_calls")
    content = message.content
    if isinstance(content, list):
        for i, part in enumerate(content):
            if part.type != "text" or part.text is None:
                raise unsupported(
                    f"{place}.content[{i}].type", what="Only text parts of a message are supported by this server"
                )
        content = "\n".join(part.text or "" for part in content)
    plain = {"role": message.role, "content": content or ""}
    return plain | {"name": message.name} if message.name is not None else plain
