"""A rewrite of the attention leaves what stands beside it as it was."""

from pathlib import Path

import onnx
import pytest

import graphopt
from graphopt.frontends.onnx import load_onnx
from graphopt.onnxfile import OnnxFile

from .attention import beside, feeds, without_attention
from .checks import check_mentions, check_names, same_bits, session, stored
from .models import MODELS
from .odd import Odd

# The attention came from an exporter that knows opsets up to this one; what it consists of means the same up to there.
NEWEST = 22
# Attention is recognised by running the model on made-up inputs, of which there are none of these kinds.
NOT_MADE_UP = [
    "a sequence as an input",
    "an optional tensor as an input",
    "an optional sequence as an input",
    "a map as an input",
    "text as input and output",
    "sizes without a name, ranks unknown",
]
FIT = [
    name
    for name, odd in MODELS.items()
    if odd.runs
    and odd.model.ir_version >= 8
    and name not in NOT_MADE_UP
    and all(9 < o.version <= NEWEST for o in odd.model.opset_import if o.domain in ("", "ai.onnx"))
]


def test_most_of_the_table_fits() -> None:
    assert len(FIT) > 70


@pytest.mark.parametrize("name", NOT_MADE_UP)
def test_what_cannot_be_recognised_is_refused_with_the_reason(name: str) -> None:
    graph = load_onnx(OnnxFile(beside(MODELS[name].model)))
    assert ["cannot make random values" in refusal.reason for refusal in graph.refusals("attention")] == [True]


@pytest.mark.parametrize("name", FIT)
def test_linearize_leaves_the_rest_alone(name: str, tmp_path: Path) -> None:
    odd = MODELS[name]
    before = Odd(beside(odd.model), files=odd.files)
    path, out = stored(before, tmp_path), tmp_path / "out.onnx"
    graph = graphopt.load(path)
    known = {spec.name for spec in graph.inputs}
    data = [{k: v for k, v in feeds(odd.feeds[0], i).items() if k in known} for i in range(2)]
    result = graph.apply("linearize{method=hedgehog,fit_steps=0,max_error=9}", calibration=data)
    assert result.report.rewritten == 1
    result.graph.save(out)
    saved = onnx.load(out, load_external_data=False)
    assert "Softmax" not in {node.op_type for node in saved.graph.node}
    assert without_attention(saved) == odd.model
    check_names(saved.graph)
    check_mentions(saved)
    names = [o.name for o in odd.model.graph.output]
    original, rewritten = session(path), session(out)
    for own in odd.feeds:
        fed = feeds(own, 0)
        assert same_bits(original.run(names, fed), rewritten.run(names, fed))
