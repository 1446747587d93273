"""Real Accelerate with two processes: DDP, ZeRO-2 and ZeRO-3 train and judge as one process does."""

import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.launch.preloaded import Popen
from tests.launch.real import ACCELERATE, CONFIGS, ROOT, environment, extra, finish, free_port
from tests.rows import read_metrics

pytestmark = pytest.mark.slow
SMALL = ["--batch_size=4", "--log_every=1", "--data.workers=0", "--trackers=[]", "--steps=2", "--checkpoint_every=1",
         "--evaluate_every=1", "--optim.base_lr=0.01", "--ema_decay=0.5", "--model.drop_path_rate=0"]  # fmt: skip
PLAIN = ["--augment.mixup=0", "--augment.cutmix=0"]


def run(where, strategy, task, *argv):
    command = [str(ROOT / "finetune/main.py"), task, *SMALL, *argv]
    launcher = [*ACCELERATE, "--quiet", "--num_processes=2",
                f"--main_process_port={free_port()}", f"--config_file={CONFIGS / strategy}.yaml"]  # fmt: skip
    where.mkdir(exist_ok=True)
    whole = [*([sys.executable] if strategy == "one" else launcher), *command]
    code, printed = finish(Popen(whole, where, environment(**extra(strategy))))
    assert code == 0, printed[-6000:]
    assert printed.strip().splitlines()
    return where / f"runs/{task}"


def rows(folder, key):
    return [row[key] for row in read_metrics(folder / "metrics.jsonl") if key in row]


def same_model(ours, theirs):
    tensors = (load_file(folder / "model/model.safetensors") for folder in (ours, theirs))
    torch.testing.assert_close(*tensors, rtol=2e-3, atol=3e-5)


def test_zero_2_trains_judges_and_goes_on_as_one_process(tmp_path, backbone, sample_data):
    data = ("classification", f"--backbone={backbone}", f"--data.source={sample_data('classification')}", *PLAIN)
    one, two = run(tmp_path / "one", "one", *data), run(tmp_path / "two", "zero2", *data)
    shutil.rmtree(two / "checkpoints/step-00000002")
    run(tmp_path / "two", "zero2", *data, "--resume")
    assert rows(two, "val_samples") == [9, 9], "nine pictures over two processes: none counted twice"
    for key in ("loss", "val_loss"):
        assert rows(two, key) == pytest.approx(rows(one, key), rel=1e-5)
    assert rows(two, "val_top1") == rows(one, "val_top1")
    same_model(two, one)


def wide(folder):
    """Every second picture for validation three times as wide, so that its windows are more."""
    for path in sorted((folder / "images/validation").iterdir())[::2]:
        for file in (path, folder / "annotations/validation" / f"{path.stem}.png"):
            with Image.open(file) as image:
                pixels = np.asarray(image)
            Image.fromarray(np.concatenate([pixels] * 3, axis=1)).save(file)


def test_zero_3_segments_although_processes_have_other_numbers_of_windows(tmp_path, backbone, sample_data):
    folder = shutil.copytree(sample_data("segmentation"), tmp_path / "data")
    wide(folder)
    head = ("--head.channels=16", "--head.auxiliary_channels=16", "--head.dropout=0", "--test.flip=true")
    data = ("segmentation", f"--backbone={backbone}", f"--data.source={folder}", *head)
    one, two = run(tmp_path / "one", "one", *data), run(tmp_path / "two", "zero3", *data)
    assert rows(two, "val_samples") == [9, 9]
    # a process averages over its own labelled pixels, which are not as many as another's
    assert rows(two, "loss") == pytest.approx(rows(one, "loss"), rel=1e-2)
    for key in ("val_mIoU", "val_aAcc"):
        assert rows(two, key) == pytest.approx(rows(one, key), abs=1e-3)


def test_detection_is_the_same_under_ddp_and_zero_3(tmp_path, backbone, sample_data):
    """Which proposals are sampled depends on the process, so that losses are not those of one process."""
    head = ("--head.channels=16", "--head.box_width=32", "--head.proposals=50", "--head.samples=16")
    data = ("detection", f"--backbone={backbone}", f"--data.source={sample_data('detection')}", *head)
    ddp, zero = (run(tmp_path / strategy, strategy, *data) for strategy in ("ddp", "zero3"))
    assert rows(zero, "val_samples") == rows(ddp, "val_samples") == [9, 9]
    for key in ("loss", "loss_mask", "val_box_AP", "val_mask_AP"):
        assert rows(zero, key) == pytest.approx(rows(ddp, key), rel=1e-4)
    same_model(zero, ddp)


def test_zero_3_trains_the_head_alone_as_one_process(tmp_path, backbone, sample_data):
    data = ("classification", f"--backbone={backbone}", f"--data.source={sample_data('classification')}", *PLAIN,
            "--model.freeze=true")  # fmt: skip
    one, three = run(tmp_path / "one", "one", *data), run(tmp_path / "three", "zero3", *data)
    for key in ("loss", "grad_norm", "val_loss"):
        assert rows(three, key) == pytest.approx(rows(one, key), rel=1e-4)
    same_model(three, one)
    before, after = load_file(backbone / "model.safetensors"), load_file(three / "backbone/model.safetensors")
    for name in before.keys() & after.keys():
        assert torch.equal(before[name], after[name]), name
