"""Tests of the predictor's grouped convolution."""

import torch
from torch import nn

from ssm_asr.ops.linear import grouped_product


def test_a_grouped_convolution_as_one_product():
    torch.manual_seed(0)
    for context, groups in ((1, 4), (2, 4), (3, 1)):
        conv = nn.Conv1d(16, 8, context, groups=groups, bias=False)
        x = torch.randn(3, 16, 7, requires_grad=True)
        expected, actual = conv(x), grouped_product(conv, x)
        torch.testing.assert_close(actual, expected)
        weight = torch.randn_like(expected)
        for a, e in zip(*(torch.autograd.grad(y, (x, conv.weight), weight) for y in (actual, expected)), strict=True):
            torch.testing.assert_close(a, e)
