"""verify and bench: two models side by side."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from graphopt.bench import Spread, Timing, bench_one, bench_pair

Invoke = Callable[..., Any]
Refused = Callable[..., str]


@pytest.mark.parametrize(
    "runtime", [(), ("--runtime", "onnxruntime"), ("--runtime", "torch")], ids=["", "ort", "torch"]
)
def test_a_model_equals_itself(runtime: tuple[str, ...], invoke: Invoke, model: Path) -> None:
    result = invoke("verify", model, model, *runtime, "--rtol", "0", "--json", "-")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["passed"] is True
    assert found["runtime"] == (runtime[1] if runtime else "onnxruntime")
    (output,) = found["verification"]["outputs"]
    assert output["cosine"] == pytest.approx(1)
    assert (output["name"], output["max_abs"], output["rel_rms"], output["bitwise"]) == ("y", 0.0, 0.0, True)


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
@pytest.mark.parametrize(
    "bound",
    [
        ("--rtol", "1e-6"),
        ("--atol", "1e-6"),
        ("--min-cosine", "0.9999999"),
        ("--rtol", "1e-6", "--atol", "1e-6"),
    ],
)
def test_a_missed_bound(bound: tuple[str, ...], runtime: str, invoke: Invoke, model: Path, other: Path) -> None:
    path = model.with_name("verify.json")
    result = invoke("verify", model, other, *bound, "--runtime", runtime, "--json", path)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "y" in result.stdout
    assert json.loads(path.read_text())["passed"] is False


def test_either_tolerance_suffices(invoke: Invoke, model: Path, other: Path) -> None:
    assert invoke("verify", model, other, "--rtol", "1e-6", "--atol", "1").exit_code == 0


def test_no_bound_just_measures(invoke: Invoke, model: Path, other: Path) -> None:
    result = invoke("verify", model, other, "--json", "-")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["passed"] is None


def test_given_data_is_used(invoke: Invoke, model: Path, other: Path) -> None:
    path = model.with_name("calib.npz")
    np.savez(path, x=np.zeros((3, 2), np.float32))
    found = json.loads(invoke("verify", model, other, "--calib", path, "--json", "-").stdout)
    # Both give sigmoid(0) for zeros, whatever the weights are.
    assert found["verification"]["outputs"][0]["max_abs"] == 0.0
    assert found["calibration"] == "1 batches from calib.npz"


def test_a_model_that_onnxruntime_does_not_load(refused: Refused, model: Path) -> None:
    proto = onnx.load(model)
    proto.ir_version = 99
    path = model.with_name("new.onnx")
    onnx.save(proto, path)
    assert "--runtime torch" in refused("verify", model, path)


def test_bench_one_model(invoke: Invoke, model: Path) -> None:
    result = invoke("bench", model, "--runs", "3", "--dim", "batch=4", "--dim", "batch=8", "--json", "-")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["dims"] for row in found["rows"]] == [{"batch": 4}, {"batch": 8}]
    assert [row["inputs"] for row in found["rows"]] == [{"x": [4, 2]}, {"x": [8, 2]}]
    assert all(len(row["timing"]["a_samples"]) == 3 for row in found["rows"])
    assert {"cpu", "cores", "onnxruntime"} <= set(found["environment"])


@pytest.mark.parametrize("target", ["onnxruntime", "torch"])
def test_bench_two_models(target: str, invoke: Invoke, model: Path, other: Path) -> None:
    args = (
        model,
        other,
        "--runs",
        "4",
        "--batch",
        "2",
        "--batch",
        "16",
        "--threads",
        "1",
        "--target",
        target,
    )
    found = json.loads(invoke("bench", *args, "--json", "-").stdout)
    assert [row["dims"] for row in found["rows"]] == [{"batch": 2}, {"batch": 16}]
    for row in found["rows"]:
        assert row["outputs"][0]["rel_rms"] > 0
        assert row["timing"]["ratio"]["min"] <= row["timing"]["ratio"]["median"] <= row["timing"]["ratio"]["max"]
    assert "A/B above 1: B is faster" in invoke("bench", *args).stdout


def test_bench_refuses_to_measure_what_differs(refused: Refused, model: Path, other: Path) -> None:
    assert "nothing was measured" in refused("bench", model, other, "--rtol", "1e-6", code=1)


def test_bench_on_a_missing_accelerator(refused: Refused, model: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    assert "CUDAExecutionProvider" in refused("bench", model, "--target", "onnxruntime-cuda")


class Fake:
    """A session that takes as long as its clock says, and notes when it ran."""

    def __init__(self, name: str, log: list[str], clock: list[float], seconds: float) -> None:
        self.name, self.log, self.clock, self.seconds = name, log, clock, seconds

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, Any], /) -> list[Any]:
        self.log.append(self.name)
        self.clock[0] += self.seconds
        return []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("graphopt.bench.time.perf_counter", lambda: now[0])
    return now


def test_pairs_alternate(clock: list[float]) -> None:
    log: list[str] = []
    timing = bench_pair(Fake("a", log, clock, 0.02), Fake("b", log, clock, 0.01), {}, runs=4)
    assert log[6:] == list("abbaabba")
    assert timing.ratio is not None
    assert timing.ratio.median == pytest.approx(2)
    assert timing.verdict() == "B is 2.00 times as fast as A"


def test_a_slow_down_is_stated(clock: list[float]) -> None:
    timing = bench_pair(Fake("a", [], clock, 0.01), Fake("b", [], clock, 0.03), {}, runs=4)
    assert timing.verdict() == "B is slower: it takes 3.00 times as long as A"


def test_noise_is_no_result() -> None:
    assert Timing((1.0, 1.2, 0.9, 1.1), (1.1, 1.0, 1.0, 1.0)).verdict() == "no difference beyond the noise"


def test_short_runs_are_repeated(clock: list[float]) -> None:
    log: list[str] = []
    timing = bench_one(Fake("a", log, clock, 1e-4), {}, runs=2)
    assert timing.repeats[0] >= 20
    assert timing.a == pytest.approx((1e-4, 1e-4))
    assert (timing.ratio, timing.verdict()) == (None, "")


def test_drift_cancels_in_the_ratio(clock: list[float]) -> None:
    """A machine that slows down by a factor of ten while it measures leaves the ratio alone."""
    slow = [1.0]

    class Drifting(Fake):
        def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, Any], /) -> list[Any]:
            slow[0] *= 1.02
            self.clock[0] += self.seconds * slow[0]
            return []

    timing = bench_pair(Drifting("a", [], clock, 0.02), Drifting("b", [], clock, 0.02), {}, runs=60)
    assert timing.a[-1] > 5 * timing.a[0]
    assert timing.ratio is not None
    assert timing.ratio.median == pytest.approx(1, abs=0.03)


def test_runs_below_one(clock: list[float]) -> None:
    with pytest.raises(ValueError, match="expected at least 1 run, got 0"):
        bench_one(Fake("a", [], clock, 1.0), {}, runs=0)


def test_spread() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    spread = Spread.of(values)
    assert (spread.median, spread.smallest, spread.largest) == (statistics.median(values), 1.0, 5.0)
    assert (spread.lower, spread.upper) == (2.0, 4.0)
    assert Spread.of([7.0]).to_dict() == dict.fromkeys(("median", "q1", "q3", "min", "max"), 7.0)
