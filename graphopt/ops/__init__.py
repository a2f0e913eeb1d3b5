"""New operators: one file each with schema, plain-torch reference, fake tensors and gradients.

The reference is the specification; backends register kernels and ONNX translations for the same names.
"""

from graphopt.ops.hedgehog_map import hedgehog_map
from graphopt.ops.linear_attention import linear_attention

__all__ = ["hedgehog_map", "linear_attention"]
