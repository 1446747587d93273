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
    made = model()
    tensors = whole_tensors(made, keep=True)
    assert tensors.keys() == made.state_dict().keys()
    with torch.no_grad():
        made[0].weight.zero_()
    assert tensors["0.weight"].abs().sum() > 0
    assert whole_tensors(made, keep=False) == {}


def test_fill_puts_every_tensor_back():
    made, other = model(), model()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.add_(1)
    fill(made, other.state_dict().__getitem__)
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_parameter_that_is_not_spread_is_whole():
    p = nn.Parameter(torch.randn(2, 3))
    assert shape_of(p) == (2, 3)
    assert local_part(p).data_ptr() == p.data_ptr()
    with gathered(p, write=True):
        assert p.shape == (2, 3)


def test_the_average_is_that_of_timm():
    made = model()
    peer, ours = (
        ModelEmaV3(copy.deepcopy(made), decay=0.9, use_warmup=True, warmup_power=2 / 3),
        WeightAverage(made, 0.9),
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 40):
        with torch.no_grad():
            for p in made.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
        ours.update(step)
        peer.update(made, step=step)
    kept = whole_tensors(made, keep=True)
    with ours.in_place():
        averaged = whole_tensors(made, keep=True)
    for name, p in peer.module.named_parameters():
        torch.testing.assert_close(averaged[name], p.detach())
    for name, tensor in whole_tensors(made, keep=True).items():
        assert torch.equal(tensor, kept[name]), name  # put back after the block
