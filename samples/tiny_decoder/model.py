"""A decoder of the Llama architecture in plain PyTorch, without a cache and with one.

The modules carry the names of HuggingFace's Llama, so that the weights fit there too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""q [B, H, T, D], k and v [B, H, S, D], additive mask [B, 1, T, S] or None for causal -> [B, H, T, D]."""

KeyValue = tuple[Tensor, Tensor]
"""Rotated keys and values of one layer, both [B, Hkv, P, D]."""

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the positions, both [B, 1, T, D]."""


@dataclass(frozen=True)
class Config:
    """Sizes of a decoder; the defaults are those of the byte-level model in this folder."""

    vocab: int = 256
    dim: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    hidden: int = 640
    context: int = 1024
    theta: float = 10000.0
    eps: float = 1e-5
    tied: bool = True

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class RotaryEmbedding(nn.Module):
    """The rotary position embedding (Su et al., 2021) of position_ids [B, T]."""

    inverse_frequencies: Tensor

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self.register_buffer("inverse_frequencies", theta**-exponents, persistent=False)

    def forward(self, position_ids: Tensor) -> Rotation:
        half = position_ids[:, None, :, None].float() * self.inverse_frequencies
        angles = torch.cat((half, half), dim=-1)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, H, T, D], where dimension i < D/2 pairs with i + D/2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(D) + mask) v, causal where there is no mask."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023); `attend` may be any other function or module of its signature."""

    def __init__(self, config: Config, attend: AttentionFunction) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.dim, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.dim, bias=False)
        self.attend = attend

    def forward(
        self, x: Tensor, rotation: Rotation, mask: Tensor | None, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        q = rotate(self._split(self.q_proj(x), self.heads), *rotation)
        k = rotate(self._split(self.k_proj(x), self.kv_heads), *rotation)
        v = self._split(self.v_proj(x), self.kv_heads)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        mixed = self.attend(q, self._repeat(k), self._repeat(v), mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), (k, v)

    def _split(self, x: Tensor, heads: int) -> Tensor:
        """[B, T, heads * D] -> [B, heads, T, D]."""
        return x.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

    def _repeat(self, x: Tensor) -> Tensor:
        """[B, Hkv, S, D] -> [B, H, S, D]: each key-value head serves H / Hkv query heads in a row."""
        groups = self.heads // self.kv_heads
        return x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden, bias=False)
        self.down_proj = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and beside a residual connection."""

    def __init__(self, config: Config, attend: AttentionFunction) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.eps)
        self.self_attn = Attention(config, attend)
        self.post_attention_layernorm = RMSNorm(config.dim, config.eps)
        self.mlp = FeedForward(config)

    def forward(
        self, x: Tensor, rotation: Rotation, mask: Tensor | None, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        mixed, present = self.self_attn(self.input_layernorm(x), rotation, mask, past)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Decoder(nn.Module):
    """input_ids [B, T] -> logits [B, T, V], causal, without a cache."""

    def __init__(self, config: Config, attend: AttentionFunction = softmax_attention) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.dim)
        self.rotary = RotaryEmbedding(config.head_dim, config.theta)
        self.layers = nn.ModuleList(Block(config, attend) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.eps)
        self.lm_head = nn.Linear(config.dim, config.vocab, bias=False)
        self._initialise()
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return self.run(input_ids, position_ids, None, None)[0]

    def run(
        self, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None, past: list[KeyValue] | None
    ) -> tuple[Tensor, list[KeyValue]]:
        """Logits [B, T, V], and every layer's keys and values, those of `past` included."""
        x = self.embed_tokens(input_ids)
        rotation = self.rotary(position_ids)
        presents = []
        for index, layer in enumerate(self.layers):
            x, present = layer(x, rotation, mask, None if past is None else past[index])
            presents.append(present)
        return self.lm_head(self.norm(x)), presents

    def _initialise(self) -> None:
        """Normal with deviation 0.02; what feeds the residual stream is scaled down by its depth (GPT-2)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.layers) if into_residual else 0.02)


class CachedDecoder(nn.Module):
    """The decoder with the interface of Optimum's exports: a cache goes in and comes out one step longer."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: list[KeyValue]
    ) -> tuple[Tensor, list[KeyValue]]:
        """Continue from a cache.

        Args:
            input_ids: [B, T].
            attention_mask: [B, P + T], 1 for a token and 0 for padding.
            position_ids: [B, T].
            past_key_values: Keys and values [B, Hkv, P, D] of each layer; P may be 0.

        Returns:
            Logits [B, T, V], and keys and values [B, Hkv, P + T, D] of each layer.
        """
        mask = causal_mask(attention_mask, input_ids.shape[1])
        return self.decoder.run(input_ids, position_ids, mask, past_key_values)


def causal_mask(attention_mask: Tensor, length: int) -> Tensor:
    """Additive mask [B, 1, T, P + T]: query i sees key j where j <= P + i and attention_mask[:, j] is 1.

    Hidden keys get the most negative finite number: with -inf, a padding query that sees nothing would turn into NaN,
    and reach the other queries through its values.
    """
    device, total = attention_mask.device, attention_mask.shape[1]
    queries = torch.arange(length, device=device)[:, None] + (total - length)
    visible = (torch.arange(total, device=device) <= queries) & (attention_mask[:, None, None, :] != 0)
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)
