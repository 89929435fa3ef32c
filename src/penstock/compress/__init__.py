"""Quantized model folders, and what they cost in answers. Methods that look at activations will live here."""

from penstock.compress.folder import Recipe, write_quantized
from penstock.compress.quality import SAMPLE, Quality, Tally, check_text, measure_quality, read

__all__ = ["SAMPLE", "Quality", "Recipe", "Tally", "check_text", "measure_quality", "read", "write_quantized"]
