"""Gaps between visible patches, beside a count by hand; what they are of a whole picture, and of packed ones."""

import pytest
import torch

from tests.vim_backbone.test_vim import small
from vim_backbone import UserError, VimConfig, VisionMamba
from vim_backbone.gaps import scan_gaps, with_special_tokens
from vim_backbone.packing import layout_of
from vim_backbone.tokens import TokenLayout

MASKS = [[0, 1, 1, 0, 0, 1, 0, 1, 1], [1, 1, 0, 1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 1, 1, 1, 0, 0]]


def gaps_by_hand(mask):
    """Walk over the patches, count the steps since the last visible one; then the same from the other end."""

    def walk(hidden):
        since, gaps = 0, []
        for is_hidden in hidden:
            since += 1
            if not is_hidden:
                gaps.append(since)
                since = 0
        return gaps

    return [walk(mask), walk(mask[::-1])[::-1]]


def visible_of(mask):
    return [place for place, hidden in enumerate(mask) if not hidden]


def test_gaps_of_a_batch():
    gaps = scan_gaps(torch.tensor([visible_of(mask) for mask in MASKS]), 9)
    assert gaps.dtype == torch.float32
    assert gaps.transpose(0, 1).tolist() == [gaps_by_hand(mask) for mask in MASKS]


def test_gaps_of_packed_pictures_end_at_their_borders():
    masks = [MASKS[0], [0], MASKS[1][:5], [1, 0]]
    row = torch.tensor([visible_of([hidden for mask in masks for hidden in mask])])
    gaps = scan_gaps(row, [len(mask) for mask in masks], [mask.count(0) for mask in masks])
    by_hand = [gaps_by_hand(mask) for mask in masks]
    assert gaps[:, 0].tolist() == [[gap for picture in by_hand for gap in picture[way]] for way in (0, 1)]


def test_special_tokens_stand_for_one_step_each():
    gaps = scan_gaps(torch.tensor([[1, 4]]), 6)  # 2, 3 and 3, 2
    layout, _ = layout_of(TokenLayout("middle", 1), None, gaps.device)
    assert with_special_tokens(gaps, layout, 1)[:, 0].tolist() == [[2, 1, 1, 3], [3, 1, 1, 2]]


def encoder(**changes):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "depth": 2, "img_size": 24, "patch_size": 8, "num_classes": 0, "num_registers": 1}
    return VisionMamba(VimConfig(**(sizes | changes))).eval()


@pytest.mark.parametrize("mixer_norm", [False, True])
def test_a_whole_picture_has_no_gaps(mixer_norm):
    model = encoder(mixer_norm=mixer_norm)
    patches = torch.randn(2, 9, 32)
    gaps = scan_gaps(torch.arange(9).expand(2, -1), 9)
    for got, want in zip(model.encode(patches, gaps=gaps), model.encode(patches), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("recompute", ["inputs", "products"])
@pytest.mark.parametrize("mixer_norm", [False, True])
def test_packed_pictures_with_gaps_come_out_as_if_alone(mixer_norm, recompute):
    model = encoder(mixer_norm=mixer_norm)
    for block in model.layers:
        block.mixer.recompute = recompute
    masks, sizes = [MASKS[0], [1, 0, 1, 0, 1]], [4, 2]
    patches = torch.randn(1, sum(sizes), 32)
    row = torch.tensor([visible_of([*masks[0], *masks[1]])])
    packed = model.encode(patches, sizes, gaps=scan_gaps(row, [9, 5], sizes))[1][0].split(sizes)
    plain = model.encode(patches, sizes)[1][0].split(sizes)
    for piece, mask, got, without in zip(patches[0].split(sizes), masks, packed, plain, strict=True):
        gaps = scan_gaps(torch.tensor([visible_of(mask)]), len(mask))
        torch.testing.assert_close(got, model.encode(piece[None], gaps=gaps)[1][0], rtol=1e-5, atol=1e-5)
        assert (got - without).abs().max() > 5e-5


def test_gaps_with_directions_apart_are_refused():
    model = small()
    with pytest.raises(UserError, match="give neither apart nor lines"):
        model.encode(torch.zeros(1, 4, model.config.d_model), apart=True, gaps=torch.ones(2, 1, 4))
