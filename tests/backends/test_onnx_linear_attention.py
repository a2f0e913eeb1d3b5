"""The ONNX forms of kernel attention and of causal linear attention, in onnxruntime against the references."""

import pytest
import torch

from graphopt.ops.linear_attention import RULES, recurrent
from tests.backends.operator_models import export, lower

TARGETS = ["onnx", "onnxruntime"]


def operands(rule, T, *, heads=(4, 2), K=6, V=5, B=2, state=False, fine=False, shared=False, dtype=torch.float32):
    """Positive features of unit sum, so that no value outgrows the tolerance."""
    generator = torch.Generator().manual_seed(T)
    make = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731  # short
    H, Hkv = heads
    given = {"q": make(B, H, T, K) / K, "k": make(B, Hkv, T, K) / K, "v": make(B, Hkv, T, V) - 0.5}
    if rule.startswith("gated"):
        given["decay"] = -make(1 if shared else B, Hkv, T, K if fine else 1)
    if rule.endswith("delta"):
        given["beta"] = make(1 if shared else B, Hkv, T, 1)
    if state:
        given["state"] = make(B, Hkv, K, V)
    return {name: x.to(dtype) for name, x in given.items()}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("state", [False, True], ids=["from zero", "from a state"])
def test_all_lengths_in_one_session(rule, target, state, tmp_path):
    options = {"state": state, "fine": rule == "gated"}
    lowered = lower(
        tmp_path, "linear_attention", operands(rule, 9, **options), target=target, tuple_of=torch.float32,
        rule=rule, scale=0.7,
    )  # fmt: skip
    for T in (1, 2, 63, 64, 65, 150):
        lowered.compare(operands(rule, T, B=1 + T % 2, **options))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 1)], ids=str)
def test_heads_and_gates_of_all_batches(rule, target, heads, tmp_path):
    options = {"heads": heads, "shared": True}
    lowered = lower(
        tmp_path, "linear_attention", operands(rule, 9, **options), target=target, tuple_of=torch.float32, rule=rule
    )
    lowered.compare(operands(rule, 70, **options))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("opset", [13, 20])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("rule", ["linear", "gated_delta"])
def test_types_and_opsets(rule, target, dtype, opset, tmp_path):
    wide = torch.promote_types(dtype, torch.float32)
    given = operands(rule, 70, dtype=dtype)
    if dtype == torch.float16:
        given["state"] = operands(rule, 70, state=True)["state"]
    lowered = lower(
        tmp_path, "linear_attention", {n: x.to(wide) if n == "state" else x for n, x in given.items()},
        target=target, tuple_of=wide, rule=rule, opset=opset,
    )  # fmt: skip
    # fp64 shows that nothing passes through fp32; fp16 differs by the rounding of the result alone.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-3
    lowered.compare(given, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rule", RULES)
def test_prefill_and_continue(rule, target, tmp_path):
    whole = operands(rule, 70, state=True)
    lowered = lower(tmp_path, "linear_attention", whole, target=target, tuple_of=torch.float32, rule=rule)
    expected, state = recurrent(**{n: x.double() for n, x in whole.items()}, rule=rule)
    for start, end in ((0, 66), (66, 67), (67, 70)):
        piece = {n: x if n == "state" else x[:, :, start:end].contiguous() for n, x in whole.items()}
        (found,) = lowered.session.run({n: x.numpy() for n, x in piece.items()}).values()
        found = torch.from_numpy(found)
        count = expected[:, :, start:end].numel()
        # fp32 against fp64: some hundred additions of values below 1.
        torch.testing.assert_close(
            found[:count].view(2, 4, -1, 5).double(), expected[:, :, start:end], rtol=1e-5, atol=1e-5
        )
        whole["state"] = found[count:].view(2, 2, 6, 5).clone()
    torch.testing.assert_close(whole["state"].double(), state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("target", "rule"), [("onnx", "linear"), ("onnx", "gated"), ("onnxruntime", "delta")])
def test_both_outputs_through_the_exporter(target, rule, tmp_path):
    given = operands(rule, 9, state=True)
    dynamic = {n: {0: "batch"} | ({2: "length"} if n != "state" else {}) for n in given}
    lowered, names = export(tmp_path, "linear_attention", given, dynamic, target=target, rule=rule, scale=1 / 3)
    for T in (1, 70):
        other = operands(rule, T, state=True, B=3)
        lowered.compare({new: other[old] for new, old in names.items()})


def test_the_output_alone_through_the_exporter(tmp_path):
    import graphopt
    from graphopt.backends.onnxruntime import Session

    class Output(torch.nn.Module):
        def forward(self, q, k, v):
            return torch.ops.graphopt.linear_attention(q, k, v, scale=1 / 3)[0] * 2

    given = operands("linear", 9, dtype=torch.float64)
    program = torch.export.export(Output(), tuple(given.values()))
    graphopt.load(program).save(tmp_path / "out.onnx")
    (found,) = Session(tmp_path / "out.onnx").run({n: x.numpy() for n, x in given.items()}).values()
    # A scale that was rounded to fp32 on its way would be off by 1e-8.
    torch.testing.assert_close(torch.from_numpy(found), Output()(*given.values()), rtol=1e-13, atol=1e-13)


def kernel_operands(T, S, *, heads=(4, 2), weight="", dtype=torch.float32):
    generator = torch.Generator().manual_seed(T + S)
    make = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731  # short
    given = {"q": make(2, heads[0], T, 6), "k": make(2, heads[1], S, 6), "v": make(2, heads[1], S, 5)}
    if weight:
        given["key_weight"] = (make(2, heads[1] if weight == "per head" else 1, S, 1) > 0.3) * make(1, 1, S, 1)
    return {name: x.to(dtype) for name, x in given.items()}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("heads", [(1, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("weight", ["", "of all heads", "per head"])
def test_kernel_attention(target, heads, weight, tmp_path):
    options = {"heads": heads, "weight": weight}
    lowered = lower(tmp_path, "kernel_attention", kernel_operands(9, 7, **options), target=target, opset=11)
    for sizes in ((1, 1), (5, 300), (300, 5)):
        lowered.compare(kernel_operands(*sizes, **options))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.float64, 1e-12)], ids=str)
def test_kernel_attention_in_other_types(dtype, tolerance, tmp_path):
    given = kernel_operands(9, 70, weight="of all heads", dtype=dtype)
    lowered = lower(tmp_path, "kernel_attention", given, eps=1e-3)
    lowered.compare(given, rtol=tolerance, atol=tolerance)


def test_kernel_attention_without_visible_keys(tmp_path):
    given = kernel_operands(9, 7, weight="of all heads")
    given["key_weight"] = torch.zeros_like(given["key_weight"])
    lower(tmp_path, "kernel_attention", given).compare(given, expected=torch.zeros(2, 4, 9, 5), rtol=0, atol=0)
