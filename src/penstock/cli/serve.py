"""``penstock serve``: an OpenAI-compatible HTTP server over one model."""

from __future__ import annotations

import json
import shlex
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli.complete import complete_model
from penstock.cli.options import MODEL_HELP, engine_options
from penstock.spec import EngineConfig

if TYPE_CHECKING:
    from penstock.assemble import Assembled


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
    engine: dict[str, Any],
) -> None:
    """Serve MODEL over HTTP, with the API of OpenAI."""
    from penstock.wire import RemoteService, python

    config = EngineConfig(model=model, **engine)
    service = RemoteService(python("penstock.host"), config)  # first of all: what it imports and reads takes longest

    from penstock.assemble import front_of
    from penstock.llm import AsyncLLM
    from penstock.serving import server

    with closing(service), server.listen(host, port) as bound:
        llm = AsyncLLM(front_of(service, config))
        assembled = llm.engine
        url, public = server.url_of(bound), not server.is_loopback(bound)

        def announce() -> None:
            print(f"Serving {assembled.name} at {url}/v1")
            if not assembled.one_answer:
                print(
                    f"The {assembled.config.backend} backend does not promise one answer: tokens can depend on what "
                    "else runs at the same time. --backend ref promises it, slowly."
                )
            if public:
                print("Anyone who can reach this address can use it: this server asks for no key.")
            print(f"Try it:\n  {example(url, assembled)}", flush=True)

        server.serve(llm, bound, announce)


def example(url: str, engine: Assembled) -> str:
    """A line to paste into a shell, of what this model can do."""
    body: dict[str, Any]
    if engine.generates:
        path, body = "completions", {"prompt": "Once upon a time", "max_tokens": 48, "temperature": 0.7, "seed": 2}
    elif engine.pooling.classifier:
        path, body = "score", {"text_1": "Who has the key?", "text_2": ["Nobody had the key.", "The robin sang."]}
    else:
        path, body = "embeddings", {"input": "The garden was locked."}
    data = shlex.quote(json.dumps({"model": engine.name} | body))
    return f"curl {url}/v1/{path} -H 'Content-Type: application/json' -d {data}"
