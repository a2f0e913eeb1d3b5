"""New operators: one file each with schema, plain-torch reference, fake tensors and gradients.

The reference is the specification; backends register kernels and ONNX translations for the same names.
"""

from graphopt.ops.block_attention import block_attention
from graphopt.ops.group_rational import group_rational
from graphopt.ops.hedgehog_map import hedgehog_map
from graphopt.ops.kernel_attention import kernel_attention
from graphopt.ops.landmark_attention import landmark_attention
from graphopt.ops.last_rows import last_rows
from graphopt.ops.linear_attention import linear_attention
from graphopt.ops.linear_rational import linear_rational
from graphopt.ops.online_softmax import online_softmax
from graphopt.ops.softplus_attention import softplus_attention
from graphopt.ops.stablemax import stablemax
from graphopt.ops.two_pass_softmax import two_pass_softmax
from graphopt.ops.unified_max_softmax import unified_max_softmax
from graphopt.ops.window_attention import window_attention
from graphopt.ops.windowed_linear_attention import windowed_linear_attention

__all__ = [
    "block_attention",
    "group_rational",
    "hedgehog_map",
    "kernel_attention",
    "landmark_attention",
    "last_rows",
    "linear_attention",
    "linear_rational",
    "online_softmax",
    "softplus_attention",
    "stablemax",
    "two_pass_softmax",
    "unified_max_softmax",
    "window_attention",
    "windowed_linear_attention",
]
