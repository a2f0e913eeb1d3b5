"""Finding passes and backends through entry points, lazily: a third-party package adds them exactly as ours do."""

from __future__ import annotations

import difflib
import functools
from importlib import metadata
from typing import Any

from graphopt.errors import GraphOptError

PASSES = "graphopt.passes"
BACKENDS = "graphopt.backends"


@functools.cache
def _entries(group: str) -> dict[str, metadata.EntryPoint]:
    return {entry.name: entry for entry in metadata.entry_points(group=group)}


def names(group: str) -> list[str]:
    """The names registered in an entry-point group, sorted."""
    return sorted(_entries(group))


def pass_class(name: str) -> Any:
    """The pass registered under `name`.

    Raises:
        GraphOptError: there is none, or its package cannot be imported.
    """
    return _load(PASSES, "pass", name)


@functools.cache
def backend(name: str) -> Any:
    """An instance of the backend registered under `name`.

    Raises:
        GraphOptError: there is none, or its package cannot be imported.
    """
    return _load(BACKENDS, "target", name)()


def _load(group: str, noun: str, name: str) -> Any:
    entries = _entries(group)
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(entries)) or 'none'}"
        raise GraphOptError(f"no {noun} is called {name!r}; {hint}")
    try:
        return entries[name].load()
    except (ImportError, AttributeError) as error:
        raise GraphOptError(f"the {noun} {name!r} from {entries[name].value} cannot be imported: {error}") from error
