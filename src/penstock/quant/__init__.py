"""Weight formats, one file each: how they are stored, and what they become."""

from penstock.quant.gguf import AT_ONCE, BITS, FLOATS, decode_rows, group_rows, stored_quantization
from penstock.quant.grouped import check_scales, quantize, widen
from penstock.quant.mxfp4 import decode_mxfp4

__all__ = [
    "AT_ONCE",
    "BITS",
    "FLOATS",
    "check_scales",
    "decode_mxfp4",
    "decode_rows",
    "group_rows",
    "quantize",
    "stored_quantization",
    "widen",
]
