"""`graphopt inspect --site`: one site, and of an activation or a rational function the closed form."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from graphopt.cli.terminal import Terminal
from graphopt.errors import GraphOptError

if TYPE_CHECKING:
    from torch import fx

    from graphopt.graph import Graph

# Intervals and degrees of the rational functions that `inspect` fits, by whether they are of form split: nothing is
# known of what a model sees without running it.
_REACHES = {True: 32.0, False: 8.0}
_DEGREES = {True: (4, 6), False: (7, 6)}
_OWN_FUNCTION = re.compile(r"GroupRational_(abs_sum|sum_abs)_(split|plain)_")


def site_data(site: Any) -> dict[str, Any]:
    """What is known of a site, as plain data."""
    data: dict[str, Any] = {"name": site.name, "nodes": len(site.nodes)}
    simple = (
        "form query_heads kv_heads head_dim value_dim scale softcap rope axis role length "
        "in_features out_features activation epsilon"
    )
    for key in simple.split():
        if hasattr(site, key):
            data[key] = getattr(site, key)
    if hasattr(site, "mask"):
        data["mask"] = {"kind": site.mask.kind.value, "window": site.mask.window, "reason": site.mask.reason}
        data["past"] = None if site.past is None else [node.name for node in site.past]
    return data


def show_site(terminal: Terminal, graph: Graph, name: str) -> dict[str, Any]:
    """Print one site, or one rational function of a model that was rewritten.

    Args:
        terminal: where to.
        graph: the model.
        name: of a site, or of a node that computes a rational function.

    Returns:
        The same as data.

    Raises:
        GraphOptError: nothing has that name.
    """
    from graphopt.sites import KINDS, find_everywhere

    found = {kind: find_everywhere(graph, kind).sites for kind in KINDS}
    data: dict[str, Any] = {"version": 1, "sites": []}
    for kind, sites in found.items():
        for site in sites:
            if site.name == name:
                data["sites"].append(_described(terminal, kind, site))
    rationals = dict(_rationals(graph))
    if name in rationals:
        data["sites"].append(_rational(terminal, *rationals[name], name))
    if data["sites"]:
        return data
    names = [*rationals, *(site.name for sites in found.values() for site in sites)]
    close = difflib.get_close_matches(name, names, 3)
    if close:
        raise GraphOptError(f"no site is called {name!r}; the closest are {', '.join(map(repr, close))}")
    some = ", ".join(map(repr, names[:3])) + (" ..." if len(names) > 3 else "") if names else "none"
    raise GraphOptError(f"no site is called {name!r}; there are {len(names)}: {some}")


def _described(terminal: Terminal, kind: str, site: Any) -> dict[str, Any]:
    data = {"kind": kind, **site_data(site)}
    lines = {k: v for k, v in data.items() if not isinstance(v, dict | list)}
    terminal.table(f"{kind} site {site.name}", ("", " "), ((k, str(v)) for k, v in lines.items()))
    if kind == "mlp":
        data["closed_form"] = _activation(terminal, site.activation)
    return data


def _activation(terminal: Terminal, name: str) -> dict[str, Any]:
    """The closed form of an activation, and the rational function that may take its place."""
    import sympy

    from graphopt.fit.activation import fit_activation, is_relu_and_even
    from graphopt.fit.closed_form import (
        X,
        activation_expression,
        error_bound,
        rational_expression,
        shown,
        spelled,
    )

    wanted = activation_expression(name)
    exact = {"f(x)": shown(wanted), "f'(x)": shown(sympy.diff(wanted, X))}
    terminal.table(f"{name} in closed form", ("", " "), exact.items())
    split = is_relu_and_even(name)
    reach = _REACHES[split]
    fitted = fit_activation(name, reach, _DEGREES[split], split=split)
    coefficients = (fitted.numerator, fitted.denominator, fitted.form, split)
    bound = error_bound(wanted, rational_expression(*coefficients), -reach, reach)
    lines = spelled(*coefficients)
    terminal.table(
        f"as a rational function on [{-reach:g}, {reach:g}], form {'split' if split else 'pade'}",
        ("", " "),
        [
            *lines.items(),
            ("largest error", f"{bound.largest:.3g} at x = {bound.at:.3g}, nowhere above {bound.bound:.3g}"),
        ],
    )
    return {"exact": exact, "rational": {**lines, "split": split}, "error": vars(bound)}


def _rationals(graph: Graph) -> Iterator[tuple[str, tuple[Graph, fx.Node]]]:
    """Calls of the function that a rational function is saved as, and the graph or body that each is in."""
    from graphopt.sites.vocabulary import name_of
    from graphopt.subgraphs import walk

    for level in walk(graph):
        for node in level.nodes:
            if node.op == "call_module" and _form(level, node):
                yield name_of(node), (level, node)


def _form(graph: Graph, node: fx.Node) -> tuple[str, str] | None:
    """The denominator, and `split` or `plain`, of a call of our own function; None of other calls."""
    from graphopt.subgraphs import SubgraphOperator

    operator = graph.module.get_submodule(str(node.target))
    found = _OWN_FUNCTION.match(operator.proto.op_type) if isinstance(operator, SubgraphOperator) else None
    return None if found is None else (found[1], found[2])


def _rational(terminal: Terminal, graph: Graph, node: fx.Node, name: str) -> dict[str, Any]:
    """The closed form of each group of a rational function."""
    from graphopt.fit.closed_form import spelled

    form, kind = _form(graph, node) or ("", "")
    split = kind == "split"
    values = [graph.weight(operand) for operand in node.all_input_nodes[1:3] if operand.op == "get_attr"]
    if len(values) != 2:
        raise GraphOptError(f"the coefficients of {name!r} are computed, not stored; run the pass `cleanup` first")
    numerator, denominator = (value.double() for value in values)
    groups = []
    for i in range(max(len(numerator), len(denominator))):
        a, b = (c[min(i, len(c) - 1)].tolist() for c in (numerator, denominator))
        groups.append(spelled(a, b, form, split))
    for i, lines in enumerate(groups):
        if lines not in groups[:i]:
            same = ", ".join(str(j) for j, other in enumerate(groups) if other == lines)
            terminal.table(f"{name}, groups {same} of {len(groups)}", ("", " "), lines.items())
    return {"kind": "rational", "name": name, "form": form, "split": split, "groups": groups}
