"""Tensors that are not what they say: sizes, types, values."""

import numpy as np
import onnx
from onnx import TensorProto as P
from onnx import helper

from .registry import EITHER, LOADS, adding, attack, float_value, parsed


@attack("negative dimension", dims=[-1])
@attack("negative dimension", dims=[-(1 << 63), 1])
@attack("negative dimension", dims=[-2, -2])
@attack("needs .* bytes|holds", dims=[5])
@attack("needs .* bytes|holds", dims=[1 << 40])
@attack("needs .* bytes|holds", dims=[1 << 31, 1 << 31])
@attack("overflow", dims=[1 << 62, 1 << 62, 1 << 62])
@attack("overflow", dims=[(1 << 63) - 1, 2])
@attack("overflow", dims=[1 << 32, 1 << 32, 0])
@attack("overflow", dims=[2] * 100_000)
@attack("needs .* bytes|holds", dims=[3])
@attack("needs .* bytes|holds", dims=[0])
@attack("needs .* bytes|holds", dims=[])
@attack(LOADS, dims=[1, 2, 2, 1])
@attack(EITHER, dims=[1] * 1000 + [4])
def dims_of_raw_data(dims):
    return adding(P(name="w", data_type=P.FLOAT, dims=dims, raw_data=bytes(16)))


@attack("expected 4 entries", data_type=P.FLOAT, field="float_data", count=3)
@attack("expected 4 entries", data_type=P.FLOAT, field="float_data", count=5)
@attack("expected 4 entries", data_type=P.FLOAT, field="float_data", count=0)
@attack("float_data or raw_data alone", data_type=P.FLOAT, field="int32_data", count=4)
@attack("double_data or raw_data alone", data_type=P.DOUBLE, field="float_data", count=4)
@attack("expected 8 entries", data_type=P.COMPLEX64, field="float_data", count=4)
@attack("expected 2 entries", data_type=P.INT4, field="int32_data", count=4)
@attack("expected 1 entries", data_type=P.UINT2, field="int32_data", count=4)
@attack("uint64_data or raw_data alone", data_type=P.UINT32, field="int32_data", count=4)
@attack("string_data or raw_data alone", data_type=P.STRING, field="int32_data", count=4)
def typed_data(data_type, field, count):
    tensor = P(name="w", data_type=data_type, dims=[4])
    getattr(tensor, field).extend([1] * count)
    return adding(tensor)


@attack(EITHER, data_type=P.INT8)
@attack(EITHER, data_type=P.UINT8)
@attack(EITHER, data_type=P.BOOL)
@attack(EITHER, data_type=P.FLOAT16)
@attack(EITHER, data_type=P.BFLOAT16)
@attack(EITHER, data_type=P.FLOAT8E4M3FN)
@attack(EITHER, data_type=P.UINT4)
@attack(EITHER, data_type=P.INT2)
@attack(EITHER, data_type=P.FLOAT4E2M1)
@attack(EITHER, data_type=P.FLOAT6E2M3)
def entries_out_of_range(data_type):
    return adding(P(name="w", data_type=data_type, dims=[1], int32_data=[-(1 << 31)]))


@attack(EITHER)
def unsigned_entries_out_of_range():
    return adding(P(name="w", data_type=P.UINT32, dims=[2], uint64_data=[(1 << 64) - 1, 1 << 32]))


@attack("expected an ONNX element type", code=0)
@attack("expected an ONNX element type", code=9999)
@attack("expected an ONNX element type", code=-1)
@attack("expected an ONNX element type", code=(1 << 31) - 1)
def element_type(code):
    return adding(P(name="w", data_type=code, dims=[4], raw_data=bytes(16)))


@attack("alone")
def two_kinds_of_data():
    return adding(P(name="w", data_type=P.FLOAT, dims=[4], raw_data=bytes(16), float_data=[1.0] * 4))


@attack("one segment")
def a_segment():
    tensor = P(name="w", data_type=P.FLOAT, dims=[4], raw_data=bytes(16))
    tensor.segment.begin, tensor.segment.end = 0, 1 << 62
    return adding(tensor)


@attack(EITHER, values=[b"\xff\xfe", b"a\0b"])
@attack(EITHER, values=[b"\xed\xb2\x80", b"\xf0\x9f\x98\x80"])
@attack(EITHER, values=[b"x" * 5_000_000, b"\0" * 1_000_000])
def strings(values):
    model = parsed("g (int64 i) => (string y) { y = Gather(w, i) }")
    model.graph.initializer.append(P(name="w", data_type=P.STRING, dims=[len(values)], string_data=values))
    return model


@attack("alone")
def strings_as_bytes():
    return adding(P(name="w", data_type=P.STRING, dims=[2], raw_data=bytes(16)))


def sparse(dims, indices, count=2, shape=None):
    """y = x + s, where s is stored sparsely."""
    model = parsed("g (float[4] x) => (float[4] y) { y = Add(x, s) }")
    proto = onnx.SparseTensorProto(dims=dims)
    proto.values.CopyFrom(helper.make_tensor("s", P.FLOAT, [count], [1.0] * count))
    proto.indices.CopyFrom(helper.make_tensor("", P.INT64, shape or [len(indices)], indices))
    model.graph.sparse_initializer.append(proto)
    return model


