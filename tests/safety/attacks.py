"""All attacks by name: importing their modules registers them."""

from . import attack_files, attack_functions, attack_graphs, attack_names, attack_sizes, attack_tensors
from .registry import ATTACKS

MODULES = (attack_files, attack_functions, attack_graphs, attack_names, attack_sizes, attack_tensors)

__all__ = ["ATTACKS", "MODULES"]
