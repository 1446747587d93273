"""A backbone with a classifier, which is its own head."""

import torch.nn.functional as F
from torch import Tensor

from finetune.task import TaskModel
from vim_backbone.vim import Images


class Classifier(TaskModel):
    """A backbone with its head, and the loss as part of the forward pass."""

    def forward(self, images: Images, targets: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
        """(b, c, h, w), or a list of (c, h, w), -> logits (b, classes).

        With targets, classes (b,) or shares (b, classes), the mean loss.
        """
        logits = self.backbone(images)
        if targets is None:
            return logits
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
