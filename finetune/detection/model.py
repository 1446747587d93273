"""ViTDet's pyramid over Vim, with torchvision's region proposals and box and mask heads; Cascade on top of them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, box_iou, clip_boxes_to_image
from torchvision.ops.misc import Conv2dNormActivation

from finetune.detection.config import DetectionHead
from finetune.task import TaskModel
from vim_backbone import VimConfig
from vim_backbone.vim import Images

LEVELS = ("0", "1", "2", "3")
STAGES = ((0.5, 1.0), (0.6, 2.0), (0.7, 3.0))
"""IoU of a positive, and what the box regression weights are multiplied with (Cascade R-CNN, arXiv 1712.00726)."""
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
layer_norm = partial(LayerNorm2d, eps=1e-6)


class SimpleFeaturePyramid(nn.Module):
    """One map -> maps of four, two, one and half times its size, and a coarser one for proposals (arXiv 2203.16527)."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        half, quarter = max(1, width // 2), max(1, width // 4)
        resized: list[tuple[nn.Module, int]] = [
            (
                nn.Sequential(
                    nn.ConvTranspose2d(width, half, 2, 2),
                    layer_norm(half),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, 2),
                ),
                quarter,
            ),
            (nn.ConvTranspose2d(width, half, 2, 2), half),
            (nn.Identity(), width),
            (nn.MaxPool2d(2, ceil_mode=True), width),
        ]
        smooth = partial(Conv2dNormActivation, norm_layer=layer_norm, activation_layer=None, bias=False)
        self.levels = nn.ModuleList(
            nn.Sequential(resize, smooth(inputs, channels, 1), smooth(channels, channels, 3))
            for resize, inputs in resized
        )

    def forward(self, maps: Tensor) -> dict[str, Tensor]:
        """(b, width, h, w) -> five maps by name, largest first."""
        levels: dict[str, Tensor] = {name: level(maps) for name, level in zip(LEVELS, self.levels, strict=True)}
        levels["pool"] = F.max_pool2d(levels["3"], 1, 2)
        return levels


class CascadeHeads(RoIHeads):
    """Three box heads, each fed with the boxes of the one before; the mask head is that of Mask R-CNN."""

    def __init__(self, stages: Sequence[tuple[nn.Module, nn.Module]], **parts: Any) -> None:
        super().__init__(box_head=None, box_predictor=None, **parts)
        self.heads = nn.ModuleList(head for head, _ in stages)
        self.predictors = nn.ModuleList(predictor for _, predictor in stages)
        self.matchers = [Matcher(iou, iou, allow_low_quality_matches=False) for iou, _ in STAGES]
        self.coders = [BoxCoder(tuple(scale * weight for weight in BOX_WEIGHTS)) for _, scale in STAGES]  # pyright: ignore

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections (in evaluation) and losses (in training), as RoIHeads gives them."""
        losses: dict[str, Tensor] = {}
        sampled: Any = None
        if self.training:
            assert targets is not None
            proposals, matched, labels, _ = self.select_training_samples(proposals, targets)
            sampled = proposals, matched, labels
        scores = []
        for stage, (head, predictor) in enumerate(zip(self.heads, self.predictors, strict=True)):
            pooled = self.box_roi_pool(features, proposals, image_shapes)
            logits, deltas = predictor(head(scale_gradient(pooled, 1 / len(STAGES)) if self.training else pooled))
            if self.training:
                assert targets is not None
                losses |= self._stage_losses(stage, logits, deltas, proposals, targets)
            else:
                scores.append(logits.softmax(-1))
            with torch.no_grad():
                boxes = self.coders[stage].decode(deltas.detach(), proposals)[:, 0].split([len(p) for p in proposals])
                proposals = [clip_boxes_to_image(b, shape) for b, shape in zip(boxes, image_shapes, strict=True)]
        results = [] if self.training else self._detections(torch.stack(scores).mean(0), proposals, image_shapes)
        if self.has_mask():
            losses |= self._masks(features, results, image_shapes, sampled, targets)
        return results, losses

    def _stage_losses(
        self, stage: int, logits: Tensor, deltas: Tensor, proposals: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        boxes, labels = [], []
        for proposal, target in zip(proposals, targets, strict=True):
            if not len(target["boxes"]):
                boxes.append(proposal)
                labels.append(torch.zeros(len(proposal), dtype=torch.long, device=proposal.device))
                continue
            matched = self.matchers[stage](box_iou(target["boxes"], proposal))
            boxes.append(target["boxes"][matched.clamp(min=0)])
            labels.append(torch.where(matched >= 0, target["labels"][matched.clamp(min=0)], 0))
        target_deltas, label = torch.cat(self.coders[stage].encode(boxes, proposals)), torch.cat(labels)  # pyright: ignore
        positive = label > 0
        distance = (deltas[positive].float() - target_deltas[positive]).abs().sum()
        return {
            f"loss_classifier_{stage}": F.cross_entropy(logits.float(), label),
            f"loss_box_reg_{stage}": distance / max(1, label.numel()),
        }

    def _detections(
        self, scores: Tensor, boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Scores averaged over the stages, boxes of the last, through RoIHeads' own choice of detections."""
        same = torch.cat(boxes)[:, None].expand(-1, scores.shape[1], -1)
        coder, self.box_coder = self.box_coder, GivenBoxes(same)  # pyright: ignore[reportAttributeAccessIssue]
        outputs = self.postprocess_detections(scores.clamp(min=1e-12).log(), same, boxes, image_shapes)
        self.box_coder = coder
        return [{"boxes": b, "labels": k, "scores": s} for b, s, k in zip(*outputs, strict=True)]

    def _masks(self, features: Any, results: Any, image_shapes: Any, sampled: Any, targets: Any) -> dict[str, Tensor]:
        assert self.mask_roi_pool is not None
        assert self.mask_head is not None
        assert self.mask_predictor is not None
        if not self.training:
            boxes = [result["boxes"] for result in results]
            logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
            for mask, result in zip(maskrcnn_inference(logits, [r["labels"] for r in results]), results, strict=True):
                result["masks"] = mask
            return {}
        proposals, matched, labels = sampled
        positive = [label > 0 for label in labels]
        boxes = [proposal[p] for proposal, p in zip(proposals, positive, strict=True)]
        indices = [m[p] for m, p in zip(matched, positive, strict=True)]
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
        masks, labels = [t["masks"] for t in targets], [t["labels"] for t in targets]
        return {"loss_mask": maskrcnn_loss(logits, boxes, masks, labels, indices)}


