"""The small decoder of samples/: its weights, cache, exports and training, and llama2.c's checkpoints in it."""

import argparse
import dataclasses
import json
import math
import struct
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "samples"))

from tiny_decoder import checkpoint, data, export, train
from tiny_decoder.model import CachedDecoder, Config, Decoder
from tiny_decoder.softplus import SoftplusAttention
from tiny_decoder.tokenizer import BOS, Tokenizer

from graphopt.ops import softplus_attention

SMALL = Config(vocab=50, dim=32, layers=2, heads=4, kv_heads=2, hidden=48, context=64)
# Sums of fp32 products in another order, over logits of up to about 20.
SAME = 1e-4


@pytest.fixture(scope="module")
def tiny() -> Decoder:
    return checkpoint.load_tiny()


@pytest.fixture(scope="module")
def short(tiny: Decoder) -> Decoder:
    """The first two layers of the tiny decoder: exporting takes time for each layer."""
    decoder = Decoder(dataclasses.replace(tiny.config, layers=2))
    weights = {
        name: value for name, value in tiny.state_dict().items() if not name.startswith(("layers.2", "layers.3"))
    }
    decoder.load_state_dict(weights)
    return decoder.eval()


@pytest.fixture(scope="module")
def exported(short: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export.export(short, folder)
    return folder


@pytest.fixture
def stories(shared_data: Path) -> Path:
    return shared_data / "stories260k"


def token_ids(vocab: int, *shape: int) -> torch.Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(0))


def deviation(a: np.ndarray | torch.Tensor, b: np.ndarray | torch.Tensor) -> float:
    assert a.shape == b.shape
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def hugging_face(decoder: Decoder) -> torch.nn.Module:
    """The same weights in transformers' Llama: an implementation that shares nothing with ours."""
    transformers = pytest.importorskip("transformers")
    config = decoder.config
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab,
            hidden_size=config.dim,
            intermediate_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.context,
            rms_norm_eps=config.eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.theta},
            tie_word_embeddings=config.tied,
        )
    )
    weights = decoder.state_dict()
    head = weights.pop("lm_head.weight")
    weights = {f"model.{name}": value for name, value in weights.items()} | {"lm_head.weight": head}
    llama.load_state_dict(weights)
    return llama.eval()


def test_the_weights_are_small_and_in_half_precision() -> None:
    content = (checkpoint.FOLDER / "weights.safetensors").read_bytes()
    assert len(content) < 8e6
    header = json.loads(content[8 : 8 + struct.unpack_from("<Q", content)[0]])
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"F16"}


@torch.no_grad()
def test_the_weights_predict_python_source(tiny: Decoder) -> None:
    _, held_out = data.texts()
    windows = data.windows(held_out, tiny.config.context, 8)
    loss = F.cross_entropy(tiny(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
    # 0.926 measured on the library of Python 3.11. That of another version holds out other files; a model that knew
    # only how often each byte occurs would lose about 3.
    assert loss < 1.1


@torch.no_grad()
def test_logits_are_those_of_transformers(tiny: Decoder) -> None:
    ids = token_ids(256, 2, 70)
    assert deviation(tiny(ids), hugging_face(tiny)(ids).logits) < SAME


@torch.no_grad()
def test_an_untied_decoder_agrees_with_transformers() -> None:
    decoder = Decoder(Config(50, 32, 2, 4, 1, 48, 64, theta=500.0, eps=1e-2, tied=False)).eval()
    ids = token_ids(50, 2, 20)
    assert deviation(decoder(ids), hugging_face(decoder)(ids).logits) < 1e-5


def test_saved_weights_load_again(tmp_path: Path) -> None:
    decoder = Decoder(SMALL)
    checkpoint.save(decoder, tmp_path)
    loaded = checkpoint.load(tmp_path)
    assert loaded.config == SMALL
    for name, value in decoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float()), name
    assert loaded.lm_head.weight is loaded.embed_tokens.weight


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[12], [5, 7], [1] * 12, [7, 1, 1, 3]])
def test_the_cache_changes_nothing(tiny: Decoder, chunks: list[int]) -> None:
    ids = token_ids(256, 3, 12)
    cached, parts, done = CachedDecoder(tiny), [], 0
    past = [(torch.zeros(3, 4, 0, 32), torch.zeros(3, 4, 0, 32)) for _ in range(4)]
    for part in ids.split(chunks, dim=1):
        positions = torch.arange(done, done + part.shape[1]).expand(3, -1)
        done += part.shape[1]
        logits, past = cached(part, torch.ones(3, done, dtype=torch.int64), positions, past)
        parts.append(logits)
    assert deviation(torch.cat(parts, dim=1), tiny(ids)) < SAME
    assert past[0][0].shape == (3, 4, 12, 32)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(short: Decoder, exported: Path) -> None:
    prompt, rest = token_ids(256, 1, 4), token_ids(256, 1, 9)[:, 4:]
    expected = short(torch.cat((prompt, rest), dim=1))
    padded = torch.nn.functional.pad(prompt, (3, 0))
    mask = (torch.arange(7) >= 3).long()[None]
    session = export.CachedSession(exported / export.CACHED, short.config, batch=2)
    batch = torch.cat((token_ids(256, 1, 7), padded)).numpy()
    parts = [session.advance(batch, torch.cat((torch.ones_like(mask), mask)).numpy())[1:, 3:]]
    parts += [session.advance(np.repeat(token[None, None], 2, axis=0))[1:] for token in rest[0].numpy()]
    assert deviation(np.concatenate(parts, axis=1), expected) < SAME


