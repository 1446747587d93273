"""Masked autoencoding where channels are tokens: the loss by a loop, packed as alone, and one channel as ever."""

import pytest
import torch

from launch.run.randomness import generator
from pretrain.mae.model import MaskedAutoencoder
from pretrain.mae.objective import MAE
from pretrain.masked import DecoderConfig
from pretrain.masking import MaskConfig, draw_mask
from vim_backbone import VimConfig, VisionMamba
from vim_backbone.block import Block

POOLED = {"scan": "pooled", "class_token": "none", "global_pool": "avg", "mixer_norm": True}


def autoencoder(**changes):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "depth": 2, "img_size": (16, 24), "patch_size": 8, "num_classes": 0, "position": "sincos",
             "in_chans": 5, "channels": "tokens", "channel_sets": [[4, 0, 1]]}  # fmt: skip
    encoder = VisionMamba(VimConfig.from_dict(sizes | changes))
    return MaskedAutoencoder(encoder, DecoderConfig(width=16, depth=1)).double().eval()


def view(channels, rows=2, columns=3):
    image = torch.randn(channels, 8 * rows, 8 * columns, generator=generator(channels), dtype=torch.float64)
    return image, draw_mask((rows, columns), MaskConfig(ratio=0.6), generator(channels, 1))


def inputs(images, masks):
    counts = [len(image) for image in images]
    return MAE().inputs(masks, torch.device("cpu"), counts).arguments


@pytest.mark.parametrize("changes", [{}, POOLED])
def test_the_loss_is_that_of_a_loop_over_hidden_places_and_channels(changes):
    model = autoencoder(**changes)
    image, mask = view(3)
    arguments = inputs(image[None], mask[None])
    predicted = model.reconstruct(image[None], *arguments).predicted[0]
    assert predicted.shape == (18, 64)
    errors = []
    for place in range(6):
        for channel in range(3):
            if mask[place]:
                row, column = divmod(place, 3)
                patch = image[channel, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].flatten()
                target = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
                errors.append((predicted[3 * place + channel] - target).square().mean())
    assert len(errors) == 3 * int(mask.sum())
    assert model(image[None], *arguments).item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"num_registers": 2}, POOLED])
def test_pictures_of_other_channels_packed_are_as_alone(changes):
    model = autoencoder(**changes)
    images, masks = zip(view(3), view(5, 1, 4), view(5), strict=True)
    packed = model.reconstruct(list(images), *inputs(images, masks))
    row = packed.predicted[0].split([18, 20, 30])
    losses = []
    for image, mask, got, pixels in zip(images, masks, row, packed.pixels, strict=True):
        arguments = inputs(image[None], mask[None])
        alone = model.reconstruct(image[None], *arguments)
        torch.testing.assert_close(got, alone.predicted[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(pixels, alone.pixels[0], rtol=1e-5, atol=1e-6)
        losses.append(model(image[None], *arguments))
        hidden = mask.view(image.shape[1] // 8, -1).repeat_interleave(8, 0).repeat_interleave(8, 1)
        assert torch.equal(pixels[:, ~hidden], image[:, ~hidden]), "what is visible stays, in every channel"
        assert not torch.isclose(pixels[:, hidden], image[:, hidden]).any(1).all()
    loss = model(list(images), *inputs(images, masks))
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-6, atol=0)


def test_a_hidden_patch_is_hidden_in_all_channels():
    model = autoencoder()
    image, mask = view(5)
    arguments = inputs(image[None], mask[None])
    predicted = model.reconstruct(image[None], *arguments).predicted
    for place in range(6):
        poked = image.clone()
        poked[3, 8 * (place // 3), 8 * (place % 3)] += 1
        again = model.reconstruct(poked[None], *arguments).predicted
        assert torch.equal(again, predicted) == bool(mask[place])


@pytest.mark.parametrize("changes", [{}, POOLED])
def test_one_channel_trains_as_a_model_of_one_channel(changes):
    model = autoencoder(in_chans=1, channel_sets=None, **changes)
    plain = autoencoder(in_chans=1, channels="mixed", channel_sets=None, **changes)
    state = model.state_dict()
    embedding, of_decoder = state.pop("encoder.channel_embed"), state.pop("decoder_channel_embed")
    state["encoder.patch_embed.proj.bias"] = state["encoder.patch_embed.proj.bias"] + embedding[0, 0]
    state["decoder_pos_embed"] = state["decoder_pos_embed"] + of_decoder
    plain.load_state_dict(state)
    image, mask = view(1)
    got, want = (each(image[None], *inputs(image[None], mask[None])) for each in (model, plain))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_embeddings_learn_of_the_channels_that_pictures_have():
    model = autoencoder().train()
    image, mask = view(3)
    model(image[None], *inputs(image[None], mask[None])).backward()
    for parameter in (model.encoder.channel_embed, model.decoder_channel_embed):
        assert parameter.grad.abs().sum((0, 2)).gt(0).tolist() == [True, True, False, False, True]
    assert {"encoder.channel_embed", "decoder_channel_embed"} <= model.no_weight_decay()


def test_the_planner_counts_the_tokens_that_are_scanned():
    model = autoencoder()
    images, masks = zip(view(5), view(5), strict=True)
    lengths = []
    for block in (model.encoder.layers[0], model.decoder_layers[0]):
        assert isinstance(block, Block)
        block.register_forward_hook(lambda _module, _inputs, output: lengths.append(output[0].shape[1]))
    objective = MAE(mask=MaskConfig(ratio=0.6), decoder=DecoderConfig(width=16, depth=1))
    made = objective.inputs(torch.stack(masks), torch.device("cpu"), [5, 5])
    model(torch.stack(images), *made.arguments)
    assert [stack.tokens for stack in objective.work(model.encoder.config, 4, "inputs").stacks] == lengths
    assert made.tokens == 2 * (lengths[0] - 1)
