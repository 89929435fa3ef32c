"""From a corpus folder to token ids, and from token ids to training rows.

A corpus file is UTF-8 text (``.xz`` or plain) of books separated by a line ``<|endoftext|>``;
beside it ``NAME_books.tsv`` lists ``author/title.md<TAB>bytes`` in the order of the file.
Held-out books are cut by title before anything else sees the text.

Shape legend: C chunks, B rows, T tokens of a row, S tokens of a stream.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

Ids = npt.NDArray[np.uint16]
SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Book:
    """One book: its title (file name without suffix) and its text, outer blanks removed."""

    title: str
    text: str


@dataclass(frozen=True)
class Source:
    """One corpus file and how many times an epoch reads it."""

    name: str
    repeat: int


def read_books(folder: Path, name: str) -> list[Book]:
    """Read the books of ``name.txt.xz`` (or ``name.txt``) with the titles of its list.

    Raises ValueError where a book's size in bytes disagrees with the list: then titles and
    texts may be shifted against each other, and a held-out book could slip in.
    """
    packed = folder / f"{name}.txt.xz"
    raw = lzma.decompress(packed.read_bytes()) if packed.exists() else None
    data = raw if raw is not None else (folder / f"{name}.txt").read_bytes()
    texts = data.decode("utf-8").split(f"\n{SEPARATOR}\n")
    rows = (folder / f"{name}_books.tsv").read_text("utf-8").splitlines()
    if len(rows) != len(texts):
        raise ValueError(f"{name}: {len(texts)} books in the file, {len(rows)} in the list")
    books = []
    for row, text in zip(rows, texts, strict=True):
        path, _, size = row.partition("\t")
        # The list counts the text as cut; blank lines at the joints may differ by a few bytes.
        if abs(len(text.encode("utf-8")) - int(size)) > 8:
            raise ValueError(f"{name}: the text of {path!r} is not {size} bytes long")
        books.append(Book(path.rpartition("/")[2].removesuffix(".md"), text.strip()))
    return books


def split_held_out(books: Sequence[Book], titles: Sequence[str]) -> tuple[list[Book], list[Book]]:
    """Return (kept, held out); titles compare without case."""
    wanted = {t.casefold() for t in titles}
    kept = [b for b in books if b.title.casefold() not in wanted]
    return kept, [b for b in books if b.title.casefold() in wanted]


def shared_lines(kept: Sequence[Book], held_out: Sequence[Book], shortest: int) -> list[str]:
    """Return lines of at least ``shortest`` characters that a held-out book shares with a kept one.

    An empty answer means that no other edition of a held-out book is left in the corpus.
    """
    seen = {line for b in held_out for line in b.text.splitlines() if len(line) >= shortest}
    return [line for b in kept for line in b.text.splitlines() if line in seen]


def split_validation(books: Sequence[Book], titles: Sequence[str], share: float) -> tuple[list[Book], list[Book]]:
    """Cut the last ``share`` of the named books off for validation; return (train, validation)."""
    train, validation = [], []
    for book in books:
        if book.title not in titles:
            train.append(book)
            continue
        at = book.text.index("\n", int(len(book.text) * (1.0 - share)))
        train.append(Book(book.title, book.text[:at].strip()))
        validation.append(Book(book.title, book.text[at:].strip()))
    return train, validation


def encode_books(tokenizer: Tokenizer, books: Sequence[Book], eos: int) -> Ids:
    """Return the ids of all books, one ``eos`` before each book and one at the end, uint16 [S]."""
    parts = [np.array([eos], np.uint16)]
    for book in books:
        ids = tokenizer.encode(book.text, add_special_tokens=False).ids
        parts.append(np.array([*ids, eos], np.uint16))
    return np.concatenate(parts)


def write_ids(path: Path, ids: Ids) -> None:
    """Write token ids as little-endian uint16 without a header."""
    path.write_bytes(ids.astype("<u2").tobytes())


def read_ids(path: Path) -> Ids:
    """Read what :func:`write_ids` wrote."""
    return np.frombuffer(path.read_bytes(), "<u2").astype(np.uint16)


@dataclass(frozen=True)
class Chunks:
    """An endless, seekable order of fixed chunks of ``chunk`` tokens (plus one for the target).

    The order is a pure function of the seed and of a chunk counter, so that a resumed run
    continues with exactly the chunks that an uninterrupted one would have seen. An epoch reads
    each stream ``repeat`` times, each time cut at another offset, in one random order.
    """

    streams: tuple[Ids, ...]
    repeats: tuple[int, ...]
    chunk: int
    seed: int

    @property
    def per_epoch(self) -> int:
        """Chunks in an epoch; one chunk of each pass is given up for the random offset."""
        pairs = zip(self.streams, self.repeats, strict=True)
        return sum(r * ((len(s) - 1) // self.chunk - 1) for s, r in pairs)

    def epoch_order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return int64 [C, 2]: for each chunk of the epoch, its stream and its first token."""
        rng = np.random.default_rng([self.seed, epoch])
        parts = []
        for index, (stream, repeat) in enumerate(zip(self.streams, self.repeats, strict=True)):
            count = (len(stream) - 1) // self.chunk - 1
            first = int(rng.integers(self.chunk))
            for copy in range(repeat):
                # Copies are cut half a chunk (for 2) apart, so that joints fall elsewhere.
                offset = (first + copy * self.chunk // repeat) % self.chunk
                starts = offset + self.chunk * np.arange(count, dtype=np.int64)
                parts.append(np.stack([np.full_like(starts, index), starts], axis=1))
        return cast(npt.NDArray[np.int64], rng.permutation(np.concatenate(parts)))

    def batches(self, counter: int, count: int) -> Iterator[Ids]:
        """Yield batches of ``count`` chunks, uint16 [count, chunk + 1], from chunk ``counter``."""
        epoch, order = -1, np.empty((0, 2), np.int64)
        while True:
            rows = []
            for at in range(counter, counter + count):
                if at // self.per_epoch != epoch:
                    epoch = at // self.per_epoch
                    order = self.epoch_order(epoch)
                stream, start = (int(v) for v in order[at % self.per_epoch])
                rows.append(self.streams[stream][start : start + self.chunk + 1])
            counter += count
            yield np.stack(rows)


def split_rows(chunks_CT: Ids, length: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Cut chunks [C, chunk + 1] into (inputs, targets), int64 [B, length] each."""
    ids = chunks_CT.astype(np.int64)
    return ids[:, :-1].reshape(-1, length), ids[:, 1:].reshape(-1, length)


def write_report(path: Path, report: dict[str, object]) -> None:
    """Write a small JSON file that says what the ids files contain."""
    path.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
