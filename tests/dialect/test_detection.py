"""Suppression of boxes, pooling of regions, and deformable convolution, against onnxruntime and finite differences."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from graphopt.dialect import lookup


def node(name: str, opset: int, inputs: list[Tensor], **options: Any) -> onnx.ModelProto:
    """A model of one operator; int64 inputs are declared as such, all others as float32."""
    names = [f"x{i}" for i in range(len(inputs))]
    codes = [TensorProto.INT64 if x.dtype == torch.int64 else TensorProto.FLOAT for x in inputs]
    declared = [helper.make_tensor_value_info(n, c, x.shape) for n, c, x in zip(names, codes, inputs, strict=True)]
    result = [helper.make_empty_tensor_value_info("y")]
    graph = helper.make_graph([helper.make_node(name, names, ["y"], **options)], "one", declared, result)
    # onnxruntime keeps MaxRoiPool to models of its time.
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10 if opset > 9 else 3)


def by_onnxruntime(name: str, opset: int, inputs: list[Tensor], **options: Any) -> np.ndarray:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    proto = node(name, opset, inputs, **options)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), settings, ["CPUExecutionProvider"])
    (result,) = session.run(None, {f"x{i}": x.numpy() for i, x in enumerate(inputs)})
    return result


def dialect(name: str, opset: int, inputs: list[Tensor], **options: Any) -> Tensor:
    return lookup("", name, opset).function(*inputs, **options)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def boxes_and_scores(seed: int, samples: int, classes: int, count: int) -> tuple[Tensor, Tensor]:
    generator = rng(seed)
    return torch.rand(samples, count, 4, generator=generator) * 10, torch.rand(
        samples, classes, count, generator=generator
    )


def limits(most: int, overlap: float, score: float) -> list[Tensor]:
    return [torch.tensor([most]), torch.tensor([overlap]), torch.tensor([score])]


SIZES = [(1, 1, 1), (1, 1, 7), (2, 3, 31), (3, 1, 64), (1, 5, 200)]


@pytest.mark.parametrize("center_point_box", [0, 1])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_suppression_agrees_with_onnxruntime(size: tuple[int, int, int], ties: bool, center_point_box: int) -> None:
    boxes, scores = boxes_and_scores(sum(size), *size)
    if ties:
        boxes, scores = boxes.round(), (scores * 4).round() / 4
    for limit in (limits(3, 0.1, 0.5), limits(10**6, 0.4, 0.0), limits(size[2], 0.0, 0.25)):
        inputs = [boxes, scores, *limit]
        for given in range(3, 6):
            found = dialect("NonMaxSuppression", 11, inputs[:given], center_point_box=center_point_box)
            wanted = by_onnxruntime("NonMaxSuppression", 11, inputs[:given], center_point_box=center_point_box)
            np.testing.assert_array_equal(found.numpy(), wanted)


def test_suppression_of_more_boxes_than_are_compared_at_once() -> None:
    boxes, scores = boxes_and_scores(0, 1, 2, 4000)
    for limit in (limits(50, 0.3, 0.1), limits(4000, 0.9, 0.0)):
        inputs = [boxes, scores, *limit]
        wanted = by_onnxruntime("NonMaxSuppression", 10, inputs, center_point_box=1)
        assert len(wanted) > 50
        np.testing.assert_array_equal(dialect("NonMaxSuppression", 10, inputs, center_point_box=1).numpy(), wanted)


@pytest.mark.parametrize(
    "given",
    [[], limits(0, 0.5, 0.0), limits(-1, 0.5, 0.0), limits(5, 0.5, 1.0)],
    ids=["no limit", "limit 0", "negative limit", "no box scores enough"],
)
def test_suppression_that_picks_nothing(given: list[Tensor]) -> None:
    found = dialect("NonMaxSuppression", 11, [*boxes_and_scores(0, 2, 3, 5), *given])
    assert (found.dtype, found.shape) == (torch.int64, (0, 3))


@pytest.mark.parametrize("size", [(1, 1, 0), (0, 2, 3), (1, 0, 3)])
def test_suppression_without_boxes(size: tuple[int, int, int]) -> None:
    found = dialect("NonMaxSuppression", 11, [*boxes_and_scores(0, *size), *limits(5, 0.5, 0.0)])
    assert (found.dtype, found.shape) == (torch.int64, (0, 3))


def test_suppression_leaves_its_inputs_alone_and_takes_those_of_a_graph_that_trains() -> None:
    boxes, scores = boxes_and_scores(0, 1, 1, 9)
    before = boxes.clone(), scores.clone()
    found = dialect("NonMaxSuppression", 11, [boxes.requires_grad_(), scores.requires_grad_(), *limits(5, 0.5, 0.0)])
    assert len(found)
    assert torch.equal(boxes, before[0])
    assert torch.equal(scores, before[1])


def regions(seed: int, count: int) -> Tensor:
    """Regions (x1, y1, x2, y2), in and around an image of 9 x 7 pixels; the last one has no extent."""
    corner = torch.rand(count, 2, generator=rng(seed)) * 12 - 4
    extent = torch.rand(count, 2, generator=rng(seed + 1)) * 9
    extent[-1:] = 0
    return torch.cat((corner, corner + extent), 1)


MAPS = torch.randn(3, 4, 7, 9, generator=rng(5))
ROI_OPTIONS = [
    {"mode": mode, "sampling_ratio": ratio, "spatial_scale": scale}
    for mode in ("avg", "max")
    for ratio in (0, 1, 3)
    for scale in (1.0, 0.7)
]


@pytest.mark.parametrize("options", ROI_OPTIONS, ids=str)
@pytest.mark.parametrize("opset", [10, 16])
def test_roi_align_agrees_with_onnxruntime(opset: int, options: dict[str, Any]) -> None:
    inputs = [MAPS, regions(1, 70), torch.arange(70) % 3]
    shifts = (
        [{}] if opset < 16 else [{"coordinate_transformation_mode": s} for s in ("half_pixel", "output_half_pixel")]
    )
    for shift in shifts:
        keywords = {"output_height": 3, "output_width": 2, **options, **shift}
        found = dialect("RoiAlign", opset, inputs, **keywords)
        wanted = by_onnxruntime("RoiAlign", opset, inputs, **keywords)
        # Means of up to 25 products of standard normal numbers, summed in another order.
        np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_of_inverted_regions(mode: str, ratio: int) -> None:
    # onnxruntime refuses them where it has to count their points.
    inputs = [MAPS, regions(1, 6)[:, [2, 3, 0, 1]], torch.zeros(6, dtype=torch.int64)]
    options = {"mode": mode, "sampling_ratio": ratio, "output_height": 2, "output_width": 2}
    feeds = {f"x{i}": x.numpy() for i, x in enumerate(inputs)}
    # The published evaluator reads its attributes by their defaults, so all are given.
    shift = {"coordinate_transformation_mode": "half_pixel", "spatial_scale": 1.0}
    (wanted,) = ReferenceEvaluator(node("RoiAlign", 22, inputs, **options, **shift)).run(None, feeds)
    np.testing.assert_allclose(dialect("RoiAlign", 22, inputs, **options).numpy(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_roi_align_without_regions_and_without_data(mode: str, device: str) -> None:
    for count in (0, 5):
        inputs = [x.to(device) for x in (MAPS, regions(0, count), torch.zeros(count, dtype=torch.int64))]
        found = dialect("RoiAlign", 22, inputs, mode=mode, output_height=2, output_width=5)
        assert (found.device.type, found.dtype, found.shape) == (device, torch.float32, (count, 4, 2, 5))


# Half a unit of each type, since the sums are taken in float32 and rounded once.
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_roi_align_of_narrow_types_rounds_once(dtype: torch.dtype, unit: float) -> None:
    maps, rois = MAPS.to(dtype), regions(1, 5).to(dtype)
    index = torch.zeros(5, dtype=torch.int64)
    found = dialect("RoiAlign", 22, [maps, rois, index], output_height=3, output_width=3)
    wanted = dialect("RoiAlign", 22, [maps.double(), rois.double(), index], output_height=3, output_width=3)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=unit * 1.01, atol=1e-6)


@pytest.mark.parametrize("options", ROI_OPTIONS[::2], ids=str)
def test_gradient_of_roi_align(options: dict[str, Any]) -> None:
    x = MAPS[:2, :2].double().requires_grad_()
    # No point lies on a pixel, where the interpolation has a kink.
    rois = torch.tensor([[0.31, 0.42, 5.17, 4.71], [2.13, 1.37, 7.71, 6.11]], dtype=torch.float64, requires_grad=True)
    index = torch.tensor([1, 0])

    def pooled(x: Tensor, rois: Tensor) -> Tensor:
        return dialect("RoiAlign", 22, [x, rois, index], output_height=2, output_width=3, **options)

    assert torch.autograd.gradcheck(pooled, (x, rois))


@pytest.mark.parametrize("pooled_shape", [[1, 1], [3, 2], [7, 7]])
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0625])
def test_max_roi_pool_agrees_with_onnxruntime(pooled_shape: list[int], scale: float) -> None:
    # Some corners are halves, which are rounded away from zero.
    corners = (regions(1, 70) / scale * 2).round() / 2
    inputs = [MAPS, torch.cat(((torch.arange(70) % 3).unsqueeze(1), corners), 1)]
    options = {"pooled_shape": pooled_shape, "spatial_scale": scale}
    found = dialect("MaxRoiPool", 22, inputs, **options)
    np.testing.assert_array_equal(found.numpy(), by_onnxruntime("MaxRoiPool", 8, inputs, **options))


def test_max_roi_pool_without_regions_and_without_data() -> None:
    assert dialect("MaxRoiPool", 22, [MAPS, torch.zeros(0, 5)], pooled_shape=[2, 3]).shape == (0, 4, 2, 3)
    found = dialect("MaxRoiPool", 22, [MAPS.to("meta"), torch.zeros(6, 5, device="meta")], pooled_shape=[2, 3])
    assert (found.device.type, found.shape) == ("meta", (6, 4, 2, 3))


def test_gradient_of_max_roi_pool() -> None:
    x = MAPS[:2, :2].double().requires_grad_()
    rois = torch.tensor([[1.0, 0, 0, 5, 4], [0, 3, 2, 20, 6], [0, -9, -9, -5, -5]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: dialect("MaxRoiPool", 22, [x, rois], pooled_shape=[2, 3]), x)


DEFORMABLE = [
    {},
    {"pads": [1, 0, 2, 1]},
    {"strides": [2, 1], "dilations": [1, 2], "pads": [1, 1, 1, 1]},
    {"group": 2, "offset_group": 1, "pads": [1, 1, 1, 1]},
    {"group": 1, "offset_group": 2, "strides": [2, 3]},
    {"group": 2, "offset_group": 4},
]


def deformable(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, weight, offset, bias and mask of a kernel of 3 x 2 taps over 7 x 6 pixels in 4 channels."""
    pads, strides, dilations = (
        options.get(name, default)
        for name, default in (("pads", [0] * 4), ("strides", [1] * 2), ("dilations", [1] * 2))
    )
    out = [
        (size + pads[i] + pads[i + 2] - (taps - 1) * dilations[i] - 1) // strides[i] + 1
        for i, (size, taps) in enumerate(((7, 3), (6, 2)))
    ]
    groups = options.get("offset_group", 1)
    shapes = [
        (2, 4, 7, 6),
        (6, 4 // options.get("group", 1), 3, 2),
        (2, groups * 12, *out),
        (6,),
        (2, groups * 6, *out),
    ]
    return [torch.randn(shape, generator=rng(i), dtype=dtype) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("options", DEFORMABLE, ids=str)
def test_deform_conv_agrees_with_onnxruntime(options: dict[str, Any]) -> None:
    inputs = deformable(options)
    inputs[2] = inputs[2] * 2
    for whole in (False, True):
        inputs[2] = inputs[2].round() if whole else inputs[2]
        for given in (3, 4, 5):
            found = dialect("DeformConv", 22, inputs[:given], **options)
            wanted = by_onnxruntime("DeformConv", 22, inputs[:given], **options)
            # Sums of 24 products of normal numbers, in another order.
            np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("axes", "convolution"), [(1, F.conv1d), (2, F.conv2d), (3, F.conv3d)])
def test_deform_conv_that_moves_nothing_is_a_convolution(axes: int, convolution: Any) -> None:
    x = torch.randn(2, 4, *[7] * axes, generator=rng(0), dtype=torch.float64)
    weight = torch.randn(6, 2, *[3] * axes, generator=rng(1), dtype=torch.float64)
    offset = torch.zeros(2, 3**axes * axes, *[4] * axes, dtype=torch.float64)
    found = dialect("DeformConv", 19, [x, weight, offset], group=2, strides=[2] * axes, pads=[1] * 2 * axes)
    wanted = convolution(x, weight, None, 2, 1, 1, 2)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", DEFORMABLE, ids=str)
def test_gradients_of_deform_conv(options: dict[str, Any]) -> None:
    inputs = deformable(options, torch.float64)
    # Clear of whole numbers, where the interpolation has its kinks.
    inputs[2] = inputs[2].floor() + 0.1 + 0.8 * torch.rand(inputs[2].shape, generator=rng(9), dtype=torch.float64)
    inputs = [x[:1] if i in (0, 2, 4) else x for i, x in enumerate(inputs)]
    assert torch.autograd.gradcheck(
        lambda *x: dialect("DeformConv", 22, list(x), **options), [x.requires_grad_() for x in inputs], fast_mode=True
    )


def test_offsets_of_zero_have_the_slope_towards_the_next_pixel() -> None:
    # Training starts there; the derivative of |t| at 0 would be 0.
    x = torch.tensor([[[1.0, 4.0, 9.0, 16.0]]])
    offset = torch.zeros(1, 1, 4, requires_grad=True)
    dialect("DeformConv", 22, [x, torch.ones(1, 1, 1), offset]).sum().backward()
    assert offset.grad.flatten().tolist() == [3.0, 5.0, 7.0, -16.0]


def test_deform_conv_without_data() -> None:
    inputs = deformable({"offset_group": 2})
    found = dialect("DeformConv", 22, [x.to("meta") for x in inputs], offset_group=2)
    assert (found.device.type, found.shape) == ("meta", (2, 6, 5, 5))


def test_deform_conv_of_narrow_types() -> None:
    inputs = deformable({})
    found = dialect("DeformConv", 22, [x.to(torch.bfloat16) for x in inputs])
    wanted = dialect("DeformConv", 22, [x.to(torch.bfloat16).double() for x in inputs])
    assert found.dtype == torch.bfloat16
    # 24 products per sum, each read and multiplied with one rounding of 2^-9 of values around 1.
    torch.testing.assert_close(found.double(), wanted, rtol=2**-7, atol=24**0.5 * 2**-8)
