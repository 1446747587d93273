"""Pictures to the trackers of Accelerate, each of which takes them in its own way, or not at all."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def send_picture(tracker: Any, step: int, name: str, path: Path) -> None:
    """Show a picture file (PNG) in a tracker; one that takes none is passed over. Raises what the tracker raises.

    Args:
        tracker: one of Accelerate's, which has been started.
        step: of the run.
        name: of the series of pictures that this one belongs to.
    """
    kind = tracker.name
    if kind == "mlflow":
        tracker.log_artifact(str(path), artifact_path=name)
    elif kind == "trackio":
        tracker.log({name: import_module("trackio").Image(str(path))}, step=step)
    elif kind == "comet_ml":
        tracker.tracker.log_image(str(path), name=name, step=step)
    elif hasattr(tracker, "log_images"):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        if kind == "tensorboard":
            tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
        elif kind in ("wandb", "swanlab"):
            tracker.log_images({name: [pixels]}, step=step)
        else:
            tracker.log_images({name: pixels}, step=step)
