"""tiktoken's rank files: one line for each token, its bytes in base64 and its rank (openai/tiktoken, load.py).

Llama 3 and 4 call theirs ``tokenizer.model``, Qwen ``qwen.tiktoken``. The rank is the token's id and its place in the
order of merges. How text is split before it is encoded is not in the file.
"""

from __future__ import annotations

from binascii import a2b_base64
from collections.abc import Iterable, Iterator
from pathlib import Path

from penstock.base import ModelFormatError
from penstock.formats.files import read_bytes

MAX_RANK_BYTES = 16 << 20
MAX_RANKS = 1 << 20
MAX_TOKEN_BYTES = 512


def read_ranks(path: Path) -> dict[bytes, int]:
    """The ids of all tokens, in ascending order; together they are 0 to n - 1.

    Raises:
        ModelFormatError: (file_missing) it cannot be read; (tokenizer_invalid) it is no such file.
    """
    data = read_bytes(path, MAX_RANK_BYTES, "tokenizer_invalid")
    try:
        return parse_ranks(data)
    except ValueError as error:
        raise ModelFormatError(
            "tokenizer_invalid",
            f"{path} is not a usable file of tiktoken ranks",
            why=str(error)[:300],
            fix="download the file again",
        ) from None


def parse_ranks(data: bytes) -> dict[bytes, int]:
    """Raises: ValueError: it is no such file."""
    return checked_ranks(_lines(data))


def _lines(data: bytes) -> Iterator[tuple[bytes, int]]:
    for number, line in enumerate(data.splitlines(), 1):
        try:
            encoded, rank = line.split()
            yield a2b_base64(encoded, strict_mode=True), int(rank)
        except ValueError as error:
            raise ValueError(f"line {number} is no token and rank: {error}") from None


def checked_ranks(tokens: Iterable[tuple[bytes, int]]) -> dict[bytes, int]:
    """Raises: ValueError: they are not the tokens of a byte-level vocabulary with their ranks, in order."""
    ranks: dict[bytes, int] = {}
    for number, (token, rank) in enumerate(tokens, 1):
        if not 0 < len(token) <= MAX_TOKEN_BYTES:
            raise ValueError(f"token {number} has {len(token)} bytes; 1 to {MAX_TOKEN_BYTES} are possible")
        if ranks.setdefault(token, rank) != rank or rank != len(ranks) - 1:
            raise ValueError(f"token {number} has the rank {rank}: the tokens are not numbered one by one")
        if len(ranks) > MAX_RANKS:
            raise ValueError(f"it has more than {MAX_RANKS} tokens")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{len(missing)} bytes have no token, the first is 0x{missing[0]:02X}")
    return ranks
