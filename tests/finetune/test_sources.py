"""Labelled data of every kind of source gives what the same pictures in folders give."""

import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from finetune.classification.config import ClassificationConfig, ClassificationData
from finetune.classification.task import ClassificationTask
from finetune.detection.config import DetectionConfig, DetectionData
from finetune.detection.data import open_coco
from finetune.detection.task import DetectionTask
from finetune.segmentation.config import SegmentationConfig, SegmentationData
from finetune.segmentation.data import class_names, open_pairs
from finetune.segmentation.task import SegmentationTask
from finetune.train import finetune
from launch.data.images import BadPictureError
from launch.data.labelled import open_labelled
from launch.run.cli import parse
from vim_backbone import UserError

SPLITS = ("train", "val")
CLASSES = ["circle", "square", "triangle"]
NAMES = ["a", "b", "c", "d"]
"""Of the classes of the maps."""


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def cell(path):
    return {"bytes": Path(path).read_bytes(), "path": None}


@pytest.fixture(scope="module")
def classified(sample_data, tmp_path_factory):
    """The drawn pictures with texts as labels, as sources of every kind: name -> (source, label column)."""
    root = tmp_path_factory.mktemp("classified")
    splits = {}
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.Value("string")})
    for split in SPLITS:
        files = sorted((sample_data("classification") / split).rglob("*.jpg"))
        rows = {"image": [cell(file) for file in files], "kind": [file.parent.name for file in files]}
        splits[split] = datasets.Dataset.from_dict(rows, features=features)
        splits[split].to_parquet(root / f"{split}-00000.parquet")
        with tarfile.open(root / f"{split}.tar", "w") as tar, zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
            for number, file in enumerate(files):
                label = root / "label.txt"
                label.write_text(file.parent.name)
                tar.add(file, f"{number:03d}.jpg")
                tar.add(label, f"{number:03d}.kind.txt")
                archive.write(file, f"{file.parent.name}/{file.name}")
    datasets.DatasetDict(splits).save_to_disk(str(root / "saved"))
    for split in SPLITS:
        shutil.copy(next((root / "saved" / split).glob("*.arrow")), root / f"{split}.arrow")
    return {
        "parquet": (f"{root}/{{split}}-*.parquet", "kind"),
        "arrow": (f"{root}/{{split}}.arrow", "kind"),
        "saved": (f"{root}/saved", "kind"),
        "hf": (f"hf:{root}/saved", "kind"),
        "tar": (f"{root}/{{split}}.tar", "kind.txt"),
        "zip": (f"{root}/{{split}}.zip", None),
        "url": (f"file://{root}/{{split}}-00000.parquet", "kind"),
    }


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved", "hf", "tar", "zip", "url"])
def test_classes_of_every_kind_of_source(sample_data, classified, kind):
    source, column = classified[kind]
    want = open_labelled(ClassificationData(source=str(sample_data("classification"))), 0)
    got = open_labelled(ClassificationData(source=source, label_column=column), 0)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.classes == theirs.classes == CLASSES
        assert sorted(ours.labels) == sorted(theirs.labels)
        pixels = [
            sorted((label, data.source.open(i).rgb(1)[0].tobytes()) for i, label in enumerate(data.labels))
            for data in (ours, theirs)
        ]
        assert pixels[0] == pixels[1]
    assert got[0].source.name(0).startswith("train row 0")


def test_a_model_keeps_the_texts_as_its_classes(backbone, classified, tmp_path):
    source, column = classified["parquet"]
    argv = [f"--data.source={source}", f"--data.label_column={column}", f"--backbone={backbone}", f"--out={tmp_path}",
            "--steps=1", "--batch_size=4", "--data.workers=0", "--trackers=[]", "--pictures=1"]  # fmt: skip
    folder = finetune(ClassificationTask(parse(ClassificationConfig, argv, "test", "")))
    assert json.loads((folder / "model/config.json").read_text())["classes"] == CLASSES


