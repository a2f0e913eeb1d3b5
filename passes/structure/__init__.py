"""Rewrites of how a model is put together, not of what it computes."""

from .inline import Inline

__all__ = ["Inline"]
