"""Wire: what an engine and those in front of it say to each other across processes: whole frames of declared types."""

from penstock.wire.frames import MAX_FRAME, Connection, WireError
from penstock.wire.messages import (
    Cancel,
    Chat,
    FromEngine,
    Loading,
    Look,
    News,
    Opening,
    Ready,
    Refused,
    Seen,
    Start,
    Submit,
    Text,
    ToEngine,
    Tokens,
    decode_from_engine,
    decode_from_texts,
    decode_to_engine,
    decode_to_texts,
    encode,
)
from penstock.wire.process import EngineProcess, python
from penstock.wire.remote import RemoteService
from penstock.wire.texts import TextWorkers, Tokenized
from penstock.wire.under_way import UnderWay

__all__ = [
    "Cancel",
    "Chat",
    "Connection",
    "EngineProcess",
    "FromEngine",
    "Loading",
    "Look",
    "MAX_FRAME",
    "News",
    "Opening",
    "Ready",
    "Refused",
    "RemoteService",
    "Seen",
    "Start",
    "Submit",
    "Text",
    "TextWorkers",
    "ToEngine",
    "Tokenized",
    "Tokens",
    "UnderWay",
    "WireError",
    "decode_from_engine",
    "decode_from_texts",
    "decode_to_engine",
    "decode_to_texts",
    "encode",
    "python",
]
