"""From a softmax on to the product of weights and values: casts, dropout and clean-up on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import fx

from graphopt.sites import vocabulary
from graphopt.sites.attention.product import Product, product
from graphopt.sites.attention.view import RefusedError, View, is_output
from graphopt.sites.vocabulary import argument, kind, name_of

_PLAIN = frozenset({*vocabulary.SAME_VALUE, "reshape", "transpose", "unsqueeze", "squeeze", "expand", "nan_to_num"})
# What reads the weights only to find rows without any visible key.
_CHECKS = frozenset({"isnan", "shape", "size", "full_like", "zeros_like", "equal", "not_equal"})


@dataclass(frozen=True)
class Context:
    """The product of weights and values, the side of the weights, and the nodes from the softmax to it."""

    product: Product
    side: Literal["left", "right"]
    nodes: tuple[fx.Node, ...]


def read_weights(view: View, softmax: fx.Node) -> list[Context]:
    """Follow the result of a softmax to the products with values, in execution order.

    There are several where the weights are also used outside of the attention, by a product again.

    Raises:
        RefusedError: there is no such product.
    """
    found: list[Context] = []
    reasons: list[RefusedError] = []
    pending: list[tuple[fx.Node, ...]] = [(softmax,)]
    while pending:
        passed = pending.pop()
        try:
            following = _next(view, passed[-1])
        except RefusedError as refused:
            reasons.append(refused)
            continue
        for user, read in following:
            if read is None:
                pending.append((*passed, user))
            else:
                found.append(Context(read, "left" if read.left is passed[-1] else "right", (*passed, user)))
    if not found:
        raise reasons[0]
    return sorted(found, key=lambda c: view.order[c.product.node])


def _next(view: View, node: fx.Node) -> list[tuple[fx.Node, Product | None]]:
    """What passes the weights on, or multiplies values with them.

    Raises:
        RefusedError: nothing does.
    """
    users = [u for u in view.users(node) if u.op != "output" and kind(u) not in _CHECKS]
    following = [(u, _product(view, u)) for u in users]
    following = [(u, p) for u, p in following if p is not None or _keeps(view, u, kind(u), node)]
    if following:
        return following
    if is_output(node):
        raise RefusedError(f"{name_of(node)} is an output of the model and feeds no product with values")
    if not users:
        raise RefusedError("nothing uses the softmax")
    names = ", ".join(name_of(u) for u in users[:3])
    raise RefusedError(
        f"the softmax feeds no product with values, but {names}" + (f" ({kind(users[0])})" if len(users) == 1 else "")
    )


def _product(view: View, node: fx.Node) -> Product | None:
    try:
        return product(view, node)
    except RefusedError:
        return None  # what it multiplies has no known shape: whatever it is, it is none that could be checked


def _keeps(view: View, user: fx.Node, name: str, node: fx.Node) -> bool:
    """Whether `user` passes the weights on, at most with rows of nothing visible replaced by zeros."""
    if name in _PLAIN:
        return not (name == "cast" and vocabulary.narrows(user))
    if name == "getitem":
        return bool(user.args[1] == 0) and kind(node) in ("dropout", "softmax")
    if name == "where":
        choices = argument(user, 1, "self"), argument(user, 2, "other")
        return any(view.zero(c) for c in choices if c is not node) and node in choices
    if name == "masked_fill":
        return view.zero(argument(user, 2, "value"))
    return False
