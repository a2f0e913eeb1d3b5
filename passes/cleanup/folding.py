"""Constant folding: which operators may be evaluated ahead of time, and the evaluation.

By default only operators whose result every runtime computes to the same bit are folded: those that move
elements, compare, compute on integers, and the operations that IEEE 754 rounds correctly (+ - * /). On 100,000
random floats torch and onnxruntime agree on all of these, and differ in the last bit of 17 % of square roots.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphopt.dialect.dtypes import dtype_of
from graphopt.graph import attribute

from .dims import product, static
from .operators import operation, pure, words

if TYPE_CHECKING:
    from .facts import Fact, Facts, View

_MOVES = words(
    "Identity Reshape Flatten Transpose Squeeze Unsqueeze Concat Split Slice Gather GatherElements "
    "GatherND Expand Tile Pad ConstantOfShape EyeLike Trilu DepthToSpace SpaceToDepth Where OneHot "
    "Compress NonZero Shape Size Constant ReverseSequence Equal Greater Less GreaterOrEqual LessOrEqual "
    "And Or Not Xor BitwiseAnd BitwiseOr BitwiseXor BitwiseNot BitShift IsNaN IsInf Neg Abs Floor Ceil "
    "Round"
)
_ROUNDED = words("Add Sub Mul Div")
_INTEGER = words(
    "Add Sub Mul Div Mod Min Max Clip Sum Range ReduceSum ReduceProd ReduceMax ReduceMin CumSum Sign "
    "ScatterND ScatterElements"
)
# Folding these would undo the quantisation of a model: its small weights would be stored as floats.
_NEVER = words("QuantizeLinear DequantizeLinear DynamicQuantizeLinear Dropout")
# These spell a large tensor in a few bytes; written out they would only make the file larger.
GENERATORS = words("ConstantOfShape Expand Tile Range EyeLike OneHot")
_SPELLED_OUT = 4096

_ATEN = words(
    "arange.default arange.start arange.start_step full.default zeros.default ones.default "
    "scalar_tensor.default lift_fresh_copy.default view.default reshape.default permute.default "
    "transpose.int unsqueeze.default squeeze.dim expand.default slice.Tensor select.int cat.default "
    "eq.Scalar eq.Tensor ne.Scalar lt.Scalar lt.Tensor le.Scalar le.Tensor gt.Scalar gt.Tensor ge.Scalar "
    "ge.Tensor logical_and.default logical_or.default logical_not.default bitwise_and.Tensor "
    "bitwise_or.Tensor bitwise_not.default triu.default tril.default"
)


class Folder:
    """Evaluates nodes whose operands are all constant, within limits."""

    def __init__(self, limit: int, inexact: bool) -> None:
        """Args: limit: in bytes, per tensor. inexact: fold what runtimes may round differently, too."""
        self.limit = limit
        self.inexact = inexact
        self.refusals: dict[fx.Node, str] = {}

    def evaluate(self, view: View, fact: Fact) -> torch.Tensor | None:
        """The value of a call of a dialect function, if its operands are constant and it may be folded."""
        operands = [view.argument(i).value for i in range(len(view.node.args)) if view.has(i)]
        if any(v is None for v in operands) or view.name in _NEVER or operation(view.node) != view.name:
            return None
        if not pure(view.node) or (view.node.args and not operands):
            return None
        values = [v for v in operands if v is not None]
        reason = self._refusal(view, fact, values)
        if reason is not None:
            self.refusals[view.node] = reason
            return None
        args = [view.argument(i).value if view.has(i) else None for i in range(len(view.node.args))]
        return self._run(view.node, args, self.keywords(view.node))

    def _refusal(self, view: View, fact: Fact, values: list[torch.Tensor]) -> str | None:
        if not self.inexact and not _portable(view, values):
            return f"runtimes may differ in the last bit of {view.name}; the option fold_inexact folds it all the same"
        given = sum(v.nbytes for v in values)
        if fact.shape is None or fact.dtype is None or not static(fact.shape):
            unbounded = view.name in GENERATORS or given > self.limit
            return f"nothing bounds the size of its result ahead of {self.limit} bytes" if unbounded else None
        size = int(product(fact.shape)) * fact.dtype.itemsize
        if size > max(self.limit, given):
            return f"its {size} bytes are above fold_limit={self.limit} and above the {given} bytes of its operands"
        return None

    def keeps_small(self, node: fx.Node, value: torch.Tensor, freed: int) -> str | None:
        """Why storing the value would make the model larger than it may; None where it would not.

        Args:
            node: what the value is to replace.
            value: its value.
            freed: bytes of the operands that nothing else uses.
        """
        if value.nbytes <= max(freed, _SPELLED_OUT):
            return None
        if operation(node) in GENERATORS:
            return f"{operation(node)} spells {value.nbytes} bytes in a few; stored they would only enlarge the model"
        if value.nbytes > self.limit:
            return f"its {value.nbytes} bytes are above fold_limit={self.limit}, and its operands remain in use"
        return None

    def keywords(self, node: fx.Node) -> dict[str, Any]:
        """The keyword arguments, tensor attributes as their values."""
        module = node.graph.owning_module
        assert module is not None
        return {
            key: attribute(module, str(value.target)) if isinstance(value, fx.Node) else value
            for key, value in node.kwargs.items()
        }

    def aten(self, node: fx.Node, facts: Facts, declared: Fact) -> torch.Tensor | None:
        """The value of a node outside the ONNX dialect whose operands are constant, if it may be folded."""
        if operation(node).removeprefix("aten.") not in _ATEN or declared.dtype is None or not static(declared.shape):
            return None
        if int(product(declared.shape or ())) * declared.dtype.itemsize > self.limit:
            return None
        known = {n: facts[n].value for n in node.all_input_nodes}
        if any(value is None for value in known.values()):
            return None
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: known[n])
        return self._run(node, args, kwargs)

    @staticmethod
    def _run(node: fx.Node, args: Any, kwargs: dict[str, Any]) -> torch.Tensor | None:
        try:
            with torch.no_grad():
                result = node.target(*args, **kwargs)  # type: ignore[operator]  # a call_function's target is callable
        except Exception:  # e.g. an integer division by zero, which is the running model's affair
            return None
        return result.detach() if isinstance(result, torch.Tensor) else None


def _portable(view: View, values: list[torch.Tensor]) -> bool:
    """Whether every runtime computes the same bits."""
    floating = any(v.is_floating_point() or v.is_complex() for v in values)
    if view.name in _MOVES:
        return bool(view.attribute("reduction", "none") == "none")
    if view.name == "Cast":
        return _portable_cast(values[0], view)
    if not floating:
        return view.name in _INTEGER
    return view.name in _ROUNDED and all(v.dtype in (torch.float32, torch.float64, torch.float16) for v in values)


def _portable_cast(value: torch.Tensor, view: View) -> bool:
    """Casts that keep the value or round it once to nearest even; out of range they are undefined."""
    try:
        wanted = dtype_of(int(view.attribute("to", 0)))
    except NotImplementedError:
        return False
    floats = (torch.float16, torch.float32, torch.float64)
    if wanted == torch.bool or value.dtype == torch.bool:
        return True
    if not value.is_floating_point():
        exact = wanted in floats and _largest(value) <= 2 ** (11 if wanted == torch.float16 else 24)
        return exact or wanted in floats[1:] or not (wanted.is_floating_point or wanted.is_complex)
    if value.dtype not in floats:
        return False
    if wanted in floats:
        return (value.dtype, wanted) != (torch.float64, torch.float16)
    if wanted.is_floating_point or wanted.is_complex:
        return False
    bounds = torch.iinfo(wanted)
    return bool(torch.isfinite(value).all()) and bool(((value > bounds.min) & (value < bounds.max)).all())


def _largest(value: torch.Tensor) -> float:
    return float(value.to(torch.float64).abs().max()) if value.numel() else -math.inf
