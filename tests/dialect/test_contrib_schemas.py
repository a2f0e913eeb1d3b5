"""The signatures of the com.microsoft functions are those of onnxruntime's own schemas."""

import inspect
from typing import Any

import numpy as np
import onnx
import onnxruntime.capi._pybind_state as runtime
import pytest

from graphopt.dialect import Operator, table

SCHEMAS = {s.name: s for s in runtime.get_all_operator_schema() if s.domain == "com.microsoft"}
ENTRIES = [entry for entry in table() if entry.domain == "com.microsoft"]
POSITIONAL = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
# Where a schema states no default, its documentation does, or nothing stands for an attribute that is not there.
UNSTATED: tuple[Any, ...] = (None, 0, -1, "")
DOCUMENTED = {"mask_filter_value": -10000.0, "scale": 1.0}


def parameters(entry: Operator) -> list[inspect.Parameter]:
    return list(inspect.signature(entry.function).parameters.values())


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_inputs(entry: Operator) -> None:
    schema = SCHEMAS[entry.name]
    positional = [p for p in parameters(entry) if p.kind in POSITIONAL]
    if schema.max_input > 1000:
        assert positional[-1].kind is inspect.Parameter.VAR_POSITIONAL
        return
    # GPU kernels read the last inputs of QMoE, which scale activations that no function here quantises.
    assert len(positional) == schema.max_input or (entry.name, len(positional)) == ("QMoE", 15)
    required = sum(p.default is inspect.Parameter.empty for p in positional)
    assert required <= max(schema.min_input, 1)
    assert all(index < len(positional) for index in entry.values)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_attributes(entry: Operator) -> None:
    keywords = {p.name: p.default for p in parameters(entry) if p.kind is inspect.Parameter.KEYWORD_ONLY}
    for extra in ("outputs", "types"):
        keywords.pop(extra, None)
    schema = SCHEMAS[entry.name]
    assert set(keywords) == set(schema.attributes)
    for name, attribute in schema.attributes.items():
        found = keywords[name]
        if attribute.required:
            assert found is inspect.Parameter.empty, name
            continue
        proto = onnx.AttributeProto.FromString(attribute._default_value)
        if not proto.type:
            assert found in UNSTATED or found == DOCUMENTED[name], name
            continue
        wanted = onnx.helper.get_attribute_value(proto)
        wanted = wanted.decode() if isinstance(wanted, bytes) else wanted
        assert found == wanted or np.isclose(found, wanted), f"{name}: {found} is not {wanted}"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_outputs(entry: Operator) -> None:
    schema = SCHEMAS[entry.name]
    assert entry.counted == (schema.min_output != schema.max_output)
