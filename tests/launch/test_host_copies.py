"""Copies for a checkpoint are apart from what they are copies of."""

import pytest
import torch
from torch import nn

from launch.state.host_copies import finish_copies, host_copy


def test_a_copy_is_apart_from_its_tensor_and_from_the_graph():
    weight = nn.Parameter(torch.arange(6.0).view(2, 3))
    copied = host_copy(weight)
    finish_copies()
    with torch.no_grad():
        weight.zero_()
    assert copied.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert not copied.requires_grad


@pytest.mark.gpus(1)
def test_a_gpus_tensors_are_copied_into_pinned_memory_that_the_next_copy_finds():
    values = torch.arange(1 << 20, device="cuda")
    copied = host_copy(values)
    values.zero_()  # behind the copy, which need not have been made yet
    finish_copies()
    assert copied.is_pinned()
    assert torch.equal(copied, torch.arange(1 << 20))
    place = copied.data_ptr()
    del copied
    assert host_copy(values).data_ptr() == place
