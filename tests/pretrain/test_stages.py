"""Runs in stages, and batches that count patches: order, sizes, resume, and what is refused."""

import io
import json
import shutil

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from launch.data.order import BatchPlan, Passes
from launch.data.sources import open_source
from launch.run.accelerator import build_accelerator
from launch.run.cli import parse
from launch.run.optim import learning_rate
from launch.run.progress import ProgressReport
from pretrain import plan as planner
from pretrain.config import PretrainConfig
from pretrain.data import DataConfig, View, build_loader
from pretrain.mae.objective import MAE
from pretrain.packs import Packs, PackSampler, balanced
from pretrain.stages import Stage, StageSampler, pixels_of
from pretrain.train import level_of_all_stages, pretrain
from tests.launch.real import losses as losses_of
from tests.launch.real import run as run_command
from tests.pretrain.test_train import config, losses, weights
from tests.rows import read_metrics
from vim_backbone import UserError, from_pretrained
from vim_backbone.position import resize_table, sincos_table
from vim_backbone.tokens import TokenLayout

GROWING = "--stages=[{until: 0.5, img_size: 16}, {batch_size: 2}]"
NATIVE = ("--data.sizes=native", "--data.batch_by=patches", "--data.min_scale=0.05", "--model.img_size=64",
          "--model.patch_size=8")  # fmt: skip
"""Of the pictures of `picture_folder`, 40 x 60 pixels, all views are smaller."""


def stages(*sizes, accumulation=1, world=1, rank=0):
    """Of (steps, side, batch)."""
    made, steps, samples = [], 0, 0
    for number, (count, side, batch) in enumerate(sizes):
        plan = BatchPlan(batch, accumulation, world, rank)
        made.append(Stage(range(steps, steps + count), (side, side), plan, number + 1, samples))
        steps, samples = steps + count, samples + count * batch
    return made


def test_what_a_run_in_stages_leaves_behind(tmp_path, capsys):
    folder = pretrain(config(tmp_path, "--steps=4", GROWING, "--data.sizes=fixed"))
    rows = read_metrics(folder / "metrics.jsonl")
    assert [(row["stage"], row["height"], row["width"]) for row in rows] == [(1, 16, 16)] * 2 + [(2, 32, 32)] * 2
    optim = config(tmp_path).optim
    assert [row["lr"] for row in rows] == [
        learning_rate(step, optim, batch, 4) for step, batch in enumerate((4, 4, 2, 2))
    ]
    assert rows[3]["tokens_per_second"] == pytest.approx(4 * rows[3]["images_per_second"])  # 4 of 16 patches are seen
    published = from_pretrained(folder / "backbone")
    assert published.config.img_size == (32, 32)
    assert (
        "2 steps of 4 pictures, 16 x 16, then 2 steps of 2 pictures, 32 x 32"
        in (folder / "backbone/README.md").read_text()
    )
    printed = " ".join(capsys.readouterr().err.split())
    assert "stage 1 of 2, steps 1 to 2: 4 pictures, 16 x 16" in printed
    assert "stage 2 of 2, steps 3 to 4: 2 pictures, 32 x 32" in printed
    assert config(tmp_path, "--config", str(folder / "config.yaml")) == config(tmp_path, "--steps=4", GROWING)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--accumulation=2", "--ema_decay=0.9", "--guard.spike=9"), id="fixed"),
        pytest.param((*NATIVE, "--data.workers=1"), id="patches"),
    ],
)
def test_resume_is_exact_in_every_stage_and_between(tmp_path, picture_folder, options):
    options = (
        f"--data.source={picture_folder}",
        "--steps=4",
        "--checkpoint_every=1",
        "--keep_checkpoints=4",
        GROWING,
        *options,
    )
    whole = pretrain(config(tmp_path / "whole", *options))
    for step in (1, 2, 3):  # the border is after 2
        cut = tmp_path / f"cut{step}/pretrain"
        shutil.copytree(whole, cut, ignore=shutil.ignore_patterns("backbone"))
        for later in range(step + 1, 5):
            shutil.rmtree(cut / f"checkpoints/step-{later:08d}")
        pretrain(config(cut.parent, "--resume", *options))
        assert losses(cut) == losses(whole)
        for part in ("model", "optimizer"):
            torch.testing.assert_close(weights(cut, 4, part), weights(whole, 4, part), rtol=0, atol=0)
        states = [json.loads((run / "checkpoints/step-00000004/state.json").read_text()) for run in (cut, whole)]
        assert states[0] == states[1]
        assert len(states[0]["guard"]["losses"]) == 2  # of this stage alone
        if NATIVE[0] in options:
            assert states[0]["starts"]["4"] > 2 * 4 + 2 * 2  # more than `batch_size` views, as many are small


