"""ModelSpec: the numbers of an architecture, enough to build it, size it and price it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021) and the context-extension rule applied to it.

    ``kind`` "llama3" stretches low frequencies only (Llama 3.1 model card); "linear" divides all
    positions by ``factor``.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGroup:
    """Layers whose KV has the same window, head layout and dtype share one pool of blocks.

    Attributes:
        layers: indices of the layers, ascending.
        window: a query at position p sees keys in (p - window, p]; None sees all.
        kv_heads, head_dim: of one layer.
    """

    layers: tuple[int, ...]
    window: int | None
    kv_heads: int
    head_dim: int

    def bytes_per_token(self, dtype: Dtype) -> int:
        """Bytes of K and V of one token in all layers of the group."""
        return 2 * len(self.layers) * self.kv_heads * self.head_dim * DTYPE_BYTES[dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer.

    Attributes:
        family: registered name of the architecture, such as "llama".
        hidden, ffn: widths of the residual stream and of the gated feed-forward.
        windows: attention window of each layer, None for full attention; its length is the layer count.
        max_positions: longest context the checkpoint was made for, rope scaling included.
        qkv_bias, o_bias, mlp_bias: whether these linears add a bias.
        qk_norm: RMS norm over head_dim on q and k before rope (Qwen3).
        tied: the output head is the embedding table.
        dtype: of the weights as stored.
    """

    family: str
    vocab_size: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    max_positions: int
    norm_eps: float = 1e-5
    rope: RopeSpec = RopeSpec()
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    dtype: Dtype = "bfloat16"

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    def kv_groups(self) -> tuple[KVGroup, ...]:
        """Full-attention group first, then windows ascending, so that group indices are stable."""
        kinds = sorted(set(self.windows), key=lambda w: (w is not None, w or 0))
        return tuple(
            KVGroup(
                layers=tuple(i for i, w in enumerate(self.windows) if w == window),
                window=window,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
            )
            for window in kinds
        )
