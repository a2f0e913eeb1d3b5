"""The operators of ai.onnx.ml against onnxruntime on random models, and by hand where it departs from the standard."""

import inspect
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from graphopt.dialect import Operator, lookup, table
from graphopt.errors import GraphOptError

DOMAIN = "ai.onnx.ml"
TRANSFORMS = ("NONE", "LOGISTIC", "SOFTMAX", "SOFTMAX_ZERO", "PROBIT")
INPUTS = (torch.float32, torch.float64, torch.int64, torch.int32)
MODES = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ")
# Sums of a dozen float32 products, in another order; PROBIT loses digits where it is about zero.
RTOL, ATOL, ATOL_PROBIT = 1e-4, 1e-5, 2e-4


def array(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value


def proto(value: Any) -> Any:
    return numpy_helper.from_array(array(value)) if isinstance(value, (Tensor, np.ndarray)) else value


def by_onnxruntime(
    name: str,
    inputs: list[Any],
    outputs: int = 1,
    opset: int = 3,
    types: list[onnx.TypeProto] | None = None,
    **options: Any,
) -> list[Any]:
    names, results = [f"x{i}" for i in range(len(inputs))], [f"y{i}" for i in range(outputs)]
    feeds = {n: array(x) for n, x in zip(names, inputs, strict=True)}
    kinds = types or [
        helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for x in feeds.values()
    ]
    declared = [helper.make_value_info(n, kind) for n, kind in zip(names, kinds, strict=True)]
    made = helper.make_node(name, names, results, domain=DOMAIN, **{key: proto(v) for key, v in options.items()})
    graph = helper.make_graph([made], "one", declared, [onnx.ValueInfoProto(name=n) for n in results])
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, opset)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, ["CPUExecutionProvider"])
    return session.run(None, feeds)


def dialect(name: str, inputs: list[Any], opset: int = 3, **options: Any) -> list[Any]:
    # An attribute is float32 in the file, whatever the test wrote.
    rounded = {key: as_stored(value) for key, value in options.items()}
    result = lookup(DOMAIN, name, opset).function(*inputs, **rounded)
    return [array(x) for x in (result if isinstance(result, tuple) else (result,))]


def as_stored(value: Any) -> Any:
    if isinstance(value, float):
        return float(np.float32(value))
    return [as_stored(item) for item in value] if isinstance(value, list) else value


def compare(name: str, inputs: list[Any], outputs: int = 1, opset: int = 3, **options: Any) -> None:
    expected = by_onnxruntime(name, inputs, outputs, opset, **options)
    found = dialect(name, inputs, opset, **options)
    atol = ATOL_PROBIT if options.get("post_transform") in ("PROBIT", 4) else ATOL
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        if theirs.dtype.kind == "f":
            np.testing.assert_allclose(mine, theirs, rtol=RTOL, atol=atol)
        else:
            np.testing.assert_array_equal(mine, theirs)


