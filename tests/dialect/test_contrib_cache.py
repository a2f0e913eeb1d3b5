"""Attention over caches and rotary embeddings against onnxruntime's CPU kernels, and derivatives."""

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from graphopt.dialect import lookup

# float32 sums in another order; in float16 onnxruntime computes in float32 and rounds once, torch rounds in between.
SINGLE, HALF = {"rtol": 1e-4, "atol": 1e-5}, {"rtol": 1e-2, "atol": 1e-2}
HEADS, KV, D = 4, 2, 16
DOMAIN, NAME = "com.microsoft", "GroupQueryAttention"


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum((i + 1) * n for i, n in enumerate(shape)))
    return torch.randn(shape, generator=generator).to(dtype)


def ints(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def operands(batch: int, steps: int, packed: bool, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    if packed:
        return [randn(batch, steps, (HEADS + 2 * KV) * D, dtype=dtype), None, None]
    return [randn(batch, steps, heads * D, seed=i, dtype=dtype) for i, heads in enumerate((HEADS, KV, KV))]


# steps, past buffer, lengths before the new steps are counted in, all of them
STATES = {
    "prompt": (3, 0, [2, 2], 3),
    "ragged prompt": (3, 0, [1, 2], 3),
    "prompt into a buffer": (3, 9, [2, 2], 3),
    "step": (1, 5, [5, 5], 6),
    "ragged step": (1, 5, [3, 5], 6),
    "step in a buffer": (1, 9, [5, 3], 6),
    "steps": (3, 4, [6], 7),
}
VARIANTS: dict[str, tuple[dict[int, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "scale": ({}, {"scale": 0.3}),
    "window": ({}, {"local_window_size": 2}),
    "softcap": ({}, {"softcap": 1.5}),
    "smooth": ({}, {"smooth_softmax": 1}),
    "sink": ({11: (HEADS,)}, {}),
    "both ways": ({}, {"causal": 0}),
    "bias": ({10: "bias"}, {}),
    "rotary": ({7: (32, D // 2), 8: (32, D // 2)}, {"do_rotary": 1}),
    "neighbours": ({7: (32, D // 2), 8: (32, D // 2)}, {"do_rotary": 1, "rotary_interleaved": 1}),
    "partial rotary": ({7: (32, 8), 8: (32, 8)}, {"do_rotary": 1}),
    "positions": ({7: (32, D // 2), 8: (32, D // 2), 9: "ids"}, {"do_rotary": 1}),
    "everything": (
        {7: (32, D // 2), 8: (32, D // 2), 10: "bias", 11: (HEADS,)},
        {"do_rotary": 1, "local_window_size": 3, "softcap": 2.0, "scale": 0.4},
    ),
}


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_group_query_attention(contrib: Any, state: str, variant: str, packed: bool, dtype: torch.dtype) -> None:
    steps, past, lengths, total = STATES[state]
    extras, options = VARIANTS[variant]
    batch = len(lengths)
    inputs = operands(batch, steps, packed, dtype)
    inputs += [randn(batch, KV, past, D, seed=i, dtype=dtype) if past else None for i in range(2)]
    inputs += [ints(lengths), ints(total), *[None] * 5]
    for index, shape in extras.items():
        if shape == "bias":
            inputs[index] = randn(1, HEADS, steps, total, dtype=dtype)
        elif shape == "ids":
            inputs[index] = 7 * torch.arange(batch).unsqueeze(1) + torch.arange(steps) * 2
        else:
            inputs[index] = randn(*shape, seed=index, dtype=dtype)
    shown = {"num_heads": HEADS, "kv_num_heads": KV, **options}
    tolerance = SINGLE if dtype == torch.float32 else HALF
    for kind in (1, 2):
        wanted = contrib.onnxruntime(NAME, inputs, 4, qk_output=kind, **shown)
        found = contrib.torch(NAME, inputs, 4, qk_output=kind, **shown)
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine.numpy().dtype == theirs.dtype
            assert mine.shape == theirs.shape
        for b, last in enumerate(lengths):
            # What lies behind a sample's last position means nothing; onnxruntime leaves it uninitialised.
            rows = min(steps, last + 1)
            np.testing.assert_allclose(found[0][b, :rows].numpy(), wanted[0][b, :rows], **tolerance)
            for i in (1, 2):
                np.testing.assert_allclose(found[i][b, :, : last + 1].numpy(), wanted[i][b, :, : last + 1], **tolerance)
            live = np.s_[b, :, :rows, : last + 1]
            np.testing.assert_allclose(found[3][live].numpy(), wanted[3][live], **tolerance)
            assert not found[3][b, ..., last + 1 :].any()


@pytest.mark.parametrize("capacity", [4, 5, 7])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_window_sized_caches(contrib: Any, capacity: int, steps: int, bias: bool) -> None:
    # A sequence from its first step on, as one sample or as two of different lengths, through the cache of each side.
    window, batch = 4, 2 if steps == 1 else 1
    options = {"num_heads": HEADS, "kv_num_heads": KV, "local_window_size": window, "sliding_window_cache": 1}
    mine = theirs = [torch.zeros(batch, KV, capacity, D)] * 2
    for turn in range(13 // steps):
        # The second sample stays one turn behind.
        seen = steps * ints([turn + 1, max(turn, 1)])[:batch]
        total = int(seen.max())
        added = randn(1, HEADS, steps, total, seed=turn) if bias else None
        new = [randn(batch, steps, heads * D, seed=3 * turn + i) for i, heads in enumerate((HEADS, KV, KV))]
        rest = [seen - 1, ints(total), None, None, None, added]
        wanted = contrib.onnxruntime(NAME, [*new, *theirs, *rest], 3, **options)
        found = contrib.torch(NAME, [*new, *mine, *rest], 3, **options)
        np.testing.assert_allclose(found[0].numpy(), wanted[0], **SINGLE)
        for b in range(batch):
            count = int(seen[b])
            while count > capacity:
                count -= capacity - window + 1
            for i in (1, 2):
                np.testing.assert_allclose(found[i][b, :, :count].numpy(), wanted[i][b, :, :count], **SINGLE)
                assert not found[i][b, :, count:].any()
        mine, theirs = found[1:], [torch.from_numpy(x) for x in wanted[1:]]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["PER_TENSOR", "PER_CHANNEL"])
@pytest.mark.parametrize("state", ["prompt", "step", "steps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_quantised_caches(contrib: Any, bits: int, kind: str, state: str, dtype: torch.dtype) -> None:
    steps, past, lengths, total = STATES[state]
    batch = len(lengths)
    inputs = operands(batch, steps, False, dtype)
    generator = torch.Generator().manual_seed(1)
    storage = torch.int8 if bits == 8 else torch.uint8
    low, high, width = (-128, 128, D) if bits == 8 else (0, 256, D // 2)
    shape = (batch, KV, past, width)
    # The type of the caches follows from their inputs, so even a prompt has some, without a step in them.
    inputs += [torch.randint(low, high, shape, generator=generator).to(storage) for _ in range(2)]
    inputs += [ints(lengths), ints(total), *[None] * 5]
    # Small enough that some of the new values are out of range.
    sizes = (1,) if kind == "PER_TENSOR" else (1, KV, 1, D)
    inputs += [(torch.rand(sizes, generator=generator) + 0.5) * 2.0 ** (1 - bits) * 2 for _ in range(2)]
    options = {"num_heads": HEADS, "kv_num_heads": KV, "kv_cache_bit_width": bits}
    contrib.compare(
        NAME,
        inputs,
        3,
        k_quant_type=kind,
        v_quant_type=kind,
        **options,
        **(SINGLE if dtype == torch.float32 else HALF),
    )


@pytest.mark.parametrize("windowed", [0, 1])
def test_what_a_buffer_holds_beside_its_sequence_does_not_count(windowed: int) -> None:
    attention = lookup(DOMAIN, NAME, 1).function
    past = [randn(2, KV, 6, D, seed=i) for i in range(2)]
    dirty = [x.clone().requires_grad_() for x in past]
    with torch.no_grad():
        for x in dirty:
            x[1, :, 3:] = float("nan")
    rest = (ints([5, 3]), ints(6))
    options = {"num_heads": HEADS, "kv_num_heads": KV, "outputs": 1}
    options |= {"local_window_size": 4, "sliding_window_cache": 1} if windowed else {}
    y = attention(*operands(2, 1, False), *dirty, *rest, **options)
    assert torch.equal(y, attention(*operands(2, 1, False), *past, *rest, **options))
    y.sum().backward()
    assert all(x.grad.isfinite().all() for x in dirty)


def test_caches_of_small_floats_run_elsewhere(contrib: Any) -> None:
    inputs = [*operands(1, 1, False), *[torch.zeros(1, KV, 2, D).to(torch.float8_e4m3fn)] * 2, ints([2]), ints(3)]
    inputs += [*[None] * 5, torch.ones(1), torch.ones(1)]
    options = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}
    with pytest.raises(NotImplementedError, match="quantised caches of 8 or 4 bit integers"):
        contrib.torch(NAME, inputs, 3, num_heads=HEADS, kv_num_heads=KV, **options)


def test_norm_of_the_heads_equals_a_norm_before() -> None:
    # onnxruntime has it on CUDA only.
    attention = lookup(DOMAIN, NAME, 1).function
    norm = lookup("", "RMSNormalization", 23).function
    q, k, v = operands(2, 3, False)
    by_q, by_k = randn(D), randn(D, seed=1)
    caches = (randn(8, D // 2), randn(8, D // 2, seed=1), *[None] * 5)
    options = {"num_heads": HEADS, "kv_num_heads": KV, "do_rotary": 1, "outputs": 3}
    found = attention(q, k, v, None, None, ints([2, 2]), ints(3), *caches, by_q, by_k, qk_norm_epsilon=1e-3, **options)
    before = (norm(x.unflatten(-1, (-1, D)), w, epsilon=1e-3).flatten(-2) for x, w in ((q, by_q), (k, by_k)))
    expected = attention(*before, v, None, None, ints([2, 2]), ints(3), *caches, **options)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("ids", [[3], [[0, 4, 1], [9, 2, 2]]], ids=["first", "each"])
@pytest.mark.parametrize("width", [8, 4], ids=["whole", "partial"])
@pytest.mark.parametrize("heads_first", [False, True])
def test_rotary_embedding(
    contrib: Any, interleaved: int, dtype: torch.dtype, ids: Any, width: int, heads_first: bool
) -> None:
    x = randn(2, 3, 3, 8, dtype=dtype) if heads_first else randn(2, 3, 24, dtype=dtype)
    inputs = [x, torch.tensor(ids), *(randn(12, width // 2, seed=i, dtype=dtype) for i in range(2))]
    options = {"num_heads": 3, "rotary_embedding_dim": width} if width < 8 else {}
    tolerance = SINGLE if dtype == torch.float32 else HALF
    contrib.compare("RotaryEmbedding", inputs, interleaved=interleaved, **options, **tolerance)


def test_rotary_embedding_of_packed_samples(contrib: Any) -> None:
    # More steps than the caches have rows; the scale that the operator declares changes nothing.
    inputs = [randn(1, 5, 8), torch.tensor([[0, 1, 2, 0, 1]]), randn(3, 2), randn(3, 2, seed=1)]
    contrib.compare("RotaryEmbedding", inputs, is_packed_batching=1, scale=0.5, **SINGLE)


@pytest.mark.parametrize("section", [[2, 1, 1], [1, 2, 1], [2, 2, 0], [0, 1, 3], [4, 0, 0]])
@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("width", [8, 10], ids=["whole", "partial"])
def test_m_rotary_embedding(
    contrib: Any, section: list[int], layout: int, interleaved: int, heads_first: bool, width: int
) -> None:
    x = randn(2, 3, 5, width) if heads_first else randn(2, 5, 3 * width)
    ids = torch.randint(0, 9, (3, 2, 5), generator=torch.Generator().manual_seed(1))
    options = {"rotary_embedding_dim": 8} if width > 8 else {}
    inputs = [x, ids, randn(9, 4), randn(9, 4, seed=1)]
    contrib.compare(
        "MRotaryEmbedding",
        inputs,
        mrope_section=section,
        mrope_layout=layout,
        interleaved=interleaved,
        num_heads=3,
        **options,
        **SINGLE,
    )


ROWS = {
    "one layout": (ints([[0, 1, 3, 5]]), ints([[0, 0, 1, 1, 2]])),
    "two layouts": (ints([[0, 1, 3, 5], [0, 1, 3, 6]]), ints([[0, 0, 1, 1, 2, -1], [0, 0, 1, 0, 1, 2]])),
}


@pytest.mark.parametrize("layout", ROWS)
@pytest.mark.parametrize("rotary", [0, 1, 2], ids=["still", "halves", "neighbours"])
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize(("batch", "steps", "total"), [(2, 40, 40), (1, 20, 20), (2, 1, 38), (1, 1, 17)])
def test_sparse_attention(layout: str, rotary: int, packed: bool, batch: int, steps: int, total: int) -> None:
    # Samples of equal length: the weights of a shorter one do not sum to one in onnxruntime.
    names = ["q", "k", "v", "past_k", "past_v", "rows", "columns", "total", "lengths", "cos", "sin"]
    inputs = [*operands(batch, steps, packed), *(randn(batch, KV, 48, D, seed=i) for i in range(2)), *ROWS[layout]]
    inputs += [ints(total), ints([total] * batch)]
    inputs += [randn(64, D // 2, seed=i) for i in range(2)] if rotary else [None, None]
    options = {"num_heads": HEADS, "kv_num_heads": KV, "sparse_block_size": 16, "scale": 0.3}
    options |= {"do_rotary": int(rotary > 0), "rotary_interleaved": int(rotary > 1)}
    fed = {name: x.numpy() for name, x in zip(names, inputs, strict=True) if x is not None}
    node = helper.make_node(
        "SparseAttention", [n if n in fed else "" for n in names], ["y", "keys", "values"], domain=DOMAIN, **options
    )
    shapes = [
        helper.make_tensor_value_info(n, TensorProto.INT32 if x.dtype == np.int32 else TensorProto.FLOAT, x.shape)
        for n, x in fed.items()
    ]
    graph = helper.make_graph([node], "one", shapes, [helper.make_empty_tensor_value_info(n) for n in node.output])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x.copy()) for name, x in fed.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("y")
    # onnxruntime insists on writing into the caches it reads.
    binding.bind_ortvalue_output("keys", values["past_k"])
    binding.bind_ortvalue_output("values", values["past_v"])
    session.run_with_iobinding(binding)
    wanted = [binding.get_outputs()[0].numpy(), values["past_k"].numpy(), values["past_v"].numpy()]
    found = lookup(DOMAIN, "SparseAttention", 1).function(*inputs, **options)
    for mine, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs, **SINGLE)


def doubles(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [randn(*shape, seed=i, dtype=torch.float64).requires_grad_() for i, shape in enumerate(shapes)]


def test_gradients() -> None:
    attention = lookup(DOMAIN, NAME, 1).function
    heads = {"num_heads": 2, "kv_num_heads": 1, "outputs": 4}

    def ragged(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, cos: Tensor, bias: Tensor, sink: Tensor) -> Any:
        rest = (ints([1, 3]), ints(4), cos, cos, None, bias, sink)
        return attention(q, k, v, pk, pv, *rest, do_rotary=1, softcap=2.0, qk_output=1, **heads)

    shapes = [(2, 1, 4), (2, 1, 2), (2, 1, 2), (2, 1, 3, 2), (2, 1, 3, 2), (8, 1), (1, 2, 1, 4), (2,)]
    assert torch.autograd.gradcheck(ragged, doubles(*shapes))

    def windowed(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Any:
        options = {"local_window_size": 2, "sliding_window_cache": 1}
        return attention(q, k, v, pk, pv, ints([5]), ints(6), **options, **heads)

    assert torch.autograd.gradcheck(windowed, doubles((1, 2, 4), (1, 2, 2), (1, 2, 2), (1, 1, 3, 2), (1, 1, 3, 2)))
    turn = lookup(DOMAIN, "MRotaryEmbedding", 1).function
    ids = torch.tensor([[[0, 2]], [[1, 1]], [[2, 0]]])
    assert torch.autograd.gradcheck(
        lambda x, cos, sin: turn(x, ids, cos, sin, mrope_section=[1, 1, 1], num_heads=1),
        doubles((1, 2, 6), (3, 3), (3, 3)),
    )
    sparse = lookup(DOMAIN, "SparseAttention", 1).function
    rest = (*ROWS["two layouts"], ints(33), ints([33]))
    assert torch.autograd.gradcheck(
        lambda q, k, v, pk, pv: sparse(q, k, v, pk, pv, *rest, num_heads=2, kv_num_heads=1, sparse_block_size=16),
        doubles((1, 1, 4), (1, 1, 2), (1, 1, 2), (1, 1, 48, 2), (1, 1, 48, 2)),
    )


def test_shapes_without_data() -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    attention, lengths = lookup(DOMAIN, NAME, 1).function, meta(2, dtype=torch.int32)
    options = {"num_heads": HEADS, "kv_num_heads": KV, "outputs": 4, "do_rotary": 1}
    caches = meta(2, KV, 9, D), meta(2, KV, 9, D)
    turn = meta(32, D // 2), meta(32, D // 2)
    y = attention(meta(2, 1, 128), None, None, *caches, lengths, ints(6), *turn, **options)
    assert [x.shape for x in y] == [(2, 1, 64), (2, KV, 9, D), (2, KV, 9, D), (2, HEADS, 1, 6)]
    options |= {"local_window_size": 4, "sliding_window_cache": 1}
    y = attention(meta(2, 1, 128), None, None, *caches, lengths, ints(20), *turn, **options)
    assert [x.shape for x in y[:3]] == [(2, 1, 64), (2, KV, 9, D), (2, KV, 9, D)]
