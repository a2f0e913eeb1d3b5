"""Finished rows on disk, so that an interrupted ablation goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import GraphOptError
from graphopt.graph import Graph
from graphopt.onnxfile.write import check_output, replacing
from graphopt.subgraphs import walk

_SCHEMA = "graphopt.ablation-row/1"
_FOLDER = "rows"


class Store:
    """One JSON file per row, each with the fingerprint of all that its numbers depend on.

    Args:
        folder: None keeps nothing.

    Raises:
        GraphOptError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else folder / _FOLDER
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GraphOptError(
                f"expected a folder for the rows, but {self._folder} cannot be made ({error.strerror}); choose another"
            ) from error
        check_output(self._folder / "row.json")

    def load(self, key: str, fingerprint: str) -> Any:
        """The stored row; None where there is none, or one of other inputs."""
        if self._folder is None:
            return None
        try:
            content = json.loads((self._folder / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):  # what cannot be read is computed anew
            return None
        if not isinstance(content, dict) or content.get("schema") != _SCHEMA:
            return None
        return content.get("row") if content.get("fingerprint") == fingerprint else None

    def save(self, key: str, fingerprint: str, row: Mapping[str, Any]) -> None:
        """Store a finished row; it is there as a whole or not at all.

        Raises:
            GraphOptError: it cannot be written.
        """
        if self._folder is None:
            return
        content = {"schema": _SCHEMA, "fingerprint": fingerprint, "row": row}
        with replacing(self._folder / f"{key}.json") as temporary:
            temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def fingerprint(parts: Mapping[str, Any]) -> str:
    """A hash of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def graph_digest(graph: Graph) -> str:
    """A hash of what a graph computes: its file, its nodes, and the bytes of its weights."""
    found = hashlib.sha256()
    if graph.onnx is not None:
        found.update(graph.onnx.proto.SerializeToString(deterministic=True))
    for level in walk(graph):
        found.update("\n".join(map(str, (*level.inputs, *level.outputs))).encode())
        for node in level.nodes:
            found.update((node.format_node() or str(node.args)).encode())
            if node.op == "get_attr":
                _add(found, level.weight(node))
    return found.hexdigest()


def values_digest(batches: Iterable[Iterable[Any]]) -> str:
    """A hash of calibration batches."""
    found = hashlib.sha256()
    for batch in batches:
        for value in batch:
            _add(found, value)
    return found.hexdigest()


def _add(found: Any, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        found.update(repr(value).encode())
        return
    found.update(f"{value.dtype}{list(value.shape)}".encode())
    found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
