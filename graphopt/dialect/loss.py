"""Losses of the training operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import operator


@operator("NegativeLogLikelihoodLoss", since=12)
def negative_log_likelihood_loss_12(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return -x at the target class along axis 1, weighted per class."""
    # -100 is no class index, so nothing is ignored by default.
    ignored = -100 if ignore_index is None else ignore_index
    return F.nll_loss(x, target.to(torch.int64), weight, ignore_index=ignored, reduction=reduction)


@operator("SoftmaxCrossEntropyLoss", since=12, counted=True)
def softmax_cross_entropy_loss_12(
    scores: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
    outputs: int,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the negative log likelihood of the log softmax along axis 1, and that log softmax."""
    log_prob = torch.log_softmax(scores, 1)
    loss = negative_log_likelihood_loss_12(log_prob, labels, weights, ignore_index=ignore_index, reduction=reduction)
    return loss if outputs == 1 else (loss, log_prob)
