"""What a process of test_stretch does: writes errors.json.

`python -m tests.vim_backbone.stretches FOLDER RANK PROCESSES DTYPE [FIRST]`; bfloat16 is that of the products, by
autocast; of the cases only the FIRST so many, and then no masked ones.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pretrain.mae.model import MaskedAutoencoder
from pretrain.masked import DecoderConfig, split_patches
from tests.vim_backbone.test_vim import small
from vim_backbone.block import set_recompute
from vim_backbone.memory import LEVELS, Recompute
from vim_backbone.sequence_parallel import Rows, encode_stretch, pool_stretch, rows_of
from vim_backbone.stretch import Stretch

LENGTHS = {2: (17, 26), 4: (9, 3, 20, 11)}
"""Tokens of the processes: uneven, and the least that the convolution takes."""
CASES = {
    "class token in the middle": {},
    "registers, norm before the gate": {"num_registers": 3, "class_token": "first", "mixer_norm": True},
    "no special token, batch of 2": {"class_token": "none", "global_pool": "avg"},
    "two taps": {"d_conv": 2, "d_state": 4},
    "one tap": {"d_conv": 1},
}

MASKED = {
    "class token in the middle": {},
    "channels are tokens": {"channels": "tokens", "class_token": "none", "global_pool": "avg"},
}


def relative(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def slow(model: torch.nn.Module) -> None:
    """States that last for the whole sequence and more, so that what enters a stretch matters to its end."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log") or name.endswith("A_b_log"):
                parameter.sub_(3.0)


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Of its parameters, taken away from them."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return gradients


def gradient_errors(model: torch.nn.Module, expected: dict[str, Tensor], group: Any) -> list[float]:
    """Of the sums over the processes."""
    errors = []
    for name, parameter in model.named_parameters():
        if name in expected:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(gradient, group=group)
            errors.append(relative(gradient, expected[name]))
    return errors


def worst(name: str, processes: int, level: Recompute, group: Any, rank: int, device: str) -> float:
    """Largest error of a case: features, pooled ones, gradients of tokens and of all parameters."""
    changes = CASES[name]
    model, lengths = small(depth=2, num_classes=0, **changes).to(device), LENGTHS[processes]
    slow(model)
    set_recompute(model, level)
    generator = torch.Generator().manual_seed(1)
    batch = 2 if "batch" in name else 1
    tokens, weights = torch.randn(2, batch, sum(lengths), 32, generator=generator).to(device)
    of_special = torch.randn(1, model.num_prefix_tokens, 32, generator=generator).to(device)
    # one process
    whole = tokens.clone().requires_grad_()
    special, patches = model.encode(whole)
    pooled = special[:, 0] if model.global_pool == "token" else patches.mean(1)
    ((patches * weights).sum() + (special * of_special).sum() + pooled.square().sum()).backward()
    expected = gradients_of(model)
    # several
    here = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    own = tokens[:, here].clone().requires_grad_()
    stretch = Stretch.of(lengths[rank], own.device, group)
    assert stretch.lengths == lengths
    assert stretch.patches == here
    got_special, got = encode_stretch(model, own, stretch)
    got_pooled = pool_stretch(model, got_special, got, stretch)
    loss = (got * weights[:, here]).sum() + got_pooled.square().sum() / processes
    if rank == 0:  # what all have counts once
        loss = loss + (got_special * of_special).sum()
    loss.backward()
    assert own.grad is not None
    assert whole.grad is not None
    errors = [relative(got, patches[:, here]), relative(got_pooled, pooled), relative(own.grad, whole.grad[:, here])]
    errors += [relative(got_special, special)] if model.num_prefix_tokens else []
    with torch.no_grad():
        errors.append(relative(encode_stretch(model, own, stretch)[1], patches[:, here]))
    return max(errors + gradient_errors(model, expected, group))


GRID = (16, 12)
"""Of pictures for the masked autoencoder: twice the size of its positions' table."""


def autoencoder(changes: dict[str, Any], device: str) -> MaskedAutoencoder:
    """The same in every process."""
    torch.manual_seed(0)
    encoder = small(img_size=(32, 24), patch_size=4, depth=2, num_classes=0, **changes)
    model = MaskedAutoencoder(encoder, DecoderConfig(width=16, depth=1)).to(device)
    slow(model)
    return model


