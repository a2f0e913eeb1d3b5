"""New operators: one file each with schema, plain-torch reference, fake tensors and gradients.

The reference is the specification; backends register kernels and ONNX translations for the same names.
"""

from graphopt.ops.block_attention import block_attention
from graphopt.ops.hedgehog_map import hedgehog_map
from graphopt.ops.kernel_attention import kernel_attention
from graphopt.ops.landmark_attention import landmark_attention
from graphopt.ops.last_rows import last_rows
from graphopt.ops.linear_attention import linear_attention
from graphopt.ops.window_attention import window_attention
from graphopt.ops.windowed_linear_attention import windowed_linear_attention

__all__ = [
    "block_attention",
    "hedgehog_map",
    "kernel_attention",
    "landmark_attention",
    "last_rows",
    "linear_attention",
    "window_attention",
    "windowed_linear_attention",
]
