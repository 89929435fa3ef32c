"""tiktoken's rank files: one line for each token, its bytes in base64 and its rank (openai/tiktoken, load.py).

Llama 3 and 4 call theirs ``tokenizer.model``, Qwen ``qwen.tiktoken``. The rank is the token's id and its place in the
order of merges. How text is split before it is encoded is not in the file.
"""

from __future__ import annotations

from binascii import a2b_base64
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
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            encoded, rank = line.split()
            token, expected = a2b_base64(encoded, strict_mode=True), int(rank)
        except ValueError as error:
            raise ValueError(f"line {number} is no token and rank: {error}") from None
        if not 0 < len(token) <= MAX_TOKEN_BYTES:
            raise ValueError(f"line {number} has a token of {len(token)} bytes; 1 to {MAX_TOKEN_BYTES} are possible")
        if ranks.setdefault(token, expected) != expected or expected != len(ranks) - 1:
            raise ValueError(f"line {number} has the rank {expected}: the tokens are not numbered one by one")
        if len(ranks) > MAX_RANKS:
            raise ValueError(f"it has more than {MAX_RANKS} tokens")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{len(missing)} bytes have no token, the first is 0x{missing[0]:02X}")
    return ranks
