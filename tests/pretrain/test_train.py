"""Whole runs: what they leave behind, that they learn, and that stopping anywhere changes nothing."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import joblib
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from launch.run.cli import parse
from launch.run.signals import Stopped, StopRequest
from pretrain.config import PretrainConfig
from pretrain.train import build_model, pretrain
from tests.launch.preloaded import Popen
from tests.launch.real import ACCELERATE, NO_COMPILER, environment, rows_written
from tests.rows import read_metrics
from tests.waiting import LIMIT, wait_for
from vim_backbone import UserError, from_pretrained

ROOT = Path(__file__).parents[2]
SMALL = ["--model.img_size=32", "--model.depth=2", "--decoder.width=32", "--decoder.depth=1", "--batch_size=4",
         "--optim.warmup_steps=1", "--log_every=1", "--data.workers=0", "--trackers=[]"]  # fmt: skip


def config(folder, *argv):
    return parse(PretrainConfig, [*SMALL, f"--out={folder}", *argv], "pretrain/main.py", "")


def losses(folder):
    return {row["step"]: (row["loss"], row["grad_norm"], row["lr"]) for row in read_metrics(folder / "metrics.jsonl")}


def weights(folder, step, part="model"):
    return load_file(folder / f"checkpoints/step-{step:08d}/{part}.safetensors")


def test_what_a_run_leaves_behind(tmp_path, picture_folder):
    folder = pretrain(
        config(
            tmp_path, "--steps=4", "--picture_every=2", f"--data.source={picture_folder}", "--trackers=[tensorboard]"
        )
    )
    assert folder == tmp_path / "pretrain"
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    fields = {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "images_per_second",
        "tokens_per_second",
        "data_wait_share",
        "memory_gb",
    }
    assert rows[0].keys() == fields
    assert 0 <= rows[0]["data_wait_share"] <= 1
    assert rows[3]["tokens_per_second"] == pytest.approx(4 * rows[3]["images_per_second"])  # 4 of 16 patches are seen
    assert list(folder.rglob("events.out.tfevents.*"))
    pictures = sorted(p.name for p in (folder / "reconstructions").iterdir())
    assert pictures == ["step-00000002.png", "step-00000004.png"]
    with Image.open(folder / "reconstructions/step-00000004.png") as image:
        assert image.width > 600
    assert config(tmp_path, "--config", str(folder / "config.yaml")).data.source == str(picture_folder)
    assert "step-00000004" not in (folder / "report.html").read_text()  # pictures are in it, and no links to them
    assert (folder / "report.html").read_text().count("data:image/webp") == 4  # of reconstructions and of features
    assert sorted(p.name for p in (folder / "features").iterdir()) == pictures


def test_every_line_of_a_run_is_kept_with_its_step(tmp_path):
    folder = pretrain(config(tmp_path, "--steps=2", "--checkpoint_every=1"))
    pretrain(config(tmp_path, "--steps=3", "--resume"))
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("start")] == [0, 2]
    lines = {row["line"]: row["step"] for row in rows}
    assert lines["resumed with another steps: 2 -> 3"] == 2
    assert [step for line, step in lines.items() if "steps done" in line] == [2, 3]


def test_what_ended_a_run_is_kept(tmp_path, monkeypatch):
    def fail(run, batch):
        raise UserError("the pictures are gone")

    monkeypatch.setattr("pretrain.train.checked", fail)
    with pytest.raises(UserError):
        pretrain(config(tmp_path, "--steps=2"))
    rows = [json.loads(line) for line in (tmp_path / "pretrain/log.jsonl").read_text().splitlines()]
    assert rows[-1]["line"] == "ended: the pictures are gone"


def test_the_published_backbone_is_the_one_that_was_trained(tmp_path):
    folder = pretrain(config(tmp_path, "--steps=2", "--ema_decay=0.5", "--model.num_registers=2"))
    backbone = from_pretrained(folder / "backbone")
    trained = {k[8:]: v for k, v in weights(folder, 2, "ema").items() if k.startswith("encoder.")}
    torch.testing.assert_close(backbone.state_dict(), trained, rtol=0, atol=0)
    model = build_model(config(tmp_path, "--steps=2", "--model.num_registers=2"))
    model.load_state_dict(weights(folder, 2, "ema"))
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(backbone.forward_features(images), model.encoder.eval().forward_features(images))
    card = (folder / "backbone/README.md").read_text()
    assert "2 steps of 4 pictures, 32 x 32, 75% of the patches hidden" in card


def test_it_learns(tmp_path):
    folder = pretrain(config(tmp_path, "--steps=60", "--optim.base_lr=0.02", "--batch_size=16"))
    curve = [loss for loss, _, _ in losses(folder).values()]
    assert sum(curve[-5:]) / 5 < 0.8 * sum(curve[:3]) / 3


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="plain"),
        pytest.param(
            (
                "--accumulation=2",
                "--ema_decay=0.9",
                "--model.drop_path_rate=0.5",
                "--data.workers=2",
                "--optim.clip_grad=1",
            ),
            id="everything",
        ),
        pytest.param(("--precision=bf16", "--mask.kind=block"), id="bf16"),
        pytest.param(("--data.sizes=native", "--model.patch_size=8", "--picture_every=2"), id="native sizes"),
        pytest.param(("--model.scan=pooled", "--data.sizes=native", "--model.patch_size=8"), id="pooled"),
    ],
)
def test_resume_is_exact(tmp_path, options):
    whole = pretrain(config(tmp_path / "whole", "--steps=6", "--checkpoint_every=2", *options))
    cut = tmp_path / "cut/pretrain"
    shutil.copytree(whole, cut)
    for step in (4, 6):
        shutil.rmtree(cut / f"checkpoints/step-{step:08d}")
    shutil.rmtree(cut / "backbone")
    pretrain(config(tmp_path / "cut", "--steps=6", "--checkpoint_every=2", "--resume", *options))
    assert losses(cut) == losses(whole)
    parts = ["model", "optimizer", *(["ema"] if "--ema_decay=0.9" in options else [])]
    for part in parts:
        torch.testing.assert_close(weights(cut, 6, part), weights(whole, 6, part), rtol=0, atol=0)


def test_a_stream_resumes_exactly_on_a_machine_with_other_cores(tmp_path, picture_folder, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    cells = [{"bytes": path.read_bytes(), "path": None} for path in sorted(picture_folder.rglob("*.*"))]
    rows = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()}))
    rows.to_parquet(tmp_path / "rows.parquet")
    stream = ("--steps=4", "--checkpoint_every=2", f"--data.source={tmp_path}/rows.parquet", "--data.streaming=true")

    def train(name, cores, *argv):
        monkeypatch.setattr(joblib, "cpu_count", lambda: cores)
        folder = pretrain(config(tmp_path / name, *stream, "--data.workers=null", *argv))
        return folder, " ".join(capsys.readouterr().err.split())

    whole, printed = train("whole", 4)
    assert "fp32, data.workers 3" in printed
    for name in ("cut", "told"):
        shutil.copytree(whole, tmp_path / name / "pretrain")
        shutil.rmtree(tmp_path / name / "pretrain/checkpoints/step-00000004")
    cut, printed = train("cut", 1, "--resume")
    assert "fp32, data.workers 3" in printed
    assert "not go on exactly" not in printed
    assert losses(cut) == losses(whole)
    told, printed = train("told", 1, "--resume", "--data.workers=1")
    assert "was read by 1 x 3 processes and is by 1 x 1 now: it does not go on exactly" in printed
    assert losses(told) != losses(whole)


def test_a_pooled_run_publishes_what_fine_tuning_needs(tmp_path):
    folder = pretrain(config(tmp_path, "--model.scan=pooled", "--mask.ratio=0.5", "--steps=1"))
    published = from_pretrained(folder / "backbone").config
    assert (published.scan, published.visible_share, published.global_pool) == ("pooled", 0.5, "avg")


def test_another_seed_is_another_run(tmp_path):
    a = pretrain(config(tmp_path / "a", "--steps=2"))
    b = pretrain(config(tmp_path / "b", "--steps=2", "--seed=1"))
    assert losses(a) != losses(b)


def test_accumulation_follows_the_same_curve(tmp_path):
    a = pretrain(config(tmp_path / "a", "--steps=4"))
    b = pretrain(config(tmp_path / "b", "--steps=4", "--accumulation=4"))
    for step, (loss, norm, rate) in losses(a).items():
        assert losses(b)[step] == (pytest.approx(loss, rel=1e-4), pytest.approx(norm, rel=1e-3), rate)


def test_an_interrupt_saves_and_resume_goes_on(tmp_path, monkeypatch):
    whole = pretrain(config(tmp_path / "whole", "--steps=5"))
    calls = {"left": 2}

    def received(self):
        calls["left"] -= 1
        return signal.SIGTERM if calls["left"] <= 0 else None

    monkeypatch.setattr(StopRequest, "received", property(received, lambda self, value: None), raising=False)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM at step 2 of 5, saved in .*step-00000002"):
        pretrain(config(tmp_path / "cut", "--steps=5"))
    monkeypatch.undo()
    cut = pretrain(config(tmp_path / "cut", "--steps=5", "--resume"))
    assert losses(cut) == losses(whole)


def test_another_architecture_is_refused_on_resume(tmp_path):
    pretrain(config(tmp_path, "--steps=1"))
    with pytest.raises(UserError, match=r"was trained with model\.depth = 2, not 3"):
        pretrain(config(tmp_path, "--steps=2", "--resume", "--model.depth=3"))


def test_bad_pictures_among_good_ones_are_named_in_the_run(tmp_path, picture_folder):
    (picture_folder / "broken.jpg").write_bytes(b"broken")
    folder = pretrain(config(tmp_path, "--steps=4", f"--data.source={picture_folder}"))
    assert (folder / "bad_pictures.txt").read_text().startswith("broken.jpg\t")


def command(*argv, launcher=()):
    return [*ACCELERATE, "--quiet", *launcher, str(ROOT / "pretrain/main.py"), *SMALL, *argv]


@pytest.mark.slow
def test_the_command_prints_the_folder_last(tmp_path):
    process = Popen(command("--steps=2"), tmp_path, environment())
    out, err = process.communicate(LIMIT)
    assert process.returncode == 0, err
    assert out.strip().splitlines()[-1] == "runs/pretrain"
    assert "step 2/2" in err
    assert (tmp_path / "runs/pretrain/backbone/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.skipif(NO_COMPILER, reason="torch.compile makes C++ of the model, and there is no C++ compiler")
def test_the_compiled_model_follows_the_same_curve(tmp_path):
    argv = command("--steps=3", launcher=("--dynamo_backend=inductor", "--dynamo_mode=reduce-overhead"))
    environ = environment(TORCH_LOGS="graph_breaks")
    done = subprocess.run(argv, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "graph break" not in done.stderr.lower()
    plain = losses(pretrain(config(tmp_path / "plain", "--steps=3")))
    for step, (loss, norm, rate) in losses(tmp_path / "runs/pretrain").items():
        assert plain[step] == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4), rate)


def test_native_sizes_are_not_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(UserError, match=r"data\.sizes is 'native'.*--dynamo_backend no"):
        pretrain(config(tmp_path, "--data.sizes=native"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_real_command(tmp_path, number):
    argv = [sys.executable, str(ROOT / "pretrain/main.py"), *SMALL, "--steps=2000", "--data.workers=1"]
    process = Popen(argv, tmp_path, environment())
    folder = tmp_path / "runs/pretrain"
    wait_for(lambda: rows_written(folder) >= 3, "three steps", process)
    process.send_signal(number)
    _, printed = process.communicate(timeout=LIMIT)
    assert process.returncode == 128 + number, printed
    assert f"stopped by {number.name} at step" in printed
    assert "Traceback" not in printed
    saved = json.loads(next((folder / "checkpoints").glob("*/state.json")).read_text())
    assert saved["step"] == rows_written(folder)


@pytest.mark.slow
def test_a_mistake_in_the_real_command_is_one_line(tmp_path):
    argv = [sys.executable, str(ROOT / "pretrain/main.py"), "--data.source", "nowhere"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: data.source nowhere does not exist")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_full_disk_for_real(tmp_path):
    """A limit on the size of files stands for the full disk: the write itself fails, in the library that writes."""
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000)); sys.argv = sys.argv[1:];"
        "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    argv = [sys.executable, "-c", limited, str(ROOT / "pretrain/main.py"), *SMALL, "--steps=2"]
    environ = environment(NUMBA_CACHE_DIR=str(tmp_path / "cache"), VIM_KERNELS_BACKEND="reference")
    done = subprocess.run(argv, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "checkpoint at step 2 not saved" in done.stderr
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "runs/pretrain/checkpoints").iterdir())
