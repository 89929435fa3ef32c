"""The vocabulary of a GGUF file as a ``tokenizers`` object (ggml-org/ggml, docs/gguf.md, "Tokenizer")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from penstock.base import ModelFormatError
from penstock.formats import Algorithm, Piece, PieceKind, SentencePieceModel, check_pieces
from penstock.text.added import MAX_TOKENS, Converted, special, surround
from penstock.text.convert_bpe import COMPOSED, SPLITS, byte_level_backend, parse_merges
from penstock.text.convert_spm import BLANK, sentencepiece_backend
from penstock.text.convert_wordpiece import wordpiece_backend

_KEY = "tokenizer.ggml."

SPLIT_OF = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat"), "gpt2"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"), "llama3"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), "qwen2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"), "starcoder"),
    **dict.fromkeys(("gpt-4o", "llama4"), "o200k"),
    **dict.fromkeys(("tekken", "deepseek-coder", "deepseek-v3"), ""),  # called the same here
}
"""tokenizer.ggml.pre -> key of SPLITS; "" for the same name."""

_LIKE_LLAMA3 = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"})
"""Whose words are tokens whatever the merges say, and whose texts begin with bos unless the file says otherwise."""


def gguf_converted(metadata: Mapping[str, Any]) -> Converted:
    """The tokenizer that a file's metadata describe.

    Raises:
        ModelFormatError: (tokenizer_unsupported) a kind that is not converted.
        ValueError: what is there is damaged. The Rust side raises other exceptions.
    """
    model = metadata.get(_KEY + "model")
    if model not in ("llama", "gpt2", "bert"):
        raise _unsupported(f"tokenizer.ggml.model is {str(model)[:60]!r}; llama, gpt2 and bert are converted")
    pieces = _pieces(metadata)
    bos, eos = _id(metadata, "bos_token_id", pieces), _id(metadata, "eos_token_id", pieces)
    if model == "llama":
        backend = _sentencepiece(metadata, pieces, bos, eos)
    elif model == "gpt2":
        backend = _byte_level(metadata, pieces)
    else:
        vocabulary = {_wordpiece_text(piece.text): i for i, piece in enumerate(pieces)}
        cls, sep = _id(metadata, "cls_token_id", pieces), _id(metadata, "seperator_token_id", pieces)
        return Converted(backend=wordpiece_backend(vocabulary, {}, bos if cls is None else cls, sep))
    by_default = model == "llama" or metadata.get(_KEY + "pre") in _LIKE_LLAMA3
    add_bos = metadata.get(_KEY + "add_bos_token", by_default) is True
    add_eos = metadata.get(_KEY + "add_eos_token") is True
    surround(backend, bos if add_bos else None, eos if add_eos else None)
    ends = (eos, *(_id(metadata, name, pieces) for name in ("eot_token_id", "eom_token_id")))
    return Converted(backend=backend, bos_id=bos, eos_ids=tuple(i for i in ends if i is not None))


def _pieces(metadata: Mapping[str, Any]) -> list[Piece]:
    texts = metadata.get(_KEY + "tokens")
    if not isinstance(texts, list) or not texts or not isinstance(texts[0], str) or len(texts) > MAX_TOKENS:
        raise ValueError("it has no list of tokens")
    scores = metadata.get(_KEY + "scores", [0.0] * len(texts))
    kinds = metadata.get(_KEY + "token_type", [PieceKind.NORMAL] * len(texts))
    for name, values, kind in (("scores", scores, float), ("types", kinds, int)):
        if not isinstance(values, list) or len(values) != len(texts) or not isinstance(values[0], kind):
            raise ValueError(f"it has no {name} for its {len(texts)} tokens")
    pieces = [Piece(*parts) for parts in zip(texts, scores, map(PieceKind, kinds), strict=True)]
    check_pieces(pieces)
    return pieces


def _id(metadata: Mapping[str, Any], name: str, pieces: Sequence[Piece]) -> int | None:
    value = metadata.get(_KEY + name)
    if value is not None and (type(value) is not int or not 0 <= value < len(pieces)):
        raise ValueError(f"{name} is {str(value)[:40]}, there are {len(pieces)} tokens")
    return value


def _sentencepiece(metadata: Mapping[str, Any], pieces: list[Piece], bos: int | None, eos: int | None) -> Backend:
    unknown = next((i for i, piece in enumerate(pieces) if piece.kind is PieceKind.UNKNOWN), -1)
    model = SentencePieceModel(
        pieces=tuple(pieces),
        algorithm=Algorithm.BPE,
        byte_fallback=any(piece.kind is PieceKind.BYTE for piece in pieces),
        unk_id=unknown,
        bos_id=-1 if bos is None else bos,
        eos_id=-1 if eos is None else eos,
        add_dummy_prefix=metadata.get(_KEY + "add_space_prefix", True) is True,
        remove_extra_whitespaces=metadata.get(_KEY + "remove_extra_whitespaces") is True,
    )
    return sentencepiece_backend(model, {})


def _byte_level(metadata: Mapping[str, Any], pieces: list[Piece]) -> Backend:
    name = metadata.get(_KEY + "pre")
    if not isinstance(name, str) or name not in SPLIT_OF:
        raise _unsupported(f"tokenizer.ggml.pre is {str(name)[:60]!r}; known are {', '.join(SPLIT_OF)}")
    merges = metadata.get(_KEY + "merges", [])
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise ValueError("its merges are not a list of texts")
    added: dict[int, AddedToken] = {}
    for i, piece in enumerate(pieces):
        if piece.kind in (PieceKind.CONTROL, PieceKind.USER_DEFINED, PieceKind.UNKNOWN):
            added[i] = special(piece.text, piece.kind is not PieceKind.USER_DEFINED)
    split = SPLIT_OF[name] or name
    vocabulary = {piece.text: i for i, piece in enumerate(pieces)}
    whole, composed = name in _LIKE_LLAMA3, split in COMPOSED
    return byte_level_backend(
        vocabulary, parse_merges(merges), SPLITS[split], added, composed=composed, whole_words=whole
    )


def _wordpiece_text(text: str) -> str:
    """GGUF marks the beginnings of words instead of their continuations."""
    if text.startswith(BLANK):
        return text[1:] or text
    return text if text.startswith("[") and text.endswith("]") else f"##{text}"


def _unsupported(why: str) -> ModelFormatError:
    return ModelFormatError(
        "tokenizer_unsupported",
        "The vocabulary of this GGUF file cannot be converted",
        why=why[:400],
        fix="use a folder with tokenizer.json",
    )
