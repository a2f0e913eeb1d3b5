"""The layout: package list, import names, direction of the imports, and the built wheel."""

import ast
import importlib
import os
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TREES = {"graphopt": "graphopt", "graphopt.passes": "passes", "graphopt.backends": "backends"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources() -> Iterator[tuple[str, Path]]:
    """Each package of the source trees, as the disk has it, with one of its files."""
    for prefix, folder in TREES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield ".".join((prefix, *path.parent.relative_to(ROOT / folder).parts)), path


def computed_packages() -> list[str]:
    return runpy.run_path(str(ROOT / "setup.py"))["packages"]()


def run(*args: str | Path, cwd: Path, path: Path | None = None) -> str:
    """The standard output of an interpreter with these arguments; `path` goes first on its sys.path."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def imported_modules(package: str, path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every module, or member of one, that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_package_list_matches_the_disk() -> None:
    # A folder of modules without an __init__.py is missing from the computed list, and so from the wheel.
    assert computed_packages() == sorted({package for package, _ in sources()})


def test_package_dir_and_type_checker_links_match_the_trees() -> None:
    assert PROJECT["tool"]["setuptools"]["package-dir"] == TREES
    for folder in ("passes", "backends"):
        assert (ROOT / "typings/graphopt" / folder).resolve() == ROOT / folder


@pytest.mark.parametrize(
    ("importer", "forbidden"),
    [
        ("graphopt", ("graphopt.passes", "graphopt.backends", "passes", "backends")),
        ("graphopt.passes", ("graphopt.backends", "passes", "backends")),
        ("graphopt.backends", ("graphopt.passes", "passes", "backends")),
    ],
)
def test_imports_point_one_way(importer: str, forbidden: tuple[str, ...]) -> None:
    folder = ROOT / TREES[importer]
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for package, path in sources()
        if path.is_relative_to(folder)
        for line, name in imported_modules(package, path)
        if any(below(name, package) for package in forbidden)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import graphopt.passes.cleanup", "graphopt.passes.cleanup"),
        ("from graphopt import passes", "graphopt.passes"),
        ("from ..fit import capture", "graphopt.fit.capture"),
        ("from .. import backends", "graphopt.backends"),
        ("from . import finder", "graphopt.sites.finder"),
        ("def f():\n    from .finder import find", "graphopt.sites.finder.find"),
    ],
)
def test_import_scan_resolves(tmp_path: Path, source: str, name: str) -> None:
    file = tmp_path / "module.py"
    file.write_text(source)
    assert [found for _, found in imported_modules("graphopt.sites", file)] == [name]


def test_bare_names_are_never_imported(tmp_path: Path) -> None:
    # The checkout comes first on sys.path, as under `python -m`: there the bare names would be importable.
    code = "import graphopt, graphopt.passes, graphopt.backends, sys; print(*sys.modules)"
    modules = run("-c", code, cwd=tmp_path, path=ROOT).split()
    assert {"graphopt", "graphopt.passes", "graphopt.backends"} <= set(modules)
    assert not {module for module in modules if module.split(".")[0] in {"passes", "backends"}}


@pytest.mark.parametrize(
    ("group", "name", "target"),
    [
        pytest.param(group, name, target, id=f"{group}:{name}")
        for group, members in PROJECT["project"]["entry-points"].items()
        for name, target in members.items()
    ],
)
def test_entry_points_resolve(group: str, name: str, target: str) -> None:
    module, _, attribute = target.partition(":")
    assert below(module, group)
    assert getattr(importlib.import_module(module), attribute).name == name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel.

    It is built from a copy: setuptools leaves build/ beside the sources, whose stale files would get into
    the next wheel.
    """
    copy = tmp_path_factory.mktemp("source")
    for folder in TREES.values():
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    out = tmp_path_factory.mktemp("wheel")
    run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, copy, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the checkout that the wheel is installed in."""
    target = tmp_path_factory.mktemp("site")
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


def test_wheel_holds_the_sources_and_nothing_else(wheel: Path) -> None:
    expected = {package.replace(".", "/") + "/" + path.name for package, path in sources()}
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert files == expected | {"graphopt/py.typed"}


def test_wheel_imports_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    # The editable install stays on sys.path behind the wheel, so each file's place is checked.
    code = (
        "import importlib, importlib.metadata, sys\n"
        "for name in sys.argv[1:]: print(importlib.import_module(name).__file__)\n"
        "print(importlib.metadata.distribution('graphopt').locate_file('graphopt/__init__.py'))"
    )
    packages = computed_packages()
    files = run("-c", code, *packages, cwd=tmp_path, path=installed).splitlines()
    assert len(files) == len(packages) + 1
    assert not [file for file in files if not Path(file).is_relative_to(installed)]


def test_wheel_has_a_command_line(installed: Path, tmp_path: Path) -> None:
    assert "transform" in run("-m", "graphopt", "--help", cwd=tmp_path, path=installed)
