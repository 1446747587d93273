"""Distillation: the teacher sees whole pictures as it knows them, stays as it is, and its features are the target."""

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F

from launch.run.randomness import generator
from pretrain.distill.objective import Distill
from pretrain.distill.teacher import DistillConfig, describe
from pretrain.masked import DecoderConfig
from pretrain.masking import MaskConfig
from tests.teachers import MEAN, STD, write_teacher
from vim_backbone import UserError, VimConfig, VisionMamba
from vim_backbone.preprocessing import RGB

SIZES = {"d_model": 32, "depth": 2, "img_size": (32, 48), "patch_size": 8, "num_classes": 0, "position": "sincos"}
GRID = (4, 6)
ALL = ["visible", "hidden", "whole"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teachers") / "vit")


def objective(teacher, **settings):
    return Distill(
        distill=DistillConfig(teacher=teacher, **settings),
        mask=MaskConfig(ratio=0.5),
        decoder=DecoderConfig(width=32, depth=1),
    )


def encoder(**changes):
    torch.manual_seed(0)
    return VisionMamba(VimConfig(**(SIZES | changes))).eval()


def pictures(count=2, size=(32, 48)):
    return torch.randn(count, 3, *size, generator=generator(1))


def features_of(teacher, images, size):
    """What the teacher says of normalised pictures, by timm alone: (b, l, d), each with mean 0 and deviation 1."""
    pixels = images * torch.tensor(RGB.std)[:, None, None] + torch.tensor(RGB.mean)[:, None, None]
    pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
    pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    model = timm.create_model(teacher, pretrained=True, dynamic_img_size=True).eval()
    with torch.no_grad():
        features = model.forward_features(pixels)[:, 1:]
    mean, deviation = features.mean(-1, keepdim=True), features.var(-1, unbiased=False, keepdim=True)
    return (features - mean) / (deviation + 1e-5).sqrt()


@pytest.mark.parametrize("loss", ["cosine", "smooth_l1"])
@pytest.mark.parametrize("at", ALL)
def test_the_loss_is_between_prediction_and_features_of_the_whole_picture(teacher, at, loss):
    method = objective(teacher, at=at, loss=loss)
    model = method.build(encoder())
    images = pictures()
    masks = torch.stack([method.draw(GRID, generator(i)) for i in range(2)])
    wanted = features_of(teacher, images, (16, 24))  # as many patches of 4 as of 8
    inputs = method.inputs(masks, images.device)
    predicted = model(images, *inputs.arguments, compare=True).predicted.detach()
    expected = []
    for i, mask in enumerate(masks):
        for guess, target in zip(predicted[i], wanted[i, mask if at == "hidden" else ~mask], strict=True):
            far = (guess - target).abs()
            if loss == "cosine":
                expected.append(1 - guess @ target / guess.norm() / target.norm())
            else:
                expected.append(torch.where(far < 2, far**2 / 4, far - 1).mean())
    assert len(expected) == 2 * (24 if at == "whole" else 12)
    torch.testing.assert_close(model(images, *inputs.arguments), torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at", ALL)
def test_the_teacher_is_no_part_of_the_model(teacher, at):
    method = objective(teacher, at=at)
    model = method.build(encoder(num_registers=1))
    masks = torch.stack([method.draw(GRID, generator(i)) for i in range(2)])
    drawn = torch.get_rng_state()
    model(pictures(), *method.inputs(masks, torch.device("cpu")).arguments).backward()
    assert torch.equal(torch.get_rng_state(), drawn), "a run draws the same whenever its teacher is read"
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    names = {name.partition(".")[0] for name in model.state_dict()}
    assert {name for name in names if not name.startswith(("decoder", "mask_token"))} == {"encoder"}
    inside = model.teacher._on(torch.device("cpu"))
    assert not inside.training
    assert not any(p.requires_grad or p.grad is not None for p in inside.parameters())
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


@pytest.mark.parametrize("at", ALL)
def test_packed_pictures_are_as_if_alone(teacher, at):
    method = objective(teacher, at=at)
    model = method.build(encoder())
    sizes = [(32, 48), (16, 16), (40, 24)]
    images = [pictures(1, size)[0] for size in sizes]
    masks = [method.draw((h // 8, w // 8), generator(i)) for i, (h, w) in enumerate(sizes)]
    loss = model(images, *method.inputs(masks, torch.device("cpu")).arguments)
    alone = [
        model(image[None], *method.inputs(mask[None], torch.device("cpu")).arguments)
        for image, mask in zip(images, masks, strict=True)
    ]
    torch.testing.assert_close(loss, torch.stack(alone).mean())


def test_a_backbone_of_ours_teaches(tmp_path):
    folder = encoder(depth=1).save_pretrained(tmp_path / "backbone")
    method = objective(f"local-dir:{folder}", at="whole")
    method.check(VimConfig(**(SIZES | {"img_size": (16, 40), "patch_size": 4})))
    model = method.build(encoder(img_size=(16, 40), patch_size=4))
    inputs = method.inputs(torch.zeros(2, 40, dtype=torch.bool), torch.device("cpu"))
    assert model(pictures(2, (16, 40)), *inputs.arguments).isfinite()
    assert describe(f"local-dir:{folder}")[:2] == (32, 8)


def test_compiled_the_teacher_is_left_as_it_is(teacher):
    method = objective(teacher)
    model, images = method.build(encoder(depth=1)), pictures()
    inputs = method.inputs(torch.stack([method.draw(GRID, generator(0))] * 2), images.device)
    compiled = torch.compile(model, backend="aot_eager")(images, *inputs.arguments)
    torch.testing.assert_close(compiled, model(images, *inputs.arguments))
    compiled.backward()


@pytest.mark.parametrize(
    ("settings", "changes", "words"),
    [
        ({"teacher": ""}, {}, "^distill.teacher is '': objective distill learns the features of a model of timm"),
        ({"teacher": "vit_tiny_patch16_224"}, {}, "set distill.pretrained to true, or give local-dir:FOLDER$"),
        ({"teacher": "vit_tiny_patch61", "pretrained": True}, {}, r"timm does not know it \(Unknown model"),
        ({"teacher": "local-dir:nowhere"}, {}, "'local-dir:nowhere': the folder has no config.json$"),
        ({}, {"in_chans": 4}, "it takes 3 bands, and the pictures have 4$"),
        ({}, {"channels": "tokens"}, "set model.channels to mixed$"),
        (
            {"teacher": "mixer_b16_224", "pretrained": True},
            {},
            "it does not take pictures of 64 x 96 pixels, which have as many of its patches as the encoder has, 4 x 6",
        ),
    ],
)
def test_teachers_that_cannot_teach_are_refused_in_a_line(teacher, settings, changes, words):
    given = {"teacher": teacher} | settings
    with pytest.raises(UserError, match=words):
        objective(**given).check(VimConfig(**(SIZES | changes)))


def test_a_published_teacher_of_other_pictures_is_refused(tmp_path):
    bands = replace(RGB, bands=(2, 1, 0), dtype="uint16", range=((0.0,) * 3, (3000.0,) * 3))
    folder = encoder(depth=1).save_pretrained(tmp_path / "backbone", preprocessing=bands)
    method = objective(f"local-dir:{folder}")
    with pytest.raises(UserError, match=r"it takes bands \(2, 1, 0\) of .* and the pictures are RGB of"):
        method.prepare(VimConfig(**SIZES), RGB, native=False)
    method.prepare(VimConfig(**SIZES), bands, native=False)


def test_a_teacher_of_one_size_is_refused_for_native_sizes(tmp_path):
    folder = write_teacher(tmp_path / "vit", model="beit_base_patch16_224", img_size=(16, 24))
    method = objective(folder)
    method.check(VimConfig(**SIZES))
    method.prepare(VimConfig(**SIZES), RGB, native=False)
    with pytest.raises(UserError, match="it does not take pictures of 16 x 28 pixels"):
        method.prepare(VimConfig(**SIZES), RGB, native=True)
