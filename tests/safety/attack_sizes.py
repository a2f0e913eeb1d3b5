"""Small files that ask for much: memory, time."""

import onnx
from onnx import TensorProto as P
from onnx import helper

from .registry import EITHER, LOADS, attack, float_value, parsed

HUGE = 1 << 40


@attack(EITHER, text="y = ConstantOfShape(n)")
@attack(EITHER, text="y = ConstantOfShape<value: tensor = float[1] {1}>(n)")
@attack(EITHER, text="y = Expand(one, n)")
@attack(EITHER, text="a = Expand(one, n) y = Mul(a, a)")
@attack(EITHER, text="y = Tile(one, n)")
@attack(EITHER, text="y = Range(zero, end, step)")
@attack(EITHER, text="y = Range(zero, end, tiny)")
@attack(EITHER, text="y = Range(zero, end, zero)")
@attack(EITHER, text="d = Unsqueeze(end, axis) v = Cast<to = 1>(d) y = OneHot(axis, d, two)")
@attack(EITHER, text="m = Concat<axis = 0>(n, n) a = ConstantOfShape(m) y = EyeLike(a)")
@attack(EITHER, text="y = RandomNormal<shape = [1048576, 1048576]>()")
@attack(EITHER, text="m = Concat<axis = 0>(axis, n) y = Pad(one, m)")
@attack(EITHER, text="s = Cast<to = 1>(n) y = Resize(one, , s)")
@attack(EITHER, text="y = Resize(one, , , n)")
@attack(EITHER, text="a = Expand(one, m) b = Transpose(a) c = Reshape(a, n) y = MatMul(b, c)")
@attack(EITHER, text="y = BlackmanWindow(end)")
@attack(EITHER, text="y = HannWindow(end)")
@attack(EITHER, text="y = MelWeightMatrix(end, end, end, zero, end)")
@attack(EITHER, text="a = ConstantOfShape(m) y = NonZero(a)")
@attack(EITHER, text="a = ConstantOfShape(n) y = CumSum(a, zero)")
@attack(EITHER, text="y = CenterCropPad(one, n)")
@attack(EITHER, text="y = SplitToSequence(one, axis)")
@attack(EITHER, text="a = Expand(one, n) s = Shape(a) y = Cast<to = 1>(s)")
@attack(EITHER, text="a = Expand(one, n) b = Add(a, x) s = Shape(b) y = Cast<to = 1>(s)")
def constant_of_a_huge_size(text):
    """Values that constant folding could compute, and should not."""
    model = parsed(
        "g (float[1] x) => (float[N] y) "
        f"<int64[1] n = {{{HUGE}}}, int64[1] m = {{{HUGE // 16}}}, int64[1] axis = {{0}}, float[1] one = {{1}}, "
        f"int64 end = {{{HUGE}}}, int64 zero = {{0}}, int64 step = {{1}}, float tiny = {{1e-40}}, "
        "float[2] two = {0, 1}> "
        f"{{ {text} }}"
    )
    return model


@attack(EITHER, text="d = Shape(x) e = Mul(d, n) y = ConstantOfShape(e)")
@attack(EITHER, text="d = Shape(x) e = Mul(d, n) y = Expand(x, e)")
@attack(EITHER, text="d = Shape(x) e = Mul(d, n) y = Tile(x, e)")
@attack(EITHER, text="a = Expand(x, n) b = Exp(a) y = Add(b, b)")
@attack(EITHER, text="a = Unsqueeze(x, n) y = Relu(a)")
@attack(EITHER, text="a = Expand(x, n) b = Reshape(a, p) c = Transpose(b) d = MatMul(b, c) y = ReduceSum(d)")
def value_of_a_huge_size(text):
    """Values that depend on the input, for the runs that passes and finders make on their own."""
    return parsed(
        f"g (float[1] x) => (float[N] y) <int64[1] n = {{{HUGE}}}, int64[2] p = {{-1, 1048576}}> {{ {text} }}"
    )


