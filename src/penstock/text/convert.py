"""Finding and reading the tokenizer of a model that has no tokenizer.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer as Backend

from penstock.base import ModelFormatError
from penstock.formats import looks_like_sentencepiece, read_gguf, read_ranks, read_sentencepiece, read_tekken
from penstock.text.added import Added, Converted, optional_json, read_added, surround
from penstock.text.convert_bpe import merges_backend, ranks_backend, tekken_backend
from penstock.text.convert_gguf import gguf_converted
from penstock.text.convert_spm import sentencepiece_backend
from penstock.text.convert_wordpiece import wordpiece_folder

_FILES = ("tekken.json", "tokenizer.model", "tiktoken.model", "*.tiktoken", "tokenizer.model.v*", "*.model.v*")
"""Files that are a tokenizer by themselves, the likeliest first."""


def convert_folder(folder: Path, config: Mapping[str, Any]) -> Converted:
    """The tokenizer of a folder, from the best of the files it has.

    Args:
        config: tokenizer_config.json.

    Raises:
        ModelFormatError: file_missing (it has none), tokenizer_invalid, tokenizer_unsupported, json_invalid, and
            those of GGUFFile.
    """
    source, build = _source(folder, config)
    return usable(source, lambda: build(read_added(folder, config)))


def convert_file(path: Path) -> Converted:
    """The tokenizer of one file by itself: a GGUF file, a SentencePiece model, tiktoken ranks, or a tekken.json.

    Raises:
        ModelFormatError: as ``convert_folder``.
    """
    return usable(path, lambda: _from_file(path, {}, {}))


def usable(source: Path, build: Callable[[], Converted]) -> Converted:
    """What ``build`` makes, after a trial.

    Raises:
        ModelFormatError: (tokenizer_invalid) ``build`` raised anything else, or the outcome does not work.
    """
    try:
        converted = build()
        converted.backend.encode("a b")  # a file can be read and still not work
        return converted
    except (KeyboardInterrupt, SystemExit, MemoryError, ModelFormatError):
        raise
    except BaseException as error:  # a panic of the Rust side is not an Exception
        raise ModelFormatError(
            "tokenizer_invalid",
            f"{source} is not a usable tokenizer",
            why=str(error)[:300],
            fix=f"download the file again; it must suit tokenizers {tokenizers.__version__}",
        ) from None


def _source(folder: Path, config: Mapping[str, Any]) -> tuple[Path, Callable[[Added], Converted]]:
    for pattern in _FILES:
        if found := sorted(folder.glob(pattern)):
            return found[-1], lambda added: _from_file(found[-1], config, added)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        model_type = optional_json(folder / "config.json").get("model_type")
        return folder, lambda added: merges_backend(folder, config, model_type, added)
    if (folder / "vocab.txt").exists():
        return folder / "vocab.txt", lambda added: wordpiece_folder(folder, config, added)
    if found := sorted(folder.glob("*.gguf")):
        return found[0], lambda added: _from_file(found[0], config, added)
    raise ModelFormatError(
        "file_missing",
        f"There is no tokenizer in {folder}",
        why="it has no tokenizer.json, tekken.json, tokenizer.model, *.tiktoken, vocab.json with merges.txt, vocab.txt "
        "or *.gguf",
        fix="check that the model folder was downloaded completely",
    )


def _from_file(path: Path, config: Mapping[str, Any], added: Added) -> Converted:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError:
        start = b""  # the reader says what is wrong
    add_bos = config.get("add_bos_token")
    if path.suffix == ".json":
        return tekken_backend(read_tekken(path), add_bos=add_bos if isinstance(add_bos, bool) else None)
    if start == b"GGUF" or path.suffix == ".gguf":  # a damaged one is not to be taken for another kind
        return gguf_converted(read_gguf(path).metadata)
    if not looks_like_sentencepiece(start):
        return ranks_backend(read_ranks(path), added, add_bos=add_bos if isinstance(add_bos, bool) else None)
    model = read_sentencepiece(path)
    backend: Backend = sentencepiece_backend(model, added)
    bos, eos = (None if i < 0 else i for i in (model.bos_id, model.eos_id))
    surround(backend, bos if add_bos is not False else None, eos if config.get("add_eos_token") is True else None)
    return Converted(backend=backend, bos_id=bos, eos_ids=() if eos is None else (eos,))
