"""What loading makes of a checkpoint: every family's tensors, their size, and numbers that are none."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import CONFIGS, random_config
from penstock.base import ModelFormatError
from penstock.kernels import make_ops
from penstock.models import Placement, load_decoder, numerics_id, weights
from penstock.spec.families import FAMILIES
from penstock.spec.hf import model_spec
from penstock.spec.sizing import active_parameters, parameters, weight_bytes
from penstock.spec.tensors import checkpoint_tensors
from small_model import CONFIG, CPU, code_of, write_model

ARCHITECTURES = {family.name: name for name, family in FAMILIES.items()}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    config = random_config(family, random.Random(f"weights {family}"))
    return config | {"architectures": [ARCHITECTURES[family]], "model_type": family} | changes


def tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_sizing_agrees_with_what_is_loaded(family: str, dtype: Any, tmp_path: Path) -> None:
    folder = write_model(tmp_path, config_of(family))
    spec = model_spec(config_of(family))
    decoder = load_decoder(folder, spec, make_ops("ref"), Placement(getattr(torch, dtype), CPU))
    loaded = {tensor.data_ptr(): tensor for tensor in tensors_in(decoder)}
    assert weight_bytes(spec, dtype) == sum(tensor.nbytes for tensor in loaded.values())
    assert active_parameters(spec) <= parameters(spec)
    assert (active_parameters(spec) < parameters(spec)) == (spec.moe is not None and spec.moe.active < spec.moe.experts)


def gpt_oss(*, packed: bool) -> dict[str, Any]:
    config = config_of("gpt_oss", hidden_size=64, intermediate_size=32, num_hidden_layers=1)
    return config | ({"quantization_config": {"quant_method": "mxfp4"}} if packed else {})


def packed_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name.replace(".", "__"): torch.full(shape, 120, dtype=torch.uint8)
        for name, shape in checkpoint_tensors(model_spec(config)).items()
        if name.endswith(("_blocks", "_scales"))
    }


WHERE = {
    "embedding": (CONFIG, "model.embed_tokens.weight"),
    "one of three fused": (CONFIG, "model.layers.1.self_attn.k_proj.weight"),
    "norm": (CONFIG, "model.norm.weight"),
    "norm with an offset": (config_of("gemma"), "model.layers.0.input_layernorm.weight"),
    "bias": (config_of("qwen2"), "model.layers.1.self_attn.v_proj.bias"),
    "an expert": (config_of("mixtral"), "model.layers.0.block_sparse_moe.experts.2.w3.weight"),
    "stacked experts": (gpt_oss(packed=False), "model.layers.0.mlp.experts.down_proj"),
    "stacked biases": (gpt_oss(packed=False), "model.layers.0.mlp.experts.gate_up_proj_bias"),
    "sinks": (gpt_oss(packed=False), "model.layers.0.self_attn.sinks"),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", WHERE)
def test_numbers_that_are_none_are_refused_by_name(where: str, value: float, tmp_path: Path) -> None:
    config, name = WHERE[where]
    spec = model_spec(config)
    damaged = torch.randn(checkpoint_tensors(spec)[name])
    damaged.view(-1)[-1] = value
    folder = write_model(tmp_path, config, **{name.replace(".", "__"): damaged})
    with pytest.raises(ModelFormatError, match=name) as error:
        load_decoder(folder, spec, make_ops("ref"), Placement(torch.float32, CPU))
    assert code_of(error) == "weights_not_finite" and "1 of the" in str(error.value)


def test_a_packed_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    config = gpt_oss(packed=True)
    tensors, spec = packed_tensors(config), model_spec(config)
    folder = write_model(tmp_path, config, **tensors)
    load_decoder(folder, spec, make_ops("ref"), Placement(torch.bfloat16, CPU))
    name = next(name for name in tensors if name.endswith("down_proj_scales"))
    tensors[name].view(-1)[5] = 255  # the format's NaN
    with pytest.raises(ModelFormatError, match="down_proj") as error:
        load_decoder(write_model(tmp_path, config, **tensors), spec, make_ops("ref"), Placement(torch.bfloat16, CPU))
    assert code_of(error) == "weights_not_finite" and "32 of the" in str(error.value)


def test_packed_tensors_must_be_bytes(tmp_path: Path) -> None:
    config = gpt_oss(packed=True)
    folder = write_model(tmp_path, config)
    with pytest.raises(ModelFormatError, match="U8") as error:
        load_decoder(folder, model_spec(config), make_ops("ref"), Placement(torch.bfloat16, CPU))
    assert code_of(error) == "weights_dtype"


def test_large_numbers_are_numbers(tmp_path: Path) -> None:
    """Their sum is infinite in any dtype; they are not. In a dtype of a smaller range they would be."""
    huge = torch.full((50, 24), 3e38)
    folder = write_model(tmp_path, model__embed_tokens__weight=huge)
    decoder = load_decoder(folder, model_spec(CONFIG), make_ops("ref"), Placement(torch.float32, CPU))
    assert torch.equal(decoder.embedding.table_VD, huge)
    with pytest.raises(ModelFormatError, match="float16") as error:
        load_decoder(folder, model_spec(CONFIG), make_ops("ref"), Placement(torch.float16, CPU))
    assert code_of(error) == "weights_not_finite"


@pytest.mark.parametrize("name", ["SEGMENT", "SUM_GROUP", "MAX_SEGMENTS"])
def test_whatever_orders_sums_is_in_the_numerics_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = (write_model(tmp_path, CONFIG), model_spec(CONFIG), make_ops("ref"), Placement(torch.float32, CPU))
    before = numerics_id(*about)
    assert numerics_id(*about) == before
    monkeypatch.setattr(weights, name, 2 * getattr(weights, name))
    assert numerics_id(*about) != before
