"""SentencePiece models, tiktoken ranks and their parts: what is read, and that damage is refused."""

from __future__ import annotations

import random
import struct
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.base import ModelFormatError
from penstock.formats import (
    Algorithm,
    Charsmap,
    PieceKind,
    parse_ranks,
    parse_sentencepiece,
    read_ranks,
    read_sentencepiece,
)
from penstock.formats.protobuf import WireError, fields, signed
from sentencepiece_files import message, model, number, trained, varint

PIECES = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("▁", -1.0, 1), ("a", -2.0, 1), ("▁a", -0.5, 1)]


# -- protobuf --------------------------------------------------------------------------------------------------------


def test_every_wire_type() -> None:
    data = number(1, 150) + number(2, -1) + message(3, b"xyz") + b"\x25" + struct.pack("<f", 0.5) + b"\x29" + bytes(8)
    assert list(fields(data)) == [(1, 150), (2, 2**64 - 1), (3, b"xyz"), (4, 0.5), (5, bytes(8))]
    assert signed(2**64 - 1) == -1 and signed(7) == 7


@pytest.mark.parametrize(
    "data",
    [b"\x80", b"\x08", b"\x08\x80", b"\x0a\x05abc", b"\x0a" + b"\xff" * 11, b"\x00\x00", b"\x0b\x0c", b"\x0d\x00",
     b"\x09\x00", b"\x0a" + varint(2**63), b"\x0f\x01"],
)  # fmt: skip
def test_what_is_no_message(data: bytes) -> None:
    with pytest.raises(WireError):
        list(fields(data))


# -- SentencePiece ---------------------------------------------------------------------------------------------------


def test_a_model_is_what_the_library_says_it_is() -> None:
    data = trained("bpe", True, True, False, "identity", True)
    ours, theirs = parse_sentencepiece(data), sentencepiece.SentencePieceProcessor(model_proto=data)
    assert len(ours.pieces) == theirs.get_piece_size()
    for i, piece in enumerate(ours.pieces):
        assert (piece.text, piece.score) == (theirs.id_to_piece(i), theirs.get_score(i))
        assert (piece.kind is PieceKind.CONTROL) == theirs.is_control(i)
        assert (piece.kind is PieceKind.BYTE) == theirs.is_byte(i)
    assert (ours.unk_id, ours.bos_id, ours.eos_id) == (theirs.unk_id(), theirs.bos_id(), theirs.eos_id())
    assert ours.byte_fallback and ours.add_dummy_prefix and not ours.remove_extra_whitespaces
    assert ours.algorithm is Algorithm.BPE


def test_what_is_left_out_has_its_default() -> None:
    parsed = parse_sentencepiece(model(PIECES))
    assert (parsed.unk_id, parsed.bos_id, parsed.eos_id) == (0, 1, 2)
    assert parsed.add_dummy_prefix and parsed.remove_extra_whitespaces and parsed.charsmap is None
    assert parse_sentencepiece(model(PIECES, trainer=number(41, -1))).bos_id == -1


BAD_MODELS: dict[str, bytes] = {
    "empty": b"",
    "no pieces": message(2, number(3, 2)),
    "an empty piece": model([*PIECES, ("", 0.0, 1)]),
    "a long piece": model([*PIECES, ("x" * 513, 0.0, 1)]),
    "a piece twice": model([*PIECES, ("a", 0.0, 1)]),
    "a score that is none": model([*PIECES, ("b", float("nan"), 1)]),
    "an infinite score": model([*PIECES, ("b", float("inf"), 1)]),
    "an unknown kind": model([*PIECES, ("b", 0.0, 9)]),
    "an unknown algorithm": model(PIECES).replace(message(2, number(3, 2)), message(2, number(3, 7))),
    "a piece that is a number": number(1, 3),
    "not UTF-8": message(1, message(1, b"\xff")),
    "an id beyond the pieces": model(PIECES, trainer=number(41, 6)),
    "a charsmap that is too short": model(PIECES, normalizer=message(2, b"\x01")),
    "a charsmap without its trie": model(PIECES, normalizer=message(2, struct.pack("<I", 2**31) + bytes(9))),
    "a charsmap that inflates": model(PIECES, normalizer=message(2, struct.pack("<II", 4, 0) + b"x" * 999 + b"\0")),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_models_that_are_none(tmp_path: Path, kind: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(BAD_MODELS[kind])
    with pytest.raises(ModelFormatError) as error:
        read_sentencepiece(tmp_path / "tokenizer.model")
    assert error.value.code == "tokenizer_invalid"


@pytest.mark.parametrize("read", [read_sentencepiece, read_ranks])
def test_files_that_are_not_there_or_too_large(
    tmp_path: Path, read: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelFormatError) as error:
        read(tmp_path / "tokenizer.model")
    assert error.value.code == "file_missing"
    monkeypatch.setattr("penstock.formats.sentencepiece.MAX_MODEL_BYTES", 10)
    monkeypatch.setattr("penstock.formats.tiktoken.MAX_RANK_BYTES", 10)
    (tmp_path / "tokenizer.model").write_bytes(bytes(11))
    with pytest.raises(ModelFormatError, match="larger than 10 bytes") as error:
        read(tmp_path / "tokenizer.model")
    assert error.value.code == "tokenizer_invalid"


@pytest.fixture(scope="module")
def nfkc() -> Charsmap:
    charsmap = parse_sentencepiece(trained("unigram", False, False, False, "nmt_nfkc", False)).charsmap
    assert charsmap is not None
    return charsmap


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20))
@settings(max_examples=3 * settings.default.max_examples)
def test_rules_do_what_the_library_does(nfkc: Charsmap, text: str) -> None:
    oracle = sentencepiece.SentencePieceNormalizer(
        rule_name="nmt_nfkc", add_dummy_prefix=False, remove_extra_whitespaces=False, escape_whitespaces=False
    )
    assert nfkc.apply(text) == oracle.normalize(text)