class GivenBoxes:
    """In place of a box coder, where boxes are decoded already."""

    def __init__(self, boxes: Tensor) -> None:
        self.boxes = boxes

    def decode(self, deltas: Tensor, proposals: list[Tensor]) -> Tensor:
        """The boxes given."""
        del deltas, proposals
        return self.boxes


class AgnosticPredictor(nn.Module):
    """Class logits, and one box for all classes."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.cls_score, self.bbox_pred = nn.Linear(width, classes), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, width) -> (n, classes), (n, 4)."""
        return self.cls_score(x), self.bbox_pred(x)


class Detector(TaskModel):
    """Backbone, pyramid, proposals, heads; the whole picture is one scan."""

    def __init__(self, config: VimConfig, head: DetectionHead, classes: int) -> None:
        super().__init__(config)
        self.pyramid = SimpleFeaturePyramid(config.d_model, head.channels)
        stride = config.stride
        sizes = tuple((head.anchor_scale * stride * factor,) for factor in (0.25, 0.5, 1, 2, 4))
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)  # pyright: ignore[reportArgumentType]
        limits = {"training": head.proposals, "testing": head.proposals}
        self.rpn = RegionProposalNetwork(
            anchors, RPNHead(head.channels, anchors.num_anchors_per_location()[0], conv_depth=2),
            0.7, 0.3, 256, 0.5, {"training": 2 * head.proposals, "testing": head.proposals}, limits, 0.7,
        )  # fmt: skip
        self.roi_heads = build_heads(head, classes + 1)

    def forward(
        self, images: Images, targets: list[dict[str, Tensor]] | None = None, sizes: list[tuple[int, int]] | None = None
    ) -> Any:
        """(b, c, h, w), or a list of (c, h, w) of one size, normalised; with targets the named losses, else detections
        in pixels of the given pictures.

        `sizes` are the height and width that a picture takes up, the rest being padding.
        """
        height, width = images[0].shape[-2:]
        sizes = sizes or [(height, width)] * len(images)
        levels = self.pyramid(self.feature_maps(images, [-1])[0])
        levels = {name: level.float() for name, level in levels.items()}
        # of the pictures nothing but their height and width is looked at
        proposals, losses = self.rpn(ImageList(images[0][None], sizes), levels, targets)
        detections, more = self.roi_heads(levels, proposals, sizes, targets)
        return detections if targets is None else losses | more


def build_heads(head: DetectionHead, classes: int) -> RoIHeads:
    """Box and mask heads: four convolutions and a linear layer for boxes, four convolutions for masks, layer norm."""
    width, inside = head.channels, [head.channels] * 4

    def box_head() -> nn.Module:
        return FastRCNNConvFCHead((width, 7, 7), inside, [head.box_width], norm_layer=layer_norm)

    parts: dict[str, Any] = {
        "box_roi_pool": MultiScaleRoIAlign(list(LEVELS), 7, 2),
        "fg_iou_thresh": 0.5, "bg_iou_thresh": 0.5, "batch_size_per_image": head.samples, "positive_fraction": 0.25,
        "bbox_reg_weights": BOX_WEIGHTS, "score_thresh": head.min_score, "nms_thresh": 0.5,
        "detections_per_img": head.detections,
    }  # fmt: skip
    if head.masks:
        parts["mask_roi_pool"] = MultiScaleRoIAlign(list(LEVELS), 14, 2)
        parts["mask_head"] = MaskRCNNHeads(width, inside, 1, norm_layer=layer_norm)
        parts["mask_predictor"] = MaskRCNNPredictor(width, width, classes)
    if head.cascade:
        stages = [(box_head(), AgnosticPredictor(head.box_width, classes)) for _ in STAGES]
        return CascadeHeads(stages, **parts)
    return RoIHeads(box_head=box_head(), box_predictor=FastRCNNPredictor(head.box_width, classes), **parts)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """The same values; their gradient times the factor, because the stages share the features."""
    return x * factor + (x * (1 - factor)).detach()
