"""Linear classifiers and regressors."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.dialect.numerals import Texts
from graphopt.dialect.registry import operator

from .scores import DOMAIN, as_rows, binary, labels_of, picked, single, transformed


def _products(x: Tensor, coefficients: list[float], intercepts: list[float] | None) -> Tensor:
    """Return x @ W^T + b in float32, as the outputs are: [N, targets]."""
    rows = as_rows(x).to(torch.float32)
    weight = torch.tensor(coefficients, dtype=torch.float32, device=x.device).reshape(-1, rows.shape[1])
    scores = rows @ weight.t()
    return scores if not intercepts else scores + torch.tensor(intercepts, dtype=torch.float32, device=x.device)


@operator("LinearRegressor", domain=DOMAIN)
def linear_regressor_1(
    x: Tensor,
    *,
    coefficients: list[float],
    intercepts: list[float] | None = None,
    post_transform: str = "NONE",
    targets: int = 1,
) -> Tensor:
    """Return x W^T + b.

    Args:
        x: [N, F] or [F].
        coefficients: W, [targets * F].
        intercepts: b, [targets].
        post_transform: of the result.
        targets: how many values there are for each row.

    Returns:
        [N, targets], float32.
    """
    scores = _products(x, coefficients, intercepts)
    return single(scores, post_transform) if targets == 1 else transformed(scores, post_transform)


@operator("LinearClassifier", domain=DOMAIN)
def linear_classifier_1(
    x: Tensor,
    *,
    coefficients: list[float],
    classlabels_ints: list[int] | None = None,
    classlabels_strings: list[str] | None = None,
    intercepts: list[float] | None = None,
    multi_class: int = 0,
    post_transform: str = "NONE",
) -> tuple[Tensor | Texts, Tensor]:
    """Return the class with the largest x W^T + b, and the transformed scores.

    Args:
        x: [N, F] or [F].
        coefficients: W, [rows * F]; a single row decides between two classes by its sign.
        classlabels_ints: the classes, where they are integers.
        classlabels_strings: the classes, where they are strings.
        intercepts: b, [rows].
        multi_class: how the model was trained.
        post_transform: of the scores.

    Returns:
        Labels [N], and scores [N, classes] in float32.
    """
    scores = _products(x, coefficients, intercepts)
    labels = labels_of(classlabels_ints, classlabels_strings)
    if scores.shape[1] > 1:
        return picked(labels, scores.argmax(1)), transformed(scores, post_transform)
    positive = (scores[:, 0] > 0).to(torch.int64)
    if len(labels) == 2:
        return picked(labels, positive), binary(scores[:, 0], post_transform, probability=True)
    return positive, scores if post_transform != "PROBIT" else transformed(scores, post_transform)