@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        (["a", "b", None], ["a"], r"train row 2 has no text in column 'kind': give it a class, or remove it"),
        (["a", "b", "a"], ["a", "c"], r"val row 1 has class 'c', which the training split lacks \(2 classes there\)"),
        (["a", "a", "a"], ["a"], r"train has one text in column 'kind', such as 'a': set data.label_column"),
        (["a", "b", "c"], ["a"], r"train has another text in every row in column 'kind', such as 'a': set"),
    ],
)
def test_texts_that_will_not_do(tmp_path, train, val, words):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.Value("string")})
    for split, texts in zip(SPLITS, (train, val), strict=True):
        rows = {"image": [cell(tmp_path / "0.png")] * len(texts), "kind": texts}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(UserError, match=words) as caught:
        open_labelled(ClassificationData(source=f"{tmp_path}/{{split}}.parquet", label_column="kind"), 0)
    assert "\n" not in str(caught.value)


def test_files_of_one_split_alone(classified):
    source = classified["parquet"][0].replace("{split}", "train")
    with pytest.raises(UserError, match=r"has no 'val' to evaluate on: set data.val_split, or data.holdout"):
        open_labelled(ClassificationData(source=source, label_column="kind"), 0)
    train, val = open_labelled(ClassificationData(source=source, label_column="kind", holdout=0.25), 0)
    assert (len(train.labels), len(val.labels)) == (18, 6)
    with pytest.raises(UserError, match=r"no file matches data.source .*/test-\*.parquet"):
        open_labelled(ClassificationData(source=classified["parquet"][0], train_split="test"), 0)


@pytest.fixture
def mapped(sample_data, tmp_path):
    """Parquet files of the drawn pictures and maps, one for each split."""
    root = sample_data("segmentation")
    for split in ("training", "validation"):
        columns = {
            name: [cell(path) for path in sorted((root / folder / split).iterdir())]
            for name, folder in (("image", "images"), ("annotation", "annotations"))
        }
        features = datasets.Features({name: datasets.Image() for name in columns})
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")
    return f"{tmp_path}/{{split}}.parquet"


def same_pairs(ours, theirs):
    assert len(ours) == len(theirs)
    for index in range(len(theirs)):
        for a, b in zip(ours.pair(index), theirs.pair(index), strict=True):
            assert np.array_equal(np.asarray(a), np.asarray(b))


def test_maps_in_the_rows_of_a_data_set(sample_data, mapped, tmp_path):
    want, notes = open_pairs(SegmentationData(source=str(sample_data("segmentation"))), "training", NAMES)
    data = SegmentationData(source=mapped, num_classes=4)
    got, more = open_pairs(data, "training", class_names(data))
    same_pairs(got, want)
    assert more == notes
    assert got.name(3) == "training row 3"
    swapped = SegmentationData(source=mapped, num_classes=4, map_column="image", image_column="annotation")
    with pytest.raises(UserError, match=r"training row 0 \(column image\) has 3 channels: a map has one"):
        open_pairs(swapped, "training", NAMES)
    with pytest.raises(UserError, match=r"how many classes\? set data.num_classes or data.values"):
        class_names(SegmentationData(source=mapped))
    with pytest.raises(UserError, match=r"has no column 'x' of type Image: set data.map_column"):
        open_pairs(SegmentationData(source=mapped, num_classes=4, map_column="x"), "training", NAMES)


def test_a_map_of_another_size_than_the_picture_in_its_row(sample_data, tmp_path):
    root = sample_data("segmentation")
    pictures, maps = (sorted((root / folder / "training").iterdir())[:4] for folder in ("images", "annotations"))
    Image.open(maps[1]).crop((0, 0, 9, 9)).save(tmp_path / "small.png")

    def written(*files):
        columns = {"image": [cell(path) for path in pictures], "mask": [cell(path) for path in files]}
        features = datasets.Features({name: datasets.Image() for name in columns})
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "saved"))
        data = SegmentationData(source=str(tmp_path / "saved"), num_classes=4, train_split="train")
        return open_pairs(data, "train", NAMES)[0]

    small = tmp_path / "small.png"
    with pytest.raises(
        BadPictureError, match=r"train row 1 \(column mask\) is \(9, 9\) pixels, its picture \(32, 32\)"
    ):
        written(maps[0], small, *maps[2:]).pair(1)
    with pytest.raises(UserError, match=r"row 0 \(column mask\) is \(9, 9\) pixels, its picture .*; 3 maps are so"):
        written(small, small, small, maps[3])


