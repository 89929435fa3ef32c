"""Conversations cut out of novels: consecutive utterances of a scene become the turns of two speakers.

The rules lean on two customs of English print: a paragraph is one line that opens with the quotation mark when
somebody speaks, and a new speaker gets a new paragraph. They know no grammar, and get a scene of three people wrong.

1. A paragraph speaks if it opens with ``"`` and its quotation marks are even in number (an odd one is a speech that
   goes on in the next paragraph). What stands between the marks is its utterance; "said he" and the like fall away.
2. Where a tag was cut out, a comma before it becomes a full stop if the speech goes on with a capital or ends there.
3. An utterance of more than ``LONGEST`` characters, and any paragraph that does not speak, ends the scene.
4. Utterances of a scene alternate between user and assistant. A scene has an even number of turns, at least two and at
   most ``MOST_TURNS``; what is left over begins the next one or is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

LONGEST = 400
MOST_TURNS = 12

Turns = tuple[str, ...]
"""User, assistant, user, ...: what was said, in order; always an even number of them."""


def utterance(paragraph: str) -> str | None:
    """Return what a paragraph's speaker says, or None if it does not speak by rules 1 to 3."""
    pieces = paragraph.strip().split('"')
    if pieces[0] or len(pieces) % 2 == 0:
        return None
    said = ""
    for piece in (" ".join(p.split()) for p in pieces[1::2]):
        if said.endswith(",") and piece[:1].isupper():
            said = said[:-1] + "."
        said = f"{said} {piece}".strip()
    if said.endswith(","):
        said = said[:-1] + "."
    return said if 0 < len(said) <= LONGEST else None


def scenes(text: str) -> Iterator[Turns]:
    """Yield the conversations of a book in order. Paragraphs are lines; blank ones do not count."""
    turns: list[str] = []
    for paragraph in (line for line in [*text.splitlines(), "The end."] if line.strip()):
        said = utterance(paragraph)
        if said is not None:
            turns.append(said)
        if said is None or len(turns) == MOST_TURNS:
            if even := tuple(turns[: len(turns) // 2 * 2]):
                yield even
            turns.clear()


def conversations(texts: Iterable[str]) -> list[Turns]:
    """Return the conversations of all books."""
    return [turns for text in texts for turns in scenes(text)]
