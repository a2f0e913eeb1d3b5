"""Compute the package list from the disk; pyproject.toml holds everything else."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# Import name of each source tree -> its folder, as in [tool.setuptools.package-dir].
TREES = {"graphopt": "graphopt", "graphopt.passes": "passes", "graphopt.backends": "backends"}


def packages() -> list[str]:
    """Every package of the three source trees, by import name, sorted."""
    return sorted(
        name
        for prefix, folder in TREES.items()
        for name in [prefix, *(f"{prefix}.{sub}" for sub in find_packages(str(ROOT / folder)))]
    )


if __name__ == "__main__":
    setup(packages=packages())
