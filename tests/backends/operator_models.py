"""Models of one operator of ours, lowered: through a site of an .onnx file, or through torch's exporter."""

import numpy as np
import onnx
import torch

import graphopt
import graphopt.ops  # registers torch.ops.graphopt
from graphopt.backends.onnxruntime import Session
from graphopt.rewrite.splice import splice
from graphopt.sites.base import Site

TYPES = {torch.float16: "float16", torch.float32: "float", torch.float64: "double"}


class Call(torch.nn.Module):
    """One call; where it gives several values, they come back flat, one behind the other."""

    def __init__(self, name, names, joined, **options):
        super().__init__()
        self.name, self.names, self.joined, self.options = name, names, joined, options

    def forward(self, *values):
        found = getattr(torch.ops.graphopt, self.name)(**dict(zip(self.names, values, strict=True)), **self.options)
        if not self.joined:
            return found
        return torch.cat([found[0].to(self.joined).flatten(), found[1].flatten()])


class Lowered:
    """The operator in onnxruntime, and `expected` in torch."""

    def __init__(self, path, module, names, target):
        self.model = onnx.load(path)
        # Contrib operators have no schema there, so that what they give has no type.
        onnx.checker.check_model(self.model, full_check=target == "onnx")
        self.session, self.module, self.names = Session(path), module, names

    def compare(self, given, *, rtol=1e-5, atol=1e-5, expected=None):
        """The same values as the reference, which computes in the same type but adds up in another order."""
        values = [given[n] for n in self.names]
        found = self.session.run({n: given[n].numpy() for n in self.names})
        expected = self.module(*values) if expected is None else expected
        expected = expected if isinstance(expected, tuple) else (expected,)
        for a, b in zip(found.values(), expected, strict=True):
            assert a.dtype == b.numpy().dtype
            np.testing.assert_allclose(a, b.numpy(), rtol=rtol, atol=atol)


def lower(tmp_path, name, given, *, target="onnx", opset=17, tuple_of=None, **options):
    """Through a site: `given` are example values by name, `tuple_of` the wide type of an operator with two outputs."""
    names = list(given)
    types = ", ".join(f"{TYPES[x.dtype]}[{','.join(f'd{n}_{i}' for i in range(4))}] {n}" for n, x in given.items())
    result = f"{TYPES[tuple_of or given['v'].dtype]}[{'count' if tuple_of else 'b,h,t,d'}]"
    text = f'<ir_version: 8, opset_import: ["": {opset}]> g ({types}) => ({result} y) {{ y = Max({", ".join(names)}) }}'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    graph = graphopt.load(tmp_path / "m.onnx")
    (node,) = [n for n in graph.nodes if n.op == "call_function"]
    module = Call(name, names, tuple_of, **options)
    splice(graph, Site("s", node, (node,), tuple(node.args)), module, "graphopt.s", tuple(given.values()))
    graph.save(tmp_path / "out.onnx", target=target)
    return Lowered(tmp_path / "out.onnx", module, names, target)


def export(tmp_path, name, given, dynamic, *, target="onnx", **options):
    """Through torch's exporter; `dynamic` names the sizes that vary, by operand and axis."""
    names = list(given)
    module = Call(name, names, None, **options)
    dims = {d: torch.export.Dim(d, min=1) for axes in dynamic.values() for d in axes.values()}
    shapes = tuple({i: dims[d] for i, d in dynamic.get(n, {}).items()} or None for n in names)
    program = torch.export.export(module, tuple(given.values()), dynamic_shapes=(shapes,))
    graphopt.load(program).save(tmp_path / "out.onnx", target=target)
    lowered = Lowered(tmp_path / "out.onnx", module, names, target)
    lowered.names = [i.name for i in lowered.session.raw.get_inputs()]
    return lowered, dict(zip(lowered.names, names, strict=True))
