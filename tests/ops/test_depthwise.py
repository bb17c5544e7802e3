"""Depthwise convolutions over time: the form for few frames against conv1d.

Shapes are those of ssm_asr/ssm/depthwise.py.
"""

from unittest.mock import patch

import pytest
import torch
from torch import nn

from ssm_asr.ops.depthwise import FEW_PRODUCTS, LARGE_MATRIX, depthwise

FEW, MANY = (1, 6, 4), (1, 6, 4 + LARGE_MATRIX)


def make_conv(channels: int, taps: int, padding: int = 0) -> nn.Conv1d:
    torch.manual_seed(1)
    return nn.Conv1d(channels, channels, taps, padding=padding, groups=channels)


@pytest.mark.parametrize(
    "B, D, T, taps, padding",
    [(1, 6, 4, 4, 0), (1, 6, 2, 15, 7), (3, 6, 16, 5, 0), (2, 6, 9, 7, 3), (2, 5, 1, 1, 0), (1, 4, 300, 3, 1)],
)
def test_it_is_the_convolution(B, D, T, taps, padding):
    conv = make_conv(D, taps, padding).double()
    x_BDT = torch.randn(B, T, D, dtype=torch.float64).transpose(1, 2).requires_grad_()  # of any strides
    inputs = (x_BDT, *conv.parameters())
    results = []
    for y_BDS in (conv(x_BDT), depthwise(conv, x_BDT)):
        weight_BDS = torch.arange(y_BDS.numel(), dtype=y_BDS.dtype).reshape(y_BDS.shape).cos()
        results.append([y_BDS, *torch.autograd.grad((y_BDS * weight_BDS).sum(), inputs)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("shape, few", [(FEW, True), (MANY, False), ((FEW_PRODUCTS, 6, 4), False)])
def test_only_few_frames_take_the_other_form(shape, few):
    conv = make_conv(6, 4)
    with patch.object(nn.Conv1d, "forward", autospec=True, side_effect=nn.Conv1d.forward) as forward:
        depthwise(conv, torch.zeros(shape))
    assert forward.called is not few


def test_exported_models_have_a_convolution():
    conv = make_conv(6, 4).requires_grad_(False)
    traced = torch.jit.trace(lambda x_BDT: depthwise(conv, x_BDT), torch.randn(FEW), check_trace=False)
    assert "aten::_convolution" in str(traced.inlined_graph)