def features(rng: random.Random, count: int, dtype: torch.dtype, *, missing: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    x = torch.randn(rng.choice([1, 2, 5, 33]), count, generator=generator) * 2
    if not dtype.is_floating_point:
        return (x * 3).round().to(dtype)
    gone = torch.rand(x.shape, generator=generator) < 0.2
    return torch.where(gone & missing, torch.nan, x).to(dtype)


def floats(rng: random.Random, count: int) -> list[float]:
    return [rng.gauss(0, 1) for _ in range(count)]


def labels(rng: random.Random, count: int, integers: str = "classlabels_ints") -> dict[str, Any]:
    if rng.random() < 0.5:
        return {"classlabels_strings": [f"class {i}" for i in range(count)]}
    return {integers: [10 * i + 3 for i in range(count)]}


def forest(rng: random.Random, count: int) -> tuple[dict[str, list[Any]], list[tuple[int, int]]]:
    """Attributes of random trees over `count` features, and the leaves."""
    rows: list[dict[str, Any]] = []
    leaves = []
    modes = [rng.choice(MODES)] if rng.random() < 0.5 else MODES

    def grow(tree: int, depth: int, ids: Callable[[], int]) -> int:
        name = ids()
        row = {"treeids": tree, "nodeids": name, "featureids": 0, "modes": "LEAF", "values": 0.0}
        row |= {"truenodeids": 0, "falsenodeids": 0, "missing_value_tracks_true": rng.randint(0, 1)}
        rows.append(row)
        if depth == 0 or rng.random() < 0.2:
            leaves.append((tree, name))
            return name
        row["modes"], row["featureids"] = rng.choice(modes), rng.randrange(count)
        row["values"] = round(rng.gauss(0, 2), rng.choice([0, 3]))
        row["truenodeids"], row["falsenodeids"] = grow(tree, depth - 1, ids), grow(tree, depth - 1, ids)
        return name

    for tree in range(rng.randint(1, 6)):
        grow(tree, rng.randint(0, 4), itertools.count().__next__)
    options = {f"nodes_{key}": [row[key] for row in rows] for key in rows[0]}
    if rng.random() < 0.4:
        del options["nodes_missing_value_tracks_true"]
    return options, leaves


def votes(
    rng: random.Random, kind: str, leaves: list[tuple[int, int]], ids: list[int], *, positive: bool
) -> dict[str, list[Any]]:
    """For each leaf a weight of each of the ids, in any order."""
    found = [(*leaf, i, rng.random() if positive else rng.gauss(0, 1)) for leaf in leaves for i in ids]
    rng.shuffle(found)
    trees, nodes, targets, weights = (list(column) for column in zip(*found, strict=True))
    return {
        f"{kind}_treeids": trees,
        f"{kind}_nodeids": nodes,
        f"{kind}_ids": targets,
        f"{kind}_weights": weights,
    }


@pytest.mark.parametrize("seed", range(40))
def test_tree_classifier_of_several_classes(seed: int) -> None:
    rng = random.Random(seed)
    count, classes = rng.randint(1, 4), rng.choice([3, 4])
    options, leaves = forest(rng, count)
    options |= votes(rng, "class", leaves, list(range(classes)), positive=rng.random() < 0.5)
    options |= labels(rng, classes, "classlabels_int64s")
    if rng.random() < 0.5:
        options["base_values"] = floats(rng, classes)
    x = features(rng, count, INPUTS[seed % 4], missing=True)
    compare("TreeEnsembleClassifier", [x], 2, post_transform=TRANSFORMS[seed % 5], **options)


@pytest.mark.parametrize("seed", range(40))
def test_tree_classifier_of_two_classes(seed: int) -> None:
    rng = random.Random(seed)
    count, voted = rng.randint(1, 4), seed % 2
    options, leaves = forest(rng, count)
    options |= votes(rng, "class", leaves, [voted], positive=rng.random() < 0.5)
    options |= labels(rng, 2, "classlabels_int64s")
    if not voted and rng.random() < 0.5:
        options["base_values"] = floats(rng, 1)
    # Of the PROBIT of votes for the first class onnxruntime computes one half only.
    transform = TRANSFORMS[seed // 2 % (5 if voted else 4)]
    x = features(rng, count, INPUTS[seed % 4], missing=True)
    compare("TreeEnsembleClassifier", [x], 2, post_transform=transform, **options)


def test_tree_classifier_in_doubles() -> None:
    rng = random.Random(0)
    options, leaves = forest(rng, 3)
    options |= votes(rng, "class", leaves, [0, 1, 2], positive=False)
    # A split that only a double can tell from the feature.
    split = 1 + 1e-12
    options["nodes_values_as_tensor"] = torch.full((len(options.pop("nodes_values")),), split, dtype=torch.float64)
    options["class_weights_as_tensor"] = torch.tensor(options.pop("class_weights"), dtype=torch.float64)
    options["base_values_as_tensor"] = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    x = torch.tensor([[1.0, 1.0, split], [split, 1.0, 1.0], [1 + 2e-12, split, 1.0]], dtype=torch.float64)
    compare("TreeEnsembleClassifier", [x], 2, classlabels_int64s=[1, 2, 3], **options)


STUMP: dict[str, Any] = {
    "nodes_treeids": [0, 0, 0],
    "nodes_nodeids": [0, 1, 2],
    "nodes_featureids": [0, 0, 0],
    "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"],
    "nodes_values": [0.0, 0.0, 0.0],
    "nodes_truenodeids": [1, 0, 0],
    "nodes_falsenodeids": [2, 0, 0],
}
TWO_ROWS = torch.tensor([[-1.0], [1.0]])


def test_tree_classifier_gives_the_top_of_two_classes() -> None:
    # onnxruntime says 1 or 0, whatever the labels, by the sign of the second score.
    given = {"class_treeids": [0] * 4, "class_nodeids": [1, 1, 2, 2], "class_ids": [0, 1, 0, 1]}
    weights = {"class_weights": [0.75, 0.25, 0.25, 0.75], "classlabels_strings": ["no", "yes"]}
    found, scores = dialect("TreeEnsembleClassifier", [TWO_ROWS], **STUMP, **given, **weights, base_values=[0.25, 0.0])
    assert found.tolist() == ["no", "yes"]
    assert scores.tolist() == [[1.0, 0.25], [0.5, 0.75]]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_tree_classifier_of_one_class(transform: str) -> None:
    given = {"class_treeids": [0, 0], "class_nodeids": [1, 2], "class_ids": [0, 0], "class_weights": [-0.25, 0.75]}
    compare("TreeEnsembleClassifier", [TWO_ROWS], 2, **STUMP, **given, classlabels_int64s=[7], post_transform=transform)
    with pytest.raises(GraphOptError, match="expected two string labels"):  # onnxruntime aborts
        dialect("TreeEnsembleClassifier", [TWO_ROWS], **STUMP, **given, classlabels_strings=["a"])


def test_tree_classifier_leaves_odd_base_values_to_onnxruntime() -> None:
    given = {"class_treeids": [0, 0], "class_nodeids": [1, 2], "class_ids": [1, 1], "class_weights": [0.25, 0.75]}
    with pytest.raises(NotImplementedError, match="base_values"):
        dialect("TreeEnsembleClassifier", [TWO_ROWS], **STUMP, **given, classlabels_int64s=[0, 1], base_values=[0.5])


@pytest.mark.parametrize("seed", range(40))
def test_tree_regressor(seed: int) -> None:
    rng = random.Random(seed)
    count, targets = rng.randint(1, 4), 1 + seed % 3
    options, leaves = forest(rng, count)
    options |= votes(rng, "target", leaves, list(range(targets)), positive=False)
    options |= {"n_targets": targets, "aggregate_function": ("SUM", "AVERAGE", "MIN", "MAX")[seed % 4]}
    if rng.random() < 0.5:
        options["base_values"] = floats(rng, targets)
    transform = rng.choice(TRANSFORMS if targets > 1 else ("NONE", "PROBIT"))
    x = features(rng, count, INPUTS[seed % 2], missing=True)
    compare("TreeEnsembleRegressor", [x], post_transform=transform, **options)


def test_blocks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    options, leaves = forest(rng, 3)
    options |= votes(rng, "target", leaves, [0, 1], positive=False) | {"n_targets": 2}
    x = torch.randn(29, 3, generator=torch.Generator().manual_seed(0))
    (whole,) = dialect("TreeEnsembleRegressor", [x], **options)
    monkeypatch.setattr("graphopt.dialect.ml.trees._BLOCK", 20)
    (parts,) = dialect("TreeEnsembleRegressor", [x], **options)
    np.testing.assert_array_equal(parts, whole)


class Ensemble:
    """A random ensemble of the fifth version, and what the standard says of it, row by row."""

    def __init__(self, rng: random.Random, count: int, targets: int, *, sets: bool) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.leaves: list[tuple[int, float]] = []
        self.rng, self.count, self.targets, self.modes = rng, count, targets, range(7 if sets else 6)
        self.roots = [self.grow(rng.randint(0, 3)) for _ in range(rng.randint(1, 4))]
        self.tracked = rng.random() < 0.5

    def grow(self, depth: int) -> int:
        rng, number = self.rng, len(self.nodes)
        node: dict[str, Any] = {"mode": rng.choice(self.modes), "feature": rng.randrange(self.count)}
        node |= {"split": float(rng.randint(-3, 3)), "missing": rng.randint(0, 1)}
        node["set"] = [float(member) for member in rng.sample(range(-4, 5), rng.randint(1, 4))]
        self.nodes.append(node)
        for branch in ("yes", "no"):
            if depth == 0 or rng.random() < 0.2:
                self.leaves.append((rng.randrange(self.targets), rng.gauss(0, 1)))
                node[branch] = (1, len(self.leaves) - 1)
            else:
                node[branch] = (0, self.grow(depth - 1))
        return number

    def options(self, dtype: torch.dtype) -> dict[str, Any]:
        column = {key: [node[key] for node in self.nodes] for key in self.nodes[0]}
        found: dict[str, Any] = {
            "tree_roots": self.roots,
            "nodes_modes": torch.tensor(column["mode"], dtype=torch.uint8),
            "nodes_featureids": column["feature"],
            "nodes_splits": torch.tensor(column["split"], dtype=dtype),
            "leaf_targetids": [target for target, _ in self.leaves],
            "leaf_weights": torch.tensor([weight for _, weight in self.leaves], dtype=dtype),
            "n_targets": self.targets,
        }
        for name, branch in (("true", "yes"), ("false", "no")):
            found[f"nodes_{name}leafs"] = [is_leaf for is_leaf, _ in column[branch]]
            found[f"nodes_{name}nodeids"] = [number for _, number in column[branch]]
        if self.tracked:
            found["nodes_missing_value_tracks_true"] = column["missing"]
        members = [value for node in self.nodes if node["mode"] == 6 for value in (*node["set"], np.nan)]
        return found | ({"membership_values": torch.tensor(members, dtype=dtype)} if members else {})

    def leaf(self, row: list[float], number: int) -> tuple[int, float]:
        node = self.nodes[number]
        value, split = row[node["feature"]], node["split"]
        tests = (value <= split, value < split, value >= split, value > split, value == split, value != split)
        holds = (*tests, value in node["set"])[node["mode"]] or (self.tracked and node["missing"] and value != value)
        is_leaf, following = node["yes" if holds else "no"]
        return self.leaves[following] if is_leaf else self.leaf(row, following)

    def votes(self, x: Tensor) -> list[list[tuple[int, float]]]:
        return [[self.leaf(row, root) for root in self.roots] for row in x.tolist()]


@pytest.mark.parametrize("seed", range(40))
def test_ensemble(seed: int) -> None:
    rng = random.Random(seed)
    count, targets, dtype = rng.randint(1, 4), 1 + seed % 3, INPUTS[seed % 2]
    ensemble = Ensemble(rng, count, targets, sets=seed % 4 < 2)
    # Whole numbers: onnxruntime tests 2.5 for membership as if it were 2.
    x = features(rng, count, dtype, missing=True).round()
    transform = rng.choice((0, 3, 4) if targets > 1 else (0, 4))
    options = ensemble.options(dtype) | {"aggregate_function": rng.randrange(4), "post_transform": transform}
    compare("TreeEnsemble", [x], opset=5, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_ensemble_as_the_standard_says(dtype: torch.dtype) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        ensemble = Ensemble(rng, 3, 2, sets=True)
        x = features(rng, 3, dtype, missing=True)
        x = torch.where(torch.rand(x.shape) < 0.5, x, x.round())
        expected = np.zeros((len(x), 2), array(x).dtype)
        for row, reached in enumerate(ensemble.votes(x)):
            for target, weight in reached:
                expected[row, target] += np.asarray(weight, expected.dtype)
        (found,) = dialect("TreeEnsemble", [x], opset=5, **ensemble.options(dtype))
        assert found.dtype == expected.dtype
        # A handful of sums in float16, against one rounding.
        tolerance = 4e-3 if dtype == torch.float16 else 1e-6
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_ensemble_numbers_its_transforms_as_the_standard_does() -> None:
    # onnxruntime takes 1 for LOGISTIC and 2 for SOFTMAX.
    ensemble = Ensemble(random.Random(1), 2, 3, sets=False)
    x = features(random.Random(2), 2, torch.float32)
    (plain,) = dialect("TreeEnsemble", [x], opset=5, **ensemble.options(torch.float32))
    (softmax,) = dialect("TreeEnsemble", [x], opset=5, post_transform=1, **ensemble.options(torch.float32))
    (logistic,) = dialect("TreeEnsemble", [x], opset=5, post_transform=2, **ensemble.options(torch.float32))
    exponents = np.exp(plain)
    np.testing.assert_allclose(softmax, exponents / exponents.sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(logistic, 1 / (1 + np.exp(-plain)), rtol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"aggregate_function": 4}, "aggregate_function up to 3 .* found 4 and 0"),
        ({"post_transform": -1}, "post_transform up to 4 .* found 1 and -1"),
        ({"leaf_targetids": [0], "leaf_weights": torch.ones(1)}, "expected children among"),
        ({"membership_values": None}, "membership_values of"),
    ],
)
def test_a_corrupt_ensemble_says_so(changed: dict[str, Any], message: str) -> None:
    options = Ensemble(random.Random(8), 2, 1, sets=True).options(torch.float32)
    assert (options["nodes_modes"] == 6).sum() > 1
    with pytest.raises(GraphOptError, match=message):
        dialect("TreeEnsemble", [torch.zeros(1, 2)], opset=5, **options | changed)


