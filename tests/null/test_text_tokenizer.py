"""Tokenizer and Detokenizer: round trips, special tokens as text, streaming equal to the whole, damaged files."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

import toytext
from penstock.base import InvalidRequest, ModelFormatError
from penstock.text import Tokenizer, load_tokenizer
from penstock.text.tokenizer import MARKS, any_of, spare_mark

KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": toytext.byte_level,
    "sentencepiece": toytext.sentencepiece,
    "metaspace": toytext.metaspace,
    "unigram": toytext.unigram,
}
MANY = settings(max_examples=3 * settings.default.max_examples)

no_surrogates = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
tricky = st.lists(
    st.sampled_from([*toytext.SPECIAL, *toytext.ADDED, "<|", "im_", "end|>", "<", " ", "\n", "the", "日", *MARKS[:2]]),
    max_size=12,
).map("".join)


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def stories(test_data: Path) -> Tokenizer:
    return load_tokenizer(test_data / "models" / "stories260k", 512)


def streamed(tokenizer: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    detokenizer = tokenizer.detokenizer(**options)
    return [*map(detokenizer.feed, ids), detokenizer.flush()]


# -- text to ids ---------------------------------------------------------------------------------------------------


@given(text=no_surrogates)
@MANY
def test_byte_level_text_survives(text: str) -> None:
    tokenizer = toytext.byte_level()
    assert tokenizer.decode(tokenizer.encode(text, parse_special=False), skip_special_tokens=False) == text


@given(text=st.one_of(no_surrogates, tricky))
@MANY
@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace"])
def test_sentencepiece_text_survives(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    ids = tokenizer.encode(text, parse_special=False, add_special_tokens=False)
    wanted = text.replace("▁", " ")  # the mark itself cannot be told from a blank
    if kind == "metaspace":  # which drops every blank of the first token
        wanted, ids = "x" + wanted, tokenizer.encode("x" + text, parse_special=False, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == wanted


@given(text=tricky)
@MANY
@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_as_text_give_only_ordinary_ids(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    special = set(tokenizer.special_tokens.values()) - {tokenizer.special_tokens.get("<unk>")}
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    assert not special & set(ids)
    assert len(ids) >= len(text) // 12  # the text is there, not dropped


@given(text=tricky)
@MANY
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "metaspace"])
def test_without_special_tokens_in_the_text_parsing_makes_no_difference(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    for token in tokenizer.special_tokens:
        text = text.replace(token, "")
    if not any_of(tokenizer.special_tokens).search(text):
        assert tokenizer.encode(text) == tokenizer.encode(text, parse_special=False)


def test_a_text_without_special_tokens_is_encoded_as_fast_as_any() -> None:
    """Token by token in Python only what holds one."""
    tokenizer = toytext.byte_level.__wrapped__()  # one that nobody has used
    assert tokenizer.encode("the cats", parse_special=False) == tokenizer.encode("the cats") and not tokenizer._literal
    tokenizer.encode("the <|im_end|> cats", parse_special=False)
    assert tokenizer._literal


def test_barrier_makes_text_of_one_token_only(tokenizer: Tokenizer) -> None:
    end = "</s>"
    barred = f"the{end}{MARKS[5]}<{MARKS[5]}/s>{end}"
    ids = tokenizer.encode(barred, barrier=MARKS[5], add_special_tokens=False)
    assert ids.count(tokenizer.special_tokens[end]) == 2
    assert tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "") == f"the{end}{end}{end}"


def test_barrier_before_a_token_of_one_character() -> None:
    backend = Backend.from_str(toytext.byte_level()._backend.to_str())
    backend.add_special_tokens([AddedToken("☃", normalized=False)])
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode(f"☃{MARKS[0]}☃", barrier=MARKS[0])
    assert ids.count(tokenizer.special_tokens["☃"]) == 1
    assert tokenizer.decode(ids, skip_special_tokens=False) == "☃☃"


def test_barrier_alone_changes_nothing(tokenizer: Tokenizer) -> None:
    text = "the </s> cats<s>the"
    assert tokenizer.encode(MARKS[3] + text, barrier=MARKS[3]) == tokenizer.encode(text)
    assert tokenizer.encode("a<|im_start|>b   c", barrier=MARKS[0]) == tokenizer.encode("a<|im_start|>b   c")


def test_bos_is_added_where_the_post_processor_adds_it() -> None:
    llama = toytext.sentencepiece()
    assert llama.encode("the")[0] == 1
    assert llama.encode("the", parse_special=False)[0] == 1
    assert llama.encode("the", add_special_tokens=False)[0] != 1
    assert toytext.byte_level().encode("") == []


@pytest.mark.parametrize("vocabulary", [{"<s>": 0, "</s>": 1, "b": 2}, {"<s>": 0, "</s>": 1, "b": 2, "a": 3}])
def test_what_surrounds_a_text_does_not_depend_on_its_letters(vocabulary: dict[str, int]) -> None:
    """A vocabulary need not know any letter in particular."""
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode("b", parse_special=False) == [0, 2, 1] == tokenizer.encode("b")
    assert tokenizer.encode("", parse_special=False) == [0, 1]
    assert tokenizer.pair_frame() == ([0], [1, 1], [1])


def test_marks_in_a_text_are_text() -> None:
    tokenizer = toytext.byte_level()
    forged = "".join(f"{mark}<|im_end|>{mark}" for mark in MARKS[:-1])
    ids = tokenizer.encode(forged, parse_special=False)
    assert tokenizer.special_tokens["<|im_end|>"] not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == forged
    with pytest.raises(InvalidRequest) as error:
        spare_mark("".join(MARKS))
    assert error.value.code == "unsupported_content"


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "the </s> \ud83d"])
@pytest.mark.parametrize("parse_special", [True, False])
def test_lone_surrogates_are_refused(text: str, parse_special: bool) -> None:
    with pytest.raises(InvalidRequest) as error:
        toytext.byte_level().encode(text, parse_special=parse_special)
    assert error.value.code == "invalid_text"
    assert "surrogate" in str(error.value)


def test_other_refusals() -> None:
    tokenizer = toytext.byte_level()
    with pytest.raises(InvalidRequest, match="bytes"):
        tokenizer.encode(b"x")  # type: ignore[arg-type]
    small = Tokenizer(Backend.from_str(tokenizer._backend.to_str()), vocab_size=300)
    with pytest.raises(InvalidRequest) as error:
        small.encode("a<tool_call>")
    assert error.value.code == "token_out_of_range"


def test_thousands_of_added_tokens_cost_little() -> None:
    words = [f"<unused{i}>" for i in range(5_000)] + ["<", "<<"]
    pattern = any_of(words)
    assert pattern.fullmatch("<unused4999>") and pattern.match("<unused50001>").group() == "<"  # type: ignore[union-attr]
    assert len(pattern.findall("<" * 100_001)) == 50_001  # would not end if each place tried each word
    assert any_of(["a" * n for n in range(1, 1_000)]).match("a" * 900).end() == 900  # type: ignore[union-attr]
    assert not any_of([]).search("x")


# -- ids to text ---------------------------------------------------------------------------------------------------


@given(data=st.data(), skip=st.booleans())
@MANY
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_text_is_the_decoded_text(kind: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = KINDS[kind]()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary.size - 1), max_size=40))
    pieces = streamed(tokenizer, ids, skip_special_tokens=skip)
    whole = "".join(pieces)
    assert whole == tokenizer.decode(ids, skip_special_tokens=skip)
    reference = tokenizer._backend.decode(ids, skip_special_tokens=skip)
    # tokenizers gives up on a whole run of byte tokens if any of it is damaged; we only on the damaged part.
    if kind == "byte_level" or "\ufffd" not in whole + reference:
        assert whole == reference
    for cut in range(len(ids)):  # nothing shown is ever taken back
        assert whole.startswith("".join(pieces[:cut]))


@given(data=st.data(), skip=st.booleans())
@MANY
def test_stories_tokenizer_streams_as_it_decodes(stories: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, 511), max_size=40))
    whole = "".join(streamed(stories, ids, skip_special_tokens=skip))
    reference = stories._backend.decode(ids, skip_special_tokens=skip)
    assert whole == stories.decode(ids, skip_special_tokens=skip)
    assert "\ufffd" in whole or "\ufffd" in reference or whole == reference


@given(text=no_surrogates.filter(lambda text: "\ufffd" not in text))
@MANY
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "metaspace"])
def test_an_unfinished_character_is_never_shown(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    pieces = streamed(tokenizer, tokenizer.encode(text, parse_special=False))
    assert not any("\ufffd" in piece for piece in pieces)


def test_damaged_bytes_become_replacement_characters() -> None:
    tokenizer = toytext.sentencepiece()
    byte = {value: tokenizer._backend.token_to_id(f"<0x{value:02X}>") for value in range(256)}
    assert tokenizer.decode([byte[b] for b in b"\xe6\x97\xa5"]) == "日"
    assert tokenizer.decode([byte[b] for b in b"\xe6\x97\xa5\xff"]) == "日\ufffd"
    pieces = streamed(tokenizer, [byte[b] for b in b"\xe6\x97"])
    assert pieces == ["", "", "\ufffd"]


def test_a_completion_continues_its_prompt() -> None:
    tokenizer = toytext.sentencepiece()
    the = tokenizer._backend.token_to_id("▁the")
    half = [tokenizer._backend.token_to_id(f"<0x{b:02X}>") for b in "🙂".encode()]
    assert tokenizer.detokenizer().feed(the) == "the"
    assert tokenizer.detokenizer(after=[1]).feed(the) == "the"  # bos is no text
    assert tokenizer.detokenizer(after=[1], skip_special_tokens=False).feed(the) == " the"
    assert tokenizer.detokenizer(after=[the, *[1] * 20]).feed(the) == " the"
    assert tokenizer.detokenizer(after=[the]).feed(the) == " the"
    assert tokenizer.detokenizer(after=half[:3]).feed(half[3]) == "🙂"


def test_tokens_by_themselves() -> None:
    tokenizer = toytext.byte_level()
    smile = tokenizer.encode("🙂")
    assert b"".join(map(tokenizer.token_bytes, smile)) == "🙂".encode()
    assert tokenizer.token_text(0) == "<|end|>"
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.decode([10**6, *tokenizer.encode("the")]) == "the"


def test_a_long_stream_costs_the_same_per_token() -> None:
    """Feeding does not look back: the state is a few bytes, whatever came before."""
    tokenizer = toytext.byte_level()
    detokenizer = tokenizer.detokenizer()
    for token in tokenizer.encode("the cats ") * 2_000:
        detokenizer.feed(token)
    assert not any(isinstance(value, (list, bytes, str)) and len(value) > 8 for value in vars(detokenizer).values())


# -- files ---------------------------------------------------------------------------------------------------------


def write_model(folder: Path, **configs: object) -> Path:
    toytext.sentencepiece()._backend.save(str(folder / "tokenizer.json"))
    for name, value in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_vocabulary_from_files(tmp_path: Path) -> None:
    write_model(
        tmp_path,
        tokenizer_config={"bos_token": "<s>", "eos_token": {"content": "</s>"}},
        generation_config={"eos_token_id": [4, 99_999]},
        config={"eos_token_id": 5, "bos_token_id": 7},
    )
    vocabulary = load_tokenizer(tmp_path, 400).vocabulary
    assert (vocabulary.size, vocabulary.eos_ids, vocabulary.bos_id) == (400, {2, 4, 5}, 1)


def test_no_configs_at_all(tmp_path: Path) -> None:
    vocabulary = load_tokenizer(write_model(tmp_path), 400).vocabulary
    assert (vocabulary.eos_ids, vocabulary.bos_id) == (frozenset(), None)


def test_truncation_and_padding_of_the_file_do_not_apply(tmp_path: Path) -> None:
    write_model(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    spec["padding"] = {
        "strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<unk>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert len(load_tokenizer(tmp_path, 400).encode("the the the the the")) == 6


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "null", '{"version":"1.0"}', '{"model":{"type":"BPE"}}', "\x00\xff", '{"a":' * 2_000]
)
def test_files_that_are_no_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelFormatError) as error:
        load_tokenizer(tmp_path, 100)
    assert error.value.code == "tokenizer_invalid"


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    data = (tmp_path / "tokenizer.json").read_bytes()
    for part in range(0, len(data) - 1, len(data) // 40):
        (tmp_path / "tokenizer.json").write_bytes(data[:part])
        with pytest.raises(ModelFormatError):
            load_tokenizer(tmp_path, 400)


@given(data=st.data())
def test_damaged_files_load_or_are_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A mutated tokenizer.json gives a ModelFormatError or a tokenizer that answers or refuses, never anything else."""
    folder = tmp_path_factory.mktemp("damaged")
    write_model(folder)
    content = bytearray((folder / "tokenizer.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=6))
    (folder / "tokenizer.json").write_bytes(content)
    try:
        tokenizer = load_tokenizer(folder, 400)
        tokenizer.decode(tokenizer.encode("the </s> cats 日"))
    except (ModelFormatError, InvalidRequest):
        pass
    shutil.rmtree(folder)


def test_a_pattern_that_explodes_ends_in_an_error() -> None:
    backend = Backend.from_str(toytext.byte_level()._backend.to_str())
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    tokenizer, start = Tokenizer(backend), time.process_time()
    with pytest.raises(InvalidRequest) as error:
        tokenizer.encode("a" * 60 + "!")
    assert error.value.code == "invalid_text" and time.process_time() - start < 10


def test_missing_files_name_themselves(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path / "nowhere", 100)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("a", "b")]),
        decoders.Sequence([decoders.Fuse(), decoders.WordPiece()]),
        decoders.Replace(Regex("(a+)+$"), "b"),  # it could be made to run for ever, one token at a time
    ],
)
def test_decoders_that_cannot_be_streamed_are_refused_by_name(decoder: decoders.Decoder) -> None:
    backend = Backend(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.decoder = decoder
    with pytest.raises(ModelFormatError, match=r"CTC|Replace|WordPiece") as error:
        Tokenizer(backend)
    assert error.value.code == "unsupported_decoder"


TOKENS = ["the", "##s", "##", "do", "n't", "'", "'s", ".", ",", " ", "▁", "▁▁x", "é", "<0x20>", "<0xC3>", "<0xA9>",
          "a</w>", "b</w>", "  ", "xx", "x", "Ġ", "un", "##believ", "日", "?", "!", "'re", "do not"]  # fmt: skip
DECODERS: dict[str, decoders.Decoder | None] = {
    "none": None,
    "wordpiece": decoders.WordPiece(),
    "wordpiece untidied": decoders.WordPiece(cleanup=False),
    "wordpiece of another prefix": decoders.WordPiece("x"),
    "bpe": decoders.BPEDecoder(),
    "metaspace": decoders.Metaspace(),
    "metaspace never": decoders.Metaspace(prepend_scheme="never"),
    "metaspace after bytes": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]),
    "strip both ends": decoders.Sequence([decoders.Fuse(), decoders.Strip("x", 2, 3)]),
    "strip blanks": decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 1)]),
    "strip each": decoders.Strip("x", 1, 1),
    "replace": decoders.Sequence([decoders.Replace("x", "y"), decoders.ByteFallback(), decoders.Fuse()]),
    "byte level": decoders.ByteLevel(),
}


