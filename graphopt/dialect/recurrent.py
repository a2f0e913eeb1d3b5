"""LSTM, GRU, and RNN, one step after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import operator

_Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]

_Activation = Callable[[Tensor], Tensor]
# None of these takes an alpha or a beta, which therefore the operators accept and ignore.
_ACTIVATIONS: dict[str, _Activation] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "tanh": torch.tanh,
}


def _activations(names: list[str] | None, default: Sequence[str], directions: int) -> list[list[_Activation]]:
    named = [name.lower() for name in names] if names else list(default) * directions
    for name in named:
        if name not in _ACTIVATIONS:
            raise NotImplementedError(f"recurrent operators do not cover the activation {name!r}")
    each = len(default)
    return [[_ACTIVATIONS[name] for name in named[i * each : (i + 1) * each]] for i in range(directions)]


def _directions(direction: str) -> list[bool]:
    """Return for each direction whether it runs backwards."""
    return {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]


def _run(
    x: Tensor, state: tuple[Tensor, ...], lengths: Tensor | None, backwards: bool, step: _Step
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run over `[T, B, I]`; steps beyond a sample's length leave its state alone and give zeros."""
    outputs: list[Tensor] = []
    order = range(x.shape[0])
    for t in reversed(order) if backwards else order:
        new = step(x[t], state)
        shown = new[0]
        if lengths is not None:
            live = (t < lengths).unsqueeze(-1)
            new = tuple(torch.where(live, a, b) for a, b in zip(new, state, strict=True))
            shown = torch.where(live, shown, torch.zeros_like(shown))
        state = new
        outputs.append(shown)
    return torch.stack(outputs[::-1] if backwards else outputs), state


def _start(given: Tensor | None, x: Tensor, count: int, hidden: int) -> Tensor:
    if given is not None:
        return given
    return torch.zeros((count, x.shape[1], hidden), dtype=x.dtype, device=x.device)


def _steps_first(x: Tensor, layout: int) -> Tensor:
    """Bring a batch-first tensor into the order of layout 0."""
    return x.transpose(0, 1) if layout else x


def _results(runs: list[tuple[Tensor, tuple[Tensor, ...]]], layout: int, outputs: int) -> Tensor | tuple[Tensor, ...]:
    y = torch.stack([run[0] for run in runs], 1)
    finals = [torch.stack(parts) for parts in zip(*(run[1] for run in runs), strict=True)]
    if layout:
        y, finals = y.permute(2, 0, 1, 3), [final.transpose(0, 1) for final in finals]
    return y if outputs == 1 else (y, *finals)[:outputs]


def _limited(x: Tensor, clip: float | None) -> Tensor:
    return x if not clip else x.clamp(-clip, clip)


@operator("RNN", counted=True)
def rnn_1(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    *,
    activation_alpha: list[float] | None = None,
    activation_beta: list[float] | None = None,
    activations: list[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    output_sequence: int = 0,
    outputs: int,
) -> Tensor | tuple[Tensor, ...]:
    """h_t = f(W x_t + R h_{t-1} + b) over `[T, B, I]`, or `[B, T, I]` in layout 1."""
    x, h = _steps_first(x, layout), None if h is None else _steps_first(h, layout)
    ways = _directions(direction)
    first = _start(h, x, len(ways), r.shape[-1])
    functions = _activations(activations, ("tanh",), len(ways))

    def run(i: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        bias = None if b is None else b[i].unflatten(0, (2, -1)).sum(0)
        seen = F.linear(x, w[i], bias)

        def step(now: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (functions[i][0](_limited(now + F.linear(state[0], r[i]), clip)),)

        return _run(seen, (first[i],), lengths, ways[i], step)

    return _results([run(i) for i in range(len(ways))], layout, outputs)


@operator("GRU", counted=True)
def gru_1(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    *,
    activation_alpha: list[float] | None = None,
    activation_beta: list[float] | None = None,
    activations: list[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
    output_sequence: int = 0,
    outputs: int,
) -> Tensor | tuple[Tensor, ...]:
    """h_t = (1 - z) n + z h_{t-1}, with the update gate z and the candidate n behind a reset gate."""
    x, h = _steps_first(x, layout), None if h is None else _steps_first(h, layout)
    ways, hidden = _directions(direction), r.shape[-1]
    first = _start(h, x, len(ways), hidden)
    functions = _activations(activations, ("sigmoid", "tanh"), len(ways))

    def run(i: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        gate, candidate = functions[i]
        seen = F.linear(x, w[i], None if b is None else b[i, : 3 * hidden])
        own = torch.zeros(3 * hidden, dtype=x.dtype, device=x.device) if b is None else b[i, 3 * hidden :]

        def step(now: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            past = state[0]
            recalled = F.linear(past, r[i, : 2 * hidden], own[: 2 * hidden])
            z, reset = gate(_limited(now[:, : 2 * hidden] + recalled, clip)).chunk(2, -1)
            inner, bias = r[i, 2 * hidden :], own[2 * hidden :]
            heard = F.linear(past if linear_before_reset else reset * past, inner, bias)
            heard = reset * heard if linear_before_reset else heard
            n = candidate(_limited(now[:, 2 * hidden :] + heard, clip))
            return ((1 - z) * n + z * past,)

        return _run(seen, (first[i],), lengths, ways[i], step)

    return _results([run(i) for i in range(len(ways))], layout, outputs)


@operator("LSTM", counted=True)
def lstm_1(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    c: Tensor | None = None,
    p: Tensor | None = None,
    *,
    activation_alpha: list[float] | None = None,
    activation_beta: list[float] | None = None,
    activations: list[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
    output_sequence: int = 0,
    outputs: int,
) -> Tensor | tuple[Tensor, ...]:
    """c_t = f c_{t-1} + i n;  h_t = o tanh(c_t), gates in the order i, o, f, n, with optional peepholes."""
    x = _steps_first(x, layout)
    h, c = (None if state is None else _steps_first(state, layout) for state in (h, c))
    ways, hidden = _directions(direction), r.shape[-1]
    first, cells = _start(h, x, len(ways), hidden), _start(c, x, len(ways), hidden)
    functions = _activations(activations, ("sigmoid", "tanh", "tanh"), len(ways))

    def run(d: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        gate, candidate, shown = functions[d]
        bias = None if b is None else b[d].unflatten(0, (2, -1)).sum(0)
        seen = F.linear(x, w[d], bias)
        peep_i, peep_o, peep_f = (0.0, 0.0, 0.0) if p is None else p[d].chunk(3)

        def step(now: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            i, o, f, n = (now + F.linear(state[0], r[d])).chunk(4, -1)
            i = gate(_limited(i + peep_i * state[1], clip))
            f = 1 - i if input_forget else gate(_limited(f + peep_f * state[1], clip))
            cell = f * state[1] + i * candidate(_limited(n, clip))
            o = gate(_limited(o + peep_o * cell, clip))
            return o * shown(cell), cell

        return _run(seen, (first[d], cells[d]), lengths, ways[d], step)

    return _results([run(d) for d in range(len(ways))], layout, outputs)
