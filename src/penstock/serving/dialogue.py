"""A conversation to be gone on with: how chat, responses and messages ask the engine, and what they hear from it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from penstock.serving.context import Context, Generation
from penstock.serving.errors import HTTPError, invalid, unsupported
from penstock.serving.gate import current
from penstock.serving.limits import MAX_TEMPLATE_VARIABLE, MAX_TEMPLATE_VARIABLES
from penstock.serving.schemas import CompletionTokensDetails, Usage
from penstock.serving.tools import Offer, after_thoughts
from penstock.spec import SamplingParams
from penstock.text import ChatTemplate, Delta, thinking_tags
from penstock.text.parsers import CallEnd, Event, Parser

Message = Mapping[str, Any]

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")


@dataclass(frozen=True, slots=True)
class Said:
    """What is new of one choice.

    Attributes:
        finish_reason: as ``delta``'s, or "tool_calls".
        thought: its tokens count as thoughts.
    """

    delta: Delta
    events: list[Event]
    finish_reason: str | None
    thought: bool = False


@dataclass(slots=True, kw_only=True)
class Dialogue:
    """One conversation, rendered and tokenized.

    Attributes:
        opened: answers start within thoughts.
        reasoning_tokens: tokens of thoughts so far, their marks included.
    """

    generation: Generation
    offer: Offer
    opened: bool = False
    reasoning_tokens: int = 0
    _parsers: dict[int, Parser] = field(default_factory=dict)
    _called: set[int] = field(default_factory=set)

    @classmethod
    async def prepare(
        cls,
        context: Context,
        identifier: str,
        messages: Sequence[Message],
        params: SamplingParams,
        offer: Offer,
        *,
        priority: int = 0,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        budget: int | None = None,
    ) -> Dialogue:
        """Raises HTTPError and InvalidRequest before anything is computed.

        Args:
            variables: for the chat template; each must be one that it reads.
            budget: as ``thinking_budget`` of ``params``, but left out where it cannot be kept: the model has no
                thoughts, or its text is held to a form.
        """
        engine = context.llm.engine
        formats = engine.formats
        prompt = await context.llm.tokenize_chat(
            messages,
            tools=offer.told,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **(variables or {}),
        )
        opened = False
        if (tags := formats.thoughts) is not None:
            final = str(messages[-1].get("content") or "") if continue_final_message else ""
            opened = tags.open_in(final) if continue_final_message else tags.left_open(prompt.get("prompt") or "")
        form = params.structured_outputs
        if offer.tools:  # many of them take milliseconds
            form = await asyncio.to_thread(offer.form, formats, form, opened=opened)
        elif form is not None and tags is not None:
            form = await asyncio.to_thread(after_thoughts, form, formats, opened=opened, headed=continue_final_message)
        params = replace(
            params,
            structured_outputs=form,
            shown_token_ids=formats.shown_ids(engine.tokenizer, calls=bool(offer.tools)),
        )
        if budget is not None and form is None and None not in thinking_tags(params, engine.tokenizer):
            params = replace(params, thinking_budget=budget)
        await context.own_llm.compile(params)
        generation = Generation(context, identifier, [prompt], params, priority)
        return cls(generation=generation, offer=offer, opened=opened)

    async def said(self) -> AsyncGenerator[tuple[int, Said], None]:
        """(choice, what is new of it), as it comes. Closing it aborts what is still running."""
        async with aclosing(self.generation.deltas()) as news:
            async for index, delta in news:
                yield index, self._read(index, delta)

    def _read(self, index: int, delta: Delta) -> Said:
        if (parser := self._parsers.get(index)) is None:
            formats, caller = self.generation.context.llm.engine.formats, current.get()
            source = self.generation.id if caller.booked else caller.id  # a line of a batch has the same calls again
            parser = formats.parser(self.offer.schemas, opened=self.opened, source=f"{source}:{index}")
            self._parsers[index] = parser
        before = parser.thinking
        events = parser.feed(delta.text)
        thought = before or parser.thinking
        if thought:
            self.reasoning_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            events += parser.finish()
        if any(isinstance(event, CallEnd) for event in events):
            self._called.add(index)
        called = delta.finish_reason == "stop" and index in self._called
        return Said(delta, events, "tool_calls" if called else delta.finish_reason, thought)

    def usage(self) -> Usage:
        usage = self.generation.usage()
        usage.completion_tokens_details = CompletionTokensDetails(self.reasoning_tokens)
        return usage


def answer_begun(messages: Sequence[Message]) -> bool:
    """The last message is how the answer begins, where an API has a last turn of the assistant's go on: it has text,
    and calls nothing."""
    last = messages[-1]
    return last["role"] == "assistant" and bool(last.get("content")) and not last.get("tool_calls")


def template_variables(
    template: ChatTemplate | None,
    given: Mapping[str, Any] | None,
    effort: str | None,
    field: str = "reasoning_effort",
) -> dict[str, Any]:
    """What a request may say to the chat template: variables that it reads, of plain kinds.

    ``reasoning_effort`` is such a variable of some templates; where others can be told not to think, "none" does.

    Args:
        field: of the request, which says the effort.

    Raises:
        HTTPError: unsupported_parameter, invalid_parameter.
    """
    reads = template.variables if template is not None else frozenset[str]()
    variables = dict(given or {})
    if len(variables) > MAX_TEMPLATE_VARIABLES:
        raise invalid("chat_template_kwargs", f"it has more than {MAX_TEMPLATE_VARIABLES} members")
    for name, value in variables.items():
        if name not in reads:
            what = f"The chat template of this model reads no variable {name[:64]!r}"
            fix = f"it reads {', '.join(sorted(reads)) or 'none'}"
            raise HTTPError("unsupported_parameter", what, fix=fix, param="chat_template_kwargs")
        if not isinstance(value, (bool, int, float, str)) or len(str(value)) > MAX_TEMPLATE_VARIABLE:
            why = f"{name} must be a number, true or false, or a text of at most {MAX_TEMPLATE_VARIABLE} characters"
            raise invalid("chat_template_kwargs", why)
    if effort is None:
        return variables
    if effort not in EFFORTS:
        raise invalid(field, f"it must be one of {', '.join(EFFORTS)}")
    switch = next((name for name in ("enable_thinking", "thinking") if name in reads), None)
    if "reasoning_effort" in reads and not (effort == "none" and switch):
        return {"reasoning_effort": effort, **variables}
    if switch is not None:
        return {switch: effort != "none", **variables}
    if effort == "none":
        return variables
    raise unsupported(field, what="The chat template of this model does not read how much to think")
