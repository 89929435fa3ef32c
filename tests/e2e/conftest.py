"""One server process for all tests of this folder."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from unittest import mock

import httpx
import httpx2
import pytest

from penstock.spec.location import locate
from penstock.text import Tokenizer, load_tokenizer
from scripted import HERMES
from servers import MODEL, TEMPLATE, Server, start


@pytest.fixture(autouse=True, scope="session")
def one_tls_context() -> Iterator[None]:
    """For all of a process's clients, none of which changes it: to read this machine's certificates takes longer than
    most requests."""
    with ExitStack() as stack:
        for library in (httpx, httpx2):  # the second is that of OpenAI's and Anthropic's clients
            place = f"{library.__name__}._transports.default.create_ssl_context"
            stack.enter_context(mock.patch(place, cache(library.create_ssl_context)))
        yield


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
    options += ("--store", str(folder / "store"))  # it lives as long as all others, and a store has one server
    with (folder / "log").open("w+") as log:
        running = start(stories, *options, log=log)
        yield running
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0
        log.seek(0)
        assert log.read() == ""


BUNDLED = locate(None)
assert isinstance(BUNDLED, Path)


@pytest.fixture(scope="session")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The bundled model with a template for tools, and a rule that makes it say what a test wants."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "template.jinja").write_text(HERMES)
    options = ("--chat-template", str(folder / "template.jinja"), "--logits-rule", "scripted:say")
    with mock.patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent)), (folder / "log").open("w+") as log:
        running = start(BUNDLED, *options, "--served-model-name", "m", "--store", str(folder / "store"), log=log)
        yield running
        running.wait_until_idle()
        assert running.metric("penstock_kv_blocks_used") == 0
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0
        log.seek(0)
        assert log.read() == ""


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The bundled model's."""
    return load_tokenizer(BUNDLED, None)