def test_a_stage_is_the_run_of_its_size(tmp_path):
    """Until its border a run in stages is, bit for bit, one of the first stage's size without stages."""
    plain = ("--steps=4", "--optim.min_lr=1e-4", "--optim.base_lr=1e-4", "--optim.warmup_steps=0")
    grown = losses(pretrain(config(tmp_path / "grown", *plain, "--stages=[{until: 0.5}, {batch_size: 2}]")))
    alone = losses(pretrain(config(tmp_path / "alone", *plain)))
    assert [grown[step][:2] for step in (1, 2)] == [alone[step][:2] for step in (1, 2)]
    assert grown[3][0] != alone[3][0]


@pytest.mark.parametrize(("grid", "least"), [(28, 0.999), (56, 0.99)])
def test_small_views_have_the_positions_of_the_places_in_between(grid, least):
    """The large grid's table, resampled to 14 x 14, beside its sines at the centres of the small grid's patches."""
    width, quarter = 384, 96
    resized = resize_table(sincos_table((grid, grid), width)[None], TokenLayout("none", 0), (grid, grid), (14, 14))[0]
    frequency = 10000.0 ** -(torch.arange(quarter) / quarter)
    centre = (torch.arange(14) + 0.5) * grid / 14 - 0.5
    angles = [place.flatten()[:, None] * frequency for place in torch.meshgrid(centre, centre, indexing="ij")]
    exact = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    assert torch.nn.functional.cosine_similarity(resized, exact).min() > least


@given(world=st.integers(1, 3), accumulation=st.integers(1, 2), start=st.integers(0, 5))
def test_the_order_goes_on_through_the_stages(world, accumulation, start):
    sizes, passes = ((2, 16, 24), (3, 32, 12)), Passes([10], [1.0], 5)
    parts = [
        list(
            StageSampler(10, 5, stages(*sizes, accumulation=accumulation, world=world, rank=rank), start * accumulation)
        )
        for rank in range(world)
    ]
    items = [item for batches in zip(*parts, strict=True) for batch in batches for item in batch]
    first = sum([24, 24, 12, 12, 12][:start])
    assert [item[:2] for item in items] == [passes[k] for k in range(first, 84)]
    assert [item[2][0] for item in items] == [16 if k < 48 else 32 for k in range(first, 84)]


def view(**changes):
    return View((32, 32), (4, 4), DataConfig(**({"workers": 0} | changes)), MAE().draw)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_through_the_stages(tmp_path, picture_folder, workers, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    cells = [{"bytes": p.read_bytes(), "path": None} for p in sorted(picture_folder.rglob("*.*"))] * 2
    rows = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()}))
    rows.to_parquet(tmp_path / "rows.parquet")

    def stream(start):
        source = open_source(str(tmp_path / "rows.parquet"), split="train", column=None, streaming=True)
        loader = build_loader(source, view(workers=workers), 3, stages((2, 16, 4), (6, 32, 2)), start)
        return [batch for _, batch in zip(range(8), loader, strict=False)]

    whole = stream(0)
    assert [tuple(batch.images.shape) for batch in whole] == [(4, 3, 16, 16)] * 2 + [(2, 3, 32, 32)] * 6
    names = [name for batch in whole for name in batch.names]
    assert len(set(names)) == len(names) == 20
    for start in (1, 2, 5):
        resumed = stream(start)
        assert resumed[:start] == [None] * start
        for before, after in zip(whole[start:], resumed[start:], strict=True):
            assert torch.equal(before.images, after.images)
            assert before.names == after.names


@given(lengths=st.lists(st.integers(1, 50), min_size=8, max_size=60), parts=st.integers(1, 8))
def test_views_are_dealt_out_evenly(lengths, parts):
    numbers = balanced(lengths, parts)
    assert sorted(number for part in numbers for number in part) == list(range(len(lengths)))
    assert all(part == sorted(part) and part for part in numbers)
    held = [sum(lengths[number] for number in part) for part in numbers]
    assert max(held) <= sum(lengths) / parts + max(lengths)


