"""Which ``quantization_config`` of compressed-tensors (vllm-project/compressed-tensors) is read, and which written.

How a matrix is stored follows from its tensors; the configuration is looked at for what would make their numbers mean
something else. Targets and the ignore list are therefore not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penstock.base import ModelFormatError
from penstock.spec.fields import bad_config, unsupported

METHOD = "compressed-tensors"
FORMATS = ("pack-quantized", "int-quantized")
NUMBERS = 32
"""A scale's inputs are a multiple of so many, or all."""


def check_compressed(config: Mapping[str, Any]) -> None:
    """Raises ModelFormatError: (unsupported_quantization) with what is read instead; (config_invalid)."""
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if config.get(key):
            raise _refused(f"a {key}", "quantize the model without it")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise bad_config("quantization_config.config_groups", groups, "it must be an object with a group at least")
    for name, group in groups.items():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise bad_config(f"quantization_config.config_groups.{name}", group, "it must have weights")
        form = group.get("format") or config.get("format")
        if form not in FORMATS:
            raise _refused(f"the format {str(form)[:40]!r}", f"formats that are read: {', '.join(FORMATS)}")
        _check_weights(group["weights"], packed=form == FORMATS[0])
        _check_inputs(group.get("input_activations"))
        if group.get("output_activations"):
            raise _refused("output_activations", "quantize the model without them")


def _check_weights(weights: Mapping[str, Any], *, packed: bool) -> None:
    bits, group, symmetric = weights.get("num_bits", 8), weights.get("group_size"), weights.get("symmetric", True)
    strategy = weights.get("strategy") or ("group" if isinstance(group, int) and group > 0 else "channel")
    if weights.get("type", "int") != "int" or bits not in ((4, 8) if packed else (8,)):
        what = f"weights of {str(bits)[:20]} bits, type {str(weights.get('type', 'int'))[:20]}"
        raise _refused(what, "integers of 4 and 8 bits are read, of 8 where they are not packed")
    if not symmetric and bits == 8:
        raise _refused("8-bit weights with zero points", "asymmetric weights are read with 4 bits")
    if weights.get("actorder") in (True, "group", "dynamic"):
        raise _refused("weights in the order of their activations (g_idx)", "quantize with actorder static or null")
    if weights.get("dynamic"):
        raise _refused("dynamic weights", "quantize with dynamic false")
    if strategy == "group" and (type(group) is not int or group <= 0 or group % NUMBERS):
        raise _refused(f"groups of {str(group)[:20]} inputs", f"groups that are multiples of {NUMBERS} are read")
    if strategy not in ("group", "channel"):
        raise _refused(f"scales by {str(strategy)[:20]}", "the strategies group and channel are read")


def _check_inputs(inputs: object) -> None:
    """Integers made of them as they come are ours too, by smaller groups; scales fixed beforehand are not."""
    if not inputs:
        return
    if not isinstance(inputs, Mapping) or (
        inputs.get("type", "int"),
        inputs.get("num_bits"),
        inputs.get("dynamic"),
    ) != (
        "int",
        8,
        True,
    ):
        raise _refused("activations that are not 8-bit integers made as they come", "quantize with dynamic activations")


def compressed_config(quantization: str, group: int, outer: Sequence[str], ignored: list[str]) -> dict[str, Any]:
    """``quantization_config`` of a folder.

    Args:
        outer: targets outside the layers that have 8 bits: embedding, head.
        ignored: linears that stay as they are.
    """
    targets: dict[int, list[str]] = {4 if quantization == "int4" else 8: ["Linear"]}
    if outer:
        targets[8] = [*targets.get(8, []), *outer]
    groups = {
        f"group_{i}": {
            "targets": names,
            "weights": _weights(bits, group),
            "input_activations": None,
            "output_activations": None,
            "format": FORMATS[0],
        }
        for i, (bits, names) in enumerate(targets.items())
    }
    return {
        "quant_method": METHOD,
        "format": FORMATS[0],
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


def _weights(bits: int, group: int) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": bits == 8,
        "strategy": "group",
        "group_size": group,
        "dynamic": False,
        "actorder": None,
    }


def _refused(what: str, fix: str) -> ModelFormatError:
    return unsupported("quantization", f"compressed-tensors with {what}", fix)
