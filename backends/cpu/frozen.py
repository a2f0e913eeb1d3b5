"""Linear layers with a rational function behind them for inference: the weight in the layout that its product wants."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graphopt.graph import Graph, fresh_attribute
from graphopt.ops import linear_rational

from .register import fits_linear

_OPERATOR = torch.ops.graphopt.linear_rational.default


class FrozenLinearRational(nn.Module):
    """`linear_rational`, with a packed copy of the weight that it has seen last.

    Packing takes longer than the product of a few rows. A weight that was changed in place, or moved, is packed anew,
    save where that was done behind torch's back (`weight.data.mul_(2)`). Where gradients are wanted, and for types and
    sizes that the CPU kernels leave alone, the operator itself runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self._packed: torch.Tensor | None = None
        self._seen: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenLinearRational:
        return FrozenLinearRational()  # a packed tensor cannot be copied; it is made again

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None, "_seen": ()}

    def forward(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        numerator: torch.Tensor,
        denominator: torch.Tensor,
        form: str = "abs_sum",
        split: bool = False,
    ) -> torch.Tensor:
        """See `graphopt.ops.linear_rational`."""
        trained = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, weight, bias, numerator, denominator)
        )
        packed = None if trained or x.device.type != "cpu" else self._weight(x, weight)
        if packed is None:
            y: torch.Tensor = linear_rational(x, weight, bias, numerator, denominator, form, split)
            return y
        from .launch_rational import fill, onednn

        linear = onednn()
        assert linear is not None, "a weight is packed only for that product"
        given = None if bias is None else bias.detach()
        z = linear(x.detach().reshape(-1, x.shape[-1]), packed, given, "none", [], "")
        fill(z, z, numerator, denominator, form, split)
        return z.view(*x.shape[:-1], len(weight))

    def _weight(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
        """The packed weight, or None where the product does not take it."""
        from .launch_rational import onednn

        if x.dtype != torch.float32 or not fits_linear(x, weight) or onednn() is None:
            return None
        now = (weight.data_ptr(), weight._version, weight.shape, weight.stride())
        if now != self._seen:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
            self._seen = now
        return self._packed


def freeze(graph: Graph) -> Graph:
    """A copy in which each `linear_rational` keeps its weight packed; `graphopt.backends.torch.fusion` makes these.

    Args:
        graph: after fusing.
    """
    frozen = graph.copy()
    for node in list(frozen.nodes):
        if node.target is not _OPERATOR:
            continue
        target = fresh_attribute(frozen.module, "graphopt.frozen.linear_rational")
        frozen.module.add_submodule(target, FrozenLinearRational())
        with frozen.fx.inserting_before(node):
            new = frozen.fx.call_module(target, node.args, dict(node.kwargs))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        frozen.fx.erase_node(node)
    frozen.lint()
    frozen.module.recompile()
    return frozen