@attack(LOADS, dims=[4], indices=[0, 3])
@attack("index|indices", dims=[4], indices=[0, 4])
@attack("index|indices", dims=[4], indices=[0, 1 << 62])
@attack("index|indices", dims=[4], indices=[-1, 3])
@attack("index|indices", dims=[4], indices=[-(1 << 63), 3])
@attack(EITHER, dims=[4], indices=[3, 0])
@attack(EITHER, dims=[4], indices=[1, 1])
@attack("index|indices", dims=[0], indices=[0, 1])
@attack("negative dimension", dims=[-4], indices=[0, 1])
@attack("overflow", dims=[1 << 40, 1 << 40], indices=[0, 1])
@attack("store them densely", dims=[1 << 33], indices=[0, 1])
@attack("store them densely", dims=[1 << 30], indices=[0, 1])
@attack("one index per value", dims=[4], indices=[0])
@attack("one index per value", dims=[4], indices=[0, 1, 2])
def sparse_initialiser(dims, indices):
    return sparse(dims, indices)


@attack(LOADS, indices=[0, 0, 1, 1])
@attack("index|indices", indices=[0, 0, 1, 2])
@attack("index|indices", indices=[0, 0, 2, 1])
@attack("index|indices", indices=[0, 3, 1, 1])
@attack("index|indices", indices=[0, 0, -1, 1])
def sparse_of_two_axes(indices):
    model = sparse([2, 2], indices, shape=[2, 2])
    model.graph.node[0].op_type = "Sub"
    return model


@attack("store them densely")
def many_sparse_tensors():
    model = sparse([1 << 26], [0, 1])
    for i in range(40):
        model.graph.sparse_initializer.append(model.graph.sparse_initializer[0])
        model.graph.sparse_initializer[-1].values.name = f"s{i}"
    return model


@attack("numbers with indices", kind="strings")
@attack("numbers with indices", kind="float indices")
@attack("one index per value", kind="matrix of values")
def sparse_parts(kind):
    model = sparse([4], [0, 1])
    proto = model.graph.sparse_initializer[0]
    if kind == "strings":
        proto.values.CopyFrom(helper.make_tensor("s", P.STRING, [2], ["a", "b"]))
    elif kind == "float indices":
        proto.indices.CopyFrom(helper.make_tensor("", P.FLOAT, [2], [0.0, 1.0]))
    else:
        proto.values.CopyFrom(helper.make_tensor("s", P.FLOAT, [2, 1], [0.0, 1.0]))
    return model


@attack("negative dimension", value="tensor")
@attack("index|indices", value="sparse")
@attack("expected an ONNX element type", value="type")
@attack("found their values in|hold a value of its type", value="nothing")
def constant_node(value):
    attribute = onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR)
    if value == "tensor":
        attribute.t.CopyFrom(P(data_type=P.FLOAT, dims=[-4], raw_data=bytes(16)))
    elif value == "type":
        attribute.t.CopyFrom(P(data_type=77, dims=[4], raw_data=bytes(16)))
    elif value == "sparse":
        attribute.name, attribute.type = "sparse_value", onnx.AttributeProto.SPARSE_TENSOR
        attribute.sparse_tensor.CopyFrom(sparse([4], [5, 6]).graph.sparse_initializer[0])
    model = adding()
    del model.graph.initializer[:]
    model.graph.node.insert(0, onnx.NodeProto(op_type="Constant", output=["w"], attribute=[attribute]))
    return model


@attack(EITHER, dims=[1 << 62, 1 << 62])
@attack(EITHER, dims=[-5, 4])
@attack(EITHER, dims=[1 << 33])
@attack(EITHER, dims=[1] * 2000)
@attack(EITHER, dims=["a" * 100_000, "__import__('os').system('touch dim-was-run')", "x*0//0", "", "1e999"])
def declared_dims(dims):
    model = parsed("g (float[4] x) => (float[4] y) { y = Add(x, x) }")
    model.graph.input[0].CopyFrom(float_value("x", *dims))
    model.graph.output[0].CopyFrom(float_value("y", *dims))
    model.graph.value_info.append(float_value("x", *dims))
    return model


@attack("expected an element type", code=9999, nested=False)
@attack("expected an element type", code=-7, nested=True)
@attack(LOADS, code=0, nested=False)
def declared_type(code, nested):
    model = parsed("g (float[4] x) => (float[4] y) { y = Identity(x) }")
    kind = model.graph.input[0].type
    if nested:
        kind = kind.sequence_type.elem_type.optional_type.elem_type
    kind.tensor_type.elem_type = code
    return model


@attack(LOADS)
def no_declared_types():
    model = parsed("g (float[4] x) => (float[4] y) { y = Identity(x) }")
    for value in (*model.graph.input, *model.graph.output):
        value.ClearField("type")
    return model


@attack("values .* in|entries|holds|needs", data_type=P.INT4, size=1)
@attack("values .* in|entries|holds|needs", data_type=P.FLOAT16, size=7)
@attack("values .* in|entries|holds|needs", data_type=P.BFLOAT16, size=9)
@attack("values .* in|entries|holds|needs", data_type=P.FLOAT8E5M2, size=3)
@attack("values .* in|entries|holds|needs", data_type=P.UINT2, size=2)
@attack("values .* in|entries|holds|needs", data_type=P.FLOAT4E2M1, size=0)
@attack("values .* in|entries|holds|needs", data_type=P.BOOL, size=5)
def raw_data_of_another_length(data_type, size):
    return adding(P(name="w", data_type=data_type, dims=[4], raw_data=bytes(size)))


@attack(LOADS)
def booleans_that_are_neither():
    model = parsed("g (float[4] x) => (float[4] y) { y = Where(w, x, x) }")
    model.graph.initializer.append(P(name="w", data_type=P.BOOL, dims=[4], raw_data=bytes([0, 1, 2, 255])))
    return model


@attack(LOADS)
def numbers_that_are_none():
    tensor = onnx.numpy_helper.from_array(np.array([np.nan, np.inf, -np.inf, 1e-45], np.float32), "w")
    return adding(tensor)
