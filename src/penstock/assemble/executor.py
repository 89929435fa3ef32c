"""The part of an engine that knows tensors, from an EngineConfig."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from penstock.assemble.resolve import resolve_here
from penstock.base import env, parse_size
from penstock.core.admission import Limits
from penstock.core.kv.groups import PoolSpec
from penstock.core.plan import Executor
from penstock.core.setup import EngineSetup
from penstock.formats import WeightCache, file_digest, open_checkpoint
from penstock.spec import Dtype, EncoderSpec, EngineConfig, ModelSpec, Vocabulary
from penstock.spec.encoder import read_any_spec
from penstock.spec.pooling import read_pooling
from penstock.spec.rule_places import invalid_option, rule_places

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    import torch

    from penstock.core.plan import NewRequest
    from penstock.grammar import Grammars
    from penstock.kernels import KVLayer, Ops
    from penstock.models import Placement
    from penstock.runtime.encoder import EncoderRunner
    from penstock.runtime.runner import Runner
    from penstock.sampling import LogitsRule, RuleFactory, RuleKit


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model in memory with its KV pools, and the numbers a scheduler for it is made from. ``held``: bytes that the
    system counts as free until they are used, or always, and that this model needs.
    """

    config: EngineConfig
    spec: ModelSpec | EncoderSpec
    setup: EngineSetup
    executor: Executor
    one_answer: bool
    held: int = 0


def load_executor(
    folder: Path,
    config: EngineConfig,
    vocabulary: Vocabulary,
    separator: int | None = None,
    grammars: Callable[[], Grammars] | None = None,
    told: Callable[[float], None] = lambda _: None,
    taken: int = 0,
) -> Loaded:
    """The part of an engine that knows tensors. Raises as ``build_engine``.

    Args:
        separator: token id between the texts of a pair, which a cross-encoder needs to know.
        grammars: compiles structured outputs; without it they are not obeyed.
        told: hears which share of the layers is in memory; 0 again and again while files are read for other ends.
        taken: bytes that seem to be free, and that others will need.
    """
    import torch

    from penstock.layers import Packing
    from penstock.models import numerics_id
    from penstock.runtime.memory import plan_pools, pool_bytes
    from penstock.runtime.packed import load_kept
    from penstock.runtime.runner import Runner

    checkpoint, config, ops, placement = _planned(folder, config, taken)
    device, stored = placement.device, cast(Dtype, config.dtype)  # which is not "auto" any more
    if isinstance(checkpoint, EncoderSpec):
        return _load_encoder(folder, config, checkpoint, ops, placement, vocabulary, separator)
    placement = replace(placement, kv_dtype=None if config.kv_dtype == "auto" else getattr(torch, config.kv_dtype))
    assert config.max_model_len is not None
    spec = replace(checkpoint, max_positions=config.max_model_len)
    packing, store = Packing(ops, spec, placement, config.quant), weight_cache(config, lambda: told(0.0))
    decoder, mapped = load_kept(folder, spec, ops, placement, packing, store, told)
    pools = plan_pools(spec, config, stored, device, reserved=mapped + taken)
    digest = store.digest if store else partial(file_digest, told=lambda: told(0.0))
    setup = engine_setup(config, pools, numerics_id(folder, spec, ops, placement, packing.recipe, digest), vocabulary)
    runner = Runner(
        decoder,
        ops,
        _allocate(ops, spec, pools, config.block_size, placement),
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        device=device,
        kit=_rule_kit(config, grammars, vocabulary, device),
        eager=config.enforce_eager,
    )
    return _loaded(config, spec, setup, runner, ops, held=mapped + pool_bytes(spec, config, stored, pools))


def check_behind(folder: Path, config: EngineConfig, taken: int) -> None:
    """Whether ``load_executor`` may succeed, as the headers of the files and the plan of memory have it: no tensor is
    read. Raises the same.

    Args:
        taken: below 0, bytes that others will give back before.
    """
    from penstock.models import open_encoder, open_tensors

    spec, config, _, placement = _planned(folder, config, taken)
    checkpoint = open_checkpoint(folder)
    if isinstance(spec, EncoderSpec):
        open_encoder(checkpoint, spec, placement)
    else:
        open_tensors(checkpoint, spec, placement)
    load_logits_rules(config.logits_rule)
    weight_cache(config)


def _planned(
    folder: Path, config: EngineConfig, taken: int
) -> tuple[ModelSpec | EncoderSpec, EngineConfig, Ops, Placement]:
    """All that is decided before a tensor is read."""
    import torch

    from penstock.kernels import make_ops
    from penstock.models import Placement
    from penstock.runtime.fit import fit
    from penstock.runtime.host import keep_freed_memory

    spec = read_any_spec(folder)
    config = resolve_here(config, spec)
    if config.device == "cpu":
        torch.set_num_threads(config.num_threads or 1)
        keep_freed_memory()
    device, stored = torch.device(config.device), cast(Dtype, config.dtype)  # neither is "auto" any more
    placement, ops = Placement(getattr(torch, config.dtype), device), make_ops(config.backend)
    config = as_stored(config, folder, ops)
    if taken >= 0 or config.device == "cpu":  # what others have of another device is not known here
        config = fit(spec, config, stored, device, packed=is_packed(config, folder, ops), taken=taken)
    return spec, config, ops, placement


