"""The packages of the extra `report`; nothing else of graphopt needs them."""

from __future__ import annotations

import importlib
from types import ModuleType

from graphopt.errors import GraphOptError


def optional(name: str) -> ModuleType:
    """Import a package of the extra.

    Raises:
        GraphOptError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise GraphOptError(
            f"expected the package {name.partition('.')[0]} to make a page, but it cannot be imported ({error}); "
            'install it with: pip install "graphopt[report]"'
        ) from error


def check_installed() -> None:
    """Check that pages and plots can be made, before any long work.

    Raises:
        GraphOptError: a package is missing.
    """
    for name in ("jinja2", "matplotlib"):
        optional(name)
