"""Whether a model and what it works with fit in memory, before it is loaded; and if not, which options would help."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from penstock.base import ConfigError, parse_size
from penstock.runtime.memory import fit_context, free_memory, gib, least_kv, plan_pools
from penstock.spec import Dtype, EncoderSpec, EngineConfig, ModelSpec
from penstock.spec.encoder import encoder_weight_bytes
from penstock.spec.quantization import check_formats
from penstock.spec.sizing import activation_bytes, weight_bytes

CODES = ("model_too_large", "kv_memory_too_large", "kv_memory_too_small")
SMALLEST_STEP = 128


def fit(
    spec: ModelSpec | EncoderSpec,
    config: EngineConfig,
    dtype: Dtype,
    device: torch.device,
    *,
    packed: bool = False,
    taken: int = 0,
) -> EngineConfig:
    """The configuration with ``max_model_len`` filled in (``fit_context``), if that fits in what is free.

    Args:
        packed: the weights are small integers already, so that ``quant`` cannot make them smaller.
        taken: bytes that seem to be free, and that others will need; below 0, that they will give back.

    Raises:
        ConfigError: (model_too_large, kv_memory_too_large, kv_memory_too_small) it does not; the message has the
            numbers, and names options only if they have been found to be enough. As ``plan_pools``.
    """

    def fitted(config: EngineConfig) -> EngineConfig:
        return _fitted(spec, config, dtype, device, taken)

    try:
        return fitted(config)
    except ConfigError as error:
        if error.code not in CODES:
            raise
        enough: list[str] = []
        for family in _changes(spec, config, packed):
            found = next(
                (changed for changed in family if _fits(config, changed, isinstance(spec, ModelSpec), fitted)), None
            )
            if found is not None and (len(found) == 1 or not enough):
                enough.append(" ".join(f"--{name.replace('_', '-')} {value}" for name, value in found.items()))
        none = "use a smaller model, or free some memory: no smaller weights, KV or steps are enough"
        fix = f"try {', or '.join(enough[:3])}" if enough else none
        raise ConfigError(error.code, error.what, why=error.why, fix=fix) from None


def _fitted(
    spec: ModelSpec | EncoderSpec, config: EngineConfig, dtype: Dtype, device: torch.device, taken: int
) -> EngineConfig:
    free = max(0, free_memory(device) - taken)
    if isinstance(spec, EncoderSpec):
        parts = {"weights": encoder_weight_bytes(spec, dtype)}
    else:
        least = least_kv(spec, config, dtype)
        parts = {
            "weights": weight_bytes(spec, dtype, config.quant),
            "KV of one request": least,
            "a step's activations": activation_bytes(spec, config.max_num_batched_tokens, config.max_num_seqs, dtype),
        }
    if (needed := sum(parts.values())) > free:
        raise ConfigError(
            "model_too_large",
            f"The model does not fit in the memory of {device}",
            why=f"it needs {gib(needed)} ({', '.join(f'{name} {gib(size)}' for name, size in parts.items())}) in "
            f"{dtype if config.quant == 'none' else config.quant} and {gib(free)} are free"
            + (f", beside {gib(taken)} that other models may need" if taken > 0 else ""),
            fix="choose a smaller model or --quant, lower max_model_len or max_num_batched_tokens, or free memory",
        )
    if isinstance(spec, EncoderSpec):
        return config
    config = fit_context(config, spec, dtype, device, taken)
    # A pool whose size was left open shrinks to what activations leave it.
    others = parts["weights"] if config.kv_memory is None else needed - least
    plan_pools(spec, config, dtype, device, reserved=others + taken)
    return config


def _changes(spec: ModelSpec | EncoderSpec, config: EngineConfig, packed: bool) -> Iterator[Iterable[dict[str, Any]]]:
    """What could be set otherwise, each with values of ever more harm; all of it together comes last."""
    if isinstance(spec, EncoderSpec):
        return
    quants = ("int8", "int4")[("none", "int8", "int4").index(config.quant) :] if not packed else ()
    steps, length = min(SMALLEST_STEP, config.max_num_batched_tokens), config.max_model_len
    pool = 0 if config.kv_memory is None else parse_size(config.kv_memory) >> 20
    if config.kv_memory is not None:
        yield ({"kv_memory": f"{pool >> shift}M"} for shift in range(1, pool.bit_length()))
    if length is not None:
        yield ({"max_model_len": length >> shift} for shift in range(1, (length // 256).bit_length()))
    if config.kv_dtype == "auto":
        yield [{"kv_dtype": "int8"}]
    yield ({"quant": quant} for quant in quants)
    if steps < config.max_num_batched_tokens:
        yield [{"max_num_batched_tokens": steps}]
    least = {} if config.kv_memory is None else {"kv_memory": f"{max(1, pool >> 3)}M"}
    yield ({"quant": quant, "kv_dtype": "int8", "max_num_batched_tokens": steps} | least for quant in quants)


def _fits(
    config: EngineConfig, changed: dict[str, Any], decoder: bool, fitted: Callable[[EngineConfig], EngineConfig]
) -> bool:
    try:
        config = replace(config, **changed)
        check_formats(config, config.backend, decoder=decoder)
        fitted(config)
    except ConfigError:
        return False
    return True
