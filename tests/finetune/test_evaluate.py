"""Scores equal scikit-learn's, whole or added up piece by piece."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score

from finetune.classification.evaluate import Counts, draw_confusion, draw_predictions, write_tables


def random_scores(samples=97, classes=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, classes, generator=generator), torch.randint(classes, (samples,), generator=generator)


def test_counts_are_those_of_sklearn():
    logits, targets = random_scores()
    counts = Counts(8, torch.device("cpu"))
    for part in (slice(0, 40), slice(40, 41), slice(41, 97)):
        counts.add(logits[part], targets[part])
    metrics = counts.metrics()
    assert metrics["top1"] == pytest.approx(accuracy_score(targets, logits.argmax(1)), abs=1e-12)
    assert metrics["top5"] == pytest.approx(top_k_accuracy_score(targets, logits, k=5, labels=range(8)), abs=1e-12)
    assert metrics["loss"] == pytest.approx(log_loss(targets, logits.double().softmax(1), labels=range(8)), rel=1e-6)
    assert metrics["samples"] == 97
    assert (counts.confusion.numpy() == confusion_matrix(targets, logits.argmax(1))).all()


def test_many_classes_take_no_table_of_classes_by_classes(tmp_path):
    many = 200_000  # whose table would take 320 GB
    counts = Counts(many, torch.device("cpu"))
    logits = torch.zeros(4, many)
    logits[torch.arange(4), torch.tensor([7, 199_999, 5, 5])] = 1
    counts.add(logits, torch.tensor([7, 199_999, 6, 6]))
    assert counts.metrics()["top1"] == 0.5
    write_tables(tmp_path, counts, [str(k) for k in range(many)])
    pairs = (tmp_path / "confusion.csv").read_text().splitlines()
    assert pairs == ["class,predicted,samples", "6,5,2"]


def test_tables_and_pictures(tmp_path):
    logits, targets = random_scores()
    counts = Counts(8, torch.device("cpu"))
    counts.add(logits, targets)
    names = [f"kind {i}" for i in range(8)]
    write_tables(tmp_path, counts, names)
    rows = list(csv.DictReader((tmp_path / "classes.csv").open()))
    assert [int(row["samples"]) for row in rows] == torch.bincount(targets, minlength=8).tolist()
    assert float(rows[3]["top1"]) == pytest.approx(
        float((logits.argmax(1) == targets)[targets == 3].float().mean()), abs=1e-4
    )
    pairs = list(csv.DictReader((tmp_path / "confusion.csv").open()))
    assert sum(int(pair["samples"]) for pair in pairs) == int((logits.argmax(1) != targets).sum())
    draw_confusion(tmp_path / "c.png", counts.confusion.numpy(), names)
    draw_predictions(tmp_path / "p.png", [(np.zeros((8, 8, 3)), 1, logits[0].softmax(0))] * 3, names)
    for name in ("c.png", "p.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 200
