"""The errors a user can see; each carries the exit code that the command line returns for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphopt.rewrite.report import Report


_LONGEST = 1000


class GraphOptError(Exception):
    """Bad usage or unreadable input: one sentence of what was expected, what was found, what to do."""

    exit_code = 2

    def __str__(self) -> str:
        """One line, though what a file calls its nodes may have several, or be a book."""
        text = " ".join(super().__str__().split())
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


class NoRuntime(GraphOptError):
    """Nothing here can run the model, whatever its inputs: an operator is unknown, or onnxruntime is missing."""


class CheckFailed(GraphOptError):
    """A verification missed its tolerance; no output file was written."""

    exit_code = 1
    report: Report | None = None
    """What had happened until then, where a pipeline failed at its end."""


class NothingToRewrite(GraphOptError):
    """No pass found a site that it could rewrite."""

    exit_code = 3
