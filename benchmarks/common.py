"""Storing and showing results."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from graphopt.rewrite.report import environment

RESULTS = Path(__file__).parent / "results"
PEERS = ("onnxscript", "onnxslim", "transformers")
SAMPLES = Path(__file__).resolve().parents[1] / "samples"
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
"""Real models and texts; benchmarks that need them say so where they are absent."""


def tiny_decoder(name: str) -> Any:
    """A module of samples/tiny_decoder."""
    if str(SAMPLES) not in sys.path:
        sys.path.append(str(SAMPLES))
    return importlib.import_module(f"tiny_decoder.{name}")


def store(name: str, result: dict[str, Any]) -> Path:
    """Write `results/<name>.json` with the versions that the figures depend on."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    versions = environment(("graphopt", "torch", "onnx", "onnx-ir", "onnxruntime", *PEERS))
    path.write_text(json.dumps({"benchmark": name, "environment": versions, **result}, indent=1) + "\n")
    return path


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row))
    Console().print(table)
