"""`graphopt::group_rational` and its gradients on the kernels: the host's side."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphopt.errors import GraphOptError
from graphopt.ops.group_rational import FORMS, gradients

from .rational_kernels import group_rational_gradient_kernel, group_rational_kernel

LARGEST_DEGREE = 7
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Programs per multiprocessor: many for an even load, few enough that adding up their sums costs nothing.
_PROGRAMS = 32
# Elements below which a program is not worth its start, and of how many rows a program's range is a multiple.
_FEWEST = 4096
_ROWS = 16
# Channels that a tile spans.
_WIDTHS = (128, 64, 32, 16)


def supported(
    x: torch.Tensor,
    numerator: torch.Tensor,
    denominator: torch.Tensor,
    form: str = "abs_sum",
    split: bool = False,
) -> bool:
    """Whether the kernels compute these types and sizes: fp16, bf16 or fp32 with an element, degrees up to 7."""
    return x.dtype in DTYPES and x.dim() > 0 and x.numel() > 0 and fits(x.shape[-1], x, numerator, denominator, form)


def fits(
    channels: int, x: torch.Tensor, numerator: torch.Tensor, denominator: torch.Tensor, form: str = "abs_sum"
) -> bool:
    """Whether these are coefficients, beside `x`, that the kernels take for this number of channels."""
    if form not in FORMS or any(c.dim() != 2 or c.device != x.device for c in (numerator, denominator)):
        return False
    (first, above), (second, below) = numerator.shape, denominator.shape
    groups = max(first, second)
    if not 1 <= above <= LARGEST_DEGREE + 1 or below > LARGEST_DEGREE:
        return False
    return {first, second} <= {1, groups} and channels % groups == 0


@dataclass(frozen=True)
class Coefficients:
    """Both kinds as the kernels read them: dense, in fp32, with the distance from group to group, 0 if they share."""

    numerator: torch.Tensor
    denominator: torch.Tensor
    form: str
    split: bool

    @property
    def groups(self) -> int:
        """G."""
        return max(self.numerator.shape[0], self.denominator.shape[0])

    def common(self) -> dict[str, object]:
        """The arguments that all kernels take."""
        (first, above), (second, below) = self.numerator.shape, self.denominator.shape
        return {
            "numerator": self.numerator, "denominator": self.denominator,
            "a_b": above if first > 1 else 0, "b_b": below if second > 1 else 0,
            "M": above - 1, "N": below, "FORM": self.form, "SPLIT": self.split,
        }  # fmt: skip


def coefficients(numerator: torch.Tensor, denominator: torch.Tensor, form: str, split: bool) -> Coefficients:
    """Coefficients [G or 1, m + 1] and [G or 1, n] as the kernels read them."""
    return Coefficients(numerator.float().contiguous(), denominator.float().contiguous(), form, split)


def forward(
    x: torch.Tensor,
    numerator: torch.Tensor,
    denominator: torch.Tensor,
    form: str = "abs_sum",
    split: bool = False,
) -> torch.Tensor:
    """The operator on the kernels: one read, one write, everything between in fp32.

    Args:
        x: [.., C].
        numerator: [G, m + 1], or [1, m + 1] for all groups; m at most 7.
        denominator: [G, n], or [1, n]; n at most 7, and G divides C.
        form: which denominator, out of `graphopt.ops.group_rational.FORMS`.
        split: relu(x) - R(min(|x|, FARTHEST)) in place of R(x).

    Returns:
        [.., C] in the type of `x`, with the strides that `torch.empty_like` gives it.

    Raises:
        GraphOptError: the kernels do not take these types or sizes, or there is no such form.
    """
    _check(x, numerator, denominator, form)
    functions = coefficients(numerator, denominator, form, split)
    source = x.contiguous()
    out = torch.empty_like(source)
    ranges = _ranges(source, functions.groups)
    group_rational_kernel(
        lambda meta: (functions.groups, ranges.parts), x=source, out=out, **ranges.common(), **functions.common()
    )
    target = torch.empty_like(x)
    return out if target.stride() == out.stride() else target.copy_(out)


def backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    numerator: torch.Tensor,
    denominator: torch.Tensor,
    form: str = "abs_sum",
    split: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, numerator and denominator in their types, all in one sweep: two reads, one write.

    Coefficients get sums over all rows and a group's channels. A program adds up its share in registers and writes one
    number per coefficient; torch adds those. With equal block sizes (which are tuned once per process) two runs agree
    bit for bit, which atomic additions would not give. Where the gradients themselves are to be differentiated, the
    operator's own formulas give them.

    Args:
        gradient: of the result [.., C].
        x: this and all others as in `forward`.
        numerator: see there.
        denominator: see there.
        form: see there.
        split: see there.

    Raises:
        GraphOptError: the kernels do not take these types or sizes, or there is no such form.
    """
    _check(x, numerator, denominator, form)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (gradient, x, numerator, denominator)):
        return gradients(gradient, x, numerator, denominator, form, split)
    functions = coefficients(numerator, denominator, form, split)
    source, upstream = x.contiguous(), gradient.to(x.dtype).expand(x.shape).contiguous()
    dx = torch.empty_like(source)
    ranges = _ranges(source, functions.groups)
    count = numerator.shape[1] + denominator.shape[1]
    partials = torch.empty((ranges.parts, functions.groups, count), dtype=torch.float32, device=x.device)
    group_rational_gradient_kernel(
        lambda meta: (functions.groups, ranges.parts),
        dy=upstream, x=source, dx=dx, partials=partials, **ranges.common(), **functions.common(),
    )  # fmt: skip
    sums = partials.sum(0)
    above, below = sums[:, : numerator.shape[1]], sums[:, numerator.shape[1] :]
    return dx, _shared(above, numerator), _shared(below, denominator)


