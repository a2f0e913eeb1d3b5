"""All attacks by name."""

from . import attack_files, attack_graphs, attack_sizes, attack_tensors
from .registry import ATTACKS

__all__ = ["ATTACKS", "attack_files", "attack_graphs", "attack_sizes", "attack_tensors"]
