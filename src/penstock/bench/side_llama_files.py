"""GGUF files of a model folder: argv is FOLDER OUT ``BF16``, or the file made so, OUT and another type.

Names and permutations are those of llama.cpp's convert_hf_to_gguf.py, for the shapes of ``checkpoints``. The file has
no tokenizer: a comparison hands over token ids. Runs in a venv that has llama-cpp-python, gguf and numpy.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as api
import numpy as np

ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
FILE_TYPES = {
    "Q8_0": api.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": api.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K_M": api.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}


def convert(folder: Path, out: Path) -> None:
    """bf16 weights as they are; norms and routers in fp32, as llama.cpp wants them."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    writer = gguf.GGUFWriter(out, ARCHITECTURES[config["model_type"]])
    _describe(writer, config)
    tensors = _read(folder / "model.safetensors")
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, bits in sorted(tensors.items()):
        if ".experts." in name:
            continue
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if config["model_type"] == "llama" and kind in heads:
            bits = _interleave(bits, heads[kind])
        _add(writer, _name(name), bits, wide=bits.ndim == 1 or name.endswith("mlp.gate.weight"))
    for layer in range(config["num_hidden_layers"]):
        for kind in ("gate", "up", "down") if "num_experts" in config else ():
            prefix = f"model.layers.{layer}.mlp.experts."
            each = [tensors[f"{prefix}{i}.{kind}_proj.weight"] for i in range(config["num_experts"])]
            _add(writer, f"blk.{layer}.ffn_{kind}_exps.weight", np.stack(each), wide=False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, out: Path, form: str) -> None:
    params: Any = api.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[form]
    if status := api.llama_model_quantize(os.fsencode(source), os.fsencode(out), params):
        raise RuntimeError(f"llama_model_quantize returned {status}")


def _describe(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(api.LLAMA_FTYPE_MOSTLY_BF16)
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _read(path: Path) -> dict[str, Any]:
    """bf16 tensors of a safetensors file, as the 16 bits they are."""
    data = np.memmap(path, np.uint8, "r")
    size = int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8 : 8 + size].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}"
        tensors[name] = data[start:end].view(np.uint16).reshape(entry["shape"])
    return tensors


def _interleave(bits: Any, heads: int) -> Any:
    """The halves that rope rotates against each other, in turn: llama.cpp's order for the llama family."""
    half = bits.shape[0] // heads // 2
    return bits.reshape(heads, 2, half, bits.shape[1]).swapaxes(1, 2).reshape(bits.shape)


def _name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.weight"
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    assert found, name
    return f"blk.{found[1]}.{NAMES[found[2]]}.weight"


def _add(writer: gguf.GGUFWriter, name: str, bits: Any, *, wide: bool) -> None:
    if wide:
        writer.add_tensor(name, (bits.astype(np.uint32) << 16).view(np.float32))
    else:
        raw = np.ascontiguousarray(bits).view(np.uint8)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


if __name__ == "__main__":
    source, out, form = sys.argv[1:]
    if form == "BF16":
        convert(Path(source), Path(out))
    else:
        quantize(Path(source), Path(out), form)
