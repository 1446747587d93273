"""The masked autoencoder: only visible patches reach the encoder, in scan order, and the loss is MAE's."""

from unittest import mock

import numpy as np
import pytest
import torch

from launch.run.randomness import generator
from pretrain.mae.model import MAEConfig, MaskedAutoencoder
from pretrain.mae.objective import MAE
from pretrain.masked import DecoderConfig, select, split_patches
from pretrain.masking import MaskConfig, draw_mask
from pretrain.patches import patchify, unpatchify
from vim_backbone import UserError, VimConfig, VisionMamba
from vim_backbone.gaps import scan_gaps

GRID = (4, 6)


def autoencoder(**changes):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "depth": 2, "img_size": (32, 48), "patch_size": 8, "num_classes": 0, "position": "sincos"}
    return MaskedAutoencoder(VisionMamba(VimConfig(**(sizes | changes))), DecoderConfig(width=32, depth=1)).eval()


def inputs(kind="random", count=2):
    images = torch.randn(count, 3, 32, 48, generator=generator(1))
    masks = torch.stack([draw_mask(GRID, MaskConfig(kind=kind), generator(i)) for i in range(count)])
    return images, masks


def test_patchify_and_back():
    images, _ = inputs()
    patches = patchify(images, 8)
    assert patches.shape == (2, 24, 192)
    assert torch.equal(patches[1, 7], images[1, :, 8:16, 8:16].permute(1, 2, 0).flatten())  # row 1, column 1
    assert torch.equal(unpatchify(patches, 8, GRID), images)


def test_visible_patches_stay_in_scan_order():
    _, masks = inputs()
    visible, hidden, _ = split_patches(masks)
    assert (visible.shape, hidden.shape) == ((2, 6), (2, 18))
    for calls, unseen, mask in zip(visible, hidden, masks, strict=True):
        assert calls.tolist() == torch.nonzero(~mask).flatten().tolist()
        assert unseen.tolist() == torch.nonzero(mask).flatten().tolist()


