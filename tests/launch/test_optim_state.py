"""The optimizer's state by parameter name, out of one optimizer and into another."""

import torch
from torch import nn

from launch.state.optim_state import restore_state, whole_state


def trained(steps, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for step in range(steps):
        model(torch.randn(5, 3, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_entries_are_named_by_parameter_and_key():
    tensors = whole_state(*trained(2), keep=True)
    assert tensors.keys() == {
        f"{name}/{key}" for name in ("0.weight", "1.weight", "1.bias") for key in ("exp_avg", "exp_avg_sq", "step")
    }
    assert tensors["0.weight/exp_avg"].shape == (4, 3)
    assert tensors["1.bias/step"].item() == 2
    assert whole_state(*trained(2), keep=False) == {}
    assert whole_state(*trained(0), keep=True) == {}


def test_another_optimizer_goes_on_with_it():
    model, optimizer = trained(2)
    tensors = whole_state(model, optimizer, keep=True)
    other, fresh = trained(0, seed=5)
    other.load_state_dict(model.state_dict())
    restore_state(other, fresh, tensors, tensors.__getitem__)
    for one, its in ((model, optimizer), (other, fresh)):
        one(torch.ones(1, 3)).sum().backward()
        its.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
