"""Tokens beside those of a model's own vocabulary: the ones matched before it runs, and the ones put around a text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from penstock.formats import read_json_object

MAX_TOKENS = 1 << 20
"""Ids a tokenizer may have; one that claims more is damaged."""

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

Added = Mapping[int, AddedToken]


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """A tokenizer made from something else than tokenizer.json.

    Attributes:
        bos_id, eos_ids: as its source says, configuration files apart.
    """

    backend: Backend
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()


def special_token_texts(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and their kind from tokenizer_config.json, where each is a string or an object."""
    named = {}
    for name in ROLES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            named[name] = text
    return named


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with the special tokens of special_tokens_map.json where it names none.

    Raises:
        ModelFormatError: json_invalid.
    """
    config = optional_json(folder / "tokenizer_config.json")
    for name, value in optional_json(folder / "special_tokens_map.json").items():
        if name in ROLES and config.get(name) is None:
            config[name] = value
    return config


def optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def read_added(folder: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Added tokens by id: ``added_tokens_decoder`` of tokenizer_config.json, else added_tokens.json.

    Raises:
        ModelFormatError: json_invalid.
        ValueError: one of them is not described as it should be.
    """
    roles = set(special_token_texts(config).values())
    described = config.get("added_tokens_decoder")
    if isinstance(described, Mapping) and described:
        tokens = {_token_id(key): _described(value, roles) for key, value in described.items()}
    else:
        ids = optional_json(folder / "added_tokens.json")
        tokens = {_token_id(value): special(text, text in roles) for text, value in ids.items()}
    if len({token.content for token in tokens.values()}) != len(tokens):
        raise ValueError("an added token has two ids")
    return tokens


def special(text: str, is_special: bool = True) -> AddedToken:
    return AddedToken(text, special=is_special, normalized=False)


def _token_id(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str) or not 0 <= int(value) < MAX_TOKENS:
        raise ValueError(f"an added token has the id {str(value)[:40]!r}")
    return int(value)


def _described(value: object, roles: set[str]) -> AddedToken:
    if not isinstance(value, Mapping) or not isinstance(content := value.get("content"), str) or not content:
        raise ValueError(f"an added token is {str(value)[:80]}")
    flags = {name: value.get(name) is True for name in ("lstrip", "rstrip", "single_word", "normalized")}
    return AddedToken(content, special=value.get("special") is True or content in roles, **flags)


def with_added(vocabulary: Mapping[str, int], added: Added) -> dict[str, int]:
    """A vocabulary that holds the added tokens too, so that each has the id it should have, whatever the gaps.

    Raises:
        ValueError: an id would have two tokens, or a token two ids.
    """
    owners = {i: text for text, i in vocabulary.items()}
    if len(owners) != len(vocabulary):
        raise ValueError("two tokens of the vocabulary have the same id")
    whole = dict(vocabulary)
    for i, token in added.items():
        if owners.setdefault(i, token.content) != token.content:
            raise ValueError(f"id {i} is both {owners[i][:40]!r} and {token.content[:40]!r}")
        if whole.setdefault(token.content, i) != i:
            raise ValueError(f"{token.content[:40]!r} has both the id {whole[token.content]} and {i}")
    return whole


def with_roles(added: Added, vocabulary: Mapping[str, int], texts: Iterable[str]) -> dict[int, AddedToken]:
    """``added``, and those of ``texts`` that the vocabulary has, as special tokens."""
    known = {token.content for token in added.values()}
    return {**added, **{vocabulary[t]: special(t) for t in texts if t in vocabulary and t not in known}}


def surround(backend: Backend, before: int | None, after: int | None, *, joined: bool = False) -> None:
    """Makes ``backend`` put these ids around every text.

    Args:
        joined: the second text of a pair has no ``before``.
    """
    used = {name: i for name, i in (("before", before), ("after", after)) if i is not None}
    if used:
        first = [name for name in ("before", "$A", "after") if name in used or name == "$A"]
        second = [
            name for name in ("before", "$B", "after") if name == "$B" or (name in used and name != "before" * joined)
        ]
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(first),
            pair=" ".join([*first, *(f"{name}:1" for name in second)]),
            special_tokens=[{"id": n, "ids": [i], "tokens": [backend.id_to_token(i)]} for n, i in used.items()],
        )
