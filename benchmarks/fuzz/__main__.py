"""`python -m benchmarks.fuzz`."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.fuzz import EXECUTIONS, STATE, run


def main() -> None:
    """Read the options and fuzz."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz")
    parser.add_argument("--executions", type=int, default=EXECUTIONS, help="in all, those of earlier runs included")
    parser.add_argument("--workers", type=int, default=None, help="processes at a time (default: one per core)")
    parser.add_argument("--state", type=Path, default=STATE, help="folder of corpus, counts and escapes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="store no result")
    given = parser.parse_args()
    run(given.executions, given.workers, given.state, given.seed, stored=not given.dry)


if __name__ == "__main__":
    main()
