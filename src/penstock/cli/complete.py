"""Model names for the shell's completion: the bundled models, the hub's cache, and folders."""

from __future__ import annotations

import glob
import os


def complete_model(incomplete: str) -> list[str]:
    """What MODEL may go on to be. A shell waits for it, so it reads no model."""
    from penstock.cli.inventory import cached_names
    from penstock.spec.location import BUNDLED_MODELS

    names = [name for name in (*BUNDLED_MODELS, *cached_names()) if name.startswith(incomplete)]
    start = os.path.expanduser(incomplete)
    folders = (path for path in sorted(glob.glob(f"{glob.escape(start)}*/")))
    return names + [incomplete + path[len(start) :] for path in folders]
