"""The window, the state, and both under one denominator: against the definition, key by key, in fp64."""

import pytest
import torch

from graphopt.ops import window_attention, windowed_linear_attention

SCALE = 0.3


def naive(q, k, v, query_features, key_features, gate, key_weight=None, state=None, window=64, sinks=0, scale=1.0):
    """One query and one key at a time."""
    T, S, V = q.shape[2], k.shape[2], v.shape[-1]
    weight = torch.ones(1, 1, S, 1, dtype=q.dtype) if key_weight is None else key_weight
    out = torch.zeros(*q.shape[:3], V, dtype=q.dtype)
    last = torch.zeros(*key_features.shape[:2], key_features.shape[-1], V + 1, dtype=q.dtype)
    last = last if state is None else state.clone()
    before = last.clone()
    for b in range(q.shape[0]):
        m = weight[b if weight.shape[0] > 1 else 0, 0, :, 0]
        for h in range(q.shape[1]):
            kv, kf = h * k.shape[1] // q.shape[1], h * key_features.shape[1] // q.shape[1]
            for i in range(T):
                p = S - T + i
                near = [j for j in range(p + 1) if (j > p - window or j < sinks) and m[j] > 0]
                exponents = [scale * q[b, h, i] @ k[b, kv, j] for j in near]
                shift = torch.stack(exponents).max() if near else torch.zeros((), dtype=q.dtype)
                total, held = torch.zeros((), dtype=q.dtype), torch.zeros(V, dtype=q.dtype)
                for j in near:
                    w = gate[0, h, 0, 0] * m[j] * torch.exp(scale * q[b, h, i] @ k[b, kv, j] - shift)
                    total, held = total + w, held + w * v[b, kv, j]
                phi = query_features[b, h, i]
                past = before[b, kf]
                total, held = total + phi @ past[:, -1], held + phi @ past[:, :-1]
                for j in range(sinks, p - window + 1):
                    w = m[j] * (phi @ key_features[b, kf, j])
                    total, held = total + w, held + w * v[b, kv, j]
                if float(total.detach()) > 0:
                    out[b, h, i] = held / total
        for f in range(key_features.shape[1]):
            kv = f * k.shape[1] // key_features.shape[1]
            for j in range(sinks, S - window):
                one = torch.cat([v[b, kv, j], torch.ones(1, dtype=q.dtype)])
                last[b, f] = last[b, f] + m[j] * torch.outer(key_features[b, f, j], one)
    return out, last


def operands(T, S=None, *, heads=(4, 2), shared=False, D=6, V=5, F=4, dtype=torch.float64, seed=0, B=2):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731  # short
    S = T if S is None else S
    H, Hkv = heads
    q, k, v = 3 * make(B, H, T, D), make(B, Hkv, S, D), make(B, Hkv, S, V)
    features = make(B, H, T, F).exp(), make(B, Hkv if shared else H, S, F).exp()
    gate = torch.sigmoid(make(1, H, 1, 1))
    return tuple(x.to(dtype) for x in (q, k, v, *features, gate))


