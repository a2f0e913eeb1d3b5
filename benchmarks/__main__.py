"""Run all benchmarks, or those named on the command line."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

_HELPERS = {"common", "table", "decoder_tables", "softmax_tables", "mlp_tables", "timing", "__main__"}
# Run on request only: a million executions take a quarter of an hour, training decoders from scratch two hours.
_LONG = {"fuzz", "length_extrapolation"}


def main() -> None:
    """Each benchmark is a module with `run()`, which prints a table and stores a JSON file."""
    here = [m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name not in _HELPERS]
    wanted = sys.argv[1:] or [*(name for name in here if name not in _LONG), "table"]
    unknown = set(wanted) - set(here) - {"table"}
    if unknown:
        sys.exit(f"no benchmark is called {sorted(unknown)[0]!r}; there are {', '.join(here)}")
    for name in wanted:
        print(f"== {name}", flush=True)
        importlib.import_module(f"benchmarks.{name}").run()


if __name__ == "__main__":
    main()
