"""`graphopt report`: JSON reports as a page, or the ablation of a pass on a language model."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.saving import file_facts
from graphopt.cli.shared import (
    Calib,
    Debug,
    Dims,
    Quiet,
    Seed,
    calibration,
    check_dims,
    check_input,
    check_runs,
    single_dims,
)
from graphopt.cli.terminal import Bars, Terminal, finite, number
from graphopt.errors import CheckFailed, GraphOptError

if TYPE_CHECKING:
    from graphopt.evaluation import Ablation
    from graphopt.rewrite.base import Pass


def report(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="REPORT.json...|MODEL.onnx",
            help="JSON reports to show; or, with --pass, the language model to take the pass apart on.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="The page; with --pass a folder.",
            show_default="REPORT.html; MODEL.ablation",
        ),
    ] = None,
    pass_: Annotated[
        list[str] | None,
        typer.Option("--pass", metavar="PASS", help='As in "linearize{window=16}"; repeatable, run in order.'),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            "--eval",
            metavar="TEXT.npz",
            help="Tokens to judge by, under the name of the model's input.",
            show_default="one in ten of the calibration batches",
        ),
    ] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option("--row", metavar="ROW", help="Only this row, as in --row swap --row full; repeatable."),
    ] = None,
    distances: Annotated[
        list[int] | None,
        typer.Option("--distance", min=0, help="Tokens over which recall is measured; repeatable."),
    ] = None,
    fit_steps: Annotated[
        int | None,
        typer.Option("--fit-steps", min=0, help="Training steps in place of the passes' own; 0 skips training."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing page.")] = False,
    json: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="With --pass: also write the report here; `-` for standard output."
        ),
    ] = None,
    calib: Calib = None,
    dim: Dims = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show JSON reports of `transform` as one HTML page, or measure what each part of a pass is worth.

    With --pass, the language model is rewritten again and again: untrained, after each stage of the training, and with
    one part of the method left away. Each row gets its cross-entropy on held-out text, over the position, and what the
    model recalls over growing distances. OUT then holds report.json, table.md, report.html, and the plots. An
    interrupted run goes on where it was when the same command is run again.

    Rows: swap, transfer, full, window, window_sinks, linear, window_trained, linear_trained.

    Example: `graphopt report t.json`

    Example: `graphopt report model.onnx --pass "linearize{window=16}" --calib self:128x256 --eval text.npz -o ablation`
    """
    terminal = Terminal(json, quiet)
    terminal.reserve(*sources)
    from graphopt.evaluation.extra import check_installed

    if not pass_:
        given = {
            "--eval": held_out,
            "--row": rows,
            "--distance": distances,
            "--fit-steps": fit_steps,
            "--json": json,
            "--calib": calib,
            "--dim": dim,
        }
        _check_shown(sources, [name for name, value in given.items() if value is not None])
        check_installed()
        _show(terminal, sources, out, force=force)
        return
    model = _only(sources)
    sizes = single_dims(dim)
    check_input(model)
    if held_out is not None and not held_out.is_file():
        raise GraphOptError(f"expected an .npz file of held-out text, but {held_out} is none; check the path")
    check_installed()
    folder = out or model.with_name(f"{model.stem}.ablation")
    settings = {"held_out": held_out, "rows": rows, "distances": distances, "fit_steps": fit_steps, "seed": seed}
    with terminal.progress() as bars:
        found = _ablate(model, pass_, folder, calib, sizes, bars, settings)
        data = finite({**found.to_dict(), "input": file_facts(model)})
        with bars.step("Drawing"):
            _write(data, folder)
    terminal.json(data)
    _print(terminal, data, folder)
    if found.failed:
        named = "; ".join(f"{item.label}: {item.reason}" for item in found.failed)
        raise CheckFailed(f"expected all stages of the pass to run, but {named}; the other rows are in {folder}")


def _check_shown(sources: Sequence[Path], options: Sequence[str]) -> None:
    """Check that what is given makes sense for showing reports.

    Raises:
        GraphOptError: there is a model among them, or an option of the other form.
    """
    models = [path for path in sources if path.suffix == ".onnx"]
    if models:
        raise GraphOptError(f'expected --pass "linearize{{...}}" to take apart on {models[0]}, or JSON reports; add it')
    if options:
        raise GraphOptError(f"expected --pass beside {options[0]}, which is for the ablation of a model; drop one")


