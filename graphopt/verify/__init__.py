"""Measuring what a rewrite did to the numbers."""

from graphopt.verify.compare import compare

__all__ = ["compare"]
