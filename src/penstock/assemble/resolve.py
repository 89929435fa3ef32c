"""From an EngineConfig that leaves things open to one that a machine can run."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from typing import Literal, cast

from penstock.base import ConfigError
from penstock.spec import EncoderSpec, EngineConfig, ModelSpec
from penstock.spec.quantization import check_formats

log = logging.getLogger(__name__)

MIXED_PREFILL = 48
"""Tokens of prompts for each thread, in a step in which others wait: those of a model of 0.6 billion parameters take
0.4 s on cores without matrix units, where the tokens of 32 who wait take 0.2 s."""


def resolve_here(config: EngineConfig, spec: ModelSpec | EncoderSpec) -> EngineConfig:
    """``resolve`` for this machine."""
    import torch

    from penstock.kernels import native
    from penstock.runtime.host import cpu_count

    cpus = min(cpu_count(), torch.get_num_threads())  # the latter knows OMP_NUM_THREADS
    resolved = resolve(config, spec, "cuda" if torch.cuda.is_available() else "cpu", cpus, native=native())
    if (config.backend, resolved.backend, resolved.device) == ("auto", "torch", "cpu"):
        _tell_of_torch()
    return resolved


@cache
def _tell_of_torch() -> None:
    """pip shows nothing of an installation that succeeds: whoever has no compiler learns it here."""
    log.warning(
        "penstock was installed without its native CPU kernels (no C++ compiler, or no Python headers): torch computes,"
        " slower, and answers may depend on what else runs; install g++ and python3-dev and install penstock again"
    )


def resolve(
    config: EngineConfig, spec: ModelSpec | EncoderSpec, accelerator: str, cpus: int, *, native: bool = False
) -> EngineConfig:
    """Decides everything left open. ``accelerator`` is the best device there is; ``native``: our CPU kernels are built.

    Raises:
        ConfigError: what was asked for cannot be had here.
    """
    for name, what in (("tensor_parallel_size", "tensor"), ("pipeline_parallel_size", "pipeline")):
        if (size := getattr(config, name)) != 1:
            raise ConfigError(
                "parallelism_unsupported",
                f"{name} = {size} cannot run",
                why=f"this build has no {what} parallelism yet",
                fix=f"use {name} = 1",
            )
    device = accelerator if config.device == "auto" else config.device
    if device != "cpu" and device != accelerator:
        raise ConfigError(
            "device_missing",
            f"device = {device} cannot run",
            why="torch finds no such device here",
            fix="use device = auto",
        )
    backend = ("cpu" if native and device == "cpu" else "torch") if config.backend == "auto" else config.backend
    if backend == "cpu" and device != "cpu":
        raise ConfigError(
            "backend_device",
            f"backend = cpu cannot run on device = {device}",
            why="its kernels are for the processor",
            fix="use backend = auto, or device = cpu",
        )
    check_formats(config, backend, decoder=isinstance(spec, ModelSpec))
    if config.max_model_len is not None and config.max_model_len > spec.max_positions:
        raise ConfigError(
            "context_too_long",
            f"max_model_len = {config.max_model_len} cannot run",
            why=f"the model was made for {spec.max_positions} positions",
            fix="lower it",
        )
    # fp16 products on CPUs take a path without matrix instructions; bfloat16 has the same size.
    stored = "bfloat16" if device == "cpu" and spec.dtype == "float16" else spec.dtype
    threads = config.num_threads or cpus
    return replace(
        config,
        device=cast(Literal["cpu", "cuda"], device),
        backend=backend,
        dtype=stored if config.dtype == "auto" else config.dtype,
        max_num_seqs=min(config.max_num_seqs, config.max_num_batched_tokens),
        max_mixed_prefill=config.max_mixed_prefill or (MIXED_PREFILL * threads if device == "cpu" else None),
        num_threads=threads,
        depth=config.depth or (1 if device == "cpu" else 2),
    )
