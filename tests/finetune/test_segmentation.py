"""Segmentation: scores against independent counts, windows, crops, and whole runs."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import jaccard_score

from finetune.segmentation.config import CropConfig, SegmentationConfig, SegmentationData
from finetune.segmentation.data import (
    IGNORED,
    PhotometricDistort,
    TrainCrops,
    WholePictures,
    class_names,
    open_pairs,
)
from finetune.segmentation.evaluate import confusion_of, overlay, scores
from finetune.segmentation.model import dice_ce, dice_loss, feature_layers, pixel_loss
from finetune.segmentation.task import SegmentationTask
from finetune.segmentation.windows import Windows, starts
from finetune.train import finetune
from launch.run.cli import parse
from launch.run.randomness import seeded
from tests.rows import read_metrics
from vim_backbone import UserError

SMALL = ["--batch_size=4", "--log_every=1", "--data.workers=0", "--trackers=[]", "--pictures=2", "--head.channels=16",
         "--head.auxiliary_channels=16", "--optim.base_lr=0.05", "--model.drop_path_rate=0"]  # fmt: skip


def run(config):
    return finetune(SegmentationTask(config))


@pytest.fixture
def config(backbone, sample_data, tmp_path):
    def make(*argv):
        data = (
            [] if any(a.startswith("--data.source") for a in argv) else [f"--data.source={sample_data('segmentation')}"]
        )
        options = [*SMALL, f"--backbone={backbone}", f"--out={tmp_path}", *data, *argv]
        return parse(SegmentationConfig, options, "finetune/main.py", "")

    return make


def counted_directly(predicted, target, classes):
    """IoU and accuracy of each class by loops over pixels, and the share of right pixels."""
    iou, accuracy, right, total = [], [], 0, 0
    for k in range(classes):
        both = either = labelled = 0
        for p, t in zip(predicted.flatten().tolist(), target.flatten().tolist(), strict=True):
            if t != IGNORED:
                both += p == k and t == k
                either += p == k or t == k
                labelled += t == k
        right += both
        total += labelled
        iou += [both / either] if either else []
        accuracy += [both / labelled] if labelled else []
    return {"mIoU": np.mean(iou), "mAcc": np.mean(accuracy), "aAcc": right / total}


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_a_direct_count(seed):
    rng = np.random.default_rng(seed)
    predicted = torch.from_numpy(rng.integers(0, 6, (40, 31)))
    target = torch.from_numpy(rng.choice([0, 1, 2, 3, 5, IGNORED], (40, 31)))  # class 4 is predicted and never true
    parts = [confusion_of(predicted[rows], target[rows], 7) for rows in (slice(0, 7), slice(7, 8), slice(8, 40))]
    ours = scores(torch.stack(parts).sum(0))
    assert ours == pytest.approx(counted_directly(predicted, target, 7), abs=1e-9)
    counted = target != IGNORED
    peer = jaccard_score(target[counted], predicted[counted], average="macro")
    assert ours["mIoU"] == pytest.approx(peer, abs=1e-9)


def test_windows_cover_every_pixel_and_average():
    assert starts(512, 512, 341) == [0]
    assert starts(683, 512, 341) == [0, 171]
    assert starts(1200, 512, 341) == [0, 341, 682, 688]

    def model(images):
        return torch.stack([images[:, 0], images[:, 1] * 2], dim=1)

    image = torch.randn(1, 3, 50, 41)
    expected = model(image)
    torch.testing.assert_close(Windows((16, 16), (10, 10), 8, 8, False).logits(model, image), expected)
    torch.testing.assert_close(Windows((64, 64), (10, 10), 8, 8, False).logits(model, image), expected)
    torch.testing.assert_close(Windows((16, 16), (0, 0), 8, 8, False).logits(model, image), expected)
    flipped = Windows((16, 16), (10, 10), 8, 8, True).logits(model, image)
    torch.testing.assert_close(flipped.exp(), expected.softmax(1))  # a model that sees single pixels is symmetric


@pytest.mark.parametrize(("step", "flip"), [((10, 10), False), ((10, 7), True), ((0, 0), True)])
def test_passes_are_counted_as_they_are_taken(step, flip):
    sizes = []

    def model(images):
        sizes.append(images.shape)
        return images

    windows, image = Windows((16, 16), step, 8, 8, flip), torch.zeros(1, 3, 50, 12)
    windows.logits(model, image)
    assert windows.passes(50, 12) == len(sizes)
    windows.idle(model, image, 3)
    assert len(sizes) == windows.passes(50, 12) + 3


def test_the_loss_leaves_ignored_pixels_out():
    logits, target = torch.randn(2, 4, 5, 5), torch.randint(4, (2, 5, 5))
    target[0, :3] = IGNORED
    expected = -logits.log_softmax(1).gather(1, target.clamp(max=3)[:, None])[:, 0][target != IGNORED].mean()
    torch.testing.assert_close(pixel_loss(logits, target), expected)
    assert pixel_loss(logits, torch.full_like(target, IGNORED)) == 0


def test_dice_equals_loops_over_pictures_classes_and_pixels():
    torch.manual_seed(0)
    logits, target = torch.randn(3, 4, 5, 7, dtype=torch.float64), torch.randint(3, (3, 5, 7))  # none of class 3
    target[0, :3], target[1, target[1] == 1] = IGNORED, 2
    probabilities = logits.softmax(1)
    expected = []
    for picture in range(3):
        losses = []
        for k in range(4):
            hit = predicted = true = 0.0
            for row in range(5):
                for column in range(7):
                    if (label := int(target[picture, row, column])) != IGNORED:
                        p = float(probabilities[picture, k, row, column])
                        hit, predicted, true = hit + p * (label == k), predicted + p, true + (label == k)
            losses += [1 - 2 * hit / (predicted + true)] if true else []
        expected.append(np.mean(losses))
    assert dice_loss(logits, target).item() == pytest.approx(np.mean(expected), abs=1e-12)
    assert dice_ce(logits, target) == dice_loss(logits, target) + pixel_loss(logits, target)
    perfect = torch.nn.functional.one_hot(target.clamp(max=3), 4).permute(0, 3, 1, 2) * 1e3
    assert dice_loss(perfect, target) == 0
    assert dice_loss(logits, torch.full_like(target, IGNORED)) == 0


def test_a_segmenter_learns_by_the_loss_that_it_is_given(config):
    rows = {}
    for loss in ("cross_entropy", "dice_ce"):
        folder = run(config("--steps=1", f"--name={loss}", f"--head.loss={loss}", "--head.dropout=0"))
        rows[loss] = read_metrics(folder / "metrics.jsonl")[0]["loss"]
        assert json.loads((folder / "model/config.json").read_text())["head"]["loss"] == loss
    assert rows["cross_entropy"] < rows["dice_ce"] < rows["cross_entropy"] + 1.4  # Dice of both heads: at most 1 + 0.4


def test_layers_as_in_the_recipe():
    assert feature_layers(None, 24) == [6, 12, 18, 24]
    with pytest.raises(UserError, match=r"head\.layers has 9: the backbone has blocks 1 to 4"):
        feature_layers([1, 2, 9, 4], 4)
    with pytest.raises(UserError, match=r"head\.layers ends with 3: it must end with the last block, 4"):
        feature_layers([1, 2, 3, 3], 4)


def test_crops_move_picture_and_map_together(sample_data):
    data = SegmentationData(source=str(sample_data("segmentation")))
    pairs, notes = open_pairs(data, "training", class_names(data))
    assert (len(pairs), notes) == (24, ["in 24 maps of training 9.1% of the pixels count for nothing"])
    whole = np.asarray(Image.open(pairs.maps[0]))
    labels = pairs.labels(0)
    assert ((labels == IGNORED) == (whole == 0)).all()
    assert (labels[whole > 0] == whole[whole > 0] - 1).all()
    crops = TrainCrops(pairs, (24, 40), CropConfig(photometric=False))
    fullest = []
    for index in range(24):
        with seeded(0, index):
            picture, target = crops.draw(index)
        assert (picture.shape, target.shape) == ((3, 24, 40), (24, 40))
        for kind, hue in ((1, 0), (2, 1), (3, 2)):  # circles are reddest, squares greenest, triangles bluest
            inside = picture.float()[:, target == kind]
            assert inside.numel() == 0 or inside.mean(1).argmax() == hue
        counts = torch.bincount(target[target != IGNORED].long())
        fullest.append(float(counts.max() / counts.sum()))
    assert np.mean(fullest) < 0.85


def test_pictures_have_one_scale_in_training_and_evaluation_whatever_the_shape_of_the_crop(tmp_path):
    """A square of a third of the picture's width keeps that share of the crop's, in crops and in whole pictures."""
    values = np.ones((60, 90), np.uint8)
    values[15:45, 30:60] = 2
    for folder, name in (("images", "a.png"), ("annotations", "a.png")):
        (tmp_path / folder / "training").mkdir(parents=True)
        picture = values if folder == "annotations" else np.stack([values * 100] * 3, -1)
        Image.fromarray(picture).save(tmp_path / folder / "training" / name)
    pairs, _ = open_pairs(SegmentationData(source=str(tmp_path), num_classes=2), "training", ["ground", "square"])
    for size, side in (((40, 60), 20), ((60, 90), 30), ((60, 60), 30), ((40, 90), 30)):
        crops = TrainCrops(pairs, size, CropConfig(photometric=False, ratio=(1, 1), category_max=1, flip=0))
        with seeded(0, 0):
            picture, target = crops.draw(0)
        assert picture.shape[1:] == target.shape == size
        evaluated, labels = WholePictures(pairs, size).draw(0)
        assert labels.shape == (60, 90)
        for pixels in (picture[0], evaluated[0]):
            columns = (pixels > 150).sum(1)  # of 100 the ground, of 200 the square
            assert int(columns.max()) == side, (size, pixels.shape)


def test_photometric_distortion_keeps_the_hue():
    """A class may be known by its colour, so that channels must not be exchanged, as torchvision does for half."""
    picture = torch.tensor([150, 60, 80], dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4)
    distort, outcomes = PhotometricDistort(), set()
    for seed in range(60):
        with seeded(seed):
            pixel = distort(picture)[:, 0, 0].tolist()
        assert max(pixel) == pixel[0]
        outcomes.add(tuple(pixel))
    assert len(outcomes) > 30


def test_labels_are_laid_over_a_picture_but_for_the_background_and_ignored_pixels():
    picture = np.broadcast_to(np.array([0.3, 0.6, 0.9]), (1, 3, 3))  # grey of 0.6
    colours = np.array([[1.0, 0, 0], [0, 1.0, 0]])
    drawn = overlay(picture, np.array([[0, 1, IGNORED]]), colours, clear=0)
    np.testing.assert_allclose(drawn[0], [[0.6, 0.6, 0.6], [0.24, 0.84, 0.24], [0.24, 0.24, 0.24]])
    np.testing.assert_allclose(overlay(picture, np.array([[0] * 3]), colours)[0, 0], [0.84, 0.24, 0.24])


def test_what_a_run_leaves_behind(config):
    folder = run(config("--steps=2", "--test.flip=true", "--trackers=[tensorboard]"))
    rows = read_metrics(folder / "metrics.jsonl")
    assert {"loss", "loss_segmentation", "loss_auxiliary"} <= rows[0].keys()
    assert rows[1]["loss"] == pytest.approx(rows[1]["loss_segmentation"] + rows[1]["loss_auxiliary"])
    assert rows[-1]["val_samples"] == 9
    where = folder / "evaluations/step-00000002"
    table = list(csv.DictReader((where / "classes.csv").open()))
    assert [row["class"] for row in table] == ["background", "circle", "square", "triangle"]
    with Image.open(where / "predictions.png") as image:
        assert image.width > 500
    assert json.loads((folder / "model/config.json").read_text())["task"] == "segmentation"
    whole = run(config("--mode=evaluate", "--resume", "--test.mode=whole", "--trackers=[]"))
    assert len([row for row in read_metrics(whole / "metrics.jsonl") if "val_mIoU" in row]) == 2


def test_it_learns_and_resumes_exactly(config, tmp_path):
    options = ["--steps=60", "--checkpoint_every=58", "--batch_size=6", "--ema_decay=0.9", "--crop.ratio=[0.8,1.2]",
               "--optim.base_lr=0.1", "--optim.layer_decay=1", "--crop.photometric=false",
               "--head.channels=32"]  # fmt: skip
    whole = run(config(*options))
    rows = read_metrics(whole / "metrics.jsonl")
    losses = [row["loss_segmentation"] for row in rows if "loss" in row]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    cut = tmp_path / "cut/segmentation"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints/step-00000060")
    shutil.rmtree(cut / "model")
    run(config(*options, f"--out={tmp_path}/cut", "--resume"))
    tensors = [load_file(folder / "model/model.safetensors") for folder in (cut, whole)]
    torch.testing.assert_close(*tensors, rtol=0, atol=0)
    assert read_metrics(cut / "metrics.jsonl")[-1] == rows[-1]


@pytest.fixture
def spoiled(sample_data, tmp_path):
    """A copy of the drawn data, to be spoiled."""
    return shutil.copytree(sample_data("segmentation"), tmp_path / "data")


def rewrite(path, change):
    Image.fromarray(change(np.asarray(Image.open(path)).copy())).save(path)


@pytest.mark.parametrize(
    ("spoil", "argv", "words"),
    [
        (lambda d: (d / "annotations/training/000003.png").unlink(), (),
         r"1 pictures of .* have no map in .*0003.png"),
        (lambda d: shutil.rmtree(d / "images/validation"), (), r"images/validation does not exist: set data.images"),
        (lambda d: rewrite(d / "annotations/training/000000.png", lambda a: a + 9), (),
         r"000000.png has label \d+: it must be 1 .. 4, or ignored; see data.num_classes \(4\) and data.zero"),
        (lambda d: (d / "objectInfo4.txt").unlink(), (), "how many classes. set data.num_classes, or put classes.txt"),
        (lambda d: None, ("--data.num_classes=7",), "data.num_classes is 7, but .*objectInfo4.txt names 4 classes"),
        (lambda d: [rewrite(p, lambda a: a[:9]) for p in (d / "annotations/training").glob("*")], (),
         r"is \(32, 9\) pixels, its picture 000000.jpg \(32, 32\); 24 maps are so"),
        (lambda d: None, ("--data.source=nowhere",), "data.source nowhere does not exist"),
        (lambda d: None, ("--mode=evaluate",), "mode evaluate needs a trained run"),
    ],
)  # fmt: skip
def test_data_that_will_not_do(config, spoiled, spoil, argv, words):
    spoil(spoiled)
    source = () if any("source" in a for a in argv) else (f"--data.source={spoiled}",)
    with pytest.raises(UserError, match=words) as caught:
        run(config(*source, *argv))
    assert "\n" not in str(caught.value)
    assert not (spoiled.parent / "segmentation").exists()


def test_single_bad_maps_are_skipped_counted_and_named(config, spoiled, capsys):
    rewrite(spoiled / "annotations/training/000001.png", lambda a: a[:9])
    (spoiled / "annotations/training/000002.png").write_bytes(b"broken")
    folder = run(config(f"--data.source={spoiled}", "--steps=6", "--log_every=6"))
    assert "1 pairs of training skipped, picture and map differ in size: 000001.jpg" in capsys.readouterr().err
    assert (folder / "bad_pictures.txt").read_text().startswith("000002.jpg\t")


def test_pictures_and_maps_without_splits_are_explained(tmp_path):
    for name in ("images/a.jpg", "masks/a.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name)
    data = SegmentationData(source=str(tmp_path), maps="masks", num_classes=2)
    words = r"images/training does not exist, but files in .*images do: move them into training/ and validation/ there"
    with pytest.raises(UserError, match=words):
        open_pairs(data, "training", ["a", "b"])
