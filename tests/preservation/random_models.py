"""Random valid models with nested scopes: branches, loops, scans, functions, shadowed and captured names.

All operators round alike everywhere, so two runtimes have to agree in every bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

FULL, ROW, NUMBER = ("N", 4), (4,), ()
"""Shapes of values, from the widest to the narrowest; any two broadcast to the wider one."""
UNARY = ("Neg", "Abs", "Relu", "Floor", "Identity", "LeakyRelu")
BINARY = ("Add", "Sub", "Mul", "Max", "Min")
DEEPEST = 3
OPSET = 21

Values = dict[str, tuple[Any, ...]]


@dataclass
class Function:
    """A model-local function and how many outputs it has."""

    proto: onnx.FunctionProto
    has_condition: bool


@dataclass
class Scope:
    """One graph in the making."""

    maker: Maker
    visible: Values
    depth: int
    in_function: bool = False
    conditions: list[str] = field(default_factory=list)
    nodes: list[NodeProto] = field(default_factory=list)
    weights: list[TensorProto] = field(default_factory=list)

    def value(self, shape: tuple[Any, ...] | None = None) -> str:
        """A visible value, of one shape if it has to be."""
        return self.maker.rng.choice([n for n, s in self.visible.items() if shape in (None, s)])

    def add(self, op_type: str, inputs: list[str], shape: tuple[Any, ...], **attributes: Any) -> str:
        """A node with one output."""
        output = self.maker.fresh("v")
        node = onnx.helper.make_node(op_type, inputs, [output], **attributes)
        if self.maker.rng.random() < 0.3:
            node.name = f"{op_type} {output}"
        self.nodes.append(node)
        self.visible[output] = shape
        return output

    def store(self, name: str, value: np.ndarray[Any, Any]) -> str:
        """A weight: an initialiser, or a Constant node, which a function cannot do without."""
        tensor = onnx.numpy_helper.from_array(value, name)
        if self.in_function or self.maker.rng.random() < 0.3:
            self.nodes.append(onnx.helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.weights.append(tensor)
        return name


class Maker:
    """Makes one model out of random choices."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.functions: list[Function] = []
        self._count = 0

    def fresh(self, stem: str) -> str:
        """A name that no scope around has; bodies of one node count from the same number on."""
        self._count += 1
        return f"{stem}{self._count}"

    def model(self) -> ModelProto:
        """The model: x [N, 4], c bool -> y [N, 4] and perhaps more."""
        for index in range(self.rng.randrange(3)):
            self.functions.append(self._function(index))
        scope = Scope(self, {"x": FULL}, 0, conditions=["c"])
        self._weights(scope)
        self._steps(scope, self.rng.randint(2, 5))
        inputs = [_info("x", FULL), onnx.helper.make_tensor_value_info("c", TensorProto.BOOL, [])]
        made = [name for node in scope.nodes if node.op_type != "Constant" for name in node.output]
        wide = [name for name in dict.fromkeys(made) if scope.visible.get(name) == FULL]
        if not wide:
            wide = [scope.add("Add", ["x", "x"], FULL)]
        chosen = dict.fromkeys([wide[-1], self.rng.choice(wide)])
        graph = onnx.helper.make_graph(
            scope.nodes, "main", inputs, [_info(name, FULL) for name in chosen], scope.weights
        )
        opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("own", 1)]
        functions = [each.proto for each in self.functions]
        return onnx.helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)

    def _weights(self, scope: Scope) -> None:
        outer = [name for name in scope.visible if name.startswith("w")]
        for _ in range(self.rng.randrange(3)):
            shape = self.rng.choice((ROW, NUMBER))
            # Few values, so that some are neutral and some are equal.
            value = np.float32(self.rng.choice((0.0, 1.0, 0.5, -2.0))) * np.ones(shape, np.float32)
            # Shape inference wants a shadowed name to have one shape.
            shadowed = [name for name in outer if scope.visible[name] == shape and not scope.in_function]
            if shadowed and self.rng.random() < 0.3:
                name = self.rng.choice(shadowed)
                outer.remove(name)
                scope.weights.append(onnx.numpy_helper.from_array(value, name))
            else:
                name = scope.store(self.fresh("w"), value)
            scope.visible[name] = shape
        if self.rng.random() < 0.4:
            flag = scope.store(self.fresh("b"), np.array(self.rng.random() < 0.5))
            scope.conditions.append(flag)

    def _steps(self, scope: Scope, count: int) -> None:
        for _ in range(count):
            kinds = ["unary", "binary", "binary", "needless"]
            if scope.depth < DEEPEST:
                kinds += ["If"] if scope.in_function else ["If", "If", "Loop", "Scan"]
            kinds += ["call"] * bool(self.functions)
            getattr(self, f"_{self.rng.choice(kinds).lower()}")(scope)

    def _unary(self, scope: Scope) -> None:
        given, op_type = scope.value(), self.rng.choice(UNARY)
        attributes = {"alpha": 0.25} if op_type == "LeakyRelu" else {}
        scope.add(op_type, [given], scope.visible[given], **attributes)
        if attributes and scope.in_function and self.rng.random() < 0.7:
            scope.nodes[-1].attribute[0].CopyFrom(
                AttributeProto(name="alpha", type=AttributeProto.FLOAT, ref_attr_name="slope")
            )

    def _binary(self, scope: Scope) -> None:
        inputs = [scope.value(), scope.value()]
        scope.add(self.rng.choice(BINARY), inputs, max((scope.visible[i] for i in inputs), key=len))

    def _needless(self, scope: Scope) -> None:
        given = scope.value()
        shape = scope.visible[given]
        inner = scope.add("Neg", [given], shape)
        scope.add("Neg", [inner], shape)

    def _call(self, scope: Scope) -> None:
        function = self.rng.choice(self.functions)
        inputs = [scope.value()]
        shape = scope.visible[inputs[0]]
        if function.has_condition:
            inputs.append(self._condition(scope))
        if shape == NUMBER:  # what a function adds to it may be a row
            return
        attributes = {"slope": self.rng.choice((0.5, 0.125))} if self.rng.random() < 0.5 else {}
        outputs = [self.fresh("v") for _ in function.proto.output]
        scope.nodes.append(onnx.helper.make_node(function.proto.name, inputs, outputs, domain="own", **attributes))
        scope.visible.update(dict.fromkeys(outputs, shape))

    def _condition(self, scope: Scope) -> str:
        if scope.conditions and self.rng.random() < 0.7:
            return self.rng.choice(scope.conditions)
        largest = self.fresh("m")
        scope.nodes.append(onnx.helper.make_node("ReduceMax", [scope.value()], [largest], keepdims=0))
        limit = scope.store(self.fresh("limit"), np.array(self.rng.choice((0.0, 1.0, 3.0)), np.float32))
        found = self.fresh("less")
        scope.nodes.append(onnx.helper.make_node("Less", [largest, limit], [found]))
        return found

    def _body(self, outer: Scope, visible: Values | None = None) -> Scope:
        scope = Scope(
            self,
            dict(outer.visible if visible is None else visible),
            outer.depth + 1,
            outer.in_function,
            list(outer.conditions),
        )
        self._weights(scope)
        self._steps(scope, self.rng.randint(1, 3))
        return scope

    def _result(self, scope: Scope, shape: tuple[Any, ...], like: str) -> ValueInfoProto:
        """An output of a body: made of one of its values so that it has the shape."""
        narrow = [n for n, s in scope.visible.items() if len(s) <= len(shape)]
        # The sum has the shape of `like`; a body may not return an outer value as it is.
        name = scope.add("Add", [like, self.rng.choice(narrow)], shape)
        # A function is called on values of several shapes.
        return onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None if scope.in_function else list(shape))

    def _if(self, scope: Scope) -> None:
        condition, like = self._condition(scope), scope.value()
        shape, count, start = scope.visible[like], self.rng.randint(1, 2), self._count
        ends, bodies = [], []
        for name in ("then", "else"):
            self._count = start
            inner = self._body(scope)
            outputs = [self._result(inner, shape, like) for _ in range(count)]
            bodies.append(onnx.helper.make_graph(inner.nodes, name, [], outputs, inner.weights))
            ends.append(self._count)
        # A weight that one branch shadows and the other reads is another one on onnxruntime.
        self._count = max(ends)
        self._unshadow(bodies)
        outputs = [self.fresh("v") for _ in range(count)]
        node = onnx.helper.make_node("If", [condition], outputs, then_branch=bodies[0], else_branch=bodies[1])
        scope.nodes.append(node)
        scope.visible.update(dict.fromkeys(outputs, shape))

    def _unshadow(self, bodies: list[GraphProto]) -> None:
        """Give weights of one branch alone names that no scope around has."""
        for body in bodies:
            for tensor in body.initializer:
                if not all(tensor.name in {t.name for t in other.initializer} for other in bodies):
                    _rename(body, tensor.name, self.fresh(f"{tensor.name}_"))

    def _loop(self, scope: Scope) -> None:
        state = scope.value()
        shape, start = scope.visible[state], self._count
        trips = scope.store(self.fresh("trips"), np.array(self.rng.randrange(4)))
        stacked = shape != FULL and self.rng.random() < 0.5
        inputs = [self.fresh("i"), self.fresh("go"), state if self.rng.random() < 0.3 else self.fresh("s")]
        visible = {**scope.visible, inputs[2]: shape}
        inner = self._body(scope, visible)
        inner.weights = [t for t in inner.weights if t.name != inputs[2]]  # no weight is an input of a body
        going = self.fresh("on")
        inner.nodes.append(onnx.helper.make_node("Identity", [inputs[1]], [going]))
        outputs = [self._result(inner, shape, inputs[2]) for _ in range(1 + stacked)]
        formal = [
            onnx.helper.make_tensor_value_info(inputs[0], TensorProto.INT64, []),
            onnx.helper.make_tensor_value_info(inputs[1], TensorProto.BOOL, []),
            _info(inputs[2], shape),
        ]
        going_info = onnx.helper.make_tensor_value_info(going, TensorProto.BOOL, [])
        body = onnx.helper.make_graph(inner.nodes, f"loop{start}", formal, [going_info, *outputs], inner.weights)
        results = [self.fresh("v") for _ in outputs]
        scope.nodes.append(onnx.helper.make_node("Loop", [trips, "", state], results, body=body))
        scope.visible[results[0]] = shape

    def _scan(self, scope: Scope) -> None:
        """Over the rows of a full value, with a row as its state."""
        rows, narrow = scope.value(FULL), [n for n, s in scope.visible.items() if s == ROW]
        if not narrow:
            return
        state, start = self.rng.choice(narrow), self._count
        formal = [self.fresh("t"), self.fresh("e")]
        inner = self._body(scope, {**scope.visible, formal[0]: ROW, formal[1]: ROW})
        outputs = [self._result(inner, ROW, formal[0]), self._result(inner, ROW, formal[1])]
        infos = [_info(name, ROW) for name in formal]
        body = onnx.helper.make_graph(inner.nodes, f"scan{start}", infos, outputs, inner.weights)
        results = [self.fresh("v"), self.fresh("v")]
        scope.nodes.append(onnx.helper.make_node("Scan", [state, rows], results, body=body, num_scan_inputs=1))
        scope.visible.update(zip(results, (ROW, FULL), strict=True))

    def _function(self, index: int) -> Function:
        """f(v, condition) of shape [..., 4]; its names are those of other scopes, too."""
        self._count = self.rng.randrange(3)
        has_condition = self.rng.random() < 0.5
        inputs = ["x", "c"] if has_condition else ["x"]
        scope = Scope(self, {"x": FULL}, 1, True, ["c"] if has_condition else [])
        self._weights(scope)
        self._steps(scope, self.rng.randint(1, 3))
        outputs = [self._result(scope, FULL, "x").name for _ in range(self.rng.randint(1, 2))]
        opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("own", 1)]
        proto = onnx.helper.make_function(
            "own",
            f"f{index}",
            inputs,
            outputs,
            scope.nodes,
            opsets,
            attribute_protos=[onnx.helper.make_attribute("slope", 0.25)],
        )
        return Function(proto, has_condition)


def _info(name: str, shape: tuple[Any, ...]) -> ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def _rename(graph: GraphProto, old: str, new: str) -> None:
    for tensor in graph.initializer:
        tensor.name = new if tensor.name == old else tensor.name
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH and old not in {t.name for t in attribute.g.initializer} | {
                i.name for i in attribute.g.input
            }:
                _rename(attribute.g, old, new)
