"""Transformer models, from nn.Module to graph and back, at sizes other than the example's."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.export import Dim

import graphopt

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**SMALL, **WIDTH, max_position_embeddings=64))


def gpt2() -> Any:
    config = transformers.GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=64, use_cache=False)
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    config = transformers.LlamaConfig(
        **SMALL, **WIDTH, num_key_value_heads=2, max_position_embeddings=64, use_cache=False
    )
    return transformers.LlamaForCausalLM(config)


def vit() -> Any:
    return transformers.ViTModel(transformers.ViTConfig(**WIDTH, image_size=12, patch_size=4))


def tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch * 100 + length)
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, length - length // 3 :] = 0
    return {
        "input_ids": torch.randint(3, 99, (batch, length), generator=generator),
        "attention_mask": mask,
    }


def images(batch: int, _: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(batch))}


TEXT = {"input_ids": {0: Dim("batch"), 1: Dim("seq", max=60)}}
TEXT["attention_mask"] = TEXT["input_ids"]
MODELS: dict[str, tuple[Callable[[], Any], Any, Any]] = {
    "bert": (bert, tokens, TEXT),
    "gpt2": (gpt2, tokens, TEXT),
    "llama": (llama, tokens, TEXT),
    "vit": (vit, images, {"pixel_values": {0: "batch"}}),
}
FIRST_OUTPUT = {"bert": "last_hidden_state", "gpt2": "logits", "llama": "logits", "vit": "last_hidden_state"}
SIZES = [(2, 7), (1, 5), (3, 19), (5, 60)]


@pytest.fixture(scope="module", params=list(MODELS))
def case(request: pytest.FixtureRequest) -> tuple[str, Any, Any, graphopt.Graph]:
    build, feed, shapes = MODELS[request.param]
    torch.manual_seed(0)
    module = build().eval()
    return request.param, module, feed, graphopt.load(module, feed(2, 7), shapes)


def test_interface(case: Any) -> None:
    name, _, feed, graph = case
    assert [s.name for s in graph.inputs] == list(feed(2, 7))
    assert graph.outputs[0].name == FIRST_OUTPUT[name]
    expected = ("batch", 10, 32) if name == "vit" else ("batch", "seq", 32 if name == "bert" else 99)
    assert graph.outputs[0].shape == expected
    assert all("higher_order" not in str(n.target) for n in graph.nodes)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_are_those_of_the_module(case: Any, size: tuple[int, int]) -> None:
    _, module, feed, graph = case
    inputs = feed(*size)
    expected = module(**inputs)
    ours = graph.run({name: value.numpy() for name, value in inputs.items()})
    assert list(ours) == list(expected.keys())
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value.detach().numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_lowered_module_is_called_like_the_original(case: Any, size: tuple[int, int]) -> None:
    _, module, feed, graph = case
    inputs = feed(*size)
    (_, value), *others = inputs.items()
    rest = dict(others)
    expected = module(**inputs)
    twin = graph.copy()
    twin.lint()
    for lowered in (graph.to_module(), copy.deepcopy(twin.to_module())):
        for result in (
            lowered(**inputs),
            lowered(value, **rest),
            lowered(**inputs, output_attentions=None),
        ):
            assert type(result) is type(expected)
            assert list(result.keys()) == list(expected.keys())
            torch.testing.assert_close(result[0], expected[0], rtol=0, atol=1e-6)


def test_state_dict_has_the_original_keys_and_memory(case: Any) -> None:
    _, module, _, graph = case
    lowered = graph.to_module()
    state, original = lowered.state_dict(), module.state_dict()
    assert state.keys() == original.keys()
    assert all(state[key].data_ptr() == original[key].data_ptr() for key in original)
    assert copy.deepcopy(graph.copy().to_module()).state_dict().keys() == original.keys()
    assert graph.to_module().load_state_dict(original)
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    assert {name for name, p in lowered.named_parameters() if p.requires_grad} == trainable


def test_gradients_reach_all_parameters(case: Any) -> None:
    _, module, feed, graph = case
    lowered, inputs = graph.to_module(), feed(3, 9)

    def gradients(model: Any) -> dict[str, torch.Tensor | None]:
        model.zero_grad()
        sum(value.square().mean() for value in model(**inputs).values()).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    ours, theirs = gradients(lowered), gradients(module)
    module.zero_grad()
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        found = ours[name]
        assert (found is None) == (expected is None), name
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_tied_embeddings_stay_one_parameter() -> None:
    torch.manual_seed(0)
    module = gpt2().eval()
    graph = graphopt.load(module, {"input_ids": tokens(2, 7)["input_ids"]})
    for node in [n for n in graph.nodes if n.op == "get_attr" and not n.users]:
        graph.fx.erase_node(node)  # as a dead code pass does
    graph.module.recompile()
    for lowered in (graph.to_module(), copy.deepcopy(graph.to_module())):
        assert lowered.state_dict().keys() == module.state_dict().keys()
        shared = lowered.get_parameter("lm_head.weight")
        assert lowered.get_parameter("transformer.wte.weight") is shared
        assert len(list(lowered.parameters())) == len(list(module.parameters()))
        inputs = tokens(2, 7)["input_ids"]
        lowered(input_ids=inputs).logits.square().mean().backward()
        module(input_ids=inputs).logits.square().mean().backward()
        torch.testing.assert_close(shared.grad, module.lm_head.weight.grad, rtol=1e-5, atol=1e-6)
        module.zero_grad()


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    module = graphopt.load(llama().eval(), {"input_ids": tokens(2, 7)["input_ids"]}).to_module()
    inputs = tokens(2, 7)["input_ids"]
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    module.train()
    for _ in range(5):
        logits = module(input_ids=inputs).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_a_cache_in_the_output_and_in_the_input() -> None:
    torch.manual_seed(0)
    module = llama().eval()
    module.config.use_cache = True
    ids = tokens(2, 8)["input_ids"]
    graph = graphopt.load(module, {"input_ids": ids[:, :7]}, {"input_ids": {0: "batch", 1: "seq"}})
    assert [s.name for s in graph.outputs][1:] == [
        f"past_key_values_{k}_cache_{i}" for k in ("key", "value") for i in (0, 1)
    ]
    with torch.no_grad():  # a cache with gradients cannot be copied
        first, expected = graph.to_module()(input_ids=ids[:, :7]), module(input_ids=ids[:, :7])
    assert type(first.past_key_values) is type(expected.past_key_values)
    example = {"input_ids": ids[:, 7:], "past_key_values": copy.deepcopy(expected.past_key_values)}
    step = graphopt.load(module, example).to_module()
    ours = step(input_ids=ids[:, 7:], past_key_values=first.past_key_values).logits
    theirs = module(input_ids=ids[:, 7:], past_key_values=expected.past_key_values).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_cache_that_cannot_be_exported_is_named() -> None:
    config = transformers.T5Config(
        vocab_size=99, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(graphopt.GraphOptError, match=r"EncoderDecoderCache.*use_cache = False"):
        graphopt.load(
            transformers.T5ForConditionalGeneration(config).eval(),
            {"input_ids": ids, "decoder_input_ids": ids},
        )


def test_hidden_states_are_numbered() -> None:
    example = {**tokens(2, 7), "output_hidden_states": True}  # falls into **kwargs
    graph = graphopt.load(bert().eval(), example, {"input_ids": {0: "batch"}, "attention_mask": {0: "batch"}})
    names = [s.name for s in graph.outputs]
    assert names == [
        "last_hidden_state",
        "pooler_output",
        "hidden_states_0",
        "hidden_states_1",
        "hidden_states_2",
    ]
