"""Products of two matrices in any spelling: MatMul, bmm, FusedMatMul, baddbmm, and simple Einsums."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from graphopt.sites.attention.layout import Program
from graphopt.sites.attention.view import View
from graphopt.sites.vocabulary import argument, attributes, kind, operands


@dataclass(frozen=True)
class Product:
    """alpha * left @ right + beta * added, then the axes permuted.

    Attributes:
        node: the product.
        left: its first operand; `left_program` brings it to [..., M, K].
        right: its second operand; `right_program` brings it to [..., N, K], hence transposed.
        left_program: see `left`.
        right_program: see `right`.
        out: brings the result to [..., M, N].
        back: brings [..., M, N] to the result.
        alpha: a factor.
        beta: of what is added.
        added: what is added, if anything.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_program: Program
    right_program: Program
    out: Program
    back: Program
    alpha: float = 1.0
    beta: float = 1.0
    added: fx.Node | None = None


def product(view: View, node: fx.Node) -> Product | None:
    """Read `node` as a product of two computed values; None for anything else."""
    name = kind(node)
    if name in ("matmul", "fused_matmul"):
        left, right = argument(node, 0, "self"), argument(node, 1, "mat2", node.kwargs.get("other"))
        return _plain(view, node, left, right)
    if name == "baddbmm":
        added, left, right = (argument(node, i, n) for i, n in enumerate(("self", "batch1", "batch2")))
        alpha, beta = (float(str(node.kwargs.get(n, 1))) for n in ("alpha", "beta"))
        return _plain(view, node, left, right, alpha, beta, added)
    return _einsum(view, node) if name == "einsum" else None


def _plain(
    view: View,
    node: fx.Node,
    left: object,
    right: object,
    alpha: float = 1.0,
    beta: float = 1.0,
    added: object = None,
) -> Product | None:
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    options = attributes(node) if kind(node) == "fused_matmul" else {}
    if options.get("transBatchA") or options.get("transBatchB"):
        return None
    ranks = view.rank(left), view.rank(right)
    if min(ranks) < 2:
        return None
    straight, swapped = (Program(), Program()), tuple(_swap(r) for r in ranks)
    return Product(
        node,
        left,
        right,
        swapped[0] if options.get("transA") else straight[0],
        straight[1] if options.get("transB") else swapped[1],
        Program(),
        Program(),
        alpha * float(options.get("alpha", 1.0)),
        beta,
        added if isinstance(added, fx.Node) and beta != 0 else None,
    )


def _swap(rank: int) -> Program:
    return Program((("permute", (*range(rank - 2), rank - 1, rank - 2)),))


def _einsum(view: View, node: fx.Node) -> Product | None:
    """`bhid,bhjd->bhij` in any order of the letters."""
    equation = attributes(node).get("equation", node.args[0] if node.args else None)
    sides = [n for n in operands(node) if n is not None]
    if not isinstance(equation, str) or len(sides) != 2 or "." in equation or "->" not in equation:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    parts = inputs.split(",")
    if len(parts) != 2 or any(len(set(p)) != len(p) for p in (*parts, out)):
        return None
    a, b = parts
    batch = [c for c in out if c in a and c in b]
    summed = [c for c in a if c in b and c not in out]
    rows, columns = [c for c in a if c not in b], [c for c in b if c not in a]
    if [len(summed), len(rows), len(columns)] != [1, 1, 1] or set(out) != {*batch, *rows, *columns}:
        return None
    return Product(
        node,
        sides[0],
        sides[1],
        _order(a, [*batch, *rows, *summed]),
        _order(b, [*batch, *columns, *summed]),
        _order(out, [*batch, *rows, *columns]),
        _order("".join([*batch, *rows, *columns]), list(out)),
    )


def _order(given: str, wanted: list[str]) -> Program:
    return Program().then(("permute", tuple(given.index(c) for c in wanted)))
