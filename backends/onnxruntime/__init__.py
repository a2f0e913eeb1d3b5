"""The `onnxruntime` target: as `onnx`, with contrib operators where they have kernels, and sessions to run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from graphopt.backends.onnx import OnnxBackend
from graphopt.backends.onnxruntime import linear_attention as _linear_attention
from graphopt.backends.onnxruntime.session import Session
from graphopt.graph import Graph

_ = _linear_attention  # enters its lowerings into the table


class OnnxRuntimeBackend(OnnxBackend):
    """Lowers a graph for onnxruntime and runs it there."""

    name = "onnxruntime"

    def session(self, graph: Graph, *, providers: tuple[str, ...] = ("cpu",), threads: int | None = None) -> Session:
        """A running session of the graph."""
        folder = graph.onnx.folder if graph.onnx is not None else None
        return Session.of(self.lower(graph), folder=folder, providers=providers, threads=threads)

    def run(self, graph: Graph, feeds: Mapping[str, np.ndarray[Any, Any]], **options: Any) -> dict[str, Any]:
        """Lower, load and run once."""
        return self.session(graph, **options).run(feeds)


__all__ = ["OnnxRuntimeBackend", "Session"]
