"""Every backend at every device it runs on; every shape; fixed seeds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from opsuite import PLACES, SETS, SHAPES, Place, Shape
from penstock.kernels import Ops, make_ops


@pytest.fixture(params=PLACES, ids=lambda p: "-".join(p))
def place(request: pytest.FixtureRequest) -> Place:
    return make_ops(request.param[0]), torch.device(request.param[1])


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.param]


@pytest.fixture(params=SETS)
def ops(request: pytest.FixtureRequest) -> Iterator[Ops]:
    """The native kernels of an instruction set."""
    from penstock.kernels import _native

    before = _native.chosen()
    _native.choose(request.param)
    yield make_ops("cpu")
    _native.choose(before)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(7)
    with torch.inference_mode():
        yield
