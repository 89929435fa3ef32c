"""Tokenizers that are not tokenizer.json against their own libraries, and against llama.cpp's vectors."""

from __future__ import annotations

import itertools
import json
import random
import time
from base64 import b64encode
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pytest
import regex
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertTokenizer

from gguf_files import ARRAY, STRING, gguf, vocabulary
from penstock.base import InvalidRequest, ModelFormatError
from penstock.formats import read_ranks
from penstock.text import ChatTemplate, Tokenizer, load_chat_template, load_tokenizer
from sentencepiece_files import BITS, model, number, trained, tricky_text

BYTES = [bytes([i]) for i in range(256)]
FILES = {
    "llama2": "llama2",
    "llama3": "llama3",
    "llama4": "llama4",
    "mistral-v1": "mistral/tokenizer.model.v1",
    "mistral-v3": "mistral/mistral_instruct_tokenizer_240323.model.v3",
    "mistral-v7": "mistral/mistral_instruct_tokenizer_241114.model.v7",
    "qwen2": "qwen2",
    "gpt-2": "llama_cpp_vectors/ggml-vocab-gpt-2.gguf",
    "llama-spm": "llama_cpp_vectors/ggml-vocab-llama-spm.gguf",
    "deepseek-coder": "llama_cpp_vectors/ggml-vocab-deepseek-coder.gguf",
}
SENTENCEPIECE = {"llama2": "llama2/tokenizer.model"} | {name: FILES[name] for name in FILES if "mistral" in name}
VECTORS = {
    "llama-spm": "llama-spm",
    "gpt-2": "gpt-2",
    "deepseek-coder": "deepseek-coder",
    "llama-bpe": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
}
SOME = settings(max_examples=max(20, settings.default.max_examples // 2))

texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.lists(st.sampled_from(BITS), max_size=12).map("".join),
)


@pytest.fixture(scope="module")
def get(test_data: Path) -> Callable[[str], Tokenizer]:
    return cache(lambda name: load_tokenizer(test_data / "tokenizers" / FILES[name]))


@pytest.fixture(scope="module")
def sample(test_data: Path) -> str:
    return "".join(path.read_text("utf-8")[5_000:9_000] for path in sorted(test_data.glob("corpus/**/*.txt"))[:4])


# -- the same ids as others ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectors", VECTORS)
def test_llama_cpp_vectors(get: Callable[[str], Tokenizer], test_data: Path, vectors: str) -> None:
    path = test_data / "tokenizers" / "llama_cpp_vectors" / f"ggml-vocab-{vectors}.gguf"
    inputs = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    outputs = [[int(i) for i in line.split()] for line in Path(f"{path}.out").read_text().split("\n")]
    assert len(inputs) == len(outputs) == 47
    tokenizer = get(VECTORS[vectors])
    for text, ids in zip(inputs, outputs, strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer.encode(text, add_special_tokens=False, parse_special=False) == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@given(text=texts)
@SOME
@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_files_encode_as_sentencepiece_does(
    get: Callable[[str], Tokenizer], test_data: Path, name: str, text: str
) -> None:
    oracle = _library(test_data / "tokenizers" / SENTENCEPIECE[name])
    ids = oracle.encode(text)
    assert get(name).encode(text, add_special_tokens=False, parse_special=False) == ids
    assert get(name).decode(ids, skip_special_tokens=False) == text.replace("▁", " ")


@cache
def _library(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


GRID = list(
    itertools.product(["bpe", "unigram", "char"], *[[False, True]] * 3, ["identity", "nmt_nfkc"], [False, True])
)


@pytest.mark.parametrize("kind", GRID, ids=lambda kind: "-".join(map(str, kind)))
def test_trained_models_encode_as_sentencepiece_does(
    tmp_path: Path, kind: tuple[str, bool, bool, bool, str, bool]
) -> None:
    """Every algorithm, byte fallback, dummy prefix, blanks kept or not, normalization, and user-defined pieces."""
    (tmp_path / "tokenizer.model").write_bytes(trained(*kind))
    tokenizer = load_tokenizer(tmp_path)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=trained(*kind))
    rng = random.Random(str(kind))
    for text in ["", " ", "the", "<unk>", "<s>", "[CTL]", "<0x0A>", "[USER]", *(tricky_text(rng) for _ in range(60))]:
        ids, unknown = oracle.encode(text), oracle.unk_id()
        ours = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        if "[CTL]" in text:  # cut in two so that it is not found, which cuts a run of unknown characters as well
            ours = [i for i, before in zip(ours, [-1, *ours], strict=False) if not i == before == unknown]
        assert ours == ids, text
        if unknown not in ids:  # which the library writes as ⁇
            assert tokenizer.decode(ids, skip_special_tokens=False) == oracle.decode(ids), text


def test_an_unknown_character_costs_what_it_costs_in_sentencepiece(tmp_path: Path) -> None:
    """ "ca" and "b", or an unknown "c" and the likely "ab": the price of the unknown one decides."""
    outcomes = set()
    for score in (-2.0, -8.0):
        pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("▁", -1.0, 1), ("a", -3.0, 1), ("b", -15.0, 1)]
        data = model([*pieces, ("ca", -15.0, 1), ("ab", score, 1)], trainer=number(3, 1))
        (tmp_path / "tokenizer.model").write_bytes(data)
        ids = sentencepiece.SentencePieceProcessor(model_proto=data).encode("cab")
        assert load_tokenizer(tmp_path).encode("cab", add_special_tokens=False) == ids
        outcomes.add(tuple(ids))
    assert len(outcomes) == 2


PATTERNS = {
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama4": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def by_ranks(text: str, pattern: str, ranks: dict[bytes, int]) -> list[int]:
    """The definition: cut the text, then merge the neighbours that form the token of lowest rank, leftmost first."""
    ids = []
    for word in regex.findall(pattern, text):
        parts = [bytes([byte]) for byte in word.encode()]
        if word.encode() in ranks:
            parts = [word.encode()]
        while len(parts) > 1:
            pairs = [(ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
            rank, i = min(pairs)
            if rank == 1 << 30:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@given(text=texts)
@SOME
@pytest.mark.parametrize("name", PATTERNS)
def test_rank_files_encode_by_definition(
    get: Callable[[str], Tokenizer], test_data: Path, name: str, text: str
) -> None:
    ids = by_ranks(text, PATTERNS[name], _ranks(test_data / "tokenizers" / name / "tokenizer.model"))
    assert get(name).encode(text, add_special_tokens=False, parse_special=False) == ids


_ranks = cache(read_ranks)


TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def tekken(ranks: Iterable[bytes], *, special: object = None, reserved: int = 30, unused: int = 0) -> bytes:
    vocab = [{"rank": i, "token_bytes": b64encode(token).decode(), "token_str": None} for i, token in enumerate(ranks)]
    size = reserved + len(vocab) - unused
    config = {"pattern": TEKKEN, "default_vocab_size": size, "default_num_special_tokens": reserved, "version": "v3"}
    return json.dumps({"config": config, "vocab": vocab, "special_tokens": special}).encode()


def test_a_tekken_file_encodes_by_definition(tmp_path: Path, test_data: Path, sample: str) -> None:
    """No tekken.json can be had here: the ranks are those of Llama 4 in Mistral's form, of which the last 5,000 are
    listed and not used."""
    ranks = _ranks(test_data / "tokenizers" / "llama4" / "tokenizer.model")
    (tmp_path / "tekken.json").write_bytes(tekken(ranks, unused=5_000))
    used = {token: rank for token, rank in ranks.items() if rank < len(ranks) - 5_000}
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocabulary.size == len(used) + 30
    for text in (sample[:6000], *BITS, "naïve 12345 it's\r\n\n  x", "<s>[INST]"):
        ids = tokenizer.encode(text, parse_special=False)
        assert ids == [1, *(30 + i for i in by_ranks(text, TEKKEN, used))], text
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("[INST]x</s>", add_special_tokens=False)[::2] == [3, 2]
    assert (tokenizer.vocabulary.bos_id, tokenizer.vocabulary.eos_ids) == (1, {2})
    assert tokenizer.special_tokens["[TOOL_CONTENT]"] == 19 and tokenizer.special_tokens["<SPECIAL_29>"] == 29


def test_special_tokens_of_a_tekken_file(tmp_path: Path) -> None:
    listed = [{"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(["<unk>", "<s>", "[THINK]"])]
    (tmp_path / "tekken.json").write_bytes(tekken(BYTES, special=listed, reserved=4))
    tokenizer = load_tokenizer(tmp_path / "tekken.json")
    assert tokenizer.special_tokens == {"<unk>": 0, "<s>": 1, "[THINK]": 2, "<SPECIAL_3>": 3}
    assert tokenizer.encode("[THINK]!") == [1, 2, 4 + ord("!")] and tokenizer.vocabulary.eos_ids == frozenset()
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert load_tokenizer(tmp_path).encode("!") == [4 + ord("!")]
    (tmp_path / "tokenizer.model.v7").write_bytes(model([("<unk>", 0.0, 2), ("x", 0.0, 1)]))
    assert load_tokenizer(tmp_path).vocabulary.size == 260  # the newer of Mistral's two files is read


@pytest.mark.parametrize("name", PATTERNS)
def test_rank_files_encode_prose_by_definition(
    get: Callable[[str], Tokenizer], test_data: Path, sample: str, name: str
) -> None:
    ids = by_ranks(sample, PATTERNS[name], _ranks(test_data / "tokenizers" / name / "tokenizer.model"))
    assert len(ids) > 1_000 and get(name).encode(sample, add_special_tokens=False) == ids


def test_rank_files_know_their_families(get: Callable[[str], Tokenizer]) -> None:
    llama3, llama4 = get("llama3"), get("llama4")
    assert (llama3.vocabulary.size, llama4.vocabulary.size) == (128_256, 202_048)
    assert llama3.special_tokens["<|eot_id|>"] == 128_009 and llama4.special_tokens["<|eot|>"] == 200_008
    assert llama4.special_tokens["<|reasoning_thinking_end|>"] == 201_143
    assert llama3.encode("a")[0] == llama3.vocabulary.bos_id == 128_000
    assert llama4.vocabulary.bos_id == 200_000 and llama4.vocabulary.eos_ids == {200_001, 200_007, 200_008}


def test_qwen2_folder_is_that_of_transformers(get: Callable[[str], Tokenizer], test_data: Path, sample: str) -> None:
    oracle, tokenizer = AutoTokenizer.from_pretrained(test_data / "tokenizers" / "qwen2"), get("qwen2")
    rng = random.Random(0)
    for text in [sample, "<|im_start|>user\nhi<|im_end|>", *(tricky_text(rng) for _ in range(300))]:
        ids = oracle(text)["input_ids"]
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == oracle.decode(ids)
    assert tokenizer.vocabulary.eos_ids == {151_645} and tokenizer.special_tokens["<|endoftext|>"] == 151_643


def test_gguf_and_model_file_give_one_tokenizer(get: Callable[[str], Tokenizer], sample: str) -> None:
    assert get("llama-spm").encode(sample) == get("llama2").encode(sample)
    assert get("llama-spm").vocabulary == get("llama2").vocabulary


WORDS = [*"abcdefghijklmopqrstuvwxyz0123456789.,!?'-日本", "the", "##s", "##ing", "engine", "cafe", "caf", "do", "n"]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *(f"##{letter}" for letter in "abcdetnr")]
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words), "utf-8")
    return tmp_path


@pytest.mark.parametrize(
    "config", [{}, {"do_lower_case": False}, {"strip_accents": False, "tokenize_chinese_chars": False}]
)
def test_vocab_txt_is_that_of_transformers(bert: Path, config: dict[str, bool]) -> None:
    (bert / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"} | config))
    oracle, tokenizer = BertTokenizer.from_pretrained(bert), load_tokenizer(bert)
    rng = random.Random(1)
    bits = [*WORDS, "[MASK]", " ", " ", "Café", "É", "THE", "\t", "\u200b", "👩", "日本語"]
    for _ in range(200):
        text = "".join(rng.choice(bits) for _ in range(rng.randint(0, 10)))
        ids = oracle(text)["input_ids"]
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    pair = oracle("the engine", "cafe")["input_ids"]
    before, between, after = tokenizer.pair_frame()
    one, two = (tokenizer.encode(text, add_special_tokens=False) for text in ("the engine", "cafe"))
    assert [*before, *one, *between, *two, *after] == pair


def test_gguf_of_bert(bert: Path) -> None:
    words = (bert / "vocab.txt").read_text("utf-8").split()
    marked = [w if w.startswith("[") else w[2:] if w.startswith("##") else f"▁{w}" for w in words]
    ids = {"cls_token_id": (4, 2), "seperator_token_id": (4, 3), "unknown_token_id": (4, 1)}
    (bert / "x.gguf").write_bytes(gguf(vocabulary("bert", marked, [1] * len(marked), **ids)))
    one, other = load_tokenizer(bert / "x.gguf"), load_tokenizer(bert)
    for text in ("the engines, don't! [MASK]", "naïve café 日本"):
        assert one.encode(text) == other.encode(text)


# -- text and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_every_text_comes_back(get: Callable[[str], Tokenizer], sample: str, name: str) -> None:
    tokenizer, rng = get(name), random.Random(7)
    for text in [sample, "\n\n\n  \t x", "👩‍🚀🙂", *(tricky_text(rng, 20) for _ in range(150))]:
        if name == "qwen2":
            text = text.replace("e\u0301", "é")  # it composes
        ids = tokenizer.encode(text, parse_special=False)
        spelt = text if tokenizer.decode(tokenizer.encode("▁")) == "▁" else text.replace("▁", " ")
        assert tokenizer.decode(ids) == spelt


@given(data=st.data(), skip=st.booleans(), seen=st.integers(0, 5))
@SOME
@pytest.mark.parametrize("name", FILES)
def test_streamed_text_is_the_whole(
    get: Callable[[str], Tokenizer], name: str, data: st.DataObject, skip: bool, seen: int
) -> None:
    """Random ids: characters split between tokens, damaged ones, special tokens, blanks that merge."""
    tokenizer = get(name)
    anything = st.integers(0, tokenizer.vocabulary.size - 1)
    ids = data.draw(st.lists(st.one_of(anything, st.integers(0, 300)), max_size=40))
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    pieces = _stream(tokenizer, ids, skip)
    assert "".join(pieces) == whole
    for cut in range(len(pieces)):  # nothing shown is taken back, and nothing known is kept for long
        assert whole.startswith("".join(pieces[:cut]))
    reference = tokenizer._backend.decode(ids, skip_special_tokens=skip)
    if "\ufffd" not in whole + reference and name != "deepseek-coder":  # whose added "ü" tokenizers reads as a byte
        assert whole == reference
    bytes_whole = b"".join(tokenizer.token_bytes(i) for i in ids if not skip or i not in tokenizer._bytes.special)
    assert whole in (text := bytes_whole.decode(errors="replace")) and len(text) - len(whole) <= 1


def _stream(tokenizer: Tokenizer, ids: list[int], skip: bool) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    return [*map(detokenizer.feed, ids), detokenizer.flush()]


@pytest.mark.parametrize("name", FILES)
def test_user_text_makes_no_special_tokens(get: Callable[[str], Tokenizer], name: str) -> None:
    tokenizer = get(name)
    special = set(tokenizer.special_tokens.values())
    for text in [*list(tokenizer.special_tokens)[:12], "a".join(list(tokenizer.special_tokens)[:12])]:
        ids = tokenizer.encode(text, parse_special=False, add_special_tokens=False)
        assert not special & set(ids)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert special & set(tokenizer.encode(text, add_special_tokens=False))


CHATS = {
    "llama3": "{{ bos_token }}<|start_header_id|>user<|end_header_id|>\n\n{{ messages[0].content }}<|eot_id|>",
    "mistral-v7": "{{ bos_token }}[INST]{{ messages[0].content }}[/INST]",
    "deepseek-coder": "{{ bos_token }}### Instruction:\n{{ messages[0].content }}\n<|EOT|>",
}


@pytest.mark.parametrize("name", CHATS)
def test_a_message_cannot_end_itself(get: Callable[[str], Tokenizer], name: str) -> None:
    tokenizer = get(name)
    special = {i: text for text, i in tokenizer.special_tokens.items()}
    chat = ChatTemplate(CHATS[name], special_tokens={"bos_token": special[tokenizer.vocabulary.bos_id or 0]})
    plain, hostile = "hello", "hello" + "".join(list(special.values())[:20])
    expected = [i for i in chat.encode(tokenizer, [{"role": "user", "content": plain}]) if i in special]
    ids = chat.encode(tokenizer, [{"role": "user", "content": hostile}])
    assert expected and [i for i in ids if i in special] == expected
    assert hostile in tokenizer.decode(ids, skip_special_tokens=False)


# -- folders ---------------------------------------------------------------------------------------------------------


def test_configuration_says_what_surrounds_a_text(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained("bpe", True, True, False, "identity", False))
    assert load_tokenizer(tmp_path).encode("the")[0] == 1
    config = {"add_bos_token": False, "add_eos_token": True, "eos_token": {"content": "[CTL]"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("the")[0] != 1 and tokenizer.encode("the")[-1] == 2
    assert tokenizer.vocabulary.eos_ids == {tokenizer.special_tokens["[CTL]"]}


def test_added_tokens_have_the_ids_they_say(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data := trained("unigram", False, True, False, "identity", False))
    size = sentencepiece.SentencePieceProcessor(model_proto=data).get_piece_size()
    added = {
        str(size + 3): {"content": "<|user|>", "special": True},
        str(size + 1): {"content": "  ", "special": False},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|user|>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_tokens["<|user|>"] == size + 3 and tokenizer.added_tokens["  "] == size + 1
    assert size + 3 in tokenizer.encode("the<|user|>x") and tokenizer.vocabulary.size == size + 4
    assert tokenizer.vocabulary.eos_ids == {size + 3}
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|user|>": size}))
    assert load_tokenizer(tmp_path).special_tokens["<|user|>"] == size


def test_the_best_file_is_taken(tmp_path: Path, test_data: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "▁", "x"]
    scores = {"scores": (ARRAY, (6, [0.0] * 5))}
    (tmp_path / "x.gguf").write_bytes(gguf(vocabulary("llama", tokens, [2, 3, 3, 1, 1], **scores)))
    assert load_tokenizer(tmp_path).vocabulary.size == 5
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\nx")
    assert load_tokenizer(tmp_path).vocabulary.size == 4
    (tmp_path / "tokenizer.model.v3").write_bytes(model([("<unk>", 0.0, 2), ("x", 0.0, 1), ("y", 0.0, 1)]))
    assert load_tokenizer(tmp_path).vocabulary.size == 3
    stories = test_data / "models" / "stories260k" / "tokenizer.json"
    (tmp_path / "tokenizer.json").write_bytes(stories.read_bytes())
    assert load_tokenizer(tmp_path).vocabulary.size == 512


def test_a_damaged_gguf_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no such thing")
    with pytest.raises(ModelFormatError, match="GGUF"):
        load_tokenizer(tmp_path / "x.gguf")


def test_chat_template_of_a_gguf(tmp_path: Path) -> None:
    metadata = vocabulary("llama", ["<unk>", "<s>", "</s>", "x"], [2, 3, 3, 1], bos_token_id=(4, 1))
    metadata["tokenizer.chat_template"] = (STRING, "{{ bos_token }}{{ messages[0].content }}")
    (tmp_path / "x.gguf").write_bytes(gguf(metadata))
    chat = load_chat_template(tmp_path / "x.gguf")
    assert chat is not None
    text = chat.apply(load_tokenizer(tmp_path / "x.gguf"), [{"role": "user", "content": "x</s>"}]).text
    assert text == "<s>x</s>"
    for hostile in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% include 'x' %}"):
        metadata["tokenizer.chat_template"] = (STRING, hostile)
        (tmp_path / "x.gguf").write_bytes(gguf(metadata))
        with pytest.raises((ModelFormatError, InvalidRequest)) as error:
            chat = load_chat_template(tmp_path / "x.gguf")
            assert chat is not None
            chat.apply(load_tokenizer(tmp_path / "x.gguf"), [{"role": "user", "content": "x"}])
        assert error.value.code == "template_error"


# -- damage ----------------------------------------------------------------------------------------------------------

UNSUPPORTED: dict[str, tuple[str, bytes]] = {
    "a WORD model": ("tokenizer.model", model([("<unk>", 0.0, 2)]).replace(number(3, 2), number(3, 3))),
    "no unknown piece": ("tokenizer.model", model([("a", 0.0, 1)], trainer=number(40, -1))),
    "blanks at the end": ("tokenizer.model", model([("<unk>", 0.0, 2)], trainer=number(24, 1))),
    "a GGUF of another kind": ("x.gguf", gguf(vocabulary("rwkv", ["a"], [1]))),
    "a GGUF of another split": ("x.gguf", gguf(vocabulary("gpt2", ["a"], [1], pre=(STRING, "porridge")))),
    "a GGUF of no split": ("x.gguf", gguf(vocabulary("gpt2", ["a"], [1]))),
    "a class of vocab.json": ("tokenizer_config.json", b'{"tokenizer_class": "XTokenizer"}'),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_what_cannot_be_converted_is_named(tmp_path: Path, kind: str) -> None:
    name, content = UNSUPPORTED[kind]
    (tmp_path / name).write_bytes(content)
    if name.endswith("json"):
        (tmp_path / "vocab.json").write_text('{"a": 0}')
        (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ModelFormatError) as error:
        load_tokenizer(tmp_path)
    assert error.value.code == "tokenizer_unsupported"


def test_ranks_of_no_family(tmp_path: Path) -> None:
    (tmp_path / "x.tiktoken").write_bytes(b"".join(b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    with pytest.raises(ModelFormatError, match="256 tiktoken ranks") as error:
        load_tokenizer(tmp_path)
    assert error.value.code == "tokenizer_unsupported"


VOCAB, MERGES = '{"a": 0, "b": 1, "ab": 2}', "#version: 0.2\na b\n"
INVALID: dict[str, dict[str, str | bytes]] = {
    "two tokens of one id": {"vocab.json": '{"a": 0, "b": 0}', "merges.txt": ""},
    "an id that is none": {"vocab.json": '{"a": -1}', "merges.txt": ""},
    "an id out of reach": {"vocab.json": '{"a": 99999999999}', "merges.txt": ""},
    "an id that is text": {"vocab.json": '{"a": "0"}', "merges.txt": ""},
    "a merge of nothing": {"vocab.json": VOCAB, "merges.txt": "a c\n"},
    "a merge into nothing": {"vocab.json": VOCAB, "merges.txt": "b a\n"},
    "a merge of three": {"vocab.json": VOCAB, "merges.txt": "a b c\n"},
    "a merge of one": {"vocab.json": VOCAB, "merges.txt": "ab\n"},
    "merges that are not UTF-8": {"vocab.json": VOCAB, "merges.txt": b"\xff\xfe"},
    "an added token of two ids": {"vocab.json": VOCAB, "merges.txt": MERGES, "added_tokens.json": '{"a": 7}'},
    "an id of two tokens": {"vocab.json": VOCAB, "merges.txt": MERGES, "added_tokens.json": '{"c": 1}'},
    "an added token far away": {"vocab.json": VOCAB, "merges.txt": MERGES, "added_tokens.json": '{"c": 4294967296}'},
    "a word twice": {"vocab.txt": "[UNK]\na\na\n"},
    "words without an unknown one": {"vocab.txt": "a\nb\n"},
    "words that are not UTF-8": {"vocab.txt": b"[UNK]\n\xff\n"},
    "no words": {"vocab.txt": ""},
    "a tekken without a config": {"tekken.json": '{"vocab": []}'},
    "a tekken of all special tokens": {"tekken.json": tekken([])},
    "a tekken with too few tokens": {"tekken.json": tekken(BYTES, unused=-1)},
    "a tekken without all bytes": {"tekken.json": tekken(BYTES[:-1])},
    "a tekken with a token twice": {"tekken.json": tekken([*BYTES, b"a"])},
    "a tekken with two tokens of one id": {"tekken.json": tekken(BYTES, special=[{"rank": 1, "token_str": "a"}] * 2)},
    "a tekken with a special token far away": {"tekken.json": tekken(BYTES, special=[{"rank": 30, "token_str": "x"}])},
    "a tekken with a special token that has two ids": {
        "tekken.json": tekken(BYTES, special=[{"rank": 1, "token_str": "x"}, {"rank": 2, "token_str": "x"}])
    },
    "a tekken with a special token that is a token": {
        "tekken.json": tekken([*BYTES, b"ab"], special=[{"rank": 1, "token_str": "ab"}])
    },
    "a tekken whose token is no base64": {"tekken.json": tekken(BYTES).replace(b'"AA=="', b'"A?=="')},
    "a tekken whose pattern is none": {"tekken.json": tekken(BYTES).replace(b'"[^', b'"[[^', 1)},
    "bytes that are not all there": {
        "tokenizer.model": model([("<unk>", 0.0, 2), ("<0x41>", 0.0, 6)], trainer=number(35, 1))
    },
    "a GGUF without tokens": {"x.gguf": gguf({"tokenizer.ggml.model": (STRING, "llama")})},
    "a GGUF with a token twice": {"x.gguf": gguf(vocabulary("llama", ["a", "a"], [1, 1]))},
    "a GGUF of unknown kinds": {"x.gguf": gguf(vocabulary("llama", ["a"], [99]))},
    "a GGUF short of kinds": {"x.gguf": gguf(vocabulary("llama", ["a", "b"], [1]))},
    "a GGUF with a bos far away": {"x.gguf": gguf(vocabulary("llama", ["<unk>"], [2], bos_token_id=(4, 1)))},
    "a GGUF of numbers": {"x.gguf": gguf(vocabulary("llama", [], []) | {"tokenizer.ggml.tokens": (ARRAY, (4, [1]))})},
    "a GGUF with a merge of one": {
        "x.gguf": gguf(vocabulary("gpt2", ["a"], [1], pre=(STRING, "gpt-2"), merges=(ARRAY, (STRING, ["a"]))))
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", INVALID)
def test_what_is_damaged_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    for name, content in INVALID[kind].items():
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ModelFormatError) as error:
        load_tokenizer(tmp_path)
    assert error.value.code == "tokenizer_invalid", str(error.value)


def test_added_tokens_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[UNK]\na\n")
    for described in ({"x": {"content": "y"}}, {"9": {"content": ""}}, {"9": 3}, {"9": {}}, {"-1": {"content": "y"}}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": described}))
        with pytest.raises(ModelFormatError) as error:
            load_tokenizer(tmp_path)
        assert error.value.code == "tokenizer_invalid"


def _healthy() -> list[dict[str, bytes]]:
    tokens, kinds = ["<unk>", "<s>", "</s>", "▁", "x", "▁x", "ü"], [2, 3, 3, 1, 1, 1, 4]
    scores, pre = {"scores": (ARRAY, (6, [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, 0.0]))}, {"pre": (STRING, "gpt-2")}
    merges = {"merges": (ARRAY, (STRING, ["▁ x"])), "bos_token_id": (4, 1), "add_bos_token": (7, True)}
    added = b'{"added_tokens_decoder": {"3": {"content": "<|x|>", "special": true}}, "eos_token": "<|x|>",'
    added += b' "tokenizer_class": "GPT2Tokenizer"}'
    return [
        {"tokenizer.model": trained("bpe", True, True, True, "nmt_nfkc", True)},
        {"tokenizer.model": trained("unigram", True, True, True, "nmt_nfkc", True)},
        {"tokenizer.model": trained("unigram", False, True, False, "identity", True)},
        {"x.gguf": gguf(vocabulary("llama", tokens, kinds, **scores))},
        {"x.gguf": gguf(vocabulary("gpt2", tokens, kinds, **pre, **merges))},
        {"x.gguf": gguf(vocabulary("bert", ["[UNK]", "[CLS]", "[SEP]", "▁the", "s"], [1] * 5))},
        {"vocab.json": VOCAB.encode(), "merges.txt": MERGES.encode(), "config.json": b'{"model_type": "gpt2"}'},
        {"vocab.json": VOCAB.encode(), "merges.txt": b"", "tokenizer_config.json": added},
        {"vocab.txt": b"[UNK]\n[CLS]\n[SEP]\nthe\n##s\n", "tokenizer_config.json": b'{"do_lower_case": false}'},
        {"tekken.json": tekken(BYTES, special=[{"rank": 1, "token_str": "<s>"}], reserved=2)},
    ]


def damage(folder: Path, seeds: range) -> tuple[int, int]:
    """How many folders with a damaged file are refused and how many are read; those answer or refuse a text."""
    refused = read = 0
    for seed, files in itertools.product(seeds, _healthy()):
        rng = random.Random(seed)
        for old in folder.iterdir():
            old.unlink()
        spoilt = rng.choice(sorted(files))
        for name, content in files.items():
            data = bytearray(content)
            for _ in range(rng.randint(1, 3) if name == spoilt else 0):
                place, length = rng.randrange(len(data) + 1), rng.choice([0, 1, 1, 1, 1, 4])
                data[place : place + (rng.randint(0, 9) if rng.random() < 0.3 else length)] = rng.randbytes(length)
            (folder / name).write_bytes(data)
        try:
            tokenizer = load_tokenizer(folder)
            tokenizer.decode(tokenizer.encode("the x</s>\r\nü<|x|> 日"))
            tokenizer.encode("<s>x", parse_special=False)
            read += 1
        except (ModelFormatError, InvalidRequest):
            refused += 1
    return refused, read


def test_random_damage_raises_nothing_else(tmp_path: Path) -> None:
    refused, read = damage(tmp_path, range(35))  # times 10 kinds
    assert refused > 50 and read > 30


@pytest.mark.slow
def test_much_random_damage_raises_nothing_else(tmp_path: Path) -> None:
    refused, read = damage(tmp_path, range(1_000, 1_500))
    assert refused > 1_000 and read > 500


def test_a_large_vocabulary_loads_in_no_time(test_data: Path) -> None:
    """CPU seconds, not those on the wall: the machine may be busy. Quadratic recovery of merges would take minutes."""
    start = time.process_time()
    load_tokenizer(test_data / "tokenizers" / "llama3")
    assert time.process_time() - start < 4
