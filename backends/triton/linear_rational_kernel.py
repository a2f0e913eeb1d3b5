"""x W^T + b with the grouped rational function applied while a tile of the product is in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Config, Kernel, dot, load_rows, store_rows
from .rational_kernels import load_coefficients, rational

# Tiles of rows that run side by side, so that they find the weights of one another in the cache.
_BAND = tl.constexpr(8)
# Columns of the widest tile to which the function is applied at once.
_WIDE = tl.constexpr(128)


@triton.jit
def _halves(z, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right columns of [BM, BN]."""
    return tl.split(tl.permute(tl.reshape(z, [BM, 2, BN // 2]), [0, 2, 1]))


@triton.jit
def _finish(
    z, out, bias, functions, rows, start, BM: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, FORM: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Adds the bias to BN columns of the product from `start` on, and writes the function's values."""
    numerator, denominator, a_b, b_b = functions
    row, column = tl.arange(0, BM), start + tl.arange(0, BN)
    if bias is not None:
        z += tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    # Where all of it lies within one group: one number per coefficient instead of one per column.
    group = start // (C // G)
    if G > 1 and (C // G) % BN != 0:
        group = (tl.minimum(column, C - 1) // (C // G))[None, :]
    a = load_coefficients(numerator + group * a_b, M + 1)
    b = load_coefficients(denominator + group * b_b, N, FORM == "sum_abs")
    store_rows(out, C, row, column, rows, C, rational(z, a, b, FORM, SPLIT))


@triton.jit
def _linear_rational_kernel(
    x, weight, bias, numerator, denominator, out, rows, x_t, w_t, a_b, b_b,
    K: tl.constexpr, C: tl.constexpr, G: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FORM: tl.constexpr,
    SPLIT: tl.constexpr, TRANSPOSED: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of `out` [rows, C]; `weight` is [C, K], or [K, C] if TRANSPOSED, `bias` may be None.

    TILE, SPAN: the largest tile that this many rows and columns deserve.
    """
    tl.static_assert(BM <= TILE)
    tl.static_assert(BN <= SPAN)
    program, across = tl.program_id(0), tl.cdiv(C, BN)
    band = program // (_BAND * across) * _BAND
    height = tl.minimum(tl.cdiv(rows, BM) - band, _BAND)
    within = program % (_BAND * across)
    first, n = (band + within % height) * BM, within // height
    row, column = tl.arange(0, BM), n * BN + tl.arange(0, BN)
    left = rows - first
    tile_of = x + first.to(tl.int64) * x_t
    z = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        values = load_rows(tile_of, x_t, row, k, left, K)
        if TRANSPOSED:
            weights = load_rows(weight, w_t, k, column, K, C)
        else:
            weights = tl.trans(load_rows(weight, w_t, column, k, C, K))
        z += dot(values, weights)
    functions = numerator, denominator, a_b, b_b
    target = out + first.to(tl.int64) * C
    if BN < _WIDE or (BN == _WIDE and (G == 1 or (C // G) % BN == 0)):
        _finish(z, target, bias, functions, left, n * BN, BM, BN, C, G, M, N, FORM, SPLIT)
    else:
        # Beside a wider tile, the polynomials of all its entries would not fit into registers; and a quarter may lie
        # within one group where the tile does not.
        near, far = _halves(z, BM, BN)
        for i in tl.static_range(4):
            first_of, second_of = _halves(near if i < 2 else far, BM, BN // 2)
            piece = first_of if i % 2 == 0 else second_of
            at = n * BN + i * (BN // 4)
            _finish(piece, target, bias, functions, left, at, BM, BN // 4, C, G, M, N, FORM, SPLIT)


linear_rational_kernel = Kernel(
    _linear_rational_kernel,
    [
        Config({"BM": 16, "BN": 16, "BK": 64}, warps=1, stages=2),
        Config({"BM": 16, "BN": 64, "BK": 128}, warps=4, stages=4),
        Config({"BM": 64, "BN": 64, "BK": 32}, warps=4, stages=3),
        Config({"BM": 64, "BN": 128, "BK": 64}, warps=4, stages=4),
        Config({"BM": 128, "BN": 128, "BK": 32}, warps=8, stages=3),
        Config({"BM": 128, "BN": 128, "BK": 64}, warps=8, stages=4),
        Config({"BM": 128, "BN": 256, "BK": 64}, warps=8, stages=3),
        Config({"BM": 128, "BN": 128, "BK": 64}, warps=8, stages=2),
    ],
    limits={"BM": "TILE", "BN": "SPAN"},
    key=("K", "C", "G", "M", "N", "FORM", "SPLIT", "TRANSPOSED", "TILE", "SPAN"),
)
