"""Model folders of random weights in published shapes: speed without a download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

from penstock.spec.hf import read_model_spec
from penstock.spec.tensors import checkpoint_tensors

QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
}
"""Shapes of Qwen3-0.6B, from its model card's config.json."""

LLAMA32_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
"""Shapes of Llama 3.2 1B, from its model card's config.json, without its scaling of rope."""

MOE_64 = QWEN3_06B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 16,
    "moe_intermediate_size": 512,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
"""64 experts of which 8 are chosen, as in OLMoE, at half its width."""

TINY = QWEN3_06B | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1024,
}

SHAPES = {"qwen3-0.6b": QWEN3_06B, "llama-3.2-1b": LLAMA32_1B, "moe-64": MOE_64, "tiny": TINY}


def write_checkpoint(folder: Path, config: dict[str, Any] = QWEN3_06B) -> Path:
    """Random weights, small enough for finite activations, and a tokenizer of bytes and of words without merges."""
    size = config["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": size - 1, "bos_token_id": size - 1}))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(size)))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": f"w{size - 257}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    spec = read_model_spec(folder)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
        for name, shape in checkpoint_tensors(spec).items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", r"re:.*mlp\.gate$"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}
"""8-bit weights by channel, 8-bit activations by token, in the format of compressed-tensors."""


def write_w8a8(source: Path, folder: Path) -> Path:
    """The same model with 8-bit linears; embedding, head and router stay."""
    config = json.loads((source / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": W8A8}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        scale_O1 = weight.float().abs().amax(dim=1, keepdim=True) / 127
        tensors[name] = (weight.float() / scale_O1).round().clamp(-127, 127).to(torch.int8)
        tensors[f"{name}_scale"] = scale_O1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _tokenizer(size: int) -> dict[str, object]:
    bytes_and_words = [*sorted(ByteLevel.alphabet()), *(f"w{id}" for id in range(size))][:size]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {token: id for id, token in enumerate(bytes_and_words)}, "merges": []},
    }
