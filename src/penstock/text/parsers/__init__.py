"""From a model's text to content, thoughts and calls of tools, piece by piece."""

from penstock.text.parsers.events import (
    Arguments,
    CallDropped,
    CallEnd,
    CallStart,
    Content,
    Event,
    Parser,
    Reasoning,
    merged,
)
from penstock.text.parsers.formats import CALL_FORMATS, NONE, THOUGHT_FORMATS, CallFormat, Formats, formats_of
from penstock.text.parsers.reasoning import Thoughts, ThoughtTags

__all__ = [
    "CALL_FORMATS",
    "NONE",
    "THOUGHT_FORMATS",
    "Arguments",
    "CallDropped",
    "CallEnd",
    "CallFormat",
    "CallStart",
    "Content",
    "Event",
    "Formats",
    "Parser",
    "Reasoning",
    "ThoughtTags",
    "Thoughts",
    "formats_of",
    "merged",
]
