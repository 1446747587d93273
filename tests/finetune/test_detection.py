"""Detection: COCO files good and bad, AP against pycocotools, boxes and masks under jitter, and whole runs."""

import copy
import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file
from torchvision.transforms.v2.functional import pil_to_tensor

from finetune.detection.config import DetectionConfig, DetectionData, JitterConfig
from finetune.detection.data import TrainPictures, open_coco
from finetune.detection.evaluate import average_precision, to_coco
from finetune.detection.model import SimpleFeaturePyramid, scale_gradient
from finetune.detection.task import DetectionTask
from finetune.detection.tta import TestTimeAugmentation, enlarged, fit, mirrored, with_pasted_masks
from finetune.train import finetune
from launch.run.cli import parse
from launch.run.randomness import seeded
from tests.rows import read_metrics
from vim_backbone import UserError

SMALL = ["--batch_size=2", "--log_every=1", "--data.workers=0", "--trackers=[]", "--pictures=2", "--head.channels=16",
         "--head.box_width=16", "--head.samples=16", "--head.proposals=20", "--optim.base_lr=0.05",
         "--optim.clip_grad=1", "--model.drop_path_rate=0", "--jitter.scale=[0.8,1.2]",
         "--optim.layer_decay=1"]  # fmt: skip
ANNOTATIONS = "annotations/instances_train.json"


def run(config):
    return finetune(DetectionTask(config))


@pytest.fixture
def config(backbone, sample_data, tmp_path):
    def make(*argv):
        data = [] if any(a.startswith("--data.source") for a in argv) else [f"--data.source={sample_data('detection')}"]
        options = [*SMALL, f"--backbone={backbone}", f"--out={tmp_path}", *data, *argv]
        return parse(DetectionConfig, options, "finetune/main.py", "")

    return make


def guesses(truth, seed):
    """Detections near the truth, and some anywhere, with random scores and RLE masks of their boxes."""
    rng = np.random.default_rng(seed)
    rows = []
    for image in truth["images"]:
        boxes = [a["bbox"] for a in truth["annotations"] if a["image_id"] == image["id"]] * 2
        boxes += [[*rng.uniform(0, 20, 2), *rng.uniform(2, 12, 2)] for _ in range(3)]
        x, y, w, h = torch.tensor(boxes, dtype=torch.float32).T
        corners = torch.stack([x, y, x + w, y + h], 1) + torch.from_numpy(rng.normal(size=(len(boxes), 4))).float()
        masks = torch.zeros(len(boxes), image["height"], image["width"], dtype=torch.uint8)
        for mask, (left, top, right, below) in zip(masks, corners.clamp(min=0).round().int().tolist(), strict=True):
            mask[top:below, left:right] = 1
        labels, scores = torch.from_numpy(rng.integers(1, 4, len(boxes))), torch.from_numpy(rng.random(len(boxes)))
        rows += to_coco({"boxes": corners, "labels": labels, "scores": scores, "masks": masks}, image["id"], [1, 4, 9])
    return rows


def peer_of(truth, rows, kind):
    """What pycocotools makes of it."""
    peer, detections = COCO(), COCO()
    peer.dataset = json.loads(json.dumps(truth))
    peer.createIndex()
    if rows:
        detections = peer.loadRes(copy.deepcopy(rows))
    else:
        detections.dataset = peer.dataset | {"annotations": []}
        detections.createIndex()
    scores = COCOeval(peer, detections, kind)
    scores.evaluate()
    scores.accumulate()
    scores.summarize()
    return scores


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_ap_is_that_of_pycocotools(sample_data, kind, tmp_path):
    truth = open_coco(DetectionData(source=str(sample_data("detection"))), "train", masks=True).ground_truth()
    truth["annotations"][0]["iscrowd"] = 1
    mask = truth["annotations"][0]["segmentation"]
    if isinstance(mask, list):  # crowds are RLE
        truth["annotations"][0]["segmentation"] = {"size": [32, 32], "counts": [100, 200, 724]}
    results = guesses(truth, 0)
    stats, by_class = average_precision(truth, results, kind)
    rows = [{k: v for k, v in row.items() if kind == "mask" or k != "segmentation"} for row in results]
    peer_scores = peer_of(truth, rows, "segm" if kind == "mask" else "bbox")
    assert list(stats.values()) == pytest.approx(peer_scores.stats[:6].tolist(), abs=1e-9)
    assert 0.02 < stats["AP50"] < 0.95
    assert np.mean(by_class) == pytest.approx(stats["AP"], abs=1e-9)


def test_without_a_detection_ap_is_0_or_minus_1_as_pycocotools_has_it(sample_data):
    truth = open_coco(DetectionData(source=str(sample_data("detection"))), "train", masks=True).ground_truth()
    for results in ([], [r | {"score": 0.1, "bbox": [0.0, 0.0, 1.0, 1.0]} for r in guesses(truth, 0)[:1]]):
        for categories in (truth["categories"], [*truth["categories"], {"id": 10, "name": "nowhere"}]):
            stats, by_class = average_precision(truth | {"categories": categories}, results, "box")
            peer = peer_of(truth | {"categories": categories}, results, "bbox")
            assert list(stats.values()) == peer.stats[:6].tolist()
            assert by_class == [0.0] * 3 + [-1.0] * (len(categories) - 3)
            assert -1.0 in stats.values()
    assert set(average_precision(truth | {"annotations": []}, [], "box")[0].values()) == {-1.0}


