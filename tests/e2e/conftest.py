"""One server process for all tests of this folder."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from servers import MODEL, TEMPLATE, Server, start


@pytest.fixture(scope="session")
def stories(test_data: Path) -> Path:
    """A Llama of 260 thousand parameters that tells stories: 512 tokens of vocabulary and of context."""
    return test_data / "models" / "stories260k"


@pytest.fixture(scope="session")
def server(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Whatever the tests ask of it, nothing is its own fault, so its log stays empty."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "template.jinja").write_text(TEMPLATE)
    options = ("--served-model-name", MODEL, "--chat-template", str(folder / "template.jinja"), "--dtype", "float32")
    with (folder / "log").open("w+") as log:
        running = start(stories, *options, log=log)
        yield running
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0
        log.seek(0)
        assert log.read() == ""
