"""POST /v1/responses: OpenAI's Responses API. Whole answers and streams come out of the same events."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from copy import deepcopy
from typing import Any

from penstock.serving.context import Context
from penstock.serving.custom_tools import InputText
from penstock.serving.dialogue import Dialogue
from penstock.serving.kept import Turn
from penstock.serving.logprobs import chat_logprobs
from penstock.serving.response_inputs import Prompted, prompted
from penstock.serving.response_items import Item, ResponseObject, format_from
from penstock.serving.response_schemas import InputTokens, InputTokensRequest, ResponsesRequest, conversation_of
from penstock.serving.response_table import Stored
from penstock.serving.response_tools import custom_names
from penstock.serving.schemas import TokenLogprob
from penstock.text.parsers import Arguments, CallDropped, CallEnd, CallStart, Content, Event, Reasoning


async def input_tokens(request: InputTokensRequest, context: Context) -> InputTokens:
    """Raises as ``prompted``."""
    format_from(request.text)
    asked = await prompted(request, context)
    prompt = await context.llm.tokenize_chat(
        asked.messages, tools=asked.offer.told, add_generation_prompt=True, **asked.variables
    )
    return {"object": "response.input_tokens", "input_tokens": len(prompt["prompt_token_ids"])}


class ResponseTask:
    """One request: its conversation rendered and tokenized, ready to be answered whole or in events."""

    def __init__(
        self, request: ResponsesRequest, context: Context, asked: Prompted, dialogue: Dialogue, turn: Turn | None
    ) -> None:
        self.request, self.context, self.dialogue = request, context, dialogue
        self._asked, self._turn = asked, turn
        self._conversation = conversation_of(request)
        self._output: list[Item] = []
        self._logprobs: list[TokenLogprob] = []  # of tokens whose text is to come
        self._custom, self._input = custom_names(request.tools), InputText()
        self._status = "in_progress"
        self._sequence = -1

    @classmethod
    async def prepare(cls, request: ResponsesRequest, context: Context) -> ResponseTask:
        """Raises HTTPError and InvalidRequest before anything is computed."""
        conversation = conversation_of(request)
        turn = None if conversation is None else context.kept.turn(conversation)
        try:
            return await cls._prepared(request, context, turn)
        except BaseException:
            if turn is not None:
                turn.end()
            raise

    @classmethod
    async def _prepared(cls, request: ResponsesRequest, context: Context, turn: Turn | None) -> ResponseTask:
        if request.max_output_tokens is not None:
            request.max_tokens = request.max_output_tokens
        asked = await prompted(request, context, request.max_tokens or 1)
        dialogue = await Dialogue.prepare(
            context,
            f"resp_{uuid.uuid4().hex}",
            asked.messages,
            request.params(
                {"max_tokens": None, **context.llm.engine.recommended},
                max_tokens=request.max_tokens,
                logprobs=request.logprobs,
            ),
            asked.offer,
            priority=request.priority or 0,
            variables=asked.variables,
        )
        return cls(request, context, asked, dialogue, turn)

    async def whole(self) -> Item:
        async with aclosing(self.chunks()) as events:
            async for event in events:
                last = event
        response: Item = last["response"]
        return response

    async def chunks(self) -> AsyncGenerator[Item, None]:
        reason: str | None = None
        try:
            async with aclosing(self.dialogue.said()) as news:
                async for _, said in news:
                    if self._sequence < 0:  # what is refused is refused before anything is told
                        yield self._event("response.created", response=self._response())
                        yield self._event("response.in_progress", response=self._response())
                    if self.request.logprobs is not None and not said.thought:
                        tokenizer = self.context.llm.engine.tokenizer
                        self._logprobs += chat_logprobs(said.delta, tokenizer, self.request.logprobs).content
                    for event in said.events:
                        for told in self._tell(event):
                            yield told
                    reason = said.finish_reason
            self._status = "incomplete" if reason == "length" else "completed"
            for told in self._close():
                yield told
            response = self._response()
            await self._keep(response)
        finally:
            if self._turn is not None:
                self._turn.end()
        yield self._event(f"response.{self._status}", response=response)

    async def _keep(self, response: ResponseObject) -> None:
        """What cannot be kept is told all the same, and says so in ``store`` and ``conversation``.

        Its client has read most of it by now, and if there were an error in its place would have it computed again.
        """
        stored = Stored(response, self._asked.before, self._asked.given)
        if self._turn is not None and not await self._turn.add(stored):
            response["conversation"] = None
        if response["store"]:
            response["store"] = await self.context.kept.keep(stored)

    # -- events ------------------------------------------------------------------------------------------------------

    def _tell(self, event: Event) -> Iterator[Item]:
        match event:
            case Content(text):
                yield from self._open("message")
                yield self._more("output_text", text)
            case Reasoning(text):
                yield from self._open("reasoning")
                yield self._more("reasoning_text", text)
            case CallStart(_, identifier, name):
                yield from self._close()
                self._logprobs.clear()
                custom = name in self._custom
                self._input = InputText()
                item = {"type": "custom_tool_call" if custom else "function_call", "call_id": identifier, "name": name}
                yield self._add("ctc" if custom else "fc", item | {"input" if custom else "arguments": ""})
            case Arguments(_, text):
                self._logprobs.clear()
                yield from self._argue(self._input.feed(text) if "input" in self._output[-1] else text)
            case CallEnd():
                self._logprobs.clear()
                item = self._output[-1]
                if "input" in item:
                    yield from self._argue(self._input.finish())
                    yield self._at("response.custom_tool_call_input.done", input=item["input"])
                else:
                    done = "response.function_call_arguments.done"
                    yield self._at(done, arguments=item["arguments"], name=item["name"])
                yield from self._close()
            case CallDropped():  # its text follows as a message; in a stream it was announced, and stays
                if self.request.stream:
                    yield from self._close("incomplete")
                else:
                    self._output.pop()

    def _argue(self, text: str) -> Iterator[Item]:
        item = self._output[-1]
        kind, name = ("custom_tool_call", "input") if "input" in item else ("function_call", "arguments")
        if text:
            item[name] += text
            yield self._at(f"response.{kind}_{name}.delta", delta=text)

    def _open(self, kind: str) -> Iterator[Item]:
        """Goes on with an item that holds text, or begins one."""
        last = self._output[-1] if self._output else {}
        if last.get("type") == kind and last["status"] == "in_progress":
            return
        yield from self._close()
        item: Item = {"type": kind, "content": []}
        yield (
            self._add("msg", item | {"role": "assistant"})
            if kind == "message"
            else self._add("rs", item | {"summary": []})
        )
        part: Item = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        if kind == "reasoning":
            part = {"type": "reasoning_text", "text": ""}
        self._output[-1]["content"].append(deepcopy(part))
        yield self._at("response.content_part.added", content_index=0, part=part)

    def _more(self, kind: str, text: str) -> Item:
        part, rest = self._output[-1]["content"][0], dict[str, Any]()
        part["text"] += text
        if kind == "output_text":
            part["logprobs"] += self._logprobs
            rest["logprobs"], self._logprobs = self._logprobs, []
        return self._at(f"response.{kind}.delta", content_index=0, delta=text, **rest)

    def _close(self, status: str = "completed") -> Iterator[Item]:
        """Ends the item that is open, if one is."""
        if not self._output or self._output[-1]["status"] != "in_progress":
            return
        item = self._output[-1]
        item["status"] = "incomplete" if self._status == "incomplete" else status
        if "content" in item:
            part = item["content"][0]
            rest = {"logprobs": part["logprobs"]} if part["type"] == "output_text" else {}
            yield self._at(f"response.{part['type']}.done", content_index=0, text=part["text"], **rest)
            yield self._at("response.content_part.done", content_index=0, part=dict(part))
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=dict(item))

    def _add(self, prefix: str, item: Item) -> Item:
        own = self.dialogue.generation.id.partition("_")[2]
        self._output.append({"id": f"{prefix}_{own}{len(self._output)}", **item, "status": "in_progress"})
        shown = {name: list(value) if isinstance(value, list) else value for name, value in self._output[-1].items()}
        return self._event("response.output_item.added", output_index=len(self._output) - 1, item=shown)

    def _at(self, kind: str, **fields: Any) -> Item:
        return self._event(kind, item_id=self._output[-1]["id"], output_index=len(self._output) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> Item:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence, **fields}

    def _response(self) -> ResponseObject:
        request, generation = self.request, self.dialogue.generation
        usage = self.dialogue.usage()
        told = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": generation.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self.dialogue.reasoning_tokens},
            "total_tokens": usage.total_tokens,
        }
        return {
            "id": generation.id,
            "object": "response",
            "created_at": generation.created,
            "status": self._status,
            "conversation": None if self._conversation is None else {"id": self._conversation},
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_tokens,
            "metadata": request.metadata or {},
            "model": generation.context.name,
            "output": list(self._output),
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "service_tier": generation.context.tier(request),
            "reasoning": {"effort": (request.reasoning or {}).get("effort"), "summary": None},
            "store": request.store is not False,
            "temperature": generation.params.temperature,
            "text": request.text or {"format": {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_p": generation.params.top_p,
            "truncation": request.truncation or "disabled",
            "usage": None if self._status == "in_progress" else told,
            "user": request.user,
        }
