"""Tokenizer: text to token ids and back, on Hugging Face ``tokenizers``."""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from penstock.base import InvalidRequest
from penstock.formats import read_bytes
from penstock.spec import Vocabulary
from penstock.text.added import Converted, optional_json, read_tokenizer_config, special_token_texts
from penstock.text.convert import convert_file, convert_folder, usable
from penstock.text.detokenize import Detokenizer, TokenBytes

MAX_TOKENIZER_BYTES = 256 << 20

MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
"""Noncharacters of Unicode, "intended for process-internal uses": no text that is exchanged should hold one."""


def spare_mark(text: str) -> str:
    """A noncharacter that ``text`` does not contain, so that nobody can forge what is marked with it.

    Raises:
        InvalidRequest: (unsupported_content) the text contains all 32 of them.
    """
    for mark in MARKS:
        if mark not in text:
            return mark
    raise InvalidRequest("unsupported_content", "The text contains every Unicode noncharacter from U+FDD0 to U+FDEF")


def any_of(words: Collection[str]) -> re.Pattern[str]:
    """Matches the longest of ``words``. A tree of branches, so that thousands of words cost no more than a few."""
    tree: dict[str, Any] = {}
    for word in filter(None, words):
        node = tree
        for char in word:
            node = node.setdefault(char, {})
        node[""] = {}
    try:
        return re.compile(_branches(tree) if tree else r"(?!)")
    except RecursionError:  # hundreds of words, each the beginning of the next
        return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))))


def _branches(node: dict[str, Any]) -> str:
    run = ""
    while len(node) == 1 and "" not in node:  # no choice: no group, and no nesting
        ((char, node),) = node.items()
        run += re.escape(char)
    options = [re.escape(char) + _branches(child) for char, child in node.items() if char]
    if not options:
        return run
    return f"{run}(?:{'|'.join(options)}){'?' if '' in node else ''}"


class Tokenizer:
    """Text to ids and ids to text. Safe to use from several threads.

    Args:
        backend: a ``tokenizers.Tokenizer``; its truncation and padding are switched off.
        vocab_size: number of logits of the model; by default the tokenizer's own size.
        eos_ids, bos_id: ids that end a sequence, and the one before a prompt.

    Attributes:
        vocabulary: what the brain needs to know.
        special_tokens: text -> id of the special tokens.
        added_tokens: text -> id of all tokens matched before the model runs, the special ones included.
    """

    def __init__(
        self, backend: Backend, *, vocab_size: int | None = None, eos_ids: Iterable[int] = (), bos_id: int | None = None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.added_tokens = {token.content: i for i, token in added.items()}
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        size = max(backend.get_vocab().values(), default=-1) + 1 if vocab_size is None else vocab_size
        self.vocabulary = Vocabulary(size=size, eos_ids=frozenset(i for i in eos_ids if 0 <= i < size), bos_id=bos_id)
        self._bytes = TokenBytes(backend)
        self._affixes = _framed(backend, texts=1)
        self._may_exceed = max(added, default=0) >= size or backend.get_vocab_size() > size
        self._added = any_of(self.added_tokens)
        self._ordinary_added = any_of(self.added_tokens.keys() - self.special_tokens.keys())
        self._literal: dict[str, _LiteralBackend] = {}
        self._lock = threading.Lock()

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        parse_special: bool = True,
        barrier: str | None = None,
    ) -> list[int]:
        """Token ids of a text.

        Args:
            add_special_tokens: add what the tokenizer's post-processor adds, such as a bos token.
            parse_special: a special token written in the text becomes that token; otherwise it is ordinary text,
                and only ordinary ids come out of it.
            barrier: a character that is not part of the text: it is removed, and no added token is recognised across
                it or directly after it.

        Raises:
            InvalidRequest: invalid_text (not Unicode text, such as a lone surrogate), token_out_of_range (the model
                has no such id).
        """
        if not isinstance(text, str):
            raise InvalidRequest("invalid_text", f"A text was expected, not {type(text).__name__}", fix="pass a str")
        ids, frame, marked = list[int](), add_special_tokens, barrier is not None and barrier in text
        if not marked:
            with _backend_errors(text):
                ids = self._backend.encode_batch_fast([text], add_special_tokens=frame and parse_special)[0].ids
            frame = frame and not parse_special
            marked = not parse_special and not self._bytes.special.isdisjoint(ids)  # mostly none is written there
        if marked:
            ids = self._encode_marked(text, self._added if parse_special else self._ordinary_added, barrier)
        if frame:
            before, after = self._affixes
            ids = [*before, *ids, *after]
        if self._may_exceed and ids and max(ids) >= self.vocabulary.size:
            raise InvalidRequest(
                "token_out_of_range",
                f"The text contains token {self._backend.id_to_token(max(ids))!r}, which the model does not have",
                why=f"its id is {max(ids)}, the model's ids are 0 to {self.vocabulary.size - 1}",
            )
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of some tokens. Ids without a token add nothing."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return "".join(map(detokenizer.feed, ids)) + detokenizer.flush()

    def detokenizer(
        self, *, skip_special_tokens: bool = True, after: Sequence[int] = (), shown: Sequence[int] = ()
    ) -> Detokenizer:
        """For tokens that arrive one by one, after those of a prompt; special tokens in ``shown`` are not skipped."""
        return Detokenizer(self._bytes, skip_special_tokens=skip_special_tokens, after=after, shown=shown)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text, special tokens by name."""
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """``token_bytes`` as text; U+FFFD where it is only part of a character."""
        return self._bytes[token_id].decode(errors="replace")

    def pair_frame(self) -> tuple[list[int], list[int], list[int]]:
        """The ids that the post-processor puts before, between and after the two texts of a pair."""
        before, between, after = _framed(self._backend, texts=2)
        return before, between, after

    def _encode_marked(self, text: str, recognised: re.Pattern[str], barrier: str | None) -> list[int]:
        """Added tokens are recognised here and marked; the backend knows them only in their marked form."""
        mark = spare_mark(text)
        if barrier is not None:
            pattern = re.compile(f"(?<!{re.escape(barrier)})(?:{recognised.pattern})")
            text = pattern.sub(rf"{mark}\g<0>{mark}", text).replace(barrier, "")
        else:
            text = recognised.sub(rf"{mark}\g<0>{mark}", text)
        with self._lock:
            if mark not in self._literal:
                self._literal[mark] = _LiteralBackend(self._backend, mark)
        return self._literal[mark].encode(text, self._bytes.special)


def _framed(backend: Backend, texts: int) -> list[list[int]]:
    """The ids that the post-processor puts before, between and after one text or two.

    They are seen around texts of a single token that no vocabulary has, so that nothing depends on what it can encode.
    """
    token, word = 2**32 - 1, "x"
    probe = Backend(models.WordLevel({word: token}, unk_token=word))
    if backend.post_processor is not None:
        probe.post_processor = backend.post_processor
    parts: list[list[int]] = [[]]
    for i in probe.encode(word, word if texts == 2 else None).ids:
        if i == token:
            parts.append([])
        else:
            parts[-1].append(i)
    return parts


class _LiteralBackend:
    """A tokenizer that shares the model of another and recognises an added token only between two marks."""

    def __init__(self, backend: Backend, mark: str) -> None:
        self._model = backend.model
        self._marked = Backend(backend.model)
        if backend.normalizer is not None:
            self._marked.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._marked.pre_tokenizer = backend.pre_tokenizer
        self._id_of: dict[str, int] = {}
        tokens = []
        for token_id, token in backend.get_added_tokens_decoder().items():
            content = f"{mark}{token.content}{mark}"
            self._id_of[content] = token_id
            tokens.append(
                AddedToken(content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False, special=token.special)
            )
        self._marked.add_tokens(tokens)
        self._unknown = set(self._marked.encode("\U000ffffd", add_special_tokens=False).ids)

    def encode(self, text: str, special: frozenset[int]) -> list[int]:
        with _backend_errors(text):
            encoding = self._marked.encode_batch([text], add_special_tokens=False)[0]  # the fast one has no tokens
            ids: list[int] = []
            for token_id, token in zip(encoding.ids, encoding.tokens, strict=True):
                if (marked := self._id_of.get(token)) is not None:
                    ids.append(marked)
                elif token_id in special and token_id not in self._unknown:
                    # The model itself knows this string, as Unigram's may: spell it out.
                    ids += [piece.id for char in token for piece in self._model.tokenize(char)]
                else:
                    ids.append(token_id)
        return ids


@contextmanager
def _backend_errors(text: str) -> Iterator[None]:
    """The Rust side raises bare Exceptions, TypeErrors for lone surrogates, and panics as BaseExceptions."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        surrogate = next((i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None)
        why = str(error) if surrogate is None else f"character {surrogate} is a lone surrogate, which is half of one"
        raise InvalidRequest(
            "invalid_text", "The text cannot be tokenized", why=why[:200], fix="send valid Unicode"
        ) from None


