"""What crosses, and how: MessagePack of declared types, read strictly. Nothing else can be made of a frame.

``core.service`` says what a Submission and an Update are; they cross as they are. Sampling parameters cross as the
fields that differ from their defaults and are checked by their own constructor. An error crosses by its kind, code and
words. A grammar crosses as its text: whoever serves it compiles it.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import fields
from typing import Any, cast

import msgspec
from msgspec import Struct

from penstock.base import (
    ConfigError,
    ContextOverflow,
    EngineError,
    InvalidRequest,
    ModelFormatError,
    NotFound,
    PenstockError,
    Unavailable,
)
from penstock.core.service import Status, Submission, Task, Update
from penstock.core.trace import Trace
from penstock.spec import EngineConfig, SamplingParams, StructuredOutputs
from penstock.wire.frames import MAX_FRAME, bad_frame


class Start(Struct, tag="start", frozen=True):
    """The first word to an engine process. ``epoch`` counts the engines of a service; what another says is ignored.
    ``taken``: bytes that seem to be free, and that other engines will need; below 0, that they will give back.
    ``check``: only what can be known without loading the model is asked for; a Ready with nothing in it is the answer.
    """

    epoch: int
    config: EngineConfig
    taken: int = 0
    check: bool = False


class Submit(Struct, tag="submit", frozen=True):
    """A Submission; ``tokens`` are 32-bit integers; ``params``: fields of SamplingParams that are not the default."""

    id: str
    tokens: bytes
    params: dict[str, Any]
    seed: int
    priority: int = 0
    task: Task = "generate"
    tenant: str = ""
    adapter: str = ""
    emitted: tuple[tuple[int, ...] | None, ...] = ()

    @classmethod
    def of(cls, submission: Submission) -> Submit:
        """Raises InvalidRequest: (unsupported_parameter) logits_processors, which are functions; request_unsendable."""
        asked = {name: getattr(submission, name) for name in cls.__struct_fields__}
        try:
            tokens = array("I", submission.tokens).tobytes()
        except (TypeError, OverflowError) as error:
            raise _unsendable(f"{type(error).__name__}: {error}"[:300]) from error
        return cls(**asked | {"params": _plain(submission.params), "tokens": tokens})

    def submission(self) -> Submission:
        """Raises whatever SamplingParams raise."""
        given = dict(self.params)
        if (rules := given.get("logits_rules")) is not None:
            given["logits_rules"] = json.loads(rules)
        asked = {name: getattr(self, name) for name in self.__struct_fields__}
        return Submission(**asked | {"params": SamplingParams(**given), "tokens": tuple(array("I", self.tokens))})


class Cancel(Struct, tag="cancel", frozen=True):
    """An Abort."""

    id: str
    sample: int | None = None


class Look(Struct, tag="look", frozen=True):
    """Asks for a ``Trace``; ``number`` is told with the answer."""

    number: int
    seconds: float
    blocks: int


class Loading(Struct, tag="loading", frozen=True):
    """How much of a model is in memory, from 0 to 1; None: it is fetched, which may take any time."""

    epoch: int
    share: float | None


class Ready(Struct, tag="ready", frozen=True):
    """A model is in memory: the numbers that ``assemble.engine_setup`` makes an EngineSetup of. ``held``: bytes of its
    weights and KV that may seem to be free.
    """

    epoch: int
    config: EngineConfig
    pools: tuple[tuple[int, int | None], ...]
    numerics_id: bytes
    whole: bool
    one_answer: bool
    held: int = 0


class Refused(Struct, tag="refused", frozen=True):
    """There will be no engine."""

    error: PenstockError


class News(Struct, tag="news", frozen=True):
    """All that a step brought, and how the engine is now."""

    epoch: int
    updates: tuple[Update, ...]
    status: Status


class Seen(Struct, tag="seen", frozen=True):
    """The answer to a Look."""

    epoch: int
    number: int
    trace: Trace


class Opening(Struct, tag="opening", frozen=True):
    """The first word to a process that tokenizes."""

    config: EngineConfig


class Text(Struct, tag="text", frozen=True):
    """To be tokenized as ``llm.prompts.Prompts.tokenize`` does it."""

    text: str
    add_special_tokens: bool = True
    parse_special: bool = True


class Chat(Struct, tag="chat", frozen=True):
    """To be rendered and tokenized as ``Prompts.chat`` does it."""

    messages: list[dict[str, Any]]
    options: dict[str, Any]


class Tokens(Struct, tag="tokens", frozen=True):
    """``ids`` as those of Submit."""

    ids: bytes
    text: str | None = None


ToEngine = Start | Submit | Cancel | Look
FromEngine = Loading | Ready | Refused | News | Seen
ToTexts = Opening | Text | Chat
FromTexts = Tokens | Refused


def encode(message: ToEngine | FromEngine | ToTexts | FromTexts) -> bytes:
    """Raises InvalidRequest: (request_unsendable) it has values that no frame can hold, or is too large for one."""
    try:
        frame = _ENCODER.encode(message)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _unsendable(f"{type(error).__name__}: {error}"[:300]) from error
    if len(frame) > MAX_FRAME:
        raise _unsendable(f"it has {len(frame)} bytes, at most {MAX_FRAME} can be sent")
    return frame


def decode_to_engine(frame: bytes) -> Start | Submission | Cancel | Look:
    """Raises WireError: (bad_frame)."""
    message = cast(ToEngine, _decoded(_TO_ENGINE, frame))
    try:
        return message.submission() if isinstance(message, Submit) else message
    except Exception as error:  # the sender's SamplingParams were made by the same checks
        raise bad_frame(f"{type(error).__name__}: {error}"[:300]) from error


def decode_from_engine(frame: bytes) -> FromEngine:
    """Raises WireError: (bad_frame)."""
    return cast(FromEngine, _decoded(_FROM_ENGINE, frame))


def decode_to_texts(frame: bytes) -> ToTexts:
    """Raises WireError: (bad_frame)."""
    return cast(ToTexts, _decoded(_TO_TEXTS, frame))


def decode_from_texts(frame: bytes) -> FromTexts:
    """Raises WireError: (bad_frame)."""
    return cast(FromTexts, _decoded(_FROM_TEXTS, frame))


def _decoded(decoder: msgspec.msgpack.Decoder[Any], frame: bytes) -> object:
    try:
        return decoder.decode(frame)
    except Exception as error:  # of msgspec, of UTF-8, or of the checks of EngineConfig
        raise bad_frame(f"{type(error).__name__}: {error}"[:300]) from error


def _unsendable(why: str) -> InvalidRequest:
    what = "The request cannot be sent to the engine"
    return InvalidRequest("request_unsendable", what, why=why, fix="make it shorter, and use plain text and numbers")


_DEFAULTS = {field.name: field.default for field in fields(SamplingParams)}
_FORMS = [field.name for field in fields(StructuredOutputs)]


def _plain(params: SamplingParams) -> dict[str, Any]:
    asked = {name: value for name, default in _DEFAULTS.items() if (value := getattr(params, name)) != default}
    if asked.pop("logits_processors", None) is not None:
        raise InvalidRequest(
            "unsupported_parameter",
            "logits_processors cannot be used here",
            why="they are functions, and the engine is another process",
            fix="name a rule with logits_rules, or use LLM",
        )
    if rules := asked.get("logits_rules"):  # its integers may be longer than a frame's
        asked["logits_rules"] = json.dumps(rules)
    if wanted := asked.get("structured_outputs"):
        asked["structured_outputs"] = {
            name: value for name in _FORMS if (value := getattr(wanted, name)) not in (None, False)
        }
    return asked


KINDS = (
    ContextOverflow,
    InvalidRequest,
    NotFound,
    Unavailable,
    ModelFormatError,
    ConfigError,
    EngineError,
    PenstockError,
)
_KINDS = {kind.__name__: kind for kind in KINDS}


def _to_plain(value: object) -> object:
    if isinstance(value, PenstockError):
        kind = next(kind for kind in KINDS if isinstance(value, kind))
        words = (value.code, value.what, value.why, value.fix)
        numbers = (value.tokens, value.most) if isinstance(value, ContextOverflow) else ()
        return [kind.__name__, *(word.encode("utf-8", "replace").decode() for word in words), *numbers]
    raise TypeError(f"a {type(value).__name__} does not cross")


def _from_plain(kind: type, value: object) -> object:
    if kind is PenstockError:
        match value:
            case ["ContextOverflow", str(code), str(what), str(why), str(fix), int() | None as tokens, int(most)]:
                return ContextOverflow(code, what, why=why, fix=fix, tokens=tokens, most=most)
            case [str(name), str(code), str(what), str(why), str(fix)] if name in _KINDS:
                return _KINDS[name](code, what, why=why, fix=fix)
    raise ValueError("it is no error")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_to_plain)
_TO_ENGINE = msgspec.msgpack.Decoder(ToEngine, dec_hook=_from_plain)
_FROM_ENGINE = msgspec.msgpack.Decoder(FromEngine, dec_hook=_from_plain)
_TO_TEXTS = msgspec.msgpack.Decoder(ToTexts)
_FROM_TEXTS = msgspec.msgpack.Decoder(FromTexts, dec_hook=_from_plain)
