"""The formats there are, by name, and the one of a model."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count

from penstock.base.registry import Registry
from penstock.spec.tools import CallShape
from penstock.text.parsers import anyjson, granite, harmony, hermes, llama3, mistral, tagged
from penstock.text.parsers.events import Parser
from penstock.text.parsers.output import Machine, Output, Steps
from penstock.text.parsers.reasoning import PlainText, Thoughts, ThoughtTags, thought_tags
from penstock.text.template import ChatTemplate
from penstock.text.thinking import TAGS
from penstock.text.tokenizer import Tokenizer

NONE = "none"
"""The name of no format: everything is content."""


def openai_id(digits: str) -> str:
    return f"call_{digits[:24]}"


def mistral_id(digits: str) -> str:
    """Nine letters or digits: its templates refuse anything else."""
    return digits[:9]


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a model writes calls.

    Attributes:
        steps: reads them.
        shape: what a grammar has it write.
        marks: texts that may be special tokens and must be seen.
        make_id: of a call, from hexadecimal digits that no other has.
    """

    steps: Callable[[Output], Steps]
    shape: CallShape
    marks: tuple[str, ...] = ()
    make_id: Callable[[str], str] = openai_id


CALL_FORMATS: Registry[CallFormat] = Registry("tool parser")
THOUGHT_FORMATS: Registry[ThoughtTags] = Registry("reasoning parser")

_call, _thoughts = CALL_FORMATS.register, THOUGHT_FORMATS.register
_call("hermes")(CallFormat(hermes.hermes, hermes.SHAPE, (hermes.OPEN, hermes.CLOSE)))
_call("llama3")(CallFormat(llama3.llama3, llama3.SHAPE, (llama3.TAG,)))
_call("granite")(CallFormat(granite.granite, granite.SHAPE, (granite.TAG, "<tool_call>")))
_MISTRAL_MARKS = (mistral.CALLS, mistral.ARGS, mistral.ID)
_call("mistral")(CallFormat(mistral.mistral, mistral.SHAPE, _MISTRAL_MARKS, mistral_id))
_call("mistral_args")(CallFormat(mistral.mistral, mistral.NEW_SHAPE, _MISTRAL_MARKS, mistral_id))
_call("qwen3_coder")(CallFormat(tagged.qwen3_coder, tagged.QWEN3_CODER, (tagged.OPEN, tagged.CLOSE)))
_GLM_MARKS = (tagged.OPEN, tagged.CLOSE, tagged.KEY, tagged.END_KEY, tagged.VALUE, tagged.END_VALUE)
_call("glm")(CallFormat(tagged.glm, tagged.GLM, _GLM_MARKS))
_call("harmony")(CallFormat(harmony.harmony, harmony.SHAPE, harmony.MARKS))
_call("json")(CallFormat(anyjson.any_json, anyjson.SHAPE))

_thoughts("think")(thought_tags(TAGS[0]))
_thoughts("deepseek_r1")(thought_tags(TAGS[0], opened=True))
_thoughts("mistral")(thought_tags(TAGS[1]))
_thoughts("seed_oss")(thought_tags(TAGS[2]))
_thoughts("cohere")(thought_tags(TAGS[4]))
_GRANITE = [
    ("Here is my thought process:", "Here is my response:"),
    ("Here's my thought process:", "Here's my response:"),
]
_thoughts("granite")(thought_tags(*_GRANITE))
_thoughts("harmony")(ThoughtTags((harmony.ANALYSIS,), (harmony.NEXT,), channels=harmony.MARKS))


@dataclass(frozen=True, slots=True)
class Formats:
    """Those of one model; None where it has none."""

    calls: CallFormat | None = None
    thoughts: ThoughtTags | None = None

    def parser(self, tools: Collection[str], *, opened: bool | None = None, source: str | None = None) -> Parser:
        """For one completion.

        Args:
            tools: names that may be called, perhaps with the JSON schema of each, as text.
            opened: it starts inside thoughts; by default where the format's completions do.
            source: what ids of calls are made of; by default they are random.
        """
        ids = _ids(source or secrets.token_hex(16), openai_id if self.calls is None else self.calls.make_id)
        channels = self.thoughts is not None and self.thoughts.channels
        if channels and (self.calls is None or self.calls.steps is harmony.harmony):
            return Machine(harmony.harmony, Output(tools if self.calls else (), ids))
        rest: Parser = PlainText()
        if self.calls is not None and tools:
            rest = Machine(self.calls.steps, Output(tools, ids))
        if self.thoughts is None:
            return rest
        return Thoughts(self.thoughts, rest, opened=self.thoughts.opened if opened is None else opened)

    def shown_ids(self, tokenizer: Tokenizer, *, calls: bool) -> tuple[int, ...]:
        """Special tokens that a parser must see."""
        marks = list(self.calls.marks) if calls and self.calls else []
        marks += (*self.thoughts.starts, *self.thoughts.ends, *self.thoughts.channels) if self.thoughts else ()
        return tuple(sorted({tokenizer.special_tokens[mark] for mark in marks if mark in tokenizer.special_tokens}))


def _ids(source: str, make_id: Callable[[str], str]) -> Callable[[], str]:
    number = count()
    return lambda: make_id(blake2b(f"{source}:{next(number)}".encode()).hexdigest())


@dataclass(frozen=True, slots=True)
class _Signs:
    """Where a format shows: in the source of the template, or among the added tokens."""

    template: str
    added: Collection[str] = field(default_factory=frozenset)

    def __call__(self, text: str) -> bool:
        return text in self.template or text in self.added


def formats_of(
    template: ChatTemplate | None, added: Collection[str], *, calls: str | None = None, thoughts: str | None = None
) -> Formats:
    """The formats of a model, by its template and the tokens ``added`` to its vocabulary; or by name, "none" for none.

    Raises:
        ConfigError: (unknown_variant) there is no format of that name.
    """
    signs = _Signs(template.source if template else "", added)
    reads_tools = template is not None and template.reads_tools
    calls = calls or (_calls_by(signs) if reads_tools else "json")
    thoughts = thoughts or _thoughts_by(signs)
    return Formats(
        None if calls == NONE else CALL_FORMATS.get(calls),
        None if thoughts == NONE else THOUGHT_FORMATS.get(thoughts),
    )


def _calls_by(signs: _Signs) -> str:
    """Of a template that reads tools."""
    if "<arg_key>" in signs.template:
        return "glm"
    if "<function=" in signs.template:
        return "qwen3_coder"
    if signs("<|channel|>"):
        return "harmony"
    if signs("<|tool_call|>"):
        return "granite"
    if signs("[TOOL_CALLS]"):
        return "mistral_args" if signs("[ARGS]") else "mistral"
    if "<tool_call>" in signs.template:
        return "hermes"
    return "llama3" if signs("<|python_tag|>") else "json"


def _thoughts_by(signs: _Signs) -> str:
    if signs("<|channel|>"):
        return "harmony"
    if signs("[THINK]"):
        return "mistral"
    if signs("<seed:think>"):
        return "seed_oss"
    if signs("<|START_THINKING|>"):
        return "cohere"
    if "Here is my thought process:" in signs.template:
        return "granite"
    return "think" if signs("<think>") or "</think>" in signs.template else NONE
