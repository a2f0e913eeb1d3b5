"""`graphopt bench`: how fast a model is, or two side by side, after checking that they compute the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.runtime import CPU, CUDA, Runtime, differences, feeds_of
from graphopt.cli.shared import (
    Calib,
    Debug,
    Json,
    Quiet,
    Seed,
    calibration,
    check_dims,
    check_input,
    combinations,
    parse_dims,
    running_on,
)
from graphopt.cli.terminal import Bars, Terminal, number
from graphopt.cli.verify import check_interfaces
from graphopt.errors import CheckFailed, GraphOptError

if TYPE_CHECKING:
    from graphopt.bench import Session, Spread
    from graphopt.graph import Graph

_TARGETS = ("onnxruntime", "onnxruntime-cuda", "torch")


def bench(
    a: Annotated[Path, typer.Argument(metavar="A", help="The reference .onnx file.", show_default=False)],
    b: Annotated[
        Path | None, typer.Argument(metavar="[B]", help="The one to compare it with.", show_default=False)
    ] = None,
    dim: Annotated[
        list[str] | None,
        typer.Option("--dim", metavar="NAME=SIZE", help="Size of a symbolic dim; each size given makes a row."),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option("--batch", min=1, help="Size of every symbolic first dim; each one makes a row."),
    ] = None,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Samples of each model.")] = 20,
    threads: Annotated[
        int, typer.Option("--threads", min=0, help="Threads for one operator; 0 leaves it to the runtime.")
    ] = 0,
    target: Annotated[str, typer.Option("--target", help=f"What runs them: {', '.join(_TARGETS)}.")] = "onnxruntime",
    rtol: Annotated[
        float | None,
        typer.Option(min=0, help="Largest relative RMS difference between A and B; beyond it nothing is measured."),
    ] = None,
    calib: Calib = None,
    seed: Seed = 0,
    json: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure latency: A and B take turns in one process, and the ratio is taken pair by pair.

    Example: `graphopt bench model.onnx model.linearize.onnx --dim seq=128 --dim seq=1024`
    """
    terminal = Terminal(json, quiet)
    terminal.reserve(*(path for path in (a, b) if path is not None))
    if target not in _TARGETS:
        raise GraphOptError(f"expected --target to be one of {', '.join(_TARGETS)}, got {target!r}")
    dims = parse_dims(dim)
    paths = [check_input(path) for path in (a, b) if path is not None]
    from graphopt.api import load

    graphs = [load(path) for path in paths]
    check_dims(graphs[0], dims)
    if b is not None:
        check_interfaces(*graphs)
    settings = list(combinations(dims))
    if batch:
        first = _batch_dims(graphs[0])
        settings = [setting | dict.fromkeys(first, size) for setting in settings for size in batch]
    with terminal.progress() as bars:
        sessions = _sessions(paths, graphs, target, threads, bars)
        rows = [_row(graphs[0], sessions, sizes, calib, seed, runs, rtol, bars) for sizes in settings]
    _show(terminal, rows, target)
    terminal.json(_data(paths, rows, target, threads, runs))


def _batch_dims(graph: Graph) -> list[str]:
    """The symbolic first dims of the inputs.

    Raises:
        GraphOptError: there is none.
    """
    names = [spec.shape[0] for spec in graph.inputs if spec.shape and isinstance(spec.shape[0], str)]
    if not names:
        raise GraphOptError(
            "expected an input with a symbolic first dim for --batch, but all of them are fixed; drop --batch"
        )
    return list(dict.fromkeys(str(name) for name in names))


