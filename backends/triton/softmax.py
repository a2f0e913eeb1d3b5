"""Softmax over one axis and its gradient on the kernels: the host's side of the three operators of `graphopt.ops`."""

from __future__ import annotations

import torch
import triton

from graphopt.errors import GraphOptError
from graphopt.ops.unified_max_softmax import HIGH, LOW, check_bounds

from .launch import padded, rows_of
from .softmax_rows import softmax_rows_gradient_kernel, softmax_rows_kernel
from .softmax_split import (
    softmax_parts_gradient_kernel,
    softmax_parts_kernel,
    softmax_write_gradient_kernel,
    softmax_write_kernel,
)

FORMS = ("two_pass", "online", "unified")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Entries of a row that one program holds, and of the tile of several short rows.
_ON_CHIP = 32768
_TILE = 4096
# Entries of a part: below the first a program is not worth its start, above the second it has enough to do.
_SHORTEST, _LONGEST = 1024, 16384
# Programs that fill one multiprocessor.
_PROGRAMS = 4


def supported(x: torch.Tensor) -> bool:
    """Whether the kernels compute this type and size: fp16, bf16 or fp32, at least one axis and one element."""
    return x.dtype in _DTYPES and x.dim() > 0 and x.numel() > 0


def forward(
    x: torch.Tensor,
    dim: int = -1,
    phi: float = 0.0,
    low: float = LOW,
    high: float = HIGH,
    *,
    form: str = "online",
    split: bool | None = None,
) -> torch.Tensor:
    """Softmax along one axis: rows on chip where they fit, else split over several programs.

    Args:
        x: floats of any shape, such as scores [B, H, T, S].
        dim: the axis.
        phi: of the form `unified`: what is subtracted from each entry.
        low: a part is summed again with its own maximum if its largest entry minus phi is not above this ...
        high: ... or not below this.
        form: how the parts of a split row are summed, one of `FORMS`; on chip all of them are the same.
        split: whether to split rows; None chooses by the sizes.

    Returns:
        The shape and type of `x`, contiguous. An entry of -inf weighs 0, and a row of them is 0; a row with NaN or +inf
        is NaN.

    Raises:
        GraphOptError: the form is unknown, or the kernels do not take the type or size.
        ValueError: the bounds are none that fp32 can keep.
    """
    if form not in FORMS:
        raise GraphOptError(f"expected form to be one of {', '.join(FORMS)}, got {form!r}")
    _check(x)
    if form == "unified":
        check_bounds(low, high)
    rows = _rows(x, dim)
    count, N = rows.shape
    out = torch.empty((count, N), dtype=x.dtype, device=x.device)
    if not _splits(count, N, x.device, split):
        held = _rows_per_program(N)
        softmax_rows_kernel(
            lambda meta: (-(-count // held),),
            x=rows, out=out, x_t=rows.stride(0), rows=count, N=N, R=held, BN=padded(N),
        )  # fmt: skip
        return _restored(out, x, dim)
    length, parts = _parts(count, N, x.device)
    shifts, sums = (torch.empty((count, parts), dtype=torch.float32, device=x.device) for _ in range(2))
    common = {"x": rows, "shifts": shifts, "sums": sums, "x_t": rows.stride(0), "N": N, "LENGTH": length, "FORM": form}
    softmax_parts_kernel(lambda meta: (count, parts), phi=float(phi), low=float(low), high=float(high), **common)
    softmax_write_kernel(lambda meta: (count, parts), out=out, P=padded(parts), **common)
    return _restored(out, x, dim)


def gradient(dy: torch.Tensor, y: torch.Tensor, dim: int = -1, *, split: bool | None = None) -> torch.Tensor:
    """The gradient y (g - sum(g y)) along one axis, which all forms share.

    Args:
        dy: g, of the shape of `y`.
        y: what `forward` returned.
        dim: the axis.
        split: whether to split rows; None chooses by the sizes.

    Returns:
        The shape and type of `y`, contiguous.

    Raises:
        GraphOptError: the kernels do not take the type or size.
    """
    _check(y)
    upstream, probabilities = (_rows(z, dim).contiguous() for z in (dy.expand(y.shape), y))
    count, N = probabilities.shape
    out = torch.empty((count, N), dtype=y.dtype, device=y.device)
    common = {"dy": upstream, "y": probabilities, "N": N}
    if not _splits(count, N, y.device, split):
        held = _rows_per_program(N)
        softmax_rows_gradient_kernel(
            lambda meta: (-(-count // held),), dx=out, rows=count, R=held, BN=padded(N), **common
        )
        return _restored(out, y, dim)
    length, parts = _parts(count, N, y.device)
    sums = torch.empty((count, parts), dtype=torch.float32, device=y.device)
    softmax_parts_gradient_kernel(lambda meta: (count, parts), sums=sums, LENGTH=length, **common)
    softmax_write_gradient_kernel(
        lambda meta: (count, parts), sums=sums, dx=out, LENGTH=length, P=padded(parts), **common
    )
    return _restored(out, y, dim)


def _check(x: torch.Tensor) -> None:
    if not supported(x):
        raise GraphOptError(
            f"expected an fp16, bf16 or fp32 tensor with at least one axis and one element, got {x.dtype} "
            f"{list(x.shape)}; the torch implementation takes others"
        )


def _rows(x: torch.Tensor, dim: int) -> torch.Tensor:
    """[.., N, ..] -> [rows, N], the last dimension dense; a copy only where strides demand one."""
    return rows_of(x.movedim(dim, -1).reshape(-1, x.shape[dim]))


def _restored(rows: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    """[rows, N] -> the shape that `_rows` got."""
    return rows.view(x.movedim(dim, -1).shape).movedim(-1, dim).contiguous()


def _rows_per_program(N: int) -> int:
    return max(1, _TILE // padded(N))


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _splits(count: int, N: int, device: torch.device, split: bool | None) -> bool:
    if split is not None:
        return split
    # Few rows of some length leave multiprocessors idle if each has one program.
    return N > _ON_CHIP or (N > _TILE and count < _processors(device))


def _parts(count: int, N: int, device: torch.device) -> tuple[int, int]:
    """Entries of a part, and how many parts a row has."""
    wanted = -(-_PROGRAMS * _processors(device) // count)
    length = int(triton.next_power_of_2(-(-N // wanted)))
    length = min(max(length, _SHORTEST), _LONGEST)
    return length, -(-N // length)
