"""POST /v1/responses: OpenAI's Responses API. Whole answers and streams come out of the same events."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from copy import deepcopy
from typing import Annotated, Any, ClassVar, Literal, TypedDict

from msgspec import Meta

from penstock.serving.context import Context
from penstock.serving.dialogue import Dialogue, template_variables
from penstock.serving.errors import HTTPError, invalid, unsupported
from penstock.serving.limits import MAX_TOOLS
from penstock.serving.logprobs import chat_logprobs
from penstock.serving.response_inputs import fitting, resolved
from penstock.serving.response_items import (
    ResponseObject,
    as_items,
    format_from,
    messages_from,
)
from penstock.serving.response_store import Stored
from penstock.serving.response_tools import InputText, choice_from, custom_names, tools_from
from penstock.serving.schemas import GenerationRequest, Harmless, ModelRequest, Name, TokenLogprob
from penstock.serving.tools import Offer, offer_of
from penstock.spec.ranges import MAX_ID
from penstock.text.parsers import Arguments, CallDropped, CallEnd, CallStart, Content, Event, Reasoning

Item = dict[str, Any]

LOGPROBS = "message.output_text.logprobs"
_OF_OTHERS = (
    "file_search_call.results web_search_call.results web_search_call.action.sources message.input_image.image_url "
    "computer_call_output.output.image_url code_interpreter_call.outputs reasoning.encrypted_content"
).split()
"""What may be included of items that no answer has here."""


class ResponsesRequest(GenerationRequest, kw_only=True):
    """POST /v1/responses"""

    HARMLESS: ClassVar[Harmless] = {
        "background": (False,),
        "conversation": (),
        "max_tool_calls": (),
        "prompt": (),
    }

    input: str | list[Item]
    instructions: str | None = None
    previous_response_id: Name | None = None
    store: bool | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=MAX_ID)] | None = None
    tools: Annotated[list[Item], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | Item | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Item | None = None
    text: Item | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None

    def check(self) -> None:
        GenerationRequest.check(self)
        if self.n not in (None, 1) or self.response_format is not None:
            param = "n" if self.response_format is None else "response_format"
            why = "a response has one answer" if param == "n" else "text.format says it here"
            raise HTTPError("invalid_parameter", f"{param} cannot be used", why=why, param=param)
        if not {LOGPROBS, *_OF_OTHERS}.issuperset(self.include or ()):
            raise unsupported("include")
        if self.top_logprobs and self.logprobs is None:
            raise invalid("top_logprobs", f"it needs {LOGPROBS} in include")

    @property
    def logprobs(self) -> int | None:
        """So many of the likeliest tokens are told beside each; None if nothing is."""
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None


class InputTokensRequest(ModelRequest, kw_only=True):
    """POST /v1/responses/input_tokens"""

    HARMLESS: ClassVar[Harmless] = {"conversation": ()}

    input: str | list[Item] | None = None
    instructions: str | None = None
    previous_response_id: Name | None = None
    tools: Annotated[list[Item], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | Item | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Item | None = None
    text: Item | None = None
    truncation: Literal["auto", "disabled"] | None = None


class InputTokens(TypedDict):
    object: Literal["response.input_tokens"]
    input_tokens: int


async def input_tokens(request: InputTokensRequest, context: Context) -> InputTokens:
    """Raises HTTPError and InvalidRequest."""
    fields = {name: getattr(request, name) for name in request.__struct_fields__}
    task = await ResponseTask.prepare(ResponsesRequest(**fields | {"input": request.input or []}), context)
    prompt = task.dialogue.generation.prompts[0]["prompt_token_ids"]
    return {"object": "response.input_tokens", "input_tokens": len(prompt)}


def _offer(request: ResponsesRequest) -> Offer:
    return offer_of(tools_from(request.tools), choice_from(request.tool_choice), request.parallel_tool_calls)


class ResponseTask:
    """One request: its conversation rendered and tokenized, ready to be answered whole or in events."""

    def __init__(
        self, request: ResponsesRequest, context: Context, dialogue: Dialogue, before: list[Item], given: list[Item]
    ) -> None:
        self.request, self.context, self.dialogue = request, context, dialogue
        self._before, self._given = before, given
        self._output: list[Item] = []
        self._logprobs: list[TokenLogprob] = []  # of tokens whose text is to come
        self._custom, self._input = custom_names(request.tools), InputText()
        self._status = "in_progress"
        self._sequence = -1

    @classmethod
    async def prepare(cls, request: ResponsesRequest, context: Context) -> ResponseTask:
        """Raises HTTPError and InvalidRequest before anything is computed."""
        engine, previous = context.llm.engine, request.previous_response_id
        before = context.responses.get(previous, "previous_response_id").items if previous is not None else []
        given = resolved(as_items(request.input), context.responses)
        request.response_format = format_from(request.text)
        if request.max_output_tokens is not None:
            request.max_tokens = request.max_output_tokens
        effort = (request.reasoning or {}).get("effort")
        variables = template_variables(engine.chat, None, effort, "reasoning.effort")
        offer = await asyncio.to_thread(_offer, request)
        messages = await asyncio.to_thread(messages_from, [*before, *given], request.instructions)
        if request.truncation == "auto":

            async def count(some: list[dict[str, Any]]) -> int:
                prompt = await context.llm.tokenize_chat(
                    some, tools=offer.told, add_generation_prompt=True, **variables
                )
                return len(prompt["prompt_token_ids"])

            longest = engine.setup.limits.max_model_len
            messages = await fitting(messages, count, longest - min(request.max_tokens or 1, longest // 2))
        dialogue = await Dialogue.prepare(
            context,
            f"resp_{uuid.uuid4().hex}",
            messages,
            request.params(
                {"max_tokens": None, **engine.recommended}, max_tokens=request.max_tokens, logprobs=request.logprobs
            ),
            offer,
            priority=request.priority or 0,
            variables=variables,
        )
        return cls(request, context, dialogue, before, given)

    async def whole(self) -> Item:
        async with aclosing(self.chunks()) as events:
            async for event in events:
                last = event
        response: Item = last["response"]
        return response

    async def chunks(self) -> AsyncGenerator[Item, None]:
        reason: str | None = None
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
        if self.request.store is not False:
            stored = Stored(response, self._before, self._given)
            self.context.responses.keep(stored, await asyncio.to_thread(stored.size))
        yield self._event(f"response.{self._status}", response=response)

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
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_tokens,
            "metadata": request.metadata or {},
            "model": generation.context.name,
            "output": list(self._output),
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "service_tier": request.tier,
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
