"""Graphs that are none: nodes, attributes, names, functions, opsets."""

import onnx
from onnx import AttributeProto as A
from onnx import helper

from .registry import EITHER, LOADS, adding, attack, float_value, parsed

CODE = (
    "__class__", "forward", "self", "class", "None", "lambda", "import os", "x y", "x_y", "x-y", "x.y", "0", "_", ".",
    "..", "a..b", "a.class.b", "graph", "code", "meta", "_code", "recompile", "_modules", "_parameters", "training",
    "T_destination", "__init__", "__dict__", "weight.forward", "inf", "nan", "torch", "device", "fx_pytree", "print",
    'x")', "x')", 'x"]', "x\nimport os", "x\r\nimport os", "x\\", "x\\\\", "x\\n", "#", "{x}", "%s", "\u2028", "\x00",
    "\x1b[2J", "\N{RIGHT-TO-LEFT OVERRIDE}x", "\N{MICRO SIGN}", "\N{LATIN SMALL LIGATURE FI}", "größe", "x\N{COMBINING ACUTE ACCENT}",
    'x") or open("code-was-run", "w") or getattr(self, "x', "x\nopen('code-was-run', 'w')\n", "x): open('code-was-run', 'w') #",
    'x")\nopen("code-was-run", "w")\nself = ("', "x = open('code-was-run', 'w')", "x; open('code-was-run', 'w')",
    "'''\nopen('code-was-run', 'w')\n'''", '"""\nopen("code-was-run", "w")\n"""', "{open('code-was-run', 'w')}", "\\\nopen('code-was-run', 'w')",
)  # fmt: skip


@attack(LOADS, place="input")
@attack(LOADS, place="weight")
@attack(LOADS, place="value")
@attack(LOADS, place="output")
@attack(LOADS, place="node")
@attack(EITHER, place="operator")
@attack(EITHER, place="domain")
@attack(EITHER, place="attribute")
@attack(LOADS, place="text")
@attack(EITHER, place="dim")
@attack(EITHER, place="function")
@attack(LOADS, place="graph")
def code_as_name(place):
    """Names that would be code where someone puts them into code."""
    graph = onnx.GraphProto(name="g")
    names = [f"{place}{i}" for i in range(len(CODE))]
    use = CODE if place != "graph" else names
    inputs = use if place == "input" else ["x"]
    graph.input.extend(float_value(name, 4) for name in inputs)
    for i, name in enumerate(use):
        given = [name if place in ("input", "weight") else "x"]
        node = graph.node.add(op_type="Relu", input=given, output=[f"y{i}"], name=f"n{i}")
        if place == "weight":
            graph.initializer.append(helper.make_tensor(name, 1, [4], [0.0] * 4))
        elif place in ("value", "output"):
            node.output[0] = name
        elif place == "node":
            node.name = name
        elif place in ("operator", "domain"):
            node.op_type = name
            node.domain = "com.example" if place == "operator" else name
        elif place == "attribute":
            node.attribute.append(helper.make_attribute(name, 1.0))
        elif place == "text":
            graph.node.add(op_type="Constant", output=[f"t{i}"]).attribute.append(
                helper.make_attribute("value_string", name)
            )
        elif place == "function":
            node.op_type, node.domain = name, "local"
        result = name if place == "output" else "z" if place == "value" else node.output[0]
        if place != "value":
            graph.output.append(float_value(result, 4))
        if place == "dim":
            graph.output[-1].type.tensor_type.shape.dim[0].dim_param = name
            graph.input[0].type.tensor_type.shape.dim[0].dim_param = name
    if place == "value":
        graph.node.add(op_type="Sum", input=CODE, output=["z"])
        graph.output.append(float_value("z", 4))
    model = onnx.ModelProto(ir_version=8, graph=graph, opset_import=[helper.make_opsetid("", 17)])
    if place == "graph":
        model.graph.name = model.producer_name = model.doc_string = "\n".join(CODE)
        for name in CODE:
            model.metadata_props.add(key=name, value=name)
    if place == "function":
        body = [helper.make_node("Relu", ["a"], ["b"])]
        for name in CODE:
            model.functions.append(helper.make_function("local", name, ["a"], ["b"], body, model.opset_import))
    return model


