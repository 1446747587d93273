"""Real Accelerate with two processes: plain DDP and ZeRO-2 train and judge as one process does."""

import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from launch.metrics import read_metrics
from tests.launch.real import CONFIGS, ROOT, environment, extra, finish, free_port

pytestmark = pytest.mark.slow
SMALL = ["--batch_size=4", "--log_every=1", "--data.workers=0", "--trackers=[]", "--steps=2", "--checkpoint_every=1",
         "--evaluate_every=1", "--optim.base_lr=0.01", "--augment.mixup=0", "--augment.cutmix=0", "--ema_decay=0.5",
         "--model.drop_path_rate=0"]  # fmt: skip


def run(where, strategy, *argv):
    task = [str(ROOT / "finetune/main.py"), "classification", *SMALL, *argv]
    launcher = ["-m", "accelerate.commands.launch", "--quiet", "--num_processes=2",
                f"--main_process_port={free_port()}", f"--config_file={CONFIGS / strategy}.yaml"]  # fmt: skip
    where.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, *([] if strategy == "one" else launcher), *task], cwd=where, text=True, start_new_session=True,
        env=environment(**extra(strategy)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    code, printed = finish(process)
    assert code == 0, printed[-6000:]
    assert printed.strip().splitlines()
    return where / "runs/classification"


def rows(folder, key):
    return [row[key] for row in read_metrics(folder / "metrics.jsonl") if key in row]


def test_zero_2_trains_judges_and_goes_on_as_one_process(tmp_path, backbone, drawn):
    data = (f"--backbone={backbone}", f"--data.source={drawn('classification')}")
    one, two = run(tmp_path / "one", "one", *data), run(tmp_path / "two", "zero2", *data)
    shutil.rmtree(two / "checkpoints/step-00000002")
    run(tmp_path / "two", "zero2", *data, "--resume")
    assert rows(two, "val_samples") == [9, 9], "nine pictures over two processes: none counted twice"
    for key in ("loss", "val_loss"):
        assert rows(two, key) == pytest.approx(rows(one, key), rel=1e-5)
    assert rows(two, "val_top1") == rows(one, "val_top1")
    ours, theirs = (load_file(folder / "model/model.safetensors") for folder in (two, one))
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=3e-5)
