"""Random models with nested scopes: they come back as they were, run as elsewhere, and no rewrite changes a bit."""

from collections.abc import Mapping
from random import Random
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnxruntime
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.backends.onnx import to_proto
from graphopt.frontends.onnx import load_onnx
from graphopt.onnxfile import OnnxFile

from .checks import check_names, nodes_in
from .random_models import Maker

SEEDS = st.integers(0, 1 << 32)


def feeds(seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    # Quarters: sums and products of a few of them are exact, so that values meet and limits are hit.
    return [{"x": rng.integers(-8, 9, (2, 4)).astype(np.float32) / 4, "c": np.array(c)} for c in (True, False)]


def on_onnxruntime(proto: onnx.ModelProto, batches: list[dict[str, Any]]) -> list[list[np.ndarray[Any, Any]]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [session.run(None, batch) for batch in batches]


def assert_same(a: list[Any], b: list[Any], *, signs: bool) -> None:
    """All operators of these models round alike everywhere; a NaN may have any payload, Max(0, -0) any sign."""
    for x, y in zip(a, b, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(x, y)
        if signs:
            np.testing.assert_array_equal(np.signbit(x) | np.isnan(x), np.signbit(y) | np.isnan(y))


@settings(max_examples=70)
@given(SEEDS)
def test_comes_back_and_runs_as_elsewhere(seed: int) -> None:
    proto = Maker(Random(seed)).model()
    graph = load_onnx(OnnxFile(proto))
    assert to_proto(graph, rebuild=True) == proto
    assert to_proto(graph.copy(), rebuild=True) == proto
    for batch, expected in zip(feeds(seed), on_onnxruntime(proto, feeds(seed)), strict=True):
        assert_same(list(graph.run(batch).values()), expected, signs=False)


@settings(max_examples=60)
@given(SEEDS, st.sampled_from(["cleanup", "inline", "inline+cleanup", "cleanup+inline"]))
@example(4764, "inline")  # a constant of an inlined body, which a body within that one reads
@example(5163, "inline+cleanup")  # the same, and the inlined body itself does not read it any more
def test_rewrites_keep_every_bit(seed: int, passes: str) -> None:
    proto = Maker(Random(seed)).model()
    batches = feeds(seed)
    result = load_onnx(OnnxFile(proto)).apply(passes.split("+"), calibration=batches)
    assert [s for p in result.report.passes for s in p.sites if s.status == "reverted"] == []
    saved = to_proto(result.graph)
    onnx.checker.check_model(saved, full_check=True)
    check_names(saved.graph)
    assert (saved.graph.input, saved.graph.output) == (proto.graph.input, proto.graph.output)
    for found, expected in zip(on_onnxruntime(saved, batches), on_onnxruntime(proto, batches), strict=True):
        assert_same(found, expected, signs=True)
    if passes == "inline" and not result.report.passes[0].notes:  # every branch ran
        assert "own" not in {node.domain for node in nodes_in(saved.graph)}
    again = load_onnx(OnnxFile(saved))
    assert to_proto(again, rebuild=True) == saved


@settings(max_examples=20)
@given(SEEDS)
def test_gradients(seed: int) -> None:
    proto = Maker(Random(seed)).model()
    for batch in feeds(seed):
        grads = []
        for run in (load_onnx(OnnxFile(proto)).execute, lambda *v: evaluate(proto, *v)):
            # Away from the kinks of the operators.
            x = torch.from_numpy(batch["x"]) + torch.rand(2, 4, generator=torch.Generator().manual_seed(seed)) / 9
            x.requires_grad_()
            total = sum(y.sum() for y in run(x, torch.from_numpy(batch["c"])))
            grads.append(torch.autograd.grad(total, x, allow_unused=True)[0] if total.requires_grad else None)
        if grads[1] is None:
            assert grads[0] is None or not grads[0].any()
            continue
        # Contributions from several uses of a value are summed in another order.
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4, equal_nan=True)


# What the models mean, written once more, and as directly as can be.

ELEMENTWISE = {
    "Neg": torch.neg,
    "Abs": torch.abs,
    "Relu": torch.relu,
    "Floor": torch.floor,
    "Identity": lambda a: a,
    "LeakyRelu": lambda a, alpha: torch.where(a > 0, a, alpha * a),
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Less": torch.lt,
    "ReduceMax": lambda a, keepdims: a.amax(),
}


def evaluate(proto: onnx.ModelProto, x: Tensor, c: Tensor) -> list[Tensor]:
    """The outputs of the main graph."""
    functions = {f.name: f for f in proto.functions}
    return _graph(proto.graph, {"x": x, "c": c}, functions, {})


def _graph(
    graph: onnx.GraphProto, visible: Mapping[str, Tensor], functions: Mapping[str, Any], given: Mapping[str, Any]
) -> list[Tensor]:
    weights = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    values = {**visible, **weights}
    for node in graph.node:
        values.update(zip(node.output, _node(node, values, functions, given), strict=True))
    return [values[output.name] for output in graph.output]


def _node(
    node: onnx.NodeProto, values: Mapping[str, Tensor], functions: Mapping[str, Any], given: Mapping[str, Any]
) -> list[Tensor]:
    inputs = [values.get(name) for name in node.input]
    attributes = {
        a.name: given[a.ref_attr_name] if a.ref_attr_name else onnx.helper.get_attribute_value(a)
        for a in node.attribute
    }

    def body(name: str, *formal: Tensor) -> list[Tensor]:
        graph = attributes[name]
        named = dict(zip((i.name for i in graph.input), formal, strict=True))
        return _graph(graph, {**values, **named}, functions, given)

    if node.domain == "own":
        function = functions[node.op_type]
        inner = dict(zip(function.input, inputs, strict=True))
        slope = {a.name: onnx.helper.get_attribute_value(a) for a in function.attribute_proto} | attributes
        for each in function.node:
            inner.update(zip(each.output, _node(each, inner, functions, slope), strict=True))
        return [inner[name] for name in function.output]
    if node.op_type == "Constant":
        return [torch.from_numpy(onnx.numpy_helper.to_array(attributes["value"]).copy())]
    if node.op_type == "If":
        return body("then_branch" if inputs[0] else "else_branch")
    if node.op_type == "Loop":
        return _loop(inputs, lambda *formal: body("body", *formal), len(node.output))
    if node.op_type == "Scan":
        state, rows = inputs[0], []
        for row in inputs[1]:
            state, out = body("body", state, row)
            rows.append(out)
        return [state, torch.stack(rows)]
    return [ELEMENTWISE[node.op_type](*inputs, **attributes)]


def _loop(inputs: list[Any], body: Any, outputs: int) -> list[Tensor]:
    state, rows, going = inputs[2], [], torch.tensor(True)
    for trip in range(int(inputs[0])):
        going, state, *out = body(torch.tensor(trip), going, state)
        rows += out
        if not going:
            break
    if outputs == 1:
        return [state]
    return [state, torch.stack(rows) if rows else torch.empty(0, *state.shape)]


def test_the_models_hold_what_they_should() -> None:
    """Most of what this is about is in most of them."""
    operators = [{n.op_type for n in nodes_in(Maker(Random(seed)).model().graph)} for seed in range(40)]
    for wanted in ("If", "Loop", "Scan", "f0"):
        assert sum(wanted in each for each in operators) > 10
