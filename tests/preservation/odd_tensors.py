"""Sparse tensors, element types, and where the bytes lie."""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto

from .odd import BOTH, BRANCHES, FLAT, FUNCTIONS, Odd, P, branch, one, parsed, several, sparse, tensor

# Sparse tensors.


@one
def sparse_initialiser() -> ModelProto:
    proto = parsed("g (float[N, 4] x) => (float[N, 4] y) { y = Mul(x, w) }")
    proto.graph.sparse_initializer.append(sparse("w"))
    return proto


@one
def sparse_initialiser_without_use() -> ModelProto:
    proto = parsed(FLAT)
    proto.graph.sparse_initializer.append(sparse("w"))
    return proto


@one
def sparse_initialiser_of_a_branch() -> Odd:
    proto = parsed(BRANCHES)
    branch(proto, 0).sparse_initializer.append(sparse("w"))
    branch(proto, 0).node[0].input[1] = "w"
    return Odd(proto, BOTH)


@one
def sparse_initialiser_used_in_a_branch_only() -> Odd:
    proto = parsed(BRANCHES)
    proto.graph.sparse_initializer.append(sparse("w"))
    branch(proto, 0).node[0].input[1] = "w"
    return Odd(proto, BOTH)


def _sparse_constant() -> NodeProto:
    node = NodeProto(op_type="Constant", output=["w"], name="sparse")
    node.attribute.add(name="sparse_value", type=AttributeProto.SPARSE_TENSOR).sparse_tensor.CopyFrom(sparse(""))
    return node


@one
def sparse_constant() -> ModelProto:
    proto = parsed("g (float[N, 4] x) => (float[N, 4] y) { h = Exp(x) y = Mul(h, w) }")
    proto.graph.node.insert(0, _sparse_constant())
    return proto


@one
def sparse_constant_used_in_a_branch_only() -> Odd:
    proto = parsed(BRANCHES)
    proto.graph.node.insert(1, _sparse_constant())
    branch(proto, 0).node[0].input[1] = "w"
    return Odd(proto, BOTH)


@one
def sparse_constant_of_a_function() -> Odd:
    proto = parsed(FUNCTIONS)
    proto.functions[1].node.insert(0, _sparse_constant())
    proto.functions[1].node[1].input[0] = "m"
    proto.functions[1].node.insert(1, onnx.helper.make_node("Mul", ["v", "w"], ["m"]))
    return Odd(proto, runs=False)  # onnxruntime 1.31 crashes on it, now and then


# Tensors.


@several
def element_types() -> Iterator[tuple[str, Odd]]:
    floats = {
        P.FLOAT16: np.float16, P.BFLOAT16: ml_dtypes.bfloat16, P.DOUBLE: np.float64,
        P.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn, P.FLOAT8E5M2: ml_dtypes.float8_e5m2,
        P.FLOAT8E4M3FNUZ: ml_dtypes.float8_e4m3fnuz,
        P.FLOAT8E5M2FNUZ: ml_dtypes.float8_e5m2fnuz, P.FLOAT4E2M1: ml_dtypes.float4_e2m1fn,
        P.FLOAT8E8M0: ml_dtypes.float8_e8m0fnu,
    }  # fmt: skip
    integers = {
        P.INT4: ml_dtypes.int4, P.UINT4: ml_dtypes.uint4, P.INT2: ml_dtypes.int2, P.UINT2: ml_dtypes.uint2,
        P.INT8: np.int8, P.UINT8: np.uint8, P.INT16: np.int16, P.UINT16: np.uint16,
        P.INT32: np.int32, P.UINT32: np.uint32, P.INT64: np.int64, P.UINT64: np.uint64, P.BOOL: np.bool_,
    }  # fmt: skip
    # No kernel of onnxruntime's CPU provider takes this one.
    unknown = {P.FLOAT4E2M1}
    for code, kind in (floats | integers).items():
        value = np.float32([1, 2, 1, 1]) if code in (P.FLOAT8E8M0, P.BOOL) else np.float32([1, 0, 1, 1])
        value = value.astype(kind)
        for packed in (True, False):
            stored = onnx.numpy_helper.from_array(value, "w")
            if not packed:
                stored = _typed(code, value)
            proto = parsed("g (float[N, 4] x) => (float[N, 4] y) { k = Cast<to = 1>(w) y = Mul(x, k) }", ir=12)
            proto.opset_import[0].version = 25 if code in (P.INT2, P.UINT2, P.FLOAT8E8M0) else 23
            proto.graph.initializer.append(stored)
            name = P.DataType.Name(code)
            yield f"{name} in {'raw_data' if packed else 'its own field'}", Odd(proto, runs=code not in unknown)


