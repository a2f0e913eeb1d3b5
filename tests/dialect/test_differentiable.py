"""What the standard calls differentiable is: derivatives along random directions, on the models of its suite."""

import warnings
from collections import defaultdict

import numpy as np
import onnx.defs
import pytest
import torch
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases

from graphopt.dialect import lookup, table
from graphopt.frontends.onnx import load_onnx
from graphopt.onnxfile import OnnxFile

DIFFERENTIABLE = onnx.defs.OpSchema.DifferentiationCategory.Differentiable
# What the standard marks although there is nothing to differentiate, or what its models cannot show.
EXEMPT = {
    "Dropout": "random in training, the identity otherwise",
    "Cast": "its models round; test_casts_hand_on_derivatives has it",
    "CastLike": "as Cast",
    "Hardmax": "constant but for jumps",
    "Trilu": "its models are of integers; test_gradients.py has one of floats",
}
# Central differences in float64 with this step are good to about 1e-8 on smooth functions of unit scale.
STEP, RTOL, ATOL = 1e-6, 1e-4, 1e-6


def operators():
    """Name -> indices of the inputs that the newest schema marks as differentiable."""
    found = {}
    for entry in table():
        if entry.domain or not onnx.defs.has(entry.name):
            continue
        inputs = onnx.defs.get_schema(entry.name).inputs
        marked = [i for i, formal in enumerate(inputs) if formal.differentiation_category == DIFFERENTIABLE]
        variadic = {i for i in marked if inputs[i].option == onnx.defs.OpSchema.FormalParameterOption.Variadic}
        if marked and entry.name not in EXEMPT:
            found[entry.name] = (set(marked), bool(variadic))
    return found


def models():
    """One-node models by operator."""
    found = defaultdict(list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the suite computes its own NaN and infinite expectations
        for case in collect_testcases():
            if len(case.model.graph.node) == 1 and case.data_sets:
                found[case.model.graph.node[0].op_type].append(case)
    return found


OPERATORS = operators()
MODELS = models()


def array(value):
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def derivatives(case, marked, variadic):
    """(by autograd, by differences) along a random direction, or None where the model has no float64 form."""
    node = case.model.graph.node[0]
    names = [i.name for i in case.model.graph.input]
    values = dict(zip(names, map(array, case.data_sets[0][0]), strict=True))
    opset = next(o.version for o in case.model.opset_import if o.domain == node.domain)
    entry = lookup("", node.op_type, opset)
    generator = np.random.default_rng(0)
    args, moving = [], []
    for i, name in enumerate(node.input):
        value = values.get(name)
        if not name or not isinstance(value, (np.ndarray, np.generic)):
            args.append(None if not name else value)
            continue
        value = np.asarray(value)
        if value.dtype.kind not in "biuf":
            return None
        if value.dtype.kind != "f":
            args.append(torch.from_numpy(value.copy()))
            continue
        tensor = torch.from_numpy(value.astype(np.float64))
        if (i in marked or variadic) and tensor.numel():
            # Off the kinks, on which suites like to put their integers.
            tensor = (tensor + torch.from_numpy(generator.uniform(0.01, 0.02, value.shape))).requires_grad_()
            moving.append(len(args))
        args.append(tensor)
    if not moving:
        return None
    graph = load_onnx(OnnxFile(case.model))
    call = next((n for n in graph.nodes if n.target is entry.function), None)
    if call is None:
        return None
    keywords = {k: graph.weight(v) if hasattr(v, "op") else v for k, v in call.kwargs.items()}

    def outputs(inputs):
        results = entry.function(*inputs, **keywords)
        results = results if isinstance(results, tuple) else (results,)
        flat = [x for r in results for x in (r if isinstance(r, list) else [r])]
        # A result that was rounded to a narrower type has no differences to speak of.
        return [x for x in flat if isinstance(x, torch.Tensor) and x.dtype == torch.float64]

    found = outputs(args)
    if not found:
        return None
    directions = [torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1)) for x in found]
    total = sum((d * x).sum() for d, x in zip(directions, found, strict=True))
    if not (isinstance(total, torch.Tensor) and torch.isfinite(total)):
        return None
    if not total.requires_grad:
        return 0.0, None, moving
    generators = {i: torch.Generator().manual_seed(i) for i in moving}
    steps = {i: torch.randn(args[i].shape, dtype=torch.float64, generator=generators[i]) for i in moving}
    grads = torch.autograd.grad(total, [args[i] for i in moving], allow_unused=True)
    analytic = sum((g * steps[i]).sum().item() for g, i in zip(grads, moving, strict=True) if g is not None)
    sides = []
    with torch.no_grad():
        for sign in (1, -1):
            moved = [x + sign * STEP * steps[i] if i in steps else x for i, x in enumerate(args)]
            sides.append(sum((d * x).sum().item() for d, x in zip(directions, outputs(moved), strict=True)))
    return analytic, (sides[0] - sides[1]) / (2 * STEP), [i for g, i in zip(grads, moving, strict=True) if g is None]


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_derivatives_along_a_direction(name):
    marked, variadic = OPERATORS[name]
    checked, without = 0, None
    for case in MODELS[name]:
        found = derivatives(case, marked, variadic)
        if found is None:
            continue
        analytic, numeric, missing = found
        if numeric is not None:
            assert analytic == pytest.approx(numeric, rel=RTOL, abs=ATOL), case.name
        without = set(missing) if without is None else without & set(missing)
        checked += 1
    assert checked or not MODELS[name], "no model of the suite could be used"
    assert not without, f"no model has a derivative for inputs {without}"


@pytest.mark.parametrize("code", [onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16])
def test_casts_hand_on_derivatives(code):
    x = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)
    y = lookup("", "Cast", 28).function(x, to=code)
    (found,) = torch.autograd.grad((y.double() * torch.tensor([2.0, 3.0])).sum(), x)
    torch.testing.assert_close(found, torch.tensor([2.0, 3.0], dtype=torch.float64))
