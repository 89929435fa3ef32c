"""Suspects: who was in a step that failed. Halves of them rerun until the guilty one is alone."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable

from penstock.core.request import Request


class Suspects:
    """In policy order. While there are any, only a lineup of the first of them runs, and nothing else.

    One guilty request among n takes log2 n lineups to be alone; who fails alone is guilty. The rest then run together.
    """

    def __init__(self) -> None:
        self._line: list[Request] = []
        self._group = 0  # so many of the first have failed together; 0: nothing is known of those left

    def __bool__(self) -> bool:
        return bool(self._line)

    def __contains__(self, request: Request) -> bool:
        return request in self._line

    def lineup(self) -> list[Request]:
        return self._line[: max(1, self._group // 2)] if self._group else self._line.copy()

    def accuse(self, request: Request) -> None:
        """A suspect that is preempted leaves the line, stays one, and is accused when it is met again."""
        request.suspect = True
        if request not in self._line:
            insort(self._line, request)

    def leave(self, request: Request) -> None:
        if request in self._line:
            self._line.remove(request)

    def failed(self, present: int) -> None:
        """A step of so many requests failed. If it was one, what becomes of it is for the caller to say."""
        self._group = present if present > 1 else 0

    def passed(self, present: Iterable[Request]) -> None:
        """Their step succeeded, so that none of them is a suspect any more."""
        for request in present:
            request.suspect = False
        before = len(self._line)
        self._line = [request for request in self._line if request.suspect]
        self._group = max(0, self._group - (before - len(self._line)))
