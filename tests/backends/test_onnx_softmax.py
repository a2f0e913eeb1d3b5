"""The ONNX forms of the softmax operators in onnxruntime, against fp64 loops over the entries of each row."""

import math

import numpy as np
import onnx
import onnx.helper
import pytest
import torch

import graphopt
from graphopt.backends.onnxruntime import Session
from graphopt.onnxfile.tensors import ONNX_DTYPES
from graphopt.rewrite.splice import splice
from graphopt.sites.base import Site

INF, NAN = math.inf, math.nan
OPERATORS = {
    "two_pass_softmax": (),
    "online_softmax": (),
    "unified_max_softmax": (),
    "unified_max_softmax shifted": (3.5, -18.0, 25.0),
}
# A few ulps of e^(x - max), whose argument is rounded to fp32; of fp16 one rounding of the result, 2^-11.
RTOL = {torch.float64: 1e-13, torch.float32: 5e-6, torch.float16: 1e-3}
# Below this, weights count in absolute terms: fp32 flushes them. In fp16 it is the distance of subnormal numbers.
ATOL = {torch.float64: 1e-30, torch.float32: 1e-12, torch.float16: 6e-8}


class Softmax(torch.nn.Module):
    def __init__(self, operator, axis, options=()):
        super().__init__()
        self.operator, self.axis, self.options = operator, axis, options

    def forward(self, x):
        return getattr(torch.ops.graphopt, self.operator)(x, self.axis, *self.options)


def exact(x, axis):
    """Entry by entry in fp64: math.exp and an exact sum."""
    rows = np.moveaxis(x.astype(np.float64), axis, -1)
    found = np.empty_like(rows)
    for index in np.ndindex(rows.shape[:-1]):
        row = [float(v) for v in rows[index]]
        if any(math.isnan(v) or v == INF for v in row):
            found[index] = NAN
        elif all(v == -INF for v in row):
            found[index] = 0
        else:
            largest = max(row)
            weights = [math.exp(v - largest) for v in row]
            total = math.fsum(weights)
            found[index] = [w / total for w in weights]
    return np.moveaxis(found, -1, axis)


def lower(path, module, x, *, opset=17, target="onnx", through=None):
    """A model of the operator alone; `through` is a type to compute in, with casts around."""
    kind, dims = ONNX_DTYPES[x.dtype], [f"d{i}" for i in range(x.ndim)]
    infos = [onnx.helper.make_tensor_value_info(name, kind, dims) for name in "xy"]
    nodes = [("Cast", "x", "a"), ("Identity", "a", "b"), ("Cast", "b", "y")] if through else [("Identity", "x", "y")]
    codes = iter([ONNX_DTYPES[through], kind]) if through else None
    made = [onnx.helper.make_node(o, [a], [b], **({"to": next(codes)} if o == "Cast" else {})) for o, a, b in nodes]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(made, "g", infos[:1], infos[1:]),
        opset_imports=[onnx.helper.make_opsetid("", opset)],
        ir_version=8,
    )
    onnx.save(model, path)
    graph = graphopt.load(path)
    node = next(n for n in graph.nodes if n.op == "call_function" and n.meta["onnx"].proto.op_type == "Identity")
    example = x if through is None else x.to(through)
    splice(graph, Site("s", node, (node,), (node.args[0],)), module, "graphopt.s", (example,))
    graph.save(path, target=target)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    return Session(path)


def edges(length=9):
    """One row per case that a softmax may stumble over; their names are in the order of the rows."""
    largest, lowest = np.finfo(np.float32).max, np.finfo(np.float32).min
    plain = np.linspace(-4, 4, length)
    rows = {
        "plain": plain,
        "one masked": np.where(np.arange(length) == 3, -INF, plain),
        "all masked": np.full(length, -INF),
        "one visible": np.where(np.arange(length) == 3, -700.0, -INF),
        "a NaN": np.where(np.arange(length) == 3, NAN, plain),
        "a NaN, others masked": np.where(np.arange(length) == length - 1, NAN, -INF),
        "infinite": np.where(np.arange(length) == 3, INF, plain),
        "infinite twice, one masked": np.array([INF, -INF, INF, *plain[3:]]),
        "masked by -1e30": np.where(np.arange(length) == 3, -1e30, plain),
        "masked by the lowest": np.where(np.arange(length) < 3, lowest, plain),
        "all the lowest": np.full(length, lowest),
        "all the largest": np.full(length, largest),
        "one the largest": np.where(np.arange(length) == 3, largest, plain),
        "high": plain + 1e5,
        "beyond the exponent of fp32": plain + 300,
        "low": plain - 1e5,
        "below the exponent of fp32": plain - 300,
        "spread": plain * 100,
        "around 2048": np.where(np.arange(length) % 2, 2047.5, 2048.5),
        "equal": np.full(length, 7.25),
    }
    return list(rows), np.stack(list(rows.values())).astype(np.float32)


