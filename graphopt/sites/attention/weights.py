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


def read_weights(view: View, softmax: fx.Node) -> Context:
    """Follow the result of a softmax to the product with the values.

    Raises:
        RefusedError: there is no such product, or the weights are used for something else too.
    """
    node, passed = softmax, [softmax]
    while True:
        if is_output(node) and not any(product(view, u) for u in view.users(node) if u.op != "output"):
            raise RefusedError(f"{name_of(node)} is an output of the model and feeds no product with values")
        if is_output(node):
            raise RefusedError(f"the weights ({name_of(node)}) are an output of the model")
        following = _next(view, node)
        found = product(view, following)
        passed.append(following)
        if found is not None:
            return Context(found, "left" if found.left is node else "right", tuple(passed))
        node = following


def _next(view: View, node: fx.Node) -> fx.Node:
    users = [u for u in view.users(node) if kind(u) not in _CHECKS]
    selecting = [u for u in users if kind(u) == "where"]
    if selecting:
        users = selecting
    if not users:
        raise RefusedError("nothing uses the softmax")
    products = [u for u in users if product(view, u) is not None]
    if len(users) > 1 and products:
        other = next(u for u in users if u is not products[0])
        raise RefusedError(f"the weights are used outside of the attention by {name_of(other)} ({kind(other)})")
    if len(users) > 1:
        names = ", ".join(name_of(u) for u in users[:3])
        raise RefusedError(f"the softmax feeds no product with values, but {names}")
    user = users[0]
    name = kind(user)
    if products or _keeps(view, user, name, node):
        return user
    raise RefusedError(f"the softmax feeds no product with values, but {name_of(user)} ({name})")


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
