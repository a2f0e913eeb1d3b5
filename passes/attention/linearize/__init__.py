"""Attention whose cost grows with the length, not with its square."""

from graphopt.passes.attention.linearize.linearize import Linearize

__all__ = ["Linearize"]
