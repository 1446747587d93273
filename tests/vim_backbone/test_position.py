"""Position tables: the sine-cosine formula, and resampling that leaves the class slot alone."""

import math

import pytest
import torch
import torch.nn.functional as F

from vim_backbone.position import bicubic_weights, resize_table, sincos_table
from vim_backbone.tokens import TokenLayout


def test_sincos_follows_the_formula():
    table = sincos_table((3, 5), 16)
    for row, column, channel in ((0, 0, 0), (2, 4, 1), (1, 3, 2)):
        frequency = 10000 ** -(channel / 4)
        got = table[row * 5 + column]
        assert got[channel].item() == pytest.approx(math.sin(row * frequency), abs=1e-6)
        assert got[4 + channel].item() == pytest.approx(math.cos(row * frequency), abs=1e-6)
        assert got[8 + channel].item() == pytest.approx(math.sin(column * frequency), abs=1e-6)
        assert got[12 + channel].item() == pytest.approx(math.cos(column * frequency), abs=1e-6)
    assert len(table.unique(dim=0)) == 15


@pytest.mark.parametrize("class_token", ["middle", "first", "none"])
@pytest.mark.parametrize("new", [(4, 6), (8, 8), (3, 11)])
def test_resize_moves_the_class_slot_and_resamples_only_patches(class_token, new):
    layout, old = TokenLayout(class_token, 0), (5, 7)
    g = torch.Generator().manual_seed(0)
    patches = torch.randn(1, 35, 8, generator=g)
    special = torch.randn(1, layout.num_special, 8, generator=g)
    again_special, again = layout.split(resize_table(layout.join(special, patches), layout, old, new))
    assert torch.equal(again_special, special)
    image = patches.view(1, 5, 7, 8).permute(0, 3, 1, 2)
    want = F.interpolate(image, size=new, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(again, want)


def test_a_smooth_table_stays_smooth():
    layout = TokenLayout("middle", 0)
    ramp = torch.linspace(0, 1, 14).view(14, 1).expand(14, 14).reshape(1, 196, 1)
    table = layout.join(torch.full((1, 1, 1), 99.0), ramp)  # a class value that would show if it were resampled
    special, patches = layout.split(resize_table(table, layout, (14, 14), (28, 28)))
    assert special.item() == 99.0
    assert patches.max().item() < 1.1
    rows = patches.view(28, 28).mean(1)
    assert (rows.diff() > 0).all()


@pytest.mark.parametrize("new", [(6, 9), (3, 20), (1, 1), (17, 4)])
def test_products_of_an_exported_program_resize_as_interpolate_does(new):
    table = torch.randn(1, 5, 6, 9, dtype=torch.float64)
    want = F.interpolate(table.float(), size=new, mode="bicubic", antialias=True)
    rows, columns = (bicubic_weights(*sides, device=table.device) for sides in zip((6, 9), new, strict=True))
    torch.testing.assert_close(rows @ table.float() @ columns.mT, want, rtol=1e-5, atol=1e-5)
