"""The `triton` target: the torch target, with kernels for operators of `graphopt.ops` on NVIDIA and AMD GPUs."""

from __future__ import annotations

from typing import Any

from torch import nn

from graphopt.backends.torch import TorchBackend
from graphopt.backends.torch.fusion import fuse_linear_rational
from graphopt.errors import GraphOptError
from graphopt.graph import Graph

__all__ = ["TritonBackend"]


class TritonBackend(TorchBackend):
    """Lowers a graph to an nn.Module; on CUDA and HIP devices operators of `graphopt.ops` run on Triton kernels."""

    name = "triton"

    def lower(self, graph: Graph, *, compile: bool = False, **options: Any) -> nn.Module:
        """As the torch target; from then on the kernels serve every module of this process.

        Args:
            graph: what to lower.
            compile: put the computation through torch.compile.
            options: for torch.compile.

        Raises:
            GraphOptError: triton is not installed.
        """
        enable()
        return super().lower(fuse_linear_rational(graph), compile=compile, **options)


def enable(device: str = "cuda") -> None:
    """Let the kernels compute those operators that have one on this type of device: see `register.py`.

    Raises:
        GraphOptError: triton is not installed.
    """
    try:
        from graphopt.backends.triton.register import register
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise GraphOptError("the target 'triton' needs triton: pip install 'graphopt[triton]'") from error
    register(device)