def test_jitter_moves_boxes_and_masks_with_the_picture(sample_data):
    split = open_coco(DetectionData(source=str(sample_data("detection"))), "train", masks=True)
    pictures = TrainPictures(split, (40, 40), JitterConfig(scale=(0.5, 2.0)), masks=True)
    objects = 0
    for index in range(len(pictures)):
        with seeded(0, index):
            picture, target = pictures.draw(index)
        assert picture.shape == (3, 40, 40)
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
            rows, columns = mask.nonzero(as_tuple=True)
            corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == [int(value) for value in corners]
            if mask.sum() > 30:
                assert picture.float()[:, mask.bool()].mean(1).argmax() == label - 1  # red, green, blue
                objects += 1
    assert objects > 10


def test_a_fitted_picture_and_back():
    pixels, sizes = fit(torch.full((3, 30, 60), 255, dtype=torch.uint8), (32, 32))
    assert (pixels.shape, sizes) == ((3, 32, 32), (16, 32, 30, 60))
    assert (pixels[:, :16] == 255).all()
    assert not (pixels[:, 16:] == 255).any()
    masks = torch.ones(1, 1, 28, 28)
    box = torch.tensor([[8.0, 4.0, 16.0, 12.0]])
    raw = {"boxes": box, "labels": torch.ones(1), "scores": torch.ones(1), "masks": masks}
    detections = with_pasted_masks(enlarged(raw, sizes), (30, 60))
    assert detections["boxes"].tolist() == [[15.0, 7.5, 30.0, 22.5]]
    assert detections["masks"].shape == (1, 30, 60)
    assert detections["masks"].sum() == pytest.approx(15 * 15, rel=0.15)


def test_several_scales_and_mirror_images_find_one_object_once():
    """A detector that sees white pixels, and is the surer the larger the picture."""

    def detector(images, sizes):
        detections = []
        for image, (height, width) in zip(images, sizes, strict=True):
            rows, columns = (image[:, :height, :width].amin(0) > 0).nonzero(as_tuple=True)
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            half = (torch.arange(28) < 14).float().expand(1, 1, 28, 28)  # the left half of what it is shown
            detections.append({"boxes": torch.tensor([box]).float(), "labels": torch.tensor([2]),
                          "scores": torch.tensor([width / 100]), "masks": half})  # fmt: skip
        return detections

    picture = Image.new("RGB", (60, 30))
    picture.paste("white", (6, 9, 21, 24))
    tta = TestTimeAugmentation([(32, 32), (64, 64)], flip=True, most=100)
    fitted = tta.fit(pil_to_tensor(picture))
    batches, sizes = [(pixels[None] == 255).float() for pixels, _ in fitted], [[size] for _, size in fitted]
    (detections,) = tta.detect(detector, batches, sizes)
    assert detections["scores"].tolist() == pytest.approx([0.64])
    assert detections["labels"].tolist() == [2]
    torch.testing.assert_close(detections["boxes"], torch.tensor([[6.0, 9.0, 21.0, 24.0]]), rtol=0, atol=1)
    back = mirrored(detector(batches[1].flip(-1), [(32, 64)])[0], 64)
    torch.testing.assert_close(back["boxes"], detector(batches[1], [(32, 64)])[0]["boxes"])
    assert back["masks"][0, 0, 0, 14:].all(), "the left half of a mirror image is the right half of the picture"


def test_the_pyramid_has_five_levels():
    levels = SimpleFeaturePyramid(32, 16)(torch.randn(2, 32, 6, 5))
    shapes = {name: tuple(level.shape[1:]) for name, level in levels.items()}
    assert shapes == {"0": (16, 24, 20), "1": (16, 12, 10), "2": (16, 6, 5), "3": (16, 3, 3), "pool": (16, 2, 2)}
    x = torch.ones(2, requires_grad=True)
    scaled = scale_gradient(x, 0.25)
    scaled.sum().backward()
    assert (scaled.tolist(), x.grad.tolist()) == ([1.0, 1.0], [0.25, 0.25])


