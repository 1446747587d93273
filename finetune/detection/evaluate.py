"""Evaluation of a detector: COCO's AP of boxes and masks, per class, and pictures with the detections."""

import copy
import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as coco_mask
from matplotlib.figure import Figure
from torch import nn

from finetune.batches import evaluation_batches
from finetune.detection.config import DetectionConfig
from finetune.detection.data import CocoSplit
from finetune.detection.pictures import MIN_SCORE, Objects, draw_objects, sure_or_guessed
from finetune.detection.tta import TestTimeAugmentation, with_pasted_masks
from finetune.pixels import displayed
from finetune.task import EvaluationResult, Task
from launch.run.accelerator import autocast
from vim_backbone.preprocessing import to_model

KINDS = ("box", "mask")
STATS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
METRICS = tuple(f"{kind}_{name}" for kind in KINDS for name in STATS)
"""Scores of an evaluation, as shares of 1; those of masks where masks are predicted."""


def evaluate(
    task: Task[DetectionConfig],
    split: CocoSplit,
    tta: TestTimeAugmentation,
    model: nn.Module,
    accelerator: Accelerator,
) -> EvaluationResult:
    """COCO's evaluation of the detections in all validation pictures. For all processes."""
    ids = [category["id"] for category in split.categories]
    results: list[dict[str, Any]] = []
    image_ids, bad = [], []
    for batch in evaluation_batches(task.val, accelerator, task.eval_batch_size(accelerator), task.config.data.workers):
        bad += batch.bad
        with autocast(task.config.precision, accelerator.device):
            images = [to_model(of_square, accelerator.device, split.preprocessing) for of_square in batch.images]
            outputs = tta.detect(model, images, batch.targets)
        for detections, number, counted in zip(outputs, batch.numbers, batch.counted, strict=True):
            if counted:
                entry = split.images[number]
                image_ids.append(entry["id"])
                results += to_coco(with_pasted_masks(detections, (entry["height"], entry["width"])), entry["id"], ids)
    results, image_ids, bad = gather_object(results), gather_object(image_ids), gather_object(bad)
    if not accelerator.is_main_process:
        return EvaluationResult()
    truth = split.ground_truth()
    counted = set(image_ids)
    truth = {
        "images": [entry for entry in truth["images"] if entry["id"] in counted],
        "annotations": [entry for entry in truth["annotations"] if entry["image_id"] in counted],
        "categories": truth["categories"],
    }
    kinds = KINDS if task.config.head.masks else KINDS[:1]
    by_kind = {kind: average_precision(truth, results, kind) for kind in kinds}
    metrics = {f"{kind}_{name}": value for kind, (stats, _) in by_kind.items() for name, value in stats.items()}

    def write(folder: Path) -> None:
        write_table(folder / "classes.csv", truth, {kind: by_class for kind, (_, by_class) in by_kind.items()})
        draw(folder / "predictions.png", split, sorted(task.pictured), results, task.classes)

    return EvaluationResult(metrics | {"samples": float(len(image_ids))}, write, bad)


def to_coco(detections: dict[str, Any], image_id: int, category_ids: list[int]) -> list[dict[str, Any]]:
    """Rows of COCO's results format: boxes as x, y, width, height; masks as RLE."""
    rows = []
    for i, (box, label, score) in enumerate(
        zip(detections["boxes"].tolist(), detections["labels"].tolist(), detections["scores"].tolist(), strict=True)
    ):
        x, y, right, below = box
        row = {
            "image_id": image_id,
            "category_id": category_ids[label - 1],
            "score": score,
            "bbox": [x, y, right - x, below - y],
        }
        if "masks" in detections:
            row["segmentation"] = coco_mask.encode(np.asfortranarray(detections["masks"][i].numpy()))
        rows.append(row)
    return rows


def average_precision(
    truth: dict[str, Any], results: list[dict[str, Any]], kind: str
) -> tuple[dict[str, float], list[float]]:
    """COCO's AP, AP50, AP75, and by size (-1: no object of that size), of "box" or "mask"; and the AP of each class."""
    coco = COCO(copy.deepcopy(truth))  # it writes into what it is given
    if results:
        # a copy of each row, because loadRes writes into them; without a mask it takes the area of the box
        detections = coco.loadRes(
            [{k: v for k, v in row.items() if kind == "mask" or k != "segmentation"} for row in results]
        )
    else:
        detections = COCO(copy.deepcopy(truth) | {"annotations": []})
    evaluator = COCOeval_faster(coco, detections, "segm" if kind == "mask" else "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    precision = evaluator.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class; all sizes, most detections
    by_class = []
    for k in range(precision.shape[2]):
        valid = precision[:, :, k][precision[:, :, k] > -1]
        by_class.append(float(valid.mean()) if valid.size else -1.0)
    return dict(zip(STATS, map(float, evaluator.stats[:6]), strict=True)), by_class


def write_table(path: Path, truth: dict[str, Any], by_class: dict[str, list[float]]) -> None:
    """Objects and AP of each class."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["class", "objects", *(f"{kind}_AP" for kind in by_class)])
        for k, category in enumerate(truth["categories"]):
            objects = sum(a["category_id"] == category["id"] and not a["iscrowd"] for a in truth["annotations"])
            table.writerow([category["name"], objects, *(f"{values[k]:.4f}" for values in by_class.values())])


def draw(path: Path, split: CocoSplit, numbers: list[int], results: list[dict[str, Any]], classes: list[str]) -> None:
    """One row a picture: its annotations, and the detections with a score of a half or more, or the best guesses."""
    labels = split.labels()
    figure = Figure(figsize=(7.2, 3.6 * len(numbers) + 0.4), dpi=100, layout="constrained")
    axes = figure.subplots(len(numbers), 2, squeeze=False)
    for row, number in zip(axes, numbers, strict=True):
        entry = split.images[number]
        try:
            picture = displayed(split.picture(number), split.preprocessing)
        except Exception:  # named by the evaluation
            continue
        of_picture = [r for r in results if r["image_id"] == entry["id"]]
        detections = [of_picture[i] for i in sure_or_guessed([r["score"] for r in of_picture])[0]]
        for axis, objects in zip(row, (split.annotations[entry["id"]], detections), strict=True):
            kinds = [labels[o["category_id"]] for o in objects]
            boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float32).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            scores = [o["score"] for o in objects] if objects is detections else None
            masks = [coco_mask.decode(o["segmentation"]) for o in objects if o.get("segmentation")]
            stack = torch.from_numpy(np.stack(masks)) if masks and len(masks) == len(objects) else None
            axis.imshow(draw_objects(picture, Objects(boxes, kinds, scores, stack), classes))
    for axis in axes.flat:
        axis.set_axis_off()
    titles = ("annotation", f"found, score {MIN_SCORE:g} or more, else guesses?")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=11)
    figure.savefig(path)
