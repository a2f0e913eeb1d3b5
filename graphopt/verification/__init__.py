"""Measuring what a rewrite did to the numbers."""

from graphopt.verification.compare import compare

__all__ = ["compare"]