class _OnTorch:
    """A graph that runs like an onnxruntime session."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.outputs = [spec.name for spec in graph.outputs]

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, Any]) -> list[Any]:
        results = self._graph.run(feeds)
        return [results[name] for name in output_names or self.outputs]


def _sessions(paths: Sequence[Path], graphs: Sequence[Graph], target: str, threads: int, bars: Bars) -> list[Session]:
    if target == "torch":
        if threads:
            import torch

            torch.set_num_threads(threads)
        return [_OnTorch(graph) for graph in graphs]
    provider = CUDA if target == "onnxruntime-cuda" else CPU
    with bars.step("Loading into onnxruntime"):
        return [Runtime(path, threads=threads, provider=provider) for path in paths]


def _row(
    graph: Graph,
    sessions: Sequence[Session],
    sizes: Mapping[str, int],
    calib: str | None,
    seed: int,
    runs: int,
    rtol: float | None,
    bars: Bars,
) -> dict[str, Any]:
    """One line of the table: check that both compute the same, then measure."""
    from graphopt.bench import bench_one, bench_pair

    # One batch is enough: what is measured is time, and random ones are all alike.
    data = calibration(graph, calib or "1", seed, sizes)
    feeds = feeds_of([spec.name for spec in graph.inputs], data.batches[0])
    shapes = {name: list(getattr(value, "shape", ())) for name, value in feeds.items()}
    row: dict[str, Any] = {"dims": dict(sizes), "inputs": shapes, "calibration": data.description}
    names = [spec.name for spec in graph.outputs]
    with running_on(graph, data):
        results = [session.run(names, feeds) for session in sessions]
    if len(sessions) == 1:
        return {**row, "timing": bench_one(sessions[0], feeds, runs, bars.track)}
    outputs = differences(names, [results[0]], [results[1]])
    worst = max(outputs, key=lambda o: o.rel_rms)
    if rtol is not None and not worst.rel_rms <= rtol:
        raise CheckFailed(
            f"expected outputs within a relative RMS of {rtol:g}, but {worst.name!r} differs by "
            f"{worst.rel_rms:.3g} (cosine {worst.cosine:.6f}); nothing was measured"
        )
    timing = bench_pair(sessions[0], sessions[1], feeds, runs, bars.track)
    return {**row, "outputs": outputs, "timing": timing}


def _show(terminal: Terminal, rows: Sequence[dict[str, Any]], target: str) -> None:
    paired = "outputs" in rows[0]
    columns = ["dims", "A ms>", "A quartiles>"]
    columns += ["B ms>", "B quartiles>", "A/B>", "quartiles>", "relative RMS>", "cosine>", "verdict"] if paired else []
    terminal.table(f"latency on {target}, median of {len(rows[0]['timing'].a)} samples", columns, map(_cells, rows))
    if paired:
        terminal.print("A/B above 1: B is faster; relative RMS and cosine are those of the output that differs most")


def _cells(row: dict[str, Any]) -> list[str]:
    from graphopt.bench import Spread

    timing = row["timing"]
    dims = ", ".join(f"{name}={size}" for name, size in row["dims"].items()) or _shapes(row["inputs"])
    cells = [dims, *_milliseconds(Spread.of(timing.a))]
    if "outputs" not in row:
        return cells
    worst = max(row["outputs"], key=lambda o: o.rel_rms)
    ratio = timing.ratio
    cells += [
        *_milliseconds(Spread.of(timing.b)),
        f"{ratio.median:.2f}",
        f"{ratio.lower:.2f} to {ratio.upper:.2f}",
    ]
    return [*cells, number(worst.rel_rms), f"{worst.cosine:.6f}", timing.verdict()]


def _shapes(inputs: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in inputs.items())


def _milliseconds(spread: Spread) -> tuple[str, str]:
    return f"{spread.median * 1e3:.3f}", f"{spread.lower * 1e3:.3f} to {spread.upper * 1e3:.3f}"


def _data(
    paths: Sequence[Path], rows: Sequence[dict[str, Any]], target: str, threads: int, runs: int
) -> dict[str, Any]:
    from graphopt.bench import machine
    from graphopt.rewrite.report import environment

    return {
        "version": 1,
        **dict(zip(("a", "b"), map(str, paths), strict=False)),
        "target": target,
        "threads": threads,
        "runs": runs,
        "rows": [
            {**row, "outputs": [asdict(o) for o in row.get("outputs", ())], "timing": row["timing"].to_dict()}
            for row in rows
        ],
        "environment": {**environment(), **machine()},
    }
