"""Use a fine-tuned model: `python -m finetune.predict RUN PICTURES... [--out FOLDER]`; JSON and pictures come out."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from finetune.classification.evaluate import draw_predictions
from finetune.classification.task import Classifier, judging_transform
from finetune.detection import config as detection
from finetune.detection.evaluate import SHOWN_SCORE, colours_of, drawn_on, to_coco
from finetune.detection.model import Detector
from finetune.detection.task import views_of
from finetune.detection.tta import with_pasted_masks
from finetune.segmentation.config import SegmentationHead, TestConfig
from finetune.segmentation.data import to_test_size
from finetune.segmentation.evaluate import draw_overlays
from finetune.segmentation.model import Segmenter, resize
from finetune.segmentation.task import windows_of
from finetune.train import MODEL
from launch.data.bad_pictures import reason
from launch.data.images import to_rgb
from launch.data.sources import files_below
from launch.run.cli import run
from vim_backbone.config import VimConfig
from vim_backbone.errors import UserError, require
from vim_backbone.files import write_text
from vim_backbone.preprocessing import to_model, to_pixels
from vim_backbone.pretrained import check_names

MAX_MEGAPIXELS = 200.0
Prediction = dict[str, Any]


class Predictor:
    """A fine-tuned model of any task, from the folder of its run."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        path = folder / MODEL / "config.json"
        try:
            self.description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} holds no fine-tuned model: cannot read {path} ({error})") from error
        self.classes: list[str] = self.description["classes"]
        self.config = VimConfig.from_dict(self.description["backbone"])
        self.task: str = self.description["task"]
        self.model = self._build().to(device).eval()
        weights = folder / MODEL / "model.safetensors"
        try:
            tensors = load_file(weights)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {weights}: {error}") from error
        check_names(self.model.state_dict(), tensors, weights)
        self.model.load_state_dict(tensors)

    def _build(self) -> nn.Module:
        if self.task == "classification":
            return Classifier(self.config)
        if self.task == "segmentation":
            return Segmenter(self.config, SegmentationHead(**self.description["head"]), len(self.classes))
        return Detector(self.config, detection.DetectionHead(**self.description["head"]), len(self.classes))

    @torch.inference_mode()
    def __call__(self, images: list[Image.Image], drawings: list[Path]) -> list[Prediction]:
        """Predict on RGB pictures as one batch where the task can, and draw each into its file."""
        work = {"classification": self._classify, "segmentation": self._segment, "detection": self._detect}
        return work[self.task](images, drawings)

    def _classify(self, images: list[Image.Image], drawings: list[Path]) -> list[Prediction]:
        transform = judging_transform(self.config.img_size, self.description["crop_pct"])
        batch = torch.stack([transform(image) for image in images]).to(self.device)
        found = []
        for picture, shares, path in zip(batch, self.model(batch).float().softmax(1).cpu(), drawings, strict=True):
            best = shares.topk(min(5, len(self.classes)))
            guesses = [
                {"class": self.classes[k], "share": share}
                for share, k in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
            shown = to_pixels(picture[None])[0].permute(1, 2, 0).cpu().numpy()
            draw_predictions(path, [(shown, None, shares)], self.classes)
            found.append({"class": guesses[0]["class"], "best": guesses})
        return found

    def _segment(self, images: list[Image.Image], drawings: list[Path]) -> list[Prediction]:
        windows = windows_of(self.config, TestConfig(**self.description["test"]))
        first = int(self.description["zero_is_ignored"])
        found = []
        for image, path in zip(images, drawings, strict=True):  # one by one, because sizes differ
            logits = windows.logits(self.model, to_model(to_test_size(image, self.config.img_size)[None], self.device))
            labels = resize(logits, (image.height, image.width)).argmax(1)[0].cpu().numpy()
            draw_overlays(path, [(np.asarray(image) / 255, None, labels)], self.classes)
            file = path.with_name(f"{path.stem}_labels.png")
            Image.fromarray((labels + first).astype(np.uint8)).save(file)
            counts = np.bincount(labels.ravel(), minlength=len(self.classes)) / labels.size
            shares = {self.classes[k]: float(counts[k]) for k in np.argsort(-counts) if counts[k]}
            found.append({"labels": file.name, "shares": shares})
        return found

    def _detect(self, images: list[Image.Image], drawings: list[Path]) -> list[Prediction]:
        test = detection.TestConfig(**self.description.get("test", {}))
        views = views_of(self.config, test, self.description["head"]["detections"])
        of_squares = [list(of_square) for of_square in zip(*map(views.fit, images), strict=True)]
        batches = [to_model(torch.stack([pixels for pixels, _ in of]), self.device) for of in of_squares]
        detections = views.detect(self.model, batches, [[sizes for _, sizes in of] for of in of_squares])
        found = []
        for image, raw, path in zip(images, detections, drawings, strict=True):
            inside = with_pasted_masks(raw, (image.height, image.width))
            objects = to_coco(inside, 0, self.description["category_ids"])
            for entry, label in zip(objects, inside["labels"].tolist(), strict=True):
                del entry["image_id"]
                entry["class"] = self.classes[label - 1]
                if "segmentation" in entry:
                    entry["segmentation"]["counts"] = entry["segmentation"]["counts"].decode()
            self._draw_objects(image, inside, path)
            found.append({"objects": objects})
        return found

    def _draw_objects(self, image: Image.Image, found: dict[str, Tensor], path: Path) -> None:
        sure = found["scores"] >= SHOWN_SCORE
        labels, scores = found["labels"][sure].tolist(), found["scores"][sure].tolist()
        words = [f"{self.classes[k - 1]} {score:.2f}" for k, score in zip(labels, scores, strict=True)]
        masks = found["masks"][sure] if "masks" in found else None
        colours = colours_of(labels, len(self.classes))
        drawn = drawn_on(transforms.pil_to_tensor(image), found["boxes"][sure], words, masks, colours)
        Image.fromarray(drawn).save(path)


def predict(
    run_folder: Path, pictures: list[Path], out: Path, batch_size: int, device: torch.device
) -> list[Prediction]:
    """Predict on files and folders of pictures; write predictions.json and a picture of each.

    Raises UserError for a run without a model and for pictures that are not there; those that cannot be read have an
    "error" in place of a prediction.
    """
    files: list[Path] = []
    for path in pictures:
        if not path.exists():
            raise UserError(f"{path} does not exist: give pictures, or folders of them")
        files += files_below(path) if path.is_dir() else [path]
    predictor = Predictor(run_folder, device)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Prediction] = []
    for start in range(0, len(files), batch_size):
        images, drawings, waiting = [], [], []
        for number, file in enumerate(files[start : start + batch_size], start=start):
            row: Prediction = {"file": str(file)}
            rows.append(row)
            try:
                with Image.open(file) as image:
                    images.append(to_rgb(image, MAX_MEGAPIXELS))
            except Exception as error:  # a decoder may raise anything on damaged data
                row["error"] = reason(error)
                continue
            row["drawing"] = f"{number:05d}_{file.stem}.png"
            drawings.append(out / row["drawing"])
            waiting.append(row)
        for row, found in zip(waiting, predictor(images, drawings) if images else [], strict=True):
            row.update(found)
    write_text(out / "predictions.json", json.dumps(rows, indent=1) + "\n")
    return rows


