"""Features of a folder: those of `vim_backbone.load`, whole after a kill, in every form, with bad pictures named."""

import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vim_backbone.embedding.parts
import vim_backbone.embedding.work
from launch.embed import main
from launch.embedding.pages import nearest_neighbours, principal_colours
from launch.run.cli import run
from tests.launch.preloaded import Popen
from tests.launch.real import CONFIGS, ROOT, environment, finish, free_port
from vim_backbone import UserError, create_model, load
from vim_backbone.embedding.parts import Parts


@pytest.fixture
def backbone(tmp_path):
    made = create_model("vim_tiny", d_model=32, depth=2, img_size=32, num_classes=3, num_registers=1)
    return made.save_pretrained(tmp_path / "backbone")


@pytest.fixture
def broken(picture_folder):
    """The folder with one picture that cannot be read, among the others in order."""
    (picture_folder / "deep/er/2.jpg").write_bytes(b"\xff\xd8\xff no picture")
    return picture_folder


def rows_of(picture_folder):
    """Good files, in the order of the source."""
    files = [path for path in picture_folder.rglob("*") if path.is_file() and path.stat().st_size > 100]
    return sorted(files)


def test_every_feature_of_native_sizes(backbone, broken, tmp_path, capsys):
    out = tmp_path / "out/features.parquet"
    argv = [str(backbone), str(broken), str(out), "--features", "pooled", "class", "patches", "--layers", "0", "-1"]
    main([*argv, "--batch_size", "3", "--pictures", "4"])
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == str(out)
    assert "cannot use deep/er/2.jpg: " in said.err
    assert "1 of 11 pictures cannot be used" in said.err
    assert "pictures 11/11" in said.err
    model, transform = load(backbone)
    table = pq.read_table(out).to_pylist()
    files = rows_of(broken)
    assert [row["name"] for row in table] == [path.relative_to(broken).as_posix() for path in files]
    for row, path in zip(table, files, strict=True):
        with torch.no_grad():
            tokens, (first, last) = model.forward_intermediates(transform(path), output_fmt="NLC")
        rows, columns = (-(-side // 16) for side in Image.open(path).size[::-1])
        assert (row["rows"], row["columns"]) == (rows, columns)
        want = {
            "pooled": tokens[0, 0], "class": tokens[0, 0], "patches": tokens[0, 2:], "layer_0": first[0].mean(0),
            "layer_1": last[0].mean(0), "layer_0_patches": first[0], "layer_1_patches": last[0],
        }  # fmt: skip
        for name, value in want.items():
            torch.testing.assert_close(torch.tensor(row[name]), value.flatten(), rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.glob("out/*.parts"))
    for name in ("components.png", "neighbours.png"):
        assert min(Image.open(tmp_path / f"out/features_pictures/{name}").size) > 300


def test_arrays_and_tensors(backbone, picture_folder, tmp_path):
    for out, options in (("a.npy", []), ("p.npy", ["--features", "patches"]), ("s.safetensors", ["--layers", "1"])):
        main([str(backbone), str(picture_folder), str(tmp_path / out), "--size", "32", "48", *options])
    model, transform = load(backbone, size=(32, 48))
    files = rows_of(picture_folder)
    with torch.no_grad():
        tokens, (stream,) = model.forward_intermediates(torch.cat([transform(f) for f in files]), 1, output_fmt="NLC")
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "a.npy")), tokens[:, 0], **close)
    patches = torch.from_numpy(np.load(tmp_path / "p.npy"))
    torch.testing.assert_close(patches, tokens[:, 2:].unflatten(1, (2, 3)), **close)
    saved = load_file(tmp_path / "s.safetensors")
    assert saved.keys() == {"pooled", "layer_1", "index"}
    torch.testing.assert_close(saved["layer_1"], stream.mean(1), **close)
    names = (tmp_path / "s.safetensors.names.txt").read_text().splitlines()
    assert names == [path.relative_to(picture_folder).as_posix() for path in files]


def test_a_killed_command_goes_on(backbone, broken, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vim_backbone.embedding.parts, "FEWEST", 4)
    argv = [str(backbone), str(broken)]
    main([*argv, str(tmp_path / "whole.safetensors")])
    computed = []
    compute = vim_backbone.embedding.work.compute

    def killed(model, images, wanted):
        computed.extend(images)
        if len(computed) == limit:
            raise KeyboardInterrupt
        return compute(model, images, wanted)

    monkeypatch.setattr(vim_backbone.embedding.work, "compute", killed)
    out, limit = tmp_path / "killed.safetensors", 6
    killing = [*argv, str(out), "--batch_size", "1"]
    assert run(main, killing) == 130
    assert not out.exists()
    settings = json.loads((tmp_path / "killed.safetensors.parts/settings.json").read_text())
    assert settings["features"] == ["pooled"]
    computed.clear()
    limit = 0
    capsys.readouterr()
    other = ["--resume", "--size", "32"]
    for wrong, words in (
        ([], "has parts of an earlier command: --resume goes on, or --overwrite"),
        (other, "was made with other size: --overwrite begins anew"),
    ):
        assert run(main, [*killing, *wrong]) == 2
        assert words in capsys.readouterr().err
    main([*killing, "--resume"])
    assert len(computed) == 11 - 4 - (1 if "deep/er/2.jpg" not in first_part(broken) else 0)
    assert "1 of 11 pictures cannot be used" in capsys.readouterr().err
    whole, resumed = load_file(tmp_path / "whole.safetensors"), load_file(out)
    assert torch.equal(whole["index"], resumed["index"])
    torch.testing.assert_close(whole["pooled"], resumed["pooled"], rtol=1e-4, atol=1e-5)
    assert run(main, [*killing, "--resume"]) == 2
    assert "exists: choose another name, or --overwrite" in capsys.readouterr().err
    main([*killing, "--overwrite"])


