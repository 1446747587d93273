"""An ordinary model through the functions that also serve a spread one, and the average of weights."""

import copy

import torch
from timm.utils import ModelEmaV3
from torch import nn

from launch.state.sharding import WeightAverage, fill, gathered, local_part, shape_of, whole_tensors


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_whole_tensors_are_copies_of_all_parameters_and_buffers():
    net = model()
    tensors = whole_tensors(net, keep=True)
    assert tensors.keys() == net.state_dict().keys()
    with torch.no_grad():
        net[0].weight.zero_()
    assert tensors["0.weight"].abs().sum() > 0
    assert whole_tensors(net, keep=False) == {}


def test_fill_puts_every_tensor_back():
    net, other = model(), model()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.add_(1)
    fill(net, other.state_dict().__getitem__)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_parameter_that_is_not_spread_is_whole():
    p = nn.Parameter(torch.randn(2, 3))
    assert shape_of(p) == (2, 3)
    assert local_part(p).data_ptr() == p.data_ptr()
    with gathered(p, write=True):
        assert p.shape == (2, 3)


def test_the_average_is_that_of_timm():
    net = model()
    peer, ours = (
        ModelEmaV3(copy.deepcopy(net), decay=0.9, use_warmup=True, warmup_power=2 / 3),
        WeightAverage(net, 0.9),
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 40):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
        ours.update(step)
        peer.update(net, step=step)
    whole = whole_tensors(net, keep=True)
    with ours.in_place():
        averaged = whole_tensors(net, keep=True)
    for name, p in peer.module.named_parameters():
        torch.testing.assert_close(averaged[name], p.detach())
    for name, tensor in whole_tensors(net, keep=True).items():
        assert torch.equal(tensor, whole[name]), name  # put back after the block