@given(ids=st.lists(st.integers(0, len(TOKENS) - 1), max_size=12))
@settings(max_examples=settings.default.max_examples // 2)
@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_streams_what_the_backend_says(name: str, ids: list[int]) -> None:
    backend = Backend(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="the"))
    if (decoder := DECODERS[name]) is not None:
        backend.decoder = decoder
    if name == "bpe":  # its tokens hold no blanks: the suffix stands for them
        ids = [i for i in ids if " " not in TOKENS[i]]
    if name == "strip each":  # where a token has less than it wants to strip, the backend panics
        ids = [i for i in ids if TOKENS[i] != "x"]
    tokenizer = Tokenizer(backend)
    whole = "".join(streamed(tokenizer, ids))
    assert whole == tokenizer.decode(ids)
    if name not in ("strip both ends", "strip blanks") or "a" in whole:
        assert whole == (reference := backend.decode(ids)) or "\ufffd" in whole + reference


def test_what_is_left_at_the_end_is_held_back() -> None:
    backend = Backend(models.WordLevel({"a</w>": 0, "b": 1}, unk_token="b"))
    backend.decoder = decoders.BPEDecoder()
    detokenizer = Tokenizer(backend).detokenizer()
    assert [detokenizer.feed(i) for i in (0, 0, 1, 0)] == ["a", " a", " b", "a"] and detokenizer.flush() == ""


def test_no_decoder_joins_with_blanks() -> None:
    backend = Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken("<s>")])
    tokenizer = Tokenizer(backend)
    assert tokenizer.decode([0, 2, 1]) == "a b" == backend.decode([0, 2, 1])
