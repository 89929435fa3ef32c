"""How many connections there is room for: each takes a descriptor of this process."""

from __future__ import annotations

import logging
import resource
from contextlib import suppress

from penstock.serving.limits import MAX_CONNECTIONS, OTHER_FILES, REFUSED_CONNECTIONS

_log = logging.getLogger(__name__)


def room_for_connections() -> int:
    """MAX_CONNECTIONS, or fewer if this process may not open as many files, with a warning; first the soft limit
    (usually 1,024) is raised as far as that takes and the hard one lets it (getrlimit(2)).
    """
    needed = MAX_CONNECTIONS + REFUSED_CONNECTIONS + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < needed:  # below 0 there is none
        wanted = needed if hard < 0 else min(needed, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    if soft < 0 or soft >= needed:
        return MAX_CONNECTIONS
    room = max(soft - REFUSED_CONNECTIONS - OTHER_FILES, soft // 4)
    _log.warning(
        "there is room for %d connections instead of %d, because this process may open %d files; let it open %d "
        "(ulimit -n, or LimitNOFILE of systemd)",
        *(room, MAX_CONNECTIONS, soft, needed),
    )
    return room
