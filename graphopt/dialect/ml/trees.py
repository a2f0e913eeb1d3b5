"""Decision trees as tensors: all rows go through all trees at once, one level at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import GraphOptError

__all__ = ["LEAF", "MEMBER", "MODES", "Trees", "from_ids"]

MODES = {
    "BRANCH_LEQ": 0,
    "BRANCH_LT": 1,
    "BRANCH_GTE": 2,
    "BRANCH_GT": 3,
    "BRANCH_EQ": 4,
    "BRANCH_NEQ": 5,
    "LEAF": 7,
}
MEMBER, LEAF = 6, MODES["LEAF"]
_TESTS = {0: torch.le, 1: torch.lt, 2: torch.ge, 3: torch.gt, 4: torch.eq, 5: torch.ne}
_REDUCTIONS = {"SUM": "sum", "AVERAGE": "sum", "MIN": "amin", "MAX": "amax"}
_DEEPEST = 4096
# Pairs of a row and a tree that are looked at together: bounds the memory, not the result.
_BLOCK = 1 << 21


@dataclass(frozen=True)
class Trees:
    """Nodes of all trees, numbered through; the leaves' votes are ordered by leaf."""

    features: Tensor
    """[nodes], which feature a node looks at."""
    splits: Tensor
    """[nodes], what it compares with."""
    modes: Tensor
    """[nodes], how."""
    yes: Tensor
    """[nodes], where it goes on if the comparison holds."""
    no: Tensor
    """[nodes], where it goes on otherwise."""
    missing: Tensor
    """[nodes], whether NaN counts as if the comparison held."""
    roots: Tensor
    """[trees]"""
    voters: Tensor
    """[votes], ascending: the leaf."""
    targets: Tensor
    """[votes], which target the vote is for."""
    weights: Tensor
    """[votes]"""
    members: Tensor | None = None
    """[sets, most], filled up with NaN: the sets of the nodes that test for membership, in their order."""

    def predict(self, x: Tensor, targets: int, aggregate: str) -> Tensor:
        """Aggregate the votes of the leaves that each row reaches.

        Args:
            x: [N, F].
            targets: K, how many targets there are.
            aggregate: SUM, AVERAGE over the trees, MIN, or MAX.

        Returns:
            [N, K], zero for a target without votes.
        """
        if aggregate not in _REDUCTIONS:
            raise GraphOptError(f"expected an aggregate_function of SUM, AVERAGE, MIN, or MAX, found {aggregate!r}")
        _check_range(self.features, x.shape[1], "features")
        _check_range(self.targets, targets, "targets")
        size = max(1, _BLOCK // max(1, len(self.roots)))
        parts = [self._sums(self._leaves(rows), targets, aggregate) for rows in x.split(size)]
        total = torch.cat(parts)
        return total / len(self.roots) if aggregate == "AVERAGE" else total

    def _leaves(self, x: Tensor) -> Tensor:
        """The leaf that each row reaches in each tree: [N, trees]."""
        node = self.roots.expand(len(x), -1)
        present = [mode for mode in self.modes.unique().tolist() if mode in _TESTS]
        set_of = (self.modes == MEMBER).cumsum(0) - 1
        for _ in range(_DEEPEST):
            mode = self.modes[node]
            if bool((mode == LEAF).all()):
                return node
            value = x.gather(1, self.features[node])
            split = self.splits[node]
            holds = value.isnan() & self.missing[node]
            for kind in present:
                holds |= (mode == kind) & _TESTS[kind](value, split)
            if self.members is not None:
                asked = mode == MEMBER
                found = (self.members[set_of[node[asked]]] == value[asked].unsqueeze(1)).any(1)
                holds = holds.masked_scatter(asked, holds[asked] | found)
            following = torch.where(holds, self.yes[node], self.no[node])
            node = torch.where(mode == LEAF, node, following)
        raise GraphOptError(
            f"expected trees of less than {_DEEPEST} levels, found more, or a cycle; the model is corrupt"
        )

    def _sums(self, leaves: Tensor, targets: int, aggregate: str) -> Tensor:
        """Add up the votes of the leaves [N, trees]: [N, targets]."""
        flat = leaves.flatten().contiguous()
        first = torch.searchsorted(self.voters, flat)
        count = torch.searchsorted(self.voters, flat, right=True) - first
        row = torch.arange(len(leaves), device=leaves.device).repeat_interleave(leaves.shape[1])
        # The votes of one leaf after those of the other: the position among all minus where the leaf's begin.
        begin = (count.cumsum(0) - count).repeat_interleave(count)
        vote = first.repeat_interleave(count) + torch.arange(len(begin), device=leaves.device) - begin
        cell = row.repeat_interleave(count) * targets + self.targets[vote]
        empty = self.weights.new_zeros(len(leaves) * targets)
        kind = _REDUCTIONS[aggregate]
        result = empty.scatter_reduce(0, cell, self.weights[vote], kind, include_self=kind == "sum")
        return result.reshape(-1, targets)


def _check_range(indices: Tensor, size: int, name: str) -> None:
    outside = indices[(indices < 0) | (indices >= size)]
    if len(outside):
        raise GraphOptError(f"expected trees of {size} {name}, found number {int(outside[0])}; the model is corrupt")


def from_ids(
    *,
    nodes: Sequence[Sequence[int]],
    children: Sequence[Sequence[int]],
    votes: Sequence[Sequence[int]],
    features: Sequence[int],
    modes: Sequence[str],
    missing: Sequence[int] | None,
    splits: Tensor,
    weights: Tensor,
) -> Trees:
    """Build trees whose nodes are named by a tree and a number within it.

    Args:
        nodes: the tree ids and the node ids of all nodes.
        children: the ids of the nodes to go on with, for yes and for no.
        votes: tree ids, node ids, and targets of all votes.
        features: as in `Trees`.
        modes: names in `MODES`.
        missing: as in `Trees`.
        splits: as in `Trees`.
        weights: of the votes.
    """
    device = splits.device
    trees, names, yes, no = (_integers(ids, device) for ids in (*nodes, *children))
    vote_trees, vote_nodes, targets = (_integers(ids, device) for ids in votes)
    unknown = set(modes) - set(MODES)
    if unknown:
        raise GraphOptError(f"expected modes of {', '.join(MODES)} in a tree, found {sorted(unknown)[0]!r}")
    kinds = _integers([MODES[mode] for mode in modes], device)
    sizes = {len(part) for part in (trees, names, yes, no, kinds, splits, features, missing or features)}
    if len(sizes) > 1 or not len(vote_trees) == len(vote_nodes) == len(targets) == len(weights):
        raise GraphOptError("expected attributes of one length for all nodes, and for all votes, of a tree ensemble")
    found = _Numbers(trees, names)
    leaf = kinds == LEAF
    numbers = torch.arange(len(trees), device=device)
    voters = found(vote_trees, vote_nodes)
    voters, order = voters.sort(stable=True)
    return Trees(
        features=_integers(features, device),
        splits=splits,
        modes=kinds,
        yes=torch.where(leaf, numbers, found(trees, torch.where(leaf, names, yes))),
        no=torch.where(leaf, numbers, found(trees, torch.where(leaf, names, no))),
        missing=_integers(missing or [0] * len(trees), device) != 0,
        roots=_integers(np.sort(np.unique(trees.cpu(), return_index=True)[1]), device),
        voters=voters,
        targets=targets[order],
        weights=weights[order],
    )


def _integers(values: Sequence[int] | np.ndarray[Any, Any], device: torch.device) -> Tensor:
    # By way of numpy, which reads long lists several times faster than torch.
    return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(device)


class _Numbers:
    """Finds the number of a node from its names."""

    def __init__(self, trees: Tensor, nodes: Tensor) -> None:
        self._stride = int(nodes.max()) + 1 if len(nodes) else 1
        self._keys, self._order = (trees * self._stride + nodes).sort()

    def __call__(self, trees: Tensor, nodes: Tensor) -> Tensor:
        """Return the numbers.

        Raises:
            GraphOptError: there is no such node.
        """
        wanted = trees * self._stride + nodes
        place = torch.searchsorted(self._keys, wanted).clamp(max=len(self._keys) - 1)
        lost = (self._keys[place] != wanted) | (nodes < 0) | (nodes >= self._stride)
        if bool(lost.any()):
            tree, node = trees[lost][0].item(), nodes[lost][0].item()
            raise GraphOptError(f"expected a node {node} in tree {tree}, found none; the model is corrupt")
        return self._order[place]
