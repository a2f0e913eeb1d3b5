"""The torch backend: calls, state, independence, .onnx models as modules, and .pt2 files."""

import copy
import inspect
from pathlib import Path
from typing import Any

import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
import pytest
import torch
from torch import nn

import graphopt
from graphopt import GraphOptError
from graphopt.backends.torch import TorchBackend
from graphopt.graph import set_attribute


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("shift", torch.randn(4), persistent=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, *, gain: float = 2.0) -> Any:
        y = self.linear(x) * self.scale * gain + self.shift
        return {"y": y if mask is None else y * mask, "mask": mask, "gain": gain}


def block() -> tuple[Block, graphopt.Graph]:
    torch.manual_seed(0)
    module = Block().eval()
    return module, graphopt.load(module, (torch.randn(2, 4),), {"x": {0: "n"}})


def test_call_by_position_by_name_and_with_defaults() -> None:
    module, graph = block()
    lowered = graph.to_module()
    x = torch.randn(5, 4)
    expected = module(x)
    for result in (lowered(x), lowered(x=x), lowered(x, None), lowered(x, mask=None, gain=2.0)):
        assert result["y"].equal(expected["y"])
        assert {k: v for k, v in result.items() if k != "y"} == {"mask": None, "gain": 2.0}
    assert type(lowered).__name__ == "Block"
    assert str(inspect.signature(lowered.forward)) == "(x, mask=None, *, gain=2.0)"


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "expected a value for 'x'"),
        ((torch.ones(2, 4), torch.ones(4)), {}, "'mask' was not among the example inputs.*call with x"),
        ((torch.ones(2, 4),), {"gain": 3.0}, "'gain' was not among the example inputs"),
        ((torch.ones(2, 4),), {"other": 1}, "'other' was not among"),
        ((torch.ones(2, 4),), {"x": torch.ones(2, 4)}, "'x' was given twice"),
        ((torch.ones(2, 5),), {}, r"expected input x: .*\[n, 4\].*\[2, 5\]"),
        (([1.0],), {}, "expected a tensor for input x"),
        ((torch.ones(1), None, 3), {}, "expected 1 positional arguments, got 3"),
    ],
    ids=["missing", "extra tensor", "other flag", "unknown", "twice", "size", "type", "count"],
)
def test_other_calls_are_refused(args: Any, kwargs: Any, message: str) -> None:
    lowered = block()[1].to_module()
    with pytest.raises(GraphOptError, match=message):
        lowered(*args, **kwargs)


def test_fixed_values_must_be_repeated() -> None:
    lowered = graphopt.load(Block().eval(), {"x": torch.ones(2, 4), "gain": 3.0, "mask": None}).to_module()
    x = torch.randn(2, 4)
    assert lowered(x=x, gain=3.0)["gain"] == 3.0  # the mask is None by default, as it was in the example
    with pytest.raises(GraphOptError, match=r"exported with gain=3.0, but got 2.0"):
        lowered(x=x)
    with pytest.raises(GraphOptError, match="exported with mask=None, but got a tensor"):
        lowered(x=x, gain=3.0, mask=torch.ones(4))


def test_nested_inputs_may_come_in_another_order() -> None:
    class Both(nn.Module):
        def forward(self, d: dict[str, torch.Tensor]) -> torch.Tensor:
            return d["a"] - d["b"]

    lowered = graphopt.load(Both(), ({"a": torch.ones(2), "b": torch.ones(2)},)).to_module()
    assert lowered({"b": torch.zeros(2), "a": torch.ones(2)}).tolist() == [1, 1]
    with pytest.raises(GraphOptError, match="nested as in the example"):
        lowered({"a": torch.ones(2)})


