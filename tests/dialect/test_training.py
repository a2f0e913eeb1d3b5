"""Steps of optimisers, against torch's optimisers and the published evaluator."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from graphopt.dialect import lookup

DOMAIN = "ai.onnx.preview.training"
SHAPES = [(3, 2), (1,), (2, 0, 3), (5,)]
RATE = 0.1
# Both sides round at most a dozen times per step, in another order.
CLOSE = {"rtol": 1e-12, "atol": 1e-14}


def step(name: str, count: int, tensors: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    rate = torch.tensor(RATE, dtype=torch.float64)
    return lookup(DOMAIN, name, 1).function(rate, torch.tensor(count), *tensors, **options)


def tensors(kinds: int, seed: int = 0) -> list[Tensor]:
    """Values, gradients and states; all positive, as squares have to be."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, dtype=torch.float64, generator=generator) for _ in range(kinds) for shape in SHAPES]


def with_torch(
    optimiser: Callable[[list[Tensor]], torch.optim.Optimizer], gradients: list[list[Tensor]]
) -> list[Tensor]:
    """Where the parameters end after one step per list of gradients."""
    parameters = [x.clone().requires_grad_() for x in tensors(1)]
    steps = optimiser(parameters)
    for grads in gradients:
        for parameter, gradient in zip(parameters, grads, strict=True):
            parameter.grad = gradient
        steps.step()
    return [x.detach() for x in parameters]


def with_dialect(name: str, states: int, first: int, gradients: list[list[Tensor]], **options: Any) -> list[Tensor]:
    values, count = tensors(1), len(SHAPES)
    state = [torch.zeros_like(x) for _ in range(states) for x in values]
    for number, grads in enumerate(gradients, first):
        result = step(name, number, [*values, *grads, *state], **options)
        values, state = list(result[:count]), list(result[count:])
    return values


GRADIENTS = [[x - 0.5 for x in tensors(1, seed)] for seed in range(1, 6)]


@pytest.mark.parametrize(("norm", "decay"), [(0.0, 0.0), (0.3, 0.2)])
def test_adagrad_like_torch(norm: float, decay: float) -> None:
    wanted = with_torch(lambda p: torch.optim.Adagrad(p, RATE, lr_decay=decay, weight_decay=norm, eps=1e-3), GRADIENTS)
    found = with_dialect("Adagrad", 1, 0, GRADIENTS, norm_coefficient=norm, decay_factor=decay, epsilon=1e-3)
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("norm", [0.0, 0.3])
def test_adam_like_torch(norm: float) -> None:
    # torch adds its epsilon elsewhere.
    wanted = with_torch(lambda p: torch.optim.Adam(p, RATE, betas=(0.8, 0.95), weight_decay=norm, eps=0.0), GRADIENTS)
    found = with_dialect("Adam", 2, 1, GRADIENTS, alpha=0.8, beta=0.95, norm_coefficient=norm, epsilon=0.0)
    torch.testing.assert_close(found, wanted, **CLOSE)


# torch has Nesterov's momentum without dampening only.
@pytest.mark.parametrize(
    ("mode", "norm", "beta"),
    [("standard", 0.0, 1.0), ("standard", 0.3, 0.6), ("nesterov", 0.0, 1.0), ("nesterov", 0.3, 1.0)],
)
def test_momentum_like_torch(mode: str, norm: float, beta: float) -> None:
    wanted = with_torch(
        lambda p: torch.optim.SGD(
            p, RATE, momentum=0.9, dampening=1 - beta, weight_decay=norm, nesterov=mode == "nesterov"
        ),
        GRADIENTS,
    )
    found = with_dialect("Momentum", 1, 0, GRADIENTS, mode=mode, alpha=0.9, beta=beta, norm_coefficient=norm)
    torch.testing.assert_close(found, wanted, **CLOSE)


OPTIONS: list[tuple[str, int, dict[str, Any]]] = [
    ("Adagrad", 3, {"norm_coefficient": 0.25, "decay_factor": 0.5, "epsilon": 0.125}),
    ("Adam", 4, {"norm_coefficient": 0.25, "norm_coefficient_post": 0.5, "alpha": 0.75, "beta": 0.5, "epsilon": 0.125}),
    ("Momentum", 3, {"norm_coefficient": 0.25, "alpha": 0.75, "beta": 0.5, "mode": "standard"}),
    ("Momentum", 3, {"norm_coefficient": 0.25, "alpha": 0.75, "beta": 0.5, "mode": "nesterov"}),
]


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize(("name", "kinds", "options"), OPTIONS)
def test_all_options_like_the_published_evaluator(name: str, kinds: int, options: dict[str, Any], count: int) -> None:
    given = [x.to(torch.float32) for x in tensors(kinds)]
    names = ["rate", "count", *(f"x{i}" for i in range(len(given)))]
    results = [f"y{i}" for i in range((kinds - 1) * len(SHAPES))]
    codes = [TensorProto.FLOAT, TensorProto.INT64] + [TensorProto.FLOAT] * len(given)
    graph = helper.make_graph(
        [helper.make_node(name, names, results, domain=DOMAIN, **options)],
        "one",
        [helper.make_tensor_value_info(n, code, None) for n, code in zip(names, codes, strict=True)],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in results],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(DOMAIN, 1)])
    feeds = [np.float32(RATE), np.int64(count), *(x.numpy() for x in given)]
    wanted = ReferenceEvaluator(model).run(None, dict(zip(names, feeds, strict=True)))
    found = lookup(DOMAIN, name, 1).function(torch.tensor(RATE), torch.tensor(count), *given, **options)
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        # A dozen roundings in float32.
        np.testing.assert_allclose(mine.numpy(), theirs, rtol=12 * 2**-24, atol=2**-23)


@pytest.mark.parametrize(("name", "kinds", "options"), OPTIONS)
def test_types_shapes_and_inputs_are_kept(name: str, kinds: int, options: dict[str, Any]) -> None:
    given = [x.to(torch.float32) for x in tensors(kinds)]
    before = [x.clone() for x in given]
    found = step(name, 3, given, **options)
    states = given[: len(SHAPES)] + given[2 * len(SHAPES) :]
    assert [(x.dtype, x.shape) for x in found] == [(x.dtype, x.shape) for x in states]
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
    shapes = lookup(DOMAIN, name, 1).function(
        *(x.to("meta") for x in (torch.tensor(0.1), torch.tensor(3), *given)), **options
    )
    assert [(x.dtype, x.shape) for x in shapes] == [(x.dtype, x.shape) for x in states]