def test_pictures_and_maps_at_places_of_their_own(sample_data, tmp_path, monkeypatch):
    root = sample_data("segmentation")
    want, _ = open_pairs(SegmentationData(source=str(root)), "validation", NAMES)
    places = {
        name: (f"{root}/{folder}/training", f"{root}/{folder}/validation")
        for name, folder in (("images", "images"), ("maps", "annotations"))
    }
    same_pairs(open_pairs(SegmentationData(num_classes=4, **places), "validation", NAMES)[0], want)
    monkeypatch.chdir(root)
    named = {"images": "images/{split}", "maps": str(root / "annotations/{split}")}
    same_pairs(open_pairs(SegmentationData(num_classes=4, **named), "validation", NAMES)[0], want)
    places["maps"] = (places["maps"][0], "nowhere")
    with pytest.raises(UserError, match=r"^nowhere does not exist: set data.maps, or the split \('validation'\)"):
        open_pairs(SegmentationData(num_classes=4, **places), "validation", NAMES)
    with pytest.raises(UserError, match=r"data.source is '': give a folder with .*, or data.images and data.maps"):
        SegmentationData(num_classes=4, images="x")
    argv = ["--data.images=[a, b]", "--data.maps=m/{split}", "--backbone=x"]
    data = parse(SegmentationConfig, argv, "test", "").data
    assert (data.images, data.maps) == (("a", "b"), "m/{split}")


