"""Chat templates: conversations to token ids, with whatever users wrote kept as text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.base import ConfigError, InvalidRequest, ModelFormatError
from penstock.formats import read_gguf, read_json_object
from penstock.text.added import special_token_texts
from penstock.text.instructions import instructed, shows_all
from penstock.text.metering import Budget, BudgetExceeded
from penstock.text.sandbox import SandboxedTemplate, TemplateRefusal
from penstock.text.tokenizer import Tokenizer, any_of, spare_mark

MAX_TEMPLATE_CHARS = 1 << 18
MAX_DEPTH = 64

_ROLE = re.compile(r"[A-Za-z0-9_ .-]{1,64}")
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as the model reads it."""

    text: str
    token_ids: list[int]


class ChatTemplate:
    """A model's chat template, with the meaning it has in transformers, in a sandbox with a budget.

    Args:
        source: Jinja source.
        tool_use: source to use instead when tools are given.
        special_tokens: bos_token, eos_token and their kind, as variables of the template.

    Attributes:
        source: all of it, that for tools included.
        variables: names it reads that are not special tokens, nor what every conversation has.
        reads_tools: it has a place for them.

    Raises:
        ModelFormatError: (template_error) a source cannot be compiled, or uses what templates may not.
    """

    def __init__(
        self, source: str, *, tool_use: str | None = None, special_tokens: Mapping[str, str] | None = None
    ) -> None:
        self.special_tokens = dict(special_tokens or {})
        self._plain = _compile(source)
        self._tool_use = self._plain if tool_use is None else _compile(tool_use)
        self._controls: tuple[Tokenizer, re.Pattern[str]] | None = None
        self._read: dict[tuple[bool, tuple[str, ...]], bool] = {}
        self.source = source + (tool_use or "")
        read = self._plain.variables | self._tool_use.variables
        self.variables, self.reads_tools = read - _RESERVED - self.special_tokens.keys(), "tools" in read

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation; arguments and errors are those of ``apply``."""
        return self.apply(tokenizer, messages, **options).token_ids

    def apply(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> RenderedChat:
        """Renders a conversation and encodes it.

        Special tokens that the template writes become tokens. Written in a message, a tool or a variable they are
        ordinary text, and so are other added tokens by which the template marks structure. When no such token is
        written the ids are those of the rendered text as a whole, as in transformers.

        Args:
            messages: dicts with ``role`` and ``content``, a string or a list of {"type": "text", "text": ...} parts;
                other keys are passed on to the template. A ``developer`` is ``system`` to a template that does not
                name that role, and one message with what is before it where the template reads no second one.
            add_generation_prompt: end with the start of an assistant message.
            continue_final_message: leave the last message open, so that the model goes on with it.
            tools: JSON schemas of functions the model may call.
            variables: for the template; those it does not read are ignored.

        Raises:
            InvalidRequest: invalid_messages, unsupported_content (a part that is not text), template_refused (with the
                template's own message), template_budget (it runs too long or grows too large), template_error, and
                what ``Tokenizer.encode`` raises.
        """
        if add_generation_prompt and continue_final_message:
            raise InvalidRequest(
                "invalid_parameter", "add_generation_prompt and continue_final_message cannot both be set"
            )
        if reserved := sorted(variables.keys() & (_RESERVED | self.special_tokens.keys())):
            raise InvalidRequest("invalid_parameter", f"A template variable cannot be named {reserved[0]!r}")
        template = self._tool_use if tools else self._plain
        given = {
            "messages": self._instructed(_checked(messages), bool(tools)),
            "tools": list(tools) if tools else None,
            **{name: value for name, value in variables.items() if name in template.variables},
        }
        texts: list[str] = []
        given = _plain_data(given, lambda text: _noted(text, texts))
        written = "".join(texts)
        control, barrier = self._control_tokens(tokenizer), None
        if any(map(control.search, texts)):
            barrier = spare_mark(written)
            start = re.compile(f"(?={control.pattern})(.)", re.DOTALL)
            given = _plain_data(given, lambda text: start.sub(rf"{barrier}\1{barrier}", text))
        end = None
        if continue_final_message:
            end = spare_mark(written + (barrier or ""))
            _open_final(given["messages"], end)
        given |= {"documents": None, "add_generation_prompt": add_generation_prompt, **self.special_tokens}
        text = _render(template, given, len(written))
        if end is not None:
            text = _cut_at(text, end)
        ids = tokenizer.encode(text, add_special_tokens=False, barrier=barrier)
        return RenderedChat(text if barrier is None else text.replace(barrier, ""), ids)

    def _instructed(self, messages: list[dict[str, Any]], tools: bool) -> list[dict[str, Any]]:
        template = self._tool_use if tools else self._plain

        def render(some: Sequence[Mapping[str, Any]]) -> str:
            given = {"messages": some, "tools": None, "documents": None, "add_generation_prompt": True}
            return _render(template, given | self.special_tokens, 0)

        def reads(roles: tuple[str, ...]) -> bool:
            if (tools, roles) not in self._read:
                try:
                    self._read[tools, roles] = shows_all(roles, render)
                except InvalidRequest:
                    self._read[tools, roles] = False
            return self._read[tools, roles]

        return instructed(messages, knows_developer="developer" in template.literals, reads=reads)

    def _control_tokens(self, tokenizer: Tokenizer) -> re.Pattern[str]:
        """Special tokens, and added tokens that the templates write but never look for in a message.

        The latter are role marks that a model's authors forgot to flag; tokens like ``</think>``, which templates do
        look for, must stay recognisable in an assistant's earlier messages.
        """
        if self._controls is None or self._controls[0] is not tokenizer:
            sources = (self._plain, self._tool_use)
            literals = "\0".join(text for source in sources for text in source.literals)
            sought = {text for source in sources for text in source.operands}
            written = {token for token in tokenizer.added_tokens if token in literals and token not in sought}
            self._controls = tokenizer, any_of(written | tokenizer.special_tokens.keys())
        return self._controls[1]


def _compile(source: str) -> SandboxedTemplate:
    try:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ValueError(f"it has {len(source)} characters, the limit is {MAX_TEMPLATE_CHARS}")
        return SandboxedTemplate(source)
    except Exception as error:  # jinja2 lets through whatever a hostile source makes Python's compiler raise
        raise ModelFormatError(
            "template_error",
            "The chat template cannot be compiled",
            why=f"{type(error).__name__}: {error}"[:300],
            fix="start with chat_template=FILE to use another one",
        ) from None


def _render(template: SandboxedTemplate, variables: Mapping[str, Any], input_chars: int) -> str:
    try:
        return template.render(variables, Budget(input_chars))
    except TemplateRefusal as refusal:
        raise InvalidRequest(
            "template_refused",
            "The chat template does not accept this conversation",
            why=str(refusal),
            fix="change the conversation as the model's template wants it",
        ) from None
    except (BudgetExceeded, RecursionError, MemoryError) as error:
        raise InvalidRequest(
            "template_budget",
            "The chat template was stopped",
            why=str(error) if isinstance(error, BudgetExceeded) else f"it ended in a {type(error).__name__}",
            fix="send a shorter conversation or use another template",
        ) from None
    except Exception as error:  # a template can raise nearly anything by combining the wrong types
        raise InvalidRequest(
            "template_error",
            "The chat template failed on this conversation",
            why=f"{type(error).__name__}: {error}"[:300],
        ) from None


# -- conversations ---------------------------------------------------------------------------------------------------


def _invalid(what: str, why: str = "") -> InvalidRequest:
    return InvalidRequest("invalid_messages", what, why=why, fix='send [{"role": "user", "content": "..."}]')


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise _invalid("A conversation is a list of at least one message", f"it is {repr(messages)[:60]}")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise _invalid(f"messages[{i}] is not an object", f"it is a {type(message).__name__}")
        role = message.get("role")
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise _invalid(f"messages[{i}] has no usable role", f"role is {repr(role)[:60]}")
        message = dict(message)
        if "content" in message or not message.get("tool_calls"):
            message["content"] = _content(message.get("content"), i, optional=role == "assistant")
        reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
        if reasoning is not None:  # as in transformers: templates read it under either name
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        if isinstance(calls := message.get("tool_calls"), Sequence):
            message["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
        checked.append(message)
    return checked


def _content(content: object, i: int, *, optional: bool) -> str | None:
    if isinstance(content, str) or (content is None and optional):
        return content
    if not isinstance(content, (list, tuple)):
        raise _invalid(f"messages[{i}].content is a {type(content).__name__}", "it must be text or a list of parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise InvalidRequest(
                "unsupported_content",
                f"messages[{i}].content has a part of type {str(kind)[:40]!r}",
                why="this model reads text only",
                fix='send parts {"type": "text", "text": "..."}',
            )
        texts.append(text)
    return "\n".join(texts)


def _with_parsed_arguments(call: Any) -> Any:
    """OpenAI sends a call's arguments as JSON text; templates expect an object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(arguments := function.get("arguments"), str):
        return call
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": parsed}} if isinstance(parsed, dict) else call


def _plain_data(value: Any, change: Callable[[str], str], depth: int = 0) -> Any:
    """A copy of JSON-like data in exact built-in types, every string of it, keys included, passed through ``change``.

    So a template can reach neither what other objects can do nor the caller's data.
    """
    if depth > MAX_DEPTH:
        raise _invalid(f"The conversation is nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return change(str.__str__(value))
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain_data(k, change, depth + 1): _plain_data(v, change, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_data(item, change, depth + 1) for item in value]
    raise _invalid(f"The conversation holds a {type(value).__name__}", "only what JSON can hold can be rendered")


def _noted(text: str, texts: list[str]) -> str:
    texts.append(text)
    return text


def _open_final(messages: list[dict[str, Any]], end: str) -> None:
    final = messages[-1]
    if not final.get("content"):
        raise _invalid("continue_final_message needs a last message with content")
    final["content"] += end + " "


def _cut_at(text: str, end: str) -> str:
    """The text before the mark; also without blanks before it, if the template strips them from messages."""
    place = text.rfind(end)
    if place < 0:
        raise InvalidRequest(
            "template_error", "The final message cannot be continued", why="the chat template does not show it as it is"
        )
    return text[:place] if text.startswith(end + " ", place) else text[:place].rstrip()


# -- files -----------------------------------------------------------------------------------------------------------


def load_chat_template(folder: Path, override: str | None = None) -> ChatTemplate | None:
    """The chat template of a model folder: ``override`` (a file), else chat_template.jinja, else the one (or the list
    of named ones) in tokenizer_config.json; or that of a GGUF file. None if there is none.

    Raises:
        ModelFormatError: template_error, json_invalid, and those of GGUFFile.
        ConfigError: (chat_template_unreadable) the override cannot be read.
    """
    if folder.is_file():
        return _gguf_template(folder, override)
    path = folder / "tokenizer_config.json"
    config = read_json_object(path) if path.exists() else {}
    tokens = special_token_texts(config)
    if override is not None:
        return ChatTemplate(_read(Path(override)), special_tokens=tokens)
    named = config.get("chat_template")
    if isinstance(named, list):
        named = {item.get("name"): item.get("template") for item in named if isinstance(item, Mapping)}
    sources = dict(named) if isinstance(named, Mapping) else {"default": named}
    for name, file in (("default", "chat_template.jinja"), ("tool_use", "additional_chat_templates/tool_use.jinja")):
        if (folder / file).is_file():
            sources[name] = _read(folder / file)
    default, tool_use = sources.get("default"), sources.get("tool_use")
    if not isinstance(default, str):
        return None
    return ChatTemplate(default, tool_use=tool_use if isinstance(tool_use, str) else None, special_tokens=tokens)


def _gguf_template(path: Path, override: str | None) -> ChatTemplate | None:
    metadata = read_gguf(path).metadata
    texts, tokens = metadata.get("tokenizer.ggml.tokens"), {}
    for role in ("bos", "eos"):
        i = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if isinstance(texts, list) and isinstance(i, int) and 0 <= i < len(texts) and isinstance(texts[i], str):
            tokens[f"{role}_token"] = texts[i]
    source = metadata.get("tokenizer.chat_template") if override is None else _read(Path(override))
    return ChatTemplate(source, special_tokens=tokens) if isinstance(source, str) else None


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_TEMPLATE_CHARS + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "chat_template_unreadable",
            f"The chat template {path} cannot be read",
            why=str(error)[:200],
            fix="name a file of UTF-8 text",
        ) from None
