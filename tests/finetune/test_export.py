"""Fine-tuned models as programs: the logits of the model at sizes that the export did not see; what cannot be one."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from finetune.detection.config import DetectionHead
from finetune.export import export, main
from finetune.model_folder import write_model
from finetune.predict import load_predictor
from finetune.registry import TASKS
from finetune.segmentation.config import SegmentationHead, TestConfig
from finetune.segmentation.model import cell_weights
from vim_backbone import UserError, VimConfig
from vim_backbone.preprocessing import RGB

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
SIZES = [(2, 64, 64), (1, 40, 96), (1, 16, 8)]


@pytest.fixture
def run_of(tmp_path):
    """Task -> the folder of a run whose model has fresh weights."""

    def make(task, num_classes, **more):
        torch.manual_seed(0)
        config = VimConfig(d_model=16, depth=1, img_size=(64, 64), patch_size=8, num_classes=num_classes)
        description = {"backbone": config.to_dict(), "preprocessing": RGB.to_dict(), "classes": ["a", "b", "c"]} | more
        (tmp_path / task).mkdir()
        model = TASKS[task].predictor(description, torch.device("cpu")).model
        write_model(tmp_path / task, task, description, model.state_dict())
        return tmp_path / task

    return make


def assert_gives_the_logits(run, program, sizes):
    model = load_predictor(run, torch.device("cpu")).model
    for batch, height, width in sizes:
        images = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            np.testing.assert_allclose(program(images)[0], model(images).numpy(), rtol=0, atol=2e-5)


def test_a_classifier(run_of, tmp_path):
    run = run_of("classification", 3, crop_pct=1.0)
    export(run, tmp_path / "out.pt2", format="exported")
    texts = {"classes": "", "outputs": ""}
    program = torch.export.load(tmp_path / "out.pt2", extra_files=texts)
    assert (json.loads(texts["classes"]), texts["outputs"]) == (["a", "b", "c"], "logits")
    assert_gives_the_logits(run, program.module(), SIZES[:2])


def test_a_segmenter_gives_maps_of_the_size_of_the_picture(run_of, tmp_path):
    head = SegmentationHead(channels=8, layers=[1, 1, 1, 1], auxiliary_channels=8)
    run = run_of("segmentation", 0, head=asdict(head), test=asdict(TestConfig()), zero_is_ignored=False)
    session = onnxruntime.InferenceSession(
        export(run, tmp_path / "out.onnx").path, providers=["CPUExecutionProvider"]
    )  # fmt: skip
    assert session.get_outputs()[0].shape == ["batch", 3, "height", "width"]
    assert_gives_the_logits(run, lambda images: session.run(None, {"images": images.numpy()}), SIZES)


def test_a_detector_is_refused(run_of, tmp_path):
    head = DetectionHead(channels=16, box_width=16)
    run = run_of("detection", 0, head=asdict(head))
    with pytest.raises(UserError, match=r"finds another number of boxes in every picture: no.*export .*backbone with"):
        main([str(run), str(tmp_path / "out.onnx")])


@pytest.mark.parametrize(("n", "side"), [(1, 5), (2, 7), (3, 3), (6, 4), (6, 20)])
def test_means_of_cells_are_those_of_adaptive_pooling(n, side):
    values = torch.randn(1, 2, side)
    torch.testing.assert_close(values @ cell_weights(n, side, values).mT, F.adaptive_avg_pool1d(values, n))
