"""Weight formats, one file each: how they are stored, and what they become."""

from penstock.quant.gguf import AT_ONCE, BITS, FLOATS, decode_rows, group_rows
from penstock.quant.grouped import check_scales, quantize, widen
from penstock.quant.mxfp4 import decode_mxfp4
from penstock.quant.packed import PACKED, SCALE, SHAPE, ZERO, in_eight, to_grouped, to_tensors, unpack
from penstock.quant.stored import stored_quantization

__all__ = [
    "AT_ONCE",
    "BITS",
    "FLOATS",
    "PACKED",
    "SCALE",
    "SHAPE",
    "ZERO",
    "check_scales",
    "decode_mxfp4",
    "decode_rows",
    "group_rows",
    "in_eight",
    "quantize",
    "stored_quantization",
    "to_grouped",
    "to_tensors",
    "unpack",
    "widen",
]
