"""Files that are no model, and external data that is somewhere else."""

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import onnx

from .registry import LOADS, adding, attack

SECRET = b"a secret that no model may read."


def external(location: str | bytes, **entries: object) -> onnx.ModelProto:
    """y = x + w, where w of four floats lies in another file."""
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": "LOCATION", **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    model = adding(tensor)
    if isinstance(location, str):
        model.graph.initializer[0].external_data[0].value = location
        return model
    # protobuf lets Python write text only; on the wire any bytes will do.
    assert len(location) == len("LOCATION")
    return onnx.ModelProto.FromString(model.SerializeToString().replace(b"LOCATION", location))


@attack("is empty")
def nothing():
    return b""


@attack("does not parse|without a graph")
def html():
    return b"<!DOCTYPE html><html><head><title>404</title></head><body>Not found</body></html>" * 20


@attack("does not parse|without a graph")
def archive():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("model.onnx", adding().SerializeToString())
    return stream.getvalue()


class _Harmful:
    def __reduce__(self):
        return os.system, ("touch pickle-was-run",)


@attack("does not parse|without a graph")
def pickled():
    return pickle.dumps({"state_dict": _Harmful()})


@attack("does not parse|without a graph")
def safetensors():
    header = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    return struct.pack("<Q", len(header)) + header + bytes(16)


@attack("does not parse|without a graph")
def gguf():
    return b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60) + bytes(64)


@attack("does not parse")
def text_form():
    return str(adding()).encode()


@attack("does not parse", count=1 << 20)
@attack("does not parse", count=64)
def groups_that_never_end(count):
    return b"\x3b" * count  # start of group 7, again and again


@attack("does not parse")
def length_beyond_the_file():
    return b"\x08\x08\x3a" + b"\xff\xff\xff\xff\x07" + b"\x0a"


@attack("an IR version", version=0)
@attack("IR version of 1 or more", version=-1)
@attack(LOADS, version=1)
@attack(LOADS, version=(1 << 63) - 1)
def ir_version(version):
    model = adding()
    model.ir_version = version
    return model


@attack("device or a pipe")
def model_is_a_pipe(folder):
    os.mkfifo(folder / "model.onnx")
    return folder / "model.onnx"


@attack("device or a pipe")
def model_is_a_device(folder):
    (folder / "model.onnx").symlink_to("/dev/zero")
    return folder / "model.onnx"


@attack("does not exist|cannot be read")
def model_is_a_circle_of_links(folder):
    (folder / "model.onnx").symlink_to("other.onnx")
    (folder / "other.onnx").symlink_to("model.onnx")
    return folder / "model.onnx"


@attack("at most 2 GB")
def larger_than_any_protobuf(folder):
    with (folder / "model.onnx").open("wb") as stream:
        stream.truncate(1 << 40)
    return folder / "model.onnx"


@attack("inside the model's folder", location="../outside/secret")
@attack("inside the model's folder", location="sub/../../outside/secret")
@attack("inside the model's folder", location="../../../../../../../etc/passwd")
@attack("inside the model's folder", location="/etc/passwd")
@attack("inside the model's folder", location="")
@attack("inside the model's folder", location=".")
@attack("inside the model's folder", location="..")
@attack("inside the model's folder", location="//etc/passwd")
@attack("beside the model", location="..\\outside\\secret")
@attack("beside the model", location="file:///etc/passwd")
@attack("beside the model", location="~/.ssh/id_rsa")
@attack("beside the model", location="$HOME/.ssh/id_rsa")
@attack("beside the model|file name", location="sub/\N{FULLWIDTH FULL STOP}\N{FULLWIDTH FULL STOP}/secret")
@attack("expected a file name", location="w.bin\0.txt")
@attack("expected a file name", location="w" * 300)
@attack("expected a file name", location="w/" * 100_000)
@attack("model file itself", location="model.onnx")
@attack("model file itself", location="./sub/../model.onnx")
def location(location):
    return external(location)


@attack("not in UTF-8")
def location_in_another_encoding():
    return external(b"\xff\xfe/secr\xc0")


