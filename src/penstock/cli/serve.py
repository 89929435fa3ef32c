"""``penstock serve``: an OpenAI-compatible HTTP server over one model or several."""

from __future__ import annotations

import json
import os
import shlex
from contextlib import AbstractContextManager, ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.complete import complete_model
from penstock.cli.config import ConfigOption
from penstock.cli.offers import Keeping, at_once, configured, models_of
from penstock.cli.options import MODEL_HELP, engine_options, field_options

if TYPE_CHECKING:
    from penstock.assemble import Assembled
    from penstock.serving.gate import Gate
    from penstock.serving.models import Models


@engine_options
@field_options(Keeping, "keeping")
def serve(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model)
    ] = None,
    others: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL...", help="more models, each loaded when a request names it")
    ] = None,
    *,
    host: Annotated[
        str, typer.Option(help="address to listen on; by default only this machine can reach it")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="8000, or the next free one, unless given; 0 takes any")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="folder of uploaded files and batches; by default in ~/.local/share/penstock")
    ] = None,
    config: ConfigOption = None,
    keys: Annotated[
        Path | None, typer.Option(help="file of the keys that may use it (penstock keys); SIGHUP reads it again")
    ] = None,
    allow_anyone: Annotated[
        bool, typer.Option("--allow-anyone", help="let others than this machine reach it without a key")
    ] = False,
    admin_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="status, reload and drain, on loopback, for admin keys")
    ] = None,
    queue_tokens: Annotated[
        int | None, typer.Option(min=1, help="most tokens admitted at a time, prompts and completions; 8 KV pools")
    ] = None,
    log_file: Annotated[
        Path | None, typer.Option(help="append a line of JSON for each request (penstock logs); SIGHUP opens it anew")
    ] = None,
    keeping: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Serve MODEL over HTTP, with the API of OpenAI; or several, each in memory while it is used."""
    from penstock.wire import RemoteService, python

    kept, configs = Keeping(**keeping), configured([*([model] if model else []), *(others or [])], engine, config)
    service = RemoteService(python("penstock.host"), at_once(configs))  # first of all: it takes longest

    from penstock.fleet import Admission
    from penstock.serving import server
    from penstock.serving.gate import Gate
    from penstock.serving.requestlog import RequestLog

    with ExitStack() as stack:  # what can be wrong with the options is noticed before the model is loaded
        stack.enter_context(closing(service))
        models = stack.enter_context(closing(models_of(configs, service, kept)))
        bound = stack.enter_context(server.listen(host, port))
        public, gate = not server.is_loopback(bound), Gate(Admission(queue_tokens or 1), keys)
        server.check_access(gate, public=public and not allow_anyone, admin=admin_port is not None)
        admin = None if admin_port is None else stack.enter_context(server.listen("127.0.0.1", admin_port))
        log = None if log_file is None else RequestLog(log_file)
        _load(models, gate if queue_tokens is None else None)
        url, admin_url = server.url_of(bound), None if admin is None else server.url_of(admin)
        stack.enter_context(_present(list(models.all), url, admin_url, gate))
        greeting = _greeting(models, url, admin_url, public=public, keyed=gate.ring is not None)
        server.serve(models, bound, partial(print, greeting, flush=True), store, gate=gate, admin=admin, log=log)


def _load(models: Models, gate: Gate | None) -> None:
    """``gate``: whose queue has to fit what is loaded, now and later."""
    from penstock.serving.gate import queue_budget

    if gate is not None:
        models.changed = lambda: gate.widen(sum(map(queue_budget, models.engines)))
    models.start()


def _present(models: list[str], url: str, admin_url: str | None, gate: Gate) -> AbstractContextManager[None]:
    """So that ``penstock ps`` finds it."""
    from penstock.serving.presence import Presence, began, present

    pid = os.getpid()
    here = Presence(
        pid=pid, began=began(pid) or 0, model=", ".join(models), url=url, admin=admin_url or url, token=gate.own_key()
    )
    return present(here)


def _greeting(models: Models, url: str, admin_url: str | None, *, public: bool, keyed: bool) -> str:
    engine = models.engines[0]
    lines = [f"Serving {', '.join(models.all)} at {url}/v1"]
    if not engine.one_answer:
        lines.append(
            f"The {engine.config.backend} backend does not promise one answer: tokens can depend on what "
            "else runs at the same time. --backend ref promises it, slowly."
        )
    if public and not keyed:
        lines.append("Anyone who can reach this address can use it: this server asks for no key.")
    if admin_url:
        lines.append(f"Administration at {admin_url}")
    return "\n".join([*lines, f"Try it:\n  {example(url, engine, keyed=keyed)}", f"Or open {url}"])


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