REGRESSOR = {"target_treeids": [0, 0], "target_nodeids": [1, 2], "target_ids": [0, 0], "target_weights": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"nodes_truenodeids": [0, 0, 0]}, "or a cycle"),
        ({"nodes_truenodeids": [5, 0, 0]}, "expected a node 5 in tree 0, found none"),
        ({"nodes_falsenodeids": [-1, 0, 0]}, "expected a node -1 in tree 0"),
        ({"target_nodeids": [1, 7]}, "expected a node 7 in tree 0"),
        ({"nodes_featureids": [1, 0, 0]}, "expected trees of 1 features, found number 1"),
        ({"target_ids": [0, 1]}, "expected trees of 1 targets, found number 1"),
        ({"nodes_modes": ["BRANCH_LEQ", "LEAF", "BRANCH"]}, "found 'BRANCH'"),
        ({"nodes_values": [0.0]}, "attributes of one length"),
        ({"target_weights": [0.0]}, "attributes of one length"),
        ({"aggregate_function": "MEDIAN"}, "found 'MEDIAN'"),
    ],
)
def test_corrupt_trees_say_so(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphOptError, match=message):
        dialect("TreeEnsembleRegressor", [TWO_ROWS], **STUMP | REGRESSOR | changed)


# Of the PROBIT of one score onnxruntime mixes up the rows.
LINEAR = [pair for pair in itertools.product((1, 2, 3), TRANSFORMS) if pair != (1, "PROBIT")]