def masked_picture(seed: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Pixels (1, 3, 64, 48), and which tokens are hidden: rows by columns."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 3, 64, 48, generator=generator), torch.rand(16, 12 * tokens, generator=generator) < 0.5


def inputs_of(image: Tensor, mask: Tensor, device: str, rows: range = range(GRID[0])) -> list[Tensor]:
    """What the autoencoder takes of some rows."""
    own = slice(4 * rows.start, 4 * rows.stop)
    visible, hidden, _ = split_patches(mask[rows.start : rows.stop].flatten()[None])
    return [each.to(device) for each in (image[:, :, own], visible, hidden)]


def worst_masked(changes: dict[str, Any], processes: int, group: Any, rank: int, device: str) -> float:
    """Largest error of a masked autoencoder's loss and of its parameters' gradients."""
    model = autoencoder(changes, device)
    image, mask = masked_picture(2, model.encoder.config.tokens_a_patch(3))
    loss = model(*inputs_of(image, mask, device))
    loss.backward()
    expected = gradients_of(model)
    rows = rows_of(GRID, rank, processes)
    part = model(*inputs_of(image, mask, device, rows), rows=Rows(rows, GRID, group))
    part.backward()
    whole = part.detach().clone()
    dist.all_reduce(whole, group=group)
    return max(relative(whole, loss), *gradient_errors(model, expected, group))


def worst_ddp(group: Any, rank: int, device: str) -> float:
    """Two pictures, each over two of four processes, under DDP: largest error of the gradients."""
    model = autoencoder({}, device)
    pictures = [masked_picture(seed, 1) for seed in (3, 4)]
    torch.stack([model(*inputs_of(*picture, device)) for picture in pictures]).mean().backward()
    expected = gradients_of(model)
    rows = rows_of(GRID, rank % 2, 2)
    replica = DistributedDataParallel(model)
    part = replica(*inputs_of(*pictures[rank // 2], device, rows), rows=Rows(rows, GRID, group))
    (2 * part).backward()
    return max(relative(model.get_parameter(name).grad, gradient) for name, gradient in expected.items())


def main(folder: str, rank: int, world: int, dtype: torch.dtype, first: int | None) -> None:
    """All cases with two processes, then with four; with two in all, on GPUs where each has one."""
    torch.set_num_threads(1)
    on_gpus = world == 2 and torch.cuda.device_count() >= 2
    device = f"cuda:{rank}" if on_gpus else "cpu"
    if on_gpus:
        torch.cuda.set_device(rank)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("nccl" if on_gpus else "gloo", init_method=meeting, rank=rank, world_size=world)
    groups = {world: dist.group.WORLD}
    if world == 4:
        groups = {2: [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2], 4: dist.group.WORLD}
    errors: dict[str, float] = {}
    torch.set_autocast_enabled(device[:4], dtype == torch.bfloat16)
    torch.set_autocast_dtype(device[:4], torch.bfloat16)
    for processes, group in groups.items():
        for name in list(CASES)[:first]:
            for level in LEVELS if first is None and name == next(iter(CASES)) else ("inputs",):
                found = torch.tensor(worst(name, processes, level, group, rank % processes, device), device=device)
                dist.all_reduce(found, dist.ReduceOp.MAX)
                errors[f"{processes} processes, {device[:4]}, {name}, {level}"] = found.item()
        for name, changes in () if first else MASKED.items():
            found = torch.tensor(worst_masked(changes, processes, group, rank % processes, device), device=device)
            dist.all_reduce(found, dist.ReduceOp.MAX)
            errors[f"{processes} processes, {device[:4]}, masked, {name}"] = found.item()
    if world == 4 and first is None:
        found = torch.tensor(worst_ddp(groups[2], rank, device))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        errors["4 processes, cpu, masked, two pictures under DDP"] = found.item()
    if rank == 0:
        (Path(folder) / "errors.json").write_text(json.dumps(errors))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(
        sys.argv[1],
        int(sys.argv[2]),
        int(sys.argv[3]),
        getattr(torch, sys.argv[4]),
        int(sys.argv[5]) if sys.argv[5:] else None,
    )
