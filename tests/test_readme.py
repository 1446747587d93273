"""Every command and every line of Python in the README and the docs runs."""

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from tests.band_files import write_scenes
from tests.launch.preloaded import Popen
from tests.launch.real import environment
from tests.launch.slurm import submit
from tests.teachers import write_teacher
from tests.vim_backbone import official
from tests.waiting import LIMIT
from vim_backbone import create_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = "--model.depth=1 --model.name=vim_tiny --decoder.depth=1 --batch_size=4 --optim.warmup_steps=1 --data.workers=0"
RUN_BY_CI = {"make pretrain", "make test", "make lint"}
SHORT_TRIALS = {"data.source": "sample/classification", "data.workers": 0, "steps": 1, "epochs": None, "batch_size": 4}
NOT_RUN = {"source .venv/bin/activate", ".venv/bin/pre-commit install"}  # they change the shell or the clone, not files


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands():
    return [line for page in PAGES for block in blocks(page, "bash") for line in block.strip().splitlines()]


def words_of(line):
    """Names in a command, between anything that is no letter or sign of a name."""
    return set(re.findall(r"[a-z]+", line))


def test_ci_runs_the_make_commands():
    ci = (ROOT / ".ci/run").read_text()
    for line in {c for c in commands() if c.startswith("make")}:
        assert line in RUN_BY_CI
        assert line in ci


def assert_runs(line, where):
    """The command ends well. Python's programs are forked, as `accelerate launch` from its module."""
    words = shlex.split(line)
    settings = dict(word.split("=", 1) for word in itertools.takewhile(lambda word: "=" in word, words))
    program, *argv = words[len(settings) :]
    if program == "sbatch":
        while not argv[0].endswith(".sbatch"):
            assert argv[0] in ("--nodes", "--time"), f"is {argv[0]} an option of sbatch?"
            argv = argv[2:]
        assert argv[0] == "launch/slurm/pretrain.sbatch"
        job = submit(where, *argv[1:], **settings)
        _, err = job.communicate(timeout=LIMIT)
        assert job.returncode == 0, f"{line}\n{err}"
        return
    modules = {"python": [], "accelerate": ["-m", "accelerate.commands.accelerate_cli"]}
    process = Popen([sys.executable, *modules[program], *argv], where, environment(**settings))
    _, err = process.communicate(LIMIT)
    assert process.returncode == 0, f"{line}\n{err}"


