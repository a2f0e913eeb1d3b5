"""y_i = exp(x_i - phi) / sum_j exp(x_j - phi) with one constant phi for all rows, and a guard.

FlashDecoding++ (Hong et al., 2023): a calibrated constant takes the place of each row's maximum, so that parts of a row
need not wait for each other. Rows that the constant does not fit are computed again with their own maximum.
"""

from __future__ import annotations

import torch

from graphopt.ops import kernels
from graphopt.ops.softmax_gradient import register_softmax_gradient

LOW, HIGH = -60.0, 60.0


def reference(x: torch.Tensor, dim: int = -1, phi: float = 0.0, low: float = LOW, high: float = HIGH) -> torch.Tensor:
    """Softmax along one axis, right for every row whatever `phi` is.

    Args:
        x: floats of any shape, such as scores [B, H, T, S].
        dim: the axis.
        phi: what is subtracted from each entry.
        low: a row is computed again if its largest entry minus phi is not above this ...
        high: ... or not below this.

    Returns:
        The shape and type of `x`; computed in fp32 or better. An entry of -inf weighs 0, and a row of them is 0; a row
        with NaN or +inf is NaN. In fp32 entries below 2^-39 of the row's largest may be 0.

    Raises:
        ValueError: `x` holds no floats, or the bounds are none that fp32 can keep.
    """
    check_bounds(low, high)
    check_floats(x)
    if not x.numel():
        return x.new_empty(x.shape)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = wide.amax(dim, keepdim=True)
    weights = torch.exp(wide - phi)
    y = weights / weights.sum(dim, keepdim=True)
    fits = (largest - phi > low) & (largest - phi < high)  # NaN fits nowhere
    if not fits.all():
        y = torch.where(fits, y, with_own_maximum(wide, dim))
    return y.to(x.dtype).contiguous()


def with_own_maximum(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Softmax in the type of `x`, each row shifted by its largest entry; a row of -inf alone is 0, and not NaN."""
    largest = x.amax(dim, keepdim=True)
    weights = torch.exp(x - largest.masked_fill(largest == -torch.inf, 0))
    total = weights.sum(dim, keepdim=True)
    return weights / total.masked_fill(total == 0, 1)


def check_floats(x: torch.Tensor) -> None:
    """Refuse what has no softmax.

    Raises:
        ValueError: `x` holds no floats.
    """
    if not x.is_floating_point():
        raise ValueError(f"expected a tensor of floats, got {x.dtype}; convert it first")


def check_bounds(low: float, high: float) -> None:
    """Refuse bounds within which a row's sum, or its largest term, could leave the range of fp32.

    Raises:
        ValueError: they do not lie in -60 <= low < high <= 60.
    """
    # Beside exp(-60) fp32 still has room for terms that count; exp(60) times 2^31 entries is still finite.
    if not -60 <= low < high <= 60:
        raise ValueError(f"expected -60 <= low < high <= 60, got {low} and {high}; move phi instead")


unified_max_softmax = torch.library.custom_op("graphopt::unified_max_softmax", reference, mutates_args=())


@unified_max_softmax.register_fake
def _(x: torch.Tensor, dim: int = -1, phi: float = 0.0, low: float = LOW, high: float = HIGH) -> torch.Tensor:
    return x.new_empty(x.shape)


register_softmax_gradient(unified_max_softmax)
kernels.look_up(unified_max_softmax, reference, "cpu")
