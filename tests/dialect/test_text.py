"""Operators on strings, and general operators on string tensors, against onnxruntime."""

import random
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import Tensor

from graphopt.dialect import lookup
from graphopt.dialect.strings import accepting_strings
from graphopt.errors import GraphOptError

OPSET = 22
# The only locale with letters beyond ASCII that every C library here has.
LOCALE = "C.utf8"


def words(*shape: int) -> np.ndarray:
    flat = np.empty(int(np.prod(shape)), dtype=object)
    flat[:] = [f"w{i % 7}" if i % 5 else "" for i in range(flat.size)]
    return flat.reshape(shape)


def text(*values: str) -> np.ndarray:
    return np.array(values, dtype=object)


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


def array(value: Any) -> np.ndarray:
    return value.numpy() if isinstance(value, Tensor) else value


def by_onnxruntime(name: str, inputs: list[Any], outputs: int = 1, opset: int = OPSET, **options: Any) -> list[Any]:
    names, results = [f"x{i}" for i in range(len(inputs))], [f"y{i}" for i in range(outputs)]
    feeds = {n: array(x) for n, x in zip(names, inputs, strict=True)}
    codes = {n: helper.np_dtype_to_tensor_dtype(x.dtype) for n, x in feeds.items()}
    declared = [helper.make_tensor_value_info(n, codes[n], x.shape) for n, x in feeds.items()]
    made = helper.make_node(name, names, results, **options)
    graph = helper.make_graph([made], "one", declared, [onnx.ValueInfoProto(name=n) for n in results])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, ["CPUExecutionProvider"])
    return session.run(None, feeds)


def dialect(name: str, inputs: list[Any], outputs: int = 1, opset: int = OPSET, **options: Any) -> list[Any]:
    entry = lookup("", name, opset)
    counted = {"outputs": outputs} if entry.counted else {}
    result = accepting_strings(name, entry.function)(*inputs, **options, **counted)
    return [array(x) for x in (result if isinstance(result, tuple) else (result,))]


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        np.testing.assert_array_equal(mine, theirs)
        assert mine.dtype != object or all(isinstance(item, str) for item in mine.reshape(-1))


@pytest.mark.parametrize("shapes", [((2, 3), (3,)), ((2, 1), (1, 4)), ((), (2,)), ((), ()), ((0, 2), (2,))])
def test_concat(shapes: tuple[tuple[int, ...], ...]) -> None:
    x, y = (words(*shape) for shape in shapes)
    assert_same(dialect("StringConcat", [x, y]), by_onnxruntime("StringConcat", [x, y]))


@pytest.mark.parametrize(
    ("x", "options"),
    [
        (text("a,b,,c", ",a", "a", ","), {"delimiter": ","}),
        (text("a,b,,c", ",a", "a"), {"delimiter": ",", "maxsplit": 1}),
        (text("aXXbXXc", "XXX"), {"delimiter": "XX"}),
        (text("a b", "c"), {"delimiter": ",", "maxsplit": 0}),
        (text("  a b  c ", "", " "), {}),
        (text("  a b  c ", "d"), {"maxsplit": 1}),
        (text("  a b  c "), {"maxsplit": 0, "delimiter": ""}),
        (text("a b", "c", "d e f", "").reshape(2, 2), {}),
        (np.array("a b", dtype=object), {}),
        (np.empty((0, 2), dtype=object), {"delimiter": ","}),
    ],
)
def test_split(x: np.ndarray, options: dict[str, Any]) -> None:
    assert_same(dialect("StringSplit", [x], 2, **options), by_onnxruntime("StringSplit", [x], 2, **options))


def test_split_where_onnxruntime_departs_from_the_standard() -> None:
    # An empty string between delimiters is a part, and any whitespace separates.
    parts, counts = dialect("StringSplit", [text("", "a,")], 2, delimiter=",")
    assert (parts.tolist(), counts.tolist()) == ([["", ""], ["a", ""]], [1, 2])
    parts, counts = dialect("StringSplit", [text("a\tb\n c")], 2)
    assert (parts.tolist(), counts.tolist()) == ([["a", "b", "c"]], [3])


@pytest.mark.parametrize("change", ["NONE", "LOWER", "UPPER"])
@pytest.mark.parametrize("sensitive", [0, 1])
@pytest.mark.parametrize("stops", [None, ["MONDAY", "É"], ["Monday", "été"]])
@pytest.mark.parametrize("shape", [(4,), (1, 4)])
def test_normalizer(change: str, sensitive: int, stops: list[str] | None, shape: tuple[int, ...]) -> None:
    x = text("Monday", "ÉTÉ", "straße", "É").reshape(shape)
    options: dict[str, Any] = {"case_change_action": change, "is_case_sensitive": sensitive, "locale": LOCALE}
    options |= {} if stops is None else {"stopwords": stops}
    assert_same(dialect("StringNormalizer", [x], **options), by_onnxruntime("StringNormalizer", [x], **options))