def test_a_step_has_as_many_views_as_its_patches_allow(picture_folder):
    """The same ones on any number of processes, one after the other in the order of the run."""
    (picture_folder / "broken.jpg").write_bytes(b"broken")
    source = open_source(str(picture_folder), split="train", column=None, streaming=False)
    native, sizes = view(sizes="native", batch_by="patches", min_scale=0.05), ((2, 16, 6), (2, 48, 6))
    steps = {}
    for world, accumulation in ((1, 1), (2, 1), (1, 3), (3, 2)):
        packs = [
            Packs(source, native, 3, stages(*sizes, accumulation=accumulation, world=world, rank=rank), 0, {})
            for rank in range(world)
        ]
        parts = [list(PackSampler(own, 0)) for own in packs]
        for step in range(4):
            mine = [parts[rank][step * accumulation + a] for rank in range(world) for a in range(accumulation)]
            steps.setdefault(step, []).append(sorted(item for items in mine for item in items))
            assert sum(packs[0].weight(step, len(items)) for items in mine) == pytest.approx(world * accumulation)
    assert all(found == each[0] for each in steps.values() for found in each)

    samples = [item[:2] for step in range(4) for item in steps[step][0]]
    passes = Passes([len(source)], [1.0], 3)
    assert sorted(samples) == sorted(passes[k] for k in range(len(samples)))
    packs = Packs(source, native, 3, stages(*sizes), 0, {})
    loader = build_loader(source, native, 3, packs.stages, 0, (), PackSampler(packs, 0))
    patches = [sum(len(extra) for extra in batch.extras) for batch in loader]
    assert all(len(steps[step][0]) >= (9 if step > 1 else 6) for step in range(4))
    # the next view of the order would not have fitted; the broken one's place is counted as the largest
    assert all(
        budget - 2 * budget // 6 < have <= budget for have, budget in zip(patches, (24, 24, 216, 216), strict=True)
    )


def test_every_view_counts_alike_however_a_step_is_split(tmp_path, picture_folder):
    argv = ("--steps=4", f"--data.source={picture_folder}", *NATIVE)
    a = losses(pretrain(config(tmp_path / "a", *argv)))
    b = losses(pretrain(config(tmp_path / "b", "--accumulation=4", *argv)))
    for step, (loss, norm, rate) in a.items():
        assert b[step] == (pytest.approx(loss, rel=1e-4), pytest.approx(norm, rel=1e-3), rate)


def test_the_time_left_goes_with_the_pixels(monkeypatch):
    pixels = pixels_of(stages((4, 16, 4), (2, 32, 8)))
    assert [pixels(steps) for steps in (0, 3, 4, 5, 6)] == [0, 3072, 4096, 12288, 20480]
    clock = iter(range(100))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    report = ProgressReport(Console(file=io.StringIO()), "step", 6, 0, pixels)
    for done in range(1, 5):
        report.update(done, "")
    assert report.left() == "about 0:00:16 left"  # a second for 1024 pixels