@pytest.mark.parametrize(("rows", "transform"), LINEAR)
@pytest.mark.parametrize("dtype", INPUTS)
def test_linear_classifier(rows: int, transform: str, dtype: torch.dtype) -> None:
    rng = random.Random(rows)
    x = features(rng, 3, dtype)
    options = {"coefficients": floats(rng, 3 * rows), "intercepts": floats(rng, rows), "post_transform": transform}
    for given in (labels(rng, max(2, rows)), labels(rng, max(2, rows))):
        compare("LinearClassifier", [x], 2, **options, **given)
    compare("LinearClassifier", [x[0]], 2, **options, **labels(rng, max(2, rows)))
    if rows == 1:
        compare("LinearClassifier", [x], 2, **options)


def test_the_probit_of_one_score_is_antisymmetric() -> None:
    x = torch.tensor([[0.3], [0.9]])
    options = {"coefficients": [1.0], "intercepts": [0.0], "classlabels_ints": [0, 1], "post_transform": "PROBIT"}
    _, scores = dialect("LinearClassifier", [x], **options)
    np.testing.assert_allclose(scores[:, 0], -scores[:, 1], rtol=1e-5)
    # The approximation is within a few thousandths of the inverse of the normal distribution function.
    np.testing.assert_allclose(scores[:, 1], torch.special.ndtri(x[:, 0]), atol=5e-3)