@attack(LOADS)
def text_attributes_as_code():
    """Strings, infinities and NaNs as attributes of operators that fx writes into source."""
    graph = onnx.GraphProto(name="g")
    graph.input.append(float_value("x", 1, 1, 4, 4))
    for i, text in enumerate(("bilinear\n", 'linear"), open("code-was-run", "w"), ("', "\udc80", "nearest\\", "nearest")):
        node = graph.node.add(op_type="Resize", input=["x", "", "s"], output=[f"y{i}"])
        node.attribute.append(A(name="mode", type=A.STRING, s=text.encode(errors="surrogateescape")))
        graph.output.append(float_value(f"y{i}"))
    for i, value in enumerate(("nan", "inf", "-inf", "-0.0", "1e-45")):
        graph.node.add(op_type="LeakyRelu", input=["x"], output=[f"z{i}"]).attribute.append(
            helper.make_attribute("alpha", float(value))
        )
        graph.output.append(float_value(f"z{i}", 1, 1, 4, 4))
    graph.initializer.append(helper.make_tensor("s", 1, [4], [1.0, 1.0, 2.0, 2.0]))
    return onnx.ModelProto(ir_version=8, graph=graph, opset_import=[helper.make_opsetid("", 17)])


@attack(LOADS, place="weight")
@attack(LOADS, place="value")
@attack(LOADS, place="input")
@attack(LOADS, place="dots")
@attack(LOADS, place="node")
@attack(EITHER, place="operator")
def name_of_a_million_letters(place):
    name = "n" * 1_000_000 if place != "dots" else ".".join("ab" * 250_000)
    model = adding()
    node, graph = model.graph.node[0], model.graph
    if place in ("weight", "dots"):
        graph.initializer[0].name = node.input[1] = name
    elif place == "input":
        graph.input[0].name = node.input[0] = name
    elif place == "value":
        graph.output[0].name = node.output[0] = name
    elif place == "node":
        node.name = name
    else:
        node.op_type, node.domain = name, name
    return model


@attack("UTF-8", field="node name")
@attack("UTF-8", field="input")
@attack("UTF-8", field="operator")
@attack("UTF-8", field="domain")
@attack("UTF-8", field="attribute")
@attack("UTF-8", field="weight")
@attack("UTF-8", field="producer")
@attack("UTF-8", field="opset")
@attack("UTF-8", field="dim")
def name_in_another_encoding(field):
    model, name = adding(), "ENCODED!"
    node = model.graph.node[0]
    if field == "node name":
        node.name = name
    elif field == "input":
        node.input[0] = model.graph.input[0].name = name
    elif field == "operator":
        node.op_type = name
    elif field == "domain":
        node.domain = name
    elif field == "attribute":
        node.attribute.append(helper.make_attribute(name, 1))
    elif field == "weight":
        node.input[1] = model.graph.initializer[0].name = name
    elif field == "producer":
        model.producer_name = name
    elif field == "opset":
        model.opset_import.add(domain=name, version=1)
    else:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = name
    return model.SerializeToString().replace(name.encode(), b"\xff\xfe\xc0\x80abcd")


