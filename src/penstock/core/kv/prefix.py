"""Names of blocks by content: a keyed hash chained over everything the block's K and V depend on."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b


class BlockNames:
    """Hash of full block i = blake2b-128(hash of block i - 1, its tokens), keyed by the numerics id; the chain
    starts at a root over (tenant, adapter). Equal names mean equal K and V, so that a block can be reused,
    moved and stored wherever the numerics id is the same.

    Args:
        numerics_id: identifies weights, recipe and kernels (ONE_ANSWER.md), at most 64 bytes.
    """

    def __init__(self, numerics_id: bytes, block_size: int) -> None:
        self.numerics_id = numerics_id
        self.block_size = block_size

    def root(self, tenant: str, adapter: str) -> bytes:
        who = b"".join(len(part).to_bytes(8, "little") + part for part in (_bytes(tenant), _bytes(adapter)))
        return blake2b(who, digest_size=16, key=self.numerics_id).digest()

    def extend(self, names: list[bytes], root: bytes, tokens: Sequence[int], count: int) -> None:
        """Appends names until there are ``count``; block i holds tokens[i * block_size : (i + 1) * block_size]."""
        size = self.block_size
        for i in range(len(names), count):
            parent = names[i - 1] if i else root
            content = array("q", tokens[i * size : (i + 1) * size]).tobytes()
            names.append(blake2b(parent + content, digest_size=16, key=self.numerics_id).digest())


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # a name may be anything that a caller can write
