"""What fuzzing starts from: the smallest models of onnx's own suite, several of each operator."""

from __future__ import annotations

import warnings
from collections import Counter

import onnx

_LARGEST = 1000
_OF_EACH = 6


def seeds(largest: int = _LARGEST, of_each: int = _OF_EACH) -> dict[str, bytes]:
    """Serialised models by name.

    Args:
        largest: in bytes.
        of_each: how many models of the same operators.
    """
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some cases overflow on purpose
        cases = collect_testcases(None)
    found: dict[str, bytes] = {}
    counts: Counter[tuple[str, ...]] = Counter()
    for size, name, model in sorted((case.model.ByteSize(), case.name, case.model) for case in cases):
        operators = _operators(model)
        if size <= largest and counts[operators] < of_each:
            counts[operators] += 1
            found[name] = model.SerializeToString()
    return found


def _operators(model: onnx.ModelProto) -> tuple[str, ...]:
    return tuple(sorted({node.op_type for node in model.graph.node}))
