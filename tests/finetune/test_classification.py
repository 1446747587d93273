"""Whole runs of classification: that they learn, resume, evaluate, and refuse what cannot be done."""

import csv
import io
import json
import shutil

import datasets
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from finetune.classification.config import AugmentConfig, ClassificationConfig, ClassificationData
from finetune.classification.task import ClassificationTask
from finetune.classification.transforms import training_transform
from finetune.main import main
from finetune.sample_data import Sizes
from finetune.sample_data import classification as draw
from finetune.train import finetune
from launch.data.labelled import open_labelled, read_class_folders
from launch.run.cli import parse
from tests.rows import read_metrics
from tests.vim_backbone import official
from vim_backbone import UserError, VimConfig, VisionMamba, from_pretrained
from vim_backbone.convert import convert

SMALL = ["--batch_size=4", "--log_every=1", "--data.workers=0", "--trackers=[]", "--optim.base_lr=0.01", "--pictures=2"]
PLAIN = ["--augment.auto_augment=null", "--augment.mixup=0", "--augment.cutmix=0", "--augment.erasing=0",
         "--augment.color_jitter=0", "--augment.min_scale=0.5", "--model.drop_path_rate=0"]  # fmt: skip


def run(config):
    return finetune(ClassificationTask(config))


@pytest.fixture
def config(backbone, sample_data, tmp_path):
    def make(*argv):
        data = (
            []
            if any(a.startswith("--data.source") for a in argv)
            else [f"--data.source={sample_data('classification')}"]
        )
        options = [*SMALL, f"--backbone={backbone}", f"--out={tmp_path}", *data, *argv]
        return parse(ClassificationConfig, options, "finetune/main.py", "")

    return make


def losses(folder):
    return {
        r["step"]: (r["loss"], r["grad_norm"], r["lr"]) for r in read_metrics(folder / "metrics.jsonl") if "loss" in r
    }


def test_what_a_run_leaves_behind(config):
    folder = run(config("--steps=2", "--evaluate_every=1", "--trackers=[tensorboard]", "--ema_decay=0.5"))
    evaluations = [row for row in read_metrics(folder / "metrics.jsonl") if "val_top1" in row]
    assert [row["step"] for row in evaluations] == [1, 2]
    assert evaluations[0]["val_samples"] == 9
    where = folder / "evaluations/step-00000002"
    assert {p.name for p in where.iterdir()} == {
        "classes.csv", "confusion.csv", "confusion.png", "metrics.json", "predictions.png",
    }  # fmt: skip
    assert [row["class"] for row in csv.DictReader((where / "classes.csv").open())] == ["circle", "square", "triangle"]
    assert json.loads((where / "metrics.json").read_text())["top5"] == 1.0
    assert json.loads((folder / "model/config.json").read_text())["classes"] == ["circle", "square", "triangle"]
    events = b"".join(p.read_bytes() for p in folder.rglob("events.out.tfevents.*"))
    assert b"predictions" in events
    assert b"confusion" in events
    average = load_file(folder / "checkpoints/step-00000002/ema.safetensors")
    torch.testing.assert_close(load_file(folder / "model/model.safetensors"), average, rtol=0, atol=0)
    published = from_pretrained(folder / "backbone")
    torch.testing.assert_close(published.state_dict(), {k[9:]: v for k, v in average.items()}, rtol=0, atol=0)
    assert published.num_classes == 3
    assert "Classification of" in (folder / "backbone/README.md").read_text()


@pytest.mark.parametrize("mode", ["evaluate", "knn"])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_an_evaluation_has_the_precision_of_training(config, mode, precision, dtype):
    """Of an accelerator without mixed precision, too, as DeepSpeed's is."""
    task = ClassificationTask(config(f"--precision={precision}", f"--mode={'train' if mode == 'evaluate' else mode}"))
    model, seen = task.new_model().eval(), []
    model.backbone.layers[0].mixer.in_proj.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    with torch.no_grad():
        task.evaluate(model, Accelerator(mixed_precision="no"))
    assert set(seen) == {dtype}


