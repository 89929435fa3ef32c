"""Models from the Hugging Face hub or a mirror. HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are honoured."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from penstock.base import NotFound, Unavailable

FILES = [
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.model.v*", "*.tiktoken", "merges.txt", "vocab.txt"
]  # fmt: skip
"""What a model is read from: weights in a format that cannot run code, configuration, and every kind of tokenizer."""
OTHERS = ["*/*.safetensors", "consolidated*", "original/*", "onnx/*", "openvino/*"]
"""The same weights once more, in folders and formats that are not read."""


def fetch(model: str, *, weights: bool = True) -> Path:
    """The local folder of a model of the hub; what is missing in the cache is downloaded, with a bar on a terminal.

    Args:
        model: a hub id, "org/name".
        weights: without them only what describes a model is downloaded.

    Raises:
        NotFound: (model_not_found) there is no such model, or it may not be read.
        Unavailable: (hub_unreachable) it is not in the cache, and the hub does not answer or is not to be asked.
    """
    ignored = OTHERS if weights else [*OTHERS, "*.safetensors"]
    with _progress() as progress, _our_words(model):
        bar: Any = _Download(progress, model)
        return Path(snapshot_download(model, allow_patterns=FILES, ignore_patterns=ignored, tqdm_class=bar))


def cached(model: str) -> Path | None:
    """The local folder of a model of the hub, whole or not, without asking the hub. None if there is none."""
    with suppress(HFValidationError):
        found = try_to_load_from_cache(model, "config.json")
        return Path(found).parent if isinstance(found, str) else None
    return None


def file_sizes(model: str) -> dict[str, int]:
    """Bytes of each file of a model on the hub, as it says. Raises as ``fetch``."""
    with _our_words(model):
        files = HfApi().model_info(model, files_metadata=True).siblings or []
        return {file.rfilename: file.size for file in files if file.size is not None}


@contextmanager
def _our_words(model: str) -> Iterator[None]:
    """Says what huggingface_hub raises as errors of this package."""
    try:
        yield
    except HFValidationError:
        raise NotFound("model_not_found", f"{model!r} is neither a folder nor a valid hub id") from None
    except LocalEntryNotFoundError:
        raise Unavailable(
            "hub_unreachable",
            f"{model} is not in the local cache and the hub cannot be reached",
            fix="check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a folder",
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 429 or status >= 500:
            raise Unavailable("hub_unreachable", f"{model} could not be fetched", why=f"it answers {status}") from None
        fix = "check the spelling"
        if isinstance(error, GatedRepoError):
            fix = "accept its conditions on the hub, and set HF_TOKEN to your token"
        elif status in (401, 403):  # the hub does not say whether a model is absent or private
            fix = "check the spelling, and set HF_TOKEN to a token that may read it"
        why = f"it answers {status}"
        raise NotFound("model_not_found", f"The hub does not give {model}", why=why, fix=fix) from None
    except Exception as error:  # whatever a broken connection, a full disk or a strange server makes the client raise
        why = f"{type(error).__name__}: {error}"[:200]
        raise Unavailable("hub_unreachable", f"{model} could not be fetched", why=why) from None


@contextmanager
def _progress() -> Iterator[Progress]:
    """One line on stderr once it is started, and nothing at all where that is no terminal."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    progress = Progress(*columns, console=console, disable=not console.is_terminal)
    try:
        yield progress
    finally:
        progress.stop()


class _Download:
    """Stands for the class of bars that huggingface_hub asks for: all that it makes are shown as one line.

    It counts the same bytes in several bars (received, written) and files in another; the one that has come furthest
    says how far the download is. Without anything to download there is no line.
    """

    def __init__(self, progress: Progress, description: str) -> None:
        self._progress, self._description = progress, description
        self.bars: list[_Bar] = []
        self._task: TaskID | None = None
        self._lock = threading.RLock()

    def __call__(self, iterable: Iterable[Any] = (), **options: Any) -> _Bar:
        bar = _Bar(self, iterable, options.get("total") or 0, options.get("initial") or 0)
        if options.get("unit") == "B":
            self.bars.append(bar)
        return bar

    def get_lock(self) -> threading.RLock:
        return self._lock

    def set_lock(self, lock: threading.RLock) -> None:
        """Every thread has the same one already."""

    def show(self) -> None:
        total, done = max(bar.total for bar in self.bars), max(bar.n for bar in self.bars)
        if total and self._task is None:
            self._progress.start()
            self._task = self._progress.add_task(self._description)
        if self._task is not None:
            self._progress.update(self._task, completed=min(done, total), total=total)


class _Bar:
    """As much of tqdm's interface as huggingface_hub uses."""

    def __init__(self, owner: _Download, iterable: Iterable[Any], total: float, initial: float) -> None:
        self.total, self.n = total, initial
        self.format_dict: dict[str, Any] = {}
        self._owner, self._iterable = owner, iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, n: float | None = 1) -> None:
        self.n += n or 0
        self.refresh()

    def refresh(self) -> None:
        if self in self._owner.bars:
            self._owner.show()

    def close(self) -> None:
        """The line stays until the download has ended."""

    def set_description(self, text: str = "", refresh: bool = True) -> None:
        """The line says which model it is about."""

    set_description_str = set_postfix_str = set_description
