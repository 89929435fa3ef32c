"""The table of commands."""

from __future__ import annotations

from typing import Annotated

import typer

from penstock.cli import bench, run, serve, version
from penstock.cli.exits import guarded

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


app.command("run")(guarded(run.run))
app.command("serve")(guarded(serve.serve))
app.add_typer(bench.app, name="bench")
app.command("version")(guarded(version.version))


def main() -> None:
    """Entry point of the ``penstock`` script."""
    app(prog_name="penstock")