@pytest.mark.slow
def test_two_processes_share_what_one_left(backbone, photo, tmp_path, monkeypatch):
    """Of three parts of 16 pictures one is there, each process computes another, and rows are in order."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(40):
        photo(32 + number % 5, 48, shift=number).save(folder / f"{number:02d}.png")
    for bad in ("20.png", "35.png"):
        (folder / bad).write_bytes(b"no picture")
    argv = [str(backbone), str(folder)]
    main([*argv, str(tmp_path / "whole.npy")])
    write, out = Parts.write, tmp_path / "shared.npy"

    def killed(parts, part, features, bad):
        features = {index: {"pooled": 2 * each["pooled"]} for index, each in features.items()}  # to know it again
        write(parts, part, features, bad)
        raise KeyboardInterrupt

    monkeypatch.setattr(Parts, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        main([*argv, str(out)])
    launcher = [sys.executable, "-m", "launch", "--num_processes=2", f"--main_process_port={free_port()}"]
    launcher += [f"--config_file={CONFIGS}/ddp.yaml", str(ROOT / "launch/embed.py")]
    environ = environment(ACCELERATE_USE_CPU="true")
    refused = Popen([*launcher, *argv, str(out)], tmp_path, environ)
    code, printed = finish(refused)
    assert code == 2
    assert printed.count("has parts of an earlier command: --resume goes on") == 1
    code, printed = finish(Popen([*launcher, *argv, str(out), "--resume"], tmp_path, environ))
    assert code == 0, printed
    for line in (
        "cannot use 20.png: no picture",
        "cannot use 35.png: no picture",
        "2 of 40 pictures cannot",
        "pictures 40/40",
        str(out),
    ):
        assert printed.count(line) == 1, printed
    whole, shared = np.load(tmp_path / "whole.npy"), np.load(out)
    whole[:16] *= 2
    np.testing.assert_allclose(shared, whole, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "shared.npy.names.txt").read_text() == (tmp_path / "whole.npy.names.txt").read_text()


def first_part(folder):
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.*"))][:4]


def test_refused_before_work(backbone, picture_folder, tmp_path):
    def refused(words, *options, out="x.npy", source=picture_folder):
        with pytest.raises(UserError, match=words):
            main([str(backbone), str(source), str(tmp_path / out), *options])

    refused("ends in '.csv': it must end in .parquet, .npy, .safetensors", out="x.csv")
    refused("holds one array, wanted are pooled, layer_1", "--layers", "1")
    refused("patches of native sizes differ: set --size", "--features", "patches")
    refused("--features has 'poolde': did you mean 'pooled'", "--features", "poolde")
    refused("--layers has 2: the backbone has 2 blocks", "--layers", "2")
    refused("nothing is wanted", "--features")
    refused("--batch_size is 0", "--batch_size", "0")
    refused("--size is .1, 2, 3.: give a side", "--size", "1", "2", "3")
    refused("does not exist", source=tmp_path / "nothing")
    only = tmp_path / "only"
    only.mkdir()
    (only / "a.jpg").write_bytes(b"\xff\xd8\xff no picture")
    refused("none of 1 pictures can be used, the first a.jpg", source=only)
    assert not (tmp_path / "x.npy").exists()


def test_principal_colours():
    """Patches on a line: the first component goes along it, from 0 to 1, and the others are alike everywhere."""
    direction = torch.nn.functional.normalize(torch.arange(1.0, 9.0), dim=0)
    places = torch.linspace(-1, 1, 12)
    maps = [torch.outer(part, direction).unflatten(0, (2, 3)) for part in places.split(6)]
    colours = torch.cat([part.flatten(0, 1) for part in principal_colours(maps)])
    expected = (places - places.quantile(0.01)) / (places.quantile(0.99) - places.quantile(0.01))
    torch.testing.assert_close(colours[:, 0], expected.clamp(0, 1).double())


def test_nearest_neighbours():
    features = torch.randn(20, 8)
    cosines, found = nearest_neighbours(features, [3, 7], 4)
    unit = (features / features.norm(dim=1, keepdim=True)).numpy().astype(np.float64)
    for row, sample in enumerate((3, 7)):
        want = [place for place in np.argsort(-(unit @ unit[sample])) if place != sample][:4]
        assert found[row].tolist() == want
        assert cosines[row, 0].item() == pytest.approx(unit[want[0]] @ unit[sample], abs=1e-6)


def test_a_patch_of_a_backbone_with_a_token_for_each_channel_is_their_mean(picture_folder, tmp_path):
    model = create_model("vim_tiny", d_model=32, depth=2, img_size=32, num_classes=0, channels="tokens")
    folder = model.save_pretrained(tmp_path / "tokens")
    out = tmp_path / "f.npy"
    main([str(folder), str(picture_folder), str(out), "--size", "32", "--features", "patches"])
    model, transform = load(folder, size=32)
    images = torch.cat([transform(path) for path in rows_of(picture_folder)])
    with torch.no_grad():
        tokens = model.forward_features(images)[:, 1:]
    want = tokens.reshape(len(images), 2, 2, 3, 32).mean(3)
    torch.testing.assert_close(torch.from_numpy(np.load(out)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["gpu", "cuda"])
def test_a_device_that_is_not_there(device, backbone, picture_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: exec("raise AssertionError('no CUDA')"))
    with pytest.raises(UserError, match=f"--device {device} cannot be used"):
        main([str(backbone), str(picture_folder), str(tmp_path / "f.npy"), "--device", device])
