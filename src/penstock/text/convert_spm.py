"""SentencePiece models as ``tokenizers`` objects, with the ids that the sentencepiece library gives.

Kudo & Richardson 2018. A text is normalized, a blank becomes U+2581, user-defined pieces are cut out, and what is
between them is encoded: by merging neighbours whose piece has the highest score (BPE), by the best path (Unigram), or
character by character (CHAR), which is BPE without merges.
Text between two special tokens is encoded as a text of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import NormalizedString, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from penstock.base import ModelFormatError
from penstock.formats import Algorithm, Charsmap, Piece, PieceKind, SentencePieceModel
from penstock.text.added import Added, special, with_added
from penstock.text.convert_bpe import halves

BLANK = "▁"
_PADDING = "<|penstock_unused_{}|>"
_ALL = 1 << 16
_IN_TEXTS = {PieceKind.NORMAL, PieceKind.USER_DEFINED}


def sentencepiece_backend(model: SentencePieceModel, added: Added) -> Backend:
    """The tokenizer of a model, without bos and eos around a text.

    Args:
        added: further tokens, and flags of the model's own.

    Raises:
        ModelFormatError: (tokenizer_unsupported) a kind of model that is not converted.
        ValueError: the model contradicts itself. The Rust side raises other exceptions.
    """
    if reason := _unsupported(model):
        raise ModelFormatError(
            "tokenizer_unsupported",
            "This SentencePiece model cannot be converted",
            why=reason,
            fix="use a folder with tokenizer.json",
        )
    _check_bytes(model)
    outside = {
        i: special(p.text) for i, p in enumerate(model.pieces) if p.kind in (PieceKind.CONTROL, PieceKind.UNKNOWN)
    }
    added = {**outside, **{i: t for i, t in added.items() if t.special or i >= len(model.pieces)}}
    own = {token.content for token in added.values()}
    user = [p.text for p in model.pieces if p.kind is PieceKind.USER_DEFINED and p.text not in own]
    vocabulary = with_added({piece.text: i for i, piece in enumerate(model.pieces)}, added)
    unigram = model.algorithm is Algorithm.UNIGRAM
    backend = Backend(_unigram(model, vocabulary) if unigram else _bpe(model, vocabulary, bool(user)))
    backend.normalizer = _normalizer(model)
    if cuts := _cuts(model, user):
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts])
    backend.decoder = _decoder(model)
    backend.add_tokens([token for _, token in sorted(added.items())])
    return backend


def _unsupported(model: SentencePieceModel) -> str:
    if model.algorithm is Algorithm.WORD:
        return "it is of type WORD; BPE, UNIGRAM and CHAR are converted"
    if model.whitespace_is_suffix or not model.escape_whitespaces:
        return "it does not mark a blank by U+2581 before a word"
    if model.unk_id < 0:
        return "it has no piece for unknown characters"
    return ""


def _check_bytes(model: SentencePieceModel) -> None:
    found = {piece.text for piece in model.pieces if piece.kind is PieceKind.BYTE}
    wanted = {f"<0x{byte:02X}>" for byte in range(256)} if model.byte_fallback else found
    if found != wanted:
        raise ValueError(f"it falls back to bytes and has {len(found & wanted)} of 256 pieces for them")


def _cuts(model: SentencePieceModel, user: Sequence[str]) -> list[str]:
    """Where a normalized text is cut before it is encoded.

    User-defined pieces are cut out. The models of ``tokenizers`` would find every piece in a text, also those that
    SentencePiece never finds, such as "<s>" and "<0x0A>": Unigram anywhere, BPE where one is all that is left between
    two cuts. So these are cut in two.
    """
    cuts = ["|".join(map(re.escape, sorted(user, key=len, reverse=True)))] if user else []
    whole = model.algorithm is not Algorithm.UNIGRAM
    found = {PieceKind.USER_DEFINED} if model.algorithm is Algorithm.CHAR else _IN_TEXTS
    rests: dict[str, list[str]] = {}
    for piece in model.pieces if user or not whole else ():
        if piece.kind not in found and len(piece.text) > 1:
            rests.setdefault(re.escape(piece.text[0]), []).append(re.escape(piece.text[1:]))
    start, end = (r"\A", r"\z") if whole else ("", "")
    return [*cuts, *(f"(?<={start}{first})(?=(?:{'|'.join(rest)}){end})" for first, rest in rests.items())]


def _bpe(model: SentencePieceModel, vocabulary: dict[str, int], has_user_pieces: bool) -> models.BPE:
    return models.BPE(
        vocab=vocabulary,
        merges=merges_by_score(model.pieces) if model.algorithm is Algorithm.BPE else [],
        unk_token=model.pieces[model.unk_id].text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        ignore_merges=has_user_pieces,  # a piece that is cut out becomes its id even if no merges lead to it
    )


def merges_by_score(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, pieces of the highest score first.

    As in SentencePiece, only normal pieces arise from merging: not "<s>" from the text "<s>".
    """
    mergeable = {piece.text: i for i, piece in enumerate(pieces) if piece.kind is PieceKind.NORMAL}
    merges: list[tuple[str, str]] = []
    for text, _ in sorted(mergeable.items(), key=lambda item: (-pieces[item[1]].score, item[1])):
        merges += halves(text, mergeable)
    return merges


def _unigram(model: SentencePieceModel, vocabulary: dict[str, int]) -> models.Unigram:
    """Pieces that are never found in a text get a score that does not change the one of unknown characters."""
    normal = [piece.score for piece in model.pieces if piece.kind is PieceKind.NORMAL]
    lowest = min(normal, default=0.0)
    scored = [(piece.text, piece.score if piece.kind in _IN_TEXTS else lowest) for piece in model.pieces]
    texts = {i: text for text, i in vocabulary.items()}
    scored += [(texts.get(i, _PADDING.format(i)), lowest) for i in range(len(scored), max(texts) + 1)]
    return models.Unigram(scored, unk_id=model.unk_id, byte_fallback=model.byte_fallback)


class _Rules:
    """A charsmap as a normalizer. That of ``tokenizers`` replaces whole graphemes: CR LF by a single blank."""

    def __init__(self, charsmap: Charsmap) -> None:
        self._charsmap = charsmap

    def normalize(self, text: NormalizedString) -> None:
        new = self._charsmap.apply(text.normalized)
        text.clear()
        text.append(new)


def _normalizer(model: SentencePieceModel) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap is not None:
        steps.append(normalizers.Normalizer.custom(_Rules(model.charsmap)))
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(BLANK))
    steps.append(normalizers.Replace(" ", BLANK))
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"{BLANK}+\z"), ""))
    return normalizers.Sequence(steps)


def _decoder(model: SentencePieceModel) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix or model.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", _ALL if model.remove_extra_whitespaces else 1, 0))
    return decoders.Sequence(steps)