def test_another_attention_function_gets_the_heads() -> None:
    seen: list[tuple[int, ...]] = []

    def values_only(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        seen.append((*q.shape, *k.shape, *v.shape))
        assert mask is None
        return v

    logits = Decoder(SMALL, values_only)(token_ids(50, 3, 6))
    assert logits.shape == (3, 6, 50)
    assert seen == [(3, 4, 6, 8) * 3] * 2


def test_exports_declare_the_interface_of_optimum(exported: Path) -> None:
    model = onnx.load(exported / export.CACHED)
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    total = "total_sequence_length"
    expected = {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", total],
        "position_ids": ["batch_size", "sequence_length"],
        "logits": ["batch_size", "sequence_length", 256],
    }
    for layer in range(2):
        for part in ("key", "value"):
            expected[f"past_key_values.{layer}.{part}"] = ["batch_size", 4, "past_sequence_length", 32]
            expected[f"present.{layer}.{part}"] = ["batch_size", 4, total, 32]
    assert shapes == expected
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]


def test_exports_agree_with_torch(short: Decoder, exported: Path) -> None:
    errors = export.worst_errors(short, exported)
    assert set(errors) == {"decoder.onnx", "decoder_with_past.onnx"}
    assert max(errors.values()) < SAME


@torch.no_grad()
def test_every_axis_of_the_exports_is_dynamic(short: Decoder, exported: Path) -> None:
    plain, cached = export.session(exported / export.PLAIN), export.session(exported / export.CACHED)
    names = [value.name for value in cached.get_inputs()]
    for batch in (1, 3):
        for length in (1, 7, 40):
            ids = token_ids(256, batch, length)
            assert deviation(plain.run(None, {"input_ids": ids.numpy()})[0], short(ids)) < SAME
            for past in (0, 1, 5):
                positions = torch.arange(past, past + length).expand(batch, -1)
                mask = torch.ones(batch, past + length, dtype=torch.int64)
                flat = torch.randn(4, batch, 4, past, 32, generator=torch.Generator().manual_seed(1)).unbind()
                pairs = list(zip(flat[::2], flat[1::2], strict=True))
                logits, presents = CachedDecoder(short)(ids, mask, positions, pairs)
                feeds = zip(names, [ids, mask, positions, *flat], strict=True)
                found = cached.run(None, {name: value.numpy() for name, value in feeds})
                expected = [logits, *(value for pair in presents for value in pair)]
                assert max(deviation(a, b) for a, b in zip(found, expected, strict=True)) < SAME, (batch, length, past)


def test_no_file_is_both_trained_on_and_held_out() -> None:
    files = data.sources()
    assert len(files) > 300
    assert not {part for path in files for part in path.parts} & {"site-packages", "test", "tests", "idlelib"}
    text, held_out = data.texts()
    assert len(text) + len(held_out) == sum(1 + path.stat().st_size for path in files)
    last = files[19].read_bytes()
    assert bytes(held_out[: len(last) + 1].tolist()) == b"\0" + last


