"""Small random encoders in transformers' float32, as folders, with a WordPiece tokenizer and what it takes to pool."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from penstock.spec import EncoderSpec
from penstock.spec.encoder import read_any_spec

KINDS = ("BertModel", "RobertaModel", "XLMRobertaModel")
CLASSIFIERS = ("BertForSequenceClassification", "XLMRobertaForSequenceClassification")
CPU = torch.device("cpu")
WORDS = "the a cat dog sat ran on under mat tree and then it was red blue big small not very why did who can".split()


@dataclass(frozen=True)
class EncoderReference:
    folder: Path
    model: transformers.PreTrainedModel
    spec: EncoderSpec

    def hidden(self, texts: list[list[int]]) -> list[Tensor]:
        """The final hidden states of each text [len, D], all computed as one padded batch with a mask."""
        pad = max(0, self.spec.pad_id)
        ids = torch.full((len(texts), max(map(len, texts))), pad)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        with torch.inference_mode():
            out = self.model.base_model(ids, attention_mask=mask).last_hidden_state
        return [row[: len(text)] for row, text in zip(out, texts, strict=True)]

    def tokens(self, rng: random.Random, count: int) -> list[int]:
        return [rng.randrange(self.spec.vocab_size) for _ in range(count)]


def build_encoder(kind: str, rng: random.Random, folder: Path, **overrides: Any) -> EncoderReference:
    """A random model of a class of transformers, saved by it; weights so wide that attention is not flat."""
    family = kind.split("Model")[0].split("For")[0]
    heads = rng.choice([1, 2, 3, 5])
    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": rng.randrange(60, 200),
            "hidden_size": heads * rng.choice([8, 12, 16]),
            "num_hidden_layers": rng.choice([2, 3]),
            "num_attention_heads": heads,
            "intermediate_size": rng.choice([40, 64, 97]),
            "max_position_embeddings": 70,
            "type_vocab_size": 2 if family == "Bert" else 1,
            "hidden_act": rng.choice(["gelu", "gelu", "gelu_pytorch_tanh"]),
            "layer_norm_eps": rng.choice([1e-12, 1e-5]),
            "attn_implementation": "eager",
            **overrides,
        }
    )
    torch.manual_seed(rng.randrange(2**31))
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "LayerNorm.weight" in name:
                weight.normal_(1.0, 0.3)
            elif weight.ndim == 1:
                weight.normal_(0.0, 0.3)
            else:
                gain = 1.5 if "query" in name or "key" in name else 1.0
                weight.normal_(0.0, 1.0 if "embeddings" in name else gain / weight.shape[1] ** 0.5)
    model.save_pretrained(folder)
    spec = read_any_spec(folder)
    assert isinstance(spec, EncoderSpec)
    return EncoderReference(folder, model, spec)


def write_wordpiece(folder: Path) -> int:
    """tokenizer.json of a BERT over WORDS and single letters; returns its size."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,?!", *letters, *("##" + c for c in letters), *WORDS[2:]]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", **special})
    return len(vocab)


def write_unigram(folder: Path) -> int:
    """tokenizer.json of an XLM-RoBERTa over the same words; returns its size."""
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [*specials, "\u2581", *("\u2581" + word for word in WORDS), *map(chr, range(ord("a"), ord("z") + 1))]
    vocab = [(piece, -float(i % 7) - 2.0 * (len(piece) < 3)) for i, piece in enumerate(dict.fromkeys(pieces))]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "cls_token": "<s>", "sep_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})
    return len(vocab)


def write_sentence_transformer(folder: Path, pooling: str, *, normalize: bool, **bert: Any) -> None:
    """modules.json and what it names, as sentence-transformers writes them. ``pooling`` is the name of a flag."""
    kinds = ["models.Transformer", "models.Pooling", *(["models.Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.{kind}"}
            for i, kind in enumerate(kinds)
        ],
    )
    flags = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    (folder / "1_Pooling").mkdir(exist_ok=True)
    config = {f"pooling_mode_{flag}": flag == pooling for flag in flags}
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 8, **config, "include_prompt": True})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": None, "do_lower_case": False, **bert})


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))