def _only(sources: Sequence[Path]) -> Path:
    if len(sources) != 1:
        raise GraphOptError(f"expected one model with --pass, got {len(sources)} files; name one")
    if sources[0].suffix == ".json":
        raise GraphOptError(f"expected a model with --pass, got {sources[0]}; drop --pass to show the report")
    return sources[0]


def _show(terminal: Terminal, sources: Sequence[Path], out: Path | None, *, force: bool) -> None:
    """The page of finished reports."""
    from graphopt.evaluation.page import is_ablation, read_report, transform_page
    from graphopt.onnxfile.write import check_output

    out = out or sources[0].with_suffix(".html")
    check_output(out)
    if any(out.exists() and path.exists() and out.samefile(path) for path in sources):
        raise GraphOptError(f"expected another file for the page than the report {out}; choose one with -o")
    if out.exists() and not force:
        raise GraphOptError(f"expected a new file for the page, but {out} exists; choose another or give --force")
    reports = [(str(path), read_report(path)) for path in sources]
    ablations = [data for _, data in reports if is_ablation(data)]
    if ablations and len(reports) > 1:
        raise GraphOptError("expected one report of an ablation alone, got several reports; show each on its own")
    page = _drawn(ablations[0]) if ablations else transform_page(reports)
    _put(out, page)
    if not ablations:
        terminal.table("", ("report", "pipeline", "sites", "relative RMS>"), (_line(*each) for each in reports))
    terminal.print(f"wrote {out}", style="bold")


def _line(name: str, data: Mapping[str, Any]) -> list[str]:
    """One report in one line: its worst output and what became of its sites."""
    statuses = [site["status"] for each in data["passes"] for site in each["sites"]]
    counts = ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses)) or "none"
    errors = [o["rel_rms"] for o in data["verification"]["outputs"] if o["rel_rms"] is not None]
    return [name, ", ".join(data["pipeline"]), counts, number(max(errors)) if errors else ""]


def _drawn(data: Mapping[str, Any]) -> str:
    from graphopt.evaluation.page import ablation_page
    from graphopt.evaluation.plots import draw

    with tempfile.TemporaryDirectory() as folder:
        return ablation_page(data, draw(data, Path(folder)))


def _ablate(
    model: Path,
    passes: Sequence[str],
    folder: Path,
    calib: str | None,
    sizes: Mapping[str, int],
    bars: Bars,
    settings: Mapping[str, Any],
) -> Ablation:
    from graphopt.api import load
    from graphopt.evaluation.ablation import ablate, check_model
    from graphopt.evaluation.store import Store
    from graphopt.evaluation.variants import variants
    from graphopt.rewrite.options import parse_all

    items: list[Pass] = parse_all(passes)
    variants(items, settings["rows"])
    graph = load(model)
    check_dims(graph, sizes)
    check_model(graph, items)
    Store(folder)  # a folder that cannot be written is no surprise for the end
    data = calibration(graph, calib, settings["seed"], sizes, fitting=True, bars=bars)
    check_runs(graph, data, items)
    return ablate(graph, items, calibration=data, folder=folder, track=bars.track, **settings)


def _write(data: Mapping[str, Any], folder: Path) -> None:
    from graphopt.evaluation.page import ablation_page
    from graphopt.evaluation.plots import draw
    from graphopt.evaluation.table import markdown

    plots = draw(data, folder)
    _put(folder / "report.html", ablation_page(data, plots))
    _put(folder / "table.md", markdown(data))
    Terminal(folder / "report.json").json(data)


def _put(path: Path, text: str) -> None:
    from graphopt.onnxfile.write import replacing

    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _print(terminal: Terminal, data: Mapping[str, Any], folder: Path) -> None:
    from graphopt.evaluation import table

    terminal.table(table.title(data), table.columns(data), (table.cells(row, data) for row in data["rows"]))
    terminal.print("± is one standard error over the texts; recall is the gain of a repeated segment in nats/token")
    for item in data["left_out"]:
        terminal.print(f"note: {item['label']} is left out: {item['reason']}")
    for note in data["notes"]:
        terminal.print(f"note: {note}")
    terminal.print(f"wrote report.json, table.md, report.html and plots into {folder}", style="bold")