def test_it_learns(config, tmp_path):
    draw(tmp_path / "more", Sizes(90, 30, 32, 0))
    options = [f"--data.source={tmp_path}/more", "--batch_size=15", "--optim.base_lr=0.1", "--optim.layer_decay=1",
               "--augment.crop_pct=1", "--model.global_pool=avg", *PLAIN]  # fmt: skip
    folder = run(config("--steps=160", *options))
    rows = read_metrics(folder / "metrics.jsonl")
    assert rows[-1]["val_top1"] >= 0.7  # chance is 1 in 3
    again = run(config(f"--backbone={folder}/backbone", "--mode=evaluate", "--name=again", *options))
    metrics = json.loads((again / "evaluations/step-00000000/metrics.json").read_text())
    assert metrics["top1"] == rows[-1]["val_top1"]
    assert metrics["loss"] == pytest.approx(rows[-1]["val_loss"], rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="deit"),
        pytest.param(
            ("--accumulation=2", "--ema_decay=0.9", "--data.workers=2", "--optim.clip_grad=1", "--evaluate_every=1",
             "--model.drop_path_rate=0.5"),
            id="everything",
        ),
        pytest.param((*PLAIN, "--model.freeze=true", "--model.from_scratch=true"), id="frozen"),
    ],
)  # fmt: skip
def test_resume_is_exact(config, options, tmp_path):
    whole = run(config("--steps=4", "--checkpoint_every=2", *options))
    cut = tmp_path / "cut/classification"
    shutil.copytree(whole, cut)
    for part in ("checkpoints/step-00000004", "model", "backbone", "evaluations"):
        shutil.rmtree(cut / part)
    run(config("--steps=4", "--checkpoint_every=2", *options, f"--out={tmp_path}/cut", "--resume"))
    assert losses(cut) == losses(whole)
    for name in ("model/model.safetensors", "checkpoints/step-00000004/optimizer.safetensors"):
        torch.testing.assert_close(load_file(cut / name), load_file(whole / name), rtol=0, atol=0)
    assert read_metrics(cut / "metrics.jsonl")[-1] == read_metrics(whole / "metrics.jsonl")[-1]


def test_a_frozen_backbone_stays_as_it_was(config, backbone):
    folder = run(config("--steps=2", "--model.freeze=true"))
    before, after = from_pretrained(backbone).state_dict(), load_file(folder / "backbone/model.safetensors")
    torch.testing.assert_close({k: v for k, v in after.items() if not k.startswith("head")}, before, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["linear", "knn"])
def test_probes_of_frozen_features(config, mode, sample_data):
    folder = run(config(f"--mode={mode}", "--probe.neighbours=3"))
    metrics = json.loads((folder / "evaluations/step-00000000/metrics.json").read_text())
    assert metrics["samples"] == 9
    assert metrics["top1"] > 0.4
    assert not (folder / "model").exists()


def test_few_shots_and_hold_out(config, sample_data):
    task = ClassificationTask(config("--data.shots=2"))
    assert [task.train.data.labels.count(k) for k in range(3)] == [2, 2, 2]
    assert len(task.val) == 9
    other = ClassificationTask(config("--data.shots=2", "--seed=1"))
    assert [task.train.name(i) for i in range(6)] != [other.train.name(i) for i in range(6)]
    held = ClassificationTask(config(f"--data.source={sample_data('classification')}/train", "--data.holdout=0.25"))
    train, val = ({samples.name(i) for i in range(len(samples))} for samples in (held.train, held.val))
    assert (len(train), len(val), len(train & val)) == (18, 6, 0)
    assert [held.val.data.labels.count(k) for k in range(3)] == [2, 2, 2]


