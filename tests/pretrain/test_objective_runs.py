"""Whole runs of the objectives beside MAE: they learn, resume exactly, and publish a backbone like any other."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.run.cli import parse
from pretrain.config import PretrainConfig
from pretrain.train import pretrain
from tests.rows import read_metrics
from tests.teachers import write_teacher
from vim_backbone import UserError, from_pretrained

SMALL = ["--model.img_size=32", "--model.depth=2", "--batch_size=4", "--optim.warmup_steps=1", "--log_every=1",
         "--data.workers=0", "--trackers=[]"]  # fmt: skip
OTHERS = ["nepa", "ar", "distill"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    teacher = write_teacher(tmp_path_factory.mktemp("teachers") / "vit")

    def parsed(folder, objective, *argv):
        own = [f"--distill.teacher={teacher}"] if objective == "distill" else []
        return parse(PretrainConfig, [*SMALL, f"--objective={objective}", *own, f"--out={folder}", *argv], "", "")

    return parsed


def losses(folder):
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in read_metrics(folder / "metrics.jsonl")}


def test_a_teacher_whose_weights_are_torn_is_one_line_before_any_work(config, tmp_path):
    teacher = Path(config(tmp_path, "distill").distill.teacher.removeprefix("local-dir:"))
    torn = shutil.copytree(teacher, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="torn': its weights cannot be read") as caught:
        pretrain(config(tmp_path / "runs", "distill", "--steps=1", f"--distill.teacher=local-dir:{torn}"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs/pretrain").exists()


@pytest.mark.parametrize("objective", OTHERS)
def test_it_learns(objective, config, tmp_path):
    """Of the same views at every step, so that nothing but learning changes the loss."""
    same = ("--batch_size=12", "--data.min_scale=1", "--data.flip=false")
    curve = losses(pretrain(config(tmp_path, objective, "--steps=12", "--optim.base_lr=0.05", *same)))
    assert curve[12][0] < curve[1][0] - 0.2


EVERYTHING = ("--accumulation=2", "--ema_decay=0.9", "--model.drop_path_rate=0.5", "--precision=bf16")
PACKED = ("--data.sizes=native", "--data.batch_by=patches", "--model.patch_size=8")
STAGES = ("--stages=[{until: 0.5, img_size: 16}, {}]",)


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        pytest.param("nepa", EVERYTHING, id="nepa, everything"),
        pytest.param("nepa", (*PACKED, "--model.channels=tokens"), id="nepa, packed"),
        pytest.param("nepa", STAGES, id="nepa, stages"),
        pytest.param("ar", (*EVERYTHING, "--ar.cluster=2"), id="ar, everything"),
        pytest.param("ar", PACKED, id="ar, packed"),
        pytest.param("distill", EVERYTHING, id="distill, everything"),
        pytest.param("distill", (*PACKED, "--distill.at=hidden", "--model.scan=pooled"), id="distill, packed"),
        pytest.param("distill", (*STAGES, "--distill.at=whole"), id="distill, stages"),
    ],
)
def test_resume_is_exact(objective, options, config, tmp_path):
    options = ["--steps=4", "--checkpoint_every=2", *options]
    whole = pretrain(config(tmp_path / "whole", objective, *options))
    cut = tmp_path / "cut/pretrain"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints/step-00000004")
    shutil.rmtree(cut / "backbone")
    pretrain(config(tmp_path / "cut", objective, "--resume", *options))
    assert losses(cut) == losses(whole)
    last = "checkpoints/step-00000004/model.safetensors"
    torch.testing.assert_close(load_file(cut / last), load_file(whole / last), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("objective", "unused", "others"),
    [
        ("nepa", "mask.ratio", "mae and distill"),
        ("ar", "mask.ratio", "mae and distill"),
        ("distill", "mae.gap_aware", "mae"),
    ],
)
def test_what_a_run_leaves_behind(objective, unused, others, config, tmp_path):
    """Its backbone scans in both directions, as any other; what another objective would need is said to be unused."""
    value = {"mask.ratio": 0.5, "mae.gap_aware": True}[unused]
    folder = pretrain(config(tmp_path, objective, "--steps=2", f"--{unused}={value}"))
    assert [path.name for path in (folder / "predictions").iterdir()] == ["step-00000002.png"]
    assert (folder / "report.html").read_text().count("data:image/webp") == 2, "predictions, and features"
    assert (
        f"{unused} {value} is a setting of objective {others}, which {objective} does not use"
        in (folder / "log.jsonl").read_text()
    )
    backbone = from_pretrained(folder / "backbone")
    trained = {k[8:]: v for k, v in load_file(folder / "checkpoints/step-00000002/model.safetensors").items()}
    torch.testing.assert_close(backbone.state_dict(), {k: trained[k] for k in backbone.state_dict()}, rtol=0, atol=0)
    first = torch.randn(1, 3, 32, 32)
    second = first.clone()
    second[..., -8:, -8:] += 1  # the last patch, which the features of the first one see
    with torch.no_grad():
        features, others = (backbone.forward_features(images)[0, 1] for images in (first, second))
    assert not torch.equal(features, others)
    with pytest.raises(UserError, match=f"was trained with objective = {objective}, not mae"):
        pretrain(config(tmp_path, "mae", "--steps=3", "--resume"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--objective=nipa"], "objective is nipa: it must be one of mae, nepa, ar, distill"),
        (["--objective=nepa", "--model.scan=pooled"], "model.scan is 'pooled': objective nepa predicts patches"),
        (["--objective=ar", "--model.channels=tokens"], "model.channels is 'tokens': objective ar rebuilds patches"),
        (["--objective=distill"], "distill.teacher is '': objective distill learns the features of a model of timm"),
        (["--objective=ar", "--ar.cluster=0"], "ar.cluster is 0: it must be at least 1 patch, or null"),
        (["--objective=nepa", "--model.img_size=8"], r"model.img_size is \[8, 8\]: objective nepa needs two patches"),
        (
            ["--objective=nepa", "--model.img_size=64", "--stages=[{until: 0.5, img_size: 8}, {}]"],
            r"stages\[0\]: model.img_size is \[8, 8\]",
        ),
    ],
)
def test_mistakes_get_one_line_before_any_work(argv, words):
    with pytest.raises(UserError, match=words):
        parse(PretrainConfig, argv, "", "")
