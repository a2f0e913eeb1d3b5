"""graphopt: rewrite trained neural networks, with proof of what it did to the numbers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.api import load, transform, verify
    from graphopt.decoders.generate import generate
    from graphopt.errors import CheckFailed, GraphOptError, NothingToRewrite
    from graphopt.graph import Graph

__all__ = ["CheckFailed", "Graph", "GraphOptError", "NothingToRewrite", "generate", "load", "transform", "verify"]

_HOMES = {
    "CheckFailed": "graphopt.errors",
    "Graph": "graphopt.graph",
    "GraphOptError": "graphopt.errors",
    "NothingToRewrite": "graphopt.errors",
    "generate": "graphopt.decoders.generate",
    "load": "graphopt.api",
    "transform": "graphopt.api",
    "verify": "graphopt.api",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes a second, and `graphopt --help` does not need it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
