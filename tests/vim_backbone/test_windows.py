"""Patches embedded window by window are those of the whole picture, and so are the features of the sequence."""

import pytest
import torch

from tests.vim_backbone.test_vim import small
from vim_backbone import UserError
from vim_backbone.block import set_slices
from vim_backbone.windows import Window, embed_by_window, encode_by_window, windows

KINDS = {
    "learned, resampled": {"num_registers": 2},
    "fixed, of this size": {"position": "sincos", "img_size": (112, 80), "class_token": "first"},
    "overlapping": {"stride": 8, "class_token": "none", "global_pool": "avg"},
    "channels are tokens": {"channels": "tokens", "position": "sincos"},
    "pooled": {"scan": "pooled", "class_token": "none", "global_pool": "avg"},
}


def reader(image, model, seen=None):
    """Windows of a picture (1, c, h, w)."""

    def read(window):
        left, top, right, bottom = window.pixels(model.config)
        if seen is not None:
            seen.append(window)
        return image[:, :, top:bottom, left:right]

    return read


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [1, 3, 50])
def test_tokens_and_features_are_those_of_the_whole_picture(kind, side):
    model = small(**KINDS[kind])
    if model.channel_embed is not None:
        torch.nn.init.normal_(model.channel_embed)
    image = torch.randn(1, 3, 112, 80, generator=torch.Generator().manual_seed(1))
    grid = model.config.grid(112, 80)
    with torch.no_grad():
        tokens, features = model.embed_patches(image), model.forward_features(image)
    torch.testing.assert_close(embed_by_window(model, grid, reader(image, model), side), tokens, rtol=0, atol=2e-6)
    special, patches = encode_by_window(model, grid, reader(image, model), side)
    torch.testing.assert_close(torch.cat([special, patches], 1), features, rtol=1e-5, atol=2e-5)


def test_some_rows_are_those_of_the_whole():
    model, image = small(), torch.randn(1, 3, 112, 80)
    whole = embed_by_window(model, (7, 5), reader(image, model), 2)
    parts = [embed_by_window(model, (7, 5), reader(image, model), 2, rows) for rows in (range(3), range(3, 7))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_each_patch_is_read_once_and_edges_are_cut():
    model, seen = small(), []
    image = torch.randn(1, 3, 112, 80)
    embed_by_window(model, (7, 5), reader(image, model, seen), 3)
    assert seen[:3] == [Window(0, 0, 3, 3), Window(0, 3, 3, 5), Window(3, 0, 6, 3)]
    assert sum(rows * columns for rows, columns in (window.grid for window in seen)) == 35


def test_wrong_windows_are_named():
    model = small()
    with pytest.raises(UserError, match=r"\(0, 0, 2, 2\) has pixels \(1, 3, 32, 16\)"):
        embed_by_window(model, (2, 2), lambda window: torch.zeros(1, 3, 32, 16))
    with pytest.raises(UserError, match="windows of 0 patches"):
        next(windows((2, 2), 0))


@pytest.mark.parametrize("tokens", [1, 4, 17, 1000])
@pytest.mark.parametrize("kind", [{}, {"mixer_norm": True, "class_token": "none", "global_pool": "avg"}, {"d_conv": 1}])
def test_slices_of_the_sequence_give_what_the_whole_does(kind, tokens):
    model = small(**kind)
    image = torch.randn(2, 3, 112, 80, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_" in name:
                parameter.sub_(3.0)  # states that last from slice to slice
        whole = model.forward_features(image)
        set_slices(model, tokens)
        in_slices = model.forward_features(image)
        with torch.autocast("cpu", torch.bfloat16):
            low_in_slices = model.forward_features(image)
    length = model.config.grid(112, 80)[0] * model.config.grid(112, 80)[1]
    assert torch.equal(in_slices, whole) == (tokens > length)  # what is no longer than a slice is taken whole
    torch.testing.assert_close(in_slices, whole, rtol=1e-5, atol=1e-5)
    set_slices(model, None)
    with torch.no_grad():
        assert torch.equal(model.forward_features(image), whole)
        with torch.autocast("cpu", torch.bfloat16):
            low = model.forward_features(image)
    assert low_in_slices.dtype == low.dtype
    torch.testing.assert_close(low_in_slices, low, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("tokens", [0, -1])
def test_slices_without_a_token_are_refused(tokens):
    with pytest.raises(UserError, match="it must be at least 1"):
        set_slices(small(), tokens)
