"""Pictures reach trackers, each in its own way; one that refuses ends no run."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.run.config import RunConfig
from launch.run.metrics import RunLog
from launch.run.tracking import send_picture


@pytest.fixture
def picture(tmp_path):
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    Image.fromarray(pixels).save(tmp_path / "step-3.png")
    return pixels, tmp_path / "step-3.png"


class Tracker:
    """Notes what it is called with; `ways` are the methods that it has."""

    def __init__(self, name, *ways):
        self.name, self.calls = name, []
        for way in ways:
            setattr(self, way, lambda *args, way=way, **options: self.calls.append((way, args, options)))


@pytest.mark.parametrize("name", ["wandb", "swanlab", "aim", "clearml"])
def test_pixels(name, picture):
    tracker = Tracker(name, "log_images")
    send_picture(tracker, 3, "seen", picture[1])
    ((_, (values,), options),) = tracker.calls
    assert options == {"step": 3}
    given = values["seen"][0] if name in ("wandb", "swanlab") else values["seen"]
    assert np.array_equal(given, picture[0])


def test_files(picture, monkeypatch):
    path = str(picture[1])
    mlflow, trackio, comet = Tracker("mlflow", "log_artifact"), Tracker("trackio", "log"), Tracker("comet_ml")
    comet.tracker = Tracker("experiment", "log_image")
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Image=lambda file: ("image", file)))
    for tracker in (mlflow, trackio, comet, Tracker("dvclive", "log")):
        send_picture(tracker, 3, "seen", picture[1])
    assert mlflow.calls == [("log_artifact", (path,), {"artifact_path": "seen"})]
    assert trackio.calls == [("log", ({"seen": ("image", path)},), {"step": 3})]
    assert comet.tracker.calls == [("log_image", (path,), {"name": "seen", "step": 3})]


def test_tensorboard_holds_the_picture_and_one_that_refuses_is_named_once(tmp_path, picture, capsys):
    config = RunConfig(out=str(tmp_path), name="run")
    config.folder.mkdir()
    accelerator = Accelerator(log_with=["tensorboard"], project_dir=str(config.folder))
    with RunLog(config, accelerator, 9, 0) as log:

        def refuse(*_, **__):
            raise ConnectionError("no network")

        accelerator.trackers.append(SimpleNamespace(name="wandb", log_images=refuse, finish=lambda: None))
        for step in (3, 4):
            log.picture(step, "seen", picture[1])
        accelerator.trackers.pop()
    events = EventAccumulator(str(next((tmp_path / "run").rglob("events.*")).parent)).Reload()
    assert [event.step for event in events.Images("seen")] == [3, 4]
    assert (events.Images("seen")[0].width, events.Images("seen")[0].height) == (7, 5)
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.count(f"tracker wandb takes no picture: no network; all are in {picture[1].parent}") == 1
