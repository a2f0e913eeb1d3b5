"""The fuzzer's mutations, targets and seeds, which lie beside its other parts in `benchmarks/fuzz`."""

import importlib.util
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "benchmarks" / "fuzz"


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"fuzz_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mutate, targets, seeds = (_module(name) for name in ("mutate", "targets", "seeds"))