def test_windows_span_the_text() -> None:
    text = torch.arange(100, dtype=torch.uint8)
    windows = data.windows(text, 9, 4)
    assert windows[:, 0].tolist() == [0, 30, 60, 90]
    assert windows[-1].tolist() == list(range(90, 100))
    drawn = data.batch(text, 9, 64, seed=3, step=5)
    assert torch.equal(drawn - drawn[:, :1], torch.arange(10).expand(64, -1))
    assert torch.equal(drawn, data.batch(text, 9, 64, seed=3, step=5))
    assert not torch.equal(drawn, data.batch(text, 9, 64, seed=3, step=6))


@pytest.fixture
def small_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """The arguments of a training that takes a moment."""
    monkeypatch.setattr(train, "Config", lambda: SMALL)
    monkeypatch.setattr(train, "TOKENS", 64)
    monkeypatch.setattr(train, "SHORT", 32)
    monkeypatch.setattr(train, "VALIDATION_TOKENS", 256)
    return argparse.Namespace(
        out=tmp_path, minutes=0.02, steps=None, save_every=0.005, attention="softmax", compile=False, bf16=False, seed=0
    )


def test_a_resumed_training_goes_on_as_if_nothing_had_happened(small_training: argparse.Namespace) -> None:
    text = token_ids(50, 1000).to(torch.uint8)
    small_training.minutes = 1e9  # the learning rate, which follows the clock, stays at its first value
    straight, first = train.Training(small_training), train.Training(small_training)
    for _ in range(6):
        straight.advance(text)
    for _ in range(3):
        first.advance(text)
    first.write()
    torch.rand(1)  # nothing depends on the generator's state
    resumed = train.Training(small_training)
    resumed.resume()
    for _ in range(3):
        resumed.advance(text)
    assert resumed.step == straight.step
    for name, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_training_learns_and_writes_its_weights(
    small_training: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = (torch.arange(2000) % 5).to(torch.uint8)
    monkeypatch.setattr(train.data, "texts", lambda: (counting, counting))
    training = train.Training(small_training)
    train.run(training, Console(quiet=True))
    assert training.done == 1
    assert training.length == SMALL.context
    loaded = checkpoint.load(small_training.out)
    windows = data.windows(counting, 32, 4)
    loss = F.cross_entropy(loaded(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()).item()
    assert loss < 0.8 * math.log(SMALL.vocab)  # of a uniform guess; how many steps there are depends on the machine
    resumed = train.Training(small_training)
    resumed.resume()
    assert (resumed.step, resumed.done) == (training.step, 1)


def test_the_learning_rate_warms_up_and_falls() -> None:
    assert train.learning_rate(0.0) < train.learning_rate(0.01) < train.learning_rate(0.02)
    assert train.learning_rate(0.02) == pytest.approx(train.PEAK)
    assert train.learning_rate(0.51) == pytest.approx((train.PEAK + train.FLOOR) / 2)
    assert train.learning_rate(1.0) == pytest.approx(train.FLOOR)


@torch.no_grad()
def test_stories260k_tells_its_published_story(stories: Path) -> None:
    decoder, tokenizer = checkpoint.load_llama2c(stories), Tokenizer(stories / "tok512.bin")
    ids = [BOS]
    for _ in range(40):
        ids.append(int(decoder(torch.tensor([ids]))[0, -1].argmax()))
    published = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    assert tokenizer.decode(ids).startswith(published)


def llama2c_logits(path: Path, ids: list[int]) -> np.ndarray:
    """Logits [T, V] in fp64 as llama2.c's run.c computes them: token by token, neighbouring dimensions rotated."""
    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, _ = struct.unpack_from("<7i", data)
    size, kv = dim // heads, dim // heads * kv_heads
    shapes = {
        "embedding": (vocab, dim),
        "attention_norm": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv, dim),
        "wv": (layers, kv, dim),
        "wo": (layers, dim, dim),
        "ffn_norm": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "final_norm": (dim,),
    }
    values, w = np.frombuffer(data, "<f4", offset=28).astype(np.float64), {}
    for name, shape in shapes.items():
        w[name], values = values[: np.prod(shape)].reshape(shape), values[np.prod(shape) :]

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean() + 1e-5) * weight

    def rotated(x: np.ndarray, position: int) -> np.ndarray:
        angle = position * 10000.0 ** (-np.arange(0, size, 2) / size)
        turned = (x.reshape(-1, size)[:, 0::2] + 1j * x.reshape(-1, size)[:, 1::2]) * np.exp(1j * angle)
        return np.stack((turned.real, turned.imag), axis=-1).reshape(-1, size)

    keys: list[list[np.ndarray]] = [[] for _ in range(layers)]
    vals: list[list[np.ndarray]] = [[] for _ in range(layers)]
    logits = []
    for position, token in enumerate(ids):
        x = w["embedding"][token]
        for layer in range(layers):
            h = norm(x, w["attention_norm"][layer])
            q = rotated(w["wq"][layer] @ h, position)
            keys[layer].append(rotated(w["wk"][layer] @ h, position))
            vals[layer].append((w["wv"][layer] @ h).reshape(kv_heads, size))
            mixed = []
            for head in range(heads):
                shared = head // (heads // kv_heads)
                scores = np.exp([q[head] @ key[shared] / np.sqrt(size) for key in keys[layer]])
                mixed.append(scores / scores.sum() @ np.array([value[shared] for value in vals[layer]]))
            x = x + w["wo"][layer] @ np.concatenate(mixed)
            h = norm(x, w["ffn_norm"][layer])
            gate = w["w1"][layer] @ h
            x = x + w["w2"][layer] @ (gate / (1 + np.exp(-gate)) * (w["w3"][layer] @ h))
        logits.append(w["embedding"] @ norm(x, w["final_norm"]))
    return np.array(logits)


