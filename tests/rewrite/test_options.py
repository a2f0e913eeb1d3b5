"""A pass as text: what is typed is what is built, and every slip is named."""

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt import GraphOptError
from graphopt.passes.attention.linearize import Linearize
from graphopt.rewrite import describe, parse
from graphopt.rewrite.options import _one, parse_all, read_pipeline, spell


def test_defaults_and_values():
    assert parse("linearize") == Linearize()
    assert parse(" linearize { method = hedgehog , fit_steps=7, learning_rate=1e-3 } ") == Linearize(
        method="hedgehog", fit_steps=7, learning_rate=1e-3
    )
    assert parse("linearize{fit-steps=7}") == Linearize(fit_steps=7)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("linearise", "did you mean 'linearize'"),
        ("nothing_like_it", "no pass is called"),
        ("linearize{fit_step=3}", "did you mean 'fit_steps'"),
        ("linearize{fit_steps=many}", "expected fit_steps to be int, got 'many'"),
        ("linearize{method=magic}", r"expected method to be auto\|lolcats\|liger\|hedgehog.*, got 'magic'"),
        ("linearize{fit_steps}", "expected option=value"),
        ("linearize{fit_steps=1,fit_steps=2}", "twice"),
        ("linearize{fit_steps=-1}", "at least 0"),
        ("linearize{", "expected a pass such as"),
        ("", "expected a pass such as"),
    ],
)
def test_slips(text, match):
    with pytest.raises(GraphOptError, match=match) as caught:
        parse(text)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("choice", [0, 3, "none"])
def test_a_choice_may_be_a_number_and_zero(choice):
    assert _one(Literal[0, 3, "none"], str(choice)) == choice
    with pytest.raises(ValueError):  # noqa: PT011  # it has no text: the caller writes one
        _one(Literal[0, 3, "none"], "7")


@given(
    st.integers(0, 10**6),
    st.floats(1e-6, 1.0),
    st.sampled_from(["softmax", "exp"]),
    st.integers(0, 512),
)
def test_spelling_round_trip(steps, rate, feature_map, features):
    item = Linearize(fit_steps=steps, learning_rate=rate, feature_map=feature_map, features=features)
    assert parse(spell(item)) == item


def test_every_option_is_documented():
    for option in describe(Linearize):
        assert option.help, option.name
        assert option.type
    assert {o.name: o.default for o in describe(Linearize)}["fit_steps"] == "200"


def test_pipelines(tmp_path):
    assert parse_all(["linearize", Linearize(fit_steps=1)]) == [Linearize(), Linearize(fit_steps=1)]
    path = tmp_path / "p.toml"
    path.write_text('passes = ["linearize{fit_steps=3}"]\n')
    assert parse_all(read_pipeline(path)) == [Linearize(fit_steps=3)]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("passes = []", "expected passes ="),
        ("passes = 3", "expected passes ="),
        ("passes", "does not parse"),
        (None, "cannot be read"),
    ],
)
def test_bad_pipelines(tmp_path, content, match):
    path = tmp_path / "p.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(GraphOptError, match=match):
        read_pipeline(path)
