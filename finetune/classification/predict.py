"""Classes of pictures by a trained classifier."""

from typing import Any

from torch import Tensor

from finetune.classification.evaluate import draw_predictions
from finetune.classification.model import Classifier
from finetune.classification.transforms import evaluation_transform
from finetune.pixels import on_device, stacked
from finetune.task import Drawing, Prediction, Predictor
from vim_backbone.preprocessing import as_rgb, to_pixels


class ClassificationPredictor(Predictor):
    """The best five classes of each picture."""

    def new_model(self) -> Classifier:
        """The classifier with fresh weights."""
        return Classifier(self.config)

    def predict(self, images: list[Tensor], drawings: list[Drawing]) -> list[Prediction]:
        """`class`, and `best`: the five best with their shares."""
        transform = evaluation_transform(self.config.img_size, self.description["crop_pct"], self.preprocessing)
        batch = on_device(stacked([transform(image) for image in images], self.preprocessing), self.device)
        predictions = []
        for picture, shares, drawing in zip(batch, self.model(batch).float().softmax(1).cpu(), drawings, strict=True):
            top = shares.topk(min(5, len(self.classes)))
            best = [
                {"class": self.classes[k], "share": share}
                for share, k in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            ]
            if drawing.enabled:
                pixels = as_rgb(to_pixels(picture, self.preprocessing)).permute(1, 2, 0).cpu().numpy()
                draw_predictions(drawing.path, [(pixels, None, shares)], self.classes)
            predictions.append({"class": best[0]["class"], "best": best})
        return predictions

    def in_words(self, prediction: Prediction) -> str:
        """Classes with their shares."""
        return ", ".join(f"{guess['class']} {100 * guess['share']:.0f} %" for guess in prediction["best"])

    def columns(self) -> list[str]:
        """The best class and its share."""
        return ["class", "share"]

    def in_rows(self, prediction: Prediction) -> list[dict[str, Any]]:
        """One."""
        return [prediction["best"][0]]
