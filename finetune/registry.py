"""The downstream tasks by name, for finetune/main.py, finetune.predict and sweeps. A new task is a line here."""

from typing import Any

from finetune.classification.task import ClassificationTask
from finetune.detection.task import DetectionTask
from finetune.segmentation.task import SegmentationTask
from finetune.task import Task

TASKS: dict[str, type[Task[Any]]] = {task.name: task for task in (ClassificationTask, DetectionTask, SegmentationTask)}