def _allocate(
    ops: Ops, spec: ModelSpec, pools: tuple[PoolSpec, ...], size: int, placement: Placement
) -> list[list[KVLayer]]:
    return [
        ops.allocate_kv(len(g.layers), pool.blocks, size, g.kv_heads, g.head_dim, placement.kv, placement.device)
        for g, pool in zip(spec.kv_groups(), pools, strict=True)
    ]


def weight_cache(config: EngineConfig, told: Callable[[], None] = lambda: None) -> WeightCache | None:
    """Raises ConfigError: (size_invalid) PENSTOCK_CACHE_SIZE is no size."""
    return WeightCache(env.cache_folder(), parse_size(env.cache_size()), told) if config.weight_cache else None


def as_stored(config: EngineConfig, folder: Path, ops: Ops) -> EngineConfig:
    """``quant`` of a quantized file is what it holds, where the backend computes with it."""
    from penstock.quant import stored_quantization

    return replace(config, quant=stored_quantization(folder, config.quant)) if ops.grouped else config


def is_packed(config: EngineConfig, folder: Path, ops: Ops) -> bool:
    """Whether the file holds small integers already."""
    return as_stored(replace(config, quant="none"), folder, ops).quant != "none"


def _rule_kit(
    config: EngineConfig, grammars: Callable[[], Grammars] | None, vocabulary: Vocabulary, device: torch.device
) -> RuleKit:
    from penstock.sampling import RuleKit

    final = (_grammar_rules(grammars, vocabulary, device),) if grammars else ()
    return RuleKit(factories=load_logits_rules(config.logits_rule), final=final)


def load_logits_rules(option: str | None) -> dict[str, RuleFactory]:
    """The logits rules an engine is started with, by name.

    Raises:
        ConfigError: (logits_rule_invalid) the option cannot be read, or names what cannot be imported.
    """
    factories: dict[str, RuleFactory] = {}
    for name, module, attribute in rule_places(option):
        if name in factories:
            raise invalid_option(option, f"it names {name!r} twice")
        try:
            factory = getattr(import_module(module), attribute)
        except Exception as error:  # whatever a module does when it is imported
            raise invalid_option(option, f"{module}:{attribute}: {type(error).__name__}: {error}"[:300]) from error
        if not callable(factory):
            raise invalid_option(option, f"{module}:{attribute} is a {type(factory).__name__} and cannot be called")
        factories[name] = factory
    return factories


def _grammar_rules(
    grammars: Callable[[], Grammars], vocabulary: Vocabulary, device: torch.device
) -> Callable[[NewRequest], LogitsRule | None]:
    def make(request: NewRequest) -> LogitsRule | None:
        if request.params.structured_outputs is None:
            return None
        from penstock.sampling.grammar import grammar_rule

        return grammar_rule(request, grammars(), vocabulary.eos_ids, device)

    return make


def _load_encoder(
    folder: Path,
    config: EngineConfig,
    spec: EncoderSpec,
    ops: Ops,
    placement: Placement,
    vocabulary: Vocabulary,
    separator: int | None,
) -> Loaded:
    """An encoder has no KV, and its texts are computed whole: a step holds at least the longest one."""
    from penstock.models import load_encoder, numerics_id
    from penstock.runtime.encoder import EncoderRunner

    made_for = read_pooling(folder, spec).max_length or spec.max_positions
    longest = config.max_model_len or min(made_for, spec.max_positions)
    budget = max(config.max_num_batched_tokens, longest)
    config = replace(config, max_model_len=longest, max_num_batched_tokens=budget)
    encoder = load_encoder(folder, spec, ops, placement)
    store = weight_cache(config)
    numerics = numerics_id(folder, spec, ops, placement, digest=store.digest if store else file_digest)
    setup = engine_setup(config, (), numerics, vocabulary, whole=True)
    runner = EncoderRunner(encoder, separator=separator, device=placement.device)
    return _loaded(config, spec, setup, runner, ops)


def _loaded(
    config: EngineConfig,
    spec: ModelSpec | EncoderSpec,
    setup: EngineSetup,
    runner: Runner | EncoderRunner,
    ops: Ops,
    held: int = 0,
) -> Loaded:
    from penstock.runtime.local import LocalExecutor

    executor = LocalExecutor(runner, overlap=setup.depth > 1)
    return Loaded(config=config, spec=spec, setup=setup, executor=executor, one_answer=ops.one_answer, held=held)


def engine_setup(
    config: EngineConfig, pools: tuple[PoolSpec, ...], numerics: bytes, vocabulary: Vocabulary, *, whole: bool = False
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
            max_mixed_prefill=config.max_mixed_prefill,
            whole=whole,
        ),
        vocabulary=vocabulary,
        policy=config.scheduling_policy,
        age_seconds=config.priority_age_seconds,
        prefix_cache=config.enable_prefix_caching,
        depth=config.depth,
    )
