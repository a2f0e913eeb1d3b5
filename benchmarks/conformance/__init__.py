"""The backend suite of the onnx package, run by graphopt and by its peers on the same data.

Three questions for each model: does the tool compute the published outputs; does onnxruntime compute from what the tool
writes the same as from the original; does a tool that is asked to change nothing write the same model?
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from benchmarks.common import show, store
from benchmarks.conformance import suite
from benchmarks.conformance.suite import Case, Wrong
from benchmarks.conformance.tools import Worker, version
from benchmarks.conformance.worker import REWRITERS, RUNNERS

# Optimisers reorder sums: what counts as the same output of a rewritten model.
RTOL, ATOL = 1e-3, 1e-5
# These two promise to change nothing.
ROUND_TRIPS = ("graphopt", "onnx_ir")
ROUNDS = 5
# Models named for each reason; there are fewer of graphopt's own.
EXAMPLES = 10


@dataclass(frozen=True)
class Verdict:
    """How one tool did on one model in one respect; `kind` is `same` or the way it failed."""

    tool: str
    check: str
    model: str
    suite: str
    kind: str
    detail: str = ""
    seconds: float = 0.0


def published_outputs(tool: str, cases: Sequence[Case]) -> list[Verdict]:
    """Run every model in the tool itself."""
    found = []
    with Worker("evaluate", tool) as worker:
        worker.ask(cases[0].data, cases[0].data_sets[0][0])  # imports take place in the first answer
        for case in cases:
            feeds, expected = case.data_sets[0]
            answer = worker.ask(case.data, feeds)
            if "outputs" in answer:
                answer |= _compared(expected, answer["outputs"], case, rtol=case.rtol, atol=case.atol)
            found.append(_verdict(tool, "outputs", case, answer))
    return found


def rewritten(tool: str, cases: Sequence[Case], references: Mapping[str, list[Any]]) -> list[Verdict]:
    """Let the tool write every model, and run what it wrote on onnxruntime."""
    found = []
    with Worker("rewrite", tool) as worker:
        worker.ask(cases[0].data, cases[0].data_sets[0][0])
        for case in cases:
            answer = worker.ask(case.data, case.data_sets[0][0])
            if tool in ROUND_TRIPS:
                found.append(_verdict(tool, "model", case, answer | _same_model(case, answer)))
            if case.name not in references:
                continue
            found += _on_onnxruntime(tool, case, references[case.name], answer)
    return found


def _on_onnxruntime(tool: str, case: Case, expected: list[Any], answer: dict[str, Any]) -> list[Verdict]:
    if "outputs" not in answer:
        return [_verdict(tool, check, case, answer) for check in ("onnxruntime", "bits")]
    judged = answer | _compared(expected, answer["outputs"], case, rtol=RTOL, atol=ATOL)
    if judged["kind"] == "same" and answer["dropped"]:
        judged |= {"kind": "dropped input", "error": "the saved model lacks an input"}
    bits = judged
    if judged["kind"] == "same" and not suite.identical(expected, answer["outputs"]):
        bits = {"kind": "other bits", "error": "the same within the tolerance"}
    return [_verdict(tool, "onnxruntime", case, judged), _verdict(tool, "bits", case, bits)]


def _compared(expected: Sequence[Any], found: Sequence[Any], case: Case, *, rtol: float, atol: float) -> dict[str, Any]:
    try:
        suite.check_values(list(expected), list(found), rtol=rtol, atol=atol, random=case.random)
    except Wrong as error:
        return {"kind": error.kind, "error": str(error)}
    return {"kind": "same"}


def _same_model(case: Case, answer: Mapping[str, Any]) -> dict[str, Any]:
    if "model" not in answer:
        return {}
    model = onnx.ModelProto.FromString(answer["model"])
    if model == case.model:
        return {"kind": "same"}
    original = onnx.ModelProto.FromString(case.data)
    _drop_empty(model)
    _drop_empty(original)
    return {"kind": "other empty fields" if model == original else "changed model", "error": ""}


def _drop_empty(message: Any) -> None:
    """Clear what is set to nothing: an empty domain means the same as none."""
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in value if field.is_repeated else [value]:
                _drop_empty(item)
        elif not field.is_repeated and field.containing_oneof is None and not value:
            message.ClearField(field.name)


def _verdict(tool: str, check: str, case: Case, answer: Mapping[str, Any]) -> Verdict:
    detail = "" if answer["kind"] == "same" else answer.get("error", "")
    return Verdict(tool, check, case.name, case.kind, answer["kind"], detail, answer.get("seconds", 0.0))


def references(cases: Sequence[Case]) -> dict[str, list[Any]]:
    """The outputs of every model that onnxruntime itself runs."""
    found = {}
    for case in cases:
        outputs = suite.outcome(case.data, case.data_sets[0][0])
        if not isinstance(outputs, str):
            found[case.name] = outputs
    return found


def sweep(cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """Seconds to rewrite and run all models, tools alternating model by model; the first round warms up.

    `nothing` is the session and the run alone, which every tool's figure contains.
    """
    tools: dict[str, Callable[[bytes], bytes]] = {"nothing": lambda data: data}
    tools |= {tool: REWRITERS[tool] for tool in ROUND_TRIPS}
    rounds: dict[str, list[float]] = {tool: [] for tool in tools}
    order = list(tools)
    for _ in range(ROUNDS + 1):
        total = dict.fromkeys(tools, 0.0)
        for case in cases:
            order.append(order.pop(0))
            for tool in order:
                start = time.perf_counter()
                suite.run(suite.session(tools[tool](case.data)), case.data_sets[0][0])
                total[tool] += time.perf_counter() - start
        for tool in tools:
            rounds[tool].append(total[tool])
    return {tool: _spread(times[1:]) for tool, times in rounds.items()}


def _spread(times: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "lowest": min(times), "highest": max(times)}


def run() -> None:
    """Ask every tool, and store all failures with their reasons."""
    cases = suite.cases()
    expected = references(cases)
    versions = {tool: version(tool) for tool in (*REWRITERS, *RUNNERS)}
    verdicts: list[Verdict] = []
    for tool in RUNNERS:
        verdicts += published_outputs(tool, cases) if versions[tool] else []
    for tool in REWRITERS:
        verdicts += rewritten(tool, cases, expected) if versions[tool] else []
    failed = {v.model for v in verdicts if v.tool in ROUND_TRIPS and v.check == "onnxruntime" and v.kind != "same"}
    timed = [case for case in cases if case.kind == "node" and case.name in expected.keys() - failed]
    seconds = sweep(timed)
    counts = tally(verdicts)
    show("Conformance", ["tool", "check", "models", "same", "failures"], [_row(key, counts[key]) for key in counts])
    store(
        "conformance",
        {
            "tools": versions,
            "models": dict(Counter(case.kind for case in cases)),
            "onnxruntime_runs": dict(Counter(case.kind for case in cases if case.name in expected)),
            "checks": [{"tool": tool, "check": check, "kinds": kinds} for (tool, check), kinds in counts.items()],
            "rewrite_and_run_s": {
                tool: sum(v.seconds for v in verdicts if (v.tool, v.check, v.suite) == (tool, "onnxruntime", "node"))
                for tool in REWRITERS
                if versions[tool]
            },
            "sweep_models": len(timed),
            "sweep_s": seconds,
            "failures": failures(verdicts),
        },
    )


def failures(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """The failures with their reasons, and a few models for each."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for v in verdicts:
        # What differs in its bits alone is told apart; the other failures of that check are those of `onnxruntime`.
        if v.kind != "same" and (v.check != "bits" or v.kind == "other bits"):
            found.setdefault((v.tool, v.check, v.kind, v.detail), []).append(v.model)
    keys = ("tool", "check", "kind", "reason")
    ordered = sorted(found.items(), key=lambda item: (*item[0][:3], -len(item[1])))
    return [dict(zip(keys, key, strict=True)) | {"count": len(m), "models": m[:EXAMPLES]} for key, m in ordered]


def tally(verdicts: Sequence[Verdict]) -> dict[tuple[str, str], dict[str, int]]:
    """How many models of each kind, by tool and check."""
    found: dict[tuple[str, str], Counter[str]] = {}
    for verdict in verdicts:
        found.setdefault((verdict.tool, verdict.check), Counter())[verdict.kind] += 1
    return {key: dict(kinds) for key, kinds in found.items()}


def _row(key: tuple[str, str], kinds: Mapping[str, int]) -> list[Any]:
    failed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()) if kind != "same")
    return [*key, sum(kinds.values()), kinds.get("same", 0), failed]