def _typed(code: int, value: Any) -> TensorProto:
    """The tensor with its values where they are as numbers."""
    flat = value.astype(np.float64) if code not in (P.UINT64, P.INT64) else value
    made = onnx.helper.make_tensor("w", code, value.shape, flat.tolist())
    assert not made.HasField("raw_data")
    return made


@one
def tensors_without_elements() -> ModelProto:
    proto = parsed("""g (float[N, 4] x) => (float[M, 4] y, float[0, 4] z) {
        y = Concat<axis = 0>(x, w) z = Identity(w) }""")
    proto.graph.initializer.append(TensorProto(name="w", data_type=P.FLOAT, dims=[0, 4]))
    proto.graph.initializer.append(TensorProto(name="v", data_type=P.FLOAT, dims=[0], raw_data=b""))
    return proto


@one
def scalars() -> ModelProto:
    proto = parsed("""g (float[N, 4] x) => (float[N, 4] y) <float half = {0.5}, float[1] two = {2}> {
        s = Constant<value_float = 3.0>() h = Mul(x, half) z = Div(h, two) y = Add(z, s) }""")
    assert not proto.graph.initializer[0].dims
    return proto


@one
def text_with_nul() -> ModelProto:
    proto = parsed("""g (float[N, 4] x) => (float[N, 4] y, string[3] s, string k) {
        k = Constant<value_string = "x">() s = Identity(t) y = Neg(x) }""")
    proto.graph.node[0].attribute[0].s = b"a\0b"
    texts = [b"a\0b", "größe\0".encode(), b""]
    proto.graph.initializer.append(TensorProto(name="t", data_type=P.STRING, dims=[3], string_data=texts))
    return proto


@one
def special_numbers() -> ModelProto:
    proto = parsed("g (float[N, 4] x) => (float[N, 4] y, float[4] z) { y = Min(x, w) z = Neg(w) }")
    bits = np.array([0x7FC00001, 0xFF800000, 0x80000000, 0x00000001], np.uint32)  # a NaN with a payload
    proto.graph.initializer.append(tensor("w", bits.view(np.float32)))
    return proto


@one
def external_data() -> Odd:
    proto = parsed("g (float[N, 4] x) => (float[N, 4] y) { h = Mul(x, w) y = Add(h, v) }")
    for name, offset in (("w", 16), ("v", 64)):
        stored = proto.graph.initializer.add(name=name, data_type=P.FLOAT, dims=[4], data_location=P.EXTERNAL)
        stored.doc_string = f"doc of {name}"
        keys = {"location": "odd weights.bin", "offset": offset, "length": 16, "checksum": "0123abcd"}
        for key, value in keys.items():
            stored.external_data.add(key=key, value=str(value))
    data = bytearray(b"\xff" * 80)
    data[16:32] = data[64:80] = np.float32([1, 2, 3, 4]).tobytes()
    return Odd(proto, files={"odd weights.bin": bytes(data)})


@one
def external_data_with_a_key_of_its_own() -> Odd:
    odd = external_data()
    assert isinstance(odd, Odd)
    odd.model.graph.initializer[0].external_data.add(key="größe", value="mine")
    return Odd(odd.model, files=odd.files, runs=False)


@one
def external_data_of_a_body_and_a_constant() -> Odd:
    proto = parsed(BRANCHES)
    stored = branch(proto, 0).initializer.add(name="w", data_type=P.FLOAT, dims=[4], data_location=P.EXTERNAL)
    stored.external_data.add(key="location", value="w.bin")  # neither offset nor length: the whole file
    branch(proto, 0).node[0].input[1] = "w"
    return Odd(proto, BOTH, files={"w.bin": np.float32([1, 2, 3, 4]).tobytes()})
