"""Who goes before whom: what a request asks for, in a number or by a tier, and what its caller may have of it."""

from __future__ import annotations

from penstock.serving.errors import HTTPError
from penstock.serving.schemas import TIERS, GenerationRequest, ModelRequest


def rank(asked: ModelRequest, least: int) -> None:
    """Settles the priority of a request.

    A service tier that its caller may not have is the default one instead, which the answer tells, as OpenAI's API has
    it: clients send tiers without being asked.

    Args:
        least: the lowest number that it may have, as of ``Caller.least_priority``; lower is served earlier.

    Raises:
        HTTPError: (priority_not_allowed) it names a lower one.
    """
    if isinstance(asked, GenerationRequest) and asked.priority is None:
        wanted = TIERS.get(asked.service_tier or "")
        if wanted is not None and wanted < least:
            asked.service_tier = None
        else:
            asked.priority = wanted
    if asked.priority is None:
        asked.priority = max(0, least)
    elif asked.priority < least:
        raise HTTPError(
            "priority_not_allowed",
            f"priority = {asked.priority} is not for everybody",
            why=f"the lowest that this caller may ask for is {least}; lower is served earlier",
            fix="leave it out, or send a key made with `penstock keys add --min-priority`",
            param="priority",
            status=403,
        )
