"""The `cpu` target: the torch target, with kernels for softmax and rational operators that numba compiles when called.

The kernels need not be asked for: the first call of such an operator on the CPU finds this backend by its name.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from graphopt.backends.torch import TorchBackend
from graphopt.backends.torch.fusion import fuse_linear_rational
from graphopt.errors import GraphOptError
from graphopt.graph import Graph

from .frozen import freeze

__all__ = ["CpuBackend"]


class CpuBackend(TorchBackend):
    """Lowers a graph to an nn.Module; on the CPU its softmax and rational operators run on kernels, given numba."""

    name = "cpu"

    def lower(self, graph: Graph, *, compile: bool = False, frozen: bool = False, **options: Any) -> nn.Module:
        """As the torch target, with each linear layer and the rational function behind it as one operator.

        Args:
            graph: what to lower.
            compile: put the computation through torch.compile.
            frozen: for inference: the weights of these layers are kept packed too, which takes their size in memory
                once more, and is faster for few rows.
            options: for torch.compile.

        Raises:
            GraphOptError: `compile` and `frozen` at once.
        """
        if compile and frozen:
            raise GraphOptError("expected compile or frozen, got both; torch.compile packs weights itself")
        self.enable()
        fused = fuse_linear_rational(graph)
        return super().lower(freeze(fused) if frozen else fused, compile=compile, **options)

    @staticmethod
    def enable() -> None:
        """Let the kernels compute these operators on the CPU; numba is imported when the first of them runs."""
        from .register import register

        register()
