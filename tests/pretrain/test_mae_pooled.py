"""Masked autoencoding with the pooled scan: a batch and a packed row are the loop over pictures.

The model is in float64; the loss is taken in float32, hence the tolerance.
"""

import torch

from pretrain.config import ModelConfig, PretrainConfig
from pretrain.mae.model import MaskedAutoencoder
from pretrain.masked import DecoderConfig, split_patches
from pretrain.masking import MaskConfig
from vim_backbone import VimConfig, VisionMamba


def autoencoder():
    torch.manual_seed(0)
    config = VimConfig(
        d_model=16, depth=2, img_size=(32, 48), patch_size=8, num_classes=0, position="sincos", scan="pooled",
        class_token="none", global_pool="avg", mixer_norm=True, visible_share=0.25,
    )  # fmt: skip
    return MaskedAutoencoder(VisionMamba(config), DecoderConfig(width=8, depth=2)).double()


def masks(count, patches, hidden):
    generator = torch.Generator().manual_seed(patches)
    return torch.stack([torch.randperm(patches, generator=generator) < hidden for _ in range(count)])


def loss_and_gradients(model, images, mask):
    loss = model(images, *split_patches(mask))
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


def test_a_batch_and_a_packed_row_are_the_mean_over_pictures():
    model, mask = autoencoder(), masks(3, 24, 20)
    images = torch.randn(3, 3, 32, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    alone = [loss_and_gradients(model, images[i : i + 1], mask[i : i + 1]) for i in range(3)]
    want = [torch.stack(values).mean(0) for values in zip(*alone, strict=True)]
    for got in (loss_and_gradients(model, images, mask), loss_and_gradients(model, list(images), list(mask))):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)


def test_pictures_of_different_sizes():
    model = autoencoder()
    images = [torch.randn(3, h, w, dtype=torch.float64) for h, w in ((32, 48), (16, 8), (8, 40))]
    mask = [masks(1, 24, 20)[0], masks(1, 2, 1)[0], masks(1, 5, 3)[0]]
    alone = [loss_and_gradients(model, [image], [hidden]) for image, hidden in zip(images, mask, strict=True)]
    want = [torch.stack(values).mean(0) for values in zip(*alone, strict=True)]
    torch.testing.assert_close(loss_and_gradients(model, images, mask), want, rtol=1e-5, atol=1e-9)


def test_one_flag_makes_a_pooled_model_that_knows_its_share():
    config = PretrainConfig(model=ModelConfig(scan="pooled"), mask=MaskConfig(ratio=0.6)).architecture()
    assert (config.scan, config.class_token, config.global_pool, config.mixer_norm) == ("pooled", "none", "avg", True)
    assert config.visible_share == 0.4
    full = PretrainConfig().architecture()
    assert (full.scan, full.class_token, full.mixer_norm, full.visible_share) == ("full", "middle", False, 1.0)


def test_compiled_without_a_graph_break():
    model, mask = autoencoder().float(), masks(2, 24, 18)
    images, (visible, hidden, _) = torch.randn(2, 3, 32, 48), split_patches(mask)
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        loss = run(images, visible, hidden)
        results.append([loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)
