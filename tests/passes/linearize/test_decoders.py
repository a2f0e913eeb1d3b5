"""Every causal method on decoders with a cache: prefill = decode = full run, in torch and on onnxruntime."""

import numpy as np
import onnx
import pytest

import graphopt
from graphopt.decoders import generate, logits
from graphopt.errors import CheckFailed, GraphOptError

WINDOW = 8
METHODS = {
    "lolcats": "method=lolcats",
    "lolcats with sinks": "method=lolcats,sinks=3",
    "lolcats, tied": "method=lolcats,tied=true",
    "hedgehog": "method=hedgehog",
    "liger": "method=liger",
    "gated": "method=gated",
    "gated alone": "method=gated,window=0",
    "delta": "method=delta",
    "delta to -1": "method=delta,negative=true",
}
# fp32 sums of a few dozen terms in another order, through two layers, on logits of size 10.
CLOSE = {"rtol": 1e-4, "atol": 2e-4}


def spelled(options: str, **more: object) -> str:
    window = "" if "window=" in options else f"window={WINDOW},"
    extra = "".join(f",{key}={value}" for key, value in more.items())
    return f"linearize{{{window}{options},max_error=99{extra}}}"


def calibration(graph, texts):
    return [{graph.inputs[0].name: texts[i : i + 2]} for i in (0, 2)]


@pytest.fixture(scope="module", params=METHODS, ids=str)
def student(request, with_cache, texts):
    graph = with_cache(4, 2)
    result = graph.apply(
        spelled(METHODS[request.param], fit_steps=3, lora_steps=2), calibration=calibration(graph, texts)
    )
    assert [s.status for s in result.report.passes[0].sites] == ["rewritten"] * 2
    return request.param, result.graph


@pytest.mark.parametrize("split", [1, 7, 8, 9, 30, 44])
def test_prefill_and_decoding_agree(student, texts, split):
    _, graph = student
    np.testing.assert_allclose(logits(graph, texts, split=split), logits(graph, texts), **CLOSE)


@pytest.mark.parametrize("target", ["onnx", "onnxruntime"])
def test_on_onnxruntime(student, texts, target, tmp_path):
    name, graph = student
    graph.save(tmp_path / "m.onnx", target=target)
    operators = {n.op_type for f in onnx.load(tmp_path / "m.onnx").functions for n in f.node}
    recurrent = name.split()[0] in ("liger", "gated", "delta")
    assert ("LinearAttention" in operators) == (recurrent and target == "onnxruntime")
    expected = logits(graph, texts)
    for split in (None, 1, 20):
        np.testing.assert_allclose(logits(tmp_path / "m.onnx", texts, split=split), expected, **CLOSE)


@pytest.mark.parametrize("length", [1, 3, 8, 9, 16, 29])
def test_what_follows_changes_nothing(student, texts, length):
    _, graph = student
    np.testing.assert_allclose(logits(graph, texts[:, :length]), logits(graph, texts)[:, :length], **CLOSE)


@pytest.mark.parametrize("padding", [1, 5, 13])
def test_padding_on_the_left_changes_nothing(student, texts, padding):
    name, graph = student
    if "sinks" in name:
        pytest.skip("the first positions are the sinks, padding or not")
    junk = np.full((len(texts), padding), 7)
    mask = np.concatenate([np.zeros_like(junk), np.ones_like(texts)], 1)
    padded = np.concatenate([junk, texts], 1)
    for split in (None, padding + 3):
        found = logits(graph, padded, split=split, mask=mask)[:, padding:]
        np.testing.assert_allclose(found, logits(graph, texts), **CLOSE)


def test_memory_stays_the_same(student, texts):
    """The caches never hold more than the sinks and the window, whatever is fed."""
    name, graph = student
    from graphopt.decoders.driver import Driver

    driver = Driver(graph)
    driver.feed(texts[:2])
    sizes = {key: value.shape for key, value in driver._memory.items()}
    for _ in range(3):
        driver.feed(texts[:2, :1])
        assert {key: value.shape for key, value in driver._memory.items()} == sizes
    kept = 0 if "hedgehog" in name or "alone" in name else WINDOW + (3 if "sinks" in name else 0)
    assert {s[2] for k, s in sizes.items() if "key_values" in k} == {kept}


def test_the_interface_keeps_its_names(student, tmp_path):
    _, graph = student
    graph.save(tmp_path / "m.onnx")
    before, after = graph.onnx.proto.graph, onnx.load(tmp_path / "m.onnx").graph
    assert list(after.input)[: len(before.input)] == list(before.input)
    assert [o.name for o in after.output][: len(before.output)] == [o.name for o in before.output]
    added = [i.name for i in after.input][len(before.input) :]
    assert added == ["past_state.0", "past_state.1"]
    assert [o.name for o in after.output][len(before.output) :] == ["present_state.0", "present_state.1"]
    assert {t.name for t in before.initializer if "proj" in t.name} <= {t.name for t in after.initializer}
    caches = [o for o in after.output if o.name.startswith("present.")]
    assert len(caches) == 4
    for output in caches:
        assert [d.dim_param for d in output.type.tensor_type.shape.dim][2] == "window_length"
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"))


