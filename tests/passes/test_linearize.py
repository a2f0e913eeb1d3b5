"""`linearize`: fitted, saved, and run by onnxruntime; what it must not touch is refused with the reason."""

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import graphopt
from graphopt.backends.onnxruntime import Session
from graphopt.errors import GraphOptError
from graphopt.rewrite import parse
from graphopt.verification.numbers import difference

# Tests are imported by path: this folder is no package.
_spec = importlib.util.spec_from_file_location("attention_models", Path(__file__).with_name("attention_models.py"))
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

KINDS = {
    "expanded mask": {"kind": "expanded"},
    "bidirectional": {"kind": "bidirectional"},
    "causal": {"kind": "causal"},
    "causal and padding": {"kind": "both"},
    "grouped causal": {"kind": "both", "kv_heads": 2},
    "grouped bidirectional": {"kind": "bidirectional", "kv_heads": 1},
}


def feeds(length, seed=1, dtype=torch.float32, batch=2):
    x, mask = models.example(batch, length, dtype=dtype, seed=seed)
    return {"x": x.numpy(), "mask": mask.numpy()}


def calibration(count=6, dtype=torch.float32):
    return [feeds(20 + i, seed=10 + i, dtype=dtype) for i in range(count)]


def statuses(result):
    return [site.status for p in result.report.passes for site in p.sites if site.kind == "attention"]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def rewritten(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "m.onnx"
    models.export(models.Block(**KINDS[request.param]), path)
    graph = graphopt.load(path)
    return (
        request.param,
        graph,
        graph.apply("linearize{window=8,start=identity,fit_steps=60}", calibration=calibration()),
        path.parent,
    )


def test_fitting_lowers_the_error(rewritten):
    _, _, result, _ = rewritten
    assert statuses(result) == ["rewritten"]
    errors = result.report.passes[0].sites[-1].errors
    assert errors["after_fit"] < 0.8 * errors["before_fit"]
    assert not result.report.passes[0].sites[-1].reason


@pytest.mark.parametrize("target", ["onnx", "onnxruntime"])
def test_saved_model_is_the_graph(rewritten, target):
    kind, _, result, folder = rewritten
    path = folder / f"{target}.onnx"
    result.graph.save(path, target=target)
    session = Session(path)
    for length in (1, 7, 33, 130):
        values = feeds(length)
        found, expected = session.run(values)["y"], result.graph.run(values)["y"]
        # Two implementations of the same fp32 sums.
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=f"{kind} at {length}")
    operators = {n.op_type for f in onnx.load(path).functions for n in f.node}
    assert "LinearAttention" not in operators, "the hybrid's own form was measured to be as fast"
    onnx.checker.check_model(onnx.load(path)) if target == "onnx" else None


@pytest.mark.parametrize(("kind", "opset"), [("bidirectional", 11), ("bidirectional", 13), ("both", 13), ("both", 16)])
def test_older_opsets(kind, opset, tmp_path):
    models.export(models.Block(kind), tmp_path / "m.onnx", opset=opset)
    result = graphopt.load(tmp_path / "m.onnx").apply(
        "linearize{window=8,max_error=9}", calibration=calibration(2), fit_steps=2
    )
    for target in ("onnx", "onnxruntime"):
        result.graph.save(tmp_path / "out.onnx", target=target)
        found = Session(tmp_path / "out.onnx").run(feeds(70))["y"]
        np.testing.assert_allclose(found, result.graph.run(feeds(70))["y"], rtol=1e-4, atol=1e-5)


