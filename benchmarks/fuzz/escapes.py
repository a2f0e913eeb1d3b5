"""What escaped: one file of facts and one of input per kind, the smallest input of each."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from benchmarks.fuzz.targets import EscapeError

_FRAME = re.compile(r'File "([^"]+)", line \d+ in (\w+)')
# Kinds are told apart by so many of the innermost functions.
_TELLING = 3


def record(folder: Path, target: str, data: bytes, escaped: Exception) -> None:
    """Note an exception.

    Args:
        folder: of all escapes.
        target: what it escaped from.
        data: the input.
        escaped: the exception.
    """
    frames = [_place(f.filename, f.name) for f in traceback.extract_tb(escaped.__traceback__) if _own(f.filename)]
    # A broken promise has no telling place; its words tell it apart.
    telling = [str(escaped)[:40]] if isinstance(escaped, EscapeError) else frames[-_TELLING:]
    _note(folder, target, data, type(escaped).__name__, str(escaped), frames, telling)


def record_death(folder: Path, target: str, data: bytes, kind: str) -> None:
    """Note an input that ended its process; another process runs it once more to see where.

    Args:
        folder: of all escapes.
        target: what it ended.
        data: the input.
        kind: `crash`, `hang` or `oom`.
    """
    path = folder / f"replayed-{os.getpid()}"
    path.write_bytes(data)
    command = [sys.executable, "-X", "faulthandler", "-m", "benchmarks.fuzz.replay", target, str(path)]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stderr
    except subprocess.TimeoutExpired as error:
        said = str(error.stderr or "")
    finally:
        path.unlink()
    _, _, current = said.partition("Current thread")
    frames = [_place(*found) for found in _FRAME.findall(current)][::-1]
    _note(folder, target, data, kind, said[:300], frames, frames[-_TELLING:] if frames else ["unknown"])


def _own(filename: str) -> bool:
    return "site-packages" not in filename


def _place(filename: str, function: str) -> str:
    path = Path(filename)
    return f"{path.parent.name}/{path.name}:{function}"


def _note(
    folder: Path, target: str, data: bytes, kind: str, message: str, frames: list[str], telling: list[str]
) -> None:
    key = hashlib.sha256("|".join([target, kind, *telling]).encode()).hexdigest()[:12]
    path = folder / f"{key}.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"count": 0, "bytes": len(data) + 1}
    if len(data) < known["bytes"]:
        (folder / f"{key}.onnx").write_bytes(data)
    facts = {
        "target": target,
        "kind": kind,
        "message": message[:300],
        "frames": frames[-6:],
        "count": known["count"] + 1,
        "bytes": min(known["bytes"], len(data)),
    }
    # Several processes write here: a reader never sees half a file.
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(facts, indent=1))
    temporary.replace(path)


def all_of(folder: Path) -> list[dict[str, Any]]:
    """The facts of all kinds of escapes, frequent ones first."""
    found = [{**json.loads(path.read_text()), "input": f"{path.stem}.onnx"} for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda facts: -int(facts["count"]))