LOOP = """
    g (float[4] x) => (float[4] y) <int64 trips = TRIPS, bool yes = {1}, float[4] start = {1, 2, 3, 4}> {
        y = Loop(MOST, yes, STATE) <body = b (int64 i, bool c, float[4] s) => (bool k, float[4] t) {
            k = Identity(c)
            t = Add(s, STEP)
        }>
    }
"""


@attack(LOADS, trips=(1 << 63) - 1, most="trips", state="x", step="s", stages="load save inspect")
@attack(LOADS, trips=(1 << 63) - 1, most="trips", state="start", step="s")
@attack(LOADS, trips=1, most="", state="x", step="x", stages="load save inspect")
@attack(LOADS, trips=1, most="", state="start", step="start", stages="load save inspect")
@attack(LOADS, trips=-1, most="trips", state="x", step="x")
@attack(LOADS, trips=1, most="trips", state="x", step="x")
def loop(trips, most, state, step):
    text = LOOP.replace("TRIPS", f"{{{trips}}}").replace("MOST", most).replace("STATE", state).replace("STEP", step)
    return parsed(text)


@attack(LOADS, where="loop")
@attack(LOADS, where="branch", stages="load save inspect")
@attack(LOADS, where="function")
def loop_inside(where):
    """An endless loop where only a recursive look finds it."""
    endless = parsed(
        LOOP.replace("TRIPS", f"{{{(1 << 63) - 1}}}")
        .replace("MOST", "trips")
        .replace("STATE", "x")
        .replace("STEP", "s")
    )
    body = onnx.GraphProto(name="b", node=endless.graph.node, initializer=endless.graph.initializer)
    model = parsed("g (float[4] x, bool c) => (float[4] y) { }")
    if where == "function":
        constants = [helper.make_node("Constant", [], [t.name], value=t) for t in endless.graph.initializer]
        nodes = [*constants, *endless.graph.node]
        model.functions.append(helper.make_function("local", "F", ["x"], ["y"], nodes, model.opset_import))
        model.graph.node.append(helper.make_node("F", ["x"], ["y"], domain="local"))
        return model
    if where == "branch":
        body.node[0].output[0] = "z"
        body.output.append(float_value("z", 4))
        model.graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body))
        return model
    body.input.extend(endless.graph.node[0].attribute[0].g.input)
    body.input[0].name, body.input[1].name, body.input[2].name = "j", "d", "q"
    body.node[0].output[0] = "z"
    body.node.add(op_type="Identity", input=["d"], output=["keep"])
    body.output.extend([helper.make_tensor_value_info("keep", P.BOOL, []), float_value("z", 4)])
    model.graph.node.append(helper.make_node("Loop", ["", "c", "x"], ["y"], body=body))
    return model


@attack(LOADS, length=1 << 20)
def scan(length):
    """A body that runs a million times on an input of four values."""
    model = parsed(f"g (float[4] x) => (float[4] y) <int64[2] n = {{{length}, 4}}> {{ a = Expand(x, n) }}")
    body = parsed("b (float[4] s, float[4] v) => (float[4] t) { t = Add(s, v) }").graph
    model.graph.node.append(helper.make_node("Scan", ["x", "a"], ["y"], body=body, num_scan_inputs=1))
    return model


