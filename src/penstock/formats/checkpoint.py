"""All tensors of a model, wherever they lie: one file of safetensors, shards with an index, or a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from penstock.base import ModelFormatError
from penstock.formats.gguf import GGUFFile, read_gguf
from penstock.formats.jsonfile import read_json_object
from penstock.formats.safetensors import SafetensorsFile, TensorEntry, bad_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Attributes:
    path: the folder, or the GGUF file.
    files: every weight file, in name order.
    """

    path: Path
    files: tuple[SafetensorsFile, ...] | tuple[GGUFFile]
    _home: Mapping[str, SafetensorsFile | GGUFFile] = field(repr=False)

    def __contains__(self, name: object) -> bool:
        return name in self._home

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._home)

    def entry(self, name: str) -> TensorEntry:
        return self._home[name].tensors[name]

    def view(self, name: str) -> memoryview:
        return self._home[name].view(name)

    def release(self, name: str) -> None:
        self._home[name].release(name)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Opens ``model.safetensors``, or the shards that ``model.safetensors.index.json`` lists; or a GGUF file.

    Raises:
        ModelFormatError: as SafetensorsFile or GGUFFile; also (weights_missing) when the folder has neither, a shard
            is absent, or a shard lacks a tensor that the index puts there.
    """
    if folder.is_file():
        gguf = read_gguf(folder)
        return Checkpoint(folder, (gguf,), dict.fromkeys(gguf.tensors, gguf))
    if (folder / SINGLE_FILE).exists():
        file = SafetensorsFile(folder / SINGLE_FILE)
        return Checkpoint(folder, (file,), dict.fromkeys(file.tensors, file))
    if not (folder / INDEX_FILE).exists():
        found = ", ".join(sorted(p.name for p in folder.glob("*.bin"))[:3]) if folder.is_dir() else ""
        raise ModelFormatError(
            "weights_missing",
            f"There are no safetensors weights in {folder}",
            why=f"neither {SINGLE_FILE} nor {INDEX_FILE} exists" + (f"; found {found}" if found else ""),
            fix="give a folder with safetensors, or a GGUF file; formats that can run code are not read",
        )
    return _open_shards(folder)


def weight_files(folder: Path) -> list[str]:
    """Names of the files that ``open_checkpoint`` reads or, in a folder without weights, would read.

    Raises:
        ModelFormatError: (weights_header), (json_invalid) the index is damaged.
    """
    if folder.is_file():
        return [folder.name]
    if (folder / SINGLE_FILE).exists() or not (folder / INDEX_FILE).exists():
        return [SINGLE_FILE]
    return sorted(set(_weight_map(folder).values()))


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> shard, as the index has it."""
    weight_map = read_json_object(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise bad_header(folder / INDEX_FILE, "it has no weight_map of tensor names to files")
    for name, shard in weight_map.items():
        # A shard outside the folder could be any file the user can read.
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard:
            raise bad_header(folder / INDEX_FILE, f"tensor {name!r} is said to be in {shard!r}")
    return weight_map


def _open_shards(folder: Path) -> Checkpoint:
    weight_map = _weight_map(folder)
    files = {shard: SafetensorsFile(folder / shard) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in files[shard].tensors:
            raise ModelFormatError(
                "weights_missing",
                f"Tensor {name!r} is missing from {shard}",
                why=f"{INDEX_FILE} says that it is there",
                fix="download the file again",
            )
    return Checkpoint(folder, tuple(files.values()), {name: files[shard] for name, shard in weight_map.items()})
