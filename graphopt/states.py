"""Values for the inputs that a pass has added to a decoder: states begin at zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.graph import Graph, ValueSpec


def completed(graph: Graph, inputs: Sequence[ValueSpec], values: Sequence[Any]) -> tuple[Any, ...]:
    """Values for `graph` from values for the model that it was made from.

    Args:
        graph: what is to run.
        inputs: of that other model; those that `graph` lacks are left away.
        values: one for each of `inputs`.

    Returns:
        One for each input of `graph`; states that there is no value for are zero.
    """
    known = {spec.name: value for spec, value in zip(inputs, values, strict=True)}
    sums = {state.past for state in graph.states if state.kind == "sum"}
    batch = _batch(inputs, values)
    return tuple(
        zeros(spec, batch) if spec.name in sums and spec.name not in known else known[spec.name]
        for spec in graph.inputs
    )


def zeros(spec: ValueSpec, batch: int) -> torch.Tensor:
    """A state before the first token; its first size is the batch, all others are static."""
    assert spec.shape is not None
    assert isinstance(spec.dtype, torch.dtype)
    sizes = [d if isinstance(d, int) else batch for d in spec.shape]
    return torch.zeros(sizes, dtype=spec.dtype)


def _batch(inputs: Sequence[ValueSpec], values: Sequence[Any]) -> int:
    """Size of the first axis of the first input that has one."""
    tensors = [v for v in values if isinstance(v, torch.Tensor) and v.dim() > 1]
    return int(tensors[0].shape[0]) if tensors else 1