@pytest.mark.parametrize("class_token", ["middle", "first", "none"])
def test_hidden_pixels_reach_nothing_but_the_target(class_token):
    pool = "avg" if class_token == "none" else "token"
    model = autoencoder(class_token=class_token, global_pool=pool, num_registers=2)
    images, masks = inputs()
    hidden = unpatchify(masks[..., None].expand(-1, -1, 192).float(), 8, GRID).bool()
    changed = torch.where(hidden, images.flip(0) * 3 + 1, images)
    patches = split_patches(masks)
    predicted = model.reconstruct(images, *patches).predicted
    torch.testing.assert_close(model.reconstruct(changed, *patches).predicted, predicted, rtol=0, atol=0)
    visible = (~masks).nonzero()[0, 1].item()
    poked = images.clone()
    poked[:, :, 8 * (visible // 6), 8 * (visible % 6)] += 1.0
    assert not torch.allclose(model.reconstruct(poked, *patches).predicted[0], predicted[0])


@pytest.mark.parametrize("kind", ["random", "block"])
def test_loss_is_the_normalised_error_on_hidden_patches(kind):
    model = autoencoder()
    images, masks = inputs(kind)
    loss = model(images, *split_patches(masks)).item()
    predicted = model.reconstruct(images, *split_patches(masks)).predicted.double().numpy()
    errors = []
    for image, mask, guess in zip(images.double().numpy(), masks.numpy(), predicted, strict=True):
        for patch in np.flatnonzero(mask):
            y, x = 8 * (patch // 6), 8 * (patch % 6)
            pixels = image[:, y : y + 8, x : x + 8].transpose(1, 2, 0).ravel()
            target = (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6)
            errors.append(np.mean((guess[patch] - target) ** 2))
    assert loss == pytest.approx(np.mean(errors), rel=1e-5)


def test_gap_aware_scales_dt_of_the_encoder_alone():
    """The encoder as it is with these gaps; without them, and in the decoder, nothing has changed."""
    model = autoencoder()
    images, masks = inputs()
    patches = split_patches(masks)
    plain = model(images, *patches)
    aware = MaskedAutoencoder(model.encoder, DecoderConfig(width=32, depth=1), MAEConfig(gap_aware=True)).eval()
    aware.load_state_dict(model.state_dict())
    assert aware(images, *patches) != plain
    encode, gaps = model.encoder.encode, scan_gaps(patches.visible, 24)
    with mock.patch.object(
        model.encoder, "encode", lambda *given, **options: encode(*given, **(options | {"gaps": gaps}))
    ):
        assert model(images, *patches) == aware(images, *patches)


def test_gaps_and_lines_are_refused():
    with pytest.raises(UserError, match=r"^mae.gap_aware is True.*model.scan to full$"):
        MAE(mae=MAEConfig(gap_aware=True)).check(
            VimConfig(d_model=8, depth=1, scan="pooled", class_token="none", global_pool="avg")
        )


def test_the_encoder_scans_the_visible_patches_with_the_published_layout():
    """What the encoder makes of a masked picture equals a plain pass over just those patches."""
    model = autoencoder(num_registers=2)
    images, masks = inputs()
    visible, hidden, _ = split_patches(masks)
    calls = []
    model.encoder.layers[0].register_forward_hook(lambda module, arguments, out: calls.append(arguments[0]))
    model(images, visible, hidden)
    patches = select(model.encoder.embed_patches(images), visible)
    special, tokens = model.encoder.layout.split(calls[0])
    torch.testing.assert_close(tokens, patches)
    assert model.encoder.layout.slots(6) == [4, 2, 6]  # class token before patch 3; registers before patches 2 and 4
    position = model.encoder.position_layout.split(model.encoder.pos_embed)[0]
    torch.testing.assert_close(special[:, :1], (model.encoder.cls_token + position).expand(2, -1, -1))


def test_positions_are_those_of_the_whole_picture():
    model = autoencoder()
    blank = torch.zeros(1, 3, 32, 48)
    embedded = model.encoder.embed_patches(blank)
    special, table = model.encoder.position_layout.split(model.encoder.pos_embed)
    torch.testing.assert_close(embedded, table)
    assert special.abs().max().item() == 0.0  # the class slot, at index 12 of 25, holds no sine or cosine
    assert model.encoder.pos_embed[0, 12].abs().max().item() == 0.0


def test_reconstruction_keeps_what_was_visible():
    model = autoencoder()
    images, masks = inputs()
    pixels = patchify(model.reconstruct(images, *split_patches(masks)).pixels, 8)
    torch.testing.assert_close(pixels[~masks], patchify(images, 8)[~masks])
    assert not torch.allclose(pixels[masks], patchify(images, 8)[masks])


def test_the_plain_prediction_has_nothing_of_a_hidden_patch():
    model = autoencoder()
    images, masks = inputs()
    made = model.reconstruct(images, *split_patches(masks))
    plain = patchify(made.plain, 8)
    torch.testing.assert_close(plain[~masks], patchify(images, 8)[~masks])
    torch.testing.assert_close(plain[masks], 0.5 * made.predicted[masks])
    changed = torch.where(masks[..., None], 3 * patchify(images, 8) + 1, patchify(images, 8))
    again = model.reconstruct(unpatchify(changed, 8, GRID), *split_patches(masks))
    torch.testing.assert_close(again.plain, made.plain)
    assert not torch.allclose(again.pixels, made.pixels)


def test_every_trained_parameter_gets_a_gradient():
    model = autoencoder(num_registers=2, mixer_norm=True).train()
    images, masks = inputs()
    model(images, *split_patches(masks)).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["decoder_pos_embed", "encoder.pos_embed"]


def test_undecayed_names_exist():
    model = autoencoder(num_registers=2)
    names = dict(model.named_parameters()).keys()
    undecayed = model.no_weight_decay()
    assert undecayed <= names
    assert {
        "mask_token",
        "encoder.cls_token",
        "encoder.layers.0.mixer.A_log",
        "decoder_layers.0.mixer.A_b_log",
    } <= undecayed


def test_overlapping_patches_are_refused():
    with pytest.raises(UserError, match="pretrain with stride = patch_size"):
        autoencoder(stride=4)


@pytest.mark.parametrize("gap_aware", [False, True])
def test_packed_pictures_are_as_if_alone(gap_aware):
    """Values and gradients; every picture counts alike, though one has ten times the patches of another."""
    model = autoencoder(num_registers=2).train()
    model.gap_aware = gap_aware
    sizes = [(32, 48), (8, 16), (64, 24), (40, 40)]
    images = [torch.randn(3, *size, generator=generator(i)) for i, size in enumerate(sizes)]
    masks = [draw_mask((h // 8, w // 8), MaskConfig(ratio=0.6), generator(i)) for i, (h, w) in enumerate(sizes)]
    loss = model(images, *split_patches(masks))
    loss.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    rebuilt = model.reconstruct(images, *split_patches(masks)).pixels
    model.zero_grad()
    alone = torch.stack([model(i[None], *split_patches(m[None])) for i, m in zip(images, masks, strict=True)])
    alone.mean().backward()
    torch.testing.assert_close(loss, alone.mean())
    assert alone.std() > 1e-3
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)
    for pixels, image, mask in zip(rebuilt, images, masks, strict=True):
        torch.testing.assert_close(pixels, model.reconstruct(image[None], *split_patches(mask[None])).pixels[0])
