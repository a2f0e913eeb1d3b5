"""The ONNX forms of window attention and of LoLCATs' hybrid, in onnxruntime against the references."""

import pytest
import torch

from graphopt.backends.onnx.attention_parts import BLOCK
from graphopt.ops import windowed_linear_attention
from tests.backends.operator_models import export, lower

OPERATORS = ["window_attention", "windowed_linear_attention"]
SCALE = 0.3


def operands(
    name, T, past=0, *, heads=(4, 2), shared=False, weight=False, state=False, B=2, dtype=torch.float32, seed=0
):
    generator = torch.Generator().manual_seed(1000 * T + past + seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731  # short
    (H, Hkv), S = heads, T + past
    given = {"q": 2 * make(B, H, T, 6), "k": make(B, Hkv, S, 6), "v": make(B, Hkv, S, 5)}
    if name == "windowed_linear_attention":
        given["query_features"] = torch.softmax(make(B, H, T, 8), -1)
        given["key_features"] = torch.softmax(make(B, Hkv if shared else H, S, 8), -1)
        given["gate"] = torch.sigmoid(make(1, H, 1, 1))
    if weight:
        # Some rows see keys of weight 0 alone.
        given["key_weight"] = (make(B, 1, S, 1) > 0) * make(1, 1, S, 1).abs()
        given["key_weight"][0, :, : past + T // 2] = 0
    if state:
        given["state"] = torch.rand(B, Hkv if shared else H, 8, 6, generator=generator, dtype=torch.float64)
    return {n: x.to(dtype) for n, x in given.items()}


def sizes(window, sinks):
    """Decoding, a block and segments of blocks, whole ones and less; from nothing to more than the cache keeps."""
    cache = window + sinks
    few = [(1, 0), (1, 2), (1, cache), (7, 0), (7, cache), (64, 0)]
    return [*few, (65, 3), (128, cache), (150, 0), (150, 90), (256, 0), (257, cache), (590, 90)]


def tuple_of(name, dtype=torch.float32):
    return torch.promote_types(dtype, torch.float32) if name == "windowed_linear_attention" else None


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("target", ["onnx", "onnxruntime"])
@pytest.mark.parametrize(("window", "sinks"), [(16, 0), (16, 3), (64, 0), (100, 1), (0, 2), (0, 0)])
@pytest.mark.parametrize("weight", [False, True], ids=["all keys", "some keys"])
def test_all_sizes_in_one_session(name, target, window, sinks, weight, tmp_path):
    hybrid = name == "windowed_linear_attention"
    options = {"weight": weight, "state": hybrid and weight, "shared": hybrid and sinks == 3}
    lowered = lower(
        tmp_path, name, operands(name, 9, **options), target=target, tuple_of=tuple_of(name), window=window,
        sinks=sinks, scale=SCALE,
    )  # fmt: skip
    for T, past in sizes(window, sinks):
        lowered.compare(operands(name, T, past, **options))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 1)], ids=str)
