"""A small differentiable Llama that reads and writes the Hugging Face layout.

Shape legend (suffix of a name = its shape):
    B batch, T positions, N = B * T rows, D model width, H query heads, K key/value heads,
    E head width, F feed-forward width, V vocabulary.

Source of the layout and of the arithmetic: ``LlamaForCausalLM`` in Hugging Face transformers
(pre-norm RMSNorm, half-split rotary embedding, grouped-query attention, SwiGLU, tied head).
Master weights are float32; the forward pass runs in ``compute_dtype`` (bfloat16 in training).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

#: Query rows of one attention block; larger blocks waste work above the diagonal.
QUERY_BLOCK = 128


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model, under the field names of a Hugging Face ``config.json``."""

    vocab_size: int = 4096
    hidden_size: int = 384
    intermediate_size: int = 1024
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    def to_hf(self, bos_token_id: int, eos_token_id: int, pad_token_id: int) -> dict[str, object]:
        """Return the content of ``config.json`` for a tied bfloat16 Llama."""
        fixed: dict[str, object] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "rope_scaling": None,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "use_cache": True,
            "torch_dtype": "bfloat16",
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
        }
        return {**fixed, **asdict(self)}

    @staticmethod
    def from_hf(raw: dict[str, object]) -> ModelConfig:
        """Pick the known fields out of a parsed ``config.json``; absent ones keep defaults."""
        names = ModelConfig.__dataclass_fields__
        return ModelConfig(**{k: v for k, v in raw.items() if k in names})  # type: ignore[arg-type]


def rope_tables(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotary angles, each float32 [length, head_dim / 2], radians in."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    angle = torch.outer(torch.arange(length, dtype=torch.float32), theta**-exponent)
    return angle.cos(), angle.sin()


def apply_rope(x_BTHE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotate pairs (i, i + E/2) of each head by the angle of its position, in float32."""
    a, b = x_BTHE.float().chunk(2, dim=-1)
    cos, sin = cos_TE[:, None, :], sin_TE[:, None, :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BTHE.dtype)


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Scale each row to unit root mean square (statistics in float32), then by the weight."""
    x = x_BTD.float()
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * scale * weight_D).to(x_BTD.dtype)


class RMSNorm(nn.Module):
    """Holder of one norm weight, so that the state dict has the Hugging Face name."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, self.weight, self.eps)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """Multiply by a float32 master weight cast to the dtype of the activations."""
    return F.linear(x, layer.weight.to(x.dtype))


def causal_bias(length: int) -> Tensor:
    """Return float32 [T, T]: 0 where a query may see a key, -inf above the diagonal."""
    return torch.full((length, length), -torch.inf).triu(1)


def causal_attention(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, bias_TT: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(E) + bias) v, [B, T, H * E]; softmax in float32.

    Queries go in blocks, each against the keys up to its end, and the query heads of a key head
    form one matrix. On a CPU these few plain products run several times faster than the
    backward pass of PyTorch's fused kernel (bfloat16, T = 256).
    """
    b, t, heads, width = q_BTHE.shape
    groups = k_BTKE.shape[2]
    per = heads // groups
    q_BKGTE = q_BTHE.view(b, t, groups, per, width).permute(0, 2, 3, 1, 4) * width**-0.5
    k_BKET, v_BKTE = k_BTKE.permute(0, 2, 3, 1), v_BTKE.permute(0, 2, 1, 3)
    parts = []
    for at in range(0, t, QUERY_BLOCK):
        end = min(at + QUERY_BLOCK, t)
        q_BKRE = q_BKGTE[:, :, :, at:end].reshape(b, groups, -1, width)
        score_BKRT = (q_BKRE @ k_BKET[..., :end]).float().view(b, groups, per, end - at, end)
        weight = (score_BKRT + bias_TT[at:end, :end]).softmax(-1).to(q_BTHE.dtype)
        y_BKRE = weight.view(b, groups, -1, end) @ v_BKTE[:, :, :end]
        parts.append(y_BKRE.view(b, groups, per, end - at, width))
    return torch.cat(parts, dim=3).permute(0, 3, 1, 2, 4).reshape(b, t, heads * width)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        q, kv = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, q, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(q, cfg.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor, bias_TT: Tensor) -> Tensor:
        b, t, _ = x_BTD.shape
        cfg = self.cfg
        q_BTHE = linear(x_BTD, self.q_proj).view(b, t, cfg.num_attention_heads, cfg.head_dim)
        k_BTKE = linear(x_BTD, self.k_proj).view(b, t, cfg.num_key_value_heads, cfg.head_dim)
        v_BTKE = linear(x_BTD, self.v_proj).view(b, t, cfg.num_key_value_heads, cfg.head_dim)
        y_BTD = causal_attention(
            apply_rope(q_BTHE, cos_TE, sin_TE), apply_rope(k_BTKE, cos_TE, sin_TE), v_BTKE, bias_TT
        )
        return linear(y_BTD, self.o_proj)


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF = F.silu(linear(x_BTD, self.gate_proj))
        return linear(gate_BTF * linear(x_BTD, self.up_proj), self.down_proj)


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor, bias_TT: Tensor) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_TE, sin_TE, bias_TT)
        return cast(Tensor, x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)))