def _check(x: torch.Tensor, numerator: torch.Tensor, denominator: torch.Tensor, form: str) -> None:
    if not supported(x, numerator, denominator, form):
        raise GraphOptError(
            f"expected an fp16, bf16 or fp32 tensor with at least one element, a number of channels that the groups "
            f"divide, degrees up to {LARGEST_DEGREE} and a form out of {', '.join(FORMS)}, got {x.dtype} "
            f"{list(x.shape)}, coefficients {list(numerator.shape)} and {list(denominator.shape)} and {form!r}; the "
            "torch implementation takes others"
        )


def _shared(sums: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[G, count] -> the shape and type of the coefficients."""
    if like.shape[0] == 1:
        sums = sums.sum(0, keepdim=True)
    return sums.to(like.dtype)


@dataclass(frozen=True)
class _Ranges:
    """How the rows of [rows, C] are dealt out: `parts` programs for each group, `length` rows each."""

    rows: int
    length: int
    channels: int
    groups: int

    @property
    def parts(self) -> int:
        return -(-self.rows // self.length)

    def common(self) -> dict[str, int]:
        width = self.channels // self.groups
        return {"rows": self.rows, "length": self.length, "x_t": self.channels, "group_t": width, "BC": _span(width)}


def _ranges(x: torch.Tensor, groups: int) -> _Ranges:
    channels = x.shape[-1]
    rows = x.numel() // channels
    wanted = min(-(-_PROGRAMS * _processors(x.device) // groups), -(-x.numel() // (groups * _FEWEST)))
    length = -(-rows // wanted)
    return _Ranges(rows, -(-length // _ROWS) * _ROWS, channels, groups)


def _span(width: int) -> int:
    """The widest tile with at most an eighth of it beside a group's channels, or else the one that fits best."""
    covered = {span: -(-width // span) * span for span in _WIDTHS}
    close = [span for span in _WIDTHS if 8 * covered[span] <= 9 * width]
    return close[0] if close else min(_WIDTHS, key=lambda span: covered[span])


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
