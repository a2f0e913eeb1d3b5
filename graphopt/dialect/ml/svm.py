"""Support vector machines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.dialect.numerals import Texts
from graphopt.dialect.registry import operator

from .scores import DOMAIN, as_rows, binary, labels_of, picked, transformed

# Bounds of libsvm: of pairwise probabilities, and on the iterations that couple them.
_LEAST_PROBABILITY = 1e-7
_ITERATIONS = 100


@dataclass(frozen=True)
class _Kernel:
    """K(x, v), which is x . v for LINEAR."""

    kind: str
    params: list[float] | None

    def __call__(self, x: Tensor, vectors: Tensor) -> Tensor:
        """Return [N, V] for x [N, F] and the vectors [V, F]."""
        gamma, shift, degree = self.params or (0.0, 0.0, 0.0)
        if self.kind == "RBF":
            # Without the matrix product of the usual shortcut, which cancels where x is close to a vector.
            distance = torch.cdist(x, vectors, compute_mode="donot_use_mm_for_euclid_dist")
            return torch.exp(-gamma * distance.square())
        products = x @ vectors.t()
        if self.kind == "POLY":
            return (gamma * products + shift) ** degree
        return torch.tanh(gamma * products + shift) if self.kind == "SIGMOID" else products


def _matrix(values: list[float] | None, rows: int, x: Tensor) -> Tensor:
    return torch.tensor(values or [], dtype=torch.float32, device=x.device).reshape(rows, -1)


@operator("SVMRegressor", domain=DOMAIN)
def svm_regressor_1(
    x: Tensor,
    *,
    coefficients: list[float] | None = None,
    kernel_params: list[float] | None = None,
    kernel_type: str = "LINEAR",
    n_supports: int = 0,
    one_class: int = 0,
    post_transform: str = "NONE",
    rho: list[float] | None = None,
    support_vectors: list[float] | None = None,
) -> Tensor:
    """Return sum_i c_i K(x, v_i) + rho.

    Args:
        x: [N, F] or [F].
        coefficients: c, [V]; [F] where there are no support vectors: the weights of x.
        kernel_params: gamma, coef0, degree.
        kernel_type: LINEAR, POLY, RBF, or SIGMOID.
        n_supports: V.
        one_class: whether the result is its sign, 1 or -1.
        post_transform: NONE.
        rho: [1].
        support_vectors: v, [V * F].

    Returns:
        [N, 1], float32.
    """
    if post_transform != "NONE":
        # By the standard the result is transformed, onnxruntime leaves it as it is.
        raise NotImplementedError(f"the {post_transform} of a single score is not covered")
    rows = as_rows(x).to(torch.float32)
    weight = _matrix(coefficients, 1, x)
    if n_supports:
        rows = _Kernel(kernel_type, kernel_params)(rows, _matrix(support_vectors, n_supports, x))
    result = rows @ weight.t() + (rho or [0.0])[0]
    return torch.where(result > 0, 1.0, -1.0) if one_class else result


@operator("SVMClassifier", domain=DOMAIN)
def svm_classifier_1(
    x: Tensor,
    *,
    classlabels_ints: list[int] | None = None,
    classlabels_strings: list[str] | None = None,
    coefficients: list[float] | None = None,
    kernel_params: list[float] | None = None,
    kernel_type: str = "LINEAR",
    post_transform: str = "NONE",
    prob_a: list[float] | None = None,
    prob_b: list[float] | None = None,
    rho: list[float] | None = None,
    support_vectors: list[float] | None = None,
    vectors_per_class: list[int] | None = None,
) -> tuple[Tensor | Texts, Tensor]:
    """Return the class with the most votes of the pairwise classifiers, and scores or probabilities.

    Args:
        x: [N, F] or [F].
        classlabels_ints: the C classes, where they are integers.
        classlabels_strings: the classes, where they are strings.
        coefficients: [C - 1, V] of the support vectors; [C, F] without such.
        kernel_params: gamma, coef0, degree.
        kernel_type: LINEAR, POLY, RBF, or SIGMOID.
        post_transform: of the scores.
        prob_a: factor by which a pair's score gives its probability, [C (C - 1) / 2].
        prob_b: summand.
        rho: [C (C - 1) / 2]; one without support vectors.
        support_vectors: [V * F], those of the first class first.
        vectors_per_class: [C], with the sum V.

    Returns:
        Labels [N], and in float32 probabilities [N, C], or else scores: [N, C (C - 1) / 2], for two classes both.
    """
    rows = as_rows(x).to(torch.float32)
    labels = labels_of(classlabels_ints, classlabels_strings)
    positive = min(coefficients or [0.0]) >= 0
    if not vectors_per_class or not sum(vectors_per_class):
        weight = _matrix(coefficients, len(labels), x)
        scores = rows @ weight.t() + (rho or [0.0])[0]
        top = scores.argmax(1)
        if len(labels) == 2:
            best = scores.amax(1)
            top = torch.where(best >= 0.5 if positive else best > 0, 1, top)
        return picked(labels, top), transformed(scores, post_transform)
    vectors = _matrix(support_vectors, sum(vectors_per_class), x)
    kernels = _Kernel(kernel_type, kernel_params)(rows, vectors)
    scores = _pair_scores(kernels, _matrix(coefficients, len(labels) - 1, x), vectors_per_class, rho or [])
    top = _votes(scores, len(labels)).argmax(1)
    if prob_a:
        a, b = (torch.tensor(p, dtype=torch.float32, device=x.device) for p in (prob_a, prob_b))
        pairwise = torch.sigmoid(-(scores * a + b)).clamp(_LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY)
        return picked(labels, top), transformed(_coupled(pairwise, len(labels)), post_transform)
    if len(labels) == 2:
        return picked(labels, top), binary(scores[:, 0], post_transform, probability=post_transform != "NONE")
    return picked(labels, top), transformed(scores, post_transform)


def _pairs(classes: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(classes) for j in range(i + 1, classes)]


def _pair_scores(kernels: Tensor, coefficients: Tensor, counts: list[int], rho: list[float]) -> Tensor:
    """Return the scores of the classifiers of all pairs of classes: [N, pairs], positive for the first class.

    Row j - 1 of the coefficients of the vectors of class i, and row i of those of class j, belong to the pair i < j.
    """
    blocks = torch.split(kernels.double(), counts, 1)
    weights = torch.split(coefficients.double(), counts, 1)
    scores = [blocks[i] @ weights[i][j - 1] + blocks[j] @ weights[j][i] for i, j in _pairs(len(counts))]
    return (torch.stack(scores, 1) + torch.tensor(rho[: len(scores)], device=kernels.device)).float()


def _votes(scores: Tensor, classes: int) -> Tensor:
    """Return how many of its pairs each class wins: [N, C]."""
    votes = torch.zeros(len(scores), classes, dtype=torch.int64, device=scores.device)
    for won, (i, j) in zip((scores > 0).unbind(1), _pairs(classes), strict=True):
        votes[:, i] += won
        votes[:, j] += ~won
    return votes


def _coupled(pairwise: Tensor, classes: int) -> Tensor:
    """Return the probabilities of the classes from those of the pairs, [N, pairs] to [N, C].

    The second method of Wu, Lin and Weng (2004), which minimises sum_ij (r_ji p_i - r_ij p_j)^2, iterated as in libsvm.
    """
    count = len(pairwise)
    r = torch.zeros(count, classes, classes, device=pairwise.device)
    for probability, (i, j) in zip(pairwise.unbind(1), _pairs(classes), strict=True):
        r[:, i, j], r[:, j, i] = probability, 1 - probability
    q = -r * r.transpose(1, 2) + torch.diag_embed(r.square().sum(1))
    p = torch.full((count, classes), 1 / classes, device=pairwise.device)
    for _ in range(_ITERATIONS):
        qp = (q @ p.unsqueeze(2)).squeeze(2)
        pqp = (p * qp).sum(1)
        open_rows = (qp - pqp.unsqueeze(1)).abs().amax(1) >= 0.005 / classes
        if pairwise.is_meta or not bool(open_rows.any()):
            break
        new = p
        for t in range(classes):
            step = (pqp - qp[:, t]) / q[:, t, t]
            unit = torch.nn.functional.one_hot(torch.tensor(t), classes).to(p)
            new = (new + step.unsqueeze(1) * unit) / (1 + step).unsqueeze(1)
            pqp = (pqp + step * (step * q[:, t, t] + 2 * qp[:, t])) / (1 + step) ** 2
            qp = (qp + step.unsqueeze(1) * q[:, t]) / (1 + step).unsqueeze(1)
        p = torch.where(open_rows.unsqueeze(1), new, p)
    return p
