"""Mel filters, against onnxruntime and the published evaluator."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from graphopt.dialect import lookup

NAMES = ["num_mel_bins", "dft_length", "sample_rate", "lower_edge_hertz", "upper_edge_hertz"]
CODES = [TensorProto.INT64] * 3 + [TensorProto.FLOAT] * 2


def model(code: int) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("MelWeightMatrix", NAMES, ["y"], output_datatype=code)],
        "one",
        [helper.make_tensor_value_info(name, kind, []) for name, kind in zip(NAMES, CODES, strict=True)],
        [helper.make_tensor_value_info("y", code, None)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def feeds(bins: int, length: int, rate: int, low: float, high: float) -> dict[str, Any]:
    values = [*(np.int64(x) for x in (bins, length, rate)), *(np.float32(x) for x in (low, high))]
    return {name: np.asarray(value) for name, value in zip(NAMES, values, strict=True)}


@pytest.mark.parametrize(
    "code", [TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT32], ids=["float32", "float64", "int32"]
)
@pytest.mark.parametrize(
    "settings",
    [
        (8, 16, 8192, 0.0, 4096.0),
        (1, 64, 16000, 20.0, 7600.0),
        (40, 400, 16000, 0.0, 8000.0),
        (23, 511, 22050, 33.3, 9000.5),
        (80, 1024, 44100, 125.0, 7500.0),
        # More filters than bins: several have no extent.
        (64, 64, 16000, 0.0, 8000.0),
    ],
    ids=str,
)
def test_mel_filters(settings: tuple[Any, ...], code: int) -> None:
    given = feeds(*settings)
    entry = lookup("", "MelWeightMatrix", 17)
    found = entry.function(*(torch.from_numpy(given[name]) for name in NAMES), output_datatype=code).numpy()
    session = onnxruntime.InferenceSession(model(code).SerializeToString(), providers=["CPUExecutionProvider"])
    for wanted in (session.run(None, given)[0], ReferenceEvaluator(model(code)).run(None, given)[0]):
        assert found.dtype == wanted.dtype
        # One division of small integers, rounded in float32 or in float64.
        np.testing.assert_allclose(found, wanted, rtol=2**-23, atol=0)
    assert entry.values == (0, 1, 2, 3, 4)
