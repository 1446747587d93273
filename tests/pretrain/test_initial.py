"""A run that starts from weights: what is taken up, what is resampled, and what does not fit."""

import re

import pytest
import torch
from timm.layers.patch_embed import resample_patch_embed

from launch.run.cli import argument_value, parse
from pretrain.config import PretrainConfig
from pretrain.initial import initial_weights, model_arguments, parse_run
from pretrain.train import pretrain
from vim_backbone import Preprocessing, UserError, create_model, from_pretrained
from vim_backbone.pretrained import resample_patches

SMALL = ["--decoder.width=32", "--decoder.depth=1", "--batch_size=4", "--optim.warmup_steps=1", "--log_every=1",
         "--data.workers=0", "--trackers=[]", "--steps=1"]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(3)
    model = create_model("vim_tiny", img_size=32, depth=2, patch_size=8, num_registers=2)
    return model.save_pretrained(tmp_path / "weights")


def config(out, folder, *argv):
    implied = model_arguments(str(folder))
    return parse(PretrainConfig, [*implied, *SMALL, f"--out={out}", f"--init={folder}", *argv], "", "")


def test_the_architecture_and_the_weights_are_those_of_the_folder(folder, tmp_path):
    given = config(tmp_path, folder, "--optim.base_lr=1e-20")  # no weight moves
    assert given.architecture().position == "learned"  # as official weights have them
    published = pretrain(given) / "backbone"
    before, after = from_pretrained(folder, num_classes=0), from_pretrained(published)
    assert after.config == before.config
    torch.testing.assert_close(after.state_dict(), before.state_dict(), rtol=0, atol=1e-18)
    assert f"from the weights of {folder}" in (published / "README.md").read_text()


def test_a_run_goes_on_from_what_another_published(tmp_path):
    options = [*SMALL, f"--out={tmp_path}", "--model.depth=2", "--model.img_size=32", "--name=first"]
    first = pretrain(parse(PretrainConfig, options, "", ""))
    given = config(tmp_path, first)
    assert (given.model.depth, given.model.img_size, given.model.patch_size) == (2, (32, 32), 8)
    tensors, (line,) = initial_weights(str(first), given.architecture(), given.data.preprocessing)
    torch.testing.assert_close(tensors, from_pretrained(first / "backbone").state_dict(), rtol=0, atol=0)
    assert line == f"starts from {first}/backbone: all blocks as they are, what is not published (a decoder) fresh"


def test_patches_positions_and_bands_are_resampled_and_named(folder, tmp_path):
    given = config(tmp_path, folder, "--model.patch_size=4", "--model.img_size=48", "--data.bands=[0,1,2,3]",
                   "--data.range=type")  # fmt: skip
    tensors, (line,) = initial_weights(str(folder), given.architecture(), given.data.preprocessing)
    assert tensors["patch_embed.proj.weight"].shape == (192, 4, 4, 4)
    assert tensors["pos_embed"].shape == (1, 12 * 12 + 1, 192)
    assert "patches resampled from 8 to 4 pixels" in line
    assert "positions resampled from 4 x 4 to 12 x 12 patches" in line
    assert "first convolution adapted from 3 to 4 bands" in line
    assert "classifier left out" in line


def test_larger_patches_give_the_tokens_of_the_smaller_ones_they_were_made_of():
    weight = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    patch = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    larger = torch.nn.functional.interpolate(patch, size=(7, 7), mode="bicubic", antialias=True)
    tokens = torch.einsum("bcyx,dcyx->bd", patch, weight)
    torch.testing.assert_close(torch.einsum("bcyx,dcyx->bd", larger, resample_patches(weight, 7)), tokens)


@pytest.mark.parametrize("side", [3, 8, 14])
def test_patches_are_resampled_as_timm_does(side):
    weight = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = resample_patch_embed(weight, [side, side])
    torch.testing.assert_close(resample_patches(weight, side), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"d_state": 8}, "has d_state 8: pretraining knows 16 alone"),
        ({"d_model": 100}, r"has d_model 100, which no size has: pretraining knows 192 \(vim_tiny\)"),
    ],
)
def test_weights_that_no_run_could_publish(change, words, tmp_path):
    create_model("vim_tiny", **({"img_size": 32, "depth": 1, "patch_size": 8} | change)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=words):
        model_arguments(str(tmp_path))


def test_what_does_not_fit_is_said_before_the_run_has_a_folder(folder, tmp_path):
    for argv, words in (
        (["--model.depth=3"], "has depth 2, and the run 3: leave model.depth out"),
        (["--model.name=vim_small"], "has d_model 192, and the run 384: leave model.name out"),
        (["--model.class_token=first"], "has class_token middle, and the run first: leave model.class_token out"),
    ):
        with pytest.raises(UserError, match=words):
            pretrain(config(tmp_path / "runs", folder, *argv))
    with pytest.raises(UserError, match="the folder does not exist"):
        model_arguments(str(tmp_path / "nowhere"))
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))} is a checkpoint: its run goes on with --resume"):
        model_arguments(str(tmp_path))
    assert not (tmp_path / "runs").exists()


def test_the_command_line_and_its_files_say_where_weights_are(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("init: here\n")
    assert argument_value(["--config", str(file)], "init") == "here"
    assert argument_value([f"--config={file}", "--init", "there"], "init") == "there"
    assert argument_value(["--init=there", "--steps", "3"], "init") == "there"
    assert argument_value([f"--config={file}", "--init", "null"], "init") is None
    assert argument_value(["--steps", "3"], "init") is None


def test_where_each_band_is_a_token_it_keeps_its_embedding(tmp_path):
    torch.manual_seed(3)
    model = create_model("vim_tiny", img_size=32, depth=1, patch_size=8, in_chans=4, channels="tokens")
    of_bands = Preprocessing(mean=(0.5,) * 4, std=(0.2,) * 4, bands=(0, 1, 2, 3), dtype="uint8", range="type")
    folder = model.save_pretrained(tmp_path / "tokens", preprocessing=of_bands)
    given = config(tmp_path, folder, "--data.bands=[3,1]", "--data.range=type")
    tensors, (line,) = initial_weights(str(folder), given.architecture(), given.data.preprocessing)
    torch.testing.assert_close(tensors["channel_embed"], model.channel_embed.detach()[:, [3, 1]], rtol=0, atol=0)
    assert "embeddings of 2 of 4 bands" in line
    given = config(tmp_path, folder, "--data.bands=[0,1,2,7]", "--data.range=type")
    with pytest.raises(UserError, match="has band 7"):
        initial_weights(str(folder), given.architecture(), given.data.preprocessing)


def test_a_resumed_run_needs_no_weights(folder, tmp_path):
    command = [*SMALL, f"--out={tmp_path}", f"--init={folder}", "--name=first"]
    run = pretrain(parse_run(PretrainConfig, command, "", ""))
    folder.rename(tmp_path / "gone")
    with pytest.raises(UserError, match="the folder does not exist"):
        parse_run(PretrainConfig, command, "", "")
    again = [f"--config={run}/config.yaml", "--steps=2", "--resume"]
    pretrain(parse_run(PretrainConfig, again, "", ""))
    assert from_pretrained(run / "backbone").config.num_registers == 2
