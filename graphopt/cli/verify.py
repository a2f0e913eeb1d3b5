"""`graphopt verify`: two models on the same inputs, output by output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from graphopt.cli.runtime import Runtime, differences, feeds_of, installed
from graphopt.cli.shared import (
    Calib,
    Debug,
    Dims,
    Json,
    Quiet,
    Seed,
    calibration,
    check_dims,
    check_input,
    running_on,
    single_dims,
)
from graphopt.cli.terminal import Bars, Terminal, number
from graphopt.errors import CheckFailed, GraphOptError, NoRuntime

if TYPE_CHECKING:
    from graphopt.calibration import Calibration
    from graphopt.graph import Graph
    from graphopt.rewrite.report import OutputDifference


def verify(
    a: Annotated[Path, typer.Argument(metavar="A", help="The reference .onnx file.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="The .onnx file in question.", show_default=False)],
    rtol: Annotated[float | None, typer.Option(min=0, help="Largest relative RMS difference that passes.")] = None,
    atol: Annotated[
        float | None,
        typer.Option(min=0, help="Largest absolute difference that passes; either suffices if both are given."),
    ] = None,
    min_cosine: Annotated[
        float | None, typer.Option(min=-1, max=1, help="Smallest mean cosine similarity that passes.")
    ] = None,
    runtime: Annotated[
        Literal["onnxruntime", "torch"] | None,
        typer.Option(help="What runs the models.", show_default="onnxruntime where it is installed"),
    ] = None,
    calib: Calib = None,
    dim: Dims = None,
    seed: Seed = 0,
    json: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare two models on the same inputs; exits with 1 when a given bound is missed.

    Example: `graphopt verify model.onnx model.linearize.onnx --calib data.npz --min-cosine 0.99`
    """
    terminal = Terminal(json, quiet)
    terminal.reserve(a, b)
    sizes = single_dims(dim)
    check_input(a)
    check_input(b)
    from graphopt.api import load
    from graphopt.rewrite.report import environment

    first, second = load(a), load(b)
    check_interfaces(first, second)
    check_dims(first, sizes)
    with terminal.progress() as bars:
        data = calibration(first, calib, seed, sizes, bars=bars)
    engine = runtime or ("onnxruntime" if installed() else "torch")
    with terminal.progress() as bars, running_on(first, data):
        if engine == "torch":
            outputs = _on_torch(first, second, data, bars)
        else:
            outputs = _on_onnxruntime((a, b), first, data, bars)
    missed = misses(outputs, rtol, atol, min_cosine)
    bounds = {"rtol": rtol, "atol": atol, "min_cosine": min_cosine}
    given = any(bound is not None for bound in bounds.values())
    show_outputs(terminal, f"B against A, {len(data)} input sets ({data.description}), on {engine}", outputs)
    terminal.json(
        {
            "version": 1,
            "a": str(a),
            "b": str(b),
            "runtime": engine,
            "calibration": data.description,
            "bounds": bounds,
            "passed": not missed if given else None,
            "verification": {"samples": len(data), "outputs": [asdict(o) for o in outputs]},
            "environment": environment(),
        }
    )
    if missed:
        raise CheckFailed(f"{b} is not within the bounds of {a}: {'; '.join(missed)}")
    if given:
        terminal.print("within the given bounds")


def check_interfaces(a: Graph, b: Graph) -> None:
    """Check that two models can be compared.

    Raises:
        GraphOptError: their inputs or outputs have other names.
    """
    for what in ("inputs", "outputs"):
        left, right = ([spec.name for spec in getattr(graph, what)] for graph in (a, b))
        if sorted(left) != sorted(right):
            raise GraphOptError(
                f"expected two models with the same {what}, found {', '.join(left)} in A and {', '.join(right)} in B"
            )


def misses(
    outputs: Sequence[OutputDifference], rtol: float | None, atol: float | None, min_cosine: float | None
) -> list[str]:
    """What misses a given bound, in words."""
    found = []
    for output in outputs:
        close = (rtol is not None and output.rel_rms <= rtol) or (atol is not None and output.max_abs <= atol)
        if not close and (rtol is not None or atol is not None):
            found.append(
                f"{output.name} has relative RMS {output.rel_rms:.3g} (bound {_bound(rtol)}) "
                f"and largest difference {output.max_abs:.3g} (bound {_bound(atol)})"
            )
        if min_cosine is not None and not output.cosine >= min_cosine:
            found.append(f"{output.name} has mean cosine {output.cosine:.6f} (bound {min_cosine})")
    return found


def _bound(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


def _on_torch(a: Graph, b: Graph, data: Calibration, bars: Bars) -> list[OutputDifference]:
    from graphopt.verification.compare import measure

    return measure(a, b, bars.track(data, len(data), "Comparing"))


def _on_onnxruntime(paths: tuple[Path, Path], graph: Graph, data: Calibration, bars: Bars) -> list[OutputDifference]:
    with bars.step("Loading into onnxruntime"):
        first, second = (_session(path) for path in paths)
    inputs, names = ([spec.name for spec in specs] for specs in (graph.inputs, graph.outputs))
    expected, found = [], []
    for values in bars.track(data, len(data), "Comparing"):
        feeds: dict[str, Any] = feeds_of(inputs, values)
        expected.append(first.run(names, feeds))
        found.append(second.run(names, feeds))
    return differences(names, expected, found)


def _session(path: Path) -> Runtime:
    try:
        return Runtime(path)
    except NoRuntime as error:
        raise NoRuntime(f"{error}; --runtime torch may") from error


def show_outputs(terminal: Terminal, title: str, outputs: Sequence[OutputDifference]) -> None:
    """The table that `transform` and `verify` share."""
    rows = (
        (o.name, number(o.max_abs), number(o.rel_rms), f"{o.cosine:.6f}", "yes" if o.bitwise else "no") for o in outputs
    )
    terminal.table(title, ("output", "max abs>", "relative RMS>", "cosine>", "same bits"), rows)
