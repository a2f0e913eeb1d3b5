"""Calibration data that does not fit: one sentence, exit code 2, nothing written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Refused = Callable[..., str]

pytestmark = pytest.mark.usefixtures("soften")


def arrays(**values: Any) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **values)


CALIBRATIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "does not exist"),
    "no npz": (lambda path: path.write_text("x"), "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "no arrays": (arrays(), "empty"),
    "pickled": (arrays(x=np.array([{}], dtype=object)), "cannot be read"),
    "wrong name": (arrays(z=np.zeros((4, 2), np.float32)), "the model has no input 'z'"),
    "extra name": (arrays(x=np.zeros((4, 2), np.float32), z=np.zeros((4, 2), np.float32)), "no input 'z'"),
    "wrong rank": (arrays(x=np.zeros(4, np.float32)), "expected input x"),
    "wrong shape": (arrays(x=np.zeros((4, 3), np.float32)), "shape [4, 3]"),
    "wrong dtype": (arrays(x=np.zeros((4, 2), np.int64)), "int64"),
    "double": (arrays(x=np.zeros((4, 2))), "float64"),
    "text": (arrays(x=np.array([["a", "b"]])), "x"),
    "nan": (arrays(x=np.full((4, 2), np.nan, np.float32)), "NaN"),
    "infinite": (arrays(x=np.full((4, 2), np.inf, np.float32)), "NaN or infinite"),
    "no samples": (arrays(x=np.zeros((0, 2), np.float32)), "x"),
}


@pytest.mark.parametrize("verb", ["transform", "verify", "bench"])
@pytest.mark.parametrize("kind", CALIBRATIONS)
def test_bad_calibration(kind: str, verb: str, model: Path, rejects: Refused) -> None:
    write, words = CALIBRATIONS[kind]
    path = model.with_name("calib.npz")
    write(path)
    args = {"transform": ("--pass", "soften"), "verify": (model,), "bench": ()}[verb]
    assert words in rejects(verb, model, *args, "--calib", path)


def test_empty_calibration_folder(model: Path, tmp_path: Path, rejects: Refused) -> None:
    (tmp_path / "data").mkdir()
    sentence = rejects("transform", model, "--pass", "soften", "--calib", tmp_path / "data")
    assert "found none" in sentence
