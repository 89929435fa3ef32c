"""``penstock version``"""

from __future__ import annotations


def version() -> None:
    """Print the version of Penstock."""
    from penstock import __version__

    print(__version__)