@attack(LOADS, op="Relu", count=100_000, stages="load")
@attack(LOADS, op="Unheard", count=1_000)
def chain(op, count):
    graph = onnx.GraphProto(name="g", input=[float_value("v0", 4)], output=[float_value(f"v{count}", 4)])
    domain = "" if op == "Relu" else "com.example"
    graph.node.extend(
        onnx.NodeProto(op_type=op, domain=domain, input=[f"v{i}"], output=[f"v{i + 1}"]) for i in range(count)
    )
    return onnx.ModelProto(
        ir_version=8, graph=graph, opset_import=[helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    )


@attack(LOADS)
def chain_in_reverse_order():
    model = chain("Relu", 2_000)
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


@attack(LOADS, dots=False)
@attack(LOADS, dots=True)
def many_weights(dots):
    graph = onnx.GraphProto(name="g", output=[float_value("y", 1)])
    names = [f"layer.{i}.weight" if dots else f"w{i}" for i in range(1_000)]
    graph.initializer.extend(P(name=name, data_type=1, dims=[1], raw_data=bytes(4)) for name in names)
    graph.node.add(op_type="Sum", input=names, output=["y"])
    return onnx.ModelProto(ir_version=8, graph=graph, opset_import=[helper.make_opsetid("", 17)])


@attack(LOADS, place="weights")
@attack(LOADS, place="values")
def names_that_collide(place):
    """Names that are all the same once only letters are left."""
    graph = onnx.GraphProto(name="g", input=[float_value("x", 1)], output=[float_value("y", 1)])
    names = ["".join("+-!?"[i >> k & 3] for k in range(0, 12, 2)) for i in range(1_500)]
    if place == "weights":
        graph.initializer.extend(P(name=name, data_type=1, dims=[1], raw_data=bytes(4)) for name in names)
    else:
        graph.node.extend(onnx.NodeProto(op_type="Relu", input=["x"], output=[name]) for name in names)
    graph.node.add(op_type="Sum", input=names, output=["y"])
    return onnx.ModelProto(ir_version=8, graph=graph, opset_import=[helper.make_opsetid("", 17)])


@attack(LOADS, user="Unheard")
@attack(LOADS, user="F")
def one_weight_for_many(user):
    """A constant of four megabytes in 300 places."""
    tensor = helper.make_tensor("w", P.FLOAT, [1 << 20], bytes(1 << 22), raw=True)
    model = parsed("g (float[4] x) => (float[4] y) { y = Relu(x) }", "")
    if user == "F":
        body = [helper.make_node("Constant", [], ["w"], value=tensor), helper.make_node("Add", ["a", "w"], ["b"])]
        model.functions.append(helper.make_function("local", "F", ["a"], ["b"], body, model.opset_import))
    else:
        model.graph.initializer.append(tensor)
    for i in range(300):
        inputs = ["x"] if user == "F" else ["x", "w"]
        model.graph.node.add(op_type=user, domain="local", input=inputs, output=[f"u{i}"])
    return model


@attack(EITHER)
def many_functions_and_calls():
    model = parsed("g (float[4] x) => (float[4] y) { y = Relu(x) }")
    for i in range(300):
        body = [helper.make_node("Relu", ["a"], ["b"])]
        model.functions.append(helper.make_function("local", f"F{i}", ["a"], ["b"], body, model.opset_import))
        model.graph.node.add(op_type=f"F{i}", domain="local", input=["x"], output=[f"f{i}"])
        model.graph.node.add(op_type=f"U{i}", domain="com.example", input=["x"], output=[f"u{i}"])
    return model


@attack(LOADS)
def many_bodies():
    """Branches that all capture the same names, side by side and inside each other."""
    model = parsed("g (float[4] x, bool c) => (float[4] y) { y = Relu(x) }")
    body = parsed("b () => (float[4] t) { t = Relu(x) }").graph
    for _ in range(6):
        inner = onnx.GraphProto(name="b", output=[float_value("t", 4)])
        for k in range(4):
            name = "t" if k == 3 else f"t{k}"
            inner.node.append(helper.make_node("If", ["c"], [name], then_branch=body, else_branch=body))
        if inner.ByteSize() > 100_000:
            break
        body = inner
    model.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=body, else_branch=body))
    return model


@attack(EITHER)
def rank_of_thousands():
    model = parsed("g (float[4] x) => (y) { y = Reshape(x, w) z = Transpose(y) s = ReduceSum(y) q = Squeeze(y) }")
    model.graph.initializer.append(helper.make_tensor("w", P.INT64, [5000], [4] + [1] * 4999))
    return model


@attack(EITHER)
def sum_of_many():
    """An operator with 30,000 inputs."""
    model = parsed("g (float[4] x) => (float[4] y) { y = Sum(x) }")
    model.graph.node[0].input.extend(["x"] * 30_000)
    return model