@pytest.mark.parametrize("shape", [(2,), (1, 2)])
def test_normalizer_leaves_one_empty_string(shape: tuple[int, ...]) -> None:
    x = text("a", "A").reshape(shape)
    options = {"stopwords": ["a"], "locale": LOCALE}
    assert_same(dialect("StringNormalizer", [x], **options), by_onnxruntime("StringNormalizer", [x], **options))


def test_normalizer_refuses() -> None:
    with pytest.raises(GraphOptError, match=r"shape \[C\] or \[1, C\] for StringNormalizer, found \[2, 1\]"):
        dialect("StringNormalizer", [words(2, 1)])
    with pytest.raises(GraphOptError, match="found 'TITLE'"):
        dialect("StringNormalizer", [words(2)], case_change_action="TITLE")
    for locale in ("tr_TR.UTF-8", "C"):
        with pytest.raises(NotImplementedError, match="locale"):
            dialect("StringNormalizer", [words(2)], locale=locale)


SUBJECTS = text(
    *("", "a", "b", "A", "k", "K", "\u212a", "\u017f", "é", "É", "\u0131", "İ", "-", "_", "5", "\u0663", "aa", "ab"),
    *("abb", "aB", "AB", "axb", "a-b", "a\vb", " ", "\n", "a\n", "a\nb", "a b", "a.b", "{2}", "a{2", "a{,2}", "xxxx"),
    *("x@gmail.com", "ς", "Σ", "\x00", "😀"),
)
PATTERNS = [
    *("", "a", ".", "(?s).", "a|b", "a|", "(|a)", "()", "a*", "a+b", "a?", "ab{2}", "x{4}", "x{2,}", "x{0,3}", "a*?"),
    *("[ab]+", "[^a]", "[]a]", "[a-c-e]+", "[-a]", r"[\d\-x]", r"[\D]", "[[:alpha:]]+", "[[:^alpha:]]", r"[\x{e9}]"),
    *(r"\d", r"\D", r"\w+", r"\W", r"\s", r"a\sb", r"\S", r"\x61", r"\x{212a}", r"\101", r"\0", r"\-", r"\n", r"\v"),
    *("a$", "^a", r"\Aa\z", "(?m)a$\nb", "(?m:^a$)\n(?m:^b)", r"\ba\b", r"a\bb", r"a\Bb", r"\b", r"\B", "^*", "$a"),
    *(
        "(?i)k",
        "(?i)s",
        "(?i)é",
        "(?i)i",
        "(?i)[k-s]",
        "(?i)[^k]",
        r"(?i)\w",
        "(?i)σ",
        "a(?i)b",
        "(a(?i)b)b",
        "(?i:a)b",
    ),
    *("(?P<n>a)b", "(?<n>a)b", "(?:ab)+", "(?U)a+", r"\Qa.b\E", r"\Qab\E+", "a{2", "a{,2}", "a{01}", "(?-i:a)", "]"),
    *(r"(\W|^)[\w.\-]{0,25}@(yahoo|gmail)\.com(\W|$)", "(a|b|-)*", "((a|aa)*b?)+", "(?i)", "(?is-m:A.b)"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_regular_expressions(pattern: str) -> None:
    assert_same(dialect("RegexFullMatch", [SUBJECTS], pattern=pattern),
                by_onnxruntime("RegexFullMatch", [SUBJECTS], pattern=pattern))  # fmt: skip


def random_pattern(rng: random.Random, depth: int) -> str:
    atoms = [
        "a",
        "b",
        "\\.",
        "[ab]",
        "[^a]",
        "\\d",
        "\\w",
        "\\s",
        ".",
        "^",
        "$",
        "\\b",
        "\\B",
        "(?i:a)",
        "\\W",
        "é",
        "\n",
    ]
    kind = rng.random()
    if depth == 0 or kind < 0.3:
        return rng.choice(atoms)
    one, other = (random_pattern(rng, depth - 1) for _ in range(2))
    if kind < 0.5:
        return one + other
    return (
        f"(?:{one}|{other})" if kind < 0.7 else f"(?:{one})" + rng.choice(["*", "+", "?", "{2}", "{1,3}", "{2,}", "*?"])
    )


def test_random_regular_expressions() -> None:
    rng = random.Random(0)
    for _ in range(200):
        pattern = random_pattern(rng, 4)
        x = text(*("".join(rng.choices("abAB1.-\n é_", k=rng.randrange(6))) for _ in range(30)), "")
        found, expected = (run("RegexFullMatch", [x], pattern=pattern)[0] for run in (dialect, by_onnxruntime))
        assert found.tolist() == expected.tolist(), pattern


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", r"\w*\w*\w*\w*\w*!", "(a?){20}a{20}b"])
def test_a_match_takes_linear_time(pattern: str) -> None:
    # Backtracking would take longer than the universe has been there.
    assert dialect("RegexFullMatch", [text("a" * 20_000)], pattern=pattern)[0].tolist() == [False]


@pytest.mark.parametrize(
    "pattern",
    [r"(a)\1", "a++", "a**", "*", "{2}", r"\Z", r"\y", r"\8", r"\x4", "[a", "(a", "a)", "[z-a]", r"[a-\d]", "a{1001}",
     "a{3,2}", "[[:no:]]", r"\pL", r"\C", "(?=a)", "(?#a)", "a\\", "(?P<n-1>a)", r"\x{110000}", "(?i)[é]",
     "(((x{200}){200}){200})", "(((){1000}){1000}){1000}", "(" * 200 + ")" * 200],
)  # fmt: skip
def test_other_regular_expressions_are_left_to_onnxruntime(pattern: str) -> None:
    with pytest.raises(NotImplementedError, match="RegexFullMatch"):
        dialect("RegexFullMatch", [text("a")], pattern=pattern)


def test_regular_expressions_on_bytes_that_are_no_text() -> None:
    with pytest.raises(NotImplementedError, match="UTF-8"):
        dialect("RegexFullMatch", [text("\udc80")], pattern=".")


def random_vectorizer(seed: int) -> tuple[list[Any], dict[str, Any]]:
    rng = random.Random(seed)
    shortest = rng.randint(1, 3)
    pool: list[int] = []
    starts, count = [], 0
    for length in (1, 2, 3):
        starts.append(len(pool))
        grams = {tuple(rng.choices(range(4), k=length)) for _ in range(rng.randint(1, 4))}
        pool += [item for gram in sorted(grams) for item in gram]
        count += len(grams)
    indexes = list(range(count))
    rng.shuffle(indexes)
    options: dict[str, Any] = {
        "mode": rng.choice(["TF", "IDF", "TFIDF"]),
        "ngram_counts": starts,
        "ngram_indexes": indexes,
        "min_gram_length": shortest,
        "max_gram_length": rng.randint(shortest, 3),
        "max_skip_count": rng.randint(0, 4),
    }
    if rng.random() < 0.7:
        options["weights"] = [rng.randrange(16) / 8 for _ in range(count)]
    shape = rng.choice([(3, 6), (1, 9), (7,), (1,)])
    x = np.array(rng.choices(range(5), k=int(np.prod(shape)))).reshape(shape)
    if rng.random() < 0.5:
        options["pool_strings"] = [str(item) for item in pool]
        return [np.vectorize(str, otypes=[object])(x)], options
    options["pool_int64s"] = pool
    return [torch.from_numpy(x).to(rng.choice([torch.int32, torch.int64]))], options


@pytest.mark.parametrize("seed", range(60))
def test_n_grams(seed: int) -> None:
    inputs, options = random_vectorizer(seed)
    found, expected = (run("TfIdfVectorizer", inputs, **options)[0] for run in (dialect, by_onnxruntime))
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    # Counts below 2^24 times eighths are exact in float32.
    assert found.tolist() == expected.tolist()


def test_n_grams_that_share_a_coordinate_add_up() -> None:
    # The standard scales the count of each n-gram by its own weight; onnxruntime keeps one weight for both.
    options = {"ngram_counts": [0], "ngram_indexes": [1, 1], "pool_int64s": [3, 4], "weights": [0.5, 2.0]}
    lengths = {"min_gram_length": 1, "max_gram_length": 1, "max_skip_count": 0}
    x = torch.tensor([[3, 4, 4]])
    assert dialect("TfIdfVectorizer", [x], mode="IDF", **options, **lengths)[0].tolist() == [[0.0, 2.5]]
    assert dialect("TfIdfVectorizer", [x], mode="TFIDF", **options, **lengths)[0].tolist() == [[0.0, 4.5]]
    with pytest.raises(GraphOptError, match="each of the 2 n-grams in the pool of TfIdfVectorizer, found 1"):
        dialect("TfIdfVectorizer", [x], mode="TF", **options | {"ngram_indexes": [0]}, **lengths)
    with pytest.raises(GraphOptError, match="coordinates from 0 on"):
        dialect("TfIdfVectorizer", [x], mode="TF", **options | {"ngram_indexes": [0, -1]}, **lengths)


MOVED = [
    ("Concat", [words(2, 3), words(1, 3)], 1, {"axis": 0}),
    ("Gather", [words(5), torch.tensor([[2, -1], [0, 1]])], 1, {}),
    ("GatherElements", [words(3, 2), torch.tensor([[2, -1], [0, 1]])], 1, {}),
    ("GatherND", [words(3, 2), torch.tensor([[2, 1], [0, -1]])], 1, {}),
    ("ScatterND", [words(4, 2), ints(3, 0).reshape(2, 1), text("x", "y", "z", "").reshape(2, 2)], 1, {}),
    ("ScatterElements", [words(3, 2), torch.tensor([[2, 1], [0, -1]]), text("x", "", "z", "u").reshape(2, 2)], 1, {}),
    ("Slice", [words(4, 3), ints(3), ints(-9), ints(0), ints(-1)], 1, {}),
    ("Reshape", [words(4, 3), ints(2, -1)], 1, {}),
    ("Transpose", [words(4, 3)], 1, {}),
    ("Tile", [words(2, 3), ints(2, 1)], 1, {}),
    ("Expand", [words(2, 1), ints(2, 3)], 1, {}),
    ("Split", [words(4, 3), ints(1, 3)], 2, {}),
    ("Compress", [words(4, 3), torch.tensor([True, False, True, True])], 1, {"axis": 0}),
    ("OneHot", [ints(0, 2, -1), torch.tensor(3), text("off", "on")], 1, {}),
    ("Unique", [words(9)], 4, {}),
    ("Unique", [words(9)], 4, {"sorted": 0}),
    ("Unique", [words(4, 2)], 1, {"axis": 0}),
    ("Squeeze", [words(1, 3)], 1, {}),
    ("Unsqueeze", [words(3), ints(0)], 1, {}),
    ("Flatten", [words(2, 3, 2)], 1, {}),
    ("ReverseSequence", [words(4, 2), ints(3, 2)], 1, {}),
    ("Equal", [words(3, 7), words(7)], 1, {}),
    ("Where", [torch.tensor([[True, False]]), words(2, 2), np.array("else", dtype=object)], 1, {}),
    ("Reshape", [words(1), torch.zeros(0, dtype=torch.int64)], 1, {}),
    ("Size", [words(2, 3)], 1, {}),
    ("Shape", [words(2, 3)], 1, {}),
    ("Identity", [words(2, 3)], 1, {}),
]


@pytest.mark.parametrize(("name", "inputs", "outputs", "options"), MOVED)
def test_strings_move_like_numbers(name: str, inputs: list[Any], outputs: int, options: dict[str, Any]) -> None:
    before = [x.copy() if isinstance(x, np.ndarray) else x.clone() for x in inputs]
    assert_same(dialect(name, inputs, outputs, **options), by_onnxruntime(name, inputs, outputs, **options))
    assert all((array(x) == array(kept)).all() for x, kept in zip(inputs, before, strict=True))


def test_what_is_filled_up_is_empty() -> None:
    # No kernel of onnxruntime takes strings here.
    x = text("a", "b", "c", "d").reshape(2, 2)
    padded = [["", "", ""], ["a", "b", ""], ["c", "d", ""]]
    assert dialect("Pad", [x, ints(1, 0, 0, 1)])[0].tolist() == padded
    fill = np.array("-", dtype=object)
    assert dialect("Pad", [x, ints(0, 1, 0, 0), fill])[0].tolist() == [["-", "a", "b"], ["-", "c", "d"]]
    assert dialect("Trilu", [x])[0].tolist() == [["a", "b"], ["", "d"]]
    assert dialect("CenterCropPad", [x, ints(3, 2)])[0].tolist() == [["a", "b"], ["c", "d"], ["", ""]]
    assert dialect("NonZero", [text("", "a", "b")])[0].tolist() == [[1, 2]]


def test_numbers_and_other_operators_are_as_before() -> None:
    function = lookup("", "Reshape", OPSET).function
    wrapped = accepting_strings("Reshape", function)
    assert torch.equal(wrapped(torch.arange(4), ints(2, 2)), torch.arange(4).reshape(2, 2))
    relu = lookup("", "Relu", OPSET).function
    assert accepting_strings("Relu", relu) is relu


def test_trailing_nuls_stay() -> None:
    x = text("a\0", "\0", "")
    assert dialect("Gather", [x, ints(1, 0, 2)])[0].tolist() == ["\0", "a\0", ""]
    assert dialect("StringConcat", [x, x])[0].tolist() == ["a\0a\0", "\0\0", ""]