class Trunk(nn.Module):
    """Embedding, layers and final norm (``model.*`` in the Hugging Face layout)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)


class Llama(nn.Module):
    """The language model; the head is the embedding (tied)."""

    def __init__(self, cfg: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.cfg, self.compute_dtype = cfg, compute_dtype
        self.model = Trunk(cfg)
        self._run: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = self._run_layers
        cos, sin = rope_tables(cfg.max_position_embeddings, cfg.head_dim, cfg.rope_theta)
        self.register_buffer("cos_TE", cos, persistent=False)
        self.register_buffer("sin_TE", sin, persistent=False)
        bias = causal_bias(cfg.max_position_embeddings)
        self.register_buffer("bias_TT", bias, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def init_weights(self, seed: int) -> None:
        """Normal(0, 0.02) everywhere, layer outputs scaled by 1/sqrt(2 * layers) (GPT-2)."""
        gen = torch.Generator().manual_seed(seed)
        residual = (2 * self.cfg.num_hidden_layers) ** -0.5
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.ndim == 2:
                    out = name.endswith(("o_proj.weight", "down_proj.weight"))
                    p.normal_(0.0, 0.02 * (residual if out else 1.0), generator=gen)

    def fuse(self) -> None:
        """Fuse the pointwise work of the layers with TorchInductor (needs a C++ compiler)."""
        self._run = torch.compile(self._run_layers, dynamic=False)

    def _run_layers(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor, bias_TT: Tensor) -> Tensor:
        for layer in self.model.layers:
            x_BTD = layer(x_BTD, cos_TE, sin_TE, bias_TT)
        return cast(Tensor, self.model.norm(x_BTD))

    def hidden(self, ids_BT: Tensor, fused: bool = False) -> Tensor:
        """Return the final-norm output [B, T, D] in the compute dtype."""
        t = ids_BT.shape[1]
        x_BTD = self.model.embed_tokens(ids_BT).to(self.compute_dtype)
        cos, sin = cast(Tensor, self.cos_TE)[:t], cast(Tensor, self.sin_TE)[:t]
        bias = cast(Tensor, self.bias_TT)[:t, :t]
        return (self._run if fused else self._run_layers)(x_BTD, cos, sin, bias)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return logits [B, T, V] in float32 (used by evaluation and tests, not by training)."""
        h_BTD = self.hidden(ids_BT)
        return F.linear(h_BTD, self.model.embed_tokens.weight.to(h_BTD.dtype)).float()

    def loss(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats per token."""
        h_ND = self.hidden(ids_BT, fused=True).flatten(0, 1)
        table_VD = self.model.embed_tokens.weight
        return cast(Tensor, _HeadLoss.apply(h_ND, table_VD, targets_BT.flatten()))  # type: ignore[no-untyped-call]


class _HeadLoss(torch.autograd.Function):
    """Tied head and cross-entropy in row chunks; both gradients are made in the forward pass.

    The full [N, V] logits never exist: for 8,192 rows they are 134 MB in float32, and their
    round trips through memory cost more than the matrix products.
    """

    CHUNK_ROWS = 512

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        h_ND: Tensor,
        table_VD: Tensor,
        targets_N: Tensor,
    ) -> Tensor:
        rows, step = h_ND.shape[0], _HeadLoss.CHUNK_ROWS
        weight_VD = table_VD.to(h_ND.dtype)
        grad_h_ND = torch.empty_like(h_ND)
        grad_table_VD = torch.zeros_like(table_VD)
        total = torch.zeros((), device=h_ND.device)
        for at in range(0, rows, step):
            h_CD, target_C1 = h_ND[at : at + step], targets_N[at : at + step, None]
            prob_CV = torch.softmax((h_CD @ weight_VD.T).float(), dim=-1)
            picked_C1 = prob_CV.gather(1, target_C1)
            total -= picked_C1.clamp_min(1e-30).log().sum()
            # d loss / d logits = softmax - onehot
            grad_CV = prob_CV.scatter_(1, target_C1, picked_C1 - 1.0).to(h_ND.dtype)
            grad_h_ND[at : at + step] = grad_CV @ weight_VD
            grad_table_VD += grad_CV.T @ h_CD
        ctx.save_for_backward(grad_h_ND.div_(rows), grad_table_VD.div_(rows))
        return total / rows

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_h_ND, grad_table_VD = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_h_ND * grad.to(grad_h_ND.dtype), grad_table_VD * grad, None


def save_hf_weights(model: Llama, path: Path) -> None:
    """Write the weights as bfloat16 safetensors under the Hugging Face names."""
    state = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(state, path, metadata={"format": "pt"})


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it fast; a CPU without such instructions takes a hundred times as long."""
    on_a_cpu = torch.ops.mkldnn._is_mkldnn_bf16_supported  # torch.cpu does not say
    fast = getattr(torch.get_device_module(device), "is_bf16_supported", on_a_cpu)
    return torch.bfloat16 if fast() else torch.float32


def load_hf(folder: Path, compute_dtype: torch.dtype = torch.float32) -> Llama:
    """Load ``config.json`` and ``model.safetensors`` of a folder in the Hugging Face layout."""
    raw = cast(dict[str, object], json.loads((folder / "config.json").read_text("utf-8")))
    model = Llama(ModelConfig.from_hf(raw), compute_dtype)
    state = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(state, strict=True)
    return model
