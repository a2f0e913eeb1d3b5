"""Fixtures and settings shared by all tests."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("GRAPHOPT_TEST_DATA", ROOT.parent / "shared" / "data"))

# The first call of an operator compiles or loads code: a per-example deadline would measure that.
settings.register_profile("graphopt", deadline=None)
settings.load_profile("graphopt")

# Under xdist each worker would start one thread per core. PyTorch reads this when it is first imported.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the `gpu` tests where there is no CUDA device."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch  # only now: most selections hold no such test

    if torch.cuda.is_available():
        return
    for item in gpu:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of models and texts beside the checkout."""
    if not DATA.is_dir():
        pytest.skip(f"no test data at {DATA}: set GRAPHOPT_TEST_DATA to its folder")
    return DATA


@pytest.fixture(scope="session")
def zoo(shared_data: Path) -> Callable[..., Iterator[tuple[Path, dict[str, Any]]]]:
    """Real models with the inputs that their index prescribes: `zoo("zoo", "zoo_extra")` gives (path, feeds) pairs."""

    def models(*folders: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        for folder in folders:
            for entry in json.loads((shared_data / folder / "index.json").read_text()):
                yield shared_data / folder / entry["file"], _feeds(entry)

    return models


def _feeds(entry: dict[str, Any]) -> dict[str, Any]:
    rng = np.random.default_rng(entry["seed"])
    feeds = {}
    for spec in entry["inputs"]:
        if spec["dtype"] == "bool":
            feeds[spec["name"]] = np.ones(spec["shape"], bool)
        elif spec["range"] == "normal":
            feeds[spec["name"]] = rng.standard_normal(spec["shape"]).astype(spec["dtype"])
        else:
            feeds[spec["name"]] = rng.integers(*spec["range"], spec["shape"]).astype(spec["dtype"])
    return feeds
