"""Writes models of transformers as GGUF files with llama.cpp's own package, by the published rules of its converter
(ggml-org/llama.cpp, conversion/base.py, llama.py, gemma.py, phi.py and others), and blocks that it cannot encode."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from torch import Tensor

from families import Config, random_config, random_rope
from oracle import Reference

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "granite": "granite",
    "olmo2": "olmo2",
    "olmoe": "olmoe",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
}
PERMUTED = ("llama", "mistral", "mixtral", "granite", "smollm3")
"""Those that are converted by LlamaModel and its heirs."""
ENUM = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
Encode = Callable[[str, np.ndarray], Kind]
"""The type that a tensor of that name, as the file calls it, is to have."""


def in_gguf(family: str, rng: random.Random) -> Config:
    """What a random configuration must not have, as a GGUF file cannot say it."""
    config = random_config(family, rng)
    kinds = ["default", "linear", "yarn"] + ["llama3"] * (family in PERMUTED)
    if "full_attention" not in config["rope_parameters"] and family not in ("phi3", "stablelm"):
        config["rope_parameters"] = random_rope(rng, *kinds)
    for rope in (config["rope_parameters"], *config["rope_parameters"].values()):
        if isinstance(rope, dict):
            for key in ("truncate", "mscale", "mscale_all_dim"):
                rope.pop(key, None)
    activation = "gelu_pytorch_tanh" if family.startswith("gemma") else "silu"
    config |= {"hidden_act": activation, "hidden_activation": activation, "use_sliding_window": False}
    config |= {"mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": family != "qwen2_moe"}
    config |= {"no_rope_layer_interval": 4, "num_hidden_layers": 4 if family == "smollm3" else 2}
    if family == "mixtral":
        config["sliding_window"] = None
    if family == "olmoe":
        config |= {"norm_topk_prob": False, "rms_norm_eps": 1e-5}
    if family.startswith("gemma"):
        config |= {"tie_word_embeddings": True, "attention_bias": False, "query_pre_attn_scalar": config["head_dim"]}
    if family in ("gemma2", "gemma3_text"):
        config["final_logit_softcapping"] = rng.choice([12.0, 30.0])
    if family == "gemma2":
        config["attn_logit_softcapping"] = rng.choice([3.0, 50.0])
    if family == "stablelm":
        config["tie_word_embeddings"] = False
    if family == "granite":
        config["attention_multiplier"] = round(config["attention_multiplier"], 4)  # a float32 in the file
    return config


def permute(weights: Tensor, heads: int) -> Tensor:
    """LlamaModel.permute: from halves to pairs."""
    shape = (heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return weights.reshape(shape).swapaxes(1, 2).reshape(weights.shape)


def unpermute(weights: Tensor, heads: int) -> Tensor:
    shape = (heads, weights.shape[0] // heads // 2, 2, *weights.shape[1:])
    return weights.reshape(shape).swapaxes(1, 2).reshape(weights.shape)


def write_gguf(
    folder: Path,
    path: Path,
    encode: Encode = lambda name, x: Kind.F32,
    vocabulary: Callable[[gguf.GGUFWriter], None] | None = None,
) -> dict[str, Tensor]:
    """Converts a model; what comes back are the numbers that are in the file, by their names in the folder."""
    config = transformers.AutoConfig.from_pretrained(folder).to_dict()
    family = config["model_type"]
    writer = gguf.GGUFWriter(path, ARCHITECTURES[family])
    _metadata(writer, family, config)
    if vocabulary is None:
        writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    else:
        vocabulary(writer)
    decoded = {}
    for name, (tensor, names) in _tensors(family, config, folder).items():
        data = tensor.contiguous().float().numpy()
        kind = encode(name, data) if tensor.ndim > 1 and "ffn_gate_inp" not in name else Kind.F32
        raw = quantize(data, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
        numbers = torch.from_numpy(gguf.quants.dequantize(raw, kind).reshape(data.shape).copy())
        decoded |= {hf: undo(numbers).contiguous() for hf, undo in names.items()}
    _rope_factors(writer, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return decoded


def as_gguf(reference: Reference, path: Path, encode: Encode = lambda name, x: Kind.F32) -> Reference:
    """The model as a file, and as a folder of the numbers that are in the file now."""
    save_file(write_gguf(reference.folder, path, encode), reference.folder / "model.safetensors")
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(reference.folder, dtype=torch.float32, **eager)
    return replace(reference, model=model.eval())


def sentencepiece(folder: Path) -> Callable[[gguf.GGUFWriter], None]:
    """The vocabulary of a BPE with byte fallback: a merge's rank is its token's score."""
    described = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    ranks = {"".join(pair): rank for rank, pair in reversed(list(enumerate(described["model"]["merges"])))}
    tokens = sorted(described["model"]["vocab"], key=described["model"]["vocab"].__getitem__)
    special = {token["content"] for token in described["added_tokens"]} - {"<unk>"}

    def kind(token: str) -> gguf.TokenType:
        if token.startswith("<0x"):
            return gguf.TokenType.BYTE
        return {"<unk>": gguf.TokenType.UNKNOWN}.get(token, gguf.TokenType(3 if token in special else 1))

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([-float(ranks.get(token, 0)) for token in tokens])
        writer.add_token_types([kind(token) for token in tokens])
        writer.add_bos_token_id(tokens.index("<s>"))
        writer.add_eos_token_id(tokens.index("</s>"))

    return write


def byte_level(folder: Path, pre: str, size: int) -> Callable[[gguf.GGUFWriter], None]:
    """The vocabulary of vocab.json and merges.txt, as TextModel.get_vocab_base has it."""
    ids = json.loads((folder / "vocab.json").read_text("utf-8"))
    added = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))["added_tokens_decoder"]
    texts = {i: text for text, i in ids.items()} | {int(i): token["content"] for i, token in added.items()}
    kinds = {int(i): gguf.TokenType(3 if token["special"] else 4) for i, token in added.items()}
    merges = (folder / "merges.txt").read_text("utf-8").splitlines()

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list([texts.get(i, f"[PAD{i}]") for i in range(size)])
        writer.add_token_types([kinds.get(i, gguf.TokenType(1 if i in texts else 5)) for i in range(size)])
        writer.add_token_merges([line for line in merges if line and not line.startswith("#version")])

    return write


def _tensors(family: str, config: Config, folder: Path) -> dict[str, tuple[Tensor, dict[str, Callable[..., Tensor]]]]:
    """Name in the file -> what it holds, and for each name in transformers what to make of it there."""
    names = gguf.get_tensor_name_map(ENUM[ARCHITECTURES[family]], config["num_hidden_layers"])
    out: dict[str, tuple[Tensor, dict[str, Callable[..., Tensor]]]] = {}
    experts: dict[str, list[tuple[str, Tensor]]] = {}
    for name, tensor in sorted(load_file(folder / "model.safetensors").items(), key=lambda item: _natural(item[0])):
        if ".experts." in name:
            before, after = name.split(".experts.")
            place = f"{before}.experts.{after.split('.', 1)[1]}"
            place = place.replace("model.", "").replace("block_sparse_moe", "feed_forward") if "moe" in place else place
            experts.setdefault(place, []).append((name, tensor))
            continue
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        undo: Callable[..., Tensor] = lambda x: x  # noqa: E731
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if family in PERMUTED and heads:
            tensor, undo = permute(tensor, config[heads]), lambda x, heads=config[heads]: unpermute(x, heads)
        if family.startswith("gemma") and name.endswith("norm.weight"):
            tensor, undo = tensor + 1, lambda x: x - 1
        if name.endswith("shared_expert_gate.weight"):
            tensor, undo = tensor.flatten(), lambda x: x.unsqueeze(0)
        out[theirs] = (tensor, {name: undo})
    for place, parts in experts.items():
        theirs = names.get_name(place, try_suffixes=(".weight",))
        assert theirs is not None, place
        undos = {name: lambda x, i=i: x[i] for i, (name, _) in enumerate(parts)}
        out[theirs] = (torch.stack([tensor for _, tensor in parts]), undos)
    return out


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in name.split(".")]


def _metadata(writer: gguf.GGUFWriter, family: str, config: Config) -> None:
    arch, rope = ARCHITECTURES[family], config["rope_parameters"]
    full = rope.get("full_attention", rope)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    if config.get("head_dim"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if family == "stablelm":
        writer.add_layer_norm_eps(config["layer_norm_eps"])
        writer.add_parallel_residual(False)
    else:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rotated = int(head_dim * (full.get("partial_rotary_factor") or 1.0))
    if rotated != head_dim or arch in ("llama", "granite", "smollm3"):
        writer.add_rope_dimension_count(rotated)
    writer.add_rope_freq_base(full["rope_theta"])
    if "sliding_attention" in rope:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    _rope_scaling(writer, full)
    if count := config.get("num_local_experts") or config.get("num_experts"):
        writer.add_expert_count(count)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if family in ("qwen2_moe", "qwen3_moe"):
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if family == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if family in ("gemma2", "gemma3_text"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if family in ("gemma2", "gemma3_text", "phi3") or (family == "mistral" and config["sliding_window"]):
        writer.add_sliding_window(config["sliding_window"] or 0)
    if family == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])


def _rope_scaling(writer: gguf.GGUFWriter, rope: Config) -> None:
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key in ("beta_fast", "beta_slow"):
            if rope.get(key) is not None:
                getattr(writer, f"add_rope_scaling_yarn_{key}")(rope[key])
        if rope.get("attention_factor") is not None:
            writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])


def _rope_factors(writer: gguf.GGUFWriter, config: Config) -> None:
    """LlamaModel.generate_extra_tensors and Phi3MiniModel's."""
    rope = config["rope_parameters"]
    if rope.get("rope_type") == "llama3":
        dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        freqs = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        original, factors = rope["original_max_position_embeddings"], []
        for freq in freqs.tolist():
            wavelen = 2 * math.pi / freq
            smooth = (original / wavelen - low) / (high - low)
            between = 1 / ((1 - smooth) / factor + smooth)
            factors.append(1.0 if wavelen < original / high else factor if wavelen > original / low else between)
        writer.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))
    if rope.get("long_factor"):
        original = config["original_max_position_embeddings"]
        scale = config["max_position_embeddings"] / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0)
        for key in ("long_factor", "short_factor"):
            name = f"rope_factors_{key.removesuffix('_factor')}.weight"
            writer.add_tensor(name, np.array(rope[key], dtype=np.float32))


