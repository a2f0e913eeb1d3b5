"""What fuzzing found, one small model each; the first lines of the files say what happened."""

from pathlib import Path

import onnx
import pytest

from .fuzzing import targets
from .registry import adding

FILES = sorted((Path(__file__).parent / "regressions").glob("*.onnxtxt"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("target", targets.TARGETS)
def test_nothing_escapes(path, target):
    model = onnx.parser.parse_model(path.read_text())
    escaped = targets.verdict(target, model.SerializeToString())
    if escaped is not None:
        raise escaped


def test_a_sentence_has_one_line():
    """An operator whose name is a line break stood as it was in the sentence about it."""
    model = adding()
    node = model.graph.node.add(op_type="\n", output=["z"])
    node.attribute.extend([onnx.helper.make_attribute("axis", 1)] * 2)
    escaped = targets.verdict("load", model.SerializeToString())
    if escaped is not None:
        raise escaped
