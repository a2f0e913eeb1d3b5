"""Operators that scale, fill in, choose, and join features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.dialect.numerals import Texts
from graphopt.dialect.registry import operator
from graphopt.errors import GraphOptError

from .scores import DOMAIN


@operator("Scaler", domain=DOMAIN)
def scaler_1(x: Tensor, *, offset: list[float] | None = None, scale: list[float] | None = None) -> Tensor:
    """Return (x - offset) * scale in float32; both have one element, or one for each feature."""
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    shift, factor = (torch.tensor(values, dtype=wide, device=x.device) for values in (offset or [0.0], scale or [1.0]))
    return ((x.to(wide) - shift) * factor).to(torch.float32)


@operator("Normalizer", domain=DOMAIN)
def normalizer_1(x: Tensor, *, norm: str = "MAX") -> Tensor:
    """Divide each row by its largest element (MAX), or by its L1 or L2 norm, unless that is zero.

    Args:
        x: [N, F] or [F].
        norm: which.

    Returns:
        The same shape in float32.
    """
    values = x if x.dtype == torch.float64 else x.to(torch.float32)
    if norm == "MAX":
        size = values.amax(-1, keepdim=True)
    elif norm == "L1":
        size = values.abs().sum(-1, keepdim=True)
    elif norm == "L2":
        size = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    else:
        raise GraphOptError(f"expected a norm of MAX, L1, or L2 for Normalizer, found {norm!r}")
    return (values / torch.where(size == 0, 1, size)).to(torch.float32)


@operator("Binarizer", domain=DOMAIN)
def binarizer_1(x: Tensor, *, threshold: float = 0.0) -> Tensor:
    """Return one where x is larger than the threshold, else zero, in the type of x."""
    return (x > threshold).to(x.dtype)


@operator("Imputer", domain=DOMAIN)
def imputer_1(
    x: Tensor,
    *,
    imputed_value_floats: list[float] | None = None,
    imputed_value_int64s: list[int] | None = None,
    replaced_value_float: float = 0.0,
    replaced_value_int64: int = 0,
) -> Tensor:
    """Replace the elements that equal one value, which may be NaN.

    Args:
        x: [..., F].
        imputed_value_floats: one element, or one for each feature; where x is floating point.
        imputed_value_int64s: the same where x is an integer.
        replaced_value_float: what is replaced.
        replaced_value_int64: what is replaced.
    """
    is_float = x.dtype.is_floating_point
    values = imputed_value_floats if is_float else imputed_value_int64s
    if not values or len(values) not in (1, x.shape[-1]):
        raise GraphOptError(
            f"expected one imputed value, or one for each of {x.shape[-1]} features, found {len(values or [])}"
        )
    new = torch.tensor(values, dtype=x.dtype, device=x.device)
    if is_float:
        old = torch.tensor(replaced_value_float, dtype=x.dtype, device=x.device)
        return torch.where((x == old) | (x.isnan() & old.isnan()), new, x)
    return torch.where(x == replaced_value_int64, new, x)


@operator("ArrayFeatureExtractor", domain=DOMAIN)
def array_feature_extractor_1(x: Tensor | Texts, indices: Tensor) -> Tensor | Texts:
    """Pick elements of the last axis.

    Args:
        x: [..., F]; [F] is one row.
        indices: K of them in any shape.

    Returns:
        [..., K].
    """
    rows = x.reshape(1, -1) if len(x.shape) == 1 else x
    flat = indices.reshape(-1)
    if isinstance(rows, Tensor):
        return rows.index_select(-1, flat)
    return rows[..., flat.cpu().numpy()]


@operator("FeatureVectorizer", domain=DOMAIN)
def feature_vectorizer_1(*inputs: Tensor, inputdimensions: list[int] | None = None) -> Tensor:
    """Join features along the second axis in float32.

    Args:
        inputs: [N, F], or [F] as one row.
        inputdimensions: the length of each in the result; it is cut, or filled up with zeros.
    """
    rows = [x.reshape(1 if x.dim() == 1 else x.shape[0], -1).to(torch.float32) for x in inputs]
    sizes = inputdimensions or [x.shape[1] for x in rows]
    return torch.cat([F.pad(x, (0, size - x.shape[1])) for x, size in zip(rows, sizes, strict=True)], 1)
