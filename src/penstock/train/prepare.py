"""Corpus folder -> work folder: tokenizer, token ids, held-out texts and a report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from penstock.train.arithmetic import split_problems
from penstock.train.chat import ROLES, as_turns, render, write_chat
from penstock.train.data import (
    Book,
    encode_books,
    read_books,
    shared_lines,
    split_held_out,
    split_validation,
    write_ids,
    write_report,
)
from penstock.train.recipe import Recipe
from penstock.train.tokenizer import EOS, load_tokenizer, save_tokenizer, special_id, train_tokenizer

#: A line this long is prose of one book, not a stock phrase.
LONG_LINE = 120


@dataclass(frozen=True)
class Corpus:
    """Books by what becomes of them: trained on (by source), validated on, held out."""

    kept: dict[str, list[Book]]
    validation: list[Book]
    held_out: list[Book]

    @property
    def training(self) -> list[Book]:
        """All books that are trained on."""
        return [book for books in self.kept.values() for book in books]


def read_corpus(recipe: Recipe, folder: Path | None) -> Corpus:
    """Read and split the books of a recipe. One without sources reads nothing and is validated on held-out sums.

    Raises ValueError if a held-out title is missing or if a kept book shares long lines with a
    held-out one (another edition of it).
    """
    kept: dict[str, list[Book]] = {}
    validation: list[Book] = []
    held_out: list[Book] = []
    if not recipe.data.sources:
        return Corpus({}, [Book("sums", "".join(map(render, as_turns(split_problems()[1]))))], [])
    if folder is None:
        raise ValueError("the recipe has sources, but there is no corpus folder")
    for name, _ in recipe.data.sources:
        rest, cut = split_held_out(read_books(folder, name), recipe.data.held_out)
        held_out += cut
        kept[name], tail = split_validation(rest, recipe.data.validation_books, recipe.data.validation_share)
        validation += tail
    if len(held_out) != len(recipe.data.held_out):
        raise ValueError(f"held out: {[b.title for b in held_out]}, not the titles asked for")
    corpus = Corpus(kept, validation, held_out)
    shared = shared_lines([*corpus.training, *validation], held_out, LONG_LINE)
    if shared:
        raise ValueError(f"{len(shared)} long lines of held-out books are in kept ones: {shared[:2]}")
    return corpus


def prepare(recipe: Recipe, folder: Path | None, work: Path) -> dict[str, object]:
    """Write everything a run needs into ``work`` and return the report. Raises what :func:`read_corpus` raises."""
    corpus = read_corpus(recipe, folder)
    tokenizer = train_tokenizer(_tokenizer_texts(corpus), recipe.model.vocab_size)
    save_tokenizer(tokenizer, work, recipe.model.max_position_embeddings)
    report = _write(tokenizer, corpus, work)
    if recipe.chat is not None:
        report["chat_tokens"] = _write_chat(recipe, corpus, tokenizer, work)
    write_report(work / "report.json", report)
    return report


def add_chat(recipe: Recipe, folder: Path | None, work: Path) -> int:
    """Write the chat stream beside what :func:`prepare` wrote, by the tokenizer found there; return its tokens.

    Nothing else in the work folder changes. Raises ValueError as :func:`read_corpus`, or without a chat stage.
    """
    return _write_chat(recipe, read_corpus(recipe, folder), load_tokenizer(work), work)


def _tokenizer_texts(corpus: Corpus) -> Iterable[str]:
    """What the tokenizer is trained on: the training books, or where there are none what is said in sums."""
    if corpus.kept:
        return (p for b in corpus.training for p in b.text.split("\n\n\n"))
    return (said for turns in as_turns(split_problems()[0]) for said in (*ROLES, *turns))


def _write(tokenizer: Tokenizer, corpus: Corpus, work: Path) -> dict[str, object]:
    """Write the ids of the books and the plain texts, and return their sizes."""
    eos = special_id(tokenizer, EOS)
    report: dict[str, object] = {}
    for name, books in {**corpus.kept, "validation": corpus.validation}.items():
        ids = encode_books(tokenizer, books, eos)
        write_ids(work / f"{name}.ids", ids)
        report[f"{name}_tokens"] = len(ids)
        report[f"{name}_bytes"] = sum(len(b.text.encode("utf-8")) for b in books)
    # For a compressor that reads it before a held-out book. Such a one weighs most what it read last, so the first
    # source, the nearest to the held-out books, goes last.
    texts = (b.text for books in reversed(corpus.kept.values()) for b in books)
    (work / "training.txt").write_text("\n\n".join(texts), "utf-8")
    (work / "validation.txt").write_text("\n\n".join(b.text for b in corpus.validation), "utf-8")
    sizes = {}
    for book in corpus.held_out:
        (work / f"{book.title}.txt").write_text(book.text, "utf-8")
        sizes[book.title] = len(book.text.encode("utf-8"))
    report["held_out_bytes"] = sizes
    return report


def _write_chat(recipe: Recipe, corpus: Corpus, tokenizer: Tokenizer, work: Path) -> int:
    if recipe.chat is None:
        raise ValueError("the recipe has no chat stage")
    return write_chat(tokenizer, corpus.training, recipe.chat.arithmetic, recipe.train.seed, work)
