"""What only a GPU can show: the Gluon kernels, unknown to the interpreter, at the sizes that a model gives them.

On a GPU test_backends.py and test_memory.py run there, too.
"""

import pytest
import torch

from tests.kernels.test_backends import LOW_VALUE, VALUE, assert_close, compare, mixer_tensors, run_mixer
from vim_backbone import VisionMamba
from vim_backbone.config import named_config
from vim_kernels import use_backend

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU: the interpreter (test_backends.py) and the compiler (test_triton_aot.py) stand in",
)
GRADIENT = 2e-5  # float32, sums over thousands of tokens in another order than the reference's


def vim(pixels, dtype=torch.float32):
    torch.manual_seed(0)
    model = VisionMamba(named_config("vim_tiny", depth=2, img_size=(pixels, pixels))).to("cuda", dtype).eval()
    return model, torch.randn(2, 3, pixels, pixels, device="cuda", dtype=dtype)


@pytest.mark.parametrize("fewest", [7, 4, 0])
def test_mixer_with_16_8_and_4_states_a_thread(fewest, monkeypatch):
    """Every row of the table of sizes, values and gradients, whatever the chip would choose."""
    from vim_kernels.triton_backend import plan

    sizes = dict(plan.TILED_FORWARD)[fewest]
    monkeypatch.setattr(plan, "tiled_forward", lambda *_: sizes)
    for length in (1, 15, 197):
        compare(run_mixer, mixer_tensors(2, length, 384, 16, 12, 4), "triton", gradient=GRADIENT)


def test_mixer_in_chunks():
    compare(run_mixer, mixer_tensors(1, 1025, 384, 16, 12, 4), "triton", gradient=GRADIENT)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, VALUE), (torch.bfloat16, LOW_VALUE)])
@pytest.mark.parametrize("pixels", [224, 512])
def test_a_model_without_gradients_equals_the_reference(pixels, dtype, tolerance):
    """With its output over x, and in slices."""
    from vim_kernels.triton_backend import plan

    model, images = vim(pixels, dtype)
    exact = model.double() if dtype == torch.float32 else model
    with torch.no_grad():
        with use_backend("reference"):
            want = exact(images.to(next(exact.parameters()).dtype))
        model.to(dtype)
        for slices in (1, 2):
            with pytest.MonkeyPatch.context() as patch, use_backend("triton"):
                patch.setattr(plan, "slices", lambda *_, count=slices: count)
                assert_close(model(images), want, 5 * tolerance, f"{slices} slices")


def test_compiled_with_graphs_gives_the_same():
    model, images = vim(224, torch.bfloat16)
    with torch.no_grad():
        want = model(images)
        compiled = torch.compile(model, mode="reduce-overhead")
        for _ in range(3):
            got = compiled(images).clone()
        assert_close(got, want, LOW_VALUE)


def test_a_step_gives_the_same_bits_every_time():
    model, images = vim(224)

    def gradients():
        model.zero_grad()
        model(images).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for first, second in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, second)
