"""Whether an ONNX node's inputs and attributes fit the torch function of its operator."""

from __future__ import annotations

import functools
import inspect
import keyword
from collections.abc import Callable, Iterable
from typing import Any

from graphopt.dialect.registry import Operator


def parameter_name(attribute: str) -> str:
    """The Python parameter for an ONNX attribute: the same name, with an underscore behind a keyword."""
    return attribute + "_" if keyword.iskeyword(attribute) else attribute


def accepts(entry: Operator, inputs: int, parameters: Iterable[str]) -> bool:
    """Whether the function takes that many inputs and those attributes; a stranger runs on onnxruntime instead."""
    try:
        _signature(entry.function).bind(*range(inputs), **dict.fromkeys(parameters))
    except TypeError:
        return False
    return True


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)
