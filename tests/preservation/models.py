"""The table of models that hold what tools lose."""

from . import odd_bodies, odd_descriptions, odd_functions, odd_interfaces, odd_names, odd_tensors
from .odd import build

__all__ = ["MODELS"]

# Importing the modules entered their models.
_ = (odd_bodies, odd_descriptions, odd_functions, odd_interfaces, odd_names, odd_tensors)
MODELS = build()
