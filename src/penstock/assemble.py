"""The one place that turns names into objects: from an EngineConfig to a running engine."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from penstock.base import ConfigError, NotFound, Unavailable
from penstock.core.admission import Limits
from penstock.core.engine import Journal
from penstock.core.kv.groups import PoolSpec
from penstock.core.plan import Executor
from penstock.core.setup import EngineSetup
from penstock.spec import Dtype, EngineConfig, ModelSpec, Vocabulary
from penstock.spec.hf import read_model_spec
from penstock.spec.sizing import weight_bytes
from penstock.text import ChatTemplate, Tokenizer, load_chat_template, load_tokenizer

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    import torch

    from penstock.runtime.service import LocalService

BUNDLED = Path(__file__).parent / "bundled"
BUNDLED_NAME = "penstock-tiny"
MIN_CONTEXT = 256
HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """A model ready to serve, and what the layers above it need to know.

    Attributes:
        name: what clients call the model.
        config: resolved: nothing in it is "auto" any more.
        setup: the numbers that determine every decision; a recording starts with them.
        one_answer: whether the kernels keep the promise of docs/architecture.md, bit for bit.
    """

    name: str
    config: EngineConfig
    spec: ModelSpec
    vocabulary: Vocabulary
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    setup: EngineSetup
    executor: Executor
    service: LocalService
    one_answer: bool

    def close(self) -> None:
        self.service.close()


def build_engine(config: EngineConfig, journal: Journal | None = None) -> Assembled:
    """Loads a model and starts its engine.

    Raises:
        NotFound: (model_not_found) no such folder or hub id.
        ModelFormatError: the folder is damaged or of an architecture this build does not run.
        ConfigError: the configuration cannot run here; the message has the numbers.
    """
    from penstock.runtime.service import LocalService

    folder = find_model(config.model)
    tokenizer = load_tokenizer(folder, read_model_spec(folder).vocab_size)
    chat = load_chat_template(folder, config.chat_template)
    loaded = load_executor(folder, config, tokenizer.vocabulary)
    return Assembled(
        name=config.served_model_name or _name(config.model),
        config=loaded.config,
        spec=loaded.spec,
        vocabulary=tokenizer.vocabulary,
        tokenizer=tokenizer,
        chat=chat,
        setup=loaded.setup,
        executor=loaded.executor,
        service=LocalService(loaded.setup.scheduler(), loaded.executor, loaded.setup.depth, journal),
        one_answer=loaded.one_answer,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model in memory with its KV pools, and the numbers a scheduler for it is made from."""

    config: EngineConfig
    spec: ModelSpec
    setup: EngineSetup
    executor: Executor
    one_answer: bool


def load_executor(folder: Path, config: EngineConfig, vocabulary: Vocabulary) -> Loaded:
    """The part of an engine that knows tensors. Raises as ``build_engine``."""
    import torch

    from penstock.kernels import make_ops
    from penstock.models import Placement, load_decoder, numerics_id
    from penstock.runtime.host import cpu_count
    from penstock.runtime.local import LocalExecutor
    from penstock.runtime.memory import check_weights, plan_pools
    from penstock.runtime.runner import Runner

    checkpoint = read_model_spec(folder)
    cpus = min(cpu_count(), torch.get_num_threads())  # the latter knows OMP_NUM_THREADS
    config = resolve(config, checkpoint, "cuda" if torch.cuda.is_available() else "cpu", cpus)
    if config.device == "cpu":
        torch.set_num_threads(config.num_threads or cpus)
    device, stored = torch.device(config.device), cast(Dtype, config.dtype)  # neither is "auto" any more
    placement, ops = Placement(getattr(torch, config.dtype), device), make_ops(config.backend)
    check_weights(checkpoint, stored, device)
    config = fit_context(config, checkpoint, stored, device)
    assert config.max_model_len is not None
    spec = replace(checkpoint, max_positions=config.max_model_len)
    decoder = load_decoder(folder, spec, ops, placement)
    pools = plan_pools(spec, config, stored, device)
    setup = engine_setup(config, pools, numerics_id(folder, spec, ops, placement), vocabulary)
    runner = Runner(
        decoder,
        ops,
        [
            ops.allocate_kv(
                len(g.layers), pool.blocks, config.block_size, g.kv_heads, g.head_dim, placement.dtype, device
            )
            for g, pool in zip(spec.kv_groups(), pools, strict=True)
        ],
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        device=device,
    )
    executor = LocalExecutor(runner, overlap=setup.depth > 1)
    return Loaded(config=config, spec=spec, setup=setup, executor=executor, one_answer=ops.one_answer)