@pytest.mark.parametrize("seed", range(12))
def test_linear_regressor(seed: int) -> None:
    rng = random.Random(seed)
    targets = 1 + seed % 3
    options: dict[str, Any] = {"coefficients": floats(rng, 3 * targets), "targets": targets}
    if seed % 2:
        options["intercepts"] = floats(rng, targets)
    transform = rng.choice(TRANSFORMS if targets > 1 else ("NONE", "PROBIT"))
    compare("LinearRegressor", [features(rng, 3, torch.float32)], post_transform=transform, **options)


KERNELS = ("LINEAR", "POLY", "RBF", "SIGMOID")


@pytest.mark.parametrize("seed", range(60))
def test_svm_classifier(seed: int) -> None:
    rng = random.Random(seed)
    count, classes, probabilities = rng.randint(1, 4), 2 + seed % 3, seed % 2
    vectors = [rng.randint(1, 4) for _ in range(classes)]
    pairs = classes * (classes - 1) // 2
    coefficients = floats(rng, sum(vectors) * (classes - 1))
    options: dict[str, Any] = {
        "coefficients": [abs(value) for value in coefficients] if rng.random() < 0.3 else coefficients,
        "kernel_params": [0.3, 0.5, rng.choice([2.0, 3.0])],
        "kernel_type": KERNELS[seed % 4],
        # Of the PROBIT of two scores without probabilities onnxruntime computes one only.
        "post_transform": rng.choice(TRANSFORMS[:4] if classes == 2 and not probabilities else TRANSFORMS),
        "rho": floats(rng, pairs),
        "support_vectors": floats(rng, sum(vectors) * count),
        "vectors_per_class": vectors,
    }
    if probabilities:
        options |= {"prob_a": [rng.gauss(-1, 0.5) for _ in range(pairs)], "prob_b": floats(rng, pairs)}
    compare("SVMClassifier", [features(rng, count, INPUTS[seed % 4])], 2, **options, **labels(rng, classes))


@pytest.mark.parametrize("seed", range(20))
def test_svm_classifier_without_vectors(seed: int) -> None:
    rng = random.Random(seed)
    classes = 2 + seed % 2
    coefficients = floats(rng, 3 * classes)
    options: dict[str, Any] = {"coefficients": [abs(c) for c in coefficients] if seed % 3 else coefficients}
    options |= {"rho": floats(rng, 1), "kernel_params": [0.0] * 3, "post_transform": TRANSFORMS[seed % 5]}
    compare("SVMClassifier", [features(rng, 3, INPUTS[seed % 4])], 2, **options, **labels(rng, classes))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("one_class", [0, 1])
def test_svm_regressor(kernel: str, one_class: int) -> None:
    rng = random.Random(4)
    options = {"coefficients": floats(rng, 5), "rho": floats(rng, 1), "kernel_params": [0.3, 0.5, 3.0]}
    options |= {"n_supports": 5, "support_vectors": floats(rng, 15), "kernel_type": kernel, "one_class": one_class}
    compare("SVMRegressor", [features(rng, 3, torch.float32)], **options)
    linear = {"coefficients": floats(rng, 3), "rho": [0.2], "kernel_params": [0.0] * 3, "n_supports": 0}
    compare("SVMRegressor", [features(rng, 3, torch.float32)], one_class=one_class, **linear)


@pytest.mark.parametrize("transform", ["LOGISTIC", "SOFTMAX", "SOFTMAX_ZERO"])
def test_transforms_of_a_single_score_are_left_to_onnxruntime(transform: str) -> None:
    svm = {"coefficients": [1.0], "rho": [0.0], "n_supports": 0}
    for name, options in (
        ("LinearRegressor", {"coefficients": [1.0]}),
        ("TreeEnsembleRegressor", STUMP | REGRESSOR),
        ("SVMRegressor", svm),
    ):
        with pytest.raises(NotImplementedError, match="single score"):
            dialect(name, [TWO_ROWS], post_transform=transform, **options)