def test_an_opset_that_is_too_old_is_named(tmp_path):
    models.export(models.Block("both"), tmp_path / "m.onnx", opset=11)
    graph = graphopt.load(tmp_path / "m.onnx")
    result = graph.apply("linearize{window=8,max_error=9}", calibration=calibration(2), fit_steps=0)
    with pytest.raises(GraphOptError, match="below opset 13"):
        result.graph.save(tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_interface_and_untouched_nodes_stay(rewritten):
    _, graph, result, folder = rewritten
    result.graph.save(folder / "saved.onnx")
    before, after = graph.onnx.proto, onnx.load(folder / "saved.onnx")
    assert after.graph.input == before.graph.input
    assert after.graph.output == before.graph.output
    assert [o for o in after.opset_import if o.domain == ""] == list(before.opset_import)
    kept = {n.name for n in after.graph.node} & {n.name for n in before.graph.node}
    assert len(kept) >= 8, "the projections stay as they were"
    # The input graph is another object and still computes what it did.
    assert statuses(graph.apply("linearize{window=8,max_error=1e-9,fit_steps=0}", calibration=calibration(1))) == [
        "reverted"
    ]


@pytest.mark.parametrize("kind", ["bidirectional", "expanded"])
def test_no_length_squared_tensor_bidirectional(kind, tmp_path):
    """At 4,096 tokens a [T, T] of 4 heads takes 268 MB, a boolean one 17 MB; the linear form stays below 8 MB."""
    path = tmp_path / "m.onnx"
    models.export(models.Block(kind), path)
    graph = graphopt.load(path)
    result = graph.apply("linearize{window=8,fit_steps=0,max_error=9}", calibration=calibration(1))
    sizes = []

    def observe(node, value):
        if isinstance(value, torch.Tensor):
            sizes.append((value.numel() * value.element_size(), node.name))

    from graphopt.execute import execute

    with torch.no_grad():
        x, mask = models.example(1, 4096, padded=False)
        execute(result.graph, (x, mask), observe)
    assert max(sizes)[0] < 8e6, max(sizes)


def test_padding_does_not_leak(rewritten):
    """Values at hidden positions change nothing at visible ones."""
    _, _, result, _ = rewritten
    values = feeds(12)
    other = dict(values, x=values["x"].copy())
    other["x"][-1, 8:] += 3.0
    a, b = result.graph.run(values)["y"], result.graph.run(other)["y"]
    np.testing.assert_allclose(a[-1, :8], b[-1, :8], rtol=1e-5, atol=1e-6)


def test_padding_on_the_left_does_not_leak(rewritten):
    """Later tokens see the padding before them, also where the mask is put together inside of the site."""
    kind, _, result, _ = rewritten
    if kind == "causal":
        pytest.skip("its mask hides no padding")
    values = feeds(12)
    values["mask"][:] = 1
    values["mask"][:, :4] = 0
    other = dict(values, x=values["x"].copy())
    other["x"][:, :4] += 3.0
    a, b = result.graph.run(values)["y"], result.graph.run(other)["y"]
    np.testing.assert_allclose(a[:, 4:], b[:, 4:], rtol=1e-5, atol=1e-6)


def test_prefix_invariance(rewritten):
    kind, _, result, _ = rewritten
    if "causal" not in kind:
        pytest.skip("a bidirectional model looks ahead")
    values = feeds(90, batch=1)
    values["mask"][:] = 1
    short = {name: value[:, :41] for name, value in values.items()}
    np.testing.assert_allclose(
        result.graph.run(values)["y"][:, :41], result.graph.run(short)["y"], rtol=1e-4, atol=1e-5
    )


def test_from_a_module():
    module = models.Block("both").eval()
    x, mask = models.example()
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")}
    options = {"dynamic_shapes": {"x": dims, "mask": dims}, "calibration": calibration()}
    new = graphopt.transform(module, "linearize{window=8,fit_steps=60}", example_inputs=(x, mask), **options)
    assert set(module.state_dict()) < set(new.state_dict())
    x, mask = models.example(length=31, seed=5)
    assert difference(module(x, mask), new(x, mask)).rel_rms < 0.8
    loss = new(x, mask).square().mean()
    loss.backward()
    assert new.q.weight.grad is not None


@pytest.mark.parametrize("target", ["onnx", "onnxruntime"])
def test_from_a_module_to_onnx(tmp_path, target):
    module = models.Block("both").eval()
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")}
    graph = graphopt.load(module, models.example(), {"x": dims, "mask": dims})
    result = graph.apply("linearize{window=8,fit_steps=10,max_error=9}", calibration=calibration(2))
    assert statuses(result) == ["rewritten"]
    result.graph.save(tmp_path / "m.onnx", target=target)
    values = feeds(29)
    name = result.graph.outputs[0].name
    found = Session(tmp_path / "m.onnx").run(values)[name]
    np.testing.assert_allclose(found, result.graph.run(values)[name], rtol=1e-4, atol=1e-5)
    names = {t.name for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert "q.bias" in names, names


def test_half_precision(tmp_path):
    path = tmp_path / "m.onnx"
    models.export(models.Block("bidirectional"), path, torch.float16)
    graph = graphopt.load(path)
    data = calibration(dtype=torch.float16)
    result = graph.apply("linearize{window=8,fit_steps=40}", calibration=data)
    assert statuses(result) == ["rewritten"]
    result.graph.save(tmp_path / "out.onnx")
    values = feeds(19, dtype=torch.float16)
    found = Session(tmp_path / "out.onnx").run(values)["y"]
    assert found.dtype == np.float16
    # fp16 keeps 11 bits, and onnxruntime rounds at other places than torch.
    np.testing.assert_allclose(found, result.graph.run(values)["y"], rtol=2e-2, atol=5e-3)


def test_position_bias_is_refused(tmp_path):
    path = tmp_path / "m.onnx"
    models.export(models.Block("alibi"), path)
    result = graphopt.load(path).apply("linearize", calibration=calibration(1))
    (site,) = result.report.passes[0].sites
    assert site.status == "refused"
    assert "finite biases" in site.reason


def test_a_site_that_misses_is_reverted(tmp_path):
    path = tmp_path / "m.onnx"
    models.export(models.Block(), path)
    graph = graphopt.load(path)
    result = graph.apply("linearize{window=8,fit_steps=2,max_error=0.001}", calibration=calibration(1))
    (site,) = result.report.passes[0].sites
    assert site.status == "reverted"
    assert "above 0.001 (option max_error)" in site.reason
    result.graph.save(tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx") == graph.onnx.proto


def test_distillation_improves_the_whole(tmp_path):
    path = tmp_path / "m.onnx"
    models.export(models.Block(), path)
    graph, data = graphopt.load(path), calibration(12)
    short, long = (
        graph.apply(f"linearize{{window=8,fit_steps=5,max_error=9,distill_steps={n}}}", calibration=data)
        for n in (0, 60)
    )
    assert long.report.outputs[0].rel_rms < short.report.outputs[0].rel_rms
    assert "after_finish" in long.report.passes[0].sites[0].errors
    assert "after_finish" not in short.report.passes[0].sites[0].errors


def test_seeded(tmp_path):
    path = tmp_path / "m.onnx"
    models.export(models.Block(), path)
    graph = graphopt.load(path)
    a, b = (
        graph.apply("linearize{window=8,fit_steps=5,features=16}", calibration=calibration(), seed=3) for _ in range(2)
    )
    values = feeds(9)
    np.testing.assert_array_equal(a.graph.run(values)["y"], b.graph.run(values)["y"])


def test_synthetic_calibration_says_so(tmp_path):
    path = tmp_path / "m.onnx"
    models.export(models.Block(), path)
    result = graphopt.load(path).apply("linearize{window=8,fit_steps=3,max_error=9}")
    assert any("random inputs" in note and "quality is not" in note for note in result.report.notes)


def test_few_batches_are_said_to_be_few(tmp_path):
    models.export(models.Block(), tmp_path / "m.onnx")
    graph = graphopt.load(tmp_path / "m.onnx")
    for count, expected in ((9, 1), (10, 0)):
        result = graph.apply("linearize{window=8,fit_steps=1,max_error=9}", calibration=calibration(count))
        assert len([n for n in result.report.passes[0].notes if "one in ten" in n]) == expected


def test_one_equation():
    assert "->" in (parse("linearize").__doc__ or "").splitlines()[0]
