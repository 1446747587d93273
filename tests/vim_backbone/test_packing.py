"""Pictures of different sizes in one row: each comes out as if it had been alone, forward and backward."""

import pytest
import torch

from tests.vim_backbone.test_vim import LAYOUTS, small
from vim_backbone import UserError
from vim_backbone.block import drop_path

SIZES = [(64, 64), (32, 80), (16, 16), (112, 48)]


def pictures(sizes=SIZES, channels=3):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(channels, *size, generator=generator) for size in sizes]


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("class_token", "registers"), LAYOUTS)
@pytest.mark.parametrize("mixer_norm", [False, True])
def test_each_picture_as_if_alone(class_token, registers, mixer_norm):
    pool = "avg" if class_token == "none" else "token"
    model = small(class_token=class_token, num_registers=registers, mixer_norm=mixer_norm, global_pool=pool)
    images = pictures()
    tokens = model.forward_features(images)
    assert [len(part) for part in tokens] == [16 + model.num_prefix_tokens, 10 + model.num_prefix_tokens,
                                            1 + model.num_prefix_tokens, 21 + model.num_prefix_tokens]  # fmt: skip
    for part, image in zip(tokens, images, strict=True):
        close(part, model.forward_features(image[None])[0])
    close(model(images), torch.cat([model(image[None]) for image in images]))


@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
@pytest.mark.parametrize("norm", [False, True])
def test_intermediates(output_fmt, norm):
    model = small(num_registers=2)
    images = pictures()
    options = {"indices": [0, 2], "output_fmt": output_fmt, "norm": norm, "return_prefix_tokens": True}
    final, packed = model.forward_intermediates(images, **options)
    for number, image in enumerate(images):
        alone_final, alone = model.forward_intermediates(image[None], **options)
        close(final[number], alone_final[0])
        for level, (patches, special) in zip(packed, alone, strict=True):
            close(level[number][0], patches[0])
            close(level[number][1], special[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(checkpointing):
    model = small().train()
    model.set_grad_checkpointing(checkpointing)
    images = pictures()
    model(images).square().sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for image in images:
        model(image[None]).square().sum().backward()
    assert packed
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_stochastic_depth_takes_whole_pictures():
    torch.manual_seed(0)
    borders = torch.tensor([0, 3, 4, 40, 41, 60], dtype=torch.int32)
    dropped = drop_path(torch.ones(1, 60, 2), 0.5, True, borders)
    surviving = [set(part.flatten().tolist()) for part in dropped[0].split(borders.diff().tolist())]
    assert all(values in ({0.0}, {2.0}) for values in surviving)
    assert {0.0} in surviving
    assert {2.0} in surviving


def test_compiles_without_a_graph_break():
    model, images = small(), pictures([(32, 32), (16, 48)])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(compiled(images), model(images))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "empty"),
        ([torch.zeros(1, 3, 32, 32)], r"\(1, 3, 32, 32\), it must be \(channels, h, w\)"),
        ([torch.zeros(3, 32, 32), torch.zeros(1, 32, 32)], "1 channels"),
        ([torch.zeros(3, 32, 30)], "30"),
    ],
)
def test_what_cannot_be_packed(images, message):
    with pytest.raises(UserError, match=message):
        small()(images)
