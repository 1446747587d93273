"""What the loop relies on of an objective, for each of them: its parts fit together."""

import pytest
import torch
from PIL import Image

from launch.run.config import field_types
from launch.run.randomness import generator
from pretrain.config import OBJECTIVES, PretrainConfig
from pretrain.distill.teacher import DistillConfig
from pretrain.nepa.objective import NEPA
from pretrain.objective import Objective
from tests.teachers import write_teacher
from vim_backbone import VimConfig, VisionMamba
from vim_backbone.block import Block
from vim_backbone.preprocessing import RGB

GRID = (4, 6)


@pytest.fixture(params=OBJECTIVES)
def objective(request, tmp_path):
    settings = {}
    if request.param == "distill":
        settings["distill"] = DistillConfig(teacher=write_teacher(tmp_path / "teacher"))
    return PretrainConfig(objective=request.param, **settings).method


@pytest.fixture(params=["fixed", "native"])
def views(request, objective):
    """Images and what is added to them, stacked or as lists."""
    extras = [objective.draw(GRID, generator(i)) for i in range(3)]
    images = torch.randn(3, 3, 32, 48, generator=generator(0))
    return (images, torch.stack(extras)) if request.param == "fixed" else (list(images), extras)


def encoder():
    torch.manual_seed(0)
    return VisionMamba(
        VimConfig(d_model=32, depth=2, img_size=(32, 48), patch_size=8, num_classes=0, position="sincos")
    )


def test_the_model_trains_the_encoder_that_is_published(objective, views):
    whole = encoder()
    model = objective.build(whole)
    assert objective.encoder(model) is whole
    images, extras = views
    inputs = objective.inputs(extras, torch.device("cpu"))
    loss = model(images, *inputs.arguments)
    assert loss.shape == ()
    loss.backward()
    assert all(p.grad is not None for p in whole.parameters() if p.requires_grad)


def test_tokens_are_those_that_the_encoder_scans(objective, views):
    whole = encoder()
    model = objective.build(whole)
    images, extras = views
    lengths = []
    twice = 2 if objective.work(whole.config, 4, recompute="inputs").stacks[0].apart else 1
    block = next(m for m in whole.modules() if isinstance(m, Block))
    block.register_forward_pre_hook(
        lambda module, arguments: lengths.append(arguments[0].shape[0] * arguments[0].shape[1])
    )
    inputs = objective.inputs(extras, torch.device("cpu"))
    model(images, *inputs.arguments)
    assert lengths == [twice * (inputs.tokens + 3)]  # and a class token for each of three pictures
    work = objective.work(whole.config, 4, recompute="inputs")
    assert 3 * twice * work.stacks[0].tokens == lengths[0]


def test_what_was_learned_becomes_a_picture(objective, views, tmp_path):
    images, extras = views
    with torch.no_grad():
        draw = objective.show(objective.build(encoder()).eval(), images, extras, RGB)
    draw("title", tmp_path / objective.picture_folder / "a.png")
    with Image.open(tmp_path / objective.picture_folder / "a.png") as image:
        assert image.width > 600


@pytest.mark.parametrize("name", ["summary", "build", "show", "work"])
def test_an_objective_that_lacks_a_part_is_not_made(name):
    """Whatever else it has: the error names the class and the part."""
    parts = {part: vars(NEPA)[part] for part in ("summary", "build", "show", "work") if part != name}
    with pytest.raises(TypeError, match=rf"abstract class Toy .*{name}"):
        type("Toy", (Objective,), parts | {"title": "Toy"})()


def test_the_fields_it_names_exist():
    types = field_types(PretrainConfig)
    for kind in OBJECTIVES.values():
        assert all(any(name.startswith(prefix) for name in types) for prefix in kind.architecture_fields)
        assert set(kind.cost_fields) <= types.keys()


def test_the_command_line_knows_all():
    assert field_types(PretrainConfig)["objective"] == f"one of {', '.join(OBJECTIVES)}"


def test_what_is_visible_is_the_view_without_what_the_encoder_skips(objective):
    """As many patches stay as the encoder scans tokens, and they stay as they were."""
    extra = objective.draw(GRID, generator(0))
    pixels = torch.rand(3, 32, 48, generator=generator(1))
    visible = objective.visible(pixels, extra, 8)
    assert visible.shape == pixels.shape
    kept = (visible == pixels).unfold(1, 8, 8).unfold(2, 8, 8).all(0).flatten(2).all(-1)
    assert kept.sum() == objective.inputs([extra], torch.device("cpu")).tokens
