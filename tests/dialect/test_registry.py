"""The table itself: lookups, and that each function's signature is the operator's."""

import importlib
import inspect

import numpy as np
import onnx.defs
import onnx.helper
import pytest
import torch

from graphopt.dialect import Operator, lookup, operator, operator_of, table

NEWEST = onnx.defs.onnx_opset_version()
# onnxruntime's own operators live in its schema registry, not in that of onnx.
STANDARD = [entry for entry in table() if not entry.domain and entry.name != "SimplifiedLayerNormalization"]
KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def label(entry: Operator) -> str:
    return f"{entry.domain or 'ai.onnx'}.{entry.name}-{entry.since}"


def last_opset(entry: Operator) -> int:
    """The newest opset in which the entry still holds."""
    later = [other.since for other in STANDARD if other.name == entry.name and other.since > entry.since]
    return min(later, default=NEWEST + 1) - 1


def schema_of(entry: Operator) -> onnx.defs.OpSchema:
    return onnx.defs.get_schema(entry.name, last_opset(entry))


def test_lookup_takes_the_newest_that_holds() -> None:
    assert lookup("", "Softmax", 12).since == 1
    assert lookup("", "Softmax", 13) is lookup("ai.onnx", "Softmax", 28)
    assert lookup("", "Gelu", 19) is None
    assert lookup("com.microsoft", "Gelu", 1).function is not lookup("", "Gelu", 20).function
    assert lookup("", "NoSuchOperator", 20) is None


@pytest.mark.parametrize("entry", table(), ids=label)
def test_function_is_importable_and_leads_back(entry: Operator) -> None:
    module = importlib.import_module(entry.function.__module__)
    assert getattr(module, entry.function.__qualname__) is entry.function
    assert operator_of(entry.function) is entry
    parameters = inspect.signature(entry.function).parameters
    assert ("outputs" in parameters) == entry.counted
    assert ("types" in parameters) == entry.typed
    assert not entry.typed or parameters["types"].default == ()


def test_a_second_function_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one function for Reshape since 5"):
        operator("Reshape", since=5)(lambda x, shape: x)
    assert operator_of(torch.relu) is None


@pytest.mark.parametrize("entry", STANDARD, ids=label)
def test_parameters_are_the_standard_inputs(entry: Operator) -> None:
    parameters = inspect.signature(entry.function).parameters.values()
    positional = [p for p in parameters if p.kind in KINDS]
    schema = schema_of(entry)
    variadic = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in positional)
    assert variadic == (schema.max_input > 1000)
    assert variadic or len(positional) == schema.max_input
    assert variadic or sum(p.default is inspect.Parameter.empty for p in positional) == schema.min_input
    assert all(index < len(positional) for index in entry.values)


@pytest.mark.parametrize("entry", STANDARD, ids=label)
def test_keywords_are_the_standard_attributes_and_defaults(entry: Operator) -> None:
    parameters = inspect.signature(entry.function).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    keywords.pop("outputs", None)
    keywords.pop("types", None)
    for name, attribute in schema_of(entry).attributes.items():
        if name not in keywords:
            continue
        default = keywords.pop(name)
        if attribute.type in (onnx.defs.OpSchema.AttrType.INTS, onnx.defs.OpSchema.AttrType.STRINGS):
            # The function itself turns None into the list, which depends on the rank more often than not.
            assert default in (None, inspect.Parameter.empty), name
        elif attribute.default_value.type:
            standard = onnx.helper.get_attribute_value(attribute.default_value)
            standard = standard.decode() if isinstance(standard, bytes) else standard
            close = isinstance(standard, float) and np.isclose(default, standard)
            assert close or default == standard, f"{name}: {default} is not {standard}"
        elif attribute.required:
            assert default is inspect.Parameter.empty, name
    # What is left belongs to an earlier version that the same function covers.
    known = {name for s in onnx.defs.get_all_schemas_with_history() if s.name == entry.name for name in s.attributes}
    assert set(keywords) <= known


@pytest.mark.parametrize("entry", STANDARD, ids=label)
def test_every_attribute_is_a_parameter(entry: Operator) -> None:
    """Strings and sparse tensors of Constant aside: those are not tensors of numbers."""
    parameters = set(inspect.signature(entry.function).parameters)
    missing = set(schema_of(entry).attributes) - parameters - {"sparse_value", "value_string", "value_strings"}
    assert not missing - {"consumed_inputs"}


def test_shape_and_size_are_real_for_meta_tensors() -> None:
    x = torch.empty(2, 3, device="meta")
    shape, size = (lookup("", name, 28).function(x) for name in ("Shape", "Size"))
    assert (shape.tolist(), size.item()) == ([2, 3], 6)
    assert shape.dtype == size.dtype == torch.int64
