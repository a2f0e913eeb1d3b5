"""What an attention site means: the plain computation that every recognised site is checked against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.sites.attention.masking import LOW
from graphopt.sites.base import AttentionSite, AttentionValues, MaskKind
from graphopt.sites.masks import HIDDEN, causal


def attend(site: AttentionSite, values: AttentionValues) -> torch.Tensor:
    """softmax(softcap(scale q k^T) masked) v in fp32, [B, Hq, T, Dv]; zeros for queries that see no key."""
    q, k, v = (x.to(torch.float32) for x in (values.q, values.k, values.v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = site.scale * (q @ k.transpose(-1, -2))
    if site.softcap:
        scores = site.softcap * torch.tanh(scores / site.softcap)
    visible = visible_keys(site, values).expand(scores.shape)
    if values.mask is not None and values.mask.dtype != torch.bool:
        scores = scores + values.mask.to(torch.float32)
    scores = scores.masked_fill(~visible, -torch.inf)
    return torch.softmax(scores, -1).masked_fill(~visible, 0.0) @ v


def visible_keys(site: AttentionSite, values: AttentionValues) -> torch.Tensor:
    """Which keys each query sees, broadcastable to [B, H, T, S]."""
    shape = values.q.shape[2], values.k.shape[2]
    everything = torch.ones(shape, dtype=torch.bool)
    if values.mask is None:
        return causal(everything) if site.mask.kind is MaskKind.CAUSAL else everything
    if values.mask.dtype == torch.bool:
        return values.mask & everything
    mask = values.mask.expand(torch.broadcast_shapes(values.mask.shape, shape)).to(torch.float32)
    level = mask.amax(-1, keepdim=True)
    return (mask > level + HIDDEN) & (level > HIDDEN)


def _below_masks(site: AttentionSite, values: AttentionValues) -> torch.Tensor:
    """Which queries have scores that a finite mask can hide, [B, Hq, T, 1]."""
    q, k = values.q.to(torch.float32), values.k.to(torch.float32)
    if values.mask is None:
        return torch.ones((*q.shape[:3], 1), dtype=torch.bool)
    scores = site.scale * (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2))
    return scores.abs().amax(-1, keepdim=True) < -LOW / 2


def reference(site: AttentionSite, inputs: Sequence[Any]) -> torch.Tensor:
    """The value of `site.output` from the values of `site.inputs`."""
    return site.merge(attend(site, site.split(*inputs)))


def compare(site: AttentionSite, inputs: Sequence[Any], output: torch.Tensor) -> float:
    """The largest difference of `reference` from `output`, relative to the largest value.

    Queries that see no key are left out: an exporter is free in what it gives for them. So are those with scores
    of the size of a finite mask, which then hides nothing.
    """
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    output, values = output.detach(), site.split(*inputs)
    expected = attend(site, values)
    alive = (visible_keys(site, values).any(-1, keepdim=True) & _below_masks(site, values)).to(torch.float32)
    alive = alive.expand(expected.shape)
    kept = site.merge(alive) > 0.5
    found = site.merge(expected)
    if found.shape != output.shape:
        return float("inf")
    difference = (found - output).to(torch.float32)[kept.expand(output.shape)].abs()
    if difference.numel() == 0:
        return 0.0
    largest = output.to(torch.float32)[kept.expand(output.shape)].abs().max()
    return float(difference.max() / largest.clamp(min=1e-6)) if bool(torch.isfinite(difference).all()) else float("inf")