def test_an_unknown_transform_says_so() -> None:
    with pytest.raises(GraphOptError, match="found 'CUBE'"):
        dialect("LinearRegressor", [TWO_ROWS], coefficients=[1.0, 2.0], targets=2, post_transform="CUBE")


X = torch.tensor([[-3.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -4.0]])


@pytest.mark.parametrize("dtype", INPUTS)
def test_scaler_and_normalizer(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    compare("Scaler", [x], offset=[0.1, 2.0, 3.0], scale=[2.0, 0.3, 4.0])
    compare("Scaler", [x], offset=[0.1], scale=[2.3])
    for norm in ("MAX", "L1", "L2"):
        compare("Normalizer", [x], norm=norm)
        compare("Normalizer", [x[0]], norm=norm)


def test_imputer() -> None:
    x = torch.tensor([[1.0, float("nan")], [0.0, 2.0]])
    compare("Imputer", [x], imputed_value_floats=[7.0, 8.0], replaced_value_float=float("nan"))
    compare("Imputer", [x], imputed_value_floats=[7.5], replaced_value_float=2.0)
    compare("Imputer", [x], imputed_value_floats=[7.0, 8.0])
    compare("Imputer", [torch.tensor([[1, 2], [3, 1]])], imputed_value_int64s=[7, 8], replaced_value_int64=1)
    # Types without a kernel in onnxruntime.
    found = dialect("Imputer", [x.double()], imputed_value_floats=[7.0], replaced_value_float=1.0)
    np.testing.assert_array_equal(found[0], np.array([[7.0, np.nan], [0.0, 2.0]]))
    assert dialect("Imputer", [torch.tensor([1, 2]).int()], imputed_value_int64s=[5])[0].dtype == np.int32
    with pytest.raises(GraphOptError, match="one for each of 2 features, found 3"):
        dialect("Imputer", [x], imputed_value_floats=[1.0, 2.0, 3.0])


def test_binarizer_extractor_and_vectorizer() -> None:
    compare("Binarizer", [X], threshold=0.5)
    assert dialect("Binarizer", [torch.tensor([1, 3])], threshold=1.5)[0].tolist() == [0, 1]
    for x in (X, X[0], X.to(torch.int64), torch.arange(12.0).reshape(2, 2, 3), np.array(["a", "b", "c"], dtype=object)):
        compare("ArrayFeatureExtractor", [x, torch.tensor([2, 0])])
    compare("ArrayFeatureExtractor", [X, torch.tensor([[2, 0]])])
    compare("FeatureVectorizer", [X, X[:, :2]], inputdimensions=[3, 2])
    compare("FeatureVectorizer", [X, X[:, :2]], inputdimensions=[2, 4])
    compare("FeatureVectorizer", [X[0].to(torch.int64), torch.tensor([4, 5])], inputdimensions=[3, 2])


def words(*values: str) -> np.ndarray:
    return np.array(values, dtype=object)


def test_one_hot() -> None:
    compare("OneHotEncoder", [torch.tensor([[1, 5], [2, 3]])], cats_int64s=[1, 2, 3])
    compare("OneHotEncoder", [torch.tensor([1.7, -2.9, 2.0])], cats_int64s=[1, 2, -2])
    compare("OneHotEncoder", [torch.tensor([1, 1])], cats_int64s=[1, 2, 1])
    compare("OneHotEncoder", [words("a", "z", "b").reshape(3, 1)], cats_strings=["a", "b"])
    found = dialect("OneHotEncoder", [torch.tensor([2, 9]).int()], cats_int64s=[1, 2])
    assert found[0].tolist() == [[0, 1], [0, 0]]
    with pytest.raises(GraphOptError, match="categories of OneHotEncoder"):
        dialect("OneHotEncoder", [words("z")], cats_strings=["a"], zeros=0)


def test_category_mapper() -> None:
    lists = {"cats_strings": ["a", "b", "a"], "cats_int64s": [4, 5, 6]}
    found = dialect("CategoryMapper", [words("b", "z")], **lists, default_int64=-7)
    assert (
        found[0].tolist() == by_onnxruntime("CategoryMapper", [words("b", "z")], **lists, default_int64=-7)[0].tolist()
    )
    compare("CategoryMapper", [torch.tensor([4, 9])], **lists, default_string="?")


NAN = float("nan")
ENCODERS = [
    (1, words("a", "z", "b"), {"classes_strings": ["a", "b"], "default_int64": -3}),
    (1, torch.tensor([0, 1, 2, -1]), {"classes_strings": ["a", "b"], "default_string": "?"}),
    (2, torch.tensor([1.0, -0.0, 2.0]), {"keys_floats": [1.0, 0.0], "values_strings": ["one", "zero"]}),
    (2, torch.tensor([1, 1, 3]), {"keys_int64s": [1, 1], "values_int64s": [5, 7]}),
    (2, torch.tensor([1, 1, 3]), {"keys_int64s": [1, 1], "values_floats": [0.5, 0.7]}),
    (2, words("a", "q"), {"keys_strings": ["a", "b"], "values_floats": [1.0, 2.0], "default_float": 0.25}),
    (4, torch.tensor([1.0, NAN, 2.0]), {"keys_floats": [1.0, NAN], "values_strings": ["one", "nan"]}),
    (4, torch.tensor([0.1, 0.3]), {"keys_floats": [0.1, 0.2], "values_int64s": [1, 2]}),
    (4, words("a", "q").reshape(1, 2), {"keys_strings": ["a", "b"], "values_strings": ["x", "y"]}),
    (
        4,
        torch.tensor([1.0, NAN, 2.5], dtype=torch.float64),
        {
            "keys_tensor": torch.tensor([1.0, NAN], dtype=torch.float64),
            "values_tensor": torch.tensor([7.0, 8.0], dtype=torch.float64),
        },
    ),
    (4, words("a", "q"), {"keys_tensor": words("a", "b"), "values_tensor": words("x", "y")}),
]


@pytest.mark.parametrize(("opset", "x", "options"), ENCODERS)
def test_label_encoder(opset: int, x: Any, options: dict[str, Any]) -> None:
    compare("LabelEncoder", [x], opset=opset, **options)


def test_label_encoder_where_onnxruntime_departs_from_the_standard() -> None:
    # NaN is a key in version 2, of equal keys the last one counts in version 4, and there are more types.
    nan = dialect("LabelEncoder", [torch.tensor([NAN])], 2, keys_floats=[NAN], values_int64s=[4])
    assert nan[0].tolist() == [4]
    twice = dialect("LabelEncoder", [torch.tensor([1, 2])], 4, keys_int64s=[1, 1], values_int64s=[5, 7])
    assert twice[0].tolist() == [7, -1]
    small = torch.tensor([1, 3], dtype=torch.int16)
    tensors = {"keys_tensor": torch.tensor([1, 2], dtype=torch.int16), "values_tensor": torch.tensor([7, 8]).int()}
    found = dialect("LabelEncoder", [small], 4, **tensors, default_tensor=torch.tensor([9]).int())
    assert (found[0].dtype, found[0].tolist()) == (np.int32, [7, 9])


def map_of(key: int, value: int) -> onnx.TypeProto:
    return helper.make_map_type_proto(key, helper.make_tensor_type_proto(value, []))


def test_zip_map() -> None:
    for x, options in (
        (X, {"classlabels_strings": ["a", "b", "c"]}),
        (X[0], {"classlabels_int64s": [3, 4, 5]}),
    ):
        found = lookup(DOMAIN, "ZipMap", 1).function(x, **options)
        assert found == by_onnxruntime("ZipMap", [x], **options)[0]
    with pytest.raises(GraphOptError, match="each of 2 labels of ZipMap, found 3"):
        dialect("ZipMap", [X], classlabels_int64s=[1, 2])


def test_dict_vectorizer() -> None:
    x, options = {"a": 4.0, "c": 8.0}, {"string_vocabulary": ["a", "c", "b", "z"]}
    expected = by_onnxruntime("DictVectorizer", [x], types=[map_of(TensorProto.STRING, TensorProto.FLOAT)], **options)
    (found,) = dialect("DictVectorizer", [x], **options)
    assert (found.dtype, found.tolist()) == (expected[0].dtype, expected[0].tolist())
    (counts,) = dialect("DictVectorizer", [{1: 5, 2: 6}], int64_vocabulary=[2, 9, 1])
    assert (counts.dtype, counts.tolist()) == (np.int64, [[6, 0, 5]])
    assert dialect("DictVectorizer", [{1: np.float64(2)}], int64_vocabulary=[1])[0].dtype == np.float64
    assert dialect("DictVectorizer", [{1: "u"}], int64_vocabulary=[1, 2])[0].tolist() == [["u", ""]]


@pytest.mark.parametrize("form", ["DENSE", "SPARSE"])
@pytest.mark.parametrize("target", ["TO_FLOAT", "TO_INT64", "TO_STRING"])
def test_cast_map(form: str, target: str) -> None:
    x, options = {3: 1.5, 1: -2.75}, {"cast_to": target, "map_form": form, "max_map": 5}
    expected = by_onnxruntime("CastMap", [x], types=[map_of(TensorProto.INT64, TensorProto.FLOAT)], **options)
    (found,) = dialect("CastMap", [x], **options)
    assert (found.dtype, found.tolist()) == (expected[0].dtype, expected[0].tolist())


def test_cast_map_of_strings() -> None:
    x = {3: "15", 1: "-2"}
    assert dialect("CastMap", [x], cast_to="TO_INT64")[0].tolist() == [[-2, 15]]
    assert dialect("CastMap", [x], map_form="SPARSE", max_map=4)[0].tolist() == [[0, -2, 0, 15]]
    assert dialect("CastMap", [x], cast_to="TO_STRING")[0].tolist() == [["-2", "15"]]
    with pytest.raises(GraphOptError, match="found 'TO_BOOL'"):
        dialect("CastMap", [x], cast_to="TO_BOOL")
    with pytest.raises(GraphOptError, match="keys from 0 on"):
        dialect("CastMap", [{-1: 1.0}], map_form="SPARSE", max_map=2)


VECTORS = {"support_vectors": [0.1 * i for i in range(6)], "rho": [0.5]}
RBF = VECTORS | {"kernel_type": "RBF", "kernel_params": [0.3, 0.0, 0.0], "coefficients": [1.0, 2.0], "n_supports": 2}
PAIR = VECTORS | {"coefficients": [1.0, -2.0], "vectors_per_class": [1, 1], "prob_a": [-1.0], "prob_b": [0.5]}
NUMERIC = [
    ("Scaler", {"offset": [1.0], "scale": [2.0]}, 1),
    *(("Normalizer", {"norm": norm}, 1) for norm in ("MAX", "L1", "L2")),
    ("LinearRegressor", {"coefficients": [0.5, 1.0, -1.0]}, 1),
    ("LinearClassifier", {"coefficients": [0.5, 1.0, -1.0], "classlabels_ints": [0, 1]}, 2),
    ("SVMRegressor", RBF, 1),
    ("SVMClassifier", PAIR | {"classlabels_ints": [3, 4]}, 2),
]
TREES = [
    ("TreeEnsembleRegressor", STUMP | REGRESSOR, 1),
    (
        "TreeEnsembleClassifier",
        STUMP
        | {"class_treeids": [0, 0], "class_nodeids": [1, 2], "class_ids": [0, 0], "class_weights": [0.1, 0.9]}
        | {"classlabels_int64s": [4, 5]},
        2,
    ),
]
OTHERS = [
    ("Binarizer", {}, 1),
    ("Imputer", {"imputed_value_floats": [1.0]}, 1),
    ("OneHotEncoder", {"cats_int64s": [1, 2], "zeros": 0}, 1),
    ("LabelEncoder", {"keys_floats": [1.0, NAN], "values_int64s": [3, 4]}, 1),
]


@pytest.mark.parametrize(("name", "options", "outputs"), [*NUMERIC, *TREES, *OTHERS])
def test_shapes_without_data(name: str, options: dict[str, Any], outputs: int) -> None:
    function = lookup(DOMAIN, name, 3).function
    x = torch.ones(4, 3)
    real, shapes = function(x, **options), function(x.to("meta"), **options)
    pairs = zip(real, shapes, strict=True) if outputs > 1 else [(real, shapes)]
    for one, other in pairs:
        assert (one.shape, one.dtype, other.device.type) == (other.shape, other.dtype, "meta")


@pytest.mark.parametrize(("name", "options", "outputs"), NUMERIC)
def test_gradients(name: str, options: dict[str, Any], outputs: int) -> None:
    function = lookup(DOMAIN, name, 3).function
    # Nothing near a kink: zero, or two largest elements in a row.
    x = torch.tensor([[0.5, 1.0, 2.0], [1.5, -1.0, 0.7]], dtype=torch.float64, requires_grad=True)

    def last(x: Tensor) -> Tensor:
        result = function(x, **options)
        return result if outputs == 1 else result[1]

    # Their outputs are float32, so the step is wide, and with it the error of the differences: its square.
    assert torch.autograd.gradcheck(last, x, eps=1e-2, atol=1e-3, rtol=1e-3)


ENTRIES = [entry for entry in table() if entry.domain == DOMAIN]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.name}-{entry.since}")
def test_signature_is_that_of_the_standard(entry: Operator) -> None:
    history = [s for s in onnx.defs.get_all_schemas_with_history() if (s.domain, s.name) == (DOMAIN, entry.name)]
    later = [e.since for e in ENTRIES if e.name == entry.name and e.since > entry.since]
    # The deprecated last versions of the tree operators keep the meaning of the version before.
    schema = max((s for s in history if s.since_version < min(later, default=99)), key=lambda s: s.since_version)
    parameters = inspect.signature(entry.function).parameters.values()
    inputs = [p for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert len(inputs) == len(schema.inputs)
    attributes = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert set(attributes) == set(schema.attributes)
    for name, attribute in schema.attributes.items():
        if attribute.default_value.type:
            standard = helper.get_attribute_value(attribute.default_value)
            assert attributes[name] == (standard.decode() if isinstance(standard, bytes) else standard)
        elif attribute.required:
            assert attributes[name] is inspect.Parameter.empty


def test_every_operator_is_there() -> None:
    schemas = onnx.defs.get_all_schemas_with_history()
    assert {entry.name for entry in ENTRIES} == {s.name for s in schemas if s.domain == DOMAIN}
