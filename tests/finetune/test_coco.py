"""The checker of COCO files, field by field: what it passes is what pycocotools makes of it, the rest is named."""

import copy
import json
import os
import resource
import time
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from finetune.detection.coco import read_coco, runs_of, whole
from finetune.detection.evaluate import average_precision
from vim_backbone import UserError

MORE = int(os.environ.get("FUZZ", "0"))
"""Examples of each fuzzer, in place of a number for CI."""
HEIGHT, WIDTH = 48, 64
SQUARE = [10, 10, 40, 10, 40, 34, 10, 34]
KINDS = {"box": "bbox", "mask": "segm"}


def example():
    """Three pictures, two classes, five objects: polygons, RLE, COCO's string, a crowd."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[5:20, 8:30] = 1
    text = coco_mask.encode(mask)["counts"].decode()
    size = [HEIGHT, WIDTH]
    masks = [[SQUARE], [[2, 2, 30, 2, 30, 20], [40, 30, 60, 30, 60, 44]], {"size": size, "counts": text},
             {"size": size, "counts": runs_of(text)}, [SQUARE]]  # fmt: skip
    boxes = [[10, 10, 30, 24], [2, 2, 58, 42], [8, 5, 22, 15], [8, 5, 22, 15], [10, 10, 30, 24]]
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (1, 2, 3)],
        "annotations": [
            {"id": k + 1, "image_id": (1, 1, 2, 2, 3)[k], "category_id": (3, 7)[k % 2], "bbox": boxes[k],
             "area": boxes[k][2] * boxes[k][3], "iscrowd": int(k == 3), "segmentation": masks[k]}
            for k in range(5)
        ],
        "categories": [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}],
    }  # fmt: skip


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Content -> what is read of a file with it."""
    path = tmp_path_factory.mktemp("coco") / "instances.json"

    def read(content, masks=True):
        path.write_text(json.dumps(content))
        return read_coco(path, masks)

    return read


def truth_of(file):
    """As the evaluator gets it."""
    annotations = [dict(a, id=n) for n, a in enumerate(chain.from_iterable(file.annotations.values()), start=1)]
    return {"images": file.images, "annotations": annotations, "categories": file.categories}


def perfect(truth, kind):
    """A detection of each object, and a wrong one in each picture."""
    rows = []
    for entry in truth["annotations"]:
        row = {"image_id": entry["image_id"], "category_id": entry["category_id"], "score": 0.9, "bbox": entry["bbox"]}
        if kind == "mask":
            row["segmentation"] = dict(entry["segmentation"])
        rows += [row, row | {"score": 0.5}]
    return rows


def peer_stats(truth, rows, kind):
    truth = json.loads(json.dumps(truth))
    peer = COCO()
    peer.dataset = truth
    peer.createIndex()
    scores = COCOeval(peer, peer.loadRes(copy.deepcopy(rows)), KINDS[kind])
    scores.evaluate()
    scores.accumulate()
    scores.summarize()
    return scores.stats[:6].tolist()


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 100), st.integers(-(2**70), 2**70), st.just(10**400), st.floats(),
    st.text(max_size=6), st.sampled_from(["48", "3.0", " 7 ", "1e5", "", "Q", "\ud800", "\x00"]),
    st.lists(st.one_of(st.none(), st.integers(-100, 100), st.floats(), st.text(max_size=2)), max_size=8),
    st.lists(st.lists(st.one_of(st.integers(-9, 70), st.floats(), st.none()), max_size=9), max_size=3),
    st.dictionaries(st.sampled_from(["size", "counts"]), st.one_of(
        st.none(), st.text("0123PQRab`_o", max_size=9), st.lists(st.integers(-99, 4000), max_size=5),
        st.just([HEIGHT, WIDTH])), max_size=2),
)  # fmt: skip
PLACES = [(group, place, key) for group, places, keys in (
    ("images", 3, ("id", "file_name", "height", "width")),
    ("annotations", 5, ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "ignore")),
    ("categories", 2, ("id", "name", "supercategory")),
) for place in range(places) for key in keys]  # fmt: skip


