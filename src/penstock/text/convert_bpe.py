"""Byte-level BPE from files that are not tokenizer.json: tiktoken ranks, Mistral's tekken.json, and GPT-2's vocab.json
with merges.txt.

The first and the last do not say how a text is split before merging, so that is known here by family: Radford et al.
2019 (GPT-2), and the patterns that each model published with its tokenizer.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from penstock.base import ModelFormatError
from penstock.formats import Tekken, read_bytes, read_json_object
from penstock.text.added import (
    MAX_TOKENS,
    Added,
    Converted,
    special,
    special_token_texts,
    surround,
    with_added,
    with_roles,
)
from penstock.text.detokenize import BYTE_OF

MAX_MERGES_BYTES = 64 << 20

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cl100k(digits: str) -> str:
    return rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _o200k(endings: str, digits: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{_UPPER}*{_LOWER}+{endings}|{start}{_UPPER}+{_LOWER}*{endings}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


SPLITS: dict[str, tuple[str, ...]] = {
    "gpt2": (_GPT2,),
    "starcoder": (r"\p{N}", _GPT2),
    "llama3": (_cl100k(r"\p{N}{1,3}"),),
    "qwen2": (_cl100k(r"\p{N}"),),
    "o200k": (_o200k(f"{_ENDINGS}?", r"\p{N}{1,3}"),),
    "tekken": (_o200k("", r"\p{N}"),),
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
    ),
}
"""Patterns by family. Each cuts what the one before left uncut; what none matches stays whole."""

COMPOSED = frozenset({"qwen2"})
"""Families that bring a text into NFC first."""


def byte_level_backend(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    split: Sequence[str],
    added: Added,
    *,
    composed: bool = False,
    whole_words: bool = False,
    add_prefix_space: bool = False,
) -> Backend:
    """A byte-level BPE tokenizer.

    Args:
        vocabulary: tokens in GPT-2's alphabet of 256 printable characters -> id.
        merges: in the order of their rank.
        split: patterns as in SPLITS.
        composed: a text is brought into NFC first.
        whole_words: a word that is a token becomes it whatever the merges say, as in tiktoken.

    Raises:
        ValueError: vocabulary, merges and added tokens do not fit together. The Rust side raises other exceptions.
    """
    backend = Backend(models.BPE(vocab=with_added(vocabulary, added), merges=merges, ignore_merges=whole_words))
    if composed:
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if add_prefix_space:  # before the text is cut, as GPT-2 does
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([token for _, token in sorted(added.items())])
    return backend


# -- tiktoken --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What a file of ranks does not say.

    Attributes:
        special_tokens: their ids follow the last rank.
        bos, eos: texts of the token put before a text, and of those that end one.
    """

    split: str
    special_tokens: tuple[str, ...]
    bos: str | None
    eos: tuple[str, ...]


def _numbered(name: str, start: int, stop: int) -> tuple[str, ...]:
    return tuple(f"<|{name}_{i}|>" for i in range(start, stop))


_LLAMA3 = (
    *("<|begin_of_text|>", "<|end_of_text|>", *_numbered("reserved_special_token", 0, 2), "<|finetune_right_pad_id|>"),
    *("<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    *("<|image|>", *_numbered("reserved_special_token", 2, 246)),
)
_LLAMA4_TEXT, _LLAMA4_SIGHT = "text_post_train_reserved_special_token", "vision_reserved_special_token"
_LLAMA4 = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>", *_numbered(_LLAMA4_TEXT, 0, 6)),
    *("<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>", *_numbered(_LLAMA4_TEXT, 8, 69)),
    *("<|image_start|>", "<|image_end|>", *_numbered(_LLAMA4_SIGHT, 0, 2), "<|tile_x_separator|>"),
    *("<|tile_y_separator|>", *_numbered(_LLAMA4_SIGHT, 2, 6), "<|image|>", *_numbered(_LLAMA4_SIGHT, 6, 7)),
    *("<|patch|>", *_numbered(_LLAMA4_SIGHT, 7, 1048), *_numbered("reasoning_reserved_special_token", 0, 8)),
    *("<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>", *_numbered("reserved_special_token", 0, 904)),
)
_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *_numbered("extra", 0, 205))

