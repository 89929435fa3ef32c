"""``penstock serve``: an OpenAI-compatible HTTP server over one model."""

from __future__ import annotations

import json
import os
import shlex
from contextlib import AbstractContextManager, ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.base import ConfigError, env
from penstock.cli.complete import complete_model
from penstock.cli.config import ConfigOption
from penstock.cli.options import MODEL_HELP, engine_options
from penstock.cli.serve_options import (
    AdminPort,
    CorsOrigin,
    LogFile,
    OtlpEndpoint,
    QueueTokens,
    Store,
    TlsCert,
    TlsKey,
    TokenizerWorkers,
)
from penstock.spec import EngineConfig

if TYPE_CHECKING:
    from penstock.assemble import Assembled
    from penstock.llm import AsyncLLM
    from penstock.serving.gate import Gate
    from penstock.serving.spans import Spans
    from penstock.serving.transport import Certificate


@engine_options
def serve(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model)
    ] = None,
    *,
    host: Annotated[
        str, typer.Option(help="address to listen on; by default only this machine can reach it")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="8000, or the next free one, unless given; 0 takes any")
    ] = None,
    store: Store = None,
    config: ConfigOption = None,
    keys: Annotated[
        Path | None, typer.Option(help="file of the keys that may use it (penstock keys); SIGHUP reads it again")
    ] = None,
    allow_anyone: Annotated[
        bool, typer.Option("--allow-anyone", help="let others than this machine reach it without a key")
    ] = False,
    admin_port: AdminPort = None,
    queue_tokens: QueueTokens = None,
    log_file: LogFile = None,
    otlp_endpoint: OtlpEndpoint = None,
    tokenizer_workers: TokenizerWorkers = 1,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    cors_origin: CorsOrigin = None,
    engine: dict[str, Any],
) -> None:
    """Serve MODEL over HTTP, with the API of OpenAI."""
    from penstock.wire import RemoteService, python

    wanted = EngineConfig(model=model, **engine)
    service = RemoteService(python("penstock.host"), wanted)  # first of all: what it imports and reads takes longest

    from penstock.assemble import front_of
    from penstock.fleet import Admission
    from penstock.serving import server
    from penstock.serving.gate import Gate, queue_budget
    from penstock.serving.requestlog import RequestLog
    from penstock.serving.transport import origins_of

    with ExitStack() as stack:  # what can be wrong with the options is noticed before the model is loaded
        stack.enter_context(closing(service))
        bound = stack.enter_context(server.listen(host, port))
        public, gate = not server.is_loopback(bound), Gate(Admission(queue_tokens or 1), keys)
        server.check_access(gate, public=public and not allow_anyone, admin=admin_port is not None)
        admin = None if admin_port is None else stack.enter_context(server.listen("127.0.0.1", admin_port))
        certificate, origins = _certificate(tls_cert, tls_key), origins_of(cors_origin) if cors_origin else ()
        log = None if log_file is None else RequestLog(log_file)
        spans = _spans(otlp_endpoint or env.otlp_endpoint())
        llm = _with_workers(front_of(service, wanted), tokenizer_workers)
        gate.admission.budget = queue_tokens or queue_budget(llm.engine)
        scheme = "http" if certificate is None else "https"
        url, admin_url = server.url_of(bound, scheme), None if admin is None else server.url_of(admin, scheme)
        stack.enter_context(_present(llm.engine, url, admin_url, gate, certificate))
        greet = partial(_greet, llm.engine, url, admin_url, public=public, keyed=gate.ring is not None)
        server.serve(
            llm,
            bound,
            greet,
            store,
            gate=gate,
            admin=admin,
            log=log,
            spans=spans,
            certificate=certificate,
            origins=origins,
        )


def _spans(endpoint: str | None) -> Spans | None:
    """Raises ConfigError: (otel_missing), and as ``Spans``."""
    if endpoint is None:
        return None
    try:
        from penstock.serving.spans import Spans
    except ImportError as error:
        raise ConfigError(
            "otel_missing",
            f"Spans cannot be sent to {endpoint}",
            why=str(error)[:200],
            fix="pip install 'penstock[otel]', or leave --otlp-endpoint and OTEL_EXPORTER_OTLP_ENDPOINT out",
        ) from error
    return Spans(endpoint)


def _with_workers(front: Assembled, count: int) -> AsyncLLM:
    from penstock.llm import AsyncLLM
    from penstock.wire import TextWorkers, python

    return AsyncLLM(front, texts=TextWorkers(python("penstock.texthost"), front.config, count) if count else None)


def _certificate(path: Path | None, key: Path | None) -> Certificate | None:
    """Raises ConfigError: tls_unusable."""
    from penstock.serving.transport import Certificate

    if path is None and key is not None:
        raise ConfigError("tls_unusable", "--tls-key is of no use", why="there is no --tls-cert", fix="give both")
    return None if path is None else Certificate(path, key)


def _present(
    engine: Assembled, url: str, admin_url: str | None, gate: Gate, certificate: Certificate | None
) -> AbstractContextManager[None]:
    """So that ``penstock ps`` finds it."""
    from penstock.serving.presence import Presence, began, present

    pid = os.getpid()
    here = Presence(
        pid=pid,
        began=began(pid) or 0,
        model=engine.name,
        url=url,
        admin=admin_url or url,
        token=gate.own_key(),
        certificate=None if certificate is None else str(certificate.path.absolute()),
    )
    return present(here)


def _greet(engine: Assembled, url: str, admin_url: str | None, *, public: bool, keyed: bool) -> None:
    lines = [f"Serving {engine.name} at {url}/v1"]
    if not engine.one_answer:
        lines.append(
            f"The {engine.config.backend} backend does not promise one answer: tokens can depend on what "
            "else runs at the same time. --backend ref promises it, slowly."
        )
    if public and not keyed:
        lines.append("Anyone who can reach this address can use it: this server asks for no key.")
    if admin_url:
        lines.append(f"Administration at {admin_url}")
    print("\n".join([*lines, f"Try it:\n  {example(url, engine, keyed=keyed)}", f"Or open {url}"]), flush=True)


def example(url: str, engine: Assembled, *, keyed: bool = False) -> str:
    """A line to paste into a shell, of what this model can do."""
    body: dict[str, Any]
    if engine.generates:
        path, body = "completions", {"prompt": "Once upon a time", "max_tokens": 48, "temperature": 0.7, "seed": 2}
    elif engine.pooling.classifier:
        path, body = "score", {"text_1": "Who has the key?", "text_2": ["Nobody had the key.", "The robin sang."]}
    else:
        path, body = "embeddings", {"input": "The garden was locked."}
    data = shlex.quote(json.dumps({"model": engine.name} | body))
    key = ' -H "Authorization: Bearer $KEY"' if keyed else ""
    return f"curl {url}/v1/{path} -H 'Content-Type: application/json'{key} -d {data}"
