"""Shared by the tests of fine-tuning: a small published backbone and small drawn data, made once."""

import shutil

import pytest
import torch

from finetune.sample_data import KINDS, Sizes
from vim_backbone import VimConfig, VisionMamba

ARCHITECTURE = {"d_model": 32, "depth": 3, "img_size": 32, "patch_size": 8, "num_classes": 0}


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """The folder of a small backbone with random weights."""
    torch.manual_seed(0)
    model = VisionMamba(VimConfig.from_dict(ARCHITECTURE))
    return model.save_pretrained(tmp_path_factory.mktemp("published") / "backbone")


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory):
    """Kind -> the folder of a small drawn data set."""
    folders = {}

    def make(kind):
        if kind not in folders:
            folder = tmp_path_factory.mktemp("drawn") / kind
            KINDS[kind][0](folder, Sizes(24, 9, 32, 0))
            folders[kind] = folder
        return folders[kind]

    return make


@pytest.fixture(autouse=True)
def _one_thread():
    """The models here are too small to share out, and other test processes may want the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def plain_kernels():
    """The reference kernels here and in all processes started: others are compiled anew for each copy Ray makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIM_KERNELS_BACKEND", "reference")
        yield


def converted(sample_data, folder, convert):
    """Task -> its drawn data below the folder, each picture made a TIFF by `convert(number, path)`, once."""

    def make(task):
        if not (folder / task).exists():
            shutil.copytree(sample_data(task), folder / task)
            for number, path in enumerate(sorted((folder / task).rglob("*.jpg"))):
                convert(number, path)
            for path in (folder / task).rglob("*.json"):
                path.write_text(path.read_text().replace(".jpg", ".tif"))
        return folder / task

    return make
