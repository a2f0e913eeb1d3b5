"""fx writes graphs as Python source: nothing that a file says may become code in it."""

import ast
import inspect

import onnx
import pytest
import torch

import graphopt
from graphopt import GraphOptError
from graphopt.dialect import table

from .attack_names import CODE
from .attacks import ATTACKS

NAMED = [name for name in ATTACKS if name.startswith(("code_as_name", "text_attributes"))]


@pytest.fixture
def graph(request, tmp_path):
    return graphopt.load(ATTACKS[request.param].make(tmp_path))


def sources(module):
    """The source of a graph module and of all inside it."""
    for inner in module.modules():
        if isinstance(inner, torch.fx.GraphModule):
            inner.recompile()
            yield inner.code


@pytest.mark.parametrize("graph", NAMED, indirect=True)
def test_source_is_assignments_and_calls_only(graph):
    """Whatever the names are, the source has one form: calls of known functions on local values and constants."""
    seen = 0
    for code in sources(graph.module):
        tree = ast.parse(code)
        (function,) = (s for s in tree.body if not isinstance(s, ast.ImportFrom))
        assert isinstance(function, ast.FunctionDef)
        assert function.name == "forward"
        local = {argument.arg for argument in function.args.args}
        assert len(local) == len(function.args.args)
        for statement in function.body:
            assert isinstance(statement, (ast.Assign, ast.Return)), ast.dump(statement)
            for node in ast.walk(statement):
                if isinstance(node, ast.Call):
                    check_call(node)
                else:
                    assert isinstance(node, ALLOWED), ast.dump(node)
            seen += 1
    assert seen > len(graph.outputs)


ALLOWED = (
    ast.Assign, ast.Return, ast.Name, ast.Attribute, ast.Constant, ast.Tuple, ast.List, ast.keyword, ast.Subscript,
    ast.Load, ast.Store, ast.UnaryOp, ast.USub, ast.expr_context,
)  # fmt: skip


def check_call(node):
    """A dialect function by its mangled name, a module of the graph, or `getattr` with a constant name."""
    if isinstance(node.func, ast.Name) and node.func.id == "getattr":
        _, name = node.args
        assert isinstance(name, ast.Constant)
        return
    if isinstance(node.func, ast.Name):
        assert node.func.id.startswith("graphopt_"), ast.dump(node)
        return
    assert isinstance(node.func, ast.Attribute), ast.dump(node)
    assert isinstance(node.func.value, ast.Name)
    assert node.func.value.id == "self"


@pytest.mark.parametrize("graph", NAMED, indirect=True)
def test_no_code_runs(graph, tmp_path, monkeypatch):
    """Neither when the source is compiled nor when it is run."""
    monkeypatch.chdir(tmp_path)
    values = [torch.zeros([d if isinstance(d, int) else 4 for d in spec.shape]) for spec in graph.inputs]
    for _ in sources(graph.module):
        pass
    for run in (graph.module, graph.execute, graph.copy().module, graph.to_module()):
        try:
            run(*values)
        except (GraphOptError, NotImplementedError):
            continue  # operators that exist nowhere, and attributes that mean nothing
    assert not list(tmp_path.glob("*-was-run"))


def test_names_are_told_apart(tmp_path):
    """Weights whose names differ only in what identifiers cannot hold keep their own values."""
    graph = onnx.GraphProto(name="g", input=[onnx.helper.make_tensor_value_info("x", 1, [1])])
    for i, name in enumerate(CODE):
        graph.initializer.append(onnx.helper.make_tensor(name, 1, [1], [float(i)]))
        graph.node.add(op_type="Add", input=["x", name], output=[f"y{i}"])
        graph.output.append(onnx.helper.make_tensor_value_info(f"y{i}", 1, [1]))
    model = onnx.ModelProto(ir_version=8, graph=graph, opset_import=[onnx.helper.make_opsetid("", 17)])
    onnx.save(model, tmp_path / "model.onnx")
    loaded = graphopt.load(tmp_path / "model.onnx")
    expected = [float(i) for i in range(len(CODE))]
    for run in (loaded.execute, loaded.module, loaded.to_module()):
        assert [value.item() for value in run(torch.zeros(1))] == expected


def test_no_dialect_function_takes_arbitrary_keywords():
    """fx writes the names of keyword arguments as they are; they come from the file, and must be parameters."""
    for entry in table():
        for parameter in inspect.signature(entry.function).parameters.values():
            assert parameter.kind is not parameter.VAR_KEYWORD, entry.name
            assert parameter.name.isidentifier()
