"""Strings that rules of the draw are about, in the model's own tokens: bad words, and what breaks a repetition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from penstock.spec import SamplingParams
from penstock.text.tokenizer import Tokenizer

MAX_KEPT = 16
MAX_TAIL = 20

Ids = tuple[int, ...]


def with_rule_ids(params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """The same parameters, with ``bad_words_ids`` and ``dry_breaker_ids`` made of their strings.

    Raises:
        InvalidRequest: (invalid_text) a string cannot be tokenized; (invalid_parameter) no token is left to draw.
    """
    ids: dict[str, Any] = {}
    if params.bad_words and not params.bad_words_ids:
        ids["bad_words_ids"] = tuple(dict.fromkeys(s for word in params.bad_words for s in _spellings(word, tokenizer)))
    if params.dry and params.dry_sequence_breakers and not params.dry_breaker_ids:
        ids["dry_breaker_ids"] = _breakers(tuple(params.dry_sequence_breakers), tokenizer)
    return replace(params, **ids) if ids else params


def _spellings(word: str, tokenizer: Tokenizer) -> list[Ids]:
    """A word's tokens, and those with a space before it if that makes another first token and no more of them.

    So does vLLM: the first kind stands at the start of a text, the second inside.
    """
    word = word.lstrip()
    plain, spaced = (
        tuple(tokenizer.encode(text, add_special_tokens=False, parse_special=False)) for text in (word, f" {word}")
    )
    found = [plain] if plain else []
    if spaced and len(spaced) == len(plain) and spaced[0] != plain[0]:
        found.append(spaced)
    return found


_resolved: WeakKeyDictionary[Tokenizer, dict[tuple[str, ...], tuple[Ids, ...]]] = WeakKeyDictionary()


def _breakers(strings: tuple[str, ...], tokenizer: Tokenizer) -> tuple[Ids, ...]:
    """All token sequences in which a breaker ends, as llama.cpp finds them; a look at the whole vocabulary.

    A token that contains a breaker is one by itself; a token that ends in the beginning of one needs the rest.
    """
    known = _resolved.setdefault(tokenizer, {})
    if strings not in known:
        if len(known) >= MAX_KEPT:
            known.pop(next(iter(known)))
        words = [tokenizer.token_bytes(token) for token in range(tokenizer.vocabulary.size)]
        known[strings] = tuple(dict.fromkeys(ids for s in strings for ids in _overlaps(s.encode(), words, tokenizer)))
    return known[strings]


def _overlaps(breaker: bytes, words: Sequence[bytes], tokenizer: Tokenizer) -> list[Ids]:
    found: list[Ids] = [(token,) for token, word in enumerate(words) if breaker in word]
    for cut in range(1, len(breaker)):
        head, rest = breaker[:cut], breaker[cut:]
        try:
            tail = tokenizer.encode(rest.decode(), add_special_tokens=False, parse_special=False)[:MAX_TAIL]
        except UnicodeDecodeError:  # cut inside a character
            continue
        found += [(token, *tail) for token, word in enumerate(words) if word.endswith(head) and breaker not in word]
    return found