def test_heads(name, heads, tmp_path):
    lowered = lower(
        tmp_path, name, operands(name, 9, heads=heads), tuple_of=tuple_of(name), window=16, sinks=1, scale=SCALE
    )
    for T in (1, 130):
        lowered.compare(operands(name, T, 5, heads=heads, B=1))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("opset", [13, 20])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_types_and_opsets(name, dtype, opset, tmp_path):
    options = {"window": 16, "sinks": 1, "scale": SCALE}
    given = operands(name, 9, weight=True, dtype=dtype)
    lowered = lower(tmp_path, name, given, opset=opset, tuple_of=tuple_of(name, dtype), **options)
    # fp64 shows that nothing passes through fp32; fp16 differs by the rounding of the result alone.
    tolerance = 1e-11 if dtype == torch.float64 else 1e-3
    for T in (1, 100):
        lowered.compare(operands(name, T, 17, weight=True, dtype=dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", OPERATORS)
def test_large_scores_neither_overflow_nor_vanish(name, tmp_path):
    lowered = lower(tmp_path, name, operands(name, 9), tuple_of=tuple_of(name), window=16, scale=40.0)
    for T in (5, 100):
        given = operands(name, T)
        # The exponents are in the hundreds: one ulp of them is 3e-5 of a weight.
        lowered.compare(given, rtol=1e-3, atol=1e-3)


def test_nothing_visible_gives_zeros(tmp_path):
    given = operands("window_attention", 9, weight=True)
    lowered = lower(tmp_path, "window_attention", given, window=16, scale=SCALE)
    for T in (7, 100):
        given = operands("window_attention", T, weight=True)
        given["key_weight"] = torch.zeros_like(given["key_weight"])
        lowered.compare(given, expected=torch.zeros(2, 4, T, 5), rtol=0, atol=0)


@pytest.mark.parametrize("prefill", [1, 20, BLOCK, 99])
@pytest.mark.parametrize("sinks", [0, 2])
def test_prefill_and_decode(prefill, sinks, tmp_path):
    """A cache of the sinks, the last `window` keys and the state gives what one run over the whole text gives."""
    name, window, total = "windowed_linear_attention", 16, 106
    whole = operands(name, total)
    options = {"window": window, "sinks": sinks, "scale": SCALE}
    expected, _ = windowed_linear_attention(*(x.double() for x in whole.values()), **options)
    example = whole | {"state": torch.zeros(2, 4, 8, 6)}
    lowered = lower(tmp_path, name, example, tuple_of=torch.float32, **options)
    state, kept = example["state"], {n: whole[n][:, :, :0] for n in ("k", "v", "key_features")}
    for start, end in [(0, prefill), *((i, i + 1) for i in range(prefill, total, 1 + (total - prefill) // 8))]:
        if start:  # not every step is taken: the cache is as the reference leaves it
            state, kept = _cache(whole, start, options)
        given = {n: x[:, :, start:end] for n, x in whole.items() if n != "gate"} | {"gate": whole["gate"]}
        given |= {n: torch.cat([kept[n], given[n]], 2) for n in kept} | {"state": state}
        given = {n: given[n].contiguous() for n in example}
        (found,) = lowered.session.run({n: x.numpy() for n, x in given.items()}).values()
        count = expected[:, :, start:end].numel()
        found = torch.from_numpy(found)
        # fp32 against fp64.
        torch.testing.assert_close(
            found[:count].view(2, 4, -1, 5).double(), expected[:, :, start:end], rtol=1e-4, atol=1e-5
        )
        reached, _ = _cache(whole, end, options)
        torch.testing.assert_close(found[count:].view(2, 4, 8, 6), reached, rtol=1e-4, atol=1e-5)


def _cache(whole, end, options):
    """The state behind `end` tokens, and what of them is kept besides."""
    window, sinks = options["window"], options["sinks"]
    _, state = windowed_linear_attention(*(x if n == "gate" else x[:, :, :end] for n, x in whole.items()), **options)
    first = max(sinks, end - window)
    kept = {
        n: torch.cat([whole[n][:, :, : min(sinks, end)], whole[n][:, :, first:end]], 2)
        for n in ("k", "v", "key_features")
    }
    return state, kept


@pytest.mark.parametrize("name", OPERATORS)
def test_through_the_exporter(name, tmp_path):
    given = operands(name, 9, 4, weight=True)
    queries = {n: {0: "batch", 2: "length"} for n in ("q", "query_features")}
    keys = {n: {0: "batch", 2: "all"} for n in ("k", "v", "key_features", "key_weight")}
    lowered, names = export(tmp_path, name, given, queries | keys, target="onnxruntime", window=16, scale=1 / 3)
    for T, past in ((1, 16), (70, 0)):
        other = operands(name, T, past, weight=True, B=3)
        lowered.compare({new: other[old] for new, old in names.items()})


@pytest.mark.parametrize("gate", [0.0, 1e-30, 1.0])
def test_a_closed_gate_leaves_the_linear_part(gate, tmp_path):
    name = "windowed_linear_attention"
    lowered = lower(tmp_path, name, operands(name, 9), tuple_of=tuple_of(name), window=16, sinks=0, scale=SCALE)
    for T in (1, 150):
        given = operands(name, T, 20)
        lowered.compare(given | {"gate": torch.full_like(given["gate"], gate)})