@attack("cycle", nodes="a = Add(x, b) b = Add(x, a) y = Add(a, b)")
@attack("cycle|defines", nodes="y = Add(x, y)")
@attack("cycle|defines", nodes="a = If(c) <then_branch = g () => (float[4] t) { t = Add(x, a) }, else_branch = h () => (float[4] e) { e = Relu(x) }> y = Relu(a) c = Less(x, x)")
@attack("nothing in the model defines it", nodes="y = Add(x, nowhere)")
@attack("nothing in the model defines it", nodes="z = Relu(x)")
@attack("defined more than once", nodes="y = Relu(x) y = Sigmoid(x)")
@attack("defined more than once", nodes="x = Relu(x) y = Sigmoid(x)")
@attack("defined more than once", nodes="a, a = Split(x) y = Concat<axis = 0>(a, a)")
@attack(LOADS, nodes="a = Relu(b) b = Relu(x) y = Relu(a)")
def nodes(nodes):
    return parsed(f"g (float[4] x) => (float[4] y) {{ {nodes} }}")


@attack("nothing in the model defines it", place="output")
@attack("name of its own", place="inputs")
@attack("name of its own", place="weights")
@attack("has no name", place="nameless output")
@attack("name of its own|has no name", place="nameless input")
@attack("no operator type", place="operator")
@attack(EITHER, place="outputs of a node")
@attack(EITHER, place="all outputs")
@attack(EITHER, place="inputs of a node")
@attack(EITHER, place="outputs twice")
@attack(EITHER, place="no nodes")
@attack("nothing in the model defines it", place="empty")
@attack("defined more than once", place="weight and value")
@attack(EITHER, place="many outputs")
@attack(EITHER, place="nameless outputs")
def odd(place):
    model = adding()
    graph = model.graph
    if place == "output":
        graph.output.append(float_value("nowhere", 4))
    elif place == "inputs":
        graph.input.append(graph.input[0])
    elif place == "weights":
        graph.initializer.append(graph.initializer[0])
    elif place == "nameless output":
        graph.output[0].name = ""
    elif place == "nameless input":
        graph.input.append(float_value("", 4))
    elif place == "operator":
        graph.node[0].op_type = ""
    elif place == "outputs of a node":
        graph.node.add(op_type="Relu", input=["x"])
    elif place == "all outputs":
        del graph.output[:]
    elif place == "inputs of a node":
        graph.node.add(op_type="Add", output=["z"])
    elif place == "outputs twice":
        graph.output.append(graph.output[0])
    elif place == "no nodes":
        del graph.node[:]
        graph.output[0].name = "x"
    elif place == "empty":
        del graph.node[:], graph.input[:], graph.initializer[:]
    elif place == "weight and value":
        graph.node.add(op_type="Relu", input=["x"], output=["w"])
    elif place == "many outputs":
        graph.node.add(op_type="Relu", input=["x"], output=[f"o{i}" for i in range(50_000)])
    else:
        graph.node.add(op_type="Split", input=["x"], output=[""] * 50_000)
    return model


@attack("to be of type INTS", operator="Transpose", name="perm", value=1.5)
@attack("to be of type INTS", operator="Transpose", name="perm", value="0")
@attack("to be of type INT, ", operator="Cast", name="to", value="1")
@attack("to be of type GRAPH", operator="If", name="then_branch", value=1)
@attack("expected attribute 'to'", operator="Cast", name="saturate", value=1)
@attack("expected attribute 'axis'", operator="Concat", name="", value=None)
@attack("expected attribute 'body'", operator="Loop", name="", value=None)
@attack("no name of its own", operator="Relu", name="", value=1)
@attack(EITHER, operator="Relu", name="unheard_of", value=1)
@attack(EITHER, operator="Transpose", name="perm", value=[0, 0])
@attack(EITHER, operator="Transpose", name="perm", value=[(1 << 63) - 1])
@attack(EITHER, operator="Transpose", name="perm", value=[-1])
@attack(EITHER, operator="Softmax", name="axis", value=-(1 << 63))
@attack(EITHER, operator="Flatten", name="axis", value=99)
@attack(EITHER, operator="Cast", name="to", value=9999)
@attack(EITHER, operator="Cast", name="to", value=0)
@attack(EITHER, operator="Split", name="axis", value=1)
@attack(EITHER, operator="Shape", name="start", value=-(1 << 63))
@attack(EITHER, operator="DepthToSpace", name="blocksize", value=0)
@attack(EITHER, operator="SpaceToDepth", name="blocksize", value=-3)
@attack(EITHER, operator="LRN", name="size", value=1 << 40)
@attack(EITHER, operator="EyeLike", name="k", value=1 << 62)
@attack(EITHER, operator="HannWindow", name="output_datatype", value=-1)
@attack(EITHER, operator="RandomNormal", name="shape", value=[1 << 40, 1 << 40])
@attack(EITHER, operator="RandomUniform", name="shape", value=[1 << 34])
@attack(EITHER, operator="LpPool", name="kernel_shape", value=[1 << 60])
@attack(EITHER, operator="ArgMax", name="axis", value=7)
def attribute(operator, name, value):
    model = parsed(f"g (float[2, 2] x) => (y) {{ y = {operator}(x) }}")
    if operator.startswith("Random"):
        del model.graph.node[0].input[:]
    if value is not None:
        field = helper.make_attribute(name or "alpha", value)
        field.name = name
        model.graph.node[0].attribute.append(field)
    return model


