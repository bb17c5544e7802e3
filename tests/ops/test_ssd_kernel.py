"""Triton kernels against the plain forms: on a GPU where there is one, else by Triton's interpreter where it is there.

Shapes are those of ssm_asr/ops/ssd.py.
"""

import pytest
import torch
from kernel_device import DEVICE

from ssm_asr.ops import ssd_kernel as kernels
from ssm_asr.ops.ssd import LEAST_LOG_DECAY, SsdInputs, ssd_recurrent
from ssm_asr.ops.ssd_kernel import BLOCK_FRAMES, PASS_BLOCKS, ssd_kernel

NAMES = ("y", "end", "dx", "ddt", "dA", "dB", "dC", "dD", "dstate")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def operands(B=2, T=37, H=4, P=3, G=2, N=5, steps=0.2, channels_first=False):
    """Random inputs of the operation in float64, with gradients."""
    inputs = [
        torch.randn(B, T, H, P),
        torch.rand(B, T, H) * steps,
        -torch.rand(H) * 4,
        torch.randn(B, T, G, N),
        torch.randn(B, T, G, N),
        torch.randn(H),
        torch.randn(B, H, P, N),
    ]
    if channels_first:  # as the convolution before the operation leaves them: frames lie next to each other
        for i in (0, 3, 4):
            inputs[i] = inputs[i].movedim(1, -1).contiguous().movedim(-1, 1)
    return [x.to(DEVICE, torch.float64).requires_grad_() for x in inputs]


def with_gradients(outputs, inputs):
    """Outputs, and gradients of the inputs for a fixed random weighting of all outputs."""
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(loss, inputs)]


def assert_as_reference(inputs, tolerance=2e-5):
    """Values and gradients of the kernels in float32 against the recurrence in float64, each relative to its norm."""
    expected = with_gradients(ssd_recurrent(SsdInputs(*inputs)), inputs)
    inputs32 = [x.detach().float().requires_grad_() for x in inputs]
    actual = with_gradients(ssd_kernel(inputs32, LEAST_LOG_DECAY), inputs32)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert a.isfinite().all(), name
        assert (a - e).norm() <= tolerance * e.norm() + 1e-12, (name, float((a - e).norm() / e.norm()))


@pytest.mark.parametrize("T", [1, BLOCK_FRAMES, BLOCK_FRAMES + 1, PASS_BLOCKS * BLOCK_FRAMES + 5])
def test_lengths(monkeypatch, T):
    monkeypatch.setattr(kernels, "SUM_NUMBERS", PASS_BLOCKS)  # so the longest takes several steps
    assert_as_reference(operands(B=1, T=T, H=2))


@pytest.mark.parametrize("P, G, N", [(9, 8, 16), (12, 4, 32), (18, 2, 64), (24, 1, 128)])
def test_sizes_of_the_presets(monkeypatch, P, G, N):
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "PASS_NUMBERS", 4096)  # the interpreter takes its time for every program
    assert_as_reference(operands(B=1, T=20, H=16, P=P, G=G, N=N))


@pytest.mark.parametrize("G", [1, 2, 4])
def test_heads_that_share_a_group(G):
    assert_as_reference(operands(H=4, G=G))


@pytest.mark.parametrize("block_frames", [16, 32])
def test_lengths_of_blocks(monkeypatch, block_frames):
    monkeypatch.setattr(kernels, "BLOCK_FRAMES", block_frames)
    assert_as_reference(operands(B=1, T=70))


def test_sizes_of_no_preset():
    assert_as_reference(operands(B=1, T=20, H=2, G=1, P=33, N=17))


def test_inputs_of_other_strides():
    assert_as_reference(operands(channels_first=True))


@pytest.mark.parametrize("steps", [1e-4, 1.0, 30.0])
def test_slow_and_fast_decays(steps):
    assert_as_reference(operands(T=50, steps=steps))


def test_frames_without_a_step_change_nothing():
    inputs = operands(T=45)
    with torch.no_grad():
        inputs[1][:, 20:] = 0.0
    state = ssd_kernel([x.detach().float() for x in inputs], LEAST_LOG_DECAY)[1]
    start = [x.detach()[:, :20] if i in (0, 1, 3, 4) else x.detach() for i, x in enumerate(inputs)]
    torch.testing.assert_close(state, ssd_recurrent(SsdInputs(*start))[1].float(), atol=1e-5, rtol=1e-5)
    assert_as_reference(inputs)