def test_module_and_graph_are_independent_but_share_weights() -> None:
    module, graph = block()
    lowered, x = graph.to_module(), torch.randn(2, 4)
    before = lowered(x)["y"]
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.linear.default:
            node.replace_all_uses_with(next(iter(graph.placeholders)))
    graph.module.recompile()
    assert lowered(x)["y"].equal(before)
    assert lowered.get_parameter("linear.weight").data_ptr() == module.linear.weight.data_ptr()
    # Conversion makes new weights and leaves the original alone.
    half = lowered.to(torch.bfloat16)
    assert half(x.bfloat16())["y"].dtype == torch.bfloat16
    assert module.linear.weight.dtype == torch.float32


def test_state_and_requires_grad() -> None:
    module, graph = block()
    lowered = graph.to_module()
    assert lowered.state_dict().keys() == module.state_dict().keys()
    assert {n: p.requires_grad for n, p in lowered.named_parameters()} == {
        n: p.requires_grad for n, p in module.named_parameters()
    }
    assert not lowered.training
    assert dict(lowered.named_buffers()).keys() == {"shift"}
    assert lowered.train().training
    assert not lowered.eval().training


def test_a_weight_that_a_pass_adds_is_trainable() -> None:
    graph = block()[1].copy()
    set_attribute(graph.module, "extra.factor", torch.full((4,), 2.0))
    result = graph.results[0]
    with graph.fx.inserting_after(result):
        factor = graph.fx.get_attr("extra.factor")
    with graph.fx.inserting_after(factor):
        product = graph.fx.call_function(torch.ops.aten.mul.Tensor, (result, factor))
    output = next(n for n in graph.nodes if n.op == "output")
    output.replace_input_with(result, product)
    graph.module.recompile()
    lowered = graph.to_module()
    lowered(torch.randn(2, 4))["y"].sum().backward()
    assert lowered.get_parameter("extra.factor").grad is not None


def test_deep_copy_has_weights_of_its_own() -> None:
    lowered, x = block()[1].to_module(), torch.randn(2, 4)
    twin = copy.deepcopy(lowered)
    with torch.no_grad():
        twin.get_parameter("linear.weight").zero_()
    assert not lowered(x)["y"].equal(twin(x)["y"])
    assert twin.state_dict().keys() == lowered.state_dict().keys()


def test_a_lowered_module_can_be_loaded_again() -> None:
    module, graph = block()
    again = graphopt.load(graph.to_module(), {"x": torch.randn(2, 4)}, {"x": {0: "n"}})
    assert [str(s) for s in again.inputs] == ["x: float32[n, 4]"]
    x = torch.randn(3, 4)
    assert again.to_module()(x=x)["y"].equal(module(x)["y"])


def test_compile() -> None:
    module, graph = block()
    backend = TorchBackend()
    x = torch.randn(3, 4)
    compiled = backend.lower(graph, compile=True, backend="eager")
    assert compiled.state_dict().keys() == module.state_dict().keys()
    torch.testing.assert_close(compiled(x)["y"], module(x)["y"])
    with pytest.raises(GraphOptError, match="add compile=True"):
        backend.lower(graph, backend="eager")


def test_torch_compile_takes_a_lowered_module_whole() -> None:
    module, graph = block()
    compiled = torch.compile(graph.to_module(), backend="eager", fullgraph=True)
    x = torch.randn(3, 4)
    torch.testing.assert_close(compiled(x)["y"], module(x)["y"])


def onnx_model(outputs: int = 1) -> onnx.ModelProto:
    weight = torch.arange(12, dtype=torch.float32).reshape(4, 3) / 10
    nodes = [
        oh.make_node("MatMul", ["in.put", "weight"], ["product"]),
        oh.make_node("Constant", [], ["two"], value=onh.from_array(torch.tensor([2.0]).numpy())),
        oh.make_node("Mul", ["product", "two"], ["double"]),
        oh.make_node("Mul", ["double", "scale"], ["scaled"]),
        oh.make_node("Add", ["scaled", "bias.x"], ["out"]),
    ]
    tensor = oh.make_tensor_value_info
    graph = oh.make_graph(
        nodes,
        "g",
        [tensor("in.put", onnx.TensorProto.FLOAT, ["n", 4]), tensor("bias.x", onnx.TensorProto.FLOAT, [3])],
        [tensor(name, onnx.TensorProto.FLOAT, ["n", 3]) for name in ("out", "double")[:outputs]],
        [onh.from_array(weight.numpy(), "weight"), onh.from_array(torch.tensor(0.5).numpy(), "scale")],
    )
    return oh.make_model(graph, ir_version=10, opset_imports=[oh.make_opsetid("", 20)])


