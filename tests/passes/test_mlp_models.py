"""The passes on MLPs, on whole models of five families as nn.Modules: BERT, ViT, Llama, Gemma, GPT-2."""

import pytest
import torch

import graphopt

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**SMALL, **TEXT, "num_key_value_heads": 2, "use_cache": False}


def gpt2():
    config = transformers.GPT2Config(**TEXT, n_embd=32, n_layer=2, n_head=4, n_positions=64, use_cache=False)
    return transformers.GPT2LMHeadModel(config)


# Family -> the model, its activation, and whether that is gated.
MODELS = {
    "bert": (lambda: transformers.BertModel(transformers.BertConfig(**SMALL, **TEXT)), "gelu", False),
    "vit": (lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=12, patch_size=4)), "gelu", False),
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)), "silu", True),
    "gemma": (
        lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**GROUPED, head_dim=8)),
        "gelu_tanh",
        True,
    ),
    "gpt2": (gpt2, "gelu_tanh", False),
}
PASSES = ("rational", "rational{groups=8}", "kat", "kat{form=split,m=4,n=6}", "snnk{features=16,max_error=1}")


@pytest.fixture(scope="module", params=MODELS)
def loaded(request):
    torch.manual_seed(0)
    make, activation, gated = MODELS[request.param]
    module = make().eval()
    for parameter in module.parameters():  # so that activations leave the neighbourhood of 0
        parameter.data.mul_(3.0 if parameter.dim() > 1 else 1.0)
    is_vision = request.param == "vit"
    inputs = [torch.randn(2, 3, 12, 12) if is_vision else torch.randint(3, 60, (2, 9)) for _ in range(3)]
    graph = graphopt.load(module, (inputs[0],))
    sites = graph.sites("mlp")
    assert [(s.activation, s.gate is not None) for s in sites] == [(activation, gated)] * 2
    return module, graph, [(x,) for x in inputs]


@pytest.mark.parametrize("spelling", PASSES)
def test_every_mlp_is_rewritten_and_the_model_stays(loaded, spelling):
    module, graph, batches = loaded
    result = graph.apply(spelling, calibration=batches)
    sites = result.report.passes[0].sites
    assert len(sites) == (4 if spelling.startswith("kat") else 2)
    assert all(site.status == "rewritten" for site in sites), sites
    after = result.graph.to_module()
    if not spelling.startswith("snnk"):
        assert set(dict(module.named_parameters())) <= set(dict(after.named_parameters()))
    with torch.no_grad():
        before, found = (m(*batches[0])[0] for m in (module, after))
    # Errors of activations: 5e-5, 1e-2 for `kat`, which is judged by its largest; random features are an approximation.
    bound = {"rational": 1e-3, "kat": 3e-2, "snnk": 0.5}[spelling.partition("{")[0]]
    assert float((found - before).norm() / before.norm()) < bound