@pytest.mark.parametrize("target", ["onnx", "onnxruntime"])
@pytest.mark.parametrize("name", OPERATORS)
def test_edge_cases(name, target, tmp_path):
    module = Softmax(name.split()[0], -1, OPERATORS[name])
    names, x = edges()
    found = lower(tmp_path / "m.onnx", module, torch.from_numpy(x), target=target).run({"x": x})["y"]
    expected, reference = exact(x, -1), module(torch.from_numpy(x)).numpy()
    for i, case in enumerate(names):
        np.testing.assert_allclose(found[i], expected[i], RTOL[torch.float32], ATOL[torch.float32], err_msg=case)
        np.testing.assert_allclose(found[i], reference[i], RTOL[torch.float32], ATOL[torch.float32], err_msg=case)
        hidden = np.isneginf(x[i]) & ~np.isnan(expected[i])
        assert not found[i][hidden].any(), f"{case}: -inf weighs 0 exactly"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("axis", [-1, 1, -3])
@pytest.mark.parametrize("name", OPERATORS)
def test_axes_and_types(name, axis, dtype, tmp_path):
    x = torch.randn(2, 5, 3, 70, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(6).to(dtype)
    x[0, 0, 0, :7] = -INF
    x[1, 2] = -INF
    module = Softmax(name.split()[0], axis, OPERATORS[name])
    session = lower(tmp_path / "m.onnx", module, x)
    # Another size than the one that was observed, and a row of one entry: nothing dynamic is baked in.
    for values in (x.numpy(), x[:1, :, 1:, :1].numpy(), x[:, :1].numpy()):
        found = session.run({"x": values})["y"]
        assert found.dtype == values.dtype
        np.testing.assert_allclose(found, exact(values, axis), RTOL[dtype], ATOL[dtype])
        np.testing.assert_allclose(found, module(torch.from_numpy(values)).numpy(), RTOL[dtype], ATOL[dtype])


@pytest.mark.parametrize("opset", [9, 10, 11, 13, 18, 21])
@pytest.mark.parametrize("name", OPERATORS)
def test_opsets(name, opset, tmp_path):
    names, x = edges()
    x = np.ascontiguousarray(np.stack([x, x]).transpose(0, 2, 1))
    module = Softmax(name.split()[0], 1, OPERATORS[name])
    found = lower(tmp_path / "m.onnx", module, torch.from_numpy(x), opset=opset).run({"x": x})["y"]
    np.testing.assert_allclose(found, exact(x, 1), RTOL[torch.float32], ATOL[torch.float32], err_msg=str(names))
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == opset


def test_an_opset_that_is_too_old_is_named(tmp_path):
    with pytest.raises(graphopt.GraphOptError, match="softmax below opset 9"):
        lower(tmp_path / "m.onnx", Softmax("online_softmax", -1), torch.ones(2, 3), opset=8)


@pytest.mark.parametrize("name", OPERATORS)
def test_bfloat16_is_computed_in_fp32(name, tmp_path):
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)) * 5
    x[1] = -INF
    module = Softmax(name.split()[0], -1, OPERATORS[name])
    found = lower(tmp_path / "m.onnx", module, x, through=torch.bfloat16).run({"x": x.numpy()})["y"]
    expected = exact(x.to(torch.bfloat16).float().numpy(), -1)
    # One rounding to 8 bits: sums in bfloat16 would be off by more than ten times that.
    np.testing.assert_allclose(found, expected, rtol=2.0**-8, atol=1e-30)


@pytest.mark.parametrize("name", OPERATORS)
def test_empty_values(name, tmp_path):
    session = lower(tmp_path / "m.onnx", Softmax(name.split()[0], -1, OPERATORS[name]), torch.ones(2, 3))
    for shape in ((0, 3), (2, 0), (0, 0)):
        assert session.run({"x": np.zeros(shape, np.float32)})["y"].shape == shape


@pytest.mark.parametrize("name", OPERATORS)
def test_long_rows(name, tmp_path):
    """Of 50,000 terms, and of as many that are equal: added up one by one in fp32, these are off by 6e-5."""
    x = np.random.default_rng(0).standard_normal((2, 1, 50_000)).astype(np.float32) * 4
    x[1] = 88.0
    module = Softmax(name.split()[0], -1, OPERATORS[name])
    session = lower(tmp_path / "m.onnx", module, torch.from_numpy(x))
    for values in (x, x[..., :257], x[..., :256], x[:1, :, :3], x[:, :0], x[..., :0]):
        found = session.run({"x": values})["y"]
        np.testing.assert_allclose(found, exact(values, -1), RTOL[torch.float32], ATOL[torch.float32])


def test_functions_of_standard_operators_that_are_shared(tmp_path):
    for name, options in OPERATORS.items():
        lower(tmp_path / "m.onnx", Softmax(name.split()[0], -1, options), torch.ones(2, 3))
        model = onnx.load(tmp_path / "m.onnx")
        (function,) = model.functions
        assert (model.graph.node[0].op_type, model.graph.node[0].domain) == (function.name, "graphopt")
        assert {n.domain for n in function.node} == {""}
        assert "Softmax" not in {n.op_type for n in function.node}
