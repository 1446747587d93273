"""Maps of labels by a trained segmenter."""

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from finetune.pixels import displayed
from finetune.segmentation.config import SegmentationHead, TestConfig
from finetune.segmentation.data import to_test_size
from finetune.segmentation.evaluate import draw_overlays
from finetune.segmentation.huge import HugeMap
from finetune.segmentation.model import Segmenter, resize
from finetune.segmentation.windows import Windows, windows_of
from finetune.task import Drawing, Prediction, Predictor
from launch.data.pictures import Picture
from vim_backbone.preprocessing import to_model

SHARE = "share of {}"


class SegmentationPredictor(Predictor):
    """A class for each pixel."""

    def new_model(self) -> Segmenter:
        """The segmenter with fresh weights."""
        return Segmenter(self.config, SegmentationHead(**self.description["head"]), len(self.classes))

    def predict(self, images: list[Tensor], drawings: list[Drawing]) -> list[Prediction]:
        """`labels`: file of the map, labels as in the training data; `shares` of the pixels by class."""
        windows, of_classes = self._windows(), self._values()
        predictions = []
        for image, drawing in zip(images, drawings, strict=True):  # one by one, because sizes differ
            scaled = to_test_size(image, self.config.img_size)[None]
            logits = windows.logits(self.model, to_model(scaled, self.device, self.preprocessing))
            labels = resize(logits, (image.shape[1], image.shape[2])).argmax(1)[0].cpu().numpy()
            if drawing.enabled:
                picture = displayed(image, self.preprocessing).permute(1, 2, 0).numpy() / 255
                draw_overlays(drawing.path, [(picture, None, labels)], self.classes)
            file = drawing.path.with_name(f"{drawing.path.stem}_labels.png")
            Image.fromarray(of_classes[labels]).save(file)
            counts = np.bincount(labels.ravel(), minlength=len(self.classes))
            predictions.append({"labels": file.name, "shares": self._shares(counts)})
        return predictions

    def predict_huge(self, picture: Picture, drawing: Drawing) -> Prediction:
        """As `predict`, of a picture larger than memory: the map is a TIFF, by windows at the file's resolution."""
        windows = self._windows()

        def segment(pixels: Tensor) -> Tensor:
            logits = windows.logits(self.model, to_model(pixels, self.device, self.preprocessing))
            return resize(logits, (pixels.shape[2], pixels.shape[3])).argmax(1)[0]

        huge = HugeMap(picture, self.preprocessing, self.config.img_size)
        file = drawing.path.with_name(f"{drawing.path.stem}_labels.tif")
        counts = huge.write(file, self._values(), segment)
        if drawing.enabled:
            small, labels = huge.thumbnail()
            draw_overlays(drawing.path, [(small, None, labels)], self.classes)
        return {"labels": file.name, "shares": self._shares(counts)}

    def _windows(self) -> Windows:
        return windows_of(self.config, TestConfig(**self.description["test"]))

    def _values(self) -> np.ndarray:
        """The value of each class in a map."""
        first = int(self.description["zero_is_ignored"])
        values = self.description.get("values") or range(first, first + len(self.classes))
        return np.array(values, np.uint8 if max(values) < 256 else np.uint16)

    def _shares(self, counts: np.ndarray) -> dict[str, float]:
        """Shares of the pixels by class, the largest first."""
        shares = counts / counts.sum()
        return {self.classes[k]: float(shares[k]) for k in np.argsort(-shares) if shares[k]}

    def in_words(self, prediction: Prediction) -> str:
        """The five largest classes."""
        return ", ".join(f"{name} {100 * share:.0f} %" for name, share in list(prediction["shares"].items())[:5])

    def columns(self) -> list[str]:
        """The map's file, and the share of each class."""
        return ["labels", *map(SHARE.format, self.classes)]

    def in_rows(self, prediction: Prediction) -> list[dict[str, Any]]:
        """One; a class that is nowhere has 0."""
        shares = {SHARE.format(name): prediction["shares"].get(name, 0.0) for name in self.classes}
        return [{"labels": prediction["labels"]} | shares]
