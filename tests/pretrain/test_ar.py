"""Autoregression by clusters: nothing comes back from what is to be predicted, and the loss is on normalised pixels."""

import numpy as np
import pytest
import torch

from launch.run.randomness import generator
from pretrain.ar.clusters import ARConfig, number_clusters, packed_plan, plan
from pretrain.ar.model import NextCluster
from vim_backbone import UserError, VimConfig, VisionMamba

SIZES = {"d_model": 32, "depth": 2, "img_size": (32, 48), "patch_size": 8, "num_classes": 0, "position": "sincos"}
GRID = (4, 6)


def model(**changes):
    torch.manual_seed(0)
    return NextCluster(VisionMamba(VimConfig(**(SIZES | changes))), ARConfig(width=16, depth=1))


def pictures(count=2, size=(32, 48)):
    return torch.randn(count, 3, *size, generator=generator(1))


def test_clusters_are_rows_or_squares_cut_off_by_the_picture():
    assert number_clusters((2, 3), None).tolist() == [0, 0, 0, 1, 1, 1]
    assert number_clusters((3, 5), 2).unflatten(0, (3, 5)).tolist() == [
        [0, 0, 1, 1, 2],
        [0, 0, 1, 1, 2],
        [3, 3, 4, 4, 5],
    ]
    assert number_clusters((1, 3), None).tolist() == [0, 1, 2]  # a picture of one cluster: patch by patch
    assert number_clusters((2, 2), 4).tolist() == [0, 1, 2, 3]


def test_what_predicts_which_patch():
    order, ahead, back, _ = plan(number_clusters((3, 5), 2))
    assert order.tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]
    assert ahead.patches.tolist() == list(range(4, 15))
    assert ahead.near.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12]  # at the same place in the cluster before
    assert ahead.whole.tolist() == [3, 3, 3, 3, 7, 7, 9, 9, 11, 11, 13]  # where all of it was seen
    assert back.patches.tolist() == list(range(14))
    assert back.near.tolist() == [4, 5, 6, 7, 8, 9, 9, 9, 10, 11, 12, 13, 14, 14]
    assert back.whole.tolist() == [4, 4, 4, 4, 8, 8, 8, 8, 10, 10, 12, 12, 14, 14]


@pytest.mark.parametrize("cluster", [None, 1, 2, 3])
def test_nothing_comes_back_from_what_is_predicted(cluster):
    """The gradient of a predicted patch by the pixels of its cluster and of all later ones is zero, exactly."""
    net, numbers = model(num_registers=2), number_clusters(GRID, cluster)
    order, ahead, back, _ = plan(numbers)
    for direction, targets in enumerate((ahead, back)):
        for index in (0, len(targets.patches) // 2, -1):
            images = pictures().requires_grad_()
            net.predict(images, order, ahead, back)[direction][0, index].square().sum().backward()
            touched = images.grad[0].unfold(1, 8, 8).unfold(2, 8, 8).abs().amax(dim=(0, 3, 4)).flatten() > 0
            own = numbers[order[targets.patches[index]]]
            assert torch.equal(touched, numbers < own if direction == 0 else numbers > own)


@pytest.mark.parametrize("cluster", [None, 2])
def test_the_loss_is_the_normalised_error_on_predicted_patches(cluster):
    net, images = model(), pictures()
    order, ahead, back, _ = plan(number_clusters(GRID, cluster))
    predicted = [each.detach().double().numpy() for each in net.predict(images, order, ahead, back)]
    errors = []
    for guesses, targets in zip(predicted, (ahead, back), strict=True):
        for picture in range(2):
            for guess, place in zip(guesses[picture], targets.patches, strict=True):
                patch = int(order[place])
                y, x = 8 * (patch // 6), 8 * (patch % 6)
                pixels = images[picture, :, y : y + 8, x : x + 8].double().numpy().transpose(1, 2, 0).ravel()
                target = (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6)
                errors.append(np.mean((guess - target) ** 2))
    assert net(images, order, ahead, back).item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_a_patch_that_is_known_is_rebuilt_where_it_was():
    """What is predicted lies at its place in the picture, with its own mean; the first or last cluster is not there."""
    net, images, numbers = model(), pictures(), number_clusters(GRID, 2)
    made = net.rebuild(images, *plan(numbers)[:3])
    for prediction, missing in zip(made, (numbers == 0, numbers == 5), strict=True):
        assert torch.equal(~prediction.predicted_at, missing)
        means = [
            each.unfold(2, 8, 8).unfold(3, 8, 8).mean(dim=(1, 4, 5)).flatten(1) for each in (prediction.pixels, images)
        ]
        assert means[0][:, missing].abs().max() == 0
        assert torch.corrcoef(torch.stack([m[:, ~missing].flatten() for m in means]))[0, 1] > 0.1


@pytest.mark.parametrize("cluster", [None, 2])
def test_packed_pictures_are_as_if_alone(cluster):
    """Values and gradients; every picture counts alike, though one has ten times the patches of another."""
    net = model(num_registers=2)
    images = [pictures(1, size)[0] for size in [(32, 48), (8, 16), (64, 24), (40, 40)]]
    numbers = [number_clusters((i.shape[1] // 8, i.shape[2] // 8), cluster) for i in images]
    loss = net(images, *packed_plan(numbers))
    loss.backward()
    packed = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    alone = torch.stack([net(image[None], *plan(each)) for image, each in zip(images, numbers, strict=True)])
    alone.mean().backward()
    torch.testing.assert_close(loss, alone.mean())
    assert alone.std() > 1e-3
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_every_trained_parameter_gets_a_gradient():
    net = model(num_registers=2, mixer_norm=True)
    net(pictures(), *plan(number_clusters(GRID, None))).backward()
    assert [n for n, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []
    assert net.no_weight_decay() <= dict(net.named_parameters()).keys()


def test_compiled_without_a_graph_break():
    net, images, planned = model(), pictures(), plan(number_clusters(GRID, 2))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")(images, *planned)
    torch.testing.assert_close(compiled, net(images, *planned))


def test_channels_as_tokens_are_refused():
    with pytest.raises(UserError, match=r"set model\.channels to mixed, or"):
        model(channels="tokens")
