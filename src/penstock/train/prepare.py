"""Corpus folder -> work folder: tokenizer, token ids, held-out texts and a report."""

from __future__ import annotations

from pathlib import Path

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
from penstock.train.tokenizer import EOS, save_tokenizer, special_id, train_tokenizer

#: A line this long is prose of one book, not a stock phrase.
LONG_LINE = 120


def prepare(recipe: Recipe, corpus: Path, work: Path) -> dict[str, object]:
    """Write everything a run needs into ``work`` and return the report.

    Raises ValueError if a held-out title is missing or if a kept book shares long lines with a
    held-out one (another edition of it).
    """
    kept: dict[str, list[Book]] = {}
    validation: list[Book] = []
    held_out: list[Book] = []
    for name, _ in recipe.data.sources:
        rest, cut = split_held_out(read_books(corpus, name), recipe.data.held_out)
        held_out += cut
        kept[name], tail = split_validation(rest, recipe.data.validation_books, recipe.data.validation_share)
        validation += tail
    if len(held_out) != len(recipe.data.held_out):
        raise ValueError(f"held out: {[b.title for b in held_out]}, not the titles asked for")
    everything = [b for books in kept.values() for b in books] + validation
    shared = shared_lines(everything, held_out, LONG_LINE)
    if shared:
        raise ValueError(f"{len(shared)} long lines of held-out books are in kept ones: {shared[:2]}")
    return _write(recipe, work, kept, validation, held_out)


def _write(
    recipe: Recipe,
    work: Path,
    kept: dict[str, list[Book]],
    validation: list[Book],
    held_out: list[Book],
) -> dict[str, object]:
    """Train the tokenizer on the kept books, encode them and write all files."""
    work.mkdir(parents=True, exist_ok=True)
    texts = (p for books in kept.values() for b in books for p in b.text.split("\n\n\n"))
    tokenizer = train_tokenizer(texts, recipe.model.vocab_size)
    save_tokenizer(tokenizer, work, recipe.model.max_position_embeddings)
    eos = special_id(tokenizer, EOS)
    report: dict[str, object] = {}
    for name, books in {**kept, "validation": validation}.items():
        ids = encode_books(tokenizer, books, eos)
        write_ids(work / f"{name}.ids", ids)
        report[f"{name}_tokens"] = len(ids)
        report[f"{name}_bytes"] = sum(len(b.text.encode("utf-8")) for b in books)
    # For a compressor that reads it before a held-out book. Such a one weighs most what it read last, so the first
    # source, the nearest to the held-out books, goes last.
    texts = (b.text for books in reversed(kept.values()) for b in books)
    (work / "training.txt").write_text("\n\n".join(texts), "utf-8")
    (work / "validation.txt").write_text("\n\n".join(b.text for b in validation), "utf-8")
    sizes = {}
    for book in held_out:
        (work / f"{book.title}.txt").write_text(book.text, "utf-8")
        sizes[book.title] = len(book.text.encode("utf-8"))
    report["held_out_bytes"] = sizes
    write_report(work / "report.json", report)
    return report
