"""What the matrices of a file are already, whatever its format."""

from __future__ import annotations

from pathlib import Path

from penstock.formats import open_checkpoint
from penstock.quant.gguf import gguf_recipe
from penstock.quant.packed import recipe_of, stored_bits
from penstock.spec.quantization import Quantization


def stored_quantization(path: Path, asked: Quantization) -> Quantization:
    """The recipe a quantized file is counted by: none of its matrices has more bits. Where some are numbers, and of any
    other file, what is asked for."""
    if path.is_file():
        return gguf_recipe(open_checkpoint(path)) or asked
    if not (path / "config.json").is_file() or "quantization_config" not in (path / "config.json").read_text("utf-8"):
        return asked
    bits = stored_bits(open_checkpoint(path))
    return (recipe_of(bits) if bits else None) or asked
