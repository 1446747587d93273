"""Backbones from strangers: whatever is in the files, one line or the right model; nothing is executed or followed."""

import io
import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from vim_backbone import UserError, create_model, from_pretrained, load
from vim_backbone.embed import main as embed
from vim_backbone.export import main as export

MORE = int(os.environ.get("FUZZ", "0"))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    torch.manual_seed(0)
    model = create_model("vim_tiny", d_model=32, depth=1, img_size=32, num_classes=3)
    return model.save_pretrained(tmp_path_factory.mktemp("original") / "backbone")


@pytest.fixture
def folder(original, tmp_path):
    """A copy to be tampered with."""
    place = tmp_path / "backbone"
    place.mkdir()
    for file in original.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    return place


def refusal(folder):
    """The line that `load` refuses a folder with."""
    with pytest.raises(UserError) as caught:
        load(folder)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert len(line) < 800
    return line


def with_header(content, change):
    """A safetensors file whose header was changed, its length with it."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def of_tensor(**changes):
    return lambda header: header["norm_f.weight"].update(changes)


class Attack:
    """What unpickling would call."""

    def __reduce__(self):
        return (os.mkdir, (os.environ["ATTACKED"],))


def zipped(content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return file.getvalue()


OVERLAPPING = of_tensor(data_offsets=[0, 128])
TAMPERED = {
    "empty": lambda content: b"",
    "seven bytes": lambda content: content[:7],
    "half of its header": lambda content: content[:200],
    "without its last byte": lambda content: content[:-1],
    "with a byte more": lambda content: content + b"\0",
    "a header of 2 ** 60 bytes": lambda content: struct.pack("<Q", 2**60) + content[8:],
    "a header that is no JSON": lambda content: content[:8] + b"[" + content[9:],
    "tensors that overlap": lambda content: with_header(content, OVERLAPPING),
    "a tensor beyond the end": lambda content: with_header(content, of_tensor(data_offsets=[2**40, 2**40 + 128])),
    "a tensor of 2 ** 62 numbers": lambda content: with_header(content, of_tensor(shape=[2**31, 2**31])),
    "a negative size": lambda content: with_header(content, of_tensor(shape=[-32])),
    "an unknown type": lambda content: with_header(content, of_tensor(dtype="F128")),
    "a pickle": lambda content: pickle.dumps(Attack()),
    "a checkpoint of PyTorch": lambda content: zipped(pickle.dumps(Attack())),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_file_that_is_no_safetensors(folder, kind, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTACKED", str(tmp_path / "attacked"))
    weights = folder / "model.safetensors"
    weights.write_bytes(TAMPERED[kind](weights.read_bytes()))
    assert str(weights) in refusal(folder)
    assert not (tmp_path / "attacked").exists()


@settings(max_examples=MORE or 60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_any_bytes_of_the_header(folder, original, changes, cut):
    content = bytearray((original / "model.safetensors").read_bytes())
    for place, value in changes:
        content[place] = value
    (folder / "model.safetensors").write_bytes(content[: len(content) - 64 * cut])
    try:
        model, _ = load(folder)
    except UserError as error:
        line = str(error)
    else:
        line = f"{model(torch.zeros(1, 3, 32, 32)).shape}"
    assert len(line.splitlines()) == 1


def test_tensors_of_other_models(folder):
    weights = folder / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # it may be mapped, and is rewritten
    save_file({"vit.embeddings.cls_token": torch.zeros(1, 1, 768)}, weights)
    assert "has 0 blocks but depth is 1" in refusal(folder)
    others = {"lacks 1 tensor(s): norm_f.weight": {k: v for k, v in state.items() if k != "norm_f.weight"}}
    others["has unknown 1 tensor(s): \\x1b[31mred"] = state | {"\x1b[31mred": torch.zeros(1)}
    others["norm_f.weight has shape (1, 32), the model wants (32,)"] = state | {"norm_f.weight": torch.ones(1, 32)}
    others["norm_f.weight is torch.int64, wanted floating-point"] = state | {"norm_f.weight": torch.ones(32).long()}
    for words, tensors in others.items():
        weights.write_bytes(save(tensors))
        assert words in refusal(folder)
    weights.write_bytes(save({name: tensor.half() for name, tensor in state.items()}))
    assert from_pretrained(folder).norm_f.weight.dtype == torch.float32


def test_an_index_of_shards_is_not_followed(folder):
    """Nor does anything else in the folder lead out of it."""
    secret = folder.parent / "secret.safetensors"
    (folder / "model.safetensors").rename(secret)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(secret), "../secret.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors" in refusal(folder)
    config = json.loads((folder / "config.json").read_text())
    for key in ("auto_map", "_name_or_path", "weights"):
        (folder / "config.json").write_text(json.dumps(config | {key: {"AutoModel": "../evil.Model"}}))
        assert key in refusal(folder)


@pytest.mark.parametrize(
    "name", ["../backbone", "someone/..", "some one/vim", "someone/vim/extra", "~nobody/vim", "a\0b/c"]
)
def test_names_that_lead_nowhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load(name)
    assert len(str(caught.value).splitlines()) == 1


def test_the_commands_say_it_in_a_line(folder, picture_folder, tmp_path, capsys):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for command, argv in (
        (embed, [picture_folder, tmp_path / "f.npy"]),
        (export, [tmp_path / "f.pt2", "--format=exported"]),
    ):
        assert command([str(folder), *map(str, argv)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: cannot read {weights}: ")
    assert not list(tmp_path.glob("f.*"))
