"""Requests and responses on the wire: OpenAI's names and shapes, and vLLM's extra sampling fields.

Types are declared here; ranges of sampling parameters are SamplingParams' own. An explicit null is the default.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, cast

import msgspec
from msgspec import Meta

from penstock.core.service import MAX_PRIORITY
from penstock.serving.errors import HTTPError, unsupported
from penstock.serving.limits import (
    MAX_ARGUMENT_CHARS,
    MAX_MESSAGES,
    MAX_METADATA,
    MAX_MODEL_NAME,
    MAX_PARTS,
    MAX_PROMPTS,
    MAX_TOOLS,
)
from penstock.serving.structured import wanted_form
from penstock.serving.tools import ToolSpec
from penstock.spec import FinishReason, SamplingParams
from penstock.spec.ranges import MAX_ID
from penstock.spec.sampling import (
    MAX_BREAKER_LENGTH,
    MAX_BREAKERS,
    MAX_LOGIT_BIAS,
    MAX_N,
    MAX_RULES,
    MAX_STOP,
    MAX_STOP_IDS,
    MAX_STOP_LENGTH,
)

Name = Annotated[str, Meta(max_length=MAX_MODEL_NAME)]
Stop = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_LENGTH)]
Breaker = Annotated[str, Meta(min_length=1, max_length=MAX_BREAKER_LENGTH)]
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=MAX_METADATA)
]
TokenId = Annotated[int, Meta(extra_json_schema={"minimum": 0, "maximum": MAX_ID})]  # looked through where it is used
Bias = Annotated[float, Meta(extra_json_schema={"minimum": -100, "maximum": 100})]
Tools = Annotated[list[ToolSpec], Meta(extra_json_schema={"maxItems": MAX_TOOLS})]  # more have an error of their own
Priority = Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]

Tier = Literal["auto", "default", "flex", "priority", "scale", "standard_only"]
TIERS = {"flex": 6, "priority": -6}
"""Levels of priority that a service tier stands for: by default a minute of waiting."""

Harmless = dict[str, tuple[object, ...]]
"""Fields that are known and cannot be honoured yet, and the values that ask for nothing. Null always does."""

_HARMLESS: Harmless = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}

_CHAT_HARMLESS = _HARMLESS | {
    "audio": (),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "web_search_options": (),
}


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None


class ModelRequest(msgspec.Struct, kw_only=True):
    """What all requests to a model have in common.

    ``IDS``: fields that may be many token ids; such a field is an array then, or a list of arrays.
    """

    HARMLESS: ClassVar[Harmless] = {}
    IDS: ClassVar[tuple[str, ...]] = ()

    model: Name | None = None
    priority: Priority | None = None

    def check(self) -> None:
        """What types cannot say. Raises HTTPError(invalid_parameter)."""

    @property
    def stays(self) -> float | None:
        """Seconds for which it has the model stay in memory after it, infinity for ever; None if it does not say."""
        return None

    @property
    def only_parts(self) -> bool:
        """It asks that the model leave memory, and nothing else."""
        return False


class GenerationRequest(ModelRequest, kw_only=True):
    """What completions and chat have in common."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    service_tier: Tier | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: Annotated[list[Breaker], Meta(max_length=MAX_BREAKERS)] | None = None
    logit_bias: Annotated[dict[int, Bias], Meta(max_length=MAX_LOGIT_BIAS)] | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOP)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_IDS)] | None = None
    min_tokens: int | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=MAX_ID)] | None = None  # 0 is refused where it is used
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    logits_rules: Annotated[dict[str, Any], Meta(max_length=MAX_RULES)] | None = None
    thinking_budget: int | None = None
    thinking_start: str | list[TokenId] | None = None
    thinking_end: str | list[TokenId] | None = None
    thinking_close: str | list[TokenId] | None = None
    thinking_soft: float | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    add_special_tokens: bool | None = None

    def check(self) -> None:
        """Makes the form of the answer too, which takes long of a large body: not in the event loop."""
        if self.stream_options is not None and not self.stream:
            raise _contradiction("stream_options", "stream")
        form = wanted_form({name: getattr(self, name) for name in _FORMS})
        for name in _FORMS:
            setattr(self, name, None)
        self.structured_outputs = cast("dict[str, Any] | None", form)

    def params(self, defaults: dict[str, Any], **own: int | None) -> SamplingParams:
        """Of what all such requests share and each kind has of its ``own``, once checked; None leaves a field open."""
        asked = {name: getattr(self, name) for name in _SHARED} | own
        return SamplingParams(**defaults | {name: value for name, value in asked.items() if value is not None})

    @property
    def tier(self) -> str:
        """At which it is served where the engine goes by priority."""
        return self.service_tier if self.service_tier in TIERS else "default"

    def usage_wanted(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/completions"""

    HARMLESS: ClassVar[Harmless] = _HARMLESS | {
        "prompt_embeds": (),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
    }
    IDS: ClassVar[tuple[str, ...]] = ("prompt",)

    prompt: Texts
    suffix: str | None = None
    logprobs: int | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None

    def check(self) -> None:
        GenerationRequest.check(self)
        self.prompt = cast(Texts, self.prompts())  # ids are looked through once, and not in the event loop
        n = 1 if self.n is None else self.n
        why = ""
        if self.best_of is not None and self.best_of < n:
            why = f"it must be at least n = {n}"
        elif self.best_of is not None and self.best_of > n and self.stream:
            why = "which are the best is known only at the end, so they cannot be streamed"
        if why:
            raise HTTPError("invalid_parameter", f"best_of = {self.best_of} cannot be used", why=why, param="best_of")
        if self.best_of is not None and self.best_of > n and self.reports:
            raise unsupported("best_of", what="best_of does not go together with echo and logprobs")

    @property
    def reports(self) -> bool:
        """Log-probabilities of the prompt are asked for."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def silent(self) -> bool:
        """Nothing is to be generated: the prompt is only to be looked at."""
        return bool(self.echo) and self.max_tokens == 0

    def prompts(self) -> list[str] | list[Sequence[int]]:
        return each_of("prompt", self.prompt, MAX_PROMPTS)

    def sampling_params(self, recommended: Mapping[str, Any]) -> SamplingParams:
        """``recommended``: by the model, for what the request leaves open; where it says nothing, 16 tokens."""
        return self.params(
            {"max_tokens": 16, **recommended},
            max_tokens=1 if self.silent else self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
        )


_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": MAX_ID}}
_FORMS_OF_TEXTS = [{"items": {"type": "string"}}, {"items": _IDS["items"]}, {"items": _IDS}]
Texts = (
    str
    | Annotated[list[str | TokenId | list[TokenId]], Meta(extra_json_schema={"minItems": 1, "anyOf": _FORMS_OF_TEXTS})]
)


def each_of(name: str, value: Texts | array[int], most: int) -> list[str] | list[Sequence[int]]:
    """The four forms OpenAI allows: a text, several texts, token ids, several lists of token ids.

    Raises:
        HTTPError: (invalid_parameter) it is of no form, or there are more than ``most``.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, array):
        return cast("list[Sequence[int]]", [value])
    kinds = {type(part) for part in value}
    if len(kinds) != 1 or (kinds != {int} and len(value) > most):
        why = f"it must be a text, token ids, or 1 to {most} of either kind"
        raise HTTPError("invalid_parameter", f"{name} cannot be used", why=why, param=name)
    return cast("list[str] | list[Sequence[int]]", [value] if kinds == {int} else value)


class ContentPart(msgspec.Struct):
    type: Name
    text: str | None = None


ROLES = ("system", "developer", "user", "assistant", "tool")


class CalledFunction(msgspec.Struct, kw_only=True):
    name: Name
    arguments: Annotated[str, Meta(max_length=MAX_ARGUMENT_CHARS)] = "{}"


class CalledCustom(msgspec.Struct, kw_only=True):
    name: Name
    input: Annotated[str, Meta(max_length=MAX_ARGUMENT_CHARS)] = ""


class PastCall(msgspec.Struct, kw_only=True):
    id: Name
    function: CalledFunction | None = None
    custom: CalledCustom | None = None
    type: str = "function"


class ChatMessage(msgspec.Struct, kw_only=True):
    role: Annotated[str, Meta(extra_json_schema={"enum": ROLES})]  # as a Literal, its error would not say which
    content: str | Annotated[list[ContentPart], Meta(max_length=MAX_PARTS)] | None = None
    name: Name | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[PastCall], Meta(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Name | None = None


class ChatRequest(GenerationRequest, kw_only=True):
    """POST /v1/chat/completions"""

    HARMLESS: ClassVar[Harmless] = _CHAT_HARMLESS

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=MAX_ID)] | None = None
    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None

    def check(self) -> None:
        GenerationRequest.check(self)
        if self.top_logprobs and not self.logprobs:
            raise _contradiction("top_logprobs", "logprobs")

    def sampling_params(self, recommended: Mapping[str, Any]) -> SamplingParams:
        """As for completions; as many tokens as the context holds, unless the request or the model says less."""
        return self.params(
            {"max_tokens": None, **recommended},
            max_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


def _contradiction(field: str, needed: str) -> HTTPError:
    return HTTPError("invalid_parameter", f"{field} needs {needed}", fix=f"set {needed} to true", param=field)


_SHARED = (
    "n temperature top_p top_k min_p typical_p repetition_penalty presence_penalty frequency_penalty logit_bias seed "
    "dry_multiplier dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers stop stop_token_ids "
    "min_tokens ignore_eos skip_special_tokens include_stop_str_in_output logits_rules "
    "thinking_budget thinking_start thinking_end thinking_close thinking_soft structured_outputs"
).split()

_FORMS = "response_format structured_outputs guided_json guided_regex guided_choice guided_grammar".split()


# -- responses ---------------------------------------------------------------------------------------


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct):
    reasoning_tokens: int = 0


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | msgspec.UnsetType = msgspec.UNSET


class CompletionLogprobs(msgspec.Struct):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None


class Completion(msgspec.Struct):
    """Also each chunk of its stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    service_tier: str = "default"
    system_fingerprint: str | None = None


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None