def test_the_largest_stage_decides_what_fits(tmp_path, monkeypatch, capsys):
    run = config(tmp_path, GROWING)
    accelerator = build_accelerator(run, run.accumulation)
    by_size = {16: "none", 32: "states"}
    monkeypatch.setattr(
        "pretrain.train.recompute_level", lambda config, accelerator, pictures: by_size[config.model.img_size]
    )
    assert level_of_all_stages(run, accelerator, run.schedule(6, 1, 0)) == "states"
    monkeypatch.undo()
    argv = ["--model=vim_base", "--image-size=1024", "--gpus=2", "--gpu-memory=16", "--batch-size=32",
            "--stages=[{until: 0.5, img_size: 224, batch_size: 40}, {}]"]  # fmt: skip
    planner.main(argv)
    printed = capsys.readouterr().out
    assert "planned is stage 2, the largest: 32 pictures, 1024 x 1024" in printed
    assert "stage 1: expected on 2 x NVIDIA H200" in printed
    words = printed.splitlines()[-1]
    assert "--stages '[{until: 0.5, img_size: 224, batch_size: 40}, {}]'" in words
    passes = int(words.rpartition(" ")[2])
    assert (16 % passes, 20 % passes) == (0, 0)
    with pytest.raises(UserError, match=r"stages\[0\]: batch_size 41 does not divide into 2 processes"):
        planner.main([*argv[:-1], "--stages=[{until: 0.5, batch_size: 41}, {}]"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--stages=[]"], r"stages is \[\]: give a stage or more"),
        (["--stages=[{until: 0.6}, {until: 0.5}, {}]"], r"stages\[1\]\.until is 0\.5: it must be above 0\.6"),
        (["--stages=[{until: 0}, {}]"], r"stages\[0\]\.until is 0\.0: it must be above 0"),
        (["--stages=[{until: 0.6}, {until: 0.9}]"], r"stages\[1\]\.until is 0\.9: the last stage ends with the run"),
        (["--stages=[{until: 1}, {}]"], r"stages\[1\]\.until is 1\.0: it must be above 1"),
        (["--stages=[{until: 0.5, img_size: 40}, {}]"], r"stages\[0\]: image height is 40 pixels.* nearest is 32"),
        (["--stages=[{until: 0.5, batch_size: 0}, {}]"], r"stages\[0\]: batch_size is 0"),
        (
            ["--stages=[{until: 0.5}, {img_size: 64}]"],
            r"stages\[1\]\.img_size is \[64, 64\]: model\.img_size.*\[32, 32\]",
        ),
        (["--stages=[{until: 0.5, img_size: big}, {}]"], r"stages is .*'big'.*it must be \[\{until: a number"),
        (["--data.batch_by=patches"], r"data\.batch_by is 'patches': .* set data\.sizes to native"),
        ([*NATIVE, "--data.streaming=true"], r"data\.batch_by is 'patches': .*data\.streaming to false"),
        ([*NATIVE, "--epochs=2"], r"data\.batch_by is 'patches': .* give steps, not epochs"),
    ],
)
def test_mistakes_get_one_line(tmp_path, argv, words):
    with pytest.raises(UserError, match=words) as caught:
        config(tmp_path, "--model.patch_size=16", *argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--steps=4", "--stages=[{until: 0.1}, {}]"], r"stages\[0\]\.until is 0\.1: that leaves it none of 4 steps"),
        (
            ["--accumulation=4", "--stages=[{until: 0.5}, {batch_size: 6}]"],
            r"stages\[1\]: batch_size 6 does not divide",
        ),
    ],
)
def test_a_run_that_cannot_be_divided_begins_no_work(tmp_path, argv, words):
    with pytest.raises(UserError, match=words):
        pretrain(config(tmp_path, *argv))
    assert not (tmp_path / "pretrain").exists()


def test_stages_on_the_command_line_replace_those_of_a_file(tmp_path):
    (tmp_path / "run.yaml").write_text("stages:\n- {until: 0.9, img_size: 64}\n- {img_size: 96, batch_size: 1}\n")
    file = ["--config", str(tmp_path / "run.yaml")]
    for text, sides in (("[{until: 0.5}, {until: 0.7}, {}]", [96] * 3), ("[{}]", [96]), ("null", [96])):
        for argv in ([*file, f"--stages={text}"], [*file, "--stages", text]):
            made = parse(PretrainConfig, argv, "", "").schedule(10, 1, 0)
            assert [(stage.img_size[0], stage.plan.batch_size) for stage in made] == [(side, 32) for side in sides]
    assert [stage.img_size[0] for stage in parse(PretrainConfig, file, "", "").schedule(10, 1, 0)] == [64, 96]


def test_epochs_are_passes_whatever_the_batches():
    made = parse(PretrainConfig, ["--epochs=3", "--stages=[{until: 0.75, batch_size: 10}, {batch_size: 30}]"], "", "")
    assert made.total_steps(100) == 20
    assert [len(stage.steps) * stage.plan.batch_size for stage in made.schedule(20, 1, 0)] == [150, 150]


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path, picture_folder):
    argv = [
        "--steps=4",
        f"--data.source={picture_folder}",
        "--stages=[{until: 0.5, img_size: 16}, {batch_size: 4}]",
        *NATIVE,
    ]
    one, two = (losses_of(run_command(tmp_path / strategy, strategy, *argv)) for strategy in ("one", "ddp"))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_each_stage_is_compiled_once_for_its_own_sizes(tmp_path, monkeypatch, capsys):
    argv = ("--steps=3", "--stages=[{until: 0.4, img_size: 16}, {until: 0.7, img_size: 24}, {}]", "--model.depth=1")
    plain = losses(pretrain(config(tmp_path / "plain", *argv)))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for step, (loss, norm, rate) in losses(pretrain(config(tmp_path / "compiled", *argv))).items():
        assert plain[step] == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4), rate)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert AcceleratorState().dynamo_plugin.dynamic is False
    assert "its first step is compiled anew" in capsys.readouterr().err
