"""Wire: what an engine and those in front of it say to each other across processes: whole frames of declared types."""

from penstock.wire.frames import MAX_FRAME, Connection, WireError
from penstock.wire.messages import (
    Cancel,
    FromEngine,
    Loading,
    News,
    Ready,
    Refused,
    Start,
    Submit,
    ToEngine,
    decode_from_engine,
    decode_to_engine,
    encode,
)
from penstock.wire.process import EngineProcess, python
from penstock.wire.remote import RemoteService
from penstock.wire.under_way import UnderWay

__all__ = [
    "MAX_FRAME",
    "Cancel",
    "Connection",
    "EngineProcess",
    "FromEngine",
    "Loading",
    "News",
    "Ready",
    "Refused",
    "RemoteService",
    "Start",
    "Submit",
    "ToEngine",
    "UnderWay",
    "WireError",
    "decode_from_engine",
    "decode_to_engine",
    "encode",
    "python",
]
