"""Exact clean-up: algebraic identities, constant folding, common subexpressions, dead nodes."""

from .cleanup import Cleanup

__all__ = ["Cleanup"]
