"""Engines: in this process, or in another one and seen from here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.assemble.executor import Loaded, engine_setup, load_executor
from penstock.base import NotFound
from penstock.core.engine import Journal
from penstock.core.kv.groups import PoolSpec
from penstock.core.plan import Executor
from penstock.core.service import Service
from penstock.core.setup import EngineSetup
from penstock.spec import EncoderSpec, EngineConfig, ModelSpec, PoolingSpec, Vocabulary
from penstock.spec.encoder import read_any_spec
from penstock.spec.generation import read_recommended
from penstock.spec.location import BUNDLED_NAME, locate
from penstock.spec.pooling import read_pooling
from penstock.text import ChatTemplate, Tokenizer, load_chat_template, load_tokenizer
from penstock.text.parsers import Formats, formats_of
from penstock.wire import RemoteService

if TYPE_CHECKING:
    from penstock.grammar import Grammars


@dataclass(frozen=True, slots=True, kw_only=True)
class Face:
    """What can be had of a model without its tensors.

    Attributes:
        name: what clients call the model.
        recommended: sampling parameters that the model's folder recommends; empty where they are passed over.
        formats: how it writes tool calls and thoughts.
        grammars: compiles structured outputs for this tokenizer; made when it is first called.
    """

    name: str
    spec: ModelSpec | EncoderSpec
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    formats: Formats
    pooling: PoolingSpec
    recommended: Mapping[str, Any]
    grammars: Callable[[], Grammars]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """A model ready to serve, and what the layers above it need to know.

    Attributes:
        name, chat, formats, recommended, grammars: as of ``Face``.
        config: resolved: nothing is left to be decided by the machine or the model.
        setup: the numbers that determine every decision; a recording starts with them.
        executor: None if the engine is another process.
        one_answer: whether the kernels keep the promise of docs/architecture.md, bit for bit.
    """

    name: str
    config: EngineConfig
    spec: ModelSpec | EncoderSpec
    vocabulary: Vocabulary
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    formats: Formats
    pooling: PoolingSpec
    recommended: Mapping[str, Any]
    setup: EngineSetup
    executor: Executor | None
    service: Service
    one_answer: bool
    grammars: Callable[[], Grammars]

    @property
    def generates(self) -> bool:
        """Whether it continues texts; an encoder, or a decoder without its output layer, only makes vectors of them."""
        return isinstance(self.spec, ModelSpec) and not self.pooling.headless

    def close(self) -> None:
        self.service.close()


def build_engine(config: EngineConfig, journal: Journal | None = None) -> Assembled:
    """Loads a model and starts its engine in this process.

    Raises:
        NotFound: (model_not_found) no such folder or hub id.
        ModelFormatError: the folder is damaged or of an architecture this build does not run.
        ConfigError: the configuration cannot run here; the message has the numbers.
    """
    from penstock.runtime.service import LocalService

    folder = find_model(config.model)
    face = read_face(folder, config)
    loaded = load_behind(face, folder, config)
    service = LocalService(loaded.setup.scheduler(), loaded.executor, loaded.setup.depth, journal)
    return _assembled(face, loaded.config, loaded.spec, loaded.setup, service, loaded.one_answer, loaded.executor)


def front_of(service: RemoteService, config: EngineConfig) -> Assembled:
    """An engine in another process, seen from this one, once it has its model. Raises as ``build_engine``."""
    if not isinstance(locate(config.model), Path):
        service.ready()  # it is not fetched twice
    face = read_face(find_model(config.model), config)
    ready = service.ready()
    config = replace(ready.config, model=config.model)
    pools = tuple(PoolSpec(blocks, window) for blocks, window in ready.pools)
    setup = engine_setup(config, pools, ready.numerics_id, face.tokenizer.vocabulary, whole=ready.whole)
    spec = face.spec
    if isinstance(spec, ModelSpec):
        spec = replace(spec, max_positions=setup.limits.max_model_len)
    return _assembled(face, config, spec, setup, service, ready.one_answer)


def read_face(folder: Path, config: EngineConfig) -> Face:
    """Raises as ``build_engine``."""
    spec = read_any_spec(folder)
    tokenizer = load_tokenizer(folder, spec.vocab_size)
    chat = load_chat_template(folder, config.chat_template)
    return Face(
        name=name_of(config),
        spec=spec,
        tokenizer=tokenizer,
        chat=chat,
        formats=formats_of(chat, tokenizer.added_tokens, calls=config.tool_parser, thoughts=config.reasoning_parser),
        pooling=read_pooling(folder, spec),
        recommended=read_recommended(folder) if config.generation_config == "auto" else {},
        grammars=cache(lambda: _grammars(tokenizer)),
    )


def load_behind(
    face: Face, folder: Path, config: EngineConfig, told: Callable[[float], None] = lambda _: None, taken: int = 0
) -> Loaded:
    """What computes for a face; ``told`` and ``taken`` as for ``load_executor``. Raises as ``build_engine``."""
    between = face.tokenizer.pair_frame()[1] if face.pooling.classifier else []
    separator = between[0] if between else None
    return load_executor(folder, config, face.tokenizer.vocabulary, separator, face.grammars, told, taken)


def _assembled(
    face: Face,
    config: EngineConfig,
    spec: ModelSpec | EncoderSpec,
    setup: EngineSetup,
    service: Service,
    one_answer: bool,
    executor: Executor | None = None,
) -> Assembled:
    return Assembled(
        name=face.name,
        config=config,
        spec=spec,
        vocabulary=face.tokenizer.vocabulary,
        tokenizer=face.tokenizer,
        chat=face.chat,
        formats=face.formats,
        pooling=face.pooling,
        recommended=face.recommended,
        setup=setup,
        executor=executor,
        service=service,
        one_answer=one_answer,
        grammars=face.grammars,
    )


def _grammars(tokenizer: Tokenizer) -> Grammars:
    """Late, since most engines never see a grammar."""
    from penstock.grammar import Grammars, TokenTable

    vocabulary, special = tokenizer.vocabulary, tokenizer.special_tokens.values()
    return Grammars(
        lambda: TokenTable([tokenizer.token_bytes(i) for i in range(vocabulary.size)], special, vocabulary.eos_ids)
    )


def find_model(model: str | None) -> Path:
    """The folder or GGUF file of a model: the bundled one, a path, or that of a hub id, downloaded if need be.

    Raises:
        NotFound: (model_not_found) no such folder or hub id.
        Unavailable: (hub_unreachable) a hub id that is not in the cache, and no hub.
    """
    place = locate(model)
    if isinstance(place, Path):
        return place
    from penstock.hub import fetch

    return fetch(place)


def find_here(model: str | None) -> Path | None:
    """As ``find_model``, of what is on this machine already; None if it is not."""
    with suppress(NotFound):
        place = locate(model)
        if isinstance(place, Path):
            return place
        from penstock.hub import cached

        return cached(place)
    return None


def name_of(config: EngineConfig) -> str:
    """What clients call a model."""
    file = (config.model or BUNDLED_NAME).rstrip("/").rsplit(os.sep, 1)[-1].removesuffix(".gguf")
    return config.served_model_name or file
