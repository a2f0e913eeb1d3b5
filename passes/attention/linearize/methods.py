"""The methods by name: which sites each is for, and what it makes of the pass's options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from graphopt.passes.attention.linearize.delta import DeltaAttention
from graphopt.passes.attention.linearize.gated import GatedAttention
from graphopt.passes.attention.linearize.hedgehog import HedgehogAttention
from graphopt.passes.attention.linearize.inline import InlineAttention
from graphopt.passes.attention.linearize.liger import LigerAttention
from graphopt.passes.attention.linearize.lolcats import LolcatsAttention
from graphopt.passes.attention.linearize.replacement import LinearReplacement
from graphopt.passes.attention.linearize.soft import SoftAttention
from graphopt.passes.attention.linearize.transnormer import BlockAttention, BlockSite, TransNormerAttention
from graphopt.sites import AttentionSite

if TYPE_CHECKING:
    from graphopt.passes.attention.linearize.linearize import Linearize

Method = Literal["auto", "lolcats", "liger", "hedgehog", "gated", "delta", "inline", "soft", "transnormer"]
_CAUSAL_ONLY = frozenset({"lolcats", "liger", "gated", "delta"})
_SEES_ALL_ONLY = frozenset({"inline", "soft"})


def is_causal_only(method: str) -> bool:
    """Whether the method carries a state from token to token."""
    return method in _CAUSAL_ONLY


def sees_all_only(method: str) -> bool:
    """Whether the method needs all tokens at once."""
    return method in _SEES_ALL_ONLY


def make(options: Linearize, site: AttentionSite, generator: torch.Generator) -> LinearReplacement:
    """The module that takes the place of `site`."""
    method = options.method
    if method == "auto":
        method = "lolcats" if site.causal else "hedgehog"
    maps = (options.features, options.feature_map, generator)
    window, sinks = options.window, options.sinks
    if method == "hedgehog":
        return HedgehogAttention(site, *maps, tied=options.tied, loss=options.transfer)
    if method == "liger":
        return LigerAttention(site, window=window, sinks=sinks, start=options.start)
    if method == "gated":
        return GatedAttention(site, *maps, window=window, sinks=sinks, start=options.start)
    if method == "delta":
        return DeltaAttention(site, window=window, sinks=sinks, start=options.start, negative=options.negative)
    if method == "inline":
        return InlineAttention(site, grid=options.grid)
    if method == "soft":
        return SoftAttention(site, landmarks=options.landmarks)
    if method == "transnormer":
        return BlockAttention(site, block=options.window) if isinstance(site, BlockSite) else TransNormerAttention(site)
    return LolcatsAttention(
        site,
        *maps,
        window=window,
        sinks=sinks,
        branches=options.branches,
        start=options.start,
        tied=options.tied,
        loss=options.transfer,
    )
