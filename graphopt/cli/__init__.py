"""The command line: one verb per file; importing it does no work beyond declaring the options."""

from graphopt.cli.app import app, main

__all__ = ["app", "main"]
