"""Options of ``penstock serve`` that need more than a line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penstock.cli.complete import complete_model
from penstock.cli.options import MODEL_HELP

First = Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model)]
Others = Annotated[
    list[str] | None, typer.Argument(metavar="MODEL...", help="more models, each loaded when a request names it")
]
Host = Annotated[str, typer.Option(help="address to listen on; by default only this machine can reach it")]
Port = Annotated[
    int | None, typer.Option(min=0, max=65535, help="8000, or the next free one, unless given; 0 takes any")
]
Keys = Annotated[
    Path | None, typer.Option(help="file of the keys that may use it (penstock keys); SIGHUP reads it again")
]
AllowAnyone = Annotated[
    bool, typer.Option("--allow-anyone", help="let others than this machine reach it without a key")
]
TokenizerWorkers = Annotated[
    int, typer.Option(min=0, max=64, help="processes for long texts, started when there is one; 0: threads")
]
TlsCert = Annotated[
    Path | None, typer.Option(help="speak HTTPS alone, with the certificates in this PEM file; SIGHUP reads it again")
]
TlsKey = Annotated[Path | None, typer.Option(help="their private key, if it is not in the same file")]
CorsOrigin = Annotated[
    str | None, typer.Option(help="web pages that may use it, such as https://chat.example; several with commas")
]
Store = Annotated[
    Path | None,
    typer.Option(help="folder of files, batches, responses and conversations; by default in ~/.local/share/penstock"),
]
AdminPort = Annotated[
    int | None, typer.Option(min=0, max=65535, help="status, reload and drain, on loopback, for admin keys")
]
QueueTokens = Annotated[
    int | None, typer.Option(min=1, help="most tokens admitted at a time, prompts and completions; 8 KV pools")
]
LogFile = Annotated[
    Path | None, typer.Option(help="append a line of JSON for each request (penstock logs); SIGHUP opens it anew")
]
KeepTexts = Annotated[
    bool, typer.Option("--keep-texts", help="keep what the last requests said in memory, for the inspector")
]
OtlpEndpoint = Annotated[str | None, typer.Option(help="send spans there, OTLP over HTTP (how-to/tracing)")]
