"""Files of a model folder, bounds-checked: bytes to headers and views. No torch, and nothing is trusted."""

from penstock.formats.digest import file_digest
from penstock.formats.jsonfile import parse_json_object, read_json_object
from penstock.formats.safetensors import Checkpoint, SafetensorsFile, TensorEntry, open_checkpoint

__all__ = [
    "Checkpoint",
    "SafetensorsFile",
    "TensorEntry",
    "file_digest",
    "open_checkpoint",
    "parse_json_object",
    "read_json_object",
]
