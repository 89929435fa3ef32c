"""Weight formats, one file each: how they are stored, and what they become."""

from penstock.quant.grouped import quantize
from penstock.quant.mxfp4 import decode_mxfp4

__all__ = ["decode_mxfp4", "quantize"]
