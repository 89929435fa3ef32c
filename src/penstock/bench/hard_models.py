"""Models that are hard to quantize, or that others can quantize as they mean to: for ``bench quality``."""

from __future__ import annotations

import json
import shutil
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from penstock.spec.location import BUNDLED

WIDE = 512
"""Of the models made here: rows that GGML's blocks of 256 fit, as they do not fit the bundled model's 384."""


def write_padded(folder: Path) -> None:
    """The bundled model with columns, rows and heads of zeros added: the same function."""
    config = json.loads((BUNDLED / "config.json").read_text("utf-8"))
    hidden, heads, kv_heads, d = (
        config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    more = WIDE - hidden
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(BUNDLED / "model.safetensors").items():
        if weight.ndim == 1:  # of what is normed the mean square shrinks
            weight = pad(weight.float() * (hidden / WIDE) ** 0.5, (0, more)).bfloat16()
        elif "q_proj" in name:
            weight = pad(_more_heads(weight, heads, kv_heads, d), (0, more))
        elif "o_proj" in name:
            weight = pad(_more_heads(weight.mT, heads, kv_heads, d).mT, (0, 0, 0, more))
        else:
            weight = pad(weight, (0, 0, 0, more) if "down_proj" in name else (0, more))
        tensors[name] = weight.contiguous()
    _write(folder, config | {"hidden_size": WIDE, "num_attention_heads": WIDE // d}, tensors)


def _more_heads(weight: Tensor, heads: int, kv_heads: int, d: int) -> Tensor:
    """Heads of zeros at the end of each group that shares K and V."""
    grouped = weight.reshape(kv_heads, heads // kv_heads, d, -1)
    return pad(grouped, (0, 0, 0, 0, 0, (WIDE // d - heads) // kv_heads)).reshape(WIDE, -1)


def write_outliers(folder: Path, times: float = 1000.0, channels: int = 8) -> None:
    """Random weights, and in each layer a few rows of the up projection that are ``times`` the others."""
    config = json.loads((BUNDLED / "config.json").read_text("utf-8"))
    hidden, ffn, layers, vocab = WIDE, 4 * WIDE, 4, config["vocab_size"]
    config |= {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 8, "tie_word_embeddings": False}
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int, size: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * (size / sqrt(columns))

    tensors = {
        "model.embed_tokens.weight": torch.randn(vocab, hidden, generator=generator),
        "lm_head.weight": random(vocab, hidden, 2.0),
        "model.norm.weight": torch.ones(hidden),
    }
    kv = config["num_key_value_heads"] * config["head_dim"]
    for layer in range(layers):
        p = f"model.layers.{layer}."
        tensors |= {f"{p}{norm}_layernorm.weight": torch.ones(hidden) for norm in ("input", "post_attention")}
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            tensors[f"{p}self_attn.{name}_proj.weight"] = random(rows, hidden)
        for name, rows, columns in (("gate", ffn, hidden), ("up", ffn, hidden), ("down", hidden, ffn)):
            tensors[f"{p}mlp.{name}_proj.weight"] = random(rows, columns)
        tensors[f"{p}mlp.up_proj.weight"][torch.randperm(ffn, generator=generator)[:channels]] *= times
    _write(folder, config, {name: weight.bfloat16() for name, weight in tensors.items()})


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BUNDLED / name, folder / name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