@attack("hold a value of its type", kind="no type")
@attack("hold a value of its type", kind="unknown type")
@attack("hold a value of its type", kind="another field")
@attack("hold a value of its type", kind="hidden graph")
@attack("hold a value of its type", kind="no tensor")
@attack("outside of a function", kind="reference")
@attack("no name of its own", kind="twice")
def attribute_field(kind):
    model = adding()
    node = model.graph.node.add(op_type="Unheard", domain="com.example", input=["x"], output=["z"])
    field = node.attribute.add(name="a", type=A.INT, i=1)
    if kind == "no type":
        field.ClearField("type")
    elif kind == "unknown type":
        field.type = 0
    elif kind == "another field":
        field.f = 1.0
    elif kind == "hidden graph":
        field.g.CopyFrom(adding().graph)
    elif kind == "no tensor":
        field.ClearField("i")
        field.type = A.TENSOR
    elif kind == "reference":
        field.ClearField("i")
        field.ref_attr_name = "b"
    else:
        node.attribute.append(field)
    return model


@attack("one attribute", count=0)
@attack("one attribute", count=2)
@attack("one attribute|output", count=1, outputs=0)
@attack("one attribute|output", count=1, outputs=2)
def constant(count, outputs=1):
    model = adding()
    node = model.graph.node.add(op_type="Constant", output=[f"c{i}" for i in range(outputs)])
    node.attribute.extend([helper.make_attribute("value_int", 1), helper.make_attribute("value_float", 1.0)][:count])
    return model


@attack("opset version of 1 or more", version=0)
@attack("opset version of 1 or more", version=-(1 << 63))
@attack(EITHER, version=1)
@attack(EITHER, version=99)
@attack(EITHER, version=(1 << 63) - 1)
def opset(version):
    model = adding()
    model.opset_import[0].version = version
    return model


@attack("opset version", kind="contradiction")
@attack(EITHER, kind="none")
@attack(EITHER, kind="unused")
def opsets(kind):
    model = adding()
    if kind == "contradiction":
        model.opset_import.add(domain="ai.onnx", version=9)
    elif kind == "none":
        del model.opset_import[:]
    else:
        for i in range(100_000):
            model.opset_import.add(domain=f"d{i}", version=i + 1)
    return model


CALL = "g (float[4] x) => (float[4] y) { y = local.F(x) }"
_HEAD = '<domain: "local", opset_import: ["": 17, "local": 1]>'


