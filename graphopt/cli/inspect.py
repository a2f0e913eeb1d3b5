"""`graphopt inspect`: what a model file holds, what it costs, and what there is to rewrite in it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli import costs
from graphopt.cli.inspect_site import show_site, site_data
from graphopt.cli.shared import Debug, Dims, Json, Model, Quiet, check_dims, check_input, single_dims
from graphopt.cli.terminal import Terminal, size
from graphopt.errors import GraphOptError

if TYPE_CHECKING:
    import onnx

    from graphopt.graph import Graph

_SHOWN = 20
# Domains whose operators onnxruntime brings itself; the onnx package has no schema for them.
_RUNTIME_DOMAINS = frozenset(
    {"com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc", "ai.onnx.ml", "ai.onnx.preview"}
)


def inspect(
    model: Model,
    dim: Dims = None,
    sites: Annotated[
        str | None,
        typer.Option(
            "--sites",
            metavar="KIND",
            help="List the sites of this kind, as in `attention`.",
            show_default=False,
        ),
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(
            "--site",
            metavar="NAME",
            help="Show one site alone: what it means, and of an activation or a rational function its closed form.",
            show_default=False,
        ),
    ] = None,
    json: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show a model's interface, operators, cost, and what there is to rewrite.

    Example: `graphopt inspect model.onnx --sites attention --dim seq=128`, and then one of them by `--site NAME`
    """
    terminal = Terminal(json, quiet)
    terminal.reserve(model)
    sizes = single_dims(dim)
    check_input(model)
    from graphopt.api import load
    from graphopt.rewrite.report import environment
    from graphopt.sites import KINDS

    if sites is not None and sites not in KINDS:
        raise GraphOptError(f"no site is of kind {sites!r}; there are {', '.join(KINDS)}")
    graph = load(model)
    check_dims(graph, sizes)
    if site is not None:
        terminal.json({**show_site(terminal, graph, site), "environment": environment()})
        return
    data: dict[str, Any] = {
        "version": 1,
        "file": _file(model, graph),
        "inputs": [_interface(spec) for spec in graph.inputs],
        "outputs": [_interface(spec) for spec in graph.outputs],
        "operators": _operators(graph),
        "cost": costs.of(graph, sizes),
        "sites": {kind: _sites(graph, kind) for kind in KINDS},
        "notes": list(graph.notes),
    }
    _show(terminal, data)
    if sites is not None:
        _list_sites(terminal, sites, data["sites"][sites])
    for note in (*costs.notes(data["cost"]), *data["notes"]):
        terminal.print(f"note: {note}")
    terminal.json({**data, "environment": environment()})


def _file(path: Path, graph: Graph) -> dict[str, Any]:
    from graphopt.cli.saving import file_facts

    assert graph.onnx is not None, "the command line reads .onnx files"
    proto = graph.onnx.proto
    return {
        **file_facts(path),
        "opsets": {o.domain or "ai.onnx": o.version for o in proto.opset_import},
        "ir_version": proto.ir_version,
        "producer": f"{proto.producer_name} {proto.producer_version}".strip(),
        "functions": len(proto.functions),
    }


def _interface(spec: Any) -> dict[str, Any]:
    shape = None if spec.shape is None else list(spec.shape)
    return {"name": spec.name, "dtype": str(spec.dtype).removeprefix("torch."), "shape": shape}


def _operators(graph: Graph) -> dict[str, Any]:
    """Nodes by operator, those in loops and branches too, and what runs them."""
    from graphopt.onnxfile.calls import nodes_in
    from graphopt.opaque import OpaqueOperator
    from graphopt.subgraphs import walk

    assert graph.onnx is not None, "the command line reads .onnx files"
    functions = {(f.domain, f.name) for f in graph.onnx.proto.functions}
    counts: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    opaque: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    nodes = ((level, node) for level in walk(graph) for node in level.nodes)
    for level, node in nodes:
        origin = node.meta.get("onnx")
        if origin is None:
            continue
        name = _operator(origin.proto)
        counts[name] += 1
        if node.op == "get_attr":
            runs["constant"] += 1
        elif node.op == "call_module" and isinstance(level.module.get_submodule(str(node.target)), OpaqueOperator):
            known = _runnable(origin.proto, functions)
            runs["onnxruntime"] += known
            (opaque if known else unknown)[name] += 1
        else:
            runs["torch"] += 1
    for function in graph.onnx.proto.functions:
        unknown.update(_operator(n) for n in nodes_in(function.node) if not _runnable(n, functions))
    return {
        "total": counts.total(),
        "by_operator": dict(counts.most_common()),
        "as_torch": runs["torch"],
        "constants": runs["constant"],
        "on_onnxruntime": runs["onnxruntime"],
        "opaque": dict(opaque.most_common()),
        "unknown": dict(unknown.most_common()),
    }


def _operator(proto: onnx.NodeProto) -> str:
    return proto.op_type if proto.domain in ("", "ai.onnx") else f"{proto.domain}::{proto.op_type}"


