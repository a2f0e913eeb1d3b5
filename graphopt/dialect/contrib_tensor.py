"""Operators of onnxruntime's com.microsoft domain that ai.onnx has too, or had not when they were made."""

from __future__ import annotations

import torch
from torch import Tensor

from .contrib import DOMAIN
from .dtypes import compute_type, scalar
from .gather import gather_nd_11, unique_11
from .registry import operator
from .tensor import pad_axes, range_11, trilu_14


@operator("SampleOp", domain=DOMAIN)
def sample_op(x: Tensor) -> Tensor:
    """Return x itself."""
    return x


@operator("Inverse", domain=DOMAIN)
def inverse(x: Tensor) -> Tensor:
    """Return the inverses of the matrices in the last two axes."""
    result: Tensor = torch.linalg.inv(x.to(compute_type(x.dtype)))
    return result.to(x.dtype)


@operator("CDist", domain=DOMAIN)
def c_dist(a: Tensor, b: Tensor, *, metric: str = "sqeuclidean") -> Tensor:
    """Return the distance of each row of `[M, N]` to each row of `[K, N]`."""
    if metric not in ("euclidean", "sqeuclidean"):
        raise NotImplementedError(f"CDist with the metric {metric!r} is not covered")
    if metric == "euclidean":
        return torch.cdist(a, b)
    return (a.unsqueeze(1) - b).square().sum(-1)


@operator("Trilu", domain=DOMAIN, values=(1,))
def microsoft_trilu(x: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Tensor:
    """Keep the upper or lower triangle of the matrices, from the k-th diagonal on."""
    return trilu_14(x, k, upper=upper)


@operator("Pad", domain=DOMAIN, values=(1, 2))
def microsoft_pad(x: Tensor, pads: Tensor, value: Tensor | None = None, *, mode: str = "constant") -> Tensor:
    """Pad every axis; `pads` `[2 * rank]` or `[1, 2 * rank]` lists all begins, then all ends; negative ones crop."""
    # On the meta device only the shape counts.
    fill = 0.0 if value is None or value.is_meta else value.reshape(()).item()
    return pad_axes(x, range(x.dim()), pads.reshape(-1).tolist(), mode, fill)


@operator("Range", domain=DOMAIN, values=(0, 1, 2))
def microsoft_range(start: Tensor, limit: Tensor, delta: Tensor | None = None) -> Tensor:
    """Return start, start + delta, ... up to but without limit; delta is 1 by default."""
    return range_11(start, limit, torch.ones_like(start) if delta is None else delta)


@operator("ExpandDims", domain=DOMAIN, values=(1,))
def expand_dims(x: Tensor, axis: Tensor) -> Tensor:
    """Insert an axis of size one."""
    return x.unsqueeze(scalar(axis))


@operator("Unique", domain=DOMAIN, values=(0,))
def microsoft_unique(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the distinct elements in the order in which they first occur, the inverse mapping, and the counts."""
    values, _, index, counts = unique_11(x, sorted=0, outputs=4)
    return values, index, counts


@operator("GatherND", domain=DOMAIN)
def microsoft_gather_nd(x: Tensor, indices: Tensor) -> Tensor:
    """Pick slices of x at the coordinates in the last axis of `indices`."""
    return gather_nd_11(x, indices)


@operator("UnfoldTensor", domain=DOMAIN)
def unfold_tensor(x: Tensor, *, dim: int = -1, size: int, step: int = 1) -> Tensor:
    """Return all slices of so many elements along an axis, every `step`; their elements make up a new last axis."""
    return x.unfold(dim, size, step)


@operator("MulInteger", domain=DOMAIN)
def mul_integer(a: Tensor, a_zero_point: Tensor | None, b: Tensor, b_zero_point: Tensor | None = None) -> Tensor:
    """(a - a_zero_point) * (b - b_zero_point) in int32."""
    a, b = a.to(torch.int32), b.to(torch.int32)
    return (a if a_zero_point is None else a - a_zero_point) * (b if b_zero_point is None else b - b_zero_point)


@operator("NGramRepeatBlock", domain=DOMAIN)
def n_gram_repeat_block(input_ids: Tensor, scores: Tensor, *, ngram_size: int) -> Tensor:
    """Set to -inf the scores `[B, V]` of tokens that would repeat a run of `ngram_size` tokens of `[B, T]`."""
    if input_ids.shape[1] < ngram_size:
        return scores
    runs = input_ids.unfold(1, ngram_size, 1)
    last = input_ids[:, input_ids.shape[1] - ngram_size + 1 :].unsqueeze(1)
    repeated = (runs[..., :-1] == last).all(-1)
    hits = torch.zeros_like(scores).scatter_add(1, runs[..., -1], repeated.to(scores.dtype))
    return scores.masked_fill(hits > 0, float("-inf"))
