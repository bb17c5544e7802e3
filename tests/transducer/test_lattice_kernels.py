"""Triton kernels of the lattice's loops against the plain form: on a GPU, or by Triton's interpreter."""

import pytest
import torch
from kernel_device import DEVICE

from ssm_asr.transducer import lattice, lattice_kernels

K, B = 12, 3


@pytest.mark.parametrize("R", [2, 5, 40])
def test_advance(R):
    torch.manual_seed(1)
    arcs = torch.randn(K, 2, B, R, dtype=torch.float64)
    arcs[torch.rand(arcs.shape) < 0.3] = -torch.inf
    expected = torch.full((K + 1, B, R), -torch.inf, dtype=torch.float64)
    expected[0, :, 1] = 0.0
    actual = expected.clone().to(DEVICE)
    lattice.advance(arcs, expected, pruned=True)
    lattice_kernels.advance(arcs.to(DEVICE), actual)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-12, atol=1e-12)
    assert expected[-1].isfinite().any()


@pytest.mark.parametrize("R", [2, 5, 40])
def test_retreat(R):
    torch.manual_seed(1)
    share = torch.rand(K, 2, B, R, dtype=torch.float64)
    expected = torch.zeros(K + 1, B, R + 1, dtype=torch.float64)
    expected[[K, K - 1, K - 5], torch.arange(B), torch.tensor([0, 1, R - 1])] = 1.0
    actual = expected.clone().to(DEVICE)
    lattice.retreat(share, expected, pruned=True)
    lattice_kernels.retreat(share.to(DEVICE), actual)
    torch.testing.assert_close(actual.cpu()[..., :R], expected[..., :R], rtol=1e-12, atol=1e-12)
    assert (expected[0] > 0).any()