@pytest.mark.parametrize("heads", [(2, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("options", ["method=lolcats", "method=lolcats,tied=true", "method=liger", "method=delta"])
def test_groups_of_queries(with_cache, texts, heads, options):
    graph = with_cache(*heads)
    new = graph.apply(spelled(options, train="none"), calibration=calibration(graph, texts)).graph
    np.testing.assert_allclose(logits(new, texts, split=11), logits(new, texts), **CLOSE)


def test_a_window_over_the_whole_text_is_the_original(with_cache, texts):
    graph = with_cache(4, 2)
    new = graph.apply("linearize{window=30,train=none,max_error=99}", calibration=calibration(graph, texts)).graph
    np.testing.assert_allclose(logits(new, texts[:, :30]), logits(graph, texts[:, :30]), **CLOSE)
    assert np.abs(logits(new, texts) - logits(graph, texts)).max() > 0.01


@pytest.mark.parametrize("options", ["method=lolcats", "method=liger"])
def test_with_and_without_a_cache_are_the_same_model(with_cache, without_cache, texts, options):
    found = []
    for graph in (with_cache(4, 2), without_cache(4, 2)):
        result = graph.apply(spelled(options, train="none"), calibration=calibration(graph, texts))
        found.append(logits(result.graph, texts))
    np.testing.assert_allclose(*found, **CLOSE)


def test_generated_text_is_the_same_everywhere(student, texts, tmp_path):
    _, graph = student
    graph.save(tmp_path / "m.onnx", target="onnxruntime")
    expected = generate(graph, texts[:2, :5], new_tokens=12)
    assert expected.shape == (2, 17)
    np.testing.assert_array_equal(generate(tmp_path / "m.onnx", texts[:2, :5], new_tokens=12), expected)


def test_the_report_says_how_to_feed_it(with_cache, texts):
    graph = with_cache(4, 2)
    report = graph.apply(spelled("train=none"), calibration=calibration(graph, texts)).report
    assert next(s for s in report.to_dict()["states"] if s["kind"] == "sum") == {
        "past": "past_state.0",
        "present": "present_state.0",
        "kind": "sum",
    }
    assert any("begin with caches of length 0" in note for note in report.passes[0].notes)
    assert [o.name for o in report.outputs] == ["logits"], "what became of the caches has another length on purpose"


@pytest.mark.parametrize("sinks", [0, 4])
def test_a_window_alone_has_no_state(with_cache, texts, sinks):
    graph = with_cache(4, 2)
    new = graph.apply(spelled("branches=window,train=none", sinks=sinks), calibration=calibration(graph, texts)).graph
    assert {s.kind for s in new.states} == {"window"}
    assert [i.name for i in new.inputs] == [i.name for i in graph.inputs]
    np.testing.assert_allclose(logits(new, texts, split=20), logits(new, texts), **CLOSE)
    # One layer of a window has seen nothing of what lies more than a window per layer back.
    if not sinks:
        changed = texts.copy()
        changed[:, :10] = (changed[:, :10] + 1) % 40
        apart = np.abs(logits(new, changed) - logits(new, texts)).max((0, 2))
        assert apart[10 + 2 * (WINDOW - 1) :].max() < 1e-4 < apart[10]


def test_positions_counted_from_the_cache_are_noticed(decoder_files, texts, tmp_path):
    """Where positions come from the length of the cache, a bounded cache would stop them from growing."""
    model = onnx.load(decoder_files(4, 2) / "decoder_with_past.onnx")
    make = onnx.helper.make_node
    nodes = [
        make("Shape", ["past_key_values.0.key"], ["p/past"], start=2, end=3),
        make("Shape", ["input_ids"], ["p/new"], start=1, end=2),
        make("Add", ["p/past", "p/new"], ["p/end"]),
        make("Squeeze", ["p/past"], ["p/from"]),
        make("Squeeze", ["p/end"], ["p/to"]),
        make("Constant", [], ["p/one"], value_int=1),
        make("Range", ["p/from", "p/to", "p/one"], ["p/row"]),
        make("Expand", ["p/row", "p/shape"], ["counted"]),
    ]
    nodes.insert(7, make("Shape", ["input_ids"], ["p/shape"]))
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = "counted" if name == "position_ids" else name
    for i, node in enumerate(nodes):
        node.name = f"positions/{i}"
        model.graph.node.insert(i, node)
    del model.graph.input[[i.name for i in model.graph.input].index("position_ids")]
    onnx.save(model, tmp_path / "m.onnx")
    graph = graphopt.load(tmp_path / "m.onnx")
    with pytest.raises(CheckFailed, match="export the model with position_ids"):
        graph.apply(spelled("train=none"), calibration=calibration(graph, texts))


def test_text_shorter_than_the_window(with_cache, texts):
    graph = with_cache(4, 2)
    with pytest.raises(GraphOptError, match=r"longer than the window of 64 keys .* found at most 45"):
        graph.apply("linearize{train=none}", calibration=calibration(graph, texts))


def test_layers_that_stay(with_cache, texts):
    graph = with_cache(4, 2)
    for options, kept in (("layers=1:", 1), ("keep_every=2", 1), ("layers=:1", 1)):
        result = graph.apply(spelled(f"train=none,{options}"), calibration=calibration(graph, texts))
        statuses = [s.status for s in result.report.passes[0].sites]
        assert statuses.count("refused") == kept
        assert any("left as it is by layers=" in s.reason for s in result.report.passes[0].sites)
        np.testing.assert_allclose(logits(result.graph, texts, split=20), logits(result.graph, texts), **CLOSE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("layers=x", "expected layers to be a slice such as 2: or :-1, got 'x'"),
        ("window=-1", "expected window to be at least 0"),
        ("branches=window,window=0", "expected a window above 0"),
        ("lora_rank=0", "expected lora_rank to be above 0"),
        ("method=lolcat", "expected method to be"),
    ],
)
def test_wrong_options(with_cache, options, message):
    with pytest.raises(GraphOptError, match=message):
        with_cache(4, 2).apply(f"linearize{{{options}}}")
