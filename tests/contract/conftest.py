"""Every backend at every device it runs on; every shape; fixed seeds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from opsuite import PLACES, SHAPES, Place, Shape
from penstock.kernels import make_ops


@pytest.fixture(params=PLACES, ids=lambda p: "-".join(p))
def place(request: pytest.FixtureRequest) -> Place:
    return make_ops(request.param[0]), torch.device(request.param[1])


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.param]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(7)
    with torch.inference_mode():
        yield
