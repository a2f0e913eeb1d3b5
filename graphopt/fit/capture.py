"""Recording the values at sites while the model runs on calibration data; bounded memory, spills to disk."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from graphopt.execute import execute
from graphopt.graph import Graph
from graphopt.rewrite.context import Context
from graphopt.sites import Site

# Beyond this, batches are kept in a temporary folder and mapped back when they are used.
MEMORY_LIMIT = 2_000_000_000


class Capture:
    """The values of chosen nodes, one dict per calibration batch."""

    def __init__(self, graph: Graph, nodes: Sequence[fx.Node], context: Context, limit: int = MEMORY_LIMIT) -> None:
        """Run the model on every calibration batch.

        Args:
            graph: the model.
            nodes: whose values to keep.
            context: gives the data and the progress bar.
            limit: bytes to keep in memory.
        """
        self._wanted = set(nodes)
        self._batches: list[dict[str, Any] | Path] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._free = limit
        batches = context.track(context.calibration, len(context.calibration), "Recording sites")
        for values in batches:
            self._add(self._record(graph, values))

    def _record(self, graph: Graph, values: Sequence[Any]) -> dict[str, Any]:
        kept: dict[str, Any] = {}

        def observe(node: fx.Node, value: Any) -> None:
            if node in self._wanted:
                kept[node.name] = value

        with torch.no_grad():
            execute(graph, values, observe)
        return kept

    def _add(self, kept: dict[str, Any]) -> None:
        size = sum(t.numel() * t.element_size() for t in kept.values() if isinstance(t, torch.Tensor))
        if size <= self._free:
            self._free -= size
            self._batches.append(kept)
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="graphopt-capture-")
        path = Path(self._folder.name) / f"{len(self._batches)}.pt"
        torch.save({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kept.items()}, path)
        self._batches.append(path)

    def __len__(self) -> int:
        return len(self._batches)

    def batch(self, index: int) -> dict[str, Any]:
        """The recorded values of one batch, by fx node name."""
        stored = self._batches[index]
        if isinstance(stored, Path):
            loaded: dict[str, Any] = torch.load(stored, mmap=True, weights_only=True)
            return loaded
        return stored


class Record:
    """What a `Capture` holds of one site."""

    def __init__(self, capture: Capture, site: Site) -> None:
        """Args: capture: all sites' values. site: the one to look at."""
        self._capture = capture
        self._inputs = [n.name for n in site.inputs]
        self._output = site.output.name

    def __len__(self) -> int:
        return len(self._capture)

    def inputs(self, index: int) -> tuple[Any, ...]:
        """Values of `site.inputs` on one batch."""
        values = self._capture.batch(index)
        return tuple(values[name] for name in self._inputs)

    def output(self, index: int) -> Any:
        """Value of `site.output` on one batch."""
        return self._capture.batch(index)[self._output]


def record(graph: Graph, sites: Sequence[Site], context: Context) -> list[Record]:
    """Run the calibration data once and keep what enters and leaves each site."""
    nodes = {node for site in sites for node in (*site.inputs, site.output)}
    capture = Capture(graph, tuple(nodes), context)
    return [Record(capture, site) for site in sites]
