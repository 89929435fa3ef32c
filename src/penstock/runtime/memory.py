"""How much memory there is, and how many KV blocks of each group it holds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from penstock.base import ConfigError, parse_size
from penstock.core.kv.groups import PoolSpec
from penstock.runtime.host import available_memory
from penstock.spec import Dtype, EngineConfig, ModelSpec
from penstock.spec.sizing import activation_bytes, kv_block_bytes, kv_dtype_of, kv_request_blocks, weight_bytes

log = logging.getLogger(__name__)

GIB = 1 << 30
MIN_CONTEXT = 256
CPU_REQUESTS = 32
"""Requests of max_model_len that the KV pool holds by default on a CPU, memory permitting."""
CPU_SHARE = 4
"""The default pool takes at most one part in so many of the free memory on a CPU."""


def free_memory(device: torch.device) -> int:
    """Bytes a new allocation may take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory()


def working_set(device: torch.device) -> int:
    """Numbers to work on together: on a CPU what its caches hold, on a GPU what is worth a launch."""
    return 1 << 24 if device.type == "cuda" else 1 << 17


class HostCopy:
    """Tensors on their way to the host, from this point of the device's queue: work queued later is not waited for."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._arrived = list(tensors), None
        if tensors[0].device.type == "cuda":
            pinned = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
            self._tensors = [host.copy_(t, non_blocking=True) for host, t in zip(pinned, tensors, strict=True)]
            self._arrived = torch.Event(tensors[0].device)
            self._arrived.record()

    def wait(self) -> list[Tensor]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors


def plan_pools(
    spec: ModelSpec, config: EngineConfig, dtype: Dtype, device: torch.device, reserved: int = 0
) -> tuple[PoolSpec, ...]:
    """The KV pools to allocate, one per group. ``reserved`` bytes that are free now will be taken by others, such
    as weights still to be loaded.

    Raises:
        ConfigError: (kv_memory_too_large) ``kv_memory`` is more than what is free; (kv_memory_too_small) the pool
            cannot hold one request of max_model_len; (size_invalid).
    """
    return split_budget(spec, config, dtype, kv_budget(spec, config, dtype, device, reserved))


def fit_context(
    config: EngineConfig, spec: ModelSpec, dtype: Dtype, device: torch.device, taken: int = 0
) -> EngineConfig:
    """Fills in max_model_len: the model's own context, halved until one request of it fits in the KV pool."""
    if config.max_model_len is not None:
        return config
    length = spec.max_positions
    weights = weight_bytes(spec, dtype, config.quant)
    while length > MIN_CONTEXT:
        try:
            plan_pools(spec, replace(config, max_model_len=length), dtype, device, reserved=weights + taken)
            break
        except ConfigError as error:
            if error.code != "kv_memory_too_small":
                raise
            length //= 2
            log.warning("max_model_len lowered to %d: %s", length, error.why)
    return replace(config, max_model_len=length)


def pool_bytes(spec: ModelSpec, config: EngineConfig, dtype: Dtype, pools: Sequence[PoolSpec]) -> int:
    """Of all pools, once every block has been used."""
    stored = kv_dtype_of(config, dtype)
    groups = zip(spec.kv_groups(), pools, strict=True)
    return sum(pool.blocks * kv_block_bytes(group, config.block_size, stored) for group, pool in groups)


def kv_budget(spec: ModelSpec, config: EngineConfig, dtype: Dtype, device: torch.device, reserved: int = 0) -> int:
    """Bytes the KV pools may take together."""
    free = free_memory(device) - reserved
    if config.kv_memory is not None:
        budget = parse_size(config.kv_memory)
        if budget > free:
            raise ConfigError(
                "kv_memory_too_large",
                f"kv_memory = {config.kv_memory!r} does not fit in the memory of {device}",
                why=f"it is {gib(budget)} and {gib(free)} are free",
                fix="lower kv_memory or leave it out",
            )
        return budget
    if device.type == "cuda":
        total = int(torch.cuda.mem_get_info(device)[1])
        activations = activation_bytes(spec, config.max_num_batched_tokens, config.max_num_seqs, dtype)
        return int(total * config.gpu_memory_utilization) - (total - free) - activations
    request, chunk = _demand(spec, config, dtype)
    return min(CPU_REQUESTS * request + chunk, free // CPU_SHARE)


def split_budget(spec: ModelSpec, config: EngineConfig, dtype: Dtype, budget: int) -> tuple[PoolSpec, ...]:
    """Gives each group blocks for the same number of requests, and windowed ones the chunk that is being computed.

    A group with a window holds little of a long request, so it needs fewer blocks than one that sees everything.
    """
    request, chunk = _demand(spec, config, dtype)
    if budget < request + chunk:
        raise ConfigError(
            "kv_memory_too_small",
            f"One request of max_model_len = {_length(spec, config)} tokens does not fit in the KV pool",
            why=f"it needs {gib(request + chunk)} in {kv_dtype_of(config, dtype)} and the pool may take "
            f"{gib(max(0, budget))}",
            fix="lower max_model_len, raise kv_memory or gpu_memory_utilization, or use a smaller dtype or kv_dtype",
        )
    size = config.block_size
    return tuple(
        PoolSpec(
            kv_request_blocks(group, _length(spec, config), size) * (budget - chunk) // request
            + _chunk_blocks(group.window, config),
            group.window,
        )
        for group in spec.kv_groups()
    )


def least_kv(spec: ModelSpec, config: EngineConfig, dtype: Dtype) -> int:
    """Bytes of KV without which nothing runs: one request, of the shortest context if that is left open."""
    length = config.max_model_len or min(MIN_CONTEXT, spec.max_positions)
    return sum(_demand(spec, replace(config, max_model_len=length), dtype))


def _demand(spec: ModelSpec, config: EngineConfig, dtype: Dtype) -> tuple[int, int]:
    """Bytes of one request of max_model_len, and of the blocks a chunk takes beyond the windows."""
    request = chunk = 0
    for group in spec.kv_groups():
        block = kv_block_bytes(group, config.block_size, kv_dtype_of(config, dtype))
        request += kv_request_blocks(group, _length(spec, config), config.block_size) * block
        chunk += _chunk_blocks(group.window, config) * block
    return request, chunk


def _chunk_blocks(window: int | None, config: EngineConfig) -> int:
    """Blocks that the tokens of one step may open before those behind the window are given back."""
    return 0 if window is None else -(-config.max_num_batched_tokens // config.block_size)


def _length(spec: ModelSpec, config: EngineConfig) -> int:
    return config.max_model_len or spec.max_positions


def gib(size: int) -> str:
    unit, name = next(((1 << p, n) for p, n in ((30, "GiB"), (20, "MiB")) if size >= (1 << p) // 100), (1 << 10, "KiB"))
    return f"{size / unit:.2f} {name}"
