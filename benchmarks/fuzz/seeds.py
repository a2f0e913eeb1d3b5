"""What fuzzing starts from: the smallest models of onnx's own suite, several of each operator."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import onnx
import onnx.parser

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
    models = [(case.name, case.model) for case in cases if case.model is not None]
    for size, name, model in sorted((model.ByteSize(), name, model) for name, model in models):
        operators = _operators(model)
        if size <= largest and counts[operators] < of_each:
            counts[operators] += 1
            found[name] = model.SerializeToString()
    return found


def regressions() -> dict[str, bytes]:
    """The finds of earlier campaigns, which the test suite keeps as text."""
    folder = Path(__file__).parents[2] / "tests" / "safety" / "regressions"
    return {p.stem: onnx.parser.parse_model(p.read_text()).SerializeToString() for p in folder.glob("*.onnxtxt")}


def _operators(model: onnx.ModelProto) -> tuple[str, ...]:
    return tuple(sorted({node.op_type for node in model.graph.node}))
