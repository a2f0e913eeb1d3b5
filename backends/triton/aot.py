"""Compile every kernel without a GPU: `python -m graphopt.backends.triton.aot --out FOLDER`.

The host functions run on tensors without data while their launches are noted down; each launch is compiled for each
target into a .cubin or .hsaco file. `manifest.json` says how to start it: symbol, signature, constants, warps and
shared memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graphopt.errors import GraphOptError
from graphopt.ops.linear_attention import RULES

from . import (
    group_rational,
    linear_attention,
    linear_gradients,
    linear_rational,
    softmax,
    softplus_attention,
    unified_attention,
    windowed_attention,
    windowed_gradients,
)
from .launch import INTERPRETED, Launch, recording

# Name -> what Triton calls it, and the suffix of its machine code.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "cubin"),
    "sm_90": (GPUTarget("cuda", 90, 32), "cubin"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "hsaco"),
}
_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target."""

    kernel: str
    target: str
    file: str
    symbol: str
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    shared_memory: int


def launches(dtype: torch.dtype = torch.bfloat16, *, K: int = 128, V: int = 128) -> list[Launch]:
    """Every launch of the package for a model of these head dimensions, without repetitions."""
    found: dict[str, Launch] = {}
    with recording() as notes:
        for call in _calls(dtype, K, V):
            call()
        for note in notes:
            found.setdefault(_key(note), note)
    return list(found.values())


def representative(notes: Iterable[Launch]) -> list[Launch]:
    """One launch of each kernel: the last configuration, which has the largest blocks, of its first constants."""
    first: dict[str, Launch] = {}
    for note in notes:
        same = first.get(note.name)
        if same is None or _variant(same) == _variant(note):
            first[note.name] = note
    return list(first.values())


