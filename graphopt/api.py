"""The Python way in: load, transform, verify."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import GraphOptError
from graphopt.frontends.onnx import load_onnx
from graphopt.graph import Graph


def load(
    source: str | Path | torch.nn.Module | torch.export.ExportedProgram,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Graph:
    """Make a Graph of a model.

    Args:
        source: a path to an .onnx file, an nn.Module, or an ExportedProgram.
        example_inputs: for an nn.Module: positional arguments as a tuple, or keyword arguments as a dict.
        dynamic_shapes: for an nn.Module: as for `torch.export.export`; None keeps every size as in the example.

    Raises:
        GraphOptError: the source cannot be read or exported.
    """
    if isinstance(source, (str, Path)):
        return load_onnx(source)
    if isinstance(source, (torch.nn.Module, torch.export.ExportedProgram)):
        from graphopt.frontends.torch import load_torch

        return load_torch(source, example_inputs, dynamic_shapes)
    raise GraphOptError(f"expected a path, an nn.Module or an ExportedProgram, got {type(source).__name__}")


def transform(
    module: torch.nn.Module,
    passes: str | Sequence[Any],
    *,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    dynamic_shapes: Any = None,
    calibration: Any = None,
    seed: int = 0,
    **options: Any,
) -> torch.nn.Module:
    """Rewrite an nn.Module: modules in and out, with the same parameter names where nothing changed.

    What was not rewritten shares its weights with `module`: give a deep copy to train the two apart.

    Raises:
        GraphOptError: the module cannot be exported, or a pass or option is unknown.
        CheckFailed: a verification missed its tolerance.
    """
    graph = load(module, example_inputs, dynamic_shapes)
    result = graph.apply(passes, calibration=calibration, seed=seed, **options)
    return result.graph.to_module()


def verify(a: Any, b: Any, inputs: Any, *, rtol: float | None = None, atol: float | None = None) -> Any:
    """Compare two models on the same inputs; see `graphopt.verification.compare`."""
    from graphopt.verification.compare import compare

    first, second = (x if isinstance(x, Graph) else load(x) for x in (a, b))
    return compare(first, second, inputs, rtol=rtol, atol=atol)
