"""ModelSpec: the numbers of an architecture, enough to build it, size it and price it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]
KVDtype = Literal[Dtype, "int8"]
DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
KV_SCALE_BYTES = 2
"""Of each token's K, and V, in a KV head: int8 codes have a bfloat16 scale."""


Activation = Literal["silu", "gelu", "gelu_tanh", "swiglu_clamped"]
"""Of the gate: "gelu" is exact (erf); "swiglu_clamped" is gpt-oss's, see ``kernels.ops``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021) and the context-extension rule applied to it.

    Attributes:
        dims: leading elements of a head that rotate; 0 means all of them.
        kind: "llama3" stretches low frequencies only (Llama 3.1 model card); "linear" divides all positions by
            ``factor``; "yarn" blends by wavelength (Peng et al. 2023); "scaled" divides each frequency by its own
            entry of ``factors`` (LongRoPE, Ding et al. 2024).
        long_factors: LongRoPE's entries for a context above ``original_max_positions``, see ``settled``.
        amplitude: factor of cosines and sines (YaRN's and LongRoPE's attention factor).
        truncate: YaRN's correction range is rounded to whole elements.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn", "scaled"] = "default"
    dims: int = 0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    amplitude: float = 1.0

    def settled(self, positions: int) -> RopeSpec:
        """The rope of a model that serves ``positions``: LongRoPE has one list of factors, whatever a request's length
        (ONE_ANSWER rule 6)."""
        if not self.long_factors:
            return self
        factors = self.factors if positions <= self.original_max_positions else self.long_factors
        return replace(self, factors=factors, long_factors=())


@dataclass(frozen=True, slots=True, kw_only=True)
class MoESpec:
    """Mixture-of-experts feed-forward.

    Attributes:
        experts, active: how many there are, and how many a token uses.
        ffn: width of one expert.
        layers: whether each layer is sparse; the others have the dense feed-forward of ``ModelSpec.ffn``.
        normalize: the chosen experts' probabilities are divided by their sum. (A softmax over the chosen logits
            alone, as Mixtral and gpt-oss have it, is the same.)
        router_bias, bias: whether the router, and the experts' linears, add a bias.
        shared_ffn: width of an expert that every token uses, 0 for none; its output is multiplied by the sigmoid of
            a gate of its own (Qwen2-MoE).
        packed: the checkpoint holds the experts' weights as MXFP4, which is read to ``ModelSpec.dtype``.
    """

    experts: int
    active: int
    ffn: int
    layers: tuple[bool, ...]
    normalize: bool = True
    router_bias: bool = False
    bias: bool = False
    shared_ffn: int = 0
    packed: bool = False


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

    def bytes_per_token(self, dtype: KVDtype) -> int:
        """Bytes of K and V of one token in all layers of the group, as stored."""
        head = self.head_dim * DTYPE_BYTES[dtype] + (KV_SCALE_BYTES if dtype == "int8" else 0)
        return 2 * len(self.layers) * self.kv_heads * head


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer.

    Attributes:
        family: registered name of the architecture, such as "llama".
        hidden, ffn: widths of the residual stream and of the feed-forward, which is gated unless ``mlp_gate`` is false.
        windows: attention window of each layer, None for full attention; its length is the layer count.
        max_positions: longest context the checkpoint was made for, rope scaling included.
        qkv_bias, o_bias, mlp_bias: whether these linears add a bias.
        qk_norm: RMS norm on q and k before rope, over each head (Qwen3) or over all heads together (OLMo 2).
        tied: the output head is the embedding table.
        dtype: of the weights as stored.
        rope: of full-attention layers, and of windowed ones too unless ``local_rope`` is set (Gemma 3).
        unrotated: layers without any position embedding (SmolLM 3).
        alibi: instead of rope, scores fall with the distance of their key, in each head by a slope of its own, from
            2^(-alibi / heads) to 2^-alibi (Press et al. 2021); None for a model with rope.
        norm: RMSNorm, or LayerNorm, with a bias if ``norm_bias``.
        norm_offset: added to every norm weight (Gemma: 1).
        norm_place: "pre" normalizes what a block reads; "post" what it adds (OLMo 2); "both" (Gemma 2).
        attn_scale: factor of the scores; head_dim^-0.5 by default.
        attn_softcap, logit_softcap: x becomes cap * tanh(x / cap) (Gemma 2).
        sinks: each head has a learned logit that takes part in the softmax and has no value (gpt-oss).
        embed_norm: the embedding is normalized before the first block (BLOOM).
        embed_scale, residual_scale, logit_scale: factors of the embedding, of what each block adds, of the logits.
        moe: sparse feed-forward layers.
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
    activation: Activation = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    mlp_gate: bool = True
    qk_norm: Literal["none", "head", "all"] = "none"
    tied: bool = False
    dtype: Dtype = "bfloat16"
    local_rope: RopeSpec | None = None
    unrotated: tuple[int, ...] = ()
    alibi: float | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = True
    norm_offset: float = 0.0
    norm_place: Literal["pre", "post", "both"] = "pre"
    attn_scale: float | None = None
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    sinks: bool = False
    embed_norm: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    moe: MoESpec | None = None

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    def rope_of(self, layer: int) -> RopeSpec | None:
        """How a layer embeds positions; None if it does not."""
        if layer in self.unrotated or self.alibi is not None:
            return None
        return self.rope if self.windows[layer] is None else self.local_rope or self.rope

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