@attack(EITHER, ends="x")
def doubling(ends):
    """Concat of a value with itself, forty times over."""
    nodes = " ".join(f"v{i + 1} = Concat<axis = 0>(v{i}, v{i})" for i in range(40))
    return parsed(f"g (float[4] v0) => (float[N] y) {{ {nodes} y = Relu(v40) }}")


@attack(EITHER, stages="load cleanup")
def doubling_of_a_constant():
    nodes = " ".join(f"v{i + 1} = Concat<axis = 0>(v{i}, v{i})" for i in range(40))
    return parsed(f"g (float[4] x) => (float[N] y) <float[4] v0 = {{1, 2, 3, 4}}> {{ {nodes} y = Add(x, v40) }}")


@attack(EITHER)
def symbolic_arithmetic():
    """Sizes that grow with each node, for whoever computes with symbols."""
    nodes = " ".join(f"s{i + 1} = Mul(s{i}, s{i}) " for i in range(60))
    return parsed(f"g (float[A, B] x) => (y) {{ s0 = Shape(x) {nodes} y = Cast<to = 1>(s60) }}")


@attack(EITHER)
def symbolic_sums():
    nodes = " ".join(f"v{i + 1} = Concat<axis = {i % 2}>(v{i}, x)" for i in range(60))
    return parsed(f"g (float[A, B] x) => (y) {{ v0 = Relu(x) {nodes} y = Relu(v60) }}")


@attack(EITHER)
def regular_expression():
    """A pattern that takes exponential time where it is matched by backtracking."""
    model = parsed(
        'g (float[1] x) => (bool[1] y) { s = Constant<value_strings = ["TEXT"]>() '
        'y = RegexFullMatch<pattern = "(a*)*b">(s) }'
    )
    model.opset_import[0].version = 20
    model.graph.node[0].attribute[0].strings[0] = b"a" * 60
    return model


@attack(LOADS, op="EyeLike", domain="")
@attack(LOADS, op="RegexFullMatch", domain="")
@attack(LOADS, op="LabelEncoder", domain="ai.onnx.ml")
@attack(LOADS, op="TreeEnsemble", domain="ai.onnx.ml")
def type_that_nobody_knows(op, domain):
    """Operators for which onnx's own shape inference reads the type of an input that has none."""
    graph = onnx.GraphProto(name="g", input=[float_value("x", 2, 2)], output=[onnx.ValueInfoProto(name="y")])
    graph.node.add(op_type="Unheard", domain="com.example", input=["x"], output=["u"])
    node = graph.node.add(op_type=op, domain=domain, input=["u"], output=["y"])
    if op == "TreeEnsemble":
        required = ("nodes_splits", "nodes_modes", "leaf_weights")
        node.attribute.extend(helper.make_attribute(name, helper.make_tensor(name, 1, [1], [0.0])) for name in required)
        names = ("nodes_featureids", "nodes_truenodeids", "nodes_trueleafs", "nodes_falsenodeids", "nodes_falseleafs")
        node.attribute.extend(helper.make_attribute(name, [0]) for name in (*names, "leaf_targetids", "tree_roots"))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 5), helper.make_opsetid("com.example", 1)]
    return onnx.ModelProto(ir_version=8, graph=graph, opset_import=opsets)


@attack("expected an index", op="LayerNormalization", axis=1 << 31)
@attack("expected an index", op="LayerNormalization", axis=-(1 << 63))
@attack("expected an index", op="Scan", axis=(1 << 31) - 1)
def index_of_more_than_32_bits(op, axis):
    """Numbers that onnx and onnxruntime cut before they check them."""
    model = parsed(f"g (float[2, 2] x) => (y) {{ y = {op}(x, x) }}")
    name = "num_scan_inputs" if op == "Scan" else "axis"
    model.graph.node[0].attribute.append(helper.make_attribute(name, axis))
    if op == "Scan":
        body = parsed("b (float[2] s, float[2] v) => (float[2] t) { t = Add(s, v) }").graph
        model.graph.node[0].attribute.append(helper.make_attribute("body", body))
    return model