def find_model(model: str | None) -> Path:
    """The folder of a model: the bundled one, a path, or a hub id (HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE honoured)."""
    if model in (None, BUNDLED_NAME):
        return BUNDLED
    assert model is not None
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        fix = "give a folder or a hub id such as org/name"
        raise NotFound("model_not_found", f"There is no model folder {model!r}", fix=fix)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except HFValidationError:
        raise NotFound("model_not_found", f"{model!r} is neither a folder nor a valid hub id") from None
    except LocalEntryNotFoundError:
        raise Unavailable(
            "hub_unreachable",
            f"{model} is not in the local cache and the hub cannot be reached",
            fix="check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a folder",
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        fix = "set HF_TOKEN to a token that may read it" if status in (401, 403) else "check the spelling"
        why = f"it answers {status}"
        raise NotFound("model_not_found", f"The hub does not give {model}", why=why, fix=fix) from None
    except OSError as error:
        raise Unavailable("hub_unreachable", f"{model} could not be fetched", why=type(error).__name__) from None


def resolve(config: EngineConfig, spec: ModelSpec, accelerator: str, cpus: int) -> EngineConfig:
    """Decides everything left open. ``accelerator`` is the best device there is.

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
    if config.max_model_len is not None and config.max_model_len > spec.max_positions:
        raise ConfigError(
            "context_too_long",
            f"max_model_len = {config.max_model_len} cannot run",
            why=f"the model was made for {spec.max_positions} positions",
            fix="lower it",
        )
    # fp16 products on CPUs take a path without matrix instructions; bfloat16 has the same size.
    stored = "bfloat16" if device == "cpu" and spec.dtype == "float16" else spec.dtype
    return replace(
        config,
        device=cast(Literal["cpu", "cuda"], device),
        backend="torch" if config.backend == "auto" else config.backend,
        dtype=stored if config.dtype == "auto" else config.dtype,
        max_num_seqs=min(config.max_num_seqs, config.max_num_batched_tokens),
        num_threads=config.num_threads or cpus,
        depth=config.depth or (1 if device == "cpu" else 2),
    )


def fit_context(config: EngineConfig, spec: ModelSpec, dtype: Dtype, device: torch.device) -> EngineConfig:
    """Fills in max_model_len: the model's own context, halved until one request of it fits in the KV pool."""
    from penstock.runtime.memory import plan_pools

    if config.max_model_len is not None:
        return config
    length = spec.max_positions
    while length > MIN_CONTEXT:
        try:
            plan_pools(spec, replace(config, max_model_len=length), dtype, device, reserved=weight_bytes(spec, dtype))
            break
        except ConfigError as error:
            if error.code != "kv_memory_too_small":
                raise
            length //= 2
            log.warning("max_model_len lowered to %d: %s", length, error.why)
    return replace(config, max_model_len=length)


def engine_setup(
    config: EngineConfig, pools: tuple[PoolSpec, ...], numerics: bytes, vocabulary: Vocabulary
) -> EngineSetup:
    """The brain's numbers, from a resolved configuration."""
    assert config.max_model_len is not None and config.depth is not None
    return EngineSetup(
        pools=pools,
        block_size=config.block_size,
        numerics_id=numerics,
        limits=Limits(
            max_batch_tokens=config.max_num_batched_tokens,
            max_batch_requests=config.max_num_seqs,
            max_model_len=config.max_model_len,
        ),
        vocabulary=vocabulary,
        policy=config.scheduling_policy,
        age_seconds=config.priority_age_seconds,
        prefix_cache=config.enable_prefix_caching,
        depth=config.depth,
    )


def _name(model: str | None) -> str:
    return BUNDLED_NAME if model in (None, BUNDLED_NAME) else (model or "").rstrip("/").rsplit(os.sep, 1)[-1]
