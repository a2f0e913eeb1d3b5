"""The ONNX forms of landmark attention and of softmax within blocks, in onnxruntime against the references."""

import pytest
import torch

from tests.backends.operator_models import export, lower


def operands(T, S=None, *, heads=(4, 2), weight=False, dtype=torch.float32, B=2):
    generator = torch.Generator().manual_seed(T)
    S = S or T
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731  # short
    given = {"q": make(B, heads[0], T, 6), "k": make(B, heads[1], S, 6), "v": make(B, heads[1], S, 5)}
    if weight:
        given["key_weight"] = (make(B, 1, S, 1) > -0.5) * make(B, 1, S, 1).abs()
    return {name: x.to(dtype) for name, x in given.items()}


@pytest.mark.parametrize("weight", [False, True], ids=["all keys", "weighted"])
@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
def test_blocks(causal, weight, tmp_path):
    lowered = lower(tmp_path, "block_attention", operands(9, weight=weight), block=16, causal=causal, scale=0.4)
    for T in (1, 2, 15, 16, 17, 70):
        lowered.compare(operands(T, weight=weight, B=1 + T % 2))


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("name", ["block_attention", "landmark_attention"])
def test_heads(name, heads, tmp_path):
    options = {"block": 8} if name == "block_attention" else {"landmarks": 5}
    lower(tmp_path, name, operands(9, heads=heads), **options).compare(operands(21, heads=heads))


def test_blocks_without_visible_keys(tmp_path):
    given = operands(9, weight=True)
    given["key_weight"] = torch.zeros_like(given["key_weight"])
    lowered = lower(tmp_path, "block_attention", given, block=4, causal=True)
    lowered.compare(given, expected=torch.zeros(2, 4, 9, 5), rtol=0, atol=0)


@pytest.mark.parametrize("weight", [False, True], ids=["all keys", "weighted"])
@pytest.mark.parametrize("landmarks", [1, 7, 49])
def test_landmarks(landmarks, weight, tmp_path):
    options = {"weight": weight}
    lowered = lower(tmp_path, "landmark_attention", operands(9, 7, **options), opset=11, landmarks=landmarks)
    for sizes in ((1, 1), (5, 70), (70, 5), (40, 40)):
        # fp32 through a system of condition 5,000 with one step of refinement.
        lowered.compare(operands(*sizes, **options), rtol=3e-5, atol=3e-5)


def test_landmarks_without_visible_keys(tmp_path):
    given = operands(9, weight=True)
    given["key_weight"] = torch.zeros_like(given["key_weight"])
    lower(tmp_path, "landmark_attention", given, landmarks=4).compare(
        given, expected=torch.zeros(2, 4, 9, 5), rtol=0, atol=0
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.float64, 1e-11)], ids=str)
@pytest.mark.parametrize("name", ["block_attention", "landmark_attention"])
@pytest.mark.parametrize("opset", [13, 20])
def test_types_and_opsets(name, dtype, tolerance, opset, tmp_path):
    # fp64 shows that nothing passes through fp32; fp16 differs by the rounding of the result alone.
    options = {"block": 8} if name == "block_attention" else {"landmarks": 5}
    given = operands(21, weight=True, dtype=dtype)
    lower(tmp_path, name, given, opset=opset, **options).compare(given, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("name", ["block_attention", "landmark_attention"])
def test_through_the_exporter(name, tmp_path):
    options = {"block": 8, "causal": True, "scale": 1 / 3} if name == "block_attention" else {"landmarks": 5}
    given = operands(9, weight=True)
    dynamic = {n: {0: "batch", 2: "length"} for n in given}
    lowered, names = export(tmp_path, name, given, dynamic, target="onnxruntime", **options)
    for T in (1, 21):
        other = operands(T, weight=True, B=3)
        lowered.compare({new: other[old] for new, old in names.items()}, rtol=3e-5, atol=3e-5)