def _calls(dtype: torch.dtype, K: int, V: int) -> Iterator[Callable[[], object]]:
    B, H, HKV, T = 2, 4, 2, 256

    def empty(*shape: int, like: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    q, k, v, dout = empty(B, H, T, K), empty(B, HKV, T, K), empty(B, HKV, T, V), empty(B, H, T, V)
    state = empty(B, HKV, K, V, like=torch.float32)
    for rule in RULES:
        for width in (1, K) if rule == "gated" else (1,):
            decay = empty(B, HKV, T, width, like=torch.float32) if rule.startswith("gated") else None
            beta = empty(B, HKV, T, 1, like=torch.float32) if rule.endswith("delta") else None
            arguments = (q, k, v, decay, beta, state, rule, 1.0)
            for form in ("fused", "parallel", "recurrent"):
                yield lambda a=arguments, f=form: linear_attention.forward(*a, form=f)  # type: ignore[misc]  # mypy infers no lambda with defaults
            yield lambda a=arguments: linear_gradients.backward(dout, state, *a)  # type: ignore[misc]  # mypy infers no lambda with defaults

    features, key_features = empty(B, H, T, K), empty(B, H, T, K)
    gate, weight = empty(1, H, 1, 1, like=torch.float32), empty(B, 1, T, 1, like=torch.float32)
    dfinal = empty(B, H, K, V + 1, like=torch.float32)
    for mask, sinks in ((None, 0), (weight, 4)):
        inputs = (q, k, v, features, key_features, gate, mask, None, 64, sinks, 1.0)
        yield lambda a=inputs: windowed_attention.forward(*a)  # type: ignore[misc]  # mypy infers no lambda with defaults
        yield lambda a=inputs: windowed_gradients.backward(dout, dfinal, *a)  # type: ignore[misc]  # mypy infers no lambda with defaults

    for causal in (True, False):
        flagged = empty(B, H, T, like=torch.int32) if causal else None
        yield lambda c=causal, f=flagged: unified_attention.attend(q, k, v, causal=c, flagged=f)  # type: ignore[misc]  # mypy infers no lambda with defaults
    for mask, power in ((None, 0), (weight, 3)):
        yield lambda m=mask, p=power: softplus_attention.forward(q, k, v, m, p)  # type: ignore[misc]  # mypy infers no lambda with defaults
        yield lambda m=mask, p=power: softplus_attention.backward(dout, q, k, v, m, p)  # type: ignore[misc]  # mypy infers no lambda with defaults

    # A row of a vocabulary, which is split, and one of scores, which is not.
    for N in (100_000, 1024):
        x = empty(B, N)
        for form in softmax.FORMS:
            yield lambda x=x, f=form: softmax.forward(x, form=f)  # type: ignore[misc]  # mypy infers no lambda with defaults
        yield lambda x=x: softmax.gradient(x, x)  # type: ignore[misc]  # mypy infers no lambda with defaults

    # The hidden layer of ViT-B's MLP as KAT has it, and with relu minus a function that vanishes in the tails.
    x, weight, bias = empty(B, 197, 768), empty(3072, 768), empty(3072)
    y = empty(B, 197, 3072)
    for m, n, shared, form, apart in ((5, 4, True, "abs_sum", False), (4, 6, False, "sum_abs", True)):
        above = empty(1 if shared else 8, m + 1, like=torch.float32)
        functions = (above, empty(8, n, like=torch.float32), form, apart)
        yield lambda f=functions: group_rational.forward(y, *f)  # type: ignore[misc]  # mypy infers no lambda with defaults
        yield lambda f=functions: group_rational.backward(y, y, *f)  # type: ignore[misc]  # mypy infers no lambda with defaults
        yield lambda f=functions: linear_rational.forward(x, weight, bias, *f)  # type: ignore[misc]  # mypy infers no lambda with defaults


def _describe(note: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Signature, constants, and the alignment of pointers, which comes from the allocator."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(note.function.params):
        value = note.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            # Strides are multiples of 16 where the head dimension is one; lengths and counts may be anything.
            if parameter.name.endswith(("_b", "_h", "_t")) and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _key(note: Launch) -> str:
    signature, constants, _ = _describe(note)
    return json.dumps([note.name, signature, constants, note.config.warps, note.config.stages], default=str)


def _variant(note: Launch) -> str:
    _, constants, _ = _describe(note)
    return json.dumps({k: v for k, v in constants.items() if k not in note.config.blocks}, default=str)


def compile_launch(note: Launch, target: str) -> tuple[Compiled, bytes]:
    """Machine code of one launch.

    Raises:
        GraphOptError: Triton's interpreter is on, or there is no such target.
    """
    if INTERPRETED:
        raise GraphOptError("expected TRITON_INTERPRET to be unset, because interpreted kernels are never compiled")
    if target not in TARGETS:
        raise GraphOptError(f"expected a target out of {', '.join(TARGETS)}, got {target!r}")
    gpu, suffix = TARGETS[target]
    signature, constants, attributes = _describe(note)
    source = ASTSource(note.function, signature, constexprs=constants, attrs=attributes)
    done = triton.compile(
        source, target=gpu, options={"num_warps": note.config.warps, "num_stages": note.config.stages}
    )
    code = done.asm[suffix]
    symbol = done.metadata.name
    label = hashlib.sha256(f"{target}{_key(note)}".encode()).hexdigest()[:12]
    result = Compiled(
        kernel=note.name.lstrip("_"),
        target=target,
        file=f"{note.name.lstrip('_')}_{label}.{suffix}",
        symbol=symbol,
        signature=signature,
        constants=constants,
        num_warps=note.config.warps,
        num_stages=note.config.stages,
        shared_memory=done.metadata.shared,
    )
    return result, code


def compile_all(folder: Path, targets: Iterable[str] = tuple(TARGETS), *, every: bool = False) -> list[Compiled]:
    """Compile into `folder/TARGET/` and write `folder/manifest.json`.

    Args:
        folder: where to; it is created.
        targets: out of `TARGETS`.
        every: all rules, forms and configurations instead of one of each kernel.

    Returns:
        What was compiled.
    """
    notes = launches() if every else representative(launches())
    results = []
    for target in targets:
        for note in notes:
            result, code = compile_launch(note, target)
            place = folder / target
            place.mkdir(parents=True, exist_ok=True)
            (place / result.file).write_bytes(code)
            results.append(result)
    manifest = {"triton": triton.__version__, "kernels": [vars(result) for result in results]}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return results


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compile the Triton kernels without a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the machine code and manifest.json")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="may be repeated; default: all")
    parser.add_argument("--every", action="store_true", help="all rules, forms and block sizes (many minutes)")
    options = parser.parse_args(arguments)
    done = compile_all(options.out, options.target or tuple(TARGETS), every=options.every)
    print(f"{len(done)} kernels for {', '.join(options.target or TARGETS)} in {options.out}")


if __name__ == "__main__":
    main()