@attack("inside the model's folder", link="file")
@attack("inside the model's folder", link="folder")
@attack("inside the model's folder", link="folder of a folder")
def link_to_the_outside(folder, link):
    outside = Path("../outside")
    if link == "file":
        (folder / "w.bin").symlink_to(outside / "secret")
        return _stored(folder, external("w.bin"))
    (folder / "sub").symlink_to(outside if link == "folder" else Path(".."))
    return _stored(folder, external("sub/secret" if link == "folder" else "sub/outside/secret"))


@attack("expected a file name")
def links_in_a_circle(folder):
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    return _stored(folder, external("a"))


@attack("beside the model", kind="pipe")
@attack("inside the model's folder", kind="device")
@attack("beside the model", kind="socket folder")
def location_is_no_file(folder, kind):
    if kind == "pipe":
        os.mkfifo(folder / "w.bin")
    elif kind == "device":
        (folder / "w.bin").symlink_to("/dev/zero")
    else:
        (folder / "w.bin").mkdir()
    return _stored(folder, external("w.bin"))


def _stored(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@attack(LOADS, offset=0, length=16)
@attack(LOADS, offset=3, length=16)
@attack("is no number", offset=0, length="1_6")
@attack("is no number", offset="\N{ARABIC-INDIC DIGIT ZERO}", length=16)
@attack("is no number", offset="0x0", length=16)
@attack("is no number", offset=" 0", length=16)
@attack("is no number", offset=0, length="9" * 10_000)
@attack("is no number", offset="nan", length=16)
@attack("truncated", offset=-1, length=16)
@attack("truncated", offset=0, length=-16)
@attack("truncated", offset=1 << 62, length=1 << 62)
@attack("truncated", offset=(1 << 63) - 16, length=16)
@attack("truncated", offset=-(1 << 62), length=1 << 62)
@attack("truncated", offset=0, length=33)
@attack("truncated", offset=33, length=0)
@attack("bytes", offset=17, length="")
@attack("bytes", offset=0, length=15)
def span(folder, offset, length):
    (folder / "w.bin").write_bytes(bytes(32))
    return _stored(folder, external("w.bin", offset=offset, length=length))


@attack("described twice")
def two_locations(folder):
    (folder / "w.bin").write_bytes(bytes(32))
    model = external("w.bin")
    model.graph.initializer[0].external_data.add(key="location", value="../outside/secret")
    return _stored(folder, model)


@attack("in another file", kind="beside a value")
@attack("in another file", kind="of strings")
def external_and_more(folder, kind):
    (folder / "w.bin").write_bytes(bytes(32))
    model = external("w.bin")
    if kind == "of strings":
        model.graph.initializer[0].data_type = onnx.TensorProto.STRING
    else:
        model.graph.initializer[0].raw_data = bytes(16)
    return _stored(folder, model)


@attack("inside the model's folder", where="attribute")
@attack("inside the model's folder", where="sparse")
@attack("inside the model's folder", where="sparse attribute")
@attack("inside the model's folder", where="body")
@attack("inside the model's folder", where="function")
@attack("inside the model's folder", where="default")
@attack("inside the model's folder", where="training")
def external_data_hidden_in(where):
    helper, model = onnx.helper, adding()
    tensor = external("../outside/secret").graph.initializer[0]
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    sparse = onnx.SparseTensorProto(dims=[4])
    sparse.values.CopyFrom(tensor)
    sparse.indices.CopyFrom(helper.make_tensor("i", 7, [4], range(4)))
    body = helper.make_graph([constant], "body", [], [helper.make_tensor_value_info("c", 1, [4])])
    if where == "attribute":
        model.graph.node.append(constant)
    elif where == "sparse":
        model.graph.sparse_initializer.append(sparse)
        model.graph.sparse_initializer[0].values.name = "s"
    elif where == "sparse attribute":
        model.graph.node.append(helper.make_node("Constant", [], ["c"], sparse_value=sparse))
    elif where == "body":
        model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=body, else_branch=body))
    elif where == "training":
        model.training_info.add().algorithm.CopyFrom(body)
    else:
        function = helper.make_function("local", "F", [], ["c"], [constant], [helper.make_opsetid("", 17)])
        if where == "default":
            function.node[0].attribute[0].CopyFrom(onnx.AttributeProto(name="value", type=4, ref_attr_name="v"))
            function.attribute_proto.append(helper.make_attribute("v", tensor))
        model.functions.append(function)
        model.graph.node.append(helper.make_node("F", [], ["c"], domain="local"))
    return model
