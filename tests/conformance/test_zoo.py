"""Real models run as a graph: the same outputs as on onnxruntime."""

import onnxruntime
import pytest

import graphopt
from graphopt.verification.numbers import difference

# Relative RMS; two libraries sum in another order, and fp16 models round at other places.
FP32, FP16 = 5e-5, 2e-2
# Integer arithmetic in between: a value at a rounding boundary moves by one step of 1/127, in each of up to 50 layers.
QUANTISED = 1e-1
# Layer norms of values whose mean is far above their spread: onnxruntime's variance is 2e-3 from fp64, torch's 2e-5.
OFFSET_NORM = 5e-3
WIDER = {
    "onnxruntime-qnn__model.onnx": QUANTISED,
    "onnxruntime-qnn__conv_qdq_s8s8.onnx": QUANTISED,
    "onnxruntime-qnn__conv_qdq_s8s8_perchannel.onnx": QUANTISED,
    "onnxruntime-qnn__conv_qdq_u8u8.onnx": QUANTISED,
    "onnxruntime-qnn__qdq_with_multi_consumer_dq_nodes.onnx": QUANTISED,
    "onnxruntime-qnn__qdq_with_multi_consumer_q_dq_axis.onnx": QUANTISED,
    "onnxruntime-qnn__attention_past_state.u8u8.onnx": QUANTISED,
    "onnxruntime-qnn__gpt2_embedlayer_one_attn_exp.onnx": OFFSET_NORM,
    "onnxruntime-qnn__decoder_with_past_self_mha_fused.onnx": OFFSET_NORM,
    "onnxruntime-qnn__decoder_with_past_self_mha_split_bias_fused.onnx": OFFSET_NORM,
    # Casts to fp16 and back inside.
    "onnxruntime-qnn__transpose_cast_matmul_4d_fusion3.onnx": FP16,
    "onnxruntime-qnn__transpose_cast_matmul_4d_fusion5.onnx": FP16,
    # Outputs of 1e-5 in the tail of a sigmoid, where onnxruntime is 7e-3 from fp64 and torch 2e-6.
    "yunet_n_dynamic.onnx": 1e-2,
    # Activations of 6e4 ahead of a softmax: torch is 4e-4 from fp64, onnxruntime 6e-4.
    "olive_ocr_crnn.onnx": 2e-3,
}
# Runs on onnxruntime only because it fuses the ill-shaped BatchNormalization away.
SKIPPED = {"onnxruntime-qnn__fuse-matmul-bn-only-reshape.onnx"}


@pytest.mark.parametrize("folder", ["zoo", "zoo_extra"])
def test_runs_as_on_onnxruntime(zoo, folder):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # The plain operators are the reference: the runtime's own fusions approximate some of them.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    wrong = {}
    for path, feeds in zoo(folder):
        name = path.name
        if name in SKIPPED:
            continue
        graph = graphopt.load(path)
        found = graph.run(feeds)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        half = any("float16" in str(a.dtype) for a in feeds.values()) or "fp16" in name or "tiny-qwen" in name
        limit = WIDER.get(name, FP16 if half else FP32)
        for output, expected in zip(session.get_outputs(), session.run(None, feeds), strict=True):
            error = difference(expected, found[output.name])
            if not error.rel_rms <= limit:
                wrong[f"{name}:{output.name}"] = error.rel_rms
    assert wrong == {}, wrong
