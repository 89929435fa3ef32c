"""``penstock serve``: an OpenAI-compatible HTTP server over one model or several."""

from __future__ import annotations

import json
import os
import shlex
from contextlib import AbstractContextManager, ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.base import ConfigError
from penstock.cli.config import ConfigOption
from penstock.cli.offers import Keeping, at_once, configured, models_of
from penstock.cli.options import engine_options, field_options
from penstock.cli.serve_options import (
    AdminPort,
    AllowAnyone,
    CorsOrigin,
    First,
    Host,
    KeepTexts,
    Keys,
    LogFile,
    Others,
    OtlpEndpoint,
    Port,
    QueueTokens,
    Store,
    TlsCert,
    TlsKey,
    TokenizerWorkers,
)

if TYPE_CHECKING:
    from penstock.assemble import Assembled
    from penstock.serving.gate import Gate
    from penstock.serving.models import Models
    from penstock.serving.spans import Spans
    from penstock.serving.transport import Certificate


@engine_options
@field_options(Keeping, "keeping")
def serve(
    model: First = None,
    others: Others = None,
    *,
    host: Host = "127.0.0.1",
    port: Port = None,
    store: Store = None,
    config: ConfigOption = None,
    keys: Keys = None,
    allow_anyone: AllowAnyone = False,
    admin_port: AdminPort = None,
    queue_tokens: QueueTokens = None,
    log_file: LogFile = None,
    keep_texts: KeepTexts = False,
    otlp_endpoint: OtlpEndpoint = None,
    tokenizer_workers: TokenizerWorkers = 1,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    cors_origin: CorsOrigin = None,
    keeping: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Serve MODEL over HTTP, with the API of OpenAI; or several, each in memory while it is used."""
    from penstock.wire import RemoteService, python

    kept, configs = Keeping(**keeping), configured([*([model] if model else []), *(others or [])], engine, config)
    service = RemoteService(python("penstock.host"), at_once(configs))  # first of all: it takes longest

    from penstock.serving import server
    from penstock.serving.requestlog import RequestLog
    from penstock.serving.transport import origins_of

    with ExitStack() as stack:  # what can be wrong with the options is noticed before the model is loaded
        stack.enter_context(closing(service))
        models = stack.enter_context(closing(models_of(configs, service, kept, tokenizer_workers)))
        bound = stack.enter_context(server.listen(host, port))
        public = not server.is_loopback(bound)
        gate = _gate(models, keys, queue_tokens, public=public, keep_texts=keep_texts)
        server.check_access(gate, public=public and not allow_anyone, admin=admin_port is not None)
        admin = None if admin_port is None else stack.enter_context(server.listen("127.0.0.1", admin_port))
        certificate, origins = _certificate(tls_cert, tls_key), origins_of(cors_origin) if cors_origin else ()
        log = None if log_file is None else RequestLog(log_file)
        spans = _spans(otlp_endpoint)
        scheme = "http" if certificate is None else "https"
        url, admin_url = server.url_of(bound, scheme), None if admin is None else server.url_of(admin, scheme)
        stack.enter_context(_present(list(models.all), url, admin_url, gate, certificate))
        greet = partial(_greet, models, url, admin_url, public=public, keyed=gate.ring is not None)
        server.serve(
            models,
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


def _gate(models: Models, keys: Path | None, queue_tokens: int | None, *, public: bool, keep_texts: bool) -> Gate:
    """Its queue has to fit what is loaded, now and later, unless its size is given."""
    from penstock.fleet import Admission
    from penstock.serving.gate import FIRST_TOKENS, Gate, queue_budget

    gate = Gate(Admission(queue_tokens or FIRST_TOKENS), keys, public=public, keep_texts=keep_texts)
    if queue_tokens is None:
        models.changed = lambda: gate.widen(sum(map(queue_budget, models.engines)))
    return gate


def _spans(endpoint: str | None) -> Spans | None:
    """Raises ConfigError: (otel_missing), and as ``Spans``."""
    if not endpoint:
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


def _certificate(path: Path | None, key: Path | None) -> Certificate | None:
    """Raises ConfigError: tls_unusable."""
    from penstock.serving.transport import Certificate

    if path is None and key is not None:
        raise ConfigError("tls_unusable", "--tls-key is of no use", why="there is no --tls-cert", fix="give both")
    return None if path is None else Certificate(path, key)


def _present(
    models: list[str], url: str, admin_url: str | None, gate: Gate, certificate: Certificate | None
) -> AbstractContextManager[None]:
    """So that ``penstock ps`` finds it."""
    from penstock.serving.presence import Presence, began, present

    pid = os.getpid()
    here = Presence(
        pid=pid,
        began=began(pid) or 0,
        model=", ".join(models),
        url=url,
        admin=admin_url or url,
        token=gate.own_key(),
        certificate=None if certificate is None else str(certificate.path.absolute()),
    )
    return present(here)


def _greet(models: Models, url: str, admin_url: str | None, *, public: bool, keyed: bool) -> None:
    engine = models.engines[0]
    lines = [f"Serving {', '.join(models.all)} at {url}/v1"]
    if not engine.one_answer:
        lines.append(
            f"The {engine.config.backend} backend does not promise one answer: tokens can depend on what "
            "else runs at the same time. --backend ref promises it, slowly."
        )
    if public and not keyed:
        lines.append("Anyone who can reach this address can use it, and nobody administer it: it asks for no key.")
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
