"""The operators of graphopt.ops run on the kernels once these are registered; run by ../test_kernels.py."""

from typing import Any

import pytest
import torch

import graphopt
from graphopt import registry
from graphopt.backends.triton import enable
from graphopt.backends.triton.launch import Kernel
from graphopt.ops import kernels, linear_attention, windowed_linear_attention
from graphopt.ops.linear_attention import chunked
from graphopt.ops.windowed_linear_attention import reference

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that ran."""
    enable(DEVICE)
    names: list[str] = []
    start = Kernel.__call__

    def counting(self: Kernel, *args: Any, **kwargs: Any) -> None:
        names.append(self.name)
        start(self, *args, **kwargs)

    monkeypatch.setattr(Kernel, "__call__", counting)
    return names


def tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    shapes = ((1, 2, 20, 16), (1, 1, 20, 16), (1, 1, 20, 16), (1, 2, 20, 16), (1, 1, 20, 16), (1, 2, 1, 1))
    made = [torch.randn(shape, generator=make, dtype=dtype).to(DEVICE) for shape in shapes]
    return [*made[:3], made[3].softmax(-1), made[4].softmax(-1), made[5].sigmoid()]


def compare(op: Any, plain: Any, inputs: list[torch.Tensor], *others: Any) -> None:
    found = [x.clone().requires_grad_() for x in inputs]
    right = [x.clone().requires_grad_() for x in inputs]
    out, expected = op(*found, *others)[0], plain(*right, *others)[0]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)  # fp32 sums of twenty products
    out.sin().sum().backward()
    expected.sin().sum().backward()
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


def test_linear_attention_takes_the_kernels_forward_and_backward(started: list[str]) -> None:
    compare(linear_attention, chunked, tensors()[:3])
    assert {"_forward_kernel", "_reverse_kernel", "_gradient_kernel"} <= set(started)


def test_windowed_attention_takes_the_kernels_forward_and_backward(started: list[str]) -> None:
    compare(windowed_linear_attention, reference, tensors(), None, None, 8)
    assert {"_hybrid_kernel", "_hybrid_query_kernel", "_hybrid_key_kernel"} <= set(started)


def test_other_types_take_the_reference(started: list[str]) -> None:
    compare(linear_attention, chunked, tensors(torch.float64)[:3])
    assert started == []


def test_a_trained_key_weight_takes_the_reference_backward(started: list[str]) -> None:
    weight = torch.rand(1, 1, 20, 1, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    compare(windowed_linear_attention, reference, [*tensors(), weight], None, 8)
    assert "_hybrid_kernel" in started
    assert "_hybrid_query_kernel" not in started


def test_no_gradients_for_what_needs_none(started: list[str]) -> None:
    q, k, v = tensors()[:3]
    v.requires_grad_()
    linear_attention(q, k, v)[0].sum().backward()
    assert v.grad is not None
    assert q.grad is None


def test_registering_twice_changes_nothing(started: list[str]) -> None:
    before = kernels.registered(linear_attention, DEVICE)
    enable(DEVICE)
    assert kernels.registered(linear_attention, DEVICE) == before
    compare(linear_attention, chunked, tensors()[:3])


class Linear(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return linear_attention(q, k, v)[0]


def test_the_target_lowers_to_a_module_on_the_kernels(started: list[str]) -> None:
    graph = graphopt.load(Linear(), tuple(x.cpu() for x in tensors()[:3]))
    module = registry.backend("triton").lower(graph)
    inputs = tensors()[:3]
    torch.testing.assert_close(module(*inputs), chunked(*inputs)[0], atol=1e-5, rtol=1e-5)
    assert "_forward_kernel" in started