def objects(root, split, form):
    """The rows of a data set as the Hub has them, of a COCO file."""
    content = json.loads((root / f"annotations/instances_{split}.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    rows = []
    for image in content["images"]:
        found = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        boxes = [entry["bbox"] for entry in found]
        if form == "xyxy":
            boxes = [[x, y, x + w, y + h] for x, y, w, h in boxes]
        kinds = [names[entry["category_id"]] for entry in found]
        columns = {"bbox": boxes, "category": kinds, "area": [float(entry["area"]) for entry in found]}
        as_list = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        rows.append(
            {"image": cell(root / split / image["file_name"]), "objects": as_list if form == "text" else columns}
        )
    kind = datasets.Value("string") if form == "text" else datasets.ClassLabel(names=[*names.values()])
    fields = {"bbox": datasets.List(datasets.Value("float32"), length=4), "category": kind,
              "area": datasets.Value("float32")}  # fmt: skip
    listed = datasets.List(fields) if form == "text" else {name: datasets.List(field) for name, field in fields.items()}
    return datasets.Dataset.from_list(rows, features=datasets.Features({"image": datasets.Image(), "objects": listed}))


@pytest.mark.parametrize("form", ["labels", "text", "xyxy"])
def test_objects_in_the_rows_of_a_data_set(sample_data, tmp_path, form):
    root = sample_data("detection")
    want = open_coco(DetectionData(source=str(root)), "train", masks=False)
    objects(root, "train", form).to_parquet(tmp_path / "train.parquet")
    data = DetectionData(source=f"{tmp_path}/{{split}}.parquet", boxes="xyxy" if form == "xyxy" else "xywh")
    got = open_coco(data, "train", masks=False)
    assert sorted(category["name"] for category in got.categories) == sorted(c["name"] for c in want.categories)
    names = [{category["id"]: category["name"] for category in split.categories} for split in (got, want)]
    for ours, theirs in zip(got.images, want.images, strict=True):
        found = [
            sorted((named[entry["category_id"]], *entry["bbox"]) for entry in split.annotations[image["id"]])
            for split, image, named in zip((got, want), (ours, theirs), names, strict=True)
        ]
        for one, other in zip(*found, strict=True):
            assert one[0] == other[0]
            assert one[1:] == pytest.approx(other[1:], abs=1e-4)
    assert all(torch.equal(got.picture(index), want.picture(index)) for index in range(len(want)))
    assert got.name(2) == "train row 2"


def test_objects_that_will_not_do(sample_data, tmp_path):
    root = sample_data("detection")
    rows = objects(root, "train", "text")
    rows.to_parquet(tmp_path / "train.parquet")
    rows.select(range(3)).to_parquet(tmp_path / "val.parquet")
    data = DetectionData(source=f"{tmp_path}/{{split}}.parquet")
    with pytest.raises(UserError, match=r"objects.category has '.*', which the training split lacks \(1 "):
        open_coco(data, "val", masks=False, classes=["none of these"])
    with pytest.raises(UserError, match=r"no annotation of .*train.parquet train can be used: .* no segmentation; see"):
        open_coco(data, "train", masks=True)
    rows.remove_columns("objects").to_parquet(tmp_path / "bare.parquet")
    with pytest.raises(UserError, match=r"needs a column of type objects with a bbox, none of \['image'\] is one: set"):
        open_coco(data, "bare", masks=False)
    numbers = {"bbox": [[[1.0, 1.0, 5.0, 5.0]]], "category": [[3]]}
    plain = datasets.Dataset.from_dict(
        {"image": rows["image"][:1], "objects": [{key: value[0] for key, value in numbers.items()}]}
    )
    plain.to_parquet(tmp_path / "plain.parquet")
    with pytest.raises(UserError, match=r"objects.category holds numbers, which do not say what classes there are"):
        open_coco(data, "plain", masks=False)


def test_annotations_and_pictures_at_places_of_their_own(sample_data, tmp_path, monkeypatch):
    root = sample_data("detection")
    want = open_coco(DetectionData(source=str(root)), "val", masks=True)
    for split in SPLITS:
        shutil.copy(root / f"annotations/instances_{split}.json", tmp_path / f"of-{split}.json")
    monkeypatch.chdir(tmp_path)
    data = DetectionData(annotations=("of-train.json", "of-val.json"), images=str(root / "{split}"))
    got = open_coco(data, "val", masks=True)
    assert got.ground_truth() == want.ground_truth()
    assert torch.equal(got.picture(0), want.picture(0))
    assert not data.one_for_all
    assert DetectionData(annotations=("a.json", "a.json"), images="x").one_for_all
    with pytest.raises(UserError, match=r"^gone.json does not exist: set data.source, or the split"):
        open_coco(DetectionData(annotations=("of-train.json", "gone.json"), images="x"), "val", masks=True)
    with pytest.raises(UserError, match=r"^x does not exist: it must hold the pictures that of-val.json names"):
        open_coco(DetectionData(annotations=("of-train.json", "of-val.json"), images="x"), "val", masks=True)
    with pytest.raises(UserError, match=r"data.source is '': give a folder with .*, or data.images and data.annot"):
        DetectionData(annotations="x")


def test_tasks_train_on_data_sets(sample_data, backbone, mapped, tmp_path):
    root = sample_data("detection")
    for split in SPLITS:
        objects(root, split, "text").to_parquet(tmp_path / f"objects-{split}.parquet")
    common = [f"--backbone={backbone}", f"--out={tmp_path}", "--steps=1", "--batch_size=2", "--data.workers=0",
              "--trackers=[]", "--pictures=1", "--head.channels=16"]  # fmt: skip
    argv = [*common, f"--data.source={mapped}", "--data.num_classes=4"]
    folder = finetune(SegmentationTask(parse(SegmentationConfig, argv, "test", "")))
    assert json.loads((folder / "evaluations/step-00000001/metrics.json").read_text())["samples"] == 9
    argv = [*common, f"--data.source={tmp_path}/objects-{{split}}.parquet", "--head.masks=false", "--head.box_width=16"]
    folder = finetune(DetectionTask(parse(DetectionConfig, argv, "test", "")))
    assert json.loads((folder / "model/config.json").read_text())["classes"] == CLASSES
