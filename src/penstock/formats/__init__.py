"""Files of a model folder, bounds-checked: bytes to headers and views. No torch, and nothing is trusted."""

from penstock.formats.charsmap import Charsmap
from penstock.formats.checkpoint import Checkpoint, open_checkpoint, weight_files
from penstock.formats.digest import file_digest
from penstock.formats.files import read_bytes
from penstock.formats.gguf import GGUFFile, gguf_file, read_gguf
from penstock.formats.jsonfile import parse_json_object, read_json_object
from penstock.formats.packed import PackedFile, PackedTensor, damaged
from penstock.formats.safetensors import SafetensorsFile, TensorEntry
from penstock.formats.sentencepiece import (
    Algorithm,
    Piece,
    PieceKind,
    SentencePieceModel,
    check_pieces,
    looks_like_sentencepiece,
    parse_sentencepiece,
    read_sentencepiece,
)
from penstock.formats.tekken import Tekken, parse_tekken, read_tekken
from penstock.formats.tiktoken import parse_ranks, read_ranks
from penstock.formats.weightcache import Kept, WeightCache
from penstock.formats.write import tensor_bytes, write_safetensors

__all__ = [
    "Algorithm",
    "Charsmap",
    "Checkpoint",
    "GGUFFile",
    "Kept",
    "PackedFile",
    "PackedTensor",
    "Piece",
    "PieceKind",
    "SafetensorsFile",
    "SentencePieceModel",
    "Tekken",
    "TensorEntry",
    "WeightCache",
    "check_pieces",
    "damaged",
    "file_digest",
    "gguf_file",
    "looks_like_sentencepiece",
    "open_checkpoint",
    "parse_json_object",
    "parse_ranks",
    "parse_sentencepiece",
    "parse_tekken",
    "read_bytes",
    "read_gguf",
    "read_json_object",
    "read_ranks",
    "read_sentencepiece",
    "read_tekken",
    "tensor_bytes",
    "weight_files",
    "write_safetensors",
]
