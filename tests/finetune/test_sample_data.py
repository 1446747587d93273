"""The drawn data sets have the real formats, and say what was drawn."""

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from finetune.sample_data import KINDS, SHAPES, Scenes, main, run_lengths
from vim_backbone import UserError


def draw(folder, kind, *argv):
    main([kind, str(folder / kind), "--train=6", "--val=3", "--size=48", *argv])
    return folder / kind


def test_coco_file_by_pycocotools(tmp_path):
    folder = draw(tmp_path, "detection")
    coco = COCO(folder / "annotations/instances_train.json")
    assert len(coco.imgs) == 6
    assert coco.getCatIds() == [1, 4, 9]
    kinds = set()
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation).astype(int)
        area = annotation["area"]
        rows, columns = np.nonzero(mask)
        x, y, w, h = annotation["bbox"]
        assert abs(mask.sum() - area) <= 0.15 * area + 4  # polygons are filled by another rule
        assert np.abs([columns.min() - x, rows.min() - y, columns.max() + 1 - x - w, rows.max() + 1 - y - h]).max() <= 1
        kinds.add(type(annotation["segmentation"]))
    assert kinds == {dict, list}
    for image in coco.imgs.values():
        with Image.open(folder / "train" / image["file_name"]) as opened:
            assert opened.size == (image["width"], image["height"])


def test_run_lengths_round_trip():
    mask = np.random.default_rng(0).random((5, 7)) < 0.5
    for case in (mask, np.ones((2, 3), bool), np.zeros((2, 3), bool)):
        values = np.repeat(np.arange(len(run_lengths(case))) % 2, run_lengths(case)).astype(bool)
        assert (values.reshape(case.shape, order="F") == case).all()


def test_segmentation_maps_are_of_the_shapes_drawn(tmp_path):
    folder = draw(tmp_path, "segmentation")
    scenes = Scenes(48, 0)
    labels = np.asarray(Image.open(folder / "annotations/training/000002.png"))
    for shape in scenes.draw(0, 2)[1]:
        assert (labels[shape.mask] == 2 + shape.kind).all()
    assert (labels == 0).any()
    assert len((folder / "objectInfo4.txt").read_text().splitlines()) == 5
    assert len(list((folder / "images/validation").glob("*.jpg"))) == 3


def test_class_folders(tmp_path):
    folder = draw(tmp_path, "classification")
    assert sorted(p.name for p in (folder / "train").iterdir()) == sorted(SHAPES)
    assert len(list((folder / "train").glob("*/*.jpg"))) == 6
    digits = draw(tmp_path, "digits", "--train=100")
    assert sorted(p.name for p in (digits / "train").iterdir()) == [str(i) for i in range(10)]
    train, val = ({p.name for p in (digits / split).glob("*/*")} for split in ("train", "val"))
    assert len(train) == 100
    assert not train & val


def test_the_same_seed_draws_the_same(tmp_path):
    a, b = draw(tmp_path / "a", "segmentation"), draw(tmp_path / "b", "segmentation")
    for path in a.rglob("*.*"):
        assert path.read_bytes() == (b / path.relative_to(a)).read_bytes()


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "detection").mkdir()
    (tmp_path / "detection/mine").touch()
    with pytest.raises(UserError, match="is not empty"):
        draw(tmp_path, "detection")
    assert set(KINDS) == {"classification", "digits", "detection", "segmentation"}