@pytest.mark.parametrize("window", [0, 1, 4, 7, 64])
@pytest.mark.parametrize("T", [1, 4, 5, 17])
@pytest.mark.parametrize("sinks", [0, 2])
def test_against_the_definition(T, window, sinks):
    arguments = operands(T)
    expected = naive(*arguments, window=window, sinks=sinks, scale=SCALE)
    found = windowed_linear_attention(*arguments, window=window, sinks=sinks, scale=SCALE)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-11, atol=1e-12)
    if window + sinks <= T:
        torch.testing.assert_close(found[1], expected[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (6, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["own maps", "shared maps"])
def test_groups_of_queries(heads, shared):
    arguments = operands(11, heads=heads, shared=shared)
    found = windowed_linear_attention(*arguments, window=3, scale=SCALE)
    torch.testing.assert_close(found, naive(*arguments, window=3, scale=SCALE), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("past", [1, 3, 4, 9], ids=lambda p: f"{p} cached")
@pytest.mark.parametrize("T", [1, 3, 10])
def test_with_cached_keys_and_a_state(past, T):
    arguments = operands(T, past + T)
    state = torch.rand(2, 4, 4, 6, dtype=torch.float64)
    weight = (torch.rand(2, 1, past + T, 1, generator=torch.Generator().manual_seed(1)) > 0.3).double()
    found = windowed_linear_attention(*arguments, weight, state, window=4, scale=SCALE)
    torch.testing.assert_close(found[0], naive(*arguments, weight, state, 4, 0, SCALE)[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("window", [1, 4, 8])
def test_prefill_and_decode_equal_the_full_run(window, sinks):
    q, k, v, qf, kf, gate = operands(25)
    whole, last = windowed_linear_attention(q, k, v, qf, kf, gate, window=window, sinks=sinks, scale=SCALE)
    state, outputs = None, []
    kept = torch.arange(0)
    for start, end in [(0, 10), (10, 11), (11, 12), (12, 20), *((t, t + 1) for t in range(20, 25))]:
        index = torch.cat([kept, torch.arange(start, end)])
        out, state = windowed_linear_attention(
            q[:, :, start:end], k[:, :, index], v[:, :, index], qf[:, :, start:end], kf[:, :, index], gate,
            None, state, window, sinks, SCALE,
        )  # fmt: skip
        outputs.append(out)
        kept = torch.cat([index[:sinks], index[sinks:][-window:]])
    torch.testing.assert_close(torch.cat(outputs, 2), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("T", [1, 15, 16, 17, 40, 150])
def test_a_window_over_everything_is_softmax(T):
    q, k, v, qf, kf, gate = operands(T, heads=(4, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
    for window in (T, T + 1, 1000):
        found, state = windowed_linear_attention(q, k, v, qf, kf, gate, window=window, scale=SCALE)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        assert (state == 0).all()
        plain = window_attention(q, k, v, None, window, 0, SCALE)
        torch.testing.assert_close(plain, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("window", [1, 5, 16, 100])
@pytest.mark.parametrize("sinks", [0, 4])
def test_window_against_a_mask(window, sinks):
    q, k, v, *_ = operands(37)
    i, j = torch.arange(37)[:, None], torch.arange(37)
    visible = (j <= i) & ((i - j < window) | (j < sinks))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, visible, scale=SCALE, enable_gqa=True)
    found = window_attention(q, k, v, None, window, sinks, SCALE)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_padding_on_either_side_and_rows_without_keys():
    arguments = operands(12)
    q, k, v, qf, kf, gate = operands(12)
    expected, _ = windowed_linear_attention(*arguments, window=4, scale=SCALE)

    def junk(x, left):
        five = torch.full_like(x[:, :, :5], 7.0)
        return torch.cat([five, x] if left else [x, five], 2)

    for left in (True, False):
        weight = torch.ones(2, 1, 12, 1, dtype=torch.float64)
        weight = torch.cat([0 * weight[:, :, :5], weight] if left else [weight, 0 * weight[:, :, :5]], 2)
        padded = [junk(x, left) for x in (q, k, v, qf, kf)]
        found, _ = windowed_linear_attention(*padded, gate, weight, window=4, scale=SCALE)
        real = found[:, :, 5:] if left else found[:, :, :12]
        torch.testing.assert_close(real, expected, rtol=1e-11, atol=1e-12)
        assert not found.isnan().any()
        if left:
            assert (found[:, :, :5] == 0).all()


@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (2, 0), (3, 1), (20, 0)])
def test_gradients(window, sinks):
    values = [x.requires_grad_(True) for x in operands(6, 8, heads=(2, 1), D=3, V=2, F=2, B=1)]
    weight = torch.rand(1, 1, 8, 1, dtype=torch.float64).requires_grad_(True)
    state = torch.rand(1, 2, 2, 3, dtype=torch.float64).requires_grad_(True)
    given = [*values, weight, state]
    upstream = torch.randn(1, 2, 6, 2, dtype=torch.float64)
    run = lambda f: torch.autograd.grad(f(*given, window, sinks, SCALE)[0], given, upstream, allow_unused=True)  # noqa: E731
    for found, expected in zip(run(windowed_linear_attention), run(naive), strict=True):
        if found is None or expected is None:
            assert found is None or (found == 0).all()
            continue
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_accumulates_in_fp32(dtype):
    """A denominator summed in bf16 would stop growing after 256 tokens."""
    arguments = operands(3000, heads=(2, 1), dtype=dtype, B=1)
    found, state = windowed_linear_attention(*arguments, window=16, scale=SCALE)
    expected, last = windowed_linear_attention(*(x.double() for x in arguments), window=16, scale=SCALE)
    assert found.dtype == dtype
    assert state.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)
    torch.testing.assert_close(state.double(), last, rtol=1e-4, atol=1e-3)


def test_large_logits_do_not_overflow():
    q, k, v, qf, kf, gate = (x.float() for x in operands(40))
    found, _ = windowed_linear_attention(100 * q, k, v, qf, kf, gate, window=8, scale=1.0)
    assert found.isfinite().all()


def test_memory_does_not_grow_with_the_square_of_the_length():
    """No value of T x T elements is made: the largest storage stays below a small multiple of T."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.elements = max(self.elements, x.numel())
            return out

    T = 4096
    arguments = operands(T, heads=(1, 1), dtype=torch.float32, B=1)
    with Largest() as mode:
        windowed_linear_attention(*arguments, window=16, scale=SCALE)
    assert mode.elements <= 200 * T


def test_library_registration():
    values = [x.requires_grad_(True) for x in operands(5, heads=(1, 1), B=1, dtype=torch.float32)]
    # Not with dynamic shapes: tracing the chunks for those takes a minute.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for op, arguments in (
        (torch.ops.graphopt.windowed_linear_attention.default, (*values, None, None, 3, 1, 0.5)),
        (torch.ops.graphopt.window_attention.default, (*values[:3], None, 3, 1, 0.5)),
    ):
        torch.library.opcheck(op, arguments, test_utils=checks)
