"""Fixtures and settings shared by all tests."""

import os
from pathlib import Path

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