# -- blocks ------------------------------------------------------------------------------------------------------------


def quantize(data: np.ndarray, kind: Kind) -> np.ndarray:
    """gguf-py's own encoders, and simple ones for what it only decodes."""
    if kind in (Kind.Q4_K, Kind.Q5_K):
        return _quantize_k(data, 15 if kind == Kind.Q4_K else 31)
    return _quantize_q6_k(data) if kind == Kind.Q6_K else gguf.quants.quantize(data, kind)


def _quantize_k(data: np.ndarray, top: int) -> np.ndarray:
    x = data.reshape(-1, 8, 32)
    low, high = np.minimum(x.min(2), 0), np.maximum(x.max(2), 0)
    d = ((high - low).max(1) / top / 63).astype(np.float16)[:, None]
    dmin = (-low.min(1) / 63).astype(np.float16)[:, None]
    sc = np.clip(np.round((high - low) / top / d), 1, 63)
    m = np.clip(np.round(-low / np.maximum(dmin, np.float16(1e-7))), 0, 63)
    step = (d.astype(np.float32) * sc)[:, :, None]
    q = np.clip(np.round((x + (dmin.astype(np.float32) * m)[:, :, None]) / step), 0, top).astype(np.uint8)
    sc, m = sc.astype(np.uint8), m.astype(np.uint8)
    first, second = sc[:, :4] | (sc[:, 4:] >> 4 << 6), m[:, :4] | (m[:, 4:] >> 4 << 6)
    scales = np.concatenate([first, second, (sc[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)], 1)
    qs = ((q[:, 0::2] & 15) | ((q[:, 1::2] & 15) << 4)).reshape(-1, 128)
    parts = [d.view(np.uint8), dmin.view(np.uint8), scales]
    if top == 31:
        parts.append(sum((q[:, j] >> 4) << j for j in range(8)).astype(np.uint8))
    return np.concatenate([*parts, qs], 1).reshape(*data.shape[:-1], -1)


def _quantize_q6_k(data: np.ndarray) -> np.ndarray:
    x = data.reshape(-1, 16, 16)
    largest = np.abs(x).max(2)
    d = (largest.max(1) / 31 / 127).astype(np.float16)[:, None]
    sc = np.clip(np.round(largest / 31 / d), 1, 127)
    q = np.clip(np.round(x / (d.astype(np.float32) * sc)[:, :, None]), -32, 31) + 32
    q = q.astype(np.uint8).reshape(-1, 2, 4, 32)
    low = (q[:, :, :2] & 15) | ((q[:, :, 2:] & 15) << 4)
    high = sum((q[:, :, j] >> 4) << (2 * j) for j in range(4)).astype(np.uint8)
    parts = [low.reshape(-1, 128), high.reshape(-1, 64), sc.astype(np.int8).view(np.uint8), d.view(np.uint8)]
    return np.concatenate(parts, 1).reshape(*data.shape[:-1], -1)
