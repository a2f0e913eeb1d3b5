"""The `graphopt` command: its verbs in the order in which a user meets them."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer

from graphopt.cli.bench import bench
from graphopt.cli.errors import OneSentence, run
from graphopt.cli.explain import explain
from graphopt.cli.inspect import inspect
from graphopt.cli.passes import passes
from graphopt.cli.report import report
from graphopt.cli.transform import transform
from graphopt.cli.verify import verify

app = typer.Typer(
    cls=OneSentence,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graphopt {metadata.version('graphopt')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Rewrite trained neural networks, with proof of what it did to the numbers.

    Start with `graphopt inspect model.onnx`, then `graphopt transform model.onnx --pass linearize`.

    Exit codes: 0 done; 1 a check failed and no model was written; 2 bad usage or unreadable input;
    3 nothing to rewrite.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


for _verb in (inspect, passes, explain, transform, verify, bench, report):
    app.command(_verb.__name__)(_verb)


def main() -> None:
    """Run the command line and exit with its code."""
    run(app)
