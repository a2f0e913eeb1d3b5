"""Types and shapes of what bodies capture: the file need not declare them, the scope around a body knows them."""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch
from torch import fx

from graphopt.graph import Dim, Graph, ValueSpec
from graphopt.shapes.infer import Shapes, shapes_of
from graphopt.subgraphs import SubgraphOperator


def describe_captured(graph: Graph) -> None:
    """Fill in the specs of captured inputs, in bodies at any depth, that declare no type or shape; in place."""
    shapes: Shapes | None = None
    for node in graph.nodes:
        operator = graph.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(operator, SubgraphOperator) or operator.is_call:
            continue
        outer = dict(zip(operator.captured, node.args[len(operator.proto.input) :], strict=True))
        for name, body in operator.bodies.items():
            if any(_is_open(spec) for spec in body.inputs if spec.name in body.captured):
                shapes = shapes_of(graph) if shapes is None else shapes
                inputs = [
                    _described(spec, outer[spec.name], shapes) if spec.name in body.captured else spec
                    for spec in body.inputs
                ]
                operator.redescribe(name, replace(body, inputs=tuple(inputs)))
            describe_captured(operator.bodies[name])


def _is_open(spec: ValueSpec) -> bool:
    return spec.dtype is None or spec.shape is None


def _described(spec: ValueSpec, node: object, shapes: Shapes) -> ValueSpec:
    if not _is_open(spec) or not isinstance(node, fx.Node):
        return spec
    shape, dtype = shapes.shape(node), shapes.dtype(node)
    if shape is None or not isinstance(dtype, torch.dtype):
        return spec
    return ValueSpec(spec.name, dtype, tuple(_dim(size) for size in shape))


def _dim(size: sympy.Expr) -> Dim:
    return int(size) if size.is_Integer else str(size)
