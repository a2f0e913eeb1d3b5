"""Random graphs with needless nodes: every output keeps its bits, and a second run finds nothing."""

from typing import Any

import onnx
import onnx.helper
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.calibration import Calibration
from graphopt.frontends.onnx import load_onnx
from graphopt.onnxfile import OnnxFile
from graphopt.onnxfile.tensors import to_tensor_proto
from graphopt.passes.cleanup import Cleanup
from graphopt.passes.cleanup.checking import fingerprint
from graphopt.rewrite import Context

WEIGHTS = {
    "one": torch.tensor(1.0),
    "ones": torch.ones(1, 1, 4),
    "zero": torch.tensor(0.0),
    "minus_zero": torch.tensor(-0.0),
    "row": torch.tensor([1.0, -2.0, 0.5, 3.0]),
    "row_again": torch.tensor([1.0, -2.0, 0.5, 3.0]),
    "yes": torch.tensor(True),
    "no": torch.tensor([False]),
    "axis": torch.tensor([1]),
    "begin": torch.tensor([0]),
    "end": torch.tensor([4]),
    "last": torch.tensor([2]),
    "sizes": torch.tensor([0, 0, 4]),
    "flat": torch.tensor([-1, 4]),
    "pads": torch.zeros(6, dtype=torch.int64),
    "repeats": torch.ones(3, dtype=torch.int64),
    "idle": torch.tensor(False),
    "ratio": torch.tensor(0.5),
}
SPECIAL = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-45, -2.5, 7.0])
# Each step turns values of shape [N, S, 4] into one; `a` and `b` are earlier values, `o` is the new one.
STEPS: list[list[tuple[str, list[str], dict[str, Any]]]] = [
    [("Identity", ["a"], {})],
    [("Neg", ["a"], {})],
    [("Abs", ["a"], {})],
    [("Floor", ["a"], {})],
    [("Exp", ["a"], {})],
    [("Relu", ["a"], {})],
    [("Add", ["a", "b"], {})],
    [("Mul", ["a", "b"], {})],
    [("Max", ["a"], {})],
    [("Concat", ["a"], {"axis": 2})],
    [("Clip", ["a"], {})],
    [("Dropout", ["a", "ratio", "idle"], {})],
    *([(op, ["a", weight], {})] for op in ("Add", "Sub", "Mul", "Div") for weight in list(WEIGHTS)[:6]),
    *([(op, [weight, "a"], {})] for op in ("Add", "Sub", "Mul", "Div") for weight in list(WEIGHTS)[:6]),
    [("Where", ["yes", "a", "b"], {})],
    [("Where", ["no", "a", "b"], {})],
    [("Cast", ["a"], {"to": 1})],
    [("Cast", ["a"], {"to": 11}), ("Cast", ["t"], {"to": 1})],
    [("Cast", ["a"], {"to": 10}), ("Cast", ["t"], {"to": 1})],
    [("Reshape", ["a", "sizes"], {})],
    [("Shape", ["b"], {}), ("Reshape", ["a", "t"], {})],
    [("Shape", ["a"], {}), ("Expand", ["b", "t"], {})],
    [("Transpose", ["a"], {"perm": [1, 2, 0]}), ("Transpose", ["t"], {"perm": [2, 0, 1]})],
    [("Transpose", ["a"], {}), ("Transpose", ["t"], {})],
    [("Unsqueeze", ["a", "axis"], {}), ("Squeeze", ["t", "axis"], {})],
    [("Slice", ["a", "begin", "end", "last"], {})],
    [("Pad", ["a", "pads"], {})],
    [("Tile", ["a", "repeats"], {})],
    [("Concat", ["a", "b"], {"axis": 2}), ("Slice", ["t", "begin", "end", "last"], {})],
    [("Equal", ["a", "b"], {}), ("Not", ["t"], {}), ("Where", ["t", "a", "b"], {})],
]
step = st.tuples(st.sampled_from(STEPS), st.integers(0, 1 << 20), st.integers(0, 1 << 20))


def build(chosen: list[Any]) -> onnx.ModelProto:
    values, nodes = ["x", "z"], []
    for number, (operators, first, second) in enumerate(chosen):
        names = {"a": values[first % len(values)], "b": values[second % len(values)]}
        for position, (name, inputs, attributes) in enumerate(operators):
            output = f"v{number}_{position}"
            nodes.append(onnx.helper.make_node(name, [names.get(i, i) for i in inputs], [output], **attributes))
            names["t"] = output
        values.append(output)
    outputs = dict.fromkeys(values[-2:])
    info = {n: onnx.helper.make_tensor_value_info(n, 1, ["N", "S", 4]) for n in ("x", "z", *outputs)}
    weights = [to_tensor_proto(name, value) for name, value in WEIGHTS.items()]
    graph = onnx.helper.make_graph(nodes, "g", [info["x"], info["z"]], [info[o] for o in outputs], weights)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)


def inputs(n: int, s: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(0, len(SPECIAL), (n, s, 4), generator=generator) for _ in range(2)]
    return tuple(SPECIAL[index] for index in drawn)


@settings(max_examples=150)
@given(st.lists(step, min_size=1, max_size=14), st.integers(0, 1000))
def test_outputs_keep_their_bits(chosen: list[Any], seed: int) -> None:
    graph = load_onnx(OnnxFile(build(chosen)))
    context = Context(Calibration([inputs(2, 3, seed)], "random"))
    rewritten, reports = Cleanup().run(graph, context)
    assert [r for r in reports if r.status == "reverted"] == []
    assert len(list(rewritten.nodes)) <= len(list(graph.nodes)) + 2  # constants that took the place of computed ones
    for n, s in ((2, 3), (1, 1), (3, 1), (0, 2)):
        values = inputs(n, s, seed + 1)
        with torch.no_grad():
            assert list(map(fingerprint, rewritten.execute(*values))) == list(map(fingerprint, graph.execute(*values)))
    assert Cleanup().run(rewritten, context)[0] is rewritten