@pytest.fixture
def hub_data(sample_data, tmp_path, monkeypatch):
    """A data set as the Hub holds them: parquet files of encoded pictures and class labels; no split "val"."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = datasets.Features(
        photo=datasets.Image(), kind=datasets.ClassLabel(names=["triangle", "circle", "square"])
    )
    for split, name in (("train", "train"), ("val", "test")):
        files = sorted((sample_data("classification") / split).rglob("*.jpg"))
        columns = {"photo": [{"bytes": file.read_bytes(), "path": None} for file in files],
                   "kind": [file.parent.name for file in files]}  # fmt: skip
        data = datasets.Dataset.from_dict(columns, features=features)
        data.to_parquet(tmp_path / f"shapes/data/{name}-00000-of-00001.parquet")
    return tmp_path / "shapes"


def test_a_data_set_of_the_hub(config, hub_data, tmp_path):
    folder = run(config(f"--data.source=hf:{hub_data}", "--steps=1", *PLAIN))
    assert read_metrics(folder / "metrics.jsonl")[-1]["val_samples"] == 9
    rows = list(csv.DictReader((folder / "evaluations/step-00000001/classes.csv").open()))
    assert [(row["class"], row["samples"]) for row in rows] == [("triangle", "3"), ("circle", "3"), ("square", "3")]
    task = ClassificationTask(config(f"--data.source=hf:{hub_data}", "--data.shots=2"))
    assert [task.train.data.labels.count(k) for k in range(3)] == [2, 2, 2]
    with pytest.raises(UserError, match=r"has no column 'picture' of type Image: set data.image_column"):
        run(config(f"--data.source=hf:{hub_data}", "--data.image_column=picture"))
    with pytest.raises(UserError, match=r"datasets cannot load .*nothing \(split 'train'\): "):
        run(config(f"--data.source=hf:{tmp_path}/nothing"))


def test_longer_sequences_and_higher_resolution(config):
    folder = run(config("--steps=1", "--model.stride=4", "--model.img_size=[48, 40]", *PLAIN))
    published = from_pretrained(folder / "backbone")
    assert (published.grid_size, published.config.img_size) == ((11, 9), (48, 40))


def test_unreadable_pictures_are_skipped_counted_and_named(config, sample_data, tmp_path):
    shutil.copytree(sample_data("classification"), tmp_path / "data")
    (tmp_path / "data/train/circle/00000.jpg").write_bytes(b"broken")
    (tmp_path / "data/val/circle/00000.jpg").write_bytes(b"broken")
    folder = run(config(f"--data.source={tmp_path}/data", "--steps=6", *PLAIN))
    assert (folder / "bad_pictures.txt").read_text().startswith("train/circle/00000.jpg\t")
    assert (folder / "evaluations/step-00000006/bad_pictures.txt").read_text().startswith("val/circle/00000.jpg\t")
    assert read_metrics(folder / "metrics.jsonl")[-1]["val_samples"] == 8


def class_folders(root, **counts):
    for name, count in counts.items():
        (root / name.replace("__", "/")).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (32, 32)).save(root / name.replace("__", "/") / f"{i}.png")
    return root


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({}, "has no class folders"),
        ({"train__a": 1, "train__b": 0, "val__a": 1}, r"class folder .*train/b has no pictures: fill it or remove it"),
        ({"train__a": 1, "train__b": 1}, "has no 'val' to evaluate on: set data.val_split, or data.holdout"),
        ({"train__a": 1, "train__b": 1, "val__c": 1}, "has class 'c', which the training folder lacks"),
        ({"train__a": 1, "train__b": 1, "val__b": 1}, "has no class 'a', which the training folder has"),
        ({"train__a": 1, "val__a": 1}, "has one class, 'a'"),
    ],
)
def test_folders_that_will_not_do(config, tmp_path, counts, words):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=words):
        run(config(f"--data.source={class_folders(tmp_path / 'data', **counts)}"))
    assert not (tmp_path / "classification").exists()


def test_class_folders_may_be_links_and_what_editors_leave_is_none(tmp_path):
    class_folders(tmp_path / "store", a=2, b=1)
    class_folders(tmp_path / "data", train__c__deep=2)
    class_folders(tmp_path / "data/train/__MACOSX", c=1)
    Image.new("RGB", (8, 8)).save(tmp_path / "data/train/c/0.png")
    (tmp_path / "data/train/.ipynb_checkpoints").mkdir()
    for name in "ab":
        (tmp_path / "data/train" / name).symlink_to(tmp_path / "store" / name)
    (tmp_path / "data/train/c/link").symlink_to(tmp_path / "store/b")
    data = read_class_folders(tmp_path / "data/train", None)
    assert data.classes == ["a", "b", "c"]
    assert [data.labels.count(label) for label in range(3)] == [2, 1, 4]


@pytest.mark.parametrize(
    ("labels", "kind", "options", "words"),
    [
        ([0, 1, None, 1], datasets.ClassLabel(names=["a", "b"]), {}, r"row 2 has label None: it must be 0 \.\. 1"),
        ([-1, 1, 0, 1], datasets.ClassLabel(names=["a", "b"]), {}, r"row 0 has label -1: it must be 0 \.\. 1"),
        (
            ["a", "b", "a", "b"],
            datasets.Value("string"),
            {},
            r"ClassLabel, none of \['image', 'label'\] is one: set .*fold",
        ),
        (
            [0, 1, 0, 1],
            datasets.Value("int64"),
            {"label_column": "label"},
            "ClassLabel, 'label' is none: .*encode_column",
        ),
        ([0, 1, 0, 1], datasets.ClassLabel(names=["a", "b"]), {"label_column": "lable"}, "did you mean 'label'"),
        ([0, 1, 0, 1], datasets.ClassLabel(names=["a", "b"]), {"image_column": "label"}, "Image, 'label' is none: set"),
        ([0, 1, 0, 1], datasets.ClassLabel(names=["a", "b", "c"]), {"holdout": 0.5}, "class 'c' of .* has no training"),
    ],
)
def test_labels_that_will_not_do(tmp_path, labels, kind, options, words):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    rows = {"image": [{"bytes": picture.getvalue(), "path": None}] * len(labels), "label": labels}
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=words) as caught:
        open_labelled(ClassificationData(source=f"hf:{tmp_path}", **options), 0)
    assert "\n" not in str(caught.value)


def test_classes_that_differ_between_the_splits_of_a_data_set(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    for split, names, labels in (("train", ["a", "b"], [0, 1]), ("val", ["b", "a"], [0, 1])):
        rows = {"image": [{"bytes": picture.getvalue(), "path": None}] * 2, "label": labels}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        (tmp_path / split).mkdir()
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / split))
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "val"]}))
    with pytest.raises(UserError, match=r"other classes: \['a', 'b'\] to train on, \['b', 'a'\] to evaluate on"):
        open_labelled(ClassificationData(source=f"hf:{tmp_path}"), 0)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--data.source=nowhere",), "data.source nowhere does not exist"),
        (("--backbone=nowhere",), "no backbone at nowhere"),
        (("--model.img_size=30",), "image height is 30 pixels: it must be a multiple of the stride 8"),
        (("--mode=evaluate",), "has a head of 0 classes and data.source 3: fine-tune it first"),
        (("--data.shots=99",), "data.shots is 99: class 'circle' has 8 training pictures"),
        (("--mode=knn", "--probe.neighbours=99"), "probe.neighbours is 99: there are 24 training pictures"),
        (("--batch_size=3",), "a forward pass has 3 pictures: mixup needs an even number"),
    ],
)
def test_what_cannot_be_done_is_one_line(config, argv, words):
    with pytest.raises(UserError, match=words) as caught:
        run(config(*argv))
    assert "\n" not in str(caught.value)


def test_another_backbone_is_refused_on_resume(config):
    run(config("--steps=1"))
    with pytest.raises(UserError, match=r"was trained with model\.img_size = None, not 64"):
        run(config("--steps=2", "--model.img_size=64", "--resume"))


def test_a_backbone_of_another_width_is_refused_on_resume(config, backbone, tmp_path):
    folder = shutil.copytree(backbone, tmp_path / "own")
    run(config("--steps=1", f"--backbone={folder}"))
    VisionMamba(VimConfig.from_dict(from_pretrained(folder).config.to_dict() | {"d_model": 48})).save_pretrained(folder)
    with pytest.raises(UserError, match=r"has shape .*the model wants") as caught:
        run(config("--steps=2", f"--backbone={folder}", "--resume"))
    assert "\n" not in str(caught.value)


def test_official_weights_score_as_the_official_model_does_and_are_fine_tuned(config, sample_data, tmp_path):
    state = official.random_state(d=32, depth=2, patches=16, patch=8, classes=3)
    torch.save({"model": state}, tmp_path / "official.pth")
    folder = convert(tmp_path / "official.pth", tmp_path / "converted")
    options = (f"--backbone={folder}", "--augment.crop_pct=1", *PLAIN)
    official_run = run(config("--mode=evaluate", "--name=official", *options))
    scores = json.loads((official_run / "evaluations/step-00000000/metrics.json").read_text())
    samples = ClassificationTask(config(*options)).val
    images, targets = samples.collate([samples.draw(i) for i in range(len(samples))])
    logits = official.forward(state, images, stride=8)
    assert scores["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-4)
    assert scores["top1"] == pytest.approx((logits.argmax(1) == targets).float().mean().item())
    tuned = run(config("--steps=1", "--name=tuned", *options))
    after = load_file(tuned / "backbone/model.safetensors")
    assert after.keys() == state.keys()
    assert not torch.equal(after["layers.0.mixer.A_b_log"], state["layers.0.mixer.A_b_log"])


@pytest.mark.parametrize("policy", ["rand-m10-n15-inc1", "original"])
def test_augmentation_never_asks_for_what_pillow_refuses(policy):
    """Level 10 keeps no bit at all in timm's posterize; of 15 operations and pictures some are that."""
    transform = training_transform((8, 8), AugmentConfig(auto_augment=policy))
    for _ in range(15):
        assert transform(torch.full((3, 8, 8), 255, dtype=torch.uint8)).isfinite().all()


def test_the_command_line(capsys):
    main(["--help"])
    assert "classification" in capsys.readouterr().out
    with pytest.raises(UserError, match="the first argument is 'clasification', it must be the task: did you mean"):
        main(["clasification"])
    with pytest.raises(UserError, match="backbone is '': give the folder"):
        main(["classification", "--data.source=x"])