@given(st.sampled_from(PLACES), st.just("delete") | st.just("repeat") | st.just("replace") | ODD, st.booleans())
@settings(max_examples=MORE or 150)
def test_a_spoiled_field_is_used_as_pycocotools_does_or_named(read, place, value, masks):
    group, index, key = place
    content = example()
    if value == "delete":
        del content[group][index]
    elif value == "repeat":
        content[group].append(copy.deepcopy(content[group][index]))
    elif value == "replace":
        content[group][index] = []
    else:
        content[group][index][key] = value
    file, lines = None, []
    try:
        file = read(content, masks)
    except UserError as error:
        lines = str(error).splitlines()
    if file is None:
        assert group == "categories"  # one entry of the others is left out
        assert len(lines) == 1
        return
    truth = truth_of(file)
    assert all(type(i[k]) is int for i in file.images for k in ("id", "height", "width"))
    lost = [5, 3][group == "annotations"] if group != "categories" else 5
    assert len(truth["annotations"]) >= 5 - lost + (2 if group == "images" else 0)
    expected = 5 - (value == "delete" and group == "annotations")
    if len(truth["annotations"]) < expected or len(file.images) < 3 - (value == "delete" and group == "images"):
        assert any("skipped" in note for note in file.notes)
    for kind in list(KINDS)[: 1 + masks]:
        rows = perfect(truth, kind)
        stats, _ = average_precision(truth, rows, kind)
        assert list(stats.values()) == pytest.approx(peer_stats(truth, rows, kind), abs=1e-9)
        assert stats["AP50"] == pytest.approx(1.0)


@given(st.data())
@settings(max_examples=MORE or 40)
def test_several_spoiled_fields_end_nothing(read, data):
    content = example()
    for _ in range(data.draw(st.integers(1, 6))):
        group, index, key = data.draw(st.sampled_from(PLACES))
        content[group][index][key] = data.draw(ODD)
    truth, lines = {"annotations": []}, []
    try:
        truth = truth_of(read(content))
    except UserError as error:
        lines = str(error).splitlines()
    assert len(lines) <= 1
    rows = perfect(truth, "mask")
    if rows:
        assert list(average_precision(truth, rows, "mask")[0].values()) == pytest.approx(
            peer_stats(truth, rows, "mask"), abs=1e-9
        )


@given(st.lists(st.integers(0, 2000), min_size=1, max_size=8), st.text("0123456789:;<=>?@PQRSTUabcno", max_size=12))
@settings(max_examples=MORE or 200)
def test_compressed_runs_are_those_of_pycocotools(runs, text):
    size = [1, sum(runs)]
    counts = coco_mask.frPyObjects({"size": size, "counts": runs}, *size)["counts"].decode()
    assert runs_of(counts) == runs
    damaged = runs_of(text)
    if damaged and all(0 <= run < 2**31 for run in damaged):
        size = [1, sum(damaged)]
        again = coco_mask.frPyObjects({"size": size, "counts": damaged}, *size)["counts"].decode()
        assert runs_of(again) == damaged


def annotation(k, **changes):
    def change(content):
        content["annotations"][k].update(changes)

    return change


RLE = {"size": [HEIGHT, WIDTH]}


