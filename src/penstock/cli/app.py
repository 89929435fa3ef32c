"""The table of commands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from penstock.base import InvalidRequest
from penstock.cli import (
    cache,
    chat,
    config_show,
    doctor,
    embed,
    keys,
    logs,
    models,
    ps,
    quantize,
    run,
    serve,
    show,
    trace,
    version,
)
from penstock.cli.exits import explain, guarded
from penstock.cli.later import later

app = typer.Typer(
    name="penstock",
    help="Serves open-weight language models: the same answer, bit for bit, however it is served.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help starts in half the time
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        guarded(version.version)()
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """What stands before a command."""


def _bench() -> typer.Typer:
    from penstock.cli import bench

    return bench.app


app.command("chat")(guarded(chat.chat))
app.command("run")(guarded(run.run))
app.command("serve")(guarded(serve.serve))
app.command("ps")(guarded(ps.ps))
app.command("top")(guarded(ps.top))
app.command("logs")(guarded(logs.logs))
app.command("trace")(guarded(trace.trace))
app.add_typer(keys.app, name="keys")
config_show.show_like(serve.serve)
app.add_typer(config_show.app, name="config")
app.command("embed")(guarded(embed.embed))
app.command("quantize")(guarded(quantize.quantize))
app.command("models")(guarded(models.models))
app.command("show")(guarded(show.show))
app.command("cache")(guarded(cache.cache))
app.add_typer(later(_bench, help="Measure on this machine.", no_args_is_help=True, rich_markup_mode=None), name="bench")
app.command("doctor")(guarded(doctor.doctor))
app.command("version")(guarded(version.version))


def main() -> None:
    """Entry point of the ``penstock`` script."""
    if "--json" not in sys.argv:
        app(prog_name="penstock")
        return
    try:
        sys.exit(app(prog_name="penstock", standalone_mode=False))
    except Exception as error:
        if not hasattr(error, "format_message"):  # not one of the errors of a command line
            raise
        explain(InvalidRequest("invalid_option", error.format_message(), fix="see --help"), as_json=True)
        sys.exit(2)
