"""WordPiece, the tokenizer of BERT, from vocab.txt (Wu et al. 2016; google-research/bert, tokenization.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from penstock.formats import read_bytes
from penstock.text.added import MAX_TOKENS, Added, Converted, special_token_texts, surround, with_added, with_roles

MAX_VOCABULARY_BYTES = 64 << 20
_ROLES = {
    "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"
}  # fmt: skip


def wordpiece_folder(folder: Path, config: Mapping[str, Any], added: Added) -> Converted:
    """The tokenizer of vocab.txt, one token a line.

    Raises:
        ModelFormatError: file_missing, tokenizer_invalid.
        ValueError: the file is damaged.
    """
    text = read_bytes(folder / "vocab.txt", MAX_VOCABULARY_BYTES, "tokenizer_invalid").decode("utf-8")
    tokens = [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if not 1 < len(tokens) <= MAX_TOKENS or len(vocabulary) != len(tokens) or "" in vocabulary:
        raise ValueError(f"its {len(tokens)} lines hold {len(vocabulary)} different tokens")
    roles = _ROLES | special_token_texts(config)
    added = with_roles(added, vocabulary, roles.values())
    cls, sep = vocabulary.get(roles["cls_token"]), vocabulary.get(roles["sep_token"])
    return Converted(backend=wordpiece_backend(with_added(vocabulary, added), config, cls, sep, added))


def wordpiece_backend(
    vocabulary: Mapping[str, int],
    config: Mapping[str, Any],
    cls: int | None,
    sep: int | None,
    added: Added | None = None,
) -> Backend:
    """A WordPiece tokenizer that puts ``cls`` and ``sep`` around a text.

    Args:
        config: do_lower_case, strip_accents and tokenize_chinese_chars of tokenizer_config.json.

    Raises:
        ValueError: there is no token for unknown words. The Rust side raises other exceptions.
    """
    unknown = (special_token_texts(config).get("unk_token")) or _ROLES["unk_token"]
    if unknown not in vocabulary:
        raise ValueError(f"it has no token {unknown[:40]!r} for unknown words")
    accents = config.get("strip_accents")
    backend = Backend(models.WordPiece(dict(vocabulary), unk_token=unknown, max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars") is not False,
        strip_accents=accents if isinstance(accents, bool) else None,
        lowercase=config.get("do_lower_case") is not False,
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    added = with_roles({}, vocabulary, _ROLES.values()) if added is None else added
    backend.add_tokens([token for _, token in sorted(added.items())])
    surround(backend, cls, sep, joined=True)
    return backend
