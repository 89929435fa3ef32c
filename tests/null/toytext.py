"""Small tokenizers of the kinds that models have, made on the spot."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from penstock.text import Tokenizer

SPECIAL = ("<|end|>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<s>", "</s>")
ADDED = ("<think>", "</think>", "<tool_call>", "   ")
"""Added but not special, as Qwen's and GPT-NeoX's: the last is a run of blanks."""

SAMPLES = [
    "Once upon a time there was a little engine that wrote stories, and it could not stop.",
    'The 42 cats said: "don\'t!" -- and then, all at once, they were gone.\n\nNobody knew why.',
    "naïve café, 日本語のテキスト, Привет, 🙂🙃 and a zero-width joiner: 👩‍🚀",
    "def f(x):\n    return x / 1  # <not> special | at all |>",
] * 4


@cache
def byte_level() -> Tokenizer:
    """GPT-2's kind: every byte has a token, words are split first, no bos."""
    backend = Backend(models.BPE())
    pattern = Regex(r"'(?i:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SAMPLES, trainer)
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    return Tokenizer(backend, eos_ids=[0])


@cache
def sentencepiece() -> Tokenizer:
    """Llama 2's kind: a blank in front of every text, bytes for what is unknown, bos added, first blank dropped."""
    return Tokenizer(_sentencepiece(legacy=True), eos_ids=[2], bos_id=1)


@cache
def metaspace() -> Tokenizer:
    """The same as newer files write it: the blank goes only in front of the first word."""
    return Tokenizer(_sentencepiece(legacy=False), eos_ids=[2], bos_id=1)


def _sentencepiece(*, legacy: bool) -> Backend:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = [*sorted({char for text in SAMPLES for char in text if char.isascii() and char > " "}), "▁", "é", "日"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("e", "r"), ("i", "n"), ("▁", "▁")]
    words = pieces + letters + ["".join(pair) for pair in merges]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(words))}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    backend.add_special_tokens(
        [AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


@cache
def unigram() -> Tokenizer:
    """A model that by itself would make ``<s>`` of the text "<s>"."""
    letters = sorted({char for text in SAMPLES for char in text if char.isascii()} | {"▁"})
    pieces = [("<unk>", 0.0), ("<s>", -1.0), ("</s>", -1.0), *((letter, -5.0) for letter in letters), ("the", -3.0)]
    backend = Backend(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return Tokenizer(backend, eos_ids=[2], bos_id=1)
