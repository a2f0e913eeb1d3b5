"""What has to hold for a model and what a tool made of it; written without the code under test."""

from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto

from .odd import Odd, own_names, subgraphs


def stored(odd: Odd, folder: Path) -> Path:
    """The model as a file, beside its external data."""
    for name, content in odd.files.items():
        (folder / name).write_bytes(content)
    (folder / "model.onnx").write_bytes(odd.model.SerializeToString())
    return folder / "model.onnx"


def session(path: Path) -> onnxruntime.InferenceSession:
    """The file on onnxruntime, each node as it is written."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def is_valid(path: Path) -> bool:
    """Whether the checker of the onnx package, and its shape inference, find nothing wrong."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


def same_bits(a: Any, b: Any) -> bool:
    """Whether two results of onnxruntime are equal in type, shape and every bit."""
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_bits, a, b))
    if not isinstance(a, np.ndarray):
        return bool(a == b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.tolist() == b.tolist() if a.dtype == object else a.tobytes() == b.tobytes()


def nodes_in(graph: GraphProto) -> Iterator[NodeProto]:
    """All nodes, those of bodies too."""
    for node in graph.node:
        yield node
        for body in subgraphs(node):
            yield from nodes_in(body)


def essence(node: NodeProto) -> bytes:
    """All that a node says but what its operands and results are called, and what its bodies are."""
    twin = NodeProto()
    twin.CopyFrom(node)
    del twin.input[:], twin.output[:], twin.attribute[:]
    for device in twin.device_configurations:
        for spec in device.sharding_spec:
            spec.ClearField("tensor_name")
    bodies = (AttributeProto.GRAPH, AttributeProto.GRAPHS)
    twin.attribute.extend(a for a in node.attribute if a.type not in bodies)
    return bytes(twin.SerializeToString(deterministic=True))


def check_nodes(before: ModelProto, after: ModelProto, made: Collection[str] = ()) -> None:
    """Nothing is new but nodes of the operators `made`, and no node that is left says anything else than it did."""
    new = Counter(map(essence, nodes_in(after.graph))) - Counter(map(essence, nodes_in(before.graph)))
    found = sorted(NodeProto.FromString(each).op_type for each in new.elements())
    assert found == sorted(made), found


def check_interface(before: ModelProto, after: ModelProto) -> None:
    """What surrounds the nodes is as it was; weights that had to stand among the inputs may have come and gone."""
    for name in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(after, name) == getattr(before, name)
    for name in ("metadata_props", "training_info", "functions", "configuration"):
        assert list(getattr(after, name)) == list(getattr(before, name))
    assert list(after.opset_import)[: len(before.opset_import)] == list(before.opset_import)
    for name in ("output", "metadata_props"):
        assert list(getattr(after.graph, name)) == list(getattr(before.graph, name))
    assert (after.graph.name, after.graph.doc_string) == (before.graph.name, before.graph.doc_string)
    assert _fed(after) == _fed(before)


def _fed(proto: ModelProto) -> list[onnx.ValueInfoProto]:
    weights = {t.name for t in proto.graph.initializer}
    return [i for i in proto.graph.input if proto.ir_version >= 4 or i.name not in weights]


def check_mentions(proto: ModelProto) -> None:
    """What the training and the descriptions of a quantisation speak of is there."""
    names = own_names(proto.graph)
    for annotation in proto.graph.quantization_annotation:
        assert names.issuperset(p.value for p in annotation.quant_parameter_tensor_names)
    for training in proto.training_info:
        assert names.issuperset(b.key for b in (*training.initialization_binding, *training.update_binding))
        for graph in (training.initialization, training.algorithm):
            known = names | own_names(graph)
            assert known.issuperset(name for node in graph.node for name in node.input)


def check_names(graph: GraphProto, outer: frozenset[str] = frozenset()) -> None:
    """Each name is defined once in its graph, and before it is used there or in a body."""
    known = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    known |= {s.values.name for s in graph.sparse_initializer}
    made: set[str] = set()
    for node in graph.node:
        visible = frozenset(known | outer)
        assert visible.issuperset(name for name in node.input if name), node
        for body in subgraphs(node):
            check_names(body, visible)
        results = [name for name in node.output if name]
        assert len(set(results)) == len(results)
        assert made.isdisjoint(results), node
        made.update(results)
        known.update(results)
    assert (known | outer).issuperset(o.name for o in graph.output)
