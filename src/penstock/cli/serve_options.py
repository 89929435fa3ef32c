"""Options of ``penstock serve`` that need more than a line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    Path | None, typer.Option(help="folder of uploaded files and batches; by default in ~/.local/share/penstock")
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
OtlpEndpoint = Annotated[str | None, typer.Option(help="send spans there, OTLP over HTTP (how-to/tracing)")]
