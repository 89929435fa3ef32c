"""Which models there are on this machine, and what their files say: read without torch, and without loading any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.base import PenstockError

if TYPE_CHECKING:
    from penstock.formats import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """A model folder at a glance.

    Attributes:
        name: what to give as MODEL.
        bytes: of all its files.
        family, context, parameters: as config.json and the weight files say; None where they cannot be read.
        runs: whether this build reads its configuration, tokenizer and weight files.
        problem: the code of the error, where it does not.
    """

    name: str
    path: str
    bytes: int
    family: str | None = None
    context: int | None = None
    parameters: int | None = None
    runs: bool = True
    problem: str | None = None

    def report(self) -> dict[str, Any]:
        return asdict(self)


def cached_names() -> list[str]:
    """Hub ids in the local cache, sorted."""
    return sorted(name for name, _ in cached_folders())


def cached_folders() -> Iterator[tuple[str, Path]]:
    """Hub id and folder of each model in the local cache (HF_HOME and HF_HUB_CACHE are honoured).

    The layout is huggingface_hub's: ``models--org--name/refs/main`` names the folder in ``snapshots``.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    for folder in sorted(Path(HF_HUB_CACHE).glob("models--*")):
        if (revision := _revision(folder)) and (revision / "config.json").is_file():
            yield folder.name.removeprefix("models--").replace("--", "/"), revision


def folders_in(folder: Path) -> list[Path]:
    """Model folders and GGUF files below a folder, sorted. What is within one is part of it, as ``1_Pooling`` is."""
    folders = {path.parent for path in folder.glob("**/config.json")}
    found = folders.union(folder.glob("**/*.gguf"))
    return sorted(path for path in found if not folders.intersection(path.parents))


def _revision(folder: Path) -> Path | None:
    """The main revision, else the one that came last."""
    try:
        main = folder / "refs" / "main"
        if main.is_file() and (named := folder / "snapshots" / main.read_text().strip()).is_dir():
            return named
        return max((folder / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime, default=None)
    except OSError:
        return None


def look_at(name: str, folder: Path) -> LocalModel:
    """What a folder or GGUF file holds. Whatever is wrong with it becomes its ``problem``."""
    from penstock.formats import open_checkpoint
    from penstock.spec.encoder import read_any_spec
    from penstock.text import load_tokenizer

    facts: dict[str, Any] = {"name": name, "path": str(folder), "bytes": _bytes_of(folder)}
    try:
        spec = read_any_spec(folder)
        facts |= {"family": spec.family, "context": spec.max_positions}
        facts["parameters"] = sum(tensor_count(open_checkpoint(folder)).values())
        load_tokenizer(folder, spec.vocab_size)
    except PenstockError as error:
        return LocalModel(**facts, runs=False, problem=error.code)
    return LocalModel(**facts)


def tensor_count(checkpoint: Checkpoint) -> Counter[str]:
    """Numbers in the weight files by dtype, named as the files name them."""
    count: Counter[str] = Counter()
    for file in checkpoint.files:
        for entry in file.tensors.values():
            elements = 1
            for side in entry.shape:
                elements *= side
            count[entry.dtype] += elements
    return count


def _bytes_of(folder: Path) -> int:
    try:
        files = [folder] if folder.is_file() else folder.rglob("*")
        return sum(path.stat().st_size for path in files if path.is_file())
    except OSError:
        return 0
