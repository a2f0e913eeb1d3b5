"""Attention with functions of the model's own, against torch's attentions and the published outputs."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import helper
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.case.test_case import TestCase
from onnx.reference import ReferenceEvaluator
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from graphopt.dialect import lookup

attend = lookup("ai.onnx.preview", "FlexAttention", 1).function


def cases() -> dict[str, TestCase]:
    with warnings.catch_warnings():
        # The suite computes its own NaN and infinite expectations with numpy.
        warnings.simplefilter("ignore", RuntimeWarning)
        found = collect_testcases("FlexAttention")
    # What other modules of the process collected is given out again.
    return {case.name: case for case in found if [n.op_type for n in case.model.graph.node] == ["FlexAttention"]}


CASES = cases()


def body(graph: onnx.GraphProto, opsets: Any) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A graph attribute as a function, run by the published evaluator."""
    evaluator = ReferenceEvaluator(helper.make_model(graph, opset_imports=opsets))

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, evaluator.run(None, {graph.input[0].name: x.numpy()})))

    return run


@pytest.mark.parametrize("name", sorted(CASES))
def test_published_outputs(name: str) -> None:
    model = CASES[name].model
    options = {a.name: helper.get_attribute_value(a) for a in model.graph.node[0].attribute}
    options = {k: body(v, model.opset_import) if isinstance(v, onnx.GraphProto) else v for k, v in options.items()}
    for inputs, (wanted,) in CASES[name].data_sets:
        found = attend(*(torch.from_numpy(x) for x in inputs), **options).numpy()
        assert found.dtype == wanted.dtype
        # A few units of the type: the products are summed in another order.
        unit = np.finfo(wanted.dtype).eps
        np.testing.assert_allclose(found, wanted, rtol=8 * unit, atol=8 * unit)


def test_all_published_models_were_found() -> None:
    assert len(CASES) == 11


def random(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]


SHAPES = [
    ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3)),
    ((1, 3, 1, 6), (1, 1, 9, 6), (1, 1, 9, 6)),
    ((3, 2, 4, 2), (3, 2, 4, 2), (3, 2, 4, 5)),
]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("shapes", SHAPES)
def test_plain_attention_like_torch(shapes: tuple[tuple[int, ...], ...], scale: float | None) -> None:
    q, k, v = random(*shapes)
    wanted = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
    # The standard multiplies q and k by the root each.
    torch.testing.assert_close(attend(q, k, v, scale=scale), wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_function_of_the_scores_like_torch() -> None:
    q, k, v = random((2, 4, 8, 16), (2, 4, 8, 16), (2, 4, 8, 16), dtype=torch.float32)
    row, column = torch.arange(8).unsqueeze(1), torch.arange(8)

    def near(scores: Tensor) -> tuple[Tensor, ...]:
        return (torch.where(row >= column, 2 * torch.tanh(scores / 2) - 0.1 * (row - column), float("-inf")),)

    wanted = flex_attention(
        q,
        k,
        v,
        score_mod=lambda s, b, h, i, j: torch.where(i >= j, 2 * torch.tanh(s / 2) - 0.1 * (i - j), float("-inf")),
    )
    torch.testing.assert_close(attend(q, k, v, score_mod=near), wanted, rtol=1e-5, atol=1e-6)


def test_what_the_functions_get_and_give() -> None:
    q, k, v = random((1, 2, 3, 4), (1, 1, 5, 4), (1, 1, 5, 2), dtype=torch.float16)
    seen = []

    def watch(x: Tensor) -> tuple[Tensor, ...]:
        seen.append((x.dtype, x.shape))
        return (x,)

    for precision, dtype in ((None, torch.float32), (10, torch.float16), (11, torch.float64)):
        y = attend(q, k, v, score_mod=watch, prob_mod=watch, softmax_precision=precision)
        assert seen[-2:] == [(dtype, (1, 2, 3, 5))] * 2
        assert (y.dtype, y.shape) == (torch.float16, (1, 2, 3, 2))
    assert not attend(q, k, v, prob_mod=lambda x: (torch.zeros_like(x),)).any()


def test_a_row_that_is_masked_entirely_is_nan() -> None:
    # As softmax is in the standard; the operator Attention gives zeros there.
    q, k, v = random((1, 1, 2, 4), (1, 1, 3, 4), (1, 1, 3, 4))
    first = torch.tensor([[True], [False]])
    y = attend(q, k, v, score_mod=lambda x: (x.masked_fill(first, float("-inf")),))
    assert y[0, 0, 0].isnan().all()
    assert y[0, 0, 1].isfinite().all()


def test_gradient() -> None:
    inputs = [x.requires_grad_() for x in random((1, 2, 3, 4), (1, 1, 2, 4), (1, 1, 2, 3))]
    assert torch.autograd.gradcheck(
        lambda q, k, v: attend(q, k, v, score_mod=lambda x: (x.sin(),), prob_mod=lambda x: (x * x,)), inputs
    )


def test_shapes_without_data() -> None:
    q, k, v = (x.to("meta", torch.bfloat16) for x in random(*SHAPES[0]))
    y = attend(q, k, v, score_mod=lambda x: (x + 1,))
    assert (y.device.type, y.dtype, y.shape) == ("meta", torch.bfloat16, (2, 4, 5, 3))