def main(argv: list[str]) -> None:
    """Predict, print a line for each picture, and the folder last."""
    parser = argparse.ArgumentParser("finetune.predict", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a fine-tuning run, such as runs/classification")
    parser.add_argument("pictures", type=Path, nargs="+", help="picture files, or folders of them")
    parser.add_argument("--out", type=Path, help="where predictions go; RUN/predictions when not given")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures of one forward pass")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    told = parser.parse_args(argv)
    require(told.batch_size >= 1, "--batch_size", told.batch_size, "it must be at least 1")
    out = told.out or told.run / "predictions"
    for row in predict(told.run, told.pictures, out, told.batch_size, torch.device(told.device)):
        print(f"{row['file']}: {in_words(row)}")  # noqa: T201 - the command's result
    print(out)  # noqa: T201


def in_words(row: Prediction) -> str:
    """A prediction in a few words."""
    if "error" in row:
        return f"not read, {row['error']}"
    if "best" in row:
        return ", ".join(f"{guess['class']} {100 * guess['share']:.0f} %" for guess in row["best"])
    if "shares" in row:
        return ", ".join(f"{name} {100 * share:.0f} %" for name, share in list(row["shares"].items())[:5])
    sure = [f"{entry['class']} {entry['score']:.2f}" for entry in row["objects"] if entry["score"] >= SHOWN_SCORE]
    return ", ".join(sure) or f"nothing with a score of {SHOWN_SCORE:g}"


if __name__ == "__main__":
    sys.exit(run(main))
