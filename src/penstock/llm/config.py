"""EngineConfig from the keyword arguments of vLLM's LLM."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from penstock.base import ConfigError
from penstock.spec import EngineConfig


def engine_config(model: str | None, options: Mapping[str, Any]) -> EngineConfig:
    """An EngineConfig from the keywords of vLLM's LLM.

    Raises:
        ConfigError: unknown_option, with the nearest name; unsupported_option.
    """
    known = {field.name for field in fields(EngineConfig)}
    given: dict[str, Any] = {"model": None if model is None else str(model)}
    for name, value in options.items():
        if name in known:
            given[name] = _as_written(name, value)
        elif name == "tokenizer" and value == model:
            pass
        elif name not in _NEUTRAL:
            near = difflib.get_close_matches(name, known | set(_NEUTRAL), n=1)
            raise ConfigError(
                "unknown_option",
                f"LLM has no option {name!r}",
                fix=f"did you mean {near[0]!r}?" if near else f"the options are: {', '.join(sorted(known))}",
            )
        elif _NEUTRAL[name] and value not in _NEUTRAL[name]:
            raise ConfigError(
                "unsupported_option",
                f"{name} = {value!r} cannot be used",
                why="this build does not have what it asks for",
                fix=f"leave {name} out",
            )
    return EngineConfig(**given)


def _as_written(name: str, value: Any) -> Any:
    """What a script passes as an object and the command line as text: torch dtypes, bytes as a number."""
    if name == "dtype":
        return _DTYPES.get(str(value), str(value))
    if name == "generation_config":
        return "auto" if value is None else value
    return str(value) if name == "kv_memory" and type(value) is int else value


_DTYPES = {"half": "float16", "float": "float32"} | {
    f"torch.{name}": name for name in ("float16", "bfloat16", "float32")
}

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "convert": (None, "auto", "none", "embed"),
    "cpu_offload_gb": (0,),
    "data_parallel_size": (1,),
    "disable_custom_all_reduce": (),
    "disable_log_stats": (),
    "distributed_executor_backend": (None,),
    "download_dir": (None,),
    "enable_chunked_prefill": (None, True),
    "enable_expert_parallel": (False,),
    "enable_lora": (None, False),
    "kv_cache_dtype": ("auto",),
    "load_format": ("auto", "safetensors"),
    "max_logprobs": (),
    "quantization": (None,),
    "revision": (None,),
    "runner": (None, "auto", "generate", "pooling"),
    "skip_tokenizer_init": (False,),
    "swap_space": (),
    "task": (None, "auto", "generate", "embed", "score"),
    "tokenizer": (None,),
    "tokenizer_mode": ("auto", "fast"),
    "tokenizer_revision": (None,),
    "trust_remote_code": (),
}
"""vLLM's keywords that Penstock has no use for, and the values that ask for nothing; () is any value."""
