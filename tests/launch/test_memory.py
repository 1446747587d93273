"""Bytes by strategy, and the batch that fits: closed forms."""

import pytest
import torch

from launch.planning.memory import Stack, Work, fitting, footprint, peak, shares
from vim_backbone import VisionMamba, named_config
from vim_backbone.memory import block_saved_bytes


def whole_model(name="vim_tiny"):
    """A backbone that sees all 196 patches of its pictures and the class token."""
    config = named_config(name, num_classes=0, position="sincos")
    with torch.device("meta"):
        return footprint(VisionMamba(config), Work((Stack(config, 197),), 0.0), torch.float32, "cpu")


def test_the_batch_that_fits_is_the_largest():
    model = whole_model()
    share = shares(model, 8)[2]
    batch = fitting(model, share, 4e9)
    assert peak(model, share, batch) <= 4e9 < peak(model, share, batch + 1)
    assert fitting(model, share, 1e6) == 0


def test_each_stage_spreads_one_more_part():
    model = whole_model("vim_large")
    ddp, zero1, zero2, zero3 = shares(model, 8)
    bytes_of = 4 * model.trained
    assert (ddp.gradients, ddp.optimizer) == (bytes_of, 2 * bytes_of)
    assert zero1.optimizer == pytest.approx(3 * bytes_of / 8)  # with its copy of the parameters
    assert zero1.gradients - zero2.gradients == pytest.approx(bytes_of * 7 / 8)
    assert zero3.parameters < zero2.parameters / 4
    assert zero3.sent == pytest.approx(1.5 * ddp.sent)


def test_recomputed_blocks_keep_stream_and_norm_alone():
    """Both float32 here; the rest of the block at hand is there in the backward pass."""
    config = named_config("vim_tiny", num_classes=0, position="sincos")
    with torch.device("meta"):
        model = VisionMamba(config)
    plain = footprint(model, Work((Stack(config, 197),), 0.0), torch.float32, "cpu")
    again = footprint(model, Work((Stack(config, 197, recompute="products"),), 0.0), torch.float32, "cpu")
    assert again.saved == 197 * 24 * 8 * 192
    assert again.last_backward - plain.last_backward == pytest.approx((plain.saved - again.saved) / 24)


@pytest.mark.parametrize("norm", [False, True])
def test_a_pooled_scan_keeps_its_lines_alone(norm):
    """14 lines of 14 tokens; on CPU float32 sums of both directions and y, projections, states every 32 lines."""
    pooled = {"scan": "pooled", "class_token": "none", "global_pool": "avg", "mixer_norm": norm}
    config = named_config("vim_tiny", num_classes=0, position="sincos", **pooled)
    per_line = 4 * (3 * 384 + 2 * 48 + 2 * 384 * 16 / 32)
    scan = per_line / 14 + 8 * norm
    assert block_saved_bytes(config, "cpu", torch.float32, 196) == pytest.approx(
        4 * (2 * 192 + 3 * 384) + scan, rel=1e-3
    )
