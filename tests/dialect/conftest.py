"""One com.microsoft node, run by onnxruntime and by its torch function."""

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from graphopt.dialect import lookup

DOMAIN = "com.microsoft"
CODES = {
    torch.float16: TensorProto.FLOAT16,
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int16: TensorProto.INT16,
    torch.int8: TensorProto.INT8,
    torch.uint16: TensorProto.UINT16,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
    torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN,
    torch.float8_e5m2: TensorProto.FLOAT8E5M2,
}
PACKED = {TensorProto.INT4: ml_dtypes.int4, TensorProto.UINT4: ml_dtypes.uint4}
CARRIERS = {TensorProto.INT4: TensorProto.INT8, TensorProto.UINT4: TensorProto.UINT8}


class Contrib:
    """Nodes of one domain; `types` gives the element type of an input where its carrier has another."""

    def onnxruntime(
        self,
        name: str,
        inputs: Sequence[Tensor | None],
        outputs: int = 1,
        types: dict[int, int] | None = None,
        constant: Sequence[int] = (),
        declared: dict[int, int] | None = None,
        **options: Any,
    ) -> list[np.ndarray]:
        """The node as it stands: no optimiser may replace it, and one thread splits nothing among several.

        `constant` inputs become initialisers. `declared` gives the element types of outputs that cannot be inferred.
        """
        types, declared = types or {}, declared or {}
        names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
        results = [f"y{i}" for i in range(outputs)]
        nodes = [helper.make_node(name, names, results, domain=DOMAIN, **options)]
        for i in (i for i, code in declared.items() if code in PACKED):
            # Arrays of 4 bits do not leave onnxruntime.
            nodes.append(helper.make_node("Cast", [results[i]], [f"wide{i}"], to=CARRIERS[declared[i]]))
            results[i] = f"wide{i}"
        fed, stored, feeds = [], [], {}
        for i, (label, x) in enumerate(zip(names, inputs, strict=True)):
            if x is None:
                continue
            code = types.get(i, CODES[x.dtype])
            if code in PACKED:
                stored.append(numpy_helper.from_array(x.numpy().astype(PACKED[code]), label))
            elif x.dtype.itemsize == 1 and x.dtype.is_floating_point:
                stored.append(helper.make_tensor(label, code, x.shape, x.view(torch.uint8).numpy().tobytes(), raw=True))
            elif i in constant:
                stored.append(numpy_helper.from_array(x.numpy(), label))
            else:
                fed.append(helper.make_tensor_value_info(label, code, x.shape))
                feeds[label] = x.numpy()
        shown = [
            helper.make_tensor_value_info(label, CARRIERS.get(declared[i], declared[i]), None)
            if i in declared
            else helper.make_empty_tensor_value_info(label)
            for i, label in enumerate(results)
        ]
        graph = helper.make_graph(nodes, "one", fed, shown, stored)
        imports = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        settings = onnxruntime.SessionOptions()
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.intra_op_num_threads = 1
        settings.log_severity_level = 4
        session = onnxruntime.InferenceSession(model.SerializeToString(), settings, ["CPUExecutionProvider"])
        return session.run(None, feeds)

    def torch(
        self,
        name: str,
        inputs: Sequence[Tensor | None],
        outputs: int = 1,
        types: dict[int, int] | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """The torch function, called as a graph calls it."""
        entry = lookup(DOMAIN, name, 1)
        keywords: dict[str, Any] = {"outputs": outputs} if entry.counted else {}
        if entry.typed:
            codes = [0 if x is None else CODES[x.dtype] for x in inputs]
            keywords["types"] = tuple((types or {}).get(i, code) for i, code in enumerate(codes))
        result = entry.function(*inputs, **options, **keywords)
        return list(result[:outputs]) if isinstance(result, tuple) else [result]

    def compare(
        self,
        name: str,
        inputs: Sequence[Tensor | None],
        outputs: int = 1,
        *,
        rtol: float = 0.0,
        atol: float = 0.0,
        constant: Sequence[int] = (),
        declared: dict[int, int] | None = None,
        types: dict[int, int] | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """Assert the same types, shapes and values; return what the torch function gave."""
        before = [None if x is None else x.clone() for x in inputs]
        wanted = self.onnxruntime(name, inputs, outputs, types, constant, declared, **options)
        found = self.torch(name, inputs, outputs, types, **options)
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine.numpy().dtype == theirs.dtype
            assert mine.shape == theirs.shape
            # As wide numbers: a difference of unsigned ones would wrap around.
            np.testing.assert_allclose(mine.numpy().astype(np.float64), theirs.astype(np.float64), rtol, atol)
        for x, kept in zip(inputs, before, strict=True):
            assert x is None or torch.equal(x, kept)
        return found


@pytest.fixture(scope="session")
def contrib() -> Contrib:
    """Runs nodes of com.microsoft."""
    return Contrib()