@torch.no_grad()
def test_stories260k_computes_what_llama2c_does(stories: Path) -> None:
    ids = Tokenizer(stories / "tok512.bin").encode("Anna loves to draw with her crayons. She likes to make pictures.")
    expected = llama2c_logits(stories / "stories260K.bin", ids)
    assert deviation(checkpoint.load_llama2c(stories)(torch.tensor([ids]))[0], expected) < SAME


@torch.no_grad()
def test_stories260k_on_held_out_stories(stories: Path, shared_data: Path) -> None:
    decoder, tokenizer = checkpoint.load_llama2c(stories), Tokenizer(stories / "tok512.bin")
    text = (shared_data / "text" / "tinystories_sample.txt").read_text()
    losses = []
    for story in text.splitlines():
        ids = torch.tensor(tokenizer.encode(story)[: decoder.config.context])
        losses.append(F.cross_entropy(decoder(ids[None, :-1])[0], ids[1:], reduction="none"))
    # 1.644 measured. Published is 1.297, over the whole validation set.
    assert torch.cat(losses).mean() < 1.65


def test_the_tokenizer_gives_texts_back(stories: Path) -> None:
    tokenizer = Tokenizer(stories / "tok512.bin")
    for text in ("Once upon a time", " two  spaces ", "tab\tline\nend", "naïve 日本 \0", ""):
        ids = tokenizer.encode(text)
        assert ids[0] == BOS
        assert tokenizer.decode(ids) == text
    # " the" is a piece of its own; 日 is none, and becomes its bytes, after the three special tokens.
    assert [tokenizer.pieces[token] for token in tokenizer.encode("the")[1:]] == [b" the"]
    assert tokenizer.encode("日")[-3:] == [3 + 0xE6, 3 + 0x97, 3 + 0xA5]


@pytest.mark.parametrize("power", [None, 3, 15])
def test_softplus_attention_is_that_of_the_operator(power):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 70, 16, generator=generator) for _ in range(3))
    found = SoftplusAttention(power)(q, k, v, None)
    expected = softplus_attention(q.double(), k.double(), v.double(), None, power or 0, True)
    # Sums of fp32 in another order; a 15th power makes 15 times as much of a relative error.
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_softplus_attention_counts_no_padding():
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match="found a mask"):
        SoftplusAttention()(q, q, q, torch.zeros(3, 3))


@pytest.mark.parametrize("attention", ["lssa", "lssar15"])
def test_training_with_softplus_attention(attention, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "Config", lambda: dataclasses.replace(SMALL, vocab=256))
    monkeypatch.setattr(train, "TOKENS", 256)
    monkeypatch.setattr(train, "SHORT", 32)
    arguments = argparse.Namespace(
        out=tmp_path, minutes=1, steps=60, save_every=3, attention=attention, compile=False, bf16=False, seed=0
    )
    training = train.Training(arguments)
    text = data.texts()[0]
    losses = [training.advance(text) for _ in range(60)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
    assert training.done == 1
