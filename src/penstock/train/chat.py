"""The chat stream: conversations in the format of the model's own template, as token ids.

It is mixed into the last part of a training (``[chat]`` of a recipe). Dialogue cut out of the training books gives the
form, sums give answers that can be checked. Each conversation ends with ``<|endoftext|>``.

Shape legend: S tokens of the stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from penstock.train.arithmetic import Problem, split_problems
from penstock.train.data import Book, Ids, write_ids
from penstock.train.dialogue import Turns, conversations
from penstock.train.tokenizer import EOS, IM_END, IM_START, special_id

ROLES = ("user", "assistant")
CHAT_FILE = "chat.ids"


def render(turns: Turns) -> str:
    """Return a conversation as the bundled chat template writes it."""
    return "".join(f"{IM_START}{ROLES[i % 2]}\n{said}{IM_END}\n" for i, said in enumerate(turns))


def as_turns(problems: Iterable[Problem]) -> list[Turns]:
    """Return each problem as a conversation of one question and its answer."""
    return [(p.question, p.answer) for p in problems]


def encode_conversations(tokenizer: Tokenizer, talks: Sequence[Turns]) -> Ids:
    """Return the ids of all conversations, an end-of-text token before the first and after each, uint16 [S]."""
    eos = special_id(tokenizer, EOS)
    encoded = tokenizer.encode_batch([render(turns) for turns in talks], add_special_tokens=False)
    return np.array([eos, *(i for e in encoded for i in (*e.ids, eos))], np.uint16)


def chat_talks(tokenizer: Tokenizer, books: Sequence[Book], arithmetic: float, seed: int) -> list[Turns]:
    """Return dialogue and sums in one random order; of the tokens a share of ``arithmetic`` is sums.

    With a share of 1, and without books, there are only sums: each training problem once.
    """
    problems = as_turns(split_problems()[0])
    if arithmetic < 1.0 and books:
        talks = conversations(book.text for book in books)
        wanted = len(encode_conversations(tokenizer, talks)) * arithmetic / (1.0 - arithmetic)
        each = len(encode_conversations(tokenizer, problems)) / len(problems)
        talks += [problems[i % len(problems)] for i in range(round(wanted / each))]
    else:
        talks = problems
    order = np.random.default_rng([seed, len(talks)]).permutation(len(talks))
    return [talks[i] for i in order.tolist()]


def write_chat(tokenizer: Tokenizer, books: Sequence[Book], arithmetic: float, seed: int, work: Path) -> int:
    """Write the chat stream into a work folder and return its tokens."""
    ids = encode_conversations(tokenizer, chat_talks(tokenizer, books, arithmetic, seed))
    write_ids(work / CHAT_FILE, ids)
    return len(ids)