def load_onnx(folder: Path, outputs: int = 1) -> graphopt.Graph:
    path = folder / "m.onnx"
    onnx.save(onnx_model(outputs), path)
    return graphopt.load(path)


def test_an_onnx_model_as_a_module(tmp_path: Path) -> None:
    lowered = load_onnx(tmp_path).to_module()
    x, bias = torch.randn(5, 4), torch.randn(3)
    expected = x @ lowered.get_parameter("weight") + bias
    for result in (lowered(x, bias), lowered(x, **{"bias.x": bias}), lowered(in_put=x, bias_x=bias)):
        torch.testing.assert_close(result, expected)
    assert [n for n, p in lowered.named_parameters() if p.requires_grad] == ["weight"]
    lowered(x, bias).sum().backward()
    assert lowered.get_parameter("weight").grad is not None
    pair = load_onnx(tmp_path, outputs=2).to_module()(x, bias)
    assert isinstance(pair, tuple)
    assert len(pair) == 2


@pytest.mark.parametrize(
    ("count", "kwargs", "message"),
    [
        (1, {}, r"expected a value for input bias.x"),
        (3, {}, r"expected 2 inputs \('in.put', 'bias.x'\), got 3"),
        (2, {"bias_x": torch.ones(3)}, "'bias_x' was given twice"),
        (1, {"y": torch.ones(3)}, "no input 'y'"),
        (0, {"in_put": torch.ones(2, 5), "bias_x": torch.ones(3)}, r"\[n, 4\]"),
    ],
    ids=["missing", "count", "twice", "unknown", "size"],
)
def test_other_calls_of_an_onnx_module_are_refused(tmp_path: Path, count: int, kwargs: Any, message: str) -> None:
    lowered = load_onnx(tmp_path).to_module()
    args = (torch.ones(2, 4), torch.ones(3), torch.ones(1))[:count]
    with pytest.raises(GraphOptError, match=message):
        lowered(*args, **kwargs)


def test_training_an_onnx_module_lowers_the_loss(tmp_path: Path) -> None:
    lowered = load_onnx(tmp_path).to_module()
    torch.manual_seed(0)
    x, bias, goal = torch.randn(8, 4), torch.zeros(3), torch.randn(8, 3)
    optimizer = torch.optim.SGD(lowered.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = (lowered(x, bias) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_save_writes_a_pt2_file_with_dynamic_sizes(tmp_path: Path) -> None:
    module, graph = block()
    graph.save(tmp_path / "m.pt2", target="torch")
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    x = torch.randn(7, 4)
    assert loaded(x)["y"].equal(module(x)["y"])
    assert loaded.state_dict().keys() == module.state_dict().keys()


def test_save_of_an_onnx_model_and_of_an_exported_program(tmp_path: Path) -> None:
    graph = load_onnx(tmp_path)
    graph.save(tmp_path / "m.pt2", target="torch")
    x, bias = torch.randn(7, 4), torch.randn(3)
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    assert loaded(x, bias).equal(graph.to_module()(x, bias))
    program = graphopt.load(torch.export.load(tmp_path / "m.pt2"))
    program.save(tmp_path / "again.pt2", target="torch")
    again = torch.export.load(tmp_path / "again.pt2").module()
    assert again(x, bias).equal(loaded(x, bias))


def test_a_failing_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    path.write_text("old")
    graph = block()[1]
    with pytest.raises(GraphOptError, match="could not trace the graph"):
        graph.save(path, target="torch", example_inputs=(torch.ones(2, 9),))
    with pytest.raises(GraphOptError, match="does not exist"):
        graph.save(tmp_path / "no" / "m.pt2", target="torch")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]
