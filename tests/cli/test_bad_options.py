"""Wrong passes, options and places for the output: one sentence, exit code 2, nothing written."""

import os
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

Refused = Callable[..., str]

pytestmark = pytest.mark.usefixtures("soften")


@pytest.mark.parametrize(
    ("spelled", "words"),
    [
        ("sofen", "did you mean 'soften'?"),
        ("broken", "cannot be imported"),
        ("soften{shft=1}", "did you mean 'shift'?"),
        ("soften{zzz=1}", "it has shift, limit, refuse, wait"),
        ("soften{shift=big}", "expected shift to be float, got 'big'"),
        ("soften{refuse=maybe}", "expected refuse to be bool, got 'maybe'"),
        ("soften{limit=-1}", "expected limit to be at least 0"),
        ("soften{shift=1,shift=2}", "given twice"),
        ("soften{shift}", "expected option=value"),
        ("soften{", "expected a pass such as"),
        ("", "expected a pass such as"),
    ],
)
@pytest.mark.parametrize("verb", ["transform", "explain"])
def test_bad_pass(verb: str, spelled: str, words: str, model: Path, rejects: Refused) -> None:
    assert words in rejects(verb, model, "--pass", spelled)


def test_the_pass_is_read_before_the_model(model: Path, rejects: Refused) -> None:
    model.write_bytes(b"")
    assert "sofen" in rejects("transform", model, "--pass", "sofen")


def test_no_pass(model: Path, rejects: Refused) -> None:
    assert "expected at least one pass" in rejects("transform", model)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("passes = [", "does not parse"),
        ("passes = 3", 'expected passes = ["cleanup", ...]'),
        ('passes = ["sofen"]', "did you mean 'soften'?"),
    ],
)
def test_bad_pipeline(text: str | None, words: str, model: Path, rejects: Refused) -> None:
    path = model.with_name("pipeline.toml")
    if text is not None:
        path.write_text(text)
    assert words in rejects("transform", model, "--pipeline", path)


def test_output_in_a_missing_folder(model: Path, rejects: Refused) -> None:
    sentence = rejects("transform", model, "--pass", "soften", "-o", model.parent / "no" / "out.onnx")
    assert "create it first" in sentence


def test_output_below_a_file(model: Path, rejects: Refused) -> None:
    assert "expected an existing folder" in rejects("transform", model, "--pass", "soften", "-o", model / "out.onnx")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that even root cannot write to")
def test_output_in_a_read_only_folder(model: Path, rejects: Refused) -> None:
    sentence = rejects("transform", model, "--pass", "soften", "-o", "/proc/self/out.onnx")
    assert "expected a writable folder" in sentence


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_default_output_in_a_read_only_folder(model: Path, rejects: Refused) -> None:
    model.parent.chmod(0o500)
    try:
        assert "expected a writable folder" in rejects("transform", model, "--pass", "soften")
    finally:
        model.parent.chmod(0o700)


def test_output_is_a_folder(model: Path, tmp_path: Path, rejects: Refused) -> None:
    assert "is a folder" in rejects("transform", model, "--pass", "soften", "-o", tmp_path)


def test_output_is_checked_before_the_pass(model: Path, rejects: Refused) -> None:
    sentence = rejects("transform", model, "--pass", "sofen", "-o", model.parent / "no" / "out.onnx")
    assert "create it first" in sentence


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["plain", "force"])
@pytest.mark.parametrize("link", ["same", "symlink", "hardlink"])
def test_output_is_the_input(link: str, force: tuple[str, ...], model: Path, rejects: Refused) -> None:
    out = model if link == "same" else model.with_name("link.onnx")
    if link == "symlink":
        out.symlink_to(model)
    elif link == "hardlink":
        out.hardlink_to(model)
    sentence = rejects("transform", model, "--pass", "soften", "-o", out, *force)
    assert "expected another file for the output" in sentence


def test_output_exists(model: Path, other: Path, rejects: Refused) -> None:
    assert "--force" in rejects("transform", model, "--pass", "soften", "-o", other)


