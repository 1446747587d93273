"""Objects in pictures by a trained detector."""

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from finetune.detection.config import DetectionHead, TestConfig
from finetune.detection.evaluate import to_coco
from finetune.detection.model import Detector
from finetune.detection.pictures import MIN_SCORE, Objects, draw_objects, sure_or_guessed
from finetune.detection.tta import tta_of, with_pasted_masks
from finetune.pixels import displayed, stacked
from finetune.task import Drawing, Prediction, Predictor
from vim_backbone.preprocessing import to_model

BOX = ("x", "y", "width", "height")


class DetectionPredictor(Predictor):
    """Boxes, classes, scores and masks."""

    def new_model(self) -> Detector:
        """The detector with fresh weights."""
        return Detector(self.config, DetectionHead(**self.description["head"]), len(self.classes))

    def predict(self, images: list[Tensor], drawings: list[Drawing]) -> list[Prediction]:
        """`objects`: rows of COCO's results format with the name of the class."""
        test = TestConfig(**self.description.get("test", {}))
        tta = tta_of(self.config, test, self.description["head"]["detections"], self.preprocessing)
        of_squares = [list(of_square) for of_square in zip(*map(tta.fit, images), strict=True)]
        stacks = [stacked([pixels for pixels, _ in of], self.preprocessing) for of in of_squares]
        batches = [to_model(stack, self.device, self.preprocessing) for stack in stacks]
        detections = tta.detect(self.model, batches, [[sizes for _, sizes in of] for of in of_squares])
        predictions = []
        for image, raw, drawing in zip(images, detections, drawings, strict=True):
            inside = with_pasted_masks(raw, (image.shape[1], image.shape[2]))
            objects = to_coco(inside, 0, self.description["category_ids"])
            for entry, label in zip(objects, inside["labels"].tolist(), strict=True):
                del entry["image_id"]
                entry["class"] = self.classes[label - 1]
                if "segmentation" in entry:
                    entry["segmentation"]["counts"] = entry["segmentation"]["counts"].decode()
            if drawing.enabled:
                self._draw(image, inside, drawing.path)
            predictions.append({"objects": objects})
        return predictions

    def _draw(self, image: Tensor, detections: dict[str, Tensor], path: Path) -> None:
        labels, scores = detections["labels"].tolist(), detections["scores"].tolist()
        objects = Objects(detections["boxes"], labels, scores, detections.get("masks"))
        Image.fromarray(draw_objects(displayed(image, self.preprocessing), objects, self.classes)).save(path)

    def in_words(self, prediction: Prediction) -> str:
        """Objects with their scores, where these are high; else the best guesses."""
        objects = prediction["objects"]
        places, sure = sure_or_guessed([entry["score"] for entry in objects])
        words = ", ".join(f"{objects[i]['class']} {objects[i]['score']:.2f}" for i in places)
        return (
            words if sure else f"nothing with a score of {MIN_SCORE:g}" + (f"; best guesses {words}" if words else "")
        )

    def columns(self) -> list[str]:
        """Class, score and box of an object, in pixels."""
        return ["class", "score", *BOX]

    def in_rows(self, prediction: Prediction) -> list[dict[str, Any]]:
        """One for each object."""
        return [
            {"class": entry["class"], "score": entry["score"]} | dict(zip(BOX, entry["bbox"], strict=True))
            for entry in prediction["objects"]
        ]