@pytest.mark.parametrize("cascade", [False, True])
def test_runs_learn_resume_exactly_and_evaluate(config, cascade, tmp_path):
    options = ["--steps=24", "--checkpoint_every=22", f"--head.cascade={str(cascade).lower()}", "--batch_size=4",
               *(["--test.scales=[0.75,1.5]", "--test.flip=true"] if cascade else [])]  # fmt: skip
    whole = run(config(*options))
    rows = read_metrics(whole / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert {"val_box_AP", "val_box_AP50", "val_mask_AP", "val_mask_AP_small"} <= rows[-1].keys()
    assert rows[-1]["val_samples"] == 9
    where = whole / "evaluations/step-00000024"
    assert [row["class"] for row in csv.DictReader((where / "classes.csv").open())] == ["circle", "square", "triangle"]
    assert (where / "predictions.png").exists()
    assert json.loads((whole / "model/config.json").read_text())["category_ids"] == [1, 4, 9]
    cut = tmp_path / "cut/detection"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints/step-00000024")
    run(config(*options, f"--out={tmp_path}/cut", "--resume"))
    tensors = [load_file(folder / "model/model.safetensors") for folder in (cut, whole)]
    torch.testing.assert_close(*tensors, rtol=0, atol=0)


@pytest.fixture
def spoiled(sample_data, tmp_path):
    """(change the COCO file of a copy of the data) -> the copy."""

    def spoil(change):
        folder = shutil.copytree(sample_data("detection"), tmp_path / "data")
        content = json.loads((folder / ANNOTATIONS).read_text())
        content = change(content) or content
        (folder / ANNOTATIONS).write_text(json.dumps(content))
        return folder

    return spoil


def rle(content):
    return next(a for a in content["annotations"] if isinstance(a["segmentation"], dict))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["annotations"][0].update(bbox=[3, 3, 0, 5]), "a box without area in the picture"),
        (lambda c: c["annotations"][0].update(bbox=[90, 3, 4, 5]), "a box without area in the picture"),
        (lambda c: c["annotations"][0].update(bbox=[1, float("nan"), 4, 5]), "no bbox of four numbers"),
        (lambda c: c["annotations"][0].update(category_id=5), "a category_id that no category has"),
        (lambda c: c["annotations"][0].update(image_id=999), "an image_id that no image has"),
        (lambda c: rle(c)["segmentation"].update(size=[9, 9]), "a mask of another size than the image"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4]]), "a polygon of under three corners"),
        (lambda c: c["annotations"][0].pop("segmentation"), "no segmentation"),
    ],
)
def test_single_bad_annotations_are_skipped_counted_and_named(spoiled, change, words):
    def once(content):
        change(content)

    split = open_coco(DetectionData(source=str(spoiled(once))), "train", masks=True)
    total = sum(map(len, split.annotations.values())) + 1
    assert f"1 of {total} annotations of" in split.notes[0]
    assert f"skipped: 1 with {words} (annotation " in split.notes[0]


def test_pictures_without_objects_and_crowds(spoiled):
    def change(content):
        for entry in content["annotations"]:
            entry["iscrowd"] = int(entry["image_id"] == 2)
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 1]
        del content["annotations"][0]["area"]

    split = open_coco(DetectionData(source=str(spoiled(change))), "train", masks=True)
    pictures = TrainPictures(split, (32, 32), JitterConfig(), masks=True)
    assert (len(split), len(pictures)) == (24, 22)
    assert "2 of 24 pictures of" in split.notes[-1]
    assert any(a["iscrowd"] for a in split.ground_truth()["annotations"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: {"images": c["images"]}, "is no COCO file: it has no list 'annotations'"),
        (lambda c: [c["categories"].pop(), [c["annotations"].remove(a) for a in list(c["annotations"])
                                            if a["category_id"] == 9], None][-1], "have other category ids"),
        (lambda c: [a.pop("bbox") for a in c["annotations"]] and None, r"no annotation of .* can be used: "),
        (lambda c: [i.pop("width") for i in c["images"]] and None, r"no image of .* can be used: image 1 has no"),
        (lambda c: c["categories"][0].update(id=None), r"category 1 of 3 has no whole number as its id"),
        (lambda c: c["categories"].append({"id": 1, "name": "x"}), r"categories 'circle' and 'x' both have the id 1"),
        (lambda c: c["categories"][0].update(name="disc"), "have other category ids or names"),
    ],
)  # fmt: skip
def test_files_that_will_not_do(config, spoiled, change, words):
    with pytest.raises(UserError, match=words) as caught:
        run(config(f"--data.source={spoiled(change)}"))
    assert "\n" not in str(caught.value)


def test_files_and_folders_that_are_missing(config, spoiled):
    folder = spoiled(lambda content: None)
    with pytest.raises(UserError, match=r"instances_train2017.json does not exist: set data.source, or the split"):
        run(config(f"--data.source={folder}", "--data.train_split=train2017"))
    shutil.rmtree(folder / "val")
    with pytest.raises(UserError, match=r"/val does not exist: it must hold the pictures"):
        run(config(f"--data.source={folder}"))


def test_files_and_pictures_at_other_places(sample_data, tmp_path):
    data = sample_data("detection")
    want = open_coco(DetectionData(source=str(data)), "train", masks=True)
    (tmp_path / "images").symlink_to(data / "train")
    shutil.copy(data / ANNOTATIONS, tmp_path / "train.json")
    got = open_coco(
        DetectionData(source=str(tmp_path), annotations="{split}.json", images="images"), "train", masks=True
    )
    assert got.ground_truth() == want.ground_truth()
    assert np.array_equal(np.asarray(got.picture(0)), np.asarray(want.picture(0)))
    with pytest.raises(UserError, match=r"instances_train.json does not exist, but train.json does: make it a"):
        open_coco(DetectionData(source=str(tmp_path)), "train", masks=True)
