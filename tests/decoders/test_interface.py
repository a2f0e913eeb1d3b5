"""Roles of inputs and outputs: by shape and use, by name only where those leave a choice."""

from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import pytest
import torch

import graphopt
from graphopt import GraphOptError
from graphopt.decoders import Interface
from graphopt.decoders.driver import Driver
from graphopt.graph import Graph, ValueSpec
from graphopt.registry import backend


@dataclass
class Specs:
    inputs: list[ValueSpec]
    outputs: list[ValueSpec]


def names(interface: Interface) -> dict[str, object]:
    return {
        "tokens": interface.tokens.name,
        "logits": interface.logits.name,
        "mask": interface.attention_mask and interface.attention_mask.name,
        "positions": interface.position_ids and interface.position_ids.name,
        "caches": [(m.past.name, m.present.name, m.axis) for m in interface.caches],
        "states": [(m.past.name, m.present.name, m.axis) for m in interface.states],
        "others": [spec.name for spec in interface.others],
    }


USUAL = {"tokens": "input_ids", "logits": "logits", "mask": "attention_mask", "positions": "position_ids", "others": []}
CACHE = [("past_key_values.0.key", "present.0.key", 2)]
STATE = [("past_state.0", "present_state.0", None)]


@pytest.mark.parametrize(
    ("memory", "caches", "states"), [("none", [], []), ("cache", CACHE, []), ("state", CACHE, STATE)]
)
def test_graphs_and_sessions(toys: dict[str, Path], memory: str, caches: list, states: list) -> None:
    graph = graphopt.load(toys[memory])
    wanted = USUAL | {"caches": caches, "states": states}
    found = Interface.of(graph)
    assert names(found) == wanted
    assert (found.rows, found.vocabulary, found.batch, found.length) == (11, 11, None, None)
    # What a session declares is enough, with the usual names.
    driver = Driver(backend("onnxruntime").session(graph))
    assert names(driver.interface) == wanted
    assert driver.interface.rows is None


def test_use_decides_whatever_the_names(toy_model, tmp_path: Path) -> None:
    odd = {"tokens": "x0", "mask": "x1", "positions": "ids", "past": "x3", "present": "y3", "logits": "y0"}
    onnx.save(toy_model("cache", names=odd), tmp_path / "odd.onnx")
    found = names(Interface.of(graphopt.load(tmp_path / "odd.onnx")))
    # `ids` indexes a table of 64 rows and `x0` one of 11, as many as there are logits.
    assert found == {
        "tokens": "x0",
        "logits": "y0",
        "mask": "x1",
        "positions": "ids",
        "caches": [("x3", "y3", 2)],
        "states": [],
        "others": [],
    }


def test_llama_with_a_cache(llama: Path) -> None:
    found = Interface.of(graphopt.load(llama))
    pairs = [(f"past_key_values.{i}.{part}", f"present.{i}.{part}", 2) for i in (0, 1) for part in ("key", "value")]
    assert names(found) == USUAL | {"caches": pairs, "states": []}
    assert found.vocabulary == 32000
    assert [m.empty(3).shape for m in found.caches] == [(3, 1, 0, 16)] * 4
    assert found.caches[0].empty(1).dtype == "float16"


def test_names_made_up_by_torch_export(stories: Graph) -> None:
    found = Interface.of(stories)
    assert found.tokens.name == "input_ids"
    assert found.attention_mask is not None
    assert found.position_ids is not None
    # All ten caches have one shape: they pair in order.
    assert [(m.past.name, m.present.name) for m in found.caches] == [
        (f"past_key_values_{i}_{part}", f"output_1_{i}_{part}") for i in range(5) for part in (0, 1)
    ]


def test_what_has_no_role(toys: dict[str, Path]) -> None:
    graph = graphopt.load(toys["cache"])
    extra = Specs([*graph.inputs, ValueSpec("token_type_ids", torch.int64, ("B", "T"))], list(graph.outputs))
    assert [spec.name for spec in Interface.of(extra).others] == ["token_type_ids"]
    image = Specs([*graph.inputs, ValueSpec("image", torch.float32, ("B", 3, 8, 8))], list(graph.outputs))
    assert [spec.name for spec in Interface.of(image).others] == ["image"]
    task = Specs([*graph.inputs, ValueSpec("task", torch.int64, ("B", 1))], list(graph.outputs))
    assert names(Interface.of(task))["mask"] == "attention_mask"
    assert [spec.name for spec in Interface.of(task).others] == ["task"]


def test_not_a_language_model(toys: dict[str, Path], shared_data: Path) -> None:
    graph = graphopt.load(toys["none"])
    without_tokens = Specs([s for s in graph.inputs if s.name == "nothing"], list(graph.outputs))
    with pytest.raises(GraphOptError, match=r"expected a language model with one integer input .* found none$"):
        Interface.of(without_tokens)
    flat = replace(graph.outputs[0], shape=("B", 11))
    with pytest.raises(GraphOptError, match=r"expected a language model with logits \[batch, length, V\]"):
        Interface.of(Specs(list(graph.inputs), [flat]))
    # The hidden states of a GPT-2 without a head are no logits: its table has 20 rows.
    with pytest.raises(GraphOptError, match="of the 20 tokens that the embedding has, found outputs hidden_states"):
        Interface.of(graphopt.load(shared_data / "zoo_extra" / "hf_gpt2_nopast_12l.onnx"))
