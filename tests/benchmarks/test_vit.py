"""What the benchmarks compare with is what they say."""

import torch
from timm.models.vision_transformer import VisionTransformer

from benchmarks.vit import blocks_of
from vim_backbone import VimConfig, VisionMamba, from_pretrained
from vim_backbone.block import Block


def test_a_vit_in_the_place_of_vim_is_timms():
    config = VimConfig(d_model=128, depth=2, img_size=(32, 32), patch_size=8, num_classes=0)
    torch.manual_seed(0)
    with blocks_of("vit"):
        ours = VisionMamba(config)
    assert isinstance(VisionMamba(config).layers[0], Block), "outside, blocks are Vim's again"
    theirs = VisionTransformer(img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2, num_classes=0)
    state = {
        key.replace("layers.", "blocks.").replace(".block.", "."): value for key, value in ours.state_dict().items()
    }
    special, patches = ours.position_layout.split(state["pos_embed"])
    state["pos_embed"] = torch.cat([special, patches], dim=1)  # the class token comes first in timm's
    del state["norm_f.weight"]
    assert theirs.load_state_dict(state, strict=False).missing_keys == ["norm.weight", "norm.bias"]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        _, maps = ours.eval().forward_intermediates(images, [1])
        _, expected = theirs.eval().forward_intermediates(images, [1])
    torch.testing.assert_close(maps[0], expected[0], rtol=1e-4, atol=1e-4)


def test_a_backbone_of_vit_blocks_is_published_and_read_again(tmp_path):
    with blocks_of("vit"):
        ours = VisionMamba(VimConfig(d_model=64, depth=1, img_size=(16, 16), patch_size=8, num_classes=0)).eval()
        again = from_pretrained(ours.save_pretrained(tmp_path))
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(again(images), ours(images))


def test_apart_a_vit_sees_one_side_alone():
    """The first half of the batch by what comes before, the second by what comes after, as Vim's directions."""
    with blocks_of("vit"):
        ours = VisionMamba(VimConfig(d_model=64, depth=2, img_size=(16, 24), patch_size=8, num_classes=0))
    for direction in (0, 1):
        tokens = torch.randn(1, 6, 64, requires_grad=True)
        ours.encode(tokens, apart=True)[1][direction, 2].sum().backward()
        assert tokens.grad is not None
        seen = (tokens.grad[0].abs().amax(dim=1) > 0).tolist()
        assert seen == [(place <= 2 if direction == 0 else place >= 2) for place in range(6)]
