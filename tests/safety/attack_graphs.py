"""Graphs that are none: nodes, attributes, names, functions, opsets."""

from onnx import AttributeProto as A
from onnx import helper

from .registry import EITHER, LOADS, adding, attack, float_value, parsed

_BRANCHES = "then_branch = g () => (t) { t = Add(x, a) }, else_branch = h () => (e) { e = Relu(x) }"


@attack("cycle", nodes="a = Add(x, b) b = Add(x, a) y = Add(a, b)")
@attack("cycle|defines", nodes="y = Add(x, y)")
@attack("cycle|defines", nodes=f"c = Less(x, x) a = If(c) <{_BRANCHES}> y = Relu(a)")
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
@attack("expected 2 inputs", place="inputs of a node")
@attack("is not optional", place="hole among the inputs")
@attack("is not optional", place="hole among the outputs")
@attack("expected no inputs", place="inputs of a constant")
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
    elif place == "hole among the inputs":
        graph.node.add(op_type="RegexFullMatch", input=[""], output=["z"])
        model.opset_import[0].version = 20
    elif place == "hole among the outputs":
        graph.node.add(op_type="Relu", input=["x"], output=[""])
    elif place == "inputs of a constant":
        node = graph.node.add(op_type="Constant", input=["x"], output=["c"])
        node.attribute.append(helper.make_attribute("value_int", 1))
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
        graph.node.add(op_type="Relu", input=["x"], output=[f"o{i}" for i in range(2_000)])
    else:
        graph.node.add(op_type="Split", input=["x"], output=[""] * 2_000)
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
        for i in range(20_000):
            model.opset_import.add(domain=f"d{i}", version=i + 1)
    return model


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
    for i in range(20_000):
        model.metadata_props.add(key=str(i), value="")
    return model


@attack(LOADS)
def unknown_fields():
    """Fields of a later protobuf are kept."""
    return adding().SerializeToString() + b"\xa2\x1f\x04abcd"
