"""Options, data and determinism shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Read by the compute libraries when they are first imported: two test processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
# A test with more threads than cores are free would spend most of its time in loops that wait for the others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A property that wants ten times the usual number of examples says
# ``@settings(max_examples=10 * settings.default.max_examples)``: 1,000 in `make test`, 20,000 in `make test-all`.
settings.register_profile("default", derandomize=True, deadline=None, database=None, max_examples=100)
settings.register_profile("all", settings.get_profile("default"), max_examples=2_000)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="slow tests too, and more examples of each property")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("all" if config.getoption("--all") else "default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]


@pytest.fixture(autouse=True, scope="session")
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of the processes that tests start, too: nobody's own cache or files are written to."""
    os.environ["PENSTOCK_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["PENSTOCK_DATA"] = str(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def one_compute_thread() -> Iterator[None]:
    """Keeps a test that changes the thread count from changing it for its neighbours. Never imports torch."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    yield


@pytest.fixture(scope="session")
def test_data(pytestconfig: pytest.Config) -> Path:
    """The shared folder of models, tokenizers, prompts and corpora."""
    given = os.environ.get("PENSTOCK_TEST_DATA")
    path = Path(given) if given else pytestconfig.rootpath.parent / "shared" / "data"
    if path.is_dir():
        return path
    reason = f"no test data at {path}: set PENSTOCK_TEST_DATA to the folder that holds models/ and tokenizers/"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