def test_the_longest_rule_wins(nfkc: Charsmap) -> None:
    assert nfkc.apply("ｶﾞｶ e\u0301e ﬁ\r\nⅧ\u200b") == "ガカ ée fi  VIII "
    assert nfkc.apply("") == "" and nfkc.apply("x" * 1000) == "x" * 1000


@given(data=st.binary(min_size=8, max_size=200), text=st.text(max_size=10))
def test_a_damaged_charsmap_replaces_something_or_nothing(data: bytes, text: str) -> None:
    trie = len(data) // 2 // 4 * 4 or 4
    charsmap = Charsmap(struct.pack("<I", trie) + data.ljust(trie) + b"\0")
    assert len(charsmap.apply(text)) <= 256 * len(text)


# -- tiktoken --------------------------------------------------------------------------------------------------------


def ranks_file(tokens: list[bytes]) -> bytes:
    return b"".join(b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))


BYTES = [bytes([i]) for i in range(256)]


def test_ranks() -> None:
    assert parse_ranks(ranks_file([*BYTES, b"ab", b"abc"])) == {t: i for i, t in enumerate([*BYTES, b"ab", b"abc"])}
    assert parse_ranks(ranks_file(BYTES).replace(b"\n", b"\r\n")) == {token: i for i, token in enumerate(BYTES)}


BAD_RANKS: dict[str, bytes] = {
    "empty": b"",
    "not base64": ranks_file(BYTES) + b"?? 256\n",
    "no rank": ranks_file(BYTES) + b"YWI=\n",
    "three words": ranks_file(BYTES) + b"YWI= 256 1\n",
    "not a number": ranks_file(BYTES) + b"YWI= x\n",
    "a gap": ranks_file(BYTES) + b"YWI= 257\n",
    "negative": ranks_file(BYTES) + b"YWI= -1\n",
    "enormous": ranks_file(BYTES) + b"YWI= " + b"9" * 5000,
    "a token twice": ranks_file([*BYTES, b"ab", b"ab"]),
    "a token that is empty": ranks_file([*BYTES, b""]),
    "a long token": ranks_file([*BYTES, b"x" * 513]),
    "a byte without a token": ranks_file(BYTES[:-1]),
    "a blank line": ranks_file(BYTES) + b"\n",
    "binary": bytes(range(256)),
}


@pytest.mark.parametrize("kind", BAD_RANKS)
def test_ranks_that_are_none(tmp_path: Path, kind: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(BAD_RANKS[kind])
    with pytest.raises(ModelFormatError) as error:
        read_ranks(tmp_path / "tokenizer.model")
    assert error.value.code == "tokenizer_invalid"


# -- damage ----------------------------------------------------------------------------------------------------------


def damage(seeds: range) -> int:
    """How many of the damaged models and rank files are refused; nothing but a ValueError may come of one."""
    whole = {parse_sentencepiece: model(PIECES, trainer=number(41, 1)), parse_ranks: ranks_file(BYTES)}
    whole[parse_sentencepiece] += trained("bpe", False, True, True, "nmt_nfkc", True)[-4000:]
    refused = 0
    for seed in seeds:
        rng = random.Random(seed)
        for parse, data in whole.items():
            damaged = bytearray(data)
            for _ in range(rng.randint(1, 4)):
                place = rng.randrange(len(damaged))
                damaged[place : place + rng.randint(0, 9)] = rng.randbytes(rng.choice([0, 1, 1, 4]))
            try:
                parse(bytes(damaged))
            except ValueError:
                refused += 1
    return refused


def test_random_damage_raises_nothing_else() -> None:
    assert damage(range(300)) > 200


@pytest.mark.slow
def test_much_random_damage_raises_nothing_else() -> None:
    assert damage(range(1_000, 6_000)) > 3_000
