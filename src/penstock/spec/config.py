"""EngineConfig: everything an operator can set. CLI flags and docs are generated from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def option(default: Any, help: str) -> Any:
    """A field whose help text feeds the CLI and the reference page."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """None means "decide from the model and the machine"; ``assemble.resolve`` fills it in."""

    model: str | None = option(None, "model folder or hub id; the bundled model by default")
    served_model_name: str | None = option(None, "name clients use; by default the model's own")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where the model runs")
    backend: Literal["auto", "ref", "torch"] = option("auto", "kernels: ref is exact and slow, torch is fast")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "arithmetic of activations and weights")
    max_model_len: int | None = option(None, "longest prompt plus completion, in tokens")
    max_num_seqs: int = option(64, "most requests in one step")
    max_num_batched_tokens: int = option(1024, "token budget of one step; long prompts are computed in chunks of it")
    block_size: int = option(16, "tokens in one KV block")
    kv_memory: str | None = option(None, 'memory of the KV pool, such as "2G"')
    gpu_memory_utilization: float = option(0.9, "share of GPU memory the engine may use")
    enable_prefix_caching: bool = option(True, "reuse KV blocks of equal prefixes")
    scheduling_policy: Literal["fcfs", "priority"] = option("fcfs", "order in which requests are served")
    priority_age_seconds: float = option(10.0, "waiting time worth one priority level")
    depth: int | None = option(None, "steps in flight: 1 plain, 2 overlaps scheduling with compute")
    seed: int | None = option(0, "root of the seeds of requests that bring none")
    tensor_parallel_size: int = option(1, "devices that share each layer")
    pipeline_parallel_size: int = option(1, "devices that share the layers")
    enforce_eager: bool = option(False, "never capture steps as graphs")
    num_threads: int | None = option(None, "compute threads on a CPU")
    chat_template: str | None = option(None, "file with a chat template that replaces the model's own")