@pytest.mark.parametrize(
    ("change", "kept", "words"),
    [
        (annotation(3, segmentation=None), 4, "1 with no segmentation (annotation 4)"),  # a crowd
        (annotation(3, segmentation=RLE | {"size": [9, 9], "counts": [81]}), 4, "a mask of another size"),
        (annotation(0, segmentation=SQUARE), 5, None),
        (annotation(0, segmentation=RLE | {"counts": "Q"}), 4, "1 with a damaged mask (annotation 1)"),
        (annotation(0, segmentation=RLE | {"counts": [100, -10, 2982]}), 4, "a damaged mask"),
        (annotation(0, segmentation=RLE | {"counts": [100, None]}), 4, "a damaged mask"),
        (annotation(0, segmentation=[[1, 2, None, 4, 5, 6]]), 4, "a polygon with something else than numbers"),
        (annotation(0, segmentation=[SQUARE, [1, 2, 3]]), 5, "1 parts of masks of"),
        (annotation(0, segmentation=[SQUARE, [1, 2, 1e9, 2, 5, 6]]), 5, "a polygon that reaches far beyond"),
        (annotation(0, segmentation=[[-9, -9, -5, -9, -5, -4]]), 4, "a mask without a pixel in the picture"),
        (annotation(0, segmentation=RLE | {"counts": [HEIGHT * WIDTH]}), 4, "a mask without a pixel in the picture"),
        (annotation(0, bbox=[1, 1, 1e30, 1e30]), 4, "a box that reaches far beyond the picture"),
        (annotation(0, iscrowd="yes"), 4, "an iscrowd that is neither 0 nor 1"),
        (annotation(0, image_id="1", category_id=3.0), 5, None),
        (annotation(0, area="many", iscrowd=None), 5, None),
        (lambda c: c["images"][0].update(height="48", width=64.0, id="1"), 5, None),
        (lambda c: c["images"][0].update(height="tall"), 3, "1 of 3 images of"),
        (lambda c: c["images"].append(dict(c["images"][0])), 5, "1 with the id of an earlier one (image 1)"),
        (lambda c: c["images"].append(c["images"][0] | {"file_name": "x"}), 3, "the id of another picture (image 1)"),
        (lambda c: c["annotations"].append(dict(c["annotations"][0])), 5, "the id and the content of an earlier one"),
        (lambda c: [a.update(id=0) for a in c["annotations"]], 5, None),
        (lambda c: [a.pop("id") for a in c["annotations"]], 5, None),
        (lambda c: c["categories"][0].pop("name"), 5, "without a name are called by their ids: 3"),
    ],
)
def test_what_is_left_out_is_counted_and_named(read, change, kept, words):
    content = example()
    change(content)
    file = read(content)
    truth = truth_of(file)
    assert len(truth["annotations"]) == kept
    assert len(file.notes) == (0 if words is None else 2 if "image" in words and kept == 3 else 1)
    assert words is None or any(words in note for note in file.notes)
    rows = perfect(truth, "mask")
    assert average_precision(truth, rows, "mask")[0]["AP"] == pytest.approx(1.0)


def test_a_flat_polygon_and_one_with_a_bad_part_are_the_good_polygon(read):
    content = example()
    content["annotations"][0]["segmentation"] = SQUARE
    content["annotations"][4]["segmentation"] = [[1, 2], SQUARE]
    file = read(content)
    want = coco_mask.decode(coco_mask.frPyObjects([SQUARE], HEIGHT, WIDTH))[..., 0]
    for entry in (file.annotations[1][0], file.annotations[3][0]):
        assert np.array_equal(coco_mask.decode(entry["segmentation"]), want)


def test_huge_numbers_cost_neither_memory_nor_time(read):
    content = example()
    content["annotations"] *= 20
    for number, entry in enumerate(content["annotations"]):
        huge = 10.0 ** (3 + number % 30)
        content["annotations"][number] = entry | {"id": number, "segmentation": [[0, 0, huge, 0, huge, huge], SQUARE]}
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    truth = truth_of(read(content))
    assert average_precision(truth, perfect(truth, "mask"), "mask")[0]["AP"] > 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert time.process_time() - start < 20  # of this process, however many share the cores; it takes a tenth of one


@pytest.mark.parametrize("text", ["[" * 100_000, '{"images": [' + "9" * 5000 + "]}", "\ufeff[]", "null", ""])
def test_files_that_are_no_coco_files(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"cannot read|is no COCO file") as caught:
        read_coco(tmp_path / "x.json", True)
    assert len(str(caught.value).splitlines()) == 1


def test_whole_numbers():
    good = {48: 48, "48": 48, "48.0": 48, 7.0: 7, " -3 ": -3, 0: 0}
    assert {value: whole(value) for value in good} == good
    bad = (None, True, 1.5, float("nan"), float("inf"), 10**400, "1e3", "x", "", "٣", [1], {})
    assert [whole(value) for value in bad] == [None] * len(bad)
