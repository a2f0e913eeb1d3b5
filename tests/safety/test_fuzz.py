"""A short run of the fuzzer: `python -m benchmarks.fuzz` is the long one."""

import resource
import time

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graphopt
from graphopt import GraphOptError

from .fuzzing import mutate, seeds, targets
from .registry import adding

SECONDS = 10
# Random, but with choices that hypothesis records, so that it finds the smallest failing sequence of them.
CHANCE = st.randoms(use_true_random=False)


def examples(count):
    # The same examples each time: new ones are for the long run, whose finds become regression tests.
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="session")
def models():
    return [onnx.ModelProto.FromString(data) for data in seeds.seeds(largest=600, of_each=2).values()]


@pytest.fixture(autouse=True)
def little_memory():
    """What these models may take beyond what the process has; an allocation beyond it fails."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    targets.limit_memory()
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def hold(target, data):
    started = time.process_time()
    escaped = targets.verdict(target, data)
    if escaped is not None:
        raise escaped
    assert time.process_time() - started < SECONDS


def test_seeds_pass(models):
    assert len(models) > 200
    for model in models:
        targets.load(model.SerializeToString())


def test_changed_models_are_loaded_or_refused(models):
    @examples(1200)
    @given(st.sampled_from(models), CHANCE)
    def check(model, random):
        hold("load", mutate.mutated(model, random, models).SerializeToString())

    check()


def test_changed_bytes_are_loaded_or_refused(models):
    @examples(500)
    @given(st.sampled_from(models), CHANCE)
    def check(model, random):
        hold("load", mutate.broken(model.SerializeToString(), random))

    check()


def test_changed_models_are_cleaned_up_or_refused(models):
    @examples(250)
    @given(st.sampled_from(models), CHANCE)
    def check(model, random):
        hold("clean", mutate.mutated(model, random, models).SerializeToString())

    check()


@examples(200)
@given(st.binary(max_size=200))
def test_bytes_are_refused(data):
    hold("load", data)


def test_every_prefix_and_every_changed_byte():
    model = adding().SerializeToString()
    for place in range(len(model)):
        hold("load", model[:place])
        for byte in (0, 1, 0x7F, 0x80, 0xFF, model[place] ^ 1, model[place] ^ 8):
            hold("load", model[:place] + bytes([byte]) + model[place + 1 :])


def test_every_prefix_of_a_file_is_refused(tmp_path):
    """A cut inside the graph is seen; one behind it only loses what stands there."""
    model, path = adding(), tmp_path / "m.onnx"
    whole = model.SerializeToString()
    behind = len(whole) - len(onnx.ModelProto(opset_import=model.opset_import).SerializeToString())
    for place in range(behind):
        path.write_bytes(whole[:place])
        with pytest.raises(GraphOptError):
            graphopt.load(path)


def test_mutations_keep_most_models_whole(models):
    """Otherwise the other tests would only see the parser."""
    from random import Random

    random, loaded = Random(0), 0
    for model in models[:200]:
        try:
            targets.load(mutate.mutated(model, random, models).SerializeToString())
        except GraphOptError:
            continue
        loaded += 1
    assert loaded > 80
