"""EngineConfig: everything an operator can set. CLI flags and docs are generated from it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from penstock.base import ConfigError


def option(default: Any, help: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A field whose help text feeds the CLI and the reference page, and whose range is checked."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """None means "decide from the model and the machine"; ``assemble.resolve`` fills it in."""

    model: str | None = option(None, "model folder, GGUF file or hub id; the bundled model by default")
    served_model_name: str | None = option(None, "name clients use; by default the model's own")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where the model runs")
    backend: Literal["auto", "ref", "torch", "cpu"] = option(
        "auto", "kernels: cpu is native and exact, torch runs anywhere, ref is exact and slow"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "arithmetic of activations and weights")
    quant: Literal["none", "int8", "int4"] = option(
        "none", "weights as small integers with a scale for each 32 inputs, made when the model is loaded"
    )
    weight_cache: bool = option(
        True,
        "keep weights on disk as the kernels read them, so that the next start maps them (PENSTOCK_CACHE says where)",
    )
    max_model_len: int | None = option(None, "longest prompt plus completion, in tokens", low=1, high=134217728)
    max_num_seqs: int = option(64, "most requests in one step", low=1, high=65536)
    max_num_batched_tokens: int = option(
        1024, "token budget of one step; long prompts are computed in chunks of it", low=1, high=16777216
    )
    max_mixed_prefill: int | None = option(
        None,
        "tokens of prompts in a step in which others wait for their next token; by default 48 for each thread of a CPU",
        low=1,
        high=16777216,
    )
    block_size: int = option(16, "tokens in one KV block", low=1, high=65536)
    kv_memory: str | None = option(None, 'memory of the KV pool, such as "2G"')
    kv_dtype: Literal["auto", "int8"] = option(
        "auto", "K and V as stored: auto as dtype; int8 holds about twice the tokens (kernels cpu and ref)"
    )
    gpu_memory_utilization: float = option(0.9, "share of GPU memory the engine may use", low=0.01, high=1)
    enable_prefix_caching: bool = option(True, "reuse KV blocks of equal prefixes")
    scheduling_policy: Literal["fcfs", "priority"] = option(
        "priority", "order in which requests are served: by priority and arrival, or by arrival alone"
    )
    priority_age_seconds: float = option(10.0, "waiting time worth one priority level", low=0, high=1000000000.0)
    depth: int | None = option(None, "steps in flight: 1 plain, 2 overlaps scheduling with compute", low=1, high=64)
    seed: int | None = option(0, "root of the seeds of requests that bring none")
    tensor_parallel_size: int = option(1, "devices that share each layer", low=1, high=65536)
    pipeline_parallel_size: int = option(1, "devices that share the layers", low=1, high=65536)
    enforce_eager: bool = option(False, "never capture steps as graphs")
    num_threads: int | None = option(None, "compute threads on a CPU", low=1, high=4096)
    chat_template: str | None = option(None, "file with a chat template that replaces the model's own")
    tool_parser: str | None = option(
        None, "format of tool calls that replaces the one the chat template shows; or none"
    )
    reasoning_parser: str | None = option(None, "format of thoughts, likewise; or none")
    generation_config: Literal["auto", "none", "vllm"] = option(
        "auto",
        "sampling that requests leave open: auto as the model's generation_config.json says; none (or vllm) as if it "
        "said nothing",
    )
    logits_rule: str | None = option(None, "rules that requests may ask for by name: [name=]package.module:factory,...")

    def __post_init__(self) -> None:
        """Raises ConfigError(option_invalid) for a value of the wrong type or out of range."""
        for option in fields(self):
            value, low, high = getattr(self, option.name), option.metadata["low"], option.metadata["high"]
            if wrong := _wrong_type(value, _kinds()[option.name]):
                raise _invalid(option.name, value, wrong)
            if low is not None and value is not None and not low <= value <= high:
                raise _invalid(option.name, value, f"it must be from {low:.12g} to {high:.12g}")


@cache
def _kinds() -> dict[str, Any]:
    return get_type_hints(EngineConfig)


def _wrong_type(value: object, kind: Any) -> str | None:
    """Why a value is not of an option's type, or None."""
    if get_origin(kind) is Literal:
        return None if value in get_args(kind) else f"it must be one of {', '.join(get_args(kind))}"
    kinds: tuple[type, ...] = get_args(kind) or (kind,)
    fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    if fits and not (isinstance(value, bool) and bool not in kinds):
        return None
    names = " or ".join(k.__name__ for k in kinds if k is not type(None))
    return f"it must be {names}, not {type(value).__name__}"


def _invalid(name: str, value: object, why: str) -> ConfigError:
    fix = "leave it out to have it chosen"
    return ConfigError("option_invalid", f"{name} = {value!r} cannot be used", why=why, fix=fix)
