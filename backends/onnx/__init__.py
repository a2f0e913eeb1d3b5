"""The `onnx` target: standard ONNX, loads in every runtime; new operators become model-local functions."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import onnx

from graphopt.backends.onnx.emit import to_proto
from graphopt.graph import Graph
from graphopt.onnxfile import write

# These modules enter their lowerings into the table when they are imported.
_LOWERINGS = (
    "block_attention",
    "group_rational",
    "hedgehog_map",
    "kernel_attention",
    "landmark_attention",
    "linear_attention",
    "norm_functions",
    "rows",
    "softmax_functions",
    "softplus_attention",
    "stablemax",
    "torch_functions",
    "window_attention",
    "windowed_linear_attention",
)
for _name in _LOWERINGS:
    importlib.import_module(f"graphopt.backends.onnx.{_name}")


class OnnxBackend:
    """Lowers a graph to an ONNX model."""

    name = "onnx"

    def lower(self, graph: Graph) -> onnx.ModelProto:
        """The model as a protobuf; external weights stay where they are."""
        if graph.onnx is not None:
            return to_proto(graph, self.name)
        from graphopt.backends.onnx.export import export

        return export(graph, self.name)

    def save(self, graph: Graph, path: Path, *, external: bool | None = None, **options: Any) -> None:
        """Write the model atomically.

        Args:
            graph: what to save.
            path: where to.
            external: weights into `<path>.data`; None means above 1.5 GB only.
            options: none.
        """
        folder = graph.onnx.folder if graph.onnx is not None else None
        write(self.lower(graph), path, folder=folder, external=external)


__all__ = ["OnnxBackend", "to_proto"]