def test_output_is_a_device(model: Path, rejects: Refused) -> None:
    sentence = rejects("transform", model, "--pass", "soften", "-o", "/dev/null", "--force")
    assert "is a device" in sentence
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("where", ["net.onnx", "net.soften.onnx"])
def test_json_takes_a_models_place(where: str, model: Path, rejects: Refused) -> None:
    sentence = rejects("transform", model, "--pass", "soften", "--json", model.with_name(where))
    assert "expected a file of its own for the JSON" in sentence


def with_external_weights(folder: Path, proto: onnx.ModelProto, data: str) -> Path:
    path = folder / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location=data, size_threshold=0)
    return path


@pytest.mark.parametrize("data", ["out.onnx", "out.onnx.data"])
def test_output_would_overwrite_the_inputs_weights(data: str, model: Path, rejects: Refused) -> None:
    path = with_external_weights(model.parent, onnx.load(model), data)
    sentence = rejects(
        "transform", path, "--pass", "soften", "-o", model.parent / "out.onnx", "--force", "--external-data"
    )
    assert "holds the input's weights" in sentence


@pytest.mark.parametrize(
    ("dim", "words"),
    [
        ("bach=4", "did you mean 'batch'?"),
        ("zzz=4", "it has batch"),
        ("batch", "expected --dim NAME=SIZE"),
        ("batch=", "expected --dim NAME=SIZE"),
        ("batch=0", "a size of at least 1"),
        ("batch=-3", "a size of at least 1"),
        ("batch=x", "expected --dim NAME=SIZE"),
        ("=4", "expected --dim NAME=SIZE"),
    ],
)
@pytest.mark.parametrize("verb", ["inspect", "transform", "verify", "bench"])
def test_bad_dim(verb: str, dim: str, words: str, model: Path, rejects: Refused) -> None:
    args = {"transform": ("--pass", "soften"), "verify": (model,)}.get(verb, ())
    assert words in rejects(verb, model, *args, "--dim", dim)


@pytest.mark.parametrize("verb", ["inspect", "transform", "verify"])
def test_dim_given_twice(verb: str, model: Path, rejects: Refused) -> None:
    args = {"transform": ("--pass", "soften"), "verify": (model,)}.get(verb, ())
    assert "expected one size" in rejects(verb, model, *args, "--dim", "batch=1", "--dim", "batch=2")


@pytest.mark.parametrize(
    ("verb", "target", "words"),
    [
        ("transform", "onx", "did you mean 'onnx'?"),
        ("transform", "tensorrt", "no target is called 'tensorrt'"),
        ("bench", "tensorrt", "expected --target to be one of"),
    ],
)
def test_unknown_target(verb: str, target: str, words: str, model: Path, rejects: Refused) -> None:
    args = ("--pass", "soften") if verb == "transform" else ()
    assert words in rejects(verb, model, *args, "--target", target)


def test_unknown_site(model: Path, rejects: Refused) -> None:
    assert "no site is called 'corner_3'" in rejects("transform", model, "--pass", "soften", "--only", "corner_3")


def test_unknown_node(model: Path, rejects: Refused) -> None:
    sentence = rejects("explain", model, "--pass", "soften", "--node", "corner_3")
    assert "'corner_1'" in sentence
    assert "'corner_2'" in sentence


def test_unknown_site_kind(model: Path, rejects: Refused) -> None:
    assert "no site is of kind 'atention'" in rejects("inspect", model, "--sites", "atention")


@pytest.mark.parametrize(
    "args",
    [
        ("inspct",),
        ("inspect",),
        ("transform", "MODEL", "--pas", "soften"),
        ("transform", "MODEL", "--pass", "soften", "--fit-steps", "many"),
        ("transform", "MODEL", "--pass", "soften", "--fit-steps", "-1"),
        ("transform", "MODEL", "--pass", "soften", "--min-cosine", "2"),
        ("transform", "MODEL", "--pass", "soften", "--seed", "-1"),
        ("transform", "MODEL", "--pass"),
        ("verify", "MODEL"),
        ("verify", "MODEL", "MODEL", "--runtime", "tensorrt"),
        ("bench", "MODEL", "--runs", "0"),
        ("passes", "sofen"),
        ("passes", "broken"),
    ],
)
def test_bad_usage(args: tuple[str, ...], model: Path, rejects: Refused) -> None:
    rejects(*(model if arg == "MODEL" else arg for arg in args))
