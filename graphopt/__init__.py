"""graphopt: rewrite trained neural networks, with proof of what it did to the numbers."""

from graphopt.api import load, transform, verify
from graphopt.errors import CheckFailed, GraphOptError, NothingToRewrite
from graphopt.graph import Graph

__all__ = ["CheckFailed", "Graph", "GraphOptError", "NothingToRewrite", "load", "transform", "verify"]
