"""Modules as graphs: names, sizes, structure of inputs and outputs, and what is refused."""

import dataclasses
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

import graphopt
from graphopt import GraphOptError
from graphopt.frontends.calling import output_names

Pair = namedtuple("Pair", ["left", "right"])


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
        self.register_buffer("offset", torch.randn(3))
        self.register_buffer("scratch", torch.randn(3), persistent=False)
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self.offset * self.scratch


def targets(graph: graphopt.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


def test_aten_nodes_read_the_modules_own_tensors_under_their_names() -> None:
    module = Small().eval()
    graph = graphopt.load(module, (torch.randn(2, 4),))
    assert targets(graph) == [
        "aten.linear.default",
        "aten.gelu.default",
        "aten.linear.default",
        "aten.mul.Tensor",
        "aten.add.Tensor",
    ]
    weights = {str(n.target): graph.weight(n) for n in graph.nodes if n.op == "get_attr"}
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert weights.keys() == own.keys()
    assert all(weights[name].data_ptr() == own[name].data_ptr() for name in own)
    assert all(weights[name] is value for name, value in module.named_parameters())
    graph.lint()


@pytest.mark.parametrize(
    "shapes",
    [
        {"x": {0: Dim("rows")}},
        ({0: Dim("rows")},),
        {"x": (Dim("rows"), None)},
        {"x": {0: "rows"}},
        [{0: "rows"}],
    ],
    ids=["dict", "tuple", "sizes as tuple", "string", "string in list"],
)
def test_dynamic_sizes_carry_the_users_names(shapes: Any) -> None:
    graph = graphopt.load(Small().eval(), (torch.randn(2, 4),), shapes)
    assert [str(s) for s in graph.inputs] == ["x: float32[rows, 4]"]
    assert [str(s) for s in graph.outputs] == ["output_0: float32[rows, 3]"]


def test_an_unnamed_dynamic_size_is_a_symbol_and_expressions_use_the_names() -> None:
    class Join(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.cat([a, b.repeat(2, 1)])

    shapes = {"b": {0: Dim("few")}, "a": {0: Dim.DYNAMIC}}
    graph = graphopt.load(Join(), {"b": torch.randn(3, 4), "a": torch.randn(5, 4)}, shapes)
    sizes = {s.name: s.shape[0] for s in graph.inputs if s.shape}
    assert sizes["b"] == "few"
    assert str(sizes["a"]).startswith("s")
    shape = graph.outputs[0].shape
    assert shape is not None
    assert str(sizes["a"]) in str(shape[0])
    assert "2*few" in str(shape[0])


def test_static_sizes_are_checked_when_the_graph_runs_by_name() -> None:
    module = Small().eval()
    graph = graphopt.load(module, (torch.randn(2, 4),), {"x": {0: "rows"}})
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    result = graph.run({"x": x})
    assert list(result) == ["output_0"]
    np.testing.assert_array_equal(result["output_0"], module(torch.from_numpy(x)).detach().numpy())
    with pytest.raises(GraphOptError, match=r"float32\[rows, 4\].*\[5, 5\]"):
        graph.run({"x": np.zeros((5, 5), np.float32)})


class Nested(nn.Module):
    def forward(self, batch: dict[str, Any], mask: Any = None, times: int = 2, mode: str = "sum") -> Any:
        total = batch["x"] * times + batch["more"][0]
        if mask is not None:
            total = total * mask
        if mode == "mean":
            total = total / 2
        pair = Pair(total, batch["x"])
        return {
            "total": total,
            "nothing": None,
            "count": 3,
            "pair": pair,
            "list": [batch["more"][1], (total + 1,)],
        }


def nested_batch() -> dict[str, Any]:
    return {"x": torch.randn(2, 3), "more": [torch.randn(2, 3), torch.randn(2, 3)]}


def test_nested_inputs_and_outputs_become_flat_named_tensors() -> None:
    batch = nested_batch()
    graph = graphopt.load(Nested(), (batch, None), {"batch": {"x": {0: "n"}, "more": [{0: "n"}, {0: "n"}]}})
    assert [s.name for s in graph.inputs] == ["batch_x", "batch_more_0", "batch_more_1"]
    assert [s.name for s in graph.outputs] == ["total", "pair_left", "pair_right", "list_0", "list_1_0"]
    assert len(graph.placeholders) == len(graph.inputs)
    assert len(graph.results) == len(graph.outputs)
    values = [torch.randn(7, 3) for _ in range(3)]
    total, left, right, first, second = graph.execute(*values)
    torch.testing.assert_close(total, values[0] * 2 + values[1], rtol=0, atol=0)
    assert left.equal(total)
    assert right is values[0]
    assert first is values[2]
    assert second.equal(total + 1)


def test_constants_disappear_from_the_flat_inputs() -> None:
    graph = graphopt.load(Nested(), {"batch": nested_batch(), "mask": None, "times": 3, "mode": "mean"})
    assert [s.name for s in graph.inputs] == ["batch_x", "batch_more_0", "batch_more_1"]
    x, y, z = (torch.randn(2, 3) for _ in range(3))
    assert graph.execute(x, y, z)[0].equal((x * 3 + y) / 2)


def test_one_tensor_for_two_arguments_stays_two_inputs() -> None:
    class Minus(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a - 2 * b

    x = torch.randn(3)
    graph = graphopt.load(Minus(), (x, x))
    assert graph.execute(torch.ones(3), torch.zeros(3))[0].equal(torch.ones(3))


def test_a_number_that_varies_is_an_input() -> None:
    class Times(nn.Module):
        def forward(self, x: torch.Tensor, n: int) -> torch.Tensor:
            return x * n

    graph = graphopt.load(Times(), (torch.ones(2), 3), {"x": None, "n": Dim.DYNAMIC})
    assert [str(s) for s in graph.inputs] == ["x: float32[2]", "n: int[]"]
    assert graph.execute(torch.ones(2), 5)[0].equal(torch.full((2,), 5.0))


def test_varying_arguments_and_numpy_examples() -> None:
    class Sum(nn.Module):
        def forward(self, *parts: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
            return parts[0] + 2 * parts[1] + 3 * sum(named.values())

    class Named(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    ones = torch.ones(2)
    graph = graphopt.load(Sum(), (ones, ones))
    assert [s.name for s in graph.inputs] == ["parts_0", "parts_1"]
    assert graph.to_module()(ones, 2 * ones)[0] == 5
    graph = graphopt.load(Named(), {"x": np.ones(2, np.float32)})
    assert graph.run({"x": np.ones(2, np.float32)})["output_0"].tolist() == [2, 2]


@pytest.mark.parametrize("named", [{"z": {0: "n"}}, {"named": {"z": {0: "n"}}}], ids=["flat", "as torch"])
def test_dynamic_sizes_of_what_falls_into_kwargs(named: Any, tmp_path: Path) -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor, **named: Any) -> torch.Tensor:
            return x + named["z"] * named["times"]

    module = Sum()
    example = {"x": torch.ones(2, 3), "z": torch.ones(2, 3), "times": 2}
    graph = graphopt.load(module, example, {"x": {0: "n"}, **named})
    assert "forward" not in vars(module)
    assert [str(s) for s in graph.inputs] == ["x: float32[n, 3]", "z: float32[n, 3]"]
    lowered, ones = graph.to_module(), torch.ones(5, 3)
    assert lowered(ones, z=ones, times=2, verbose=None).equal(3 * ones)
    with pytest.raises(GraphOptError, match="'verbose' was not among"):
        lowered(ones, z=ones, times=2, verbose=True)
    graph.save(tmp_path / "m.pt2", target="torch")
    assert torch.export.load(tmp_path / "m.pt2").module()(x=ones, z=ones, times=2).equal(3 * ones)


def test_a_registered_dataclass_as_output() -> None:
    @dataclasses.dataclass
    class Found:
        score: torch.Tensor
        place: torch.Tensor
        comment: Any = None

    torch.export.register_dataclass(Found, serialized_type_name="tests.Found")

    class Search(nn.Module):
        def forward(self, x: torch.Tensor) -> Found:
            return Found(*x.max(dim=-1))

    graph = graphopt.load(Search(), (torch.randn(2, 3),))
    assert [str(s) for s in graph.outputs] == ["score: float32[2]", "place: int64[2]"]
    found = graph.to_module()(torch.tensor([[1.0, 3.0, 2.0]] * 2))
    assert type(found) is Found
    assert found.place.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        (0, ["output_0"]),
        ((0, 0), ["output_0", "output_1"]),
        ([0, {"a": 0}], ["output_0", "output_1_a"]),
        ({"hidden_states": (0, 0), "x": 0}, ["hidden_states_0", "hidden_states_1", "x"]),
        ({"a": (0,), "a_0": 0}, ["a_0", "a_0_1"]),
        ({"a b": 0, 3: 0}, ["a_b", "output_3"]),
        (Pair(0, (0, 0)), ["left", "right_0", "right_1"]),
    ],
    ids=str,
)
def test_output_names_follow_the_path(tree: Any, names: list[str]) -> None:
    assert output_names(torch.utils._pytree.tree_structure(tree)) == names


class Frozen(nn.Module):
    """A part without gradient, as rotary embeddings have."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("angles", torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            turn = self.angles.cos()
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            frozen = self.inside(x) * turn
            with torch.enable_grad():
                frozen = frozen + 1
        return self.outside(frozen) * turn + x


def test_regions_without_gradient_are_inlined_and_keep_their_gradients() -> None:
    module = Frozen()
    x = torch.randn(2, 3, requires_grad=True)
    graph = graphopt.load(module, (x,))
    assert not any("wrap_with" in target for target in targets(graph))
    assert targets(graph).count("aten.detach.default") == 1  # none for `turn`, which has no gradient anyway
    graph.lint()

    def gradients(result: torch.Tensor) -> list[torch.Tensor | None]:
        values = [x, *module.parameters()]
        return list(torch.autograd.grad(result.square().sum(), values, allow_unused=True))

    ours, theirs = gradients(graph.execute(x)[0]), gradients(module(x))
    assert [g is None for g in ours] == [g is None for g in theirs]
    for a, b in zip(ours, theirs, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_an_enabled_autocast_region_keeps_its_casts() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.linear(x)

    module, x = Mixed().eval(), torch.randn(2, 8)
    graph = graphopt.load(module, (x,))
    assert graph.copy().execute(x)[0].equal(module(x))


def test_training_mode_is_noted() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    graph = graphopt.load(module, (torch.randn(3, 4),))
    assert "training mode" in graph.notes[0]
    assert any("dropout" in target for target in targets(graph))
    before = module[2].running_mean.clone()
    graph.execute(torch.randn(3, 4))
    assert not module[2].running_mean.equal(before)
    assert not graphopt.load(module.eval(), (torch.randn(3, 4),)).notes


def test_an_exported_program_is_a_source() -> None:
    module, x = Small().eval(), torch.randn(2, 4)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: Dim("rows")}})
    graph = graphopt.load(program)
    assert graph.inputs[0].name == "x"
    y = torch.randn(5, 4)
    assert graph.execute(y)[0].equal(module(y))
    lowered = graph.to_module()
    assert lowered.state_dict().keys() == module.state_dict().keys()
    assert lowered(x=y).equal(module(y))


def test_control_flow_keeps_its_branches() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda v: self.linear(v), lambda v: v - 1, (x,))

    module = Branch().eval()
    graph = graphopt.load(module, (torch.ones(2, 3),)).copy()
    for x in (torch.ones(2, 3), -torch.ones(2, 3)):
        torch.testing.assert_close(graph.to_module()(x), module(x), rtol=0, atol=0)


def test_strict_tracing_is_the_second_try(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, export = [], torch.export.export

    def only_strict(*args: Any, strict: bool, **kwargs: Any) -> Any:
        tried.append(strict)
        if not strict:
            raise RuntimeError("non-strict refused")
        return export(*args, strict=False, **kwargs)

    monkeypatch.setattr(torch.export, "export", only_strict)
    x = torch.randn(2, 4)
    module = Small().eval()
    assert graphopt.load(module, (x,)).execute(x)[0].equal(module(x))
    assert tried == [False, True]


def test_a_module_that_cannot_be_traced_is_refused_with_both_reasons() -> None:
    class Data(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[: int(x.sum())] if x.sum() > 0 else x.new_zeros(len(str(x.tolist())))

    with pytest.raises(GraphOptError, match=r"could not trace Data: \w+.*\(in strict mode: \w+") as caught:
        graphopt.load(Data(), (torch.ones(3),))
    assert "\n" not in str(caught.value)


def test_missing_or_odd_examples_are_refused() -> None:
    with pytest.raises(GraphOptError, match="got none"):
        graphopt.load(Small())
    with pytest.raises(GraphOptError, match=r"got Tensor; for one tensor x pass \(x,\)"):
        graphopt.load(Small(), torch.ones(2, 4))  # type: ignore[arg-type]
    with pytest.raises(GraphOptError, match=r"fit forward\(x\), but missing a required argument: 'x'"):
        graphopt.load(Small(), ())


def test_a_module_without_tensor_results_is_refused() -> None:
    class Empty(nn.Module):
        def forward(self, x: torch.Tensor) -> None:
            return None

    with pytest.raises(GraphOptError, match="expected Empty to return tensors"):
        graphopt.load(Empty(), (torch.ones(2),))


def test_transformers_is_not_imported_for_other_modules() -> None:
    loaded = "transformers" in sys.modules
    graphopt.load(Small().eval(), (torch.randn(2, 4),))
    assert ("transformers" in sys.modules) == loaded


def laid_out_otherwise(x: torch.Tensor) -> torch.Tensor:
    """The same values with the strides of another order of the axes."""
    return x.permute(2, 1, 0).contiguous().permute(2, 1, 0)


def test_no_operator_insists_on_strides() -> None:
    """What a pass puts in place of a value may lie otherwise in memory."""

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x).view(x.shape[0], -1) + 1

    x = torch.randn(2, 3, 4)
    graph = graphopt.load(Model(), (x,)).copy()
    relu = next(n for n in graph.nodes if "relu" in str(n.target))
    with graph.fx.inserting_after(relu):
        turned = graph.fx.call_function(laid_out_otherwise, (relu,))
    relu.replace_all_uses_with(turned, delete_user_cb=lambda user: user is not turned)
    graph.module.recompile()
    torch.testing.assert_close(graph.execute(x)[0], Model()(x), rtol=0, atol=0)
