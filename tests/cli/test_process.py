"""The command line as a process: signals, pipes, and what `python -m graphopt` prints."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# The third party's pass has no installed metadata, so a child process registers it by hand.
PLUGIN = """
import sys
from importlib import metadata
sys.path.insert(0, {folder!r})
from graphopt import registry
from graphopt.cli import main
entry = metadata.EntryPoint("soften", "clitest_passes:Soften", registry.PASSES)
entries = registry._entries
extra = {{registry.PASSES: {{"soften": entry}}}}
registry._entries = lambda group: {{**entries(group), **extra.get(group, {{}})}}
main()
"""


def command(plugin: Path) -> list[str]:
    return [sys.executable, "-c", PLUGIN.format(folder=str(plugin))]


def test_module_and_version(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "graphopt", "--version"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("graphopt ")


def test_an_error_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "graphopt", "inspect", "missing.onnx"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: expected a model file, but missing.onnx does not exist; check the path\n"


def test_transform(model: Path, plugin: Path) -> None:
    done = subprocess.run(
        [*command(plugin), "transform", model.name, "--pass", "soften"],
        capture_output=True,
        text=True,
        cwd=model.parent,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert model.with_name("net.soften.onnx").exists()


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_interrupted_while_fitting(
    number: int, code: int, word: str, model: Path, plugin: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    marker = tmp_path_factory.mktemp("marker") / "waiting"
    process = subprocess.Popen(
        [*command(plugin), "transform", model.name, "--pass", "soften{wait=60}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=model.parent,
        env={**os.environ, "CLITEST_MARKER": str(marker)},
        # A shell lets what it runs in the background ignore interrupts, and processes inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 100
    while not marker.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout, stderr) == (code, "", f"{word}\n")
    assert [path.name for path in model.parent.iterdir()] == [model.name]


@pytest.mark.parametrize("args", [("passes",), ("inspect", "MODEL"), ("inspect", "MODEL", "--json", "-")])
def test_closed_pipe_is_quiet(args: tuple[str, ...], model: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "graphopt", *(str(model) if arg == "MODEL" else arg for arg in args)],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=model.parent,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_ascii_terminal(model: Path, plugin: Path) -> None:
    done = subprocess.run(
        [*command(plugin), "passes"],
        capture_output=True,
        cwd=model.parent,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
