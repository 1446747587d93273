"""The planner against closed forms, and against what a real optimizer holds."""

import pytest
import torch

from launch.plan import main, plan
from vim_backbone import UserError, VisionMamba, named_config


def model():
    return VisionMamba(named_config("vim_tiny", depth=2, img_size=32, num_classes=0))


def test_one_process_holds_what_a_real_optimizer_holds():
    made = model()
    optimizer = torch.optim.AdamW(made.parameters())
    made(torch.randn(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    held = [*made.parameters(), *(p.grad for p in made.parameters() if p.grad is not None)]
    held += [v for entry in optimizer.state.values() for v in entry.values() if v.ndim]
    assert plan(made, 1)[0].held == pytest.approx(sum(t.numel() * 4 for t in held), rel=1e-3)


def test_each_stage_spreads_one_more_part():
    ddp, zero1, zero2, zero3 = plan(model(), 8)
    assert zero1.optimizer == pytest.approx(1.5 * ddp.optimizer / 8)  # and its copy of the parameters
    assert (zero1.parameters, zero1.gradients) == (ddp.parameters, ddp.gradients)
    assert zero2.gradients == pytest.approx(ddp.gradients / 8)
    assert zero3.parameters < zero2.parameters
    assert zero3.sent == pytest.approx(1.5 * ddp.sent)


def test_the_command_is_printed(capsys):
    main(["--model", "vim_large", "--image-size", "1024", "--gpus", "8", "--gpu-memory", "80"])
    printed = capsys.readouterr().out
    assert "accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes 8" in printed
    main(["--model", "vim_huge", "--image-size", "224", "--gpus", "8", "--gpu-memory", "8"])
    assert "zero3.yaml" in capsys.readouterr().out


def test_mistakes_get_one_line():
    with pytest.raises(UserError, match="did you mean 'vim_large'"):
        main(["--model", "vim_lage"])
    with pytest.raises(UserError, match="image height is 1000"):
        main(["--model", "vim_large", "--image-size", "1000"])
