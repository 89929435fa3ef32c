"""The ``penstock`` command: one file per command. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from penstock.cli.app import main

__all__ = ["main"]
