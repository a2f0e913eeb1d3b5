"""`graphopt passes`: every pass with its equation, its promise, and its options."""

from __future__ import annotations

import inspect as python_inspect
from dataclasses import asdict
from typing import Annotated, Any

import typer

from graphopt.cli.shared import Debug, Json, Quiet
from graphopt.cli.terminal import Terminal


def passes(
    name: Annotated[str | None, typer.Argument(help="Show this pass in full.", show_default=False)] = None,
    json: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List every pass: its equation, what it promises about the numbers, and its options.

    Example: `graphopt passes linearize`
    """
    terminal = Terminal(json, quiet)
    from graphopt import registry
    from graphopt.rewrite.report import environment

    if name is not None:
        found = describe_pass(name, registry.pass_class(name))
        _show(terminal, found, full=True)
        terminal.json({"version": 1, "passes": [found], "environment": environment()})
        return
    listed = [_try_describe(each) for each in registry.names(registry.PASSES)]
    for each in listed:
        _show(terminal, each, full=False)
    if not listed:
        terminal.print("no pass is registered; is graphopt installed, or only on the path?")
    terminal.json({"version": 1, "passes": listed, "environment": environment()})


def describe_pass(name: str, cls: Any) -> dict[str, Any]:
    """What a user needs to know of a pass, as plain data."""
    from graphopt.rewrite.options import describe

    doc = python_inspect.cleandoc(cls.__doc__ or "")
    return {
        "name": name,
        "equation": doc.partition("\n")[0],
        "description": doc.partition("\n")[2].strip(),
        "equivalence": cls.equivalence.value,
        "kind": getattr(cls, "kind", None),
        "needs_calibration": cls.needs_calibration,
        "options": [asdict(option) for option in describe(cls)],
        "defined_in": f"{cls.__module__}:{cls.__qualname__}",
    }


def _try_describe(name: str) -> dict[str, Any]:
    """A pass of another package may be broken in any way; the list goes on and says how."""
    from graphopt import registry

    try:
        return describe_pass(name, registry.pass_class(name))
    except Exception as error:
        return {"name": name, "unavailable": " ".join(f"{error}".split()) or type(error).__name__}


def _show(terminal: Terminal, found: dict[str, Any], *, full: bool) -> None:
    if "unavailable" in found:
        terminal.print(f"{found['name']}  (unavailable: {found['unavailable']})\n", style="red")
        return
    terminal.print(f"{found['name']}  ({_promise(found)})", style="bold")
    terminal.print(f"  {found['equation']}")
    if full and found["description"]:
        terminal.print()
        for line in found["description"].splitlines():
            terminal.print(f"  {line}")
    terminal.print()
    options = found["options"]
    rows = ((f"  {o['name']}", o["type"], o["default"], " ".join(o["help"].split())) for o in options)
    terminal.table("", ("  option", "type", "default", "meaning"), rows)
    if full:
        spelled = f"{{{options[0]['name']}={options[0]['default']}}}" if options else ""
        terminal.print(f'  graphopt transform model.onnx --pass "{found["name"]}{spelled}"')


def _promise(found: dict[str, Any]) -> str:
    parts = [found["equivalence"]]
    if found["kind"]:
        parts.append(f"{found['kind']} sites")
    if found["needs_calibration"]:
        parts.append("uses calibration data")
    return ", ".join(parts)
