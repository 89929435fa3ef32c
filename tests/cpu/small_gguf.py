"""GGUF files of random models, as small as can be, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from gguf_models import quantize

TOKENS = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab"]
KINDS = [2, 3, 3, 1, 1, 1, 1, 1]
ROWS = {"token_embd": 8, "blk.0.attn_q": 32, "blk.0.attn_k": 16, "blk.0.attn_v": 16}
"""Of the matrices, those whose rows are not as many as the model is wide; heads are of 16."""
NORMS = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")


def small(
    path: Path,
    architecture: str = "llama",
    kind: Kind = Kind.F32,
    *,
    width: int = 32,
    experts: int = 0,
    tensors: dict[str, tuple[int, ...] | None] | None = None,
    **keys: Any,
) -> Path:
    """Writes a file.

    Args:
        kind: of its matrices.
        tensors: others, or (None) those to leave out; dots in their names are dots.
        keys: of its metadata, dots written as __; None leaves one out.
    """
    said: dict[str, Any] = {"context_length": 64, "embedding_length": width, "block_count": 1}
    said |= {"feed_forward_length": width, "attention.head_count": 2, "attention.head_count_kv": 1}
    said |= {"attention.key_length": 16, "attention.layer_norm_rms_epsilon": 1e-5}
    said |= {"expert_count": experts, "expert_used_count": 2} if experts else {}
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (said | {key.replace("__", "."): value for key, value in keys.items()}).items():
        _add(writer, key if key.startswith("split.") else f"{architecture}.{key}", value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([-float(i) for i in range(len(TOKENS))])
    writer.add_token_types(KINDS)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    rng = np.random.default_rng(0)
    for name, shape in (_shapes(width, experts) | (tensors or {})).items():
        if shape is not None:
            stored = kind if len(shape) > 1 else Kind.F32
            numbers = rng.standard_normal(shape, dtype=np.float32)
            data = quantize(np.abs(numbers) + 1 if name.startswith("rope") else numbers, stored)
            writer.add_tensor(name if name.endswith(".bias") else f"{name}.weight", data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shapes(width: int, experts: int) -> dict[str, tuple[int, ...] | None]:
    shapes: dict[str, tuple[int, ...] | None] = {name: (rows, width) for name, rows in ROWS.items()}
    shapes |= dict.fromkeys(NORMS, (width,)) | {"blk.0.attn_output": (width, 32)}
    for name in ("ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{name}_exps" if experts else f"blk.0.{name}"] = (experts, width, width)[not experts :]
    return shapes | ({"blk.0.ffn_gate_inp": (experts, width)} if experts else {})


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    adders = {str: writer.add_string, bool: writer.add_bool, float: writer.add_float32, list: writer.add_array}
    adders.get(type(value), writer.add_uint32)(key, value)
