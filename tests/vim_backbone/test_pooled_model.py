"""A backbone with the pooled scan: packed as one by one, blocks by row and by column, its folder, refusals."""

import pytest
import torch

from vim_backbone import VimConfig, VisionMamba, from_pretrained
from vim_backbone.errors import UserError
from vim_backbone.mixer import ScanMetadata

CONFIG = VimConfig(
    d_model=16, depth=3, img_size=(32, 48), patch_size=8, num_classes=5, position="sincos", scan="pooled",
    class_token="none", global_pool="avg", mixer_norm=True, visible_share=0.25,
)  # fmt: skip


def model(**changes):
    torch.manual_seed(0)
    return VisionMamba(VimConfig.from_dict(CONFIG.to_dict() | changes)).double().eval()


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_packed_pictures_and_a_batch_give_what_each_gives_alone():
    backbone, pictures = model(), [draw(3, 32, 48), draw(3, 8, 8), draw(3, 40, 16)]
    alone = torch.cat([backbone(picture[None]) for picture in pictures])
    torch.testing.assert_close(backbone(pictures), alone, rtol=1e-10, atol=1e-12)
    batch = draw(2, 3, 24, 32)
    one_by_one = torch.cat([backbone(picture[None]) for picture in batch])
    torch.testing.assert_close(backbone(batch), one_by_one, rtol=1e-10, atol=1e-12)


def test_even_blocks_take_rows_and_odd_ones_columns():
    """The transposed picture under one block by columns is the picture under one block by rows."""
    backbone = model(depth=2)
    tokens, lines = draw(1, 24, 16), backbone.lines(draw(1, 3, 32, 48))
    turned, turned_lines = tokens.view(1, 4, 6, 16).transpose(1, 2).flatten(1, 2), backbone.lines(draw(1, 3, 48, 32))
    rows, _ = backbone.layers[1](tokens, None, ScanMetadata(lines=lines[0]))
    columns, _ = backbone.layers[1](turned, None, ScanMetadata(lines=turned_lines[1]))
    torch.testing.assert_close(columns.view(1, 6, 4, 16).transpose(1, 2).flatten(1, 2), rows)
    blocks = []
    for block in backbone.layers:
        block.register_forward_hook(lambda _module, inputs, _output: blocks.append(inputs[2].lines.order is not None))
    backbone(draw(1, 3, 32, 48))
    assert blocks == [False, True]


def test_visible_patches_are_divided_by_whole_lines_and_whole_pictures_by_the_share():
    backbone, images = model(), draw(1, 3, 32, 48)
    whole, masked = backbone.lines(images), backbone.lines(images, torch.tensor([[0, 5, 7]]))
    assert whole is not None
    assert masked is not None
    assert whole.rows.weights.tolist() == pytest.approx([0.25 / 6] * 4)
    assert masked.rows.weights.tolist() == pytest.approx([1 / 6] * 4)
    assert masked.columns.weights.tolist() == pytest.approx([1 / 4] * 6)
    assert masked.rows.starts.tolist() == [0, 2, 3, 3, 3]


def test_intermediates_run_the_same_blocks():
    backbone, images = model(), draw(2, 3, 32, 48)
    final, _ = backbone.forward_intermediates(images)
    assert torch.equal(final, backbone.forward_features(images))


def test_folder_keeps_scan_and_share(tmp_path):
    backbone, images = model().float(), draw(1, 3, 32, 48).float()
    backbone.save_pretrained(tmp_path / "backbone")
    again = from_pretrained(tmp_path / "backbone")
    assert (again.config.scan, again.config.visible_share) == ("pooled", 0.25)
    assert torch.equal(again(images), backbone(images))


@pytest.mark.parametrize("changes", [{"class_token": "middle"}, {"num_registers": 2}])
def test_special_tokens_are_refused(changes):
    with pytest.raises(UserError, match="set class_token to 'none', num_registers to 0 and global_pool to 'avg'"):
        model(**changes)
    with pytest.raises(UserError, match=r"visible_share is 0.0: it must lie in \(0, 1\]"):
        model(visible_share=0.0)
