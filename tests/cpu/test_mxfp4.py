"""MXFP4, against transformers' own reading of gpt-oss's tensors."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from penstock.quant import decode_mxfp4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_decodes_as_transformers_does(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8)
    scales = torch.randint(100, 150, (3, 10, 4), dtype=torch.uint8)
    ours = decode_mxfp4(blocks, scales, dtype)
    assert ours.dtype == dtype and ours.shape == (3, 10, 128)
    # Theirs has inputs before outputs.
    assert torch.equal(ours.transpose(1, 2), convert_moe_packed_tensors(blocks, scales, dtype=dtype))


def test_every_code_and_scale() -> None:
    """The values of the OCP specification, at the ends of the scale too."""
    codes = torch.arange(16, dtype=torch.uint8)
    blocks = (codes | codes << 4).expand(1, 4, 1, 16)
    scales = torch.tensor([0, 127, 254, 255], dtype=torch.uint8).view(1, 4, 1)
    least, one, greatest, nan = decode_mxfp4(blocks, scales, torch.float64)[0]
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    expected = torch.tensor([s * m for s in (1, -1) for m in magnitudes], dtype=torch.float64).repeat_interleave(2)
    assert torch.equal(one, expected)
    assert torch.equal(least, expected * 2.0**-127)
    finite = expected.abs() < 2  # 2^127 times more than that is no fp32 number
    assert torch.equal(greatest[finite], (expected * 2.0**127)[finite]) and greatest[~finite].isinf().all()
    assert nan.isnan().all()
