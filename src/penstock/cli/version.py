"""``penstock version``"""

from __future__ import annotations

from penstock.cli.exits import emit


def version() -> None:
    """Print the version of Penstock."""
    from penstock import __version__

    emit(__version__)
