"""What classifiers and regressors have in common: how scores are transformed and which label they give."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graphopt.dialect.numerals import Texts
from graphopt.dialect.strings import strings
from graphopt.errors import GraphOptError

__all__ = ["as_rows", "binary", "labels_of", "picked", "single", "transformed"]

DOMAIN = "ai.onnx.ml"
# Smaller scores are zero to SOFTMAX_ZERO.
_ZERO = 1e-7


def as_rows(x: Tensor) -> Tensor:
    """Return [N, F] floating point features; [F] is one row."""
    rows = x.unsqueeze(0) if x.dim() == 1 else x
    return rows if rows.dtype == torch.float64 else rows.to(torch.float32)


def transformed(scores: Tensor, post_transform: str) -> Tensor:
    """Transform the scores of each row.

    Args:
        scores: [N, K].
        post_transform: NONE, LOGISTIC, SOFTMAX, SOFTMAX_ZERO (the softmax of the scores that are not zero), or PROBIT.
    """
    if post_transform == "NONE":
        return scores
    if post_transform == "LOGISTIC":
        return torch.sigmoid(scores)
    if post_transform == "SOFTMAX":
        return torch.softmax(scores, 1)
    if post_transform == "PROBIT":
        return _probit(scores)
    if post_transform != "SOFTMAX_ZERO":
        raise GraphOptError(
            f"expected a post_transform of NONE, LOGISTIC, SOFTMAX, SOFTMAX_ZERO, or PROBIT, found {post_transform!r}"
        )
    is_zero = scores.abs() <= _ZERO
    exponents = torch.where(is_zero, 0, torch.exp(scores - scores.amax(1, keepdim=True)))
    return exponents / exponents.sum(1, keepdim=True)


def _probit(x: Tensor) -> Tensor:
    """The inverse of the normal distribution function, approximated as onnxruntime and the reference do (Winitzki)."""
    a = 0.147
    y = 2 * x - 1
    log = torch.log((1 - y) * (1 + y))
    v = 2 / (math.pi * a) + log / 2
    root = torch.sqrt(torch.sqrt(v * v - log / a) - v)
    return math.sqrt(2) * torch.where(y < 0, -root, root)


def single(scores: Tensor, post_transform: str) -> Tensor:
    """Transform the score of a regressor with one target: [N, 1]."""
    if post_transform in ("NONE", "PROBIT"):
        return transformed(scores, post_transform)
    # By the standard it is transformed, onnxruntime leaves it as it is.
    raise NotImplementedError(f"the {post_transform} of a single score is not covered")


def binary(score: Tensor, post_transform: str, *, probability: bool) -> Tensor:
    """Return the scores of both classes from the one score of a binary classifier.

    The standard says nothing of it. As in onnxruntime the negative class gets what is missing to one, or the opposite
    score, and only LOGISTIC transforms the two.

    Args:
        score: [N], of the positive class.
        post_transform: as in `transformed`.
        probability: whether the score is one, as far as its model tells.

    Returns:
        [N, 2].
    """
    if post_transform == "LOGISTIC":
        return torch.sigmoid(torch.stack([-score, score], 1))
    both = torch.stack([1 - score if probability else -score, score], 1)
    return transformed(both, post_transform) if post_transform == "PROBIT" else both


def labels_of(integers: list[int] | None, texts: list[str] | None) -> list[int] | list[str]:
    """Return the one list of class labels that is given."""
    return texts or integers or []


def picked(labels: list[int] | list[str], index: Tensor) -> Tensor | Texts:
    """Return the labels with the given numbers: [N] to [N]."""
    if labels and isinstance(labels[0], str):
        return strings((str(labels[i]) for i in index.tolist()), index.shape)
    return torch.tensor(labels, dtype=torch.int64, device=index.device)[index]