@attack("calls itself", bodies=["F (a) => (b) { b = local.F(a) }"])
@attack("calls itself", bodies=["F (a) => (b) { b = local.G(a) }", "G (a) => (b) { b = local.F(a) }"])
@attack("calls itself", bodies=["G (a) => (b) { b = local.G(a) }", "F (a) => (b) { b = Relu(a) }"])
@attack("calls itself", bodies=["F (a) => (b) { c = Less(a, a) b = If(c) <then_branch = g () => (t) { t = local.F(a) }, else_branch = h () => (e) { e = Relu(a) }> }"])
@attack("same name", bodies=["F (a) => (b) { b = Relu(a) }", "F (a) => (b) { b = Neg(a) }"])
@attack("name of its own", bodies=["F (a, a) => (b) { b = Relu(a) }"])
@attack(EITHER, bodies=["F () => (b) { b = Constant<value_int = 1>() }"])
@attack(EITHER, bodies=["F (a) => (b, c, d) { b = Relu(a) }"])
@attack(EITHER, bodies=["F (a) => (a) { }"])
@attack(EITHER, bodies=["F (a) => (b) { b = Relu(nowhere) }"])
@attack(EITHER, bodies=["F (a, b, c) => (d) { d = Sum(a, b, c) }"])
@attack(EITHER, bodies=["F <missing> (a) => (b) { b = LeakyRelu<alpha: float = @missing>(a) }"])
def functions(bodies):
    return parsed(CALL, "\n".join(_HEAD + body for body in bodies))


@attack("unfold", levels=60, calls=2)
@attack("unfold", levels=7, calls=10)
@attack("unfold", levels=5000, calls=2)
@attack("calls deep|calls; inline", levels=5000, calls=1)
@attack(EITHER, levels=40, calls=1)
@attack(EITHER, levels=13, calls=2)
def functions_that_multiply(levels, calls):
    model = parsed(CALL)
    for level in range(levels):
        target, domain = (f"F{level + 1}", "local") if level + 1 < levels else ("Neg", "")
        body = [helper.make_node(target, [f"a{i}"], [f"a{i + 1}"], domain=domain) for i in range(calls)]
        name = f"F{level}" if level else "F"
        function = helper.make_function("local", name, ["a0"], [f"a{calls}"], body, model.opset_import)
        model.functions.append(function)
    return model


def _field(number: int, content: bytes) -> bytes:
    size, encoded = len(content), b""
    while size > 127:
        encoded, size = encoded + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + encoded + bytes([size]) + content


@attack(LOADS, depth=8)
@attack(LOADS, depth=32)
@attack("does not parse", depth=40)
@attack("does not parse", depth=2000)
def bodies_in_bodies(depth):
    """If inside If inside If, in wire format: protobuf builds what it would not parse."""
    output = _field(12, float_value("o", 4).SerializeToString())
    inner = leaf = _field(1, helper.make_node("Relu", ["x"], ["o"]).SerializeToString()) + _field(2, b"g") + output
    for _ in range(depth):
        node = helper.make_node("If", ["c"], ["o"]).SerializeToString()
        for name, branch in ((b"then_branch", inner), (b"else_branch", leaf)):
            node += _field(5, _field(1, name) + _field(6, branch) + bytes([160, 1, A.GRAPH]))
        inner = _field(1, node) + _field(2, b"g") + output
    head = onnx.ModelProto(ir_version=8, opset_import=[helper.make_opsetid("", 17)]).SerializeToString()
    values = (float_value("x", 4), helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []))
    return head + _field(7, inner + b"".join(_field(11, value.SerializeToString()) for value in values))


@attack(LOADS)
def training_info():
    model = adding()
    training = model.training_info.add()
    training.algorithm.CopyFrom(parsed("g (float[4] x) => (float[4] w2) { w2 = Neg(x) }").graph)
    training.update_binding.add(key="w", value="w2")
    training.initialization_binding.add(key="nowhere", value="neither")
    return model


@attack(LOADS)
def metadata_of_many_bytes():
    model = adding()
    model.metadata_props.add(key="k" * 1_000_000, value="v" * 30_000_000)
    for i in range(100_000):
        model.metadata_props.add(key=str(i), value="")
    return model


@attack(LOADS)
def unknown_fields():
    """Fields of a later protobuf are kept."""
    return adding().SerializeToString() + b"\xa2\x1f\x04abcd"
