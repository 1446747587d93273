"""Predictions of a finished run: the same as its evaluation's, whatever the batch; JSON and pictures for each task."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from finetune.main import main as finetune
from finetune.predict import load_predictor, main, picture_files, predict
from finetune.registry import TASKS
from vim_backbone import UserError

SMALL = ["--steps=2", "--batch_size=4", "--data.workers=0", "--trackers=[]", "--pictures=1"]
MORE = {
    "classification": (),
    "segmentation": ("--head.channels=16", "--head.auxiliary_channels=16"),
    "detection": ("--head.channels=16", "--head.box_width=16", "--head.proposals=20", "--head.min_score=0.01"),
}
PICTURES = {"classification": "val", "segmentation": "images/validation", "detection": "val"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, backbone, sample_data):
    """Task -> a finished run."""
    runs = {}

    def run(task):
        if task not in runs:
            out = tmp_path_factory.mktemp("runs")
            finetune(
                [
                    task,
                    *SMALL,
                    *MORE[task],
                    f"--backbone={backbone}",
                    f"--data.source={sample_data(task)}",
                    f"--out={out}",
                ]
            )
            runs[task] = out / task
        return runs[task]

    return run


@pytest.mark.parametrize("task", MORE)
def test_json_and_pictures(task, finished, sample_data, tmp_path, capsys):
    pictures = sample_data(task) / PICTURES[task]
    predictions = {}
    for batch_size in ("1", "4"):
        main([str(finished(task)), str(pictures), "--out", str(tmp_path / batch_size), "--batch_size", batch_size])
        predictions[batch_size] = json.loads((tmp_path / batch_size / "predictions.json").read_text())
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "4")
    assert len(predictions["1"]) == 9
    for one, four in zip(predictions["1"], predictions["4"], strict=True):
        with Image.open(tmp_path / "1" / one["drawing"]) as image:
            assert image.width > 100
        if task == "classification":
            shares = [guess["share"] for guess in one["best"]]
            assert sum(shares) == pytest.approx(1)
            assert shares == pytest.approx([guess["share"] for guess in four["best"]], abs=1e-5)
        elif task == "segmentation":
            labels = np.asarray(Image.open(tmp_path / "1" / one["labels"]))
            assert labels.shape == (32, 32)
            assert set(np.unique(labels)) <= {1, 2, 3, 4}
            assert sum(one["shares"].values()) == pytest.approx(1)
        else:
            assert {entry["category_id"] for entry in one["objects"]} <= {1, 4, 9}
            assert len(one["objects"]) == len(four["objects"])
            for entry in one["objects"][:3]:
                assert coco_mask.decode(entry["segmentation"]).shape == (32, 32)


@pytest.mark.parametrize("task", MORE)
def test_a_table_and_a_number_of_drawings(task, finished, sample_data, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    pictures = [str(tmp_path / "broken.jpg"), str(sample_data(task) / PICTURES[task])]
    main([str(finished(task)), *pictures, "--out", str(tmp_path / "out"), "--drawings", "3"])
    rows = json.loads((tmp_path / "out/predictions.json").read_text())
    drawn = [row["drawing"] for row in rows if "drawing" in row]
    assert len(drawn) == 2  # the first of the three is broken
    labels = {row["labels"] for row in rows if "labels" in row}
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {*drawn, *labels}
    with open(tmp_path / "out/predictions.csv", newline="") as file:
        table = list(csv.DictReader(file))
    broken, *lines = table
    assert (broken["file"], broken["error"]) == (rows[0]["file"], rows[0]["error"])
    if task == "classification":
        assert [(line["file"], line["class"]) for line in lines] == [(row["file"], row["class"]) for row in rows[1:]]
        assert [float(line["share"]) for line in lines] == [row["best"][0]["share"] for row in rows[1:]]
    elif task == "segmentation":
        for line, row in zip(lines, rows[1:], strict=True):
            shares = {name[9:]: float(share) for name, share in line.items() if name.startswith("share of ")}
            assert {name: share for name, share in shares.items() if share} == row["shares"]
    else:
        boxes = [[float(line[side]) for side in ("x", "y", "width", "height")] for line in lines]
        assert boxes == [entry["bbox"] for row in rows[1:] for entry in row["objects"]]


@pytest.mark.parametrize("task", MORE)
def test_the_scores_of_an_evaluation_are_those_that_the_task_names(task, finished):
    (path,) = finished(task).glob("evaluations/*/metrics.json")
    assert json.loads(path.read_text()).keys() == {*TASKS[task].metrics, "samples"}


def test_a_model_of_an_unknown_task(finished, sample_data, tmp_path):
    run = shutil.copytree(finished("classification"), tmp_path / "run")
    content = json.loads((run / "model/config.json").read_text())
    (run / "model/config.json").write_text(json.dumps(content | {"task": "clasification"}))
    with pytest.raises(UserError, match="model of the task 'clasification', which is unknown; did you mean 'classif"):
        main([str(run), str(sample_data("classification") / "val")])


def test_pictures_that_cannot_be_read(finished, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    main([str(finished("classification")), str(tmp_path / "broken.jpg"), "--out", str(tmp_path / "out")])
    assert "broken.jpg: not read, no picture format that can be read" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"nowhere.png does not exist"):
        main([str(finished("classification")), str(tmp_path / "nowhere.png")])
    with pytest.raises(UserError, match="--device foo cannot be used"):
        main([str(finished("classification")), str(tmp_path / "broken.jpg"), "--device", "foo"])
    with pytest.raises(UserError, match="holds no fine-tuned model"):
        main([str(tmp_path), str(tmp_path / "broken.jpg")])


@pytest.mark.parametrize("task", ["segmentation"])
def test_pictures_of_any_name(task, finished, photo, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in (b"l" * 251 + b".png", b"caf\xe9.png", b"a\nb.png", "é".encode() * 120 + b".png"):
        photo().save(Path(os.fsdecode(os.fsencode(folder) + b"/" + name)), "png")
    run = finished(task)
    capsys.readouterr()
    main([str(run), str(folder), "--out", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out/predictions.json").read_text())
    assert len(rows) == 4
    assert all((tmp_path / "out" / row[key]).is_file() for row in rows for key in ("drawing", "labels"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert sum(r"caf\xe9.png: " in line for line in lines) == 1


def test_predictions_are_there_as_they_are_made_and_resumed(finished, sample_data, tmp_path):
    run, out = finished("classification"), tmp_path / "out"
    predictor = load_predictor(run, torch.device("cpu"))
    files = picture_files([sample_data("classification") / "val"])
    whole = list(predict(predictor, files, tmp_path / "whole", 2))
    for number, row in enumerate(predict(predictor, files, out, 2), start=1):
        rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
        assert row in rows
        assert len(rows) == -(-number // 2) * 2
        if number == 4:
            break
    assert not (out / "predictions.json").exists()
    with open(out / "predictions.jsonl", "a") as lines:
        lines.write('{"file": "gone.png"}\n[1]\n{"file": "ha')
    again = list(predict(predictor, files, out, 2, resume=True))
    assert [row["file"] for row in again] == [str(file) for file in files[4:]]
    rows = json.loads((out / "predictions.json").read_text())
    assert rows == [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [(row["file"], row["class"]) for row in rows] == [(row["file"], row["class"]) for row in whole]
    assert len(list(predict(predictor, files, out, 2))) == len(files)
