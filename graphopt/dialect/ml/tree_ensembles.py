"""Operators of tree ensembles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.dialect.numerals import Texts
from graphopt.dialect.registry import operator
from graphopt.errors import GraphOptError

from .scores import DOMAIN, as_rows, binary, labels_of, picked, single, transformed
from .trees import LEAF, MEMBER, Trees, from_ids

_AGGREGATES = ("AVERAGE", "SUM", "MIN", "MAX")
_TRANSFORMS = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")


def _numbers(values: list[float] | None, tensor: Tensor | None, like: Tensor) -> Tensor:
    """One attribute that is given as floats or as a tensor, in the type of the features."""
    # By way of numpy, which reads long lists several times faster than torch.
    return (torch.from_numpy(np.array(values or [], dtype=np.float32)) if tensor is None else tensor).to(like)


@operator("TreeEnsembleRegressor", domain=DOMAIN)
def tree_ensemble_regressor_1(
    x: Tensor,
    *,
    aggregate_function: str = "SUM",
    base_values: list[float] | None = None,
    base_values_as_tensor: Tensor | None = None,
    n_targets: int = 1,
    nodes_falsenodeids: list[int] | None = None,
    nodes_featureids: list[int] | None = None,
    nodes_hitrates: list[float] | None = None,
    nodes_hitrates_as_tensor: Tensor | None = None,
    nodes_missing_value_tracks_true: list[int] | None = None,
    nodes_modes: list[str] | None = None,
    nodes_nodeids: list[int] | None = None,
    nodes_treeids: list[int] | None = None,
    nodes_truenodeids: list[int] | None = None,
    nodes_values: list[float] | None = None,
    nodes_values_as_tensor: Tensor | None = None,
    post_transform: str = "NONE",
    target_ids: list[int] | None = None,
    target_nodeids: list[int] | None = None,
    target_treeids: list[int] | None = None,
    target_weights: list[float] | None = None,
    target_weights_as_tensor: Tensor | None = None,
) -> Tensor:
    """Return base + the aggregate of what the trees say.

    Args:
        x: [N, F] or [F].
        aggregate_function: SUM, AVERAGE, MIN, or MAX.
        base_values: [n_targets], floats; what ends in `_as_tensor` stands for the attribute without it, as doubles.
        base_values_as_tensor: see there.
        n_targets: how many values there are for each row.
        nodes_falsenodeids: for each node, the node to go on with where the comparison does not hold.
        nodes_featureids: for each node, which feature is compared.
        nodes_hitrates: not used.
        nodes_hitrates_as_tensor: not used.
        nodes_missing_value_tracks_true: for each node, whether the comparison holds for NaN.
        nodes_modes: for each node, the comparison, or LEAF.
        nodes_nodeids: for each node, its id within its tree.
        nodes_treeids: for each node, the id of its tree.
        nodes_truenodeids: for each node, the node to go on with where the comparison holds.
        nodes_values: for each node, what is compared with.
        nodes_values_as_tensor: see there.
        post_transform: of the result.
        target_ids: for each weight, its target.
        target_nodeids: for each weight, its leaf.
        target_treeids: for each weight, the tree of its leaf.
        target_weights: what the leaves say.
        target_weights_as_tensor: see there.

    Returns:
        [N, n_targets], float32.
    """
    rows = as_rows(x)
    if rows.is_meta:
        return rows.new_empty(len(rows), n_targets, dtype=torch.float32)
    trees = from_ids(
        nodes=(nodes_treeids or [], nodes_nodeids or []),
        children=(nodes_truenodeids or [], nodes_falsenodeids or []),
        votes=(target_treeids or [], target_nodeids or [], target_ids or []),
        features=nodes_featureids or [],
        modes=nodes_modes or [],
        missing=nodes_missing_value_tracks_true,
        splits=_numbers(nodes_values, nodes_values_as_tensor, rows),
        weights=_numbers(target_weights, target_weights_as_tensor, rows),
    )
    scores = trees.predict(rows, n_targets, aggregate_function)
    if base_values or base_values_as_tensor is not None:
        scores = scores + _numbers(base_values, base_values_as_tensor, scores)
    scores = scores.to(torch.float32)
    return single(scores, post_transform) if n_targets == 1 else transformed(scores, post_transform)


@operator("TreeEnsembleClassifier", domain=DOMAIN)
def tree_ensemble_classifier_1(
    x: Tensor,
    *,
    base_values: list[float] | None = None,
    base_values_as_tensor: Tensor | None = None,
    class_ids: list[int] | None = None,
    class_nodeids: list[int] | None = None,
    class_treeids: list[int] | None = None,
    class_weights: list[float] | None = None,
    class_weights_as_tensor: Tensor | None = None,
    classlabels_int64s: list[int] | None = None,
    classlabels_strings: list[str] | None = None,
    nodes_falsenodeids: list[int] | None = None,
    nodes_featureids: list[int] | None = None,
    nodes_hitrates: list[float] | None = None,
    nodes_hitrates_as_tensor: Tensor | None = None,
    nodes_missing_value_tracks_true: list[int] | None = None,
    nodes_modes: list[str] | None = None,
    nodes_nodeids: list[int] | None = None,
    nodes_treeids: list[int] | None = None,
    nodes_truenodeids: list[int] | None = None,
    nodes_values: list[float] | None = None,
    nodes_values_as_tensor: Tensor | None = None,
    post_transform: str = "NONE",
) -> tuple[Tensor | Texts, Tensor]:
    """Return the class with the largest sum of votes, and the transformed sums.

    Args:
        x: [N, F] or [F].
        base_values: [classes], added to the sums; `_as_tensor` as in `tree_ensemble_regressor_1`, like all `nodes_*`.
        base_values_as_tensor: see there.
        class_ids: for each weight, the number of its class.
        class_nodeids: for each weight, its leaf.
        class_treeids: for each weight, the tree of its leaf.
        class_weights: the votes of the leaves.
        class_weights_as_tensor: see there.
        classlabels_int64s: the classes, where they are integers.
        classlabels_strings: the classes, where they are strings.
        nodes_falsenodeids: see there.
        nodes_featureids: see there.
        nodes_hitrates: not used.
        nodes_hitrates_as_tensor: not used.
        nodes_missing_value_tracks_true: see there.
        nodes_modes: see there.
        nodes_nodeids: see there.
        nodes_treeids: see there.
        nodes_truenodeids: see there.
        nodes_values: see there.
        nodes_values_as_tensor: see there.
        post_transform: of the scores.

    Returns:
        Labels [N], and scores [N, classes] in float32.
    """
    rows = as_rows(x)
    labels = labels_of(classlabels_int64s, classlabels_strings)
    if rows.is_meta:
        return picked(labels, rows.new_empty(len(rows), dtype=torch.int64)), rows.new_empty(
            len(rows), len(labels), dtype=torch.float32
        )
    ids = class_ids or []
    trees = from_ids(
        nodes=(nodes_treeids or [], nodes_nodeids or []),
        children=(nodes_truenodeids or [], nodes_falsenodeids or []),
        votes=(class_treeids or [], class_nodeids or [], ids),
        features=nodes_featureids or [],
        modes=nodes_modes or [],
        missing=nodes_missing_value_tracks_true,
        splits=_numbers(nodes_values, nodes_values_as_tensor, rows),
        weights=_numbers(class_weights, class_weights_as_tensor, rows),
    )
    scores = trees.predict(rows, len(labels), "SUM")
    base = _numbers(base_values, base_values_as_tensor, scores)
    if len(labels) == 1 or (len(labels) == 2 and len(set(ids)) == 1):
        return _of_two(scores, base, ids[0], labels, bool((trees.weights >= 0).all()), post_transform)
    if len(base):
        scores = scores + base
    return picked(labels, scores.argmax(1)), transformed(scores.to(torch.float32), post_transform)


def _of_two(
    scores: Tensor, base: Tensor, voted: int, labels: Any, probability: bool, post_transform: str
) -> tuple[Tensor | Texts, Tensor]:
    """Label and scores where the trees vote for one class only, which the standard says nothing of: as onnxruntime.

    Args:
        scores: [N, classes], with votes in one column.
        base: [0] or [1].
        voted: the column.
        labels: one or two; with two, votes for either class are votes for the second.
        probability: whether the votes are not negative, so that they are taken for probabilities.
        post_transform: of the scores.
    """
    if len(base) > 1 or (len(base) and voted):
        raise NotImplementedError("base_values of a class for which no tree votes are not covered")
    score = scores[:, voted] + (base[0] if len(base) else 0)
    number = (score > (0.5 if probability and len(labels) == 2 else 0)).to(torch.int64)
    score = score.to(torch.float32)
    if len(labels) == 1:
        if isinstance(labels[0], str):
            raise GraphOptError(
                "expected two string labels in a binary TreeEnsembleClassifier, found one; add the other"
            )
        only = score.unsqueeze(1)
        return number, only if post_transform != "PROBIT" else transformed(only, post_transform)
    if voted:
        both = torch.stack([torch.zeros_like(score), score], 1)
        return picked(labels, number), transformed(both, post_transform)
    return picked(labels, number), binary(score, post_transform, probability=probability)


@operator("TreeEnsemble", domain=DOMAIN, since=5)
def tree_ensemble_5(
    x: Tensor,
    *,
    aggregate_function: int = 1,
    leaf_targetids: list[int],
    leaf_weights: Tensor,
    membership_values: Tensor | None = None,
    n_targets: int = 1,
    nodes_falseleafs: list[int],
    nodes_falsenodeids: list[int],
    nodes_featureids: list[int],
    nodes_hitrates: Tensor | None = None,
    nodes_missing_value_tracks_true: list[int] | None = None,
    nodes_modes: Tensor,
    nodes_splits: Tensor,
    nodes_trueleafs: list[int],
    nodes_truenodeids: list[int],
    post_transform: int = 0,
    tree_roots: list[int],
) -> Tensor:
    """Return the aggregate of what the trees say.

    Args:
        x: [N, F].
        aggregate_function: 0 average, 1 sum, 2 minimum, 3 maximum.
        leaf_targetids: for each leaf, its target.
        leaf_weights: what the leaves say.
        membership_values: the sets of the nodes of mode 6, in their order, with NaN between two.
        n_targets: how many values there are for each row.
        nodes_falseleafs: for each node, whether it goes on with a leaf where the comparison does not hold.
        nodes_falsenodeids: for each node, the number of that node, or leaf.
        nodes_featureids: for each node, which feature is compared.
        nodes_hitrates: not used.
        nodes_missing_value_tracks_true: for each node, whether the comparison holds for NaN.
        nodes_modes: for each node: <=, <, >=, >, ==, !=, or membership.
        nodes_splits: for each node, what is compared with.
        nodes_trueleafs: for each node, whether it goes on with a leaf where the comparison holds.
        nodes_truenodeids: for each node, the number of that node, or leaf.
        post_transform: 0 none, 1 softmax, 2 logistic, 3 softmax_zero, 4 probit.
        tree_roots: the nodes at which trees begin.

    Returns:
        [N, n_targets] of the type of x.
    """
    rows = as_rows(x)
    if rows.is_meta:
        return rows.new_empty(len(rows), n_targets, dtype=x.dtype)
    if aggregate_function not in range(len(_AGGREGATES)) or post_transform not in range(len(_TRANSFORMS)):
        raise GraphOptError(
            f"expected an aggregate_function up to {len(_AGGREGATES) - 1} and a post_transform up to "
            f"{len(_TRANSFORMS) - 1} for TreeEnsemble, found {aggregate_function} and {post_transform}"
        )
    count, leaves = len(nodes_featureids), len(leaf_targetids)

    def numbers(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int64, device=x.device)

    def with_leaves(values: Any, filler: float) -> Tensor:
        known = torch.as_tensor(values, device=x.device)
        return torch.cat([known, known.new_full((leaves,), filler)])

    def children(ids: list[int], are_leaves: list[int]) -> Tensor:
        limit = torch.where(numbers(are_leaves) != 0, leaves, count)
        found = numbers(ids)
        if bool(((found < 0) | (found >= limit)).any()):
            raise GraphOptError(f"expected children among {count} nodes and {leaves} leaves; the model is corrupt")
        return with_leaves(found + count * (numbers(are_leaves) != 0), 0)

    trees = Trees(
        features=with_leaves(nodes_featureids, 0),
        splits=with_leaves(nodes_splits, 0).to(rows.dtype),
        modes=with_leaves(nodes_modes.to(torch.int64), LEAF),
        yes=children(nodes_truenodeids, nodes_trueleafs),
        no=children(nodes_falsenodeids, nodes_falseleafs),
        missing=with_leaves(nodes_missing_value_tracks_true or [0] * count, 0).to(torch.bool),
        roots=numbers(tree_roots),
        voters=torch.arange(count, count + leaves, device=x.device),
        targets=numbers(leaf_targetids),
        weights=leaf_weights.to(rows),
        members=_members(nodes_modes, membership_values, rows),
    )
    scores = trees.predict(rows, n_targets, _AGGREGATES[aggregate_function])
    transform = _TRANSFORMS[post_transform]
    return (single(scores, transform) if n_targets == 1 else transformed(scores, transform)).to(x.dtype)


def _members(modes: Tensor, values: Tensor | None, rows: Tensor) -> Tensor | None:
    """The sets of the nodes that test for membership, filled up with NaN, which equals nothing: [sets, most]."""
    count = int((modes == MEMBER).sum())
    if not count:
        return None
    sets: list[list[float]] = [[]]
    for value in [] if values is None else values.tolist():
        if math.isnan(value):
            sets.append([])
        else:
            sets[-1].append(value)
    if len(sets) < count:
        raise GraphOptError(f"expected membership_values of {count} sets, found {len(sets)}; the model is corrupt")
    most = max(map(len, sets))
    return rows.new_tensor([[*members, *[math.nan] * (most - len(members))] for members in sets[:count]])