def _runnable(proto: onnx.NodeProto, functions: set[tuple[str, str]]) -> bool:
    """Whether the operator is standard, onnxruntime's own, or defined in the file."""
    import onnx.defs

    domain = "" if proto.domain == "ai.onnx" else proto.domain
    known = onnx.defs.has(proto.op_type, domain)
    return known or domain in _RUNTIME_DOMAINS or (proto.domain, proto.op_type) in functions


def _sites(graph: Graph, kind: str) -> dict[str, Any]:
    from graphopt.sites import find_everywhere

    try:
        findings = find_everywhere(graph, kind)
    except ModuleNotFoundError:
        return {"unavailable": f"graphopt has no finder for {kind} sites"}
    except Exception as error:  # one finder's failure is no reason to hide the rest of the file
        return {"unavailable": f"the finder failed with {type(error).__name__}: {error}"}
    return {
        "count": len(findings.sites),
        "refused": len(findings.refusals),
        "sites": [site_data(site) for site in findings.sites],
        "refusals": [{"node": r.node, "reason": r.reason} for r in findings.refusals],
    }


def _show(terminal: Terminal, data: dict[str, Any]) -> None:
    file = data["file"]
    opsets = ", ".join(f"{domain} {version}" for domain, version in file["opsets"].items())
    outside = f" and {size(file['external_bytes'])} of external data" if file["external_bytes"] else ""
    terminal.print(f"{file['path']}: {size(file['bytes'])}{outside}", style="bold")
    producer = file["producer"] or "an unknown exporter"
    functions = f", {file['functions']} functions of its own" if file["functions"] else ""
    terminal.print(f"opset {opsets or 'none'}, IR version {file['ir_version']}, from {producer}{functions}\n")
    for title in ("inputs", "outputs"):
        terminal.table(
            title, ("name", "type", "dims"), ((i["name"], i["dtype"], _dims(i["shape"])) for i in data[title])
        )
    _show_operators(terminal, data["operators"])
    terminal.table("cost", ("", f"{costs.at(data['cost'])}>", "in the model's dims"), costs.lines(data["cost"]))
    rows = ((kind, *_count(found)) for kind, found in data["sites"].items())
    terminal.table("sites", ("kind", "found>", "refused>", ""), rows)


def _dims(shape: list[int | str | None] | None) -> str:
    if shape is None:
        return "unknown"
    return "scalar" if not shape else " x ".join("?" if d is None else str(d) for d in shape)


def _count(found: dict[str, Any]) -> tuple[str, str, str]:
    if "unavailable" in found:
        return "", "", f"not searched: {found['unavailable']}"
    return str(found["count"]), str(found["refused"]), ""


def _show_operators(terminal: Terminal, operators: dict[str, Any]) -> None:
    counts = list(operators["by_operator"].items())
    more = f", the {_SHOWN} most frequent of {len(counts)} operators" if len(counts) > _SHOWN else ""
    terminal.table(f"{operators['total']} nodes{more}", ("operator", "nodes>"), counts[:_SHOWN])
    terminal.print(
        f"{operators['as_torch']} run as torch functions, {operators['constants']} are constants, "
        f"{operators['on_onnxruntime']} run on onnxruntime{_listed(operators['opaque'])}"
    )
    if operators["unknown"]:
        terminal.print(f"unknown to ONNX and to onnxruntime{_listed(operators['unknown'])}", style="yellow")
    terminal.print()


def _listed(counts: dict[str, int]) -> str:
    return ": " + ", ".join(f"{name} ({count})" for name, count in counts.items()) if counts else ""


def _list_sites(terminal: Terminal, kind: str, found: dict[str, Any]) -> None:
    if "unavailable" in found:
        return
    if kind == "attention":
        columns = ("site", "form", "heads>", "head dim>", "mask", "why", "RoPE", "past")
        terminal.table("attention sites", columns, map(_attention, found["sites"]))
    else:
        rows = (
            (site["name"], ", ".join(f"{k}={v}" for k, v in site.items() if k not in ("name", "nodes")))
            for site in found["sites"]
        )
        terminal.table(f"{kind} sites", ("site", ""), rows)
    terminal.table(f"no {kind} sites", ("node", "reason"), ((r["node"], r["reason"]) for r in found["refusals"]))
    if not found["sites"] and not found["refusals"]:
        terminal.print(f"no {kind} site, and nothing that looks like one")


def _attention(site: dict[str, Any]) -> tuple[str, ...]:
    query, shared = site["query_heads"], site["kv_heads"]
    heads = "?" if query is None else str(query) if query == shared else f"{query} / {shared}"
    mask = site["mask"]["kind"] + (f" {site['mask']['window']}" if site["mask"]["window"] else "")
    width = "?" if site["head_dim"] is None else str(site["head_dim"])
    past = "yes" if site["past"] else "no"
    return (
        site["name"],
        site["form"],
        heads,
        width,
        mask,
        site["mask"]["reason"],
        "yes" if site["rope"] else "no",
        past,
    )
