"""Triton kernels around Mamba-2's operation against the plain forms: on a GPU, or without one by the interpreter."""

import pytest
import torch
from kernel_device import DEVICE

from ssm_asr.ops import dispatch
from ssm_asr.ops.mamba_block_kernel import convolve, gated_norm
from ssm_asr.ssm.mamba2 import GatedRMSNorm, Mamba2


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def compare(plain, kernel, inputs, half=()):
    """Output and gradients against those of `plain` in float64; the inputs numbered `half` are in bfloat16."""
    inputs = [x.bfloat16().float() if i in half else x for i, x in enumerate(inputs)]
    results, weight = [], None
    for run, exact in ((plain, True), (kernel, False)):
        leaves = [x.to(DEVICE, torch.float64 if exact else torch.float32) for x in inputs]
        leaves = [
            (x.bfloat16() if i in half and not exact else x).detach().requires_grad_() for i, x in enumerate(leaves)
        ]
        y = run(*leaves)
        weight = torch.randn(y.shape).bfloat16() if weight is None else weight
        results.append([y, *torch.autograd.grad(y, leaves, weight.to(y))])
    for expected, actual in zip(*results, strict=True):
        # The interpreter cuts digits off where a GPU rounds to the nearest.
        rounding = 2**-7 if actual.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(
            actual.double(), expected, atol=2e-6 * float(expected.detach().abs().max()), rtol=rounding
        )


@pytest.mark.parametrize("half", [(), (0,)])
@pytest.mark.parametrize("frames, channels, taps, padded", [(70, 40, 4, True), (5, 3, 2, False), (2, 7, 4, True)])
def test_convolution(frames, channels, taps, padded, half):
    """Of a slice of channels; padding in every third frame of a mask, as a slower stack has it."""
    weight, bias = torch.randn(channels, 1, taps), torch.randn(channels)
    lens = torch.tensor([frames, frames // 2 + 1])
    padding = (torch.arange(frames) >= lens[:, None]).repeat_interleave(3, dim=1).to(DEVICE)[:, ::3]
    padding = padding if padded else None

    def plain(x, weight, bias):
        x = x[..., 2:-1].transpose(1, 2)
        x = x if padding is None else x.masked_fill(padding[:, None], 0.0)
        x = torch.nn.functional.pad(x, (taps - 1, 0))
        return torch.nn.functional.silu(torch.conv1d(x, weight, bias, groups=channels)).transpose(1, 2)

    def by_kernel(x, weight, bias):
        return convolve(x[..., 2:-1], weight, bias, padding)

    compare(plain, by_kernel, [torch.randn(2, frames, channels + 3), weight, bias], half)


@pytest.mark.parametrize("half", [(), (1,)])
@pytest.mark.parametrize("frames, width, groups", [(7, 9, 2), (300, 18, 3), (21, 70, 1)])
def test_gated_norm(frames, width, groups, half):
    norm = GatedRMSNorm(groups * width, groups)
    inputs = [torch.randn(2, frames, groups * width), torch.randn(2, frames, groups * width + 5) * 3]

    def plain(y, z, weight):
        gated = (y * torch.nn.functional.silu(z[..., 5:])).reshape(2, frames, groups, width)
        return (gated / (gated.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()).flatten(2) * weight

    def by_kernel(y, z, weight):
        return gated_norm(y, z[..., 5:], weight, groups, norm.eps)

    compare(plain, by_kernel, [*inputs, torch.randn(groups * width)], half)


@pytest.mark.parametrize("padded", [True, False])
def test_the_block(padded, monkeypatch):
    """With all its kernels: output, state and gradients."""
    block = Mamba2(12, 16, 3, 4, 2).to(DEVICE)
    padding = (torch.arange(11) >= torch.tensor([[11], [2]])).to(DEVICE) if padded else None
    u, weight = torch.randn(2, 11, 12), torch.randn(2, 11, 12)
    valid = torch.ones(2, 11, 1) if padding is None else ~padding[..., None].cpu()
    results = []
    for use, dtype in ((False, torch.float64), (True, torch.float32)):
        monkeypatch.setattr(dispatch, "use_kernels", lambda x, use=use: use)
        block.to(dtype)
        leaf = u.to(DEVICE, dtype).requires_grad_()
        y, state = block(leaf, padding)
        y = y * valid.to(y)  # outputs at padding mean nothing
        results.append([y, *state, *torch.autograd.grad(y, [leaf, *block.parameters()], weight.to(y))])
    for expected, actual in zip(*results, strict=True):
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(actual.double(), expected, atol=1e-5 * scale, rtol=1e-5)
