"""The rope of a config.json: v4's ``rope_theta`` and ``rope_scaling`` or v5's ``rope_parameters``, with
transformers' precedence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from penstock.spec.families import Family
from penstock.spec.fields import Fields, bad_config, unsupported
from penstock.spec.model import RopeSpec

KINDS = ("default", "linear", "llama3", "yarn", "longrope")
UNREAD = ("mrope_section", "short_mscale", "long_mscale")
"""Keys of rope scalings that none of KINDS has."""
MAX_POSITIONS = 1 << 27


def read_rope(fields: Fields, family: Family, head_dim: int) -> tuple[RopeSpec, RopeSpec | None, int]:
    """(rope, rope of windowed layers where they have their own, longest context).

    Raises:
        ModelFormatError: (unsupported_rope), (config_invalid).
    """
    positions = fields.integer("max_position_embeddings", 1, MAX_POSITIONS)
    full, local = _local_and_full(fields) if family.local_rope else (_one_for_all(fields), None)
    rope = _rope(full, fields, family, head_dim, positions)
    if rope.kind == "yarn":  # published files count the positions before or after scaling
        positions = max(positions, int(min(rope.original_max_positions * rope.factor, MAX_POSITIONS)))
    return rope, None if local is None else _rope(local, fields, family, head_dim, positions), positions


def _one_for_all(fields: Fields) -> Fields:
    """``rope_scaling`` before ``rope_parameters``; where that lists a rope for each type of layer, they must agree."""
    key = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = _mapping(key, fields.get(key, {}))
    if nested := [rope[kind] for kind in ("full_attention", "sliding_attention") if rope.get(kind) is not None]:
        if any(one != nested[0] for one in nested):
            raise unsupported("rope", "a different rope in each type of layer", "choose a model with one rope")
        rope = _mapping(key, nested[0])
    return Fields({"rope_theta": fields.get("rope_theta", 10000.0)} | _given(rope), prefix=f"{key}.")


def _local_and_full(fields: Fields) -> tuple[Fields, Fields]:
    """(full, local) of Gemma 3. ``rope_scaling`` is of the full-attention layers alone."""
    key = "rope_parameters"
    both = _mapping(key, fields.get(key, {}))
    if both and not {"full_attention", "sliding_attention"} & both.keys():
        raise bad_config(key, dict(both), "it must have an entry for full_attention and one for sliding_attention")
    full, local = (_mapping(key, both.get(kind) or {}) for kind in ("full_attention", "sliding_attention"))
    scaling = _mapping("rope_scaling", fields.get("rope_scaling", {}))
    full = {"rope_theta": fields.get("rope_theta")} | _given(full) | _given(scaling)
    local = {"rope_theta": fields.get("rope_local_base_freq")} | _given(local)
    return Fields(full, prefix=f"{key}.full_attention."), Fields(local, prefix=f"{key}.sliding_attention.")


def _mapping(key: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise bad_config(key, value, "it must be an object")
    return value


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _rope(rope: Fields, fields: Fields, family: Family, head_dim: int, positions: int) -> RopeSpec:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "su" or (family.name == "phi3" and kind == "yarn"):  # LongRoPE before it had its name
        kind = "longrope"
    if kind not in KINDS:
        raise unsupported("rope", f"rope scaling of the type {str(kind)[:80]!r}", f"implemented are {', '.join(KINDS)}")
    for key in UNREAD:
        if rope.get(key) is not None:
            raise unsupported("rope", f"rope scaling with {key}", "choose a model without it")
    theta = rope.number("rope_theta", 0.0, 1e15)
    dims = _rotated(rope, fields, family, head_dim)
    if kind == "default":
        return RopeSpec(theta=theta, dims=dims)
    if kind == "linear":
        return RopeSpec(theta=theta, dims=dims, kind="linear", factor=rope.number("factor", 0.0, 1e6))
    outer = fields.optional_integer("original_max_position_embeddings", 1, MAX_POSITIONS)
    original = outer or rope.integer("original_max_position_embeddings", 1, MAX_POSITIONS, default=positions)
    if kind == "llama3":
        return _llama3(rope, theta, dims, original)
    factor = rope.number("factor", 0.0, 1e6, default=positions / original)
    if kind == "yarn":
        return _yarn(rope, theta, dims, original, factor)
    return _longrope(rope, theta, dims, (dims or head_dim) // 2, original, factor)


def _rotated(rope: Fields, fields: Fields, family: Family, head_dim: int) -> int:
    """``RopeSpec.dims``."""
    share = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if share != 1 and not family.partial_rotary:
        raise unsupported("rope", "partial_rotary_factor", f"{family.name} models rotate whole heads")
    dims = int(head_dim * Fields({"partial_rotary_factor": share}).number("partial_rotary_factor", 0.0, 1.0))
    if dims < 2 or dims % 2:
        raise bad_config(
            "partial_rotary_factor", share, f"it rotates {dims} of {head_dim} elements, not an even number"
        )
    return 0 if dims == head_dim else dims


def _llama3(rope: Fields, theta: float, dims: int, original: int) -> RopeSpec:
    low, high = rope.number("low_freq_factor", 0.0, 1e6), rope.number("high_freq_factor", 0.0, 1e6)
    if low >= high:
        raise bad_config("low_freq_factor", low, f"it must be below high_freq_factor, which is {high}")
    return RopeSpec(
        theta=theta,
        dims=dims,
        kind="llama3",
        factor=rope.number("factor", 0.0, 1e6),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=original,
    )


def _yarn(rope: Fields, theta: float, dims: int, original: int, factor: float) -> RopeSpec:
    fast = rope.number("beta_fast", 0.0, 1e6, default=32.0)
    slow = rope.number("beta_slow", 0.0, 1e6, default=1.0)
    if theta <= 1:  # the range of wavelengths is found by dividing by its logarithm
        raise bad_config("rope_theta", theta, "YaRN needs it above 1")
    # DeepSeek's two factors change the amplitude only together.
    scales = [rope.number(key, 0.0, 1e6) if rope.get(key) else 0.0 for key in ("mscale", "mscale_all_dim")]
    above, below = scales if all(scales) else (1.0, 0.0)
    growth = 0.1 * math.log(max(1.0, factor))
    return RopeSpec(
        theta=theta,
        dims=dims,
        kind="yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=fast,
        beta_slow=slow,
        truncate=rope.flag("truncate", default=True),
        amplitude=rope.number("attention_factor", 0.0, 1e6, default=(1 + above * growth) / (1 + below * growth)),
    )


def _longrope(rope: Fields, theta: float, dims: int, angles: int, original: int, factor: float) -> RopeSpec:
    lists = {}
    for key in ("short_factor", "long_factor"):
        values = rope.get(key)
        if not isinstance(values, list) or len(values) != angles:
            raise bad_config(key, values, f"it must list {angles} numbers, one for each pair of rotated elements")
        lists[key] = tuple(Fields({key: value}).number(key, 0.0, 1e6) for value in values)
    stretch = 1.0 if factor <= 1 or original == 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeSpec(
        theta=theta,
        dims=dims,
        kind="scaled",
        original_max_positions=original,
        factors=lists["short_factor"],
        long_factors=lists["long_factor"],
        amplitude=rope.number("attention_factor", 0.0, 1e6, default=stretch),
    )
