"""Names that are code, too long, or no text."""

import onnx
from onnx import AttributeProto as A
from onnx import helper

from .registry import EITHER, LOADS, adding, attack, float_value

RUN = "open('code-was-run', 'w')"
CODE = (
    "__class__", "forward", "self", "class", "None", "lambda", "import os", "x y", "x_y", "x-y", "x.y", "0", "_", ".",
    "..", "a..b", "a.class.b", "graph", "code", "meta", "_code", "recompile", "_modules", "_parameters", "training",
    "T_destination", "__init__", "__dict__", "weight.forward", "inf", "nan", "torch", "device", "fx_pytree", "print",
    'x")', "x')", 'x"]', "x\nimport os", "x\r\nimport os", "x\\", "x\\\\", "x\\n", "#", "{x}", "%s", "\u2028", "\x00",
    "\x1b[2J", "\N{RIGHT-TO-LEFT OVERRIDE}x", "\N{MICRO SIGN}", "\N{LATIN SMALL LIGATURE FI}", "größe",
    "x\N{COMBINING ACUTE ACCENT}", f'x") or {RUN} or getattr(self, "x', f"x\n{RUN}\n", f"x): {RUN} #",
    f'x")\n{RUN}\nself = ("', f"x = {RUN}", f"x; {RUN}", f"'''\n{RUN}\n'''", f'"""\n{RUN}\n"""', f"{{{RUN}}}",
    f"\\\n{RUN}",
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
    for i, text in enumerate(
        ("bilinear\n", 'linear"), open("code-was-run", "w"), ("', "\udc80", "nearest\\", "nearest")
    ):
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
