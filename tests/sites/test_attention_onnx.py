"""Attention in ONNX models: the onnx package's own tests, real models, and onnxruntime's fused operators."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from graphopt.execute import execute
from graphopt.frontends.onnx import load_onnx
from graphopt.graph import Graph
from graphopt.sites import AttentionSite, Findings, MaskKind, find
from graphopt.sites.attention import compare
from graphopt.sites.samples import sample_inputs, size_choices

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "attention_recognition.py"


def _benchmark() -> ModuleType:
    """The benchmark as a module: tests and benchmark run over the same models."""
    spec = importlib.util.spec_from_file_location("attention_recognition", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


recognition = _benchmark()
NODE_CASES = {name: (model, values) for e in (True, False) for name, model, values in recognition.node_cases(e)}

# The output of a node test that returns its scores or weights too.
SCORES = "qk_matmul_output"


def load(model: onnx.ModelProto, folder: Path) -> Graph:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return load_onnx(path)


def returns_scores(model: onnx.ModelProto) -> bool:
    return any(o.name == SCORES for o in model.graph.output)


def is_region(site: AttentionSite) -> bool:
    inside = set(site.nodes)
    leaving = [n for n in site.nodes if n is not site.output and not set(n.users) <= inside]
    # An operator that returns scores lies outside of its site, and so do they.
    closed = leaving == [n for n in site.exposed if n in inside]
    return closed and not inside & set(site.inputs) and len(set(site.inputs)) == len(site.inputs)


def traced(site: AttentionSite) -> torch.fx.GraphModule:
    """`split` on fx proxies: as a pass and an exporter see it."""
    graph = torch.fx.Graph()
    tracer = torch.fx.proxy.GraphAppendingTracer(graph)
    values: Any = site.split(*(torch.fx.Proxy(graph.placeholder(f"x{i}"), tracer) for i in range(len(site.inputs))))
    found = (values.q, values.k, values.v, values.mask)
    graph.output(tuple(getattr(v, "node", None) for v in found))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def check_trace(site: AttentionSite, inputs: list[Any]) -> None:
    values = site.split(*inputs)
    for found, wanted in zip(traced(site)(*inputs), (values.q, values.k, values.v, values.mask), strict=True):
        if wanted is not None:
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", NODE_CASES)
def test_node_tests_of_onnx(name: str, tmp_path: Path) -> None:
    model, values = NODE_CASES[name]
    graph = load(model, tmp_path)
    findings = find(graph, "attention")
    assert not findings.refusals
    assert len(findings.sites) == 1
    assert is_region(findings.sites[0])
    assert len(findings.sites[0].exposed) == returns_scores(model)
    traced(findings.sites[0])
    assert recognition.largest_error(graph, findings.sites, values) < 1e-3


def test_how_many_node_tests_there_are() -> None:
    expanded = [m for n, (m, _) in NODE_CASES.items() if n.endswith("_expanded")]
    assert len(expanded) >= 93
    assert 2 * len(expanded) == len(NODE_CASES)
    assert sum(map(returns_scores, expanded)) >= 18


MASK_KINDS = {
    "4d_expanded": MaskKind.NONE,
    "4d_causal_with_past_and_present": MaskKind.CAUSAL,
    "4d_causal_with_past_and_present_expanded": MaskKind.CAUSAL,
    "4d_padded_kv_bf16_expanded": MaskKind.PADDING,
    "4d_padded_kv_bf16": MaskKind.PADDING,
    "4d_attn_mask_bool": MaskKind.ARBITRARY,
    "4d_attn_mask_expanded": MaskKind.ARBITRARY,
    "4d_causal_nonpad_batch_prefill": MaskKind.ARBITRARY,
}


@pytest.mark.parametrize("name", MASK_KINDS)
def test_mask_kinds_of_node_tests(name: str, tmp_path: Path) -> None:
    model, _ = NODE_CASES[f"test_attention_{name}"]
    sites = find(load(model, tmp_path), "attention").sites
    assert [s.mask.kind for s in sites] == [MASK_KINDS[name]]


# Real models: how many sites, and what their masks do.
P, C, CP, N = MaskKind.PADDING, MaskKind.CAUSAL, MaskKind.CAUSAL_PADDING, MaskKind.NONE
REAL: dict[str, tuple[int, set[MaskKind]]] = {
    "zoo/onnxruntime-genai__decoder": (2, {CP}),
    "zoo/onnxruntime-genai__past_b": (5, {CP}),
    "zoo/onnxruntime-genai__transformer": (1, {CP}),
    "zoo/onnxruntime-qnn__TFBertForSequenceClassification_1": (12, {P}),
    "zoo/onnxruntime-qnn__attention_int32_mask": (1, {P}),
    "zoo/onnxruntime-qnn__attention_mask_no_cast": (1, {P}),
    "zoo/onnxruntime-qnn__attention_mha": (1, {P}),
    "zoo/onnxruntime-qnn__attention_opt": (1, {P}),
    "zoo/onnxruntime-qnn__attention_past_state": (1, {C}),
    "zoo/onnxruntime-qnn__attention_past_state.u8u8": (1, {C}),
    "zoo/onnxruntime-qnn__attention_symbolic_batch": (1, {P}),
    "zoo/onnxruntime-qnn__bert_toy_optimized": (5, {P}),
    "zoo/onnxruntime-qnn__decoder_with_past_self_mha_fused": (1, {N}),
    "zoo/onnxruntime-qnn__decoder_with_past_self_mha_split_bias_fused": (1, {C}),
    "zoo/onnxruntime-qnn__gpt2_attention_opt_no_skiplayernorm": (1, {CP}),
    "zoo/onnxruntime-qnn__gpt2_embedlayer_one_attn_exp": (1, {N}),
    "zoo/onnxruntime-qnn__hf_fp16_decoder_attention_with_past": (2, {C, N}),
    "zoo/onnxruntime-qnn__hf_fp16_encoder_self_attention": (1, {N}),
    "zoo/onnxruntime-qnn__hf_fp32_decoder_attention_with_past_split_bias": (2, {C, N}),
    "zoo/onnxruntime-qnn__oai_fp16_decoder_attention_no_past": (2, {C, N}),
    "zoo/onnxruntime-qnn__oai_fp32_decoder_attention_with_past": (2, {C, N}),
    "zoo/onnxruntime-qnn__pruned_attention_opt": (1, {P}),
    "zoo/optimum__model": (2, {P}),
    "zoo/sample-apps__transformer": (2, {N}),
    "zoo/voicevox_core__predict_spectrogram": (2, {N}),
    "zoo_extra/bert_squad_fp16_ort_cpu": (12, {P}),
    "zoo_extra/hf_gpt2_nopast_12l": (12, {C}),
    "zoo_extra/silero_vad_v2_mini": (4, {N}),
    "zoo_extra/tiny_random_llama_fp16/model": (2, {CP}),
    "zoo_extra/tribuo_tinybert": (1, {P}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_models(name: str, shared_data: Path) -> None:
    path = shared_data / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"no {path.name} in the test data")
    graph = load_onnx(path)
    findings: Findings = find(graph, "attention")
    count, kinds = REAL[name]
    assert not findings.refusals
    assert len(findings.sites) == count
    assert {s.mask.kind for s in findings.sites} == kinds
    assert all(is_region(s) for s in findings.sites)
    assert all(traced(s) for s in findings.sites)
    assert recognition.largest_error(graph, findings.sites) < 1e-3


def test_classifiers_are_refused(shared_data: Path) -> None:
    findings = find(load_onnx(shared_data / "zoo" / "libonnx__light_squeezenet.onnx"), "attention")
    assert not findings.sites
    assert "is an output of the model and feeds no product with values" in findings.refusals[0].reason


def test_rotation_is_seen_in_a_real_model(shared_data: Path) -> None:
    sites = find(load_onnx(shared_data / "zoo_extra" / "tiny_random_llama_fp16" / "model.onnx"), "attention").sites
    assert all(s.rope and s.past is not None for s in sites)


# onnxruntime's operators, one at a time

B, H, KV, T, S, D = 2, 4, 2, 5, 7, 4
Case = tuple[str, dict[str, Any], list[tuple[str, int, Sequence[int | str]] | None], dict[str, Any]]
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT32

MHA: list[tuple[str, int, Sequence[int | str]] | None] = [
    ("q", FLOAT, (B, T, H * D)), ("k", FLOAT, (B, S, H * D)), ("v", FLOAT, (B, S, H * D)),
]  # fmt: skip
HEADS = {"num_heads": H}
CASES: dict[str, Case] = {
    "MHA": ("MultiHeadAttention", HEADS, MHA, {"kind": N}),
    "MHA, scaled": ("MultiHeadAttention", {**HEADS, "scale": 0.3}, MHA, {"kind": N, "scale": 0.3}),
    "MHA, other width of values": (
        "MultiHeadAttention",
        HEADS,
        [*MHA[:2], ("v", FLOAT, (B, S, H * 6)), ("bias", FLOAT, (H * (2 * D + 6),))],
        {"kind": N, "value_dim": 6},
    ),
    "MHA, packed": ("MultiHeadAttention", HEADS, [("q", FLOAT, (B, T, H, 3, D))], {"kind": N}),
    "MHA, keys and values packed": (
        "MultiHeadAttention",
        HEADS,
        [MHA[0], ("k", FLOAT, (B, S, H, 2, D))],
        {"kind": N},
    ),
    "MHA, keys in heads": (
        "MultiHeadAttention",
        HEADS,
        [MHA[0], ("k", FLOAT, (B, H, S, D)), ("v", FLOAT, (B, H, S, D))],
        {"kind": N},
    ),
    "MHA, padding": ("MultiHeadAttention", HEADS, [*MHA, None, ("mask", INT, (B, S))], {"kind": P}),
    "MHA, lengths": ("MultiHeadAttention", HEADS, [*MHA, None, ("mask", INT, (B,))], {"kind": P}),
    "MHA, ends and starts": ("MultiHeadAttention", HEADS, [*MHA, None, ("mask", INT, (2 * B,))], {"kind": P}),
    "MHA, bias": (
        "MultiHeadAttention",
        HEADS,
        [*MHA, None, None, ("bias", FLOAT, (1, H, T, S))],
        {"kind": MaskKind.ARBITRARY},
    ),
    "MHA, bias and padding": (
        "MultiHeadAttention",
        HEADS,
        [*MHA, None, ("mask", INT, (B, S)), ("bias", FLOAT, (1, H, T, S))],
        {"kind": MaskKind.ARBITRARY},
    ),
    "MHA, causal": (
        "MultiHeadAttention",
        {**HEADS, "unidirectional": 1},
        [MHA[0], ("k", FLOAT, (B, T, H * D)), ("v", FLOAT, (B, T, H * D))],
        {"kind": C},
    ),
    "MHA, causal with padding": (
        "MultiHeadAttention",
        {**HEADS, "unidirectional": 1},
        [MHA[0], ("k", FLOAT, (B, T, H * D)), ("v", FLOAT, (B, T, H * D)), None, ("mask", INT, (B, T))],
        {"kind": CP},
    ),
    "Attention": (
        "Attention",
        HEADS,
        [("x", FLOAT, (B, T, 8)), ("w", FLOAT, (8, 3 * H * D)), ("b", FLOAT, (3 * H * D,))],
        {"kind": N},
    ),
    "Attention, causal, uneven widths": (
        "Attention",
        {**HEADS, "unidirectional": 1, "qkv_hidden_sizes": [H * D, H * D, H * 6]},
        [("x", FLOAT, (B, T, 8)), ("w", FLOAT, (8, H * (2 * D + 6)))],
        {"kind": C, "value_dim": 6},
    ),
    "Attention, mask of queries and keys": (
        "Attention",
        HEADS,
        [("x", FLOAT, (B, T, 8)), ("w", FLOAT, (8, 3 * H * D)), None, ("mask", INT, (B, T, T))],
        {"kind": MaskKind.ARBITRARY},
    ),
    "Attention, cache": (
        "Attention",
        {**HEADS, "unidirectional": 1},
        [("x", FLOAT, (B, T, 8)), ("w", FLOAT, (8, 3 * H * D)), None, None, ("past", FLOAT, (2, B, H, 3, D))],
        {"kind": C},
    ),
    "GQA": (
        "GroupQueryAttention",
        {"num_heads": H, "kv_num_heads": KV},
        [
            ("q", FLOAT, (B, T, H * D)), ("k", FLOAT, (B, T, KV * D)), ("v", FLOAT, (B, T, KV * D)),
            ("pk", FLOAT, (B, KV, 3, D)), ("pv", FLOAT, (B, KV, 3, D)), ("lengths", INT, (B,)), ("total", INT, (1,)),
        ],
        {"kv_heads": KV},
    ),
    "GQA, packed, window, soft cap": (
        "GroupQueryAttention",
        {"num_heads": H, "kv_num_heads": KV, "local_window_size": 3, "softcap": 2.0},
        [
            ("q", FLOAT, (B, T, (H + 2 * KV) * D)), None, None, ("pk", FLOAT, (B, KV, 3, D)),
            ("pv", FLOAT, (B, KV, 3, D)), ("lengths", INT, (B,)), ("total", INT, (1,)),
        ],
        {"kv_heads": KV, "softcap": 2.0},
    ),
}  # fmt: skip


def single(case: Case, folder: Path) -> Graph:
    operator, attributes, inputs, _ = case
    names = ["" if i is None else i[0] for i in inputs]
    node = helper.make_node(operator, names, ["y"], "the_node", domain="com.microsoft", **attributes)
    given = [helper.make_tensor_value_info(*i) for i in inputs if i is not None]
    graph = helper.make_graph([node], "g", given, [helper.make_tensor_value_info("y", FLOAT, None)])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return load(helper.make_model(graph, opset_imports=opsets, ir_version=9), folder)


@pytest.mark.parametrize("name", CASES)
def test_operators_of_onnxruntime(name: str, tmp_path: Path) -> None:
    graph = single(CASES[name], tmp_path)
    findings = find(graph, "attention")
    assert not findings.refusals
    site = findings.sites[0]
    for field, value in CASES[name][3].items():
        found = site.mask.kind if field == "kind" else getattr(site, field)
        assert found == pytest.approx(value) if isinstance(value, float) else found is value or found == value
    traced(site)
    if "GQA" in name:  # its lengths have to agree: the finder's own check runs it with lengths that do
        return
    seen: dict[Any, Any] = {}
    execute(graph, sample_inputs(graph, pattern="right"), lambda node, value: seen.update({node: value}))
    inputs = [seen[n] for n in site.inputs]
    assert compare(site, inputs, seen[site.output]) < 1e-4
    check_trace(site, inputs)


REFUSED: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "rotation": ("GQA", {"do_rotary": 1}, 0, "rotates queries and keys itself"),
    "sink": ("GQA", {"smooth_softmax": 1}, 0, "attention sink"),
    "rotation in Attention": ("Attention", {"do_rotary": 1}, 0, "rotates queries and keys"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_expressible_is_refused(name: str, tmp_path: Path) -> None:
    base, more, _, reason = REFUSED[name]
    operator, attributes, inputs, _ = CASES[base]
    findings = find(single((operator, {**attributes, **more}, inputs, {}), tmp_path), "attention")
    assert not findings.sites
    assert reason in findings.refusals[0].reason


def test_an_unknown_fused_operator_is_refused(tmp_path: Path) -> None:
    case: Case = ("QAttention", HEADS, [("x", FLOAT, (B, T, 8)), ("w", FLOAT, (8, 48))], {})
    findings = find(single(case, tmp_path), "attention")
    assert findings.refusals[0].node == "the_node"
    assert "multiplies quantised weights" in findings.refusals[0].reason


def test_used_caches_leave_the_operator_outside_of_the_site(tmp_path: Path) -> None:
    model, _ = NODE_CASES["test_attention_4d_with_past_and_present"]
    site = find(load(model, tmp_path), "attention").sites[0]
    assert site.nodes == (site.output,)
    assert site.anchor not in site.nodes
    assert is_region(site)


def half_precision_model() -> onnx.ModelProto:
    """Fp16 attention whose softmax runs in fp32 behind Casts, opset 11."""
    mask = numpy_helper.from_array(np.triu(np.full((T, T), -1e4, np.float16), 1), "mask")
    scale = numpy_helper.from_array(np.array(2.0, np.float16), "scale")
    nodes = [
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "kt"], ["s0"]),
        helper.make_node("Div", ["s0", "scale"], ["s1"]),
        helper.make_node("Add", ["s1", "mask"], ["s2"]),
        helper.make_node("Cast", ["s2"], ["s3"], to=TensorProto.FLOAT),
        helper.make_node("Softmax", ["s3"], ["p0"], "softmax", axis=3),
        helper.make_node("Cast", ["p0"], ["p1"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["p1", "v"], ["y"]),
    ]
    given = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, ("b", H, T, D)) for n in "qkv"]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ("b", H, T, D))]
    graph = helper.make_graph(nodes, "g", given, out, [mask, scale])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7)


def test_half_precision_behind_casts(tmp_path: Path) -> None:
    graph = load(half_precision_model(), tmp_path)
    site = find(graph, "attention").sites[0]
    assert site.name == "softmax"
    assert site.scale == pytest.approx(0.5)
    assert site.mask.kind is C
    assert site.mask.value is not None
    assert recognition.largest_error(graph, [site]) < 1e-3


def test_a_softmax_of_several_axes_is_refused(tmp_path: Path) -> None:
    model = half_precision_model()
    next(n for n in model.graph.node if n.op_type == "Softmax").attribute[0].i = 2
    findings = find(load(model, tmp_path), "attention")
    assert "flattens several axes" in findings.refusals[0].reason


def test_samples_have_distinct_sizes_for_distinct_names(tmp_path: Path) -> None:
    graph = load(half_precision_model(), tmp_path)
    first, second = next(size_choices(graph, 0)), next(size_choices(graph, 1))
    assert first.keys() == second.keys() == {"b"}
    assert first["b"] != second["b"]
    values = sample_inputs(graph, 0)
    assert values[0].shape == (first["b"], H, T, D)
    assert values[0].dtype == torch.float16
