"""Random operators: a seed gives numpy's numbers, no seed torch's; what is drawn has the right distribution."""

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from graphopt.dialect import lookup

CODES = {torch.float32: TensorProto.FLOAT, torch.float64: TensorProto.DOUBLE}
MANY = 20_000


def draw(name: str, *inputs: Any, **options: Any) -> Tensor:
    return lookup("", name, 22).function(*inputs, **options)


def published(name: str, *inputs: Tensor, code: int = TensorProto.FLOAT, **options: Any) -> np.ndarray:
    """What the evaluator of the onnx package draws."""
    names = [f"x{i}" for i in range(len(inputs))]
    declared = [helper.make_tensor_value_info(n, CODES[x.dtype], x.shape) for n, x in zip(names, inputs, strict=True)]
    graph = helper.make_graph(
        [helper.make_node(name, names, ["y"], **options)],
        "one",
        declared,
        [helper.make_tensor_value_info("y", code, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)])
    (result,) = ReferenceEvaluator(model).run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    return result


SHAPES = [(1,), (7,), (3, 0, 2), (2, 3, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0.0, 3.0, 70000.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_seed_gives_the_numbers_of_the_published_evaluator(
    shape: tuple[int, ...], seed: float, dtype: torch.dtype
) -> None:
    x = torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    code = CODES[dtype]
    options: dict[str, Any] = {"dtype": code, "seed": seed}
    for name, own in (("Uniform", {"high": 3.0, "low": -0.5}), ("Normal", {"mean": 1.5, "scale": 0.25})):
        for found, wanted in (
            (
                draw(f"Random{name}", shape=list(shape), **own, **options),
                published(f"Random{name}", code=code, shape=list(shape), **own, **options),
            ),
            (
                draw(f"Random{name}Like", x, **own, **options),
                published(f"Random{name}Like", x, code=code, **own, **options),
            ),
        ):
            assert found.dtype == dtype
            np.testing.assert_array_equal(found.numpy(), wanted)
    np.testing.assert_array_equal(
        draw("Bernoulli", x, **options).numpy(), published("Bernoulli", x, code=code, **options)
    )


def test_equal_seeds_draw_alike_and_others_do_not() -> None:
    for name, inputs, options in (
        ("RandomUniform", (), {"shape": [50]}),
        ("RandomNormal", (), {"shape": [50]}),
        ("RandomUniformLike", (torch.zeros(50),), {}),
        ("RandomNormalLike", (torch.zeros(50),), {}),
        ("Bernoulli", (torch.full((50,), 0.5),), {}),
        ("Multinomial", (torch.zeros(1, 9),), {"sample_size": 50}),
    ):
        first, again, other = (draw(name, *inputs, seed=seed, **options) for seed in (4.0, 4.0, 5.0))
        assert torch.equal(first, again), name
        assert not torch.equal(first, other), name
        torch.manual_seed(4)
        free = draw(name, *inputs, **options)
        torch.manual_seed(4)
        assert torch.equal(draw(name, *inputs, **options), free), name
        assert not torch.equal(draw(name, *inputs, **options), free), name
        torch.manual_seed(4)
        assert torch.equal(draw(name, *inputs, seed=float("nan"), **options), free), name


def test_a_seed_beyond_32_bits_is_taken() -> None:
    assert torch.equal(
        draw("RandomNormal", seed=float(2**40 + 2**20), shape=[5]), draw("RandomNormal", seed=float(2**20), shape=[5])
    )
    assert draw("RandomNormal", seed=-1.0, shape=[5]).shape == (5,)


@pytest.mark.parametrize("seed", [None, 2.0])
def test_distributions(seed: float | None) -> None:
    """Mean and variance of many draws lie within five standard errors."""
    torch.manual_seed(0)
    uniform = draw("RandomUniform", shape=[MANY], low=2.0, high=6.0, seed=seed).double()
    assert uniform.min() >= 2
    assert uniform.max() <= 6
    assert abs(uniform.mean() - 4) < 5 * (16 / 12 / MANY) ** 0.5
    normal = draw("RandomNormal", shape=[MANY], mean=-3.0, scale=2.0, seed=seed).double()
    assert abs(normal.mean() + 3) < 5 * 2 / MANY**0.5
    # The variance of n normal numbers has the standard error sigma^2 sqrt(2 / n).
    assert abs(normal.var() - 4) < 5 * 4 * (2 / MANY) ** 0.5
    for p in (0.0, 0.1, 0.5, 0.9, 1.0):
        hits = draw("Bernoulli", torch.full((MANY,), p), dtype=TensorProto.DOUBLE, seed=seed)
        assert set(hits.unique().tolist()) <= {0.0, 1.0}
        assert abs(hits.mean() - p) <= 5 * (p * (1 - p) / MANY) ** 0.5


LOGITS = torch.tensor([[0.0, 1.0, -1.0, 2.0, float("-inf")], [3.0, 3.0, float("-inf"), 3.0, -2.0]])


def frequencies(samples: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(row, minlength=LOGITS.shape[1]) for row in samples]) / samples.shape[1]


@pytest.mark.parametrize("seed", [None, 2.0])
def test_multinomial_follows_its_log_probabilities(seed: float | None) -> None:
    torch.manual_seed(0)
    exact = np.exp(LOGITS.numpy()) / np.exp(LOGITS.numpy()).sum(1, keepdims=True)
    spread = np.sqrt(exact * (1 - exact) / MANY)
    found = draw("Multinomial", LOGITS, sample_size=MANY, seed=seed)
    assert (found.dtype, found.shape) == (torch.int32, (2, MANY))
    assert (np.abs(frequencies(found.numpy()) - exact) <= 5 * spread).all()
    # So does onnxruntime: unnormalised logarithms are what the standard means.
    node = helper.make_node("Multinomial", ["x"], ["y"], sample_size=MANY, seed=2.0)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, LOGITS.shape)],
        [helper.make_tensor_value_info("y", TensorProto.INT32, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert (np.abs(frequencies(session.run(None, {"x": LOGITS.numpy()})[0]) - exact) <= 5 * spread).all()


def test_multinomial_draws_one_sample_by_default_and_the_type_that_is_asked_for() -> None:
    found = draw("Multinomial", LOGITS.to(torch.float16), dtype=TensorProto.INT64)
    assert (found.dtype, found.shape) == (torch.int64, (2, 1))
    assert draw("Multinomial", torch.zeros(0, 3), sample_size=4).shape == (0, 4)
    assert draw("Multinomial", torch.zeros(2, 1), sample_size=3).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("seed", [None, 1.0])
def test_shapes_and_types_without_data(seed: float | None) -> None:
    x = torch.zeros(2, 3, dtype=torch.float16, device="meta")
    for name, options, dtype in (
        ("RandomUniformLike", {}, torch.float16),
        ("RandomNormalLike", {"dtype": TensorProto.BFLOAT16}, torch.bfloat16),
        ("Bernoulli", {"dtype": TensorProto.BOOL}, torch.bool),
        ("Bernoulli", {}, torch.float16),
        ("Multinomial", {"sample_size": 3}, torch.int32),
    ):
        found = draw(name, x, seed=seed, **options)
        assert (found.device.type, found.dtype, found.shape) == ("meta", dtype, (2, 3)), name


def test_the_shape_may_be_that_of_integers_or_strings() -> None:
    for x in (torch.zeros(2, 3, dtype=torch.int64), np.array([["a", "b"], ["c", "d"]], dtype=object)):
        for name in ("RandomUniformLike", "RandomNormalLike"):
            found = draw(name, x, dtype=TensorProto.FLOAT)
            assert (found.dtype, tuple(found.shape)) == (torch.float32, tuple(x.shape))
    assert draw("RandomNormal", shape=[]).shape == ()


def dropped(x: Tensor, *arguments: Tensor | None, outputs: int = 2, **options: Any) -> Any:
    return lookup("", "Dropout", 22).function(x, *arguments, outputs=outputs, **options)


@pytest.mark.parametrize("seed", [None, 6])
def test_dropout_keeps_its_share_scaled(seed: int | None) -> None:
    torch.manual_seed(0)
    training = torch.tensor(True)
    for ratio in (0.5, 0.1, 0.75):
        x = torch.ones(MANY)
        y, mask = dropped(x, torch.tensor(ratio), training, seed=seed)
        assert mask.dtype == torch.bool
        assert abs(mask.double().mean() - (1 - ratio)) < 5 * (ratio * (1 - ratio) / MANY) ** 0.5
        # The ratio travels in float32.
        torch.testing.assert_close(y, mask / (1 - ratio), rtol=2**-22, atol=0)


def test_dropout_by_numpys_mask() -> None:
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    y, mask = dropped(x, torch.tensor(0.25), torch.tensor(True), seed=11)
    wanted = np.random.RandomState(11).uniform(size=(3, 5)) >= 0.25
    np.testing.assert_array_equal(mask.numpy(), wanted)
    # One rounding in float32.
    np.testing.assert_allclose(y.numpy(), np.where(wanted, x.numpy() / 0.75, 0), rtol=2**-22)


def test_dropout_at_its_ends() -> None:
    x, training = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(True)
    for given in ((), (torch.tensor(0.5),), (torch.tensor(0.5), torch.tensor(False)), (torch.tensor(0.0), training)):
        y, mask = dropped(x, *given)
        assert torch.equal(y, x)
        assert bool(mask.all())
    y, mask = dropped(x, torch.tensor(1.0), training)
    assert not y.any()
    assert not mask.any()
    # The ratio is one half where it is omitted.
    y = dropped(x, None, training, outputs=1, seed=0)
    assert 0 < (y == 0).sum() < 16
    assert torch.equal(y[y != 0], 2 * x[y != 0])


def test_dropout_in_training_is_differentiable() -> None:
    x = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y, mask = dropped(x, torch.tensor(0.5), torch.tensor(True), seed=0)
    y.sum().backward()
    assert torch.equal(x.grad, 2.0 * mask)
    y, mask = dropped(x.detach().to("meta", torch.bfloat16), torch.tensor(0.5), torch.tensor(True), seed=0)
    assert (y.device.type, y.dtype, mask.dtype, mask.shape) == ("meta", torch.bfloat16, torch.bool, (4, 4))
