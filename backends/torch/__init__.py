"""Back to PyTorch: a plain nn.Module, or a `.pt2` file of torch.export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphopt.errors import GraphOptError
from graphopt.frontends.sizes import export_shapes
from graphopt.graph import Graph, TorchSource
from graphopt.onnxfile.write import check_output, replacing

from .module import LoweredModule, lower

__all__ = ["LoweredModule", "TorchBackend"]

# Example sizes of dynamic dimensions: unlike each other, and not 1, which export would take for a broadcast.
_SIZES = (2, 3, 5, 7, 11, 13, 17, 19, 23)


class TorchBackend:
    """Lowers a graph to a trainable nn.Module; parameter names, call and return type are the original's."""

    name = "torch"

    def lower(self, graph: Graph, *, compile: bool = False, **options: Any) -> nn.Module:
        """The graph as an nn.Module that shares the weights.

        Args:
            graph: what to lower.
            compile: put the computation through torch.compile.
            options: for torch.compile (`backend`, `mode`, `dynamic` ...).
        """
        if options and not compile:
            raise GraphOptError(f"{', '.join(map(repr, options))} are options of torch.compile; add compile=True")
        module = lower(graph)
        if compile:
            module.compile_program(**options)
        return module

    def save(
        self,
        graph: Graph,
        path: str | Path,
        *,
        example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
        dynamic_shapes: Any = None,
    ) -> None:
        """Write a `.pt2` file for `torch.export.load`, atomically.

        Args:
            graph: what to write.
            path: where to.
            example_inputs: for tracing; None takes what the graph was made with, or zeros for an .onnx model.
            dynamic_shapes: as for `torch.export.export`; None takes those of the graph.

        Raises:
            GraphOptError: the place cannot be written, or the graph cannot be exported.
        """
        path = check_output(path)
        module = lower(graph)
        args, kwargs, shapes = _example(graph)
        if example_inputs is not None:
            by_name = isinstance(example_inputs, Mapping)
            args, kwargs = ((), dict(example_inputs)) if by_name else (tuple(example_inputs), {})
        shapes = dynamic_shapes if dynamic_shapes is not None else shapes
        try:
            program = torch.export.export(module, args, kwargs, dynamic_shapes=export_shapes(shapes), strict=False)
        except Exception as error:  # tracing may raise anything
            reason = next(iter(str(error).splitlines()), "")
            raise GraphOptError(f"torch.export could not trace the graph: {type(error).__name__}: {reason}") from error
        with replacing(path) as temporary, temporary.open("wb") as stream:
            torch.export.save(program, stream)


def _example(graph: Graph) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Arguments to trace with, and which of their sizes are dynamic."""
    if isinstance(graph.source, TorchSource):
        return graph.source.example_args, dict(graph.source.example_kwargs), graph.source.dynamic_shapes
    sizes: dict[str, int] = {}
    values, shapes = [], []
    for spec in graph.inputs:
        if spec.shape is None or not isinstance(spec.dtype, torch.dtype):
            raise GraphOptError(f"expected example_inputs, because the type or rank of input {spec} is not known")
        names = [f"{spec.name}_{i}" if size is None else size for i, size in enumerate(spec.shape)]
        for name in names:
            if isinstance(name, str):
                sizes.setdefault(name, _SIZES[len(sizes) % len(_SIZES)])
        values.append(torch.zeros([sizes[n] if isinstance(n, str) else n for n in names], dtype=spec.dtype))
        shapes.append({i: torch.export.Dim.AUTO for i, name in enumerate(names) if isinstance(name, str)})
    return tuple(values), {}, dict(zip((str(n.target) for n in graph.placeholders), shapes, strict=True))