def load_tokenizer(path: Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a model folder, or of a file by itself.

    The best file of a folder is read: tokenizer.json, tekken.json, tokenizer.model (SentencePiece or tiktoken ranks),
    *.tiktoken, vocab.json with merges.txt, vocab.txt, or a GGUF file. tokenizer_config.json, special_tokens_map.json
    and added_tokens.json, where they exist, say which tokens are special and which are put around a text; what
    tokenizer.json says of that stands, and as in transformers ``add_bos_token`` does not change it. The ids that begin
    and end a text are also looked for in generation_config.json and config.json.

    Args:
        path: a folder; or a GGUF file, a SentencePiece model, a file of tiktoken ranks or a tekken.json.
        vocab_size: number of logits of the model; by default as many as the tokenizer has ids.

    Raises:
        ModelFormatError: file_missing, json_invalid, tokenizer_invalid, tokenizer_unsupported, unsupported_decoder, and
            those of a GGUF file.
    """
    if path.is_file():
        converted = convert_file(path)
        return Tokenizer(converted.backend, vocab_size=vocab_size, eos_ids=converted.eos_ids, bos_id=converted.bos_id)
    config = read_tokenizer_config(path)
    if (path / "tokenizer.json").exists():
        converted = usable(path / "tokenizer.json", lambda: Converted(backend=_read_backend(path / "tokenizer.json")))
    else:
        converted = convert_folder(path, config)
    ids = {name: converted.backend.token_to_id(text) for name, text in special_token_texts(config).items()}
    bos, eos = _as_ids(ids.get("bos_token")), _as_ids(ids.get("eos_token"))
    for name in ("generation_config.json", "config.json"):
        source = optional_json(path / name)
        bos += _as_ids(source.get("bos_token_id"))
        eos += _as_ids(source.get("eos_token_id"))
    bos += _as_ids(converted.bos_id)
    eos += converted.eos_ids if not eos else ()
    return Tokenizer(converted.backend, vocab_size=vocab_size, eos_ids=eos, bos_id=bos[0] if bos else None)


def _read_backend(path: Path) -> Backend:
    backend: Backend = Backend.from_str(read_bytes(path, MAX_TOKENIZER_BYTES, "tokenizer_invalid").decode())
    return backend


def _as_ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool) and i >= 0]