@pytest.fixture(scope="module")
def place(tmp_path_factory, request):
    """A folder that looks like the checkout, with pictures and an official checkpoint of small size."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pretrain", "finetune", "launch", "vim_backbone", "kernels", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.slow
def test_all_other_commands(place, picture_folder):
    (place / "path/to").mkdir(parents=True)
    for name in ("pictures", "more_pictures"):
        (place / "path/to" / name).symlink_to(picture_folder)
    for split in ("train", "val"):
        (place / "path/to/labelled").mkdir(exist_ok=True)
        (place / "path/to/labelled" / split).symlink_to(picture_folder)
    write_teacher(place / "path/to/teacher")
    (place / "path/to/slides").mkdir()
    colours = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
    for number in range(4):  # openslide knows a tiled TIFF whatever it is called
        tifffile.imwrite(place / "slide.tif", colours, tile=(64, 64), photometric="rgb")
        (place / "slide.tif").rename(place / f"path/to/slides/{number}.ndpi")
    torch.save(official.random_state(d=32, depth=2, patches=16, classes=5), place / "vim_t_midclstok_76p1acc.pth")
    ran = 0
    for line in commands():
        if (
            line in RUN_BY_CI | NOT_RUN
            or line.startswith("python -m benchmarks")
            or {"finetune", "geotiffs", "scenes"} & words_of(line)
        ):
            continue
        if "sbatch" in words_of(line):
            line = re.sub(r" --(steps|accumulation) \d+", "", line)
            line += f" {SMALL} --model.img_size=32 --model.patch_size=8 --accumulation=1 --steps=1"
        if "pretrain/main.py" in line and "--help" not in line:
            line = re.sub(r" --steps \d+", "", line.replace("--model.img_size 224", "--model.img_size 32"))
            line = line.replace("--eval.share 0.02", "--eval.share 0.3")  # of ten pictures
            if "zero" in line and "--num_processes" not in line:
                line = line.replace("--config_file", "--num_processes 2 --config_file")
            epochs = line.replace("--epochs 100", "--epochs 1") + f" {SMALL}"
            length = "--steps=1" if "--data.batch_by" in line else "--epochs=1"
            line = f"{epochs} --model.img_size=32 {length} --model.patch_size=8"
            if "growing" in line:
                line += " '--stages=[{until: 0.5, img_size: 16}, {}]'"
        assert_runs(line, place)
        ran += 1
    assert ran >= 5


@pytest.mark.slow
def test_a_folder_of_geotiffs_to_predictions(place):
    """Four bands of 16 bits with nodata, from statistics to a fine-tuned model."""
    rng = np.random.default_rng(0)
    labelled = [f"labelled_geotiffs/{split}/{kind}" for split in ("train", "val") for kind in ("field", "wood")]
    for folder in ("geotiffs", *labelled):
        (place / "path/to" / folder).mkdir(parents=True, exist_ok=True)
        for number in range(4):
            values = (1500 + 400 * rng.standard_normal((40, 50, 4))).astype(np.uint16)
            values[:3] = 0
            tags = {"extratags": [(42113, "s", 0, "0", True)], "extrasamples": [0] * 3}
            tifffile.imwrite(place / f"path/to/{folder}/{number}.tif", values, tile=(16, 16), compression="deflate",
                             photometric="minisblack", **tags)  # fmt: skip
    lines = [line for line in commands() if "geotiffs" in words_of(line)]
    for line in lines:
        if "main.py" in line:
            line = re.sub(r"--(model.img_size|epochs) \d+", "", line)
            own = "--optim.warmup_steps=1" if "finetune" in line else f"{SMALL} --model.patch_size=8"
            line += f" {own} --model.img_size=32 --steps=1 --batch_size=4 --data.workers=0"
        assert_runs(line, place)
    assert len(lines) >= 5
    rows = json.loads((place / "runs/crops/predictions/predictions.json").read_text())
    assert [row["class"] in ("field", "wood") for row in rows] == [True] * 8


@pytest.mark.slow
def test_files_with_three_and_five_bands_to_predictions(place):
    """The commands of docs/channels.md, from statistics to the classes of pictures of both kinds."""
    labelled = [f"labelled_scenes/{split}/{kind}" for split in ("train", "val") for kind in ("field", "wood")]
    for folder in ("scenes", *labelled):
        write_scenes(place / "path/to" / folder, count=4)
    lines = list(dict.fromkeys(line for line in commands() if "scenes" in words_of(line)))
    for line in lines:
        if "main.py" in line:
            own = "--optim.warmup_steps=1" if "finetune" in line else f"{SMALL} --model.patch_size=8"
            line += f" {own} --model.img_size=32 --steps=1 --batch_size=4 --data.workers=0"
        assert_runs(line, place)
    assert len(lines) == 4
    rows = json.loads((place / "runs/kinds/predictions/predictions.json").read_text())
    assert [row["class"] in ("field", "wood") for row in rows] == [True] * 8


@pytest.mark.slow
def test_the_commands_of_fine_tuning(place):
    create_model("vim_tiny", img_size=32, patch_size=8, depth=1, num_classes=0).save_pretrained(place / "published")
    for name in ("pretrain", "short"):
        (place / f"runs/{name}").mkdir(parents=True, exist_ok=True)
        if not (place / f"runs/{name}/backbone").exists():
            (place / f"runs/{name}/backbone").symlink_to(place / "published")
    small = " --steps=1 --epochs=null --model.img_size=32 --evaluate_every=0 --batch_size=4 --data.workers=0"
    ran = 0
    for line in (
        line
        for line in commands()
        if words_of(line) & {"finetune", "geotiffs", "scenes"} == {"finetune"}
        and not line.startswith("python -m benchmarks")
    ):
        if "finetune.sample_data" in line:
            shutil.rmtree(place / line.split()[-1], ignore_errors=True)  # more than one page makes it
            line += " --train 6 --val 3 --size 32"
        if "finetune/main.py" in line:
            line = re.sub(r"runs/\w+/backbone", "published", line) + small + " --trackers=[] --overwrite"
        if "finetune/sweep.py" in line and "--top" not in line and "--help" not in line:
            line += " --trials=2 --overwrite --ray.cpus=1 --fields=" + shlex.quote(json.dumps(SHORT_TRIALS))
        assert_runs(line, place)
        ran += 1
    assert ran >= 8


@pytest.mark.slow
def test_the_python_in_the_readme(place, photo):
    assert_runs(f"python pretrain/main.py --steps=1 {SMALL} --overwrite", place)
    photo(128, 192).save(place / "photo.jpg")
    photo(50, 70).save(place / "another.png")
    for block in blocks(ROOT / "README.md", "python"):
        shapes = "\nassert features.shape == (2, 192)\nassert [m.shape for m in maps] == [(1, 192, 16, 24)]"
        assert "# two maps" in block
        one_block = block.replace("indices=2", "indices=1")  # the model of this test has one block
        done = subprocess.run(
            [sys.executable, "-c", one_block + shapes], cwd=place, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