FAMILIES = {
    128_000: _Family(
        split="llama3",
        special_tokens=_LLAMA3,
        bos="<|begin_of_text|>",
        eos=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    200_000: _Family(
        split="o200k",
        special_tokens=_LLAMA4,
        bos="<|begin_of_text|>",
        eos=("<|end_of_text|>", "<|eom|>", "<|eot|>"),
    ),
    151_643: _Family(split="qwen2", special_tokens=_QWEN, bos=None, eos=("<|endoftext|>", "<|im_end|>")),
}
"""Llama 3, Llama 4 and Qwen, told apart by how many ranks they have."""


def ranks_backend(ranks: Mapping[bytes, int], added: Added, *, add_bos: bool | None = None) -> Converted:
    """The tokenizer of a tiktoken file.

    Args:
        added: instead of the family's special tokens, if there are any.
        add_bos: put a bos token before every text; by default as the family does.

    Raises:
        ModelFormatError: (tokenizer_unsupported) it is of no family known here.
    """
    family = FAMILIES.get(len(ranks))
    if family is None:
        raise ModelFormatError(
            "tokenizer_unsupported",
            f"A tokenizer of {len(ranks)} tiktoken ranks is of no known family",
            why=f"how it splits text is not in the file; known are those of {', '.join(map(str, sorted(FAMILIES)))}",
            fix="use a folder with tokenizer.json",
        )
    added = added or {len(ranks) + i: special(text) for i, text in enumerate(family.special_tokens)}
    vocabulary = {_as_text(token): rank for token, rank in ranks.items()}
    backend = byte_level_backend(
        vocabulary,
        merges_of(vocabulary),
        SPLITS[family.split],
        added,
        composed=family.split in COMPOSED,
        whole_words=True,
    )
    bos = backend.token_to_id(family.bos) if family.bos else None
    if add_bos is not False:
        surround(backend, bos, None)
    eos = (backend.token_to_id(text) for text in family.eos)
    return Converted(backend=backend, bos_id=bos, eos_ids=tuple(i for i in eos if i is not None))


def tekken_backend(tekken: Tekken, *, add_bos: bool | None = None) -> Converted:
    """The tokenizer of a tekken.json; ``add_bos`` as for ``ranks_backend``."""
    vocabulary = {_as_text(token): rank for token, rank in tekken.ranks.items()}
    merges, first = merges_of(vocabulary), len(tekken.special)
    vocabulary = {text: first + rank for text, rank in vocabulary.items()}
    added = {i: special(text) for i, text in enumerate(tekken.special)}
    backend = byte_level_backend(vocabulary, merges, [tekken.pattern], added, whole_words=True)
    bos, eos = (backend.token_to_id(text) if text in tekken.special else None for text in ("<s>", "</s>"))
    if add_bos is not False:
        surround(backend, bos, None)
    return Converted(backend=backend, bos_id=bos, eos_ids=() if eos is None else (eos,))


def merges_of(ranks: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges that make a BPE of ranks: every way to put a token together from two others, in the order of ranks.

    tiktoken merges whatever neighbours form the token of lowest rank, so all ways belong to it, not only the one by
    which the token was found in training. Takes time in proportion to the length of all tokens together.
    """
    merges: list[tuple[str, str]] = []
    for token in ranks:
        ways = halves(token, ranks)
        merges += sorted(ways, key=lambda way: (ranks[way[0]], ranks[way[1]])) if len(ways) > 1 else ways
    return merges


def halves(token: str, known: Container[str]) -> list[tuple[str, str]]:
    """The ways to cut a token into two known ones."""
    ways = []
    for i in range(1, len(token)):
        if (left := token[:i]) in known and (right := token[i:]) in known:
            ways.append((left, right))
    return ways


_TEXT_OF = {byte: char for char, byte in BYTE_OF.items()}


def _as_text(token: bytes) -> str:
    return token.decode("latin-1").translate(_TEXT_OF)


# -- vocab.json and merges.txt ---------------------------------------------------------------------------------------

_CLASSES = {"Qwen2Tokenizer": "qwen2", "GPT2Tokenizer": "gpt2"}
_MODEL_TYPES = {"gpt2": "gpt2", **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "qwen2")}


def merges_backend(folder: Path, config: Mapping[str, Any], model_type: object, added: Added) -> Converted:
    """The tokenizer of vocab.json and merges.txt.

    Args:
        config: tokenizer_config.json.
        model_type: as in config.json; decides the family where ``config`` names no tokenizer class.

    Raises:
        ModelFormatError: (tokenizer_unsupported) it is of no family known here; file_missing, json_invalid.
        ValueError: the files are damaged.
    """
    name = config.get("tokenizer_class")
    split = _CLASSES.get(name.removesuffix("Fast")) if isinstance(name, str) else _MODEL_TYPES.get(str(model_type))
    if split is None:
        raise ModelFormatError(
            "tokenizer_unsupported",
            f"{folder} has a vocab.json of an unknown kind",
            why=f"tokenizer_class is {str(name)[:60]!r}; known are {', '.join(_CLASSES)}",
            fix="use a folder with tokenizer.json",
        )
    vocabulary = read_vocabulary(folder / "vocab.json")
    roles = special_token_texts(config)
    added = with_roles(added, vocabulary, [*roles.values(), "<|endoftext|>"])
    backend = byte_level_backend(
        vocabulary,
        read_merges(folder / "merges.txt"),
        SPLITS[split],
        added,
        composed=split in COMPOSED,
        add_prefix_space=split == "gpt2" and config.get("add_prefix_space") is True,
    )
    bos, eos = (backend.token_to_id(roles.get(role, "<|endoftext|>")) for role in ("bos_token", "eos_token"))
    surround(
        backend,
        bos if config.get("add_bos_token") is True else None,
        eos if config.get("add_eos_token") is True else None,
    )
    return Converted(
        backend=backend, bos_id=bos if "bos_token" in roles else None, eos_ids=() if eos is None else (eos,)
    )


def read_vocabulary(path: Path) -> dict[str, int]:
    """A JSON object of tokens and ids.

    Raises:
        ModelFormatError: file_missing, json_invalid.
        ValueError: an id is not one.
    """
    vocabulary = read_json_object(path)
    for text, i in vocabulary.items():
        if type(i) is not int or not 0 <= i < MAX_TOKENS or not text:
            raise ValueError(f"{path.name} gives {text[:40]!r} the id {str(i)[:40]}")
    return vocabulary


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The lines of merges.txt.

    Raises:
        ModelFormatError: file_missing, tokenizer_invalid.
        ValueError: a line is not two tokens.
    """
    lines = read_bytes(path, MAX_MERGES_BYTES, "tokenizer_invalid").decode("utf-8").split("\n")
    return parse_merges(line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version"))


def parse_merges(lines: Iterable[str]) -> list[tuple[str, str]]:
    """Two tokens with a blank between them on each line.

    Raises:
        ValueError: a line is not that.
    """
    merges = []
    for line in lines:
        left, blank, right = line.partition(" ")
        if not (left and blank and right) or " " in right:
            raise ValueError(f"the merge {line[:60]!r} is not two tokens")
        merges.append((left, right))
    return merges
