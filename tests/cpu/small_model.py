"""A model folder of random weights, as small as one can be, for tests of what reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from penstock.base import ModelFormatError
from penstock.kernels import make_ops
from penstock.models import Decoder, Placement, load_decoder
from penstock.spec import ModelSpec
from penstock.spec.hf import model_spec
from penstock.spec.tensors import checkpoint_tensors

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
SPEC = model_spec(CONFIG)
CPU = torch.device("cpu")


def write_model(folder: Path, config: dict[str, Any] | None = None, **replaced: torch.Tensor | None) -> Path:
    """A random model of CONFIG; keyword arguments replace or (None) drop tensors, dots written as __."""
    config = config or CONFIG
    tensors: dict[str, torch.Tensor | None] = {
        name: torch.randn(shape) for name, shape in checkpoint_tensors(model_spec(config)).items()
    }
    tensors |= {name.replace("__", "."): tensor for name, tensor in replaced.items()}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors", {"format": "pt"})
    return folder


def load(folder: Path, spec: ModelSpec = SPEC, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_decoder(folder, spec, make_ops("ref"), Placement(dtype, CPU))


def code_of(error: pytest.ExceptionInfo[ModelFormatError]) -> str:
    assert error.value.what and str(error.value).endswith(f"[{error.value.code}]")
    return error.value.code
