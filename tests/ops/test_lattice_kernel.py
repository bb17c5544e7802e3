"""Triton kernels of the lattice's sums against the plain form: on a GPU, or by Triton's interpreter."""

import pytest
import torch
from kernel_device import DEVICE
from torch import Tensor

from ssm_asr.ops import lattice
from ssm_asr.ops import lattice_kernel as lattice_kernels

B, T = 4, 7
CELLS = [1, 2, 3, 5, 8, 33, 80]


def compare(
    symbol_BTR: Tensor,
    blank_BTR: Tensor,
    boundary_B4: Tensor,
    num_symbols: int,
    regular: bool,
    start_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The plain form's sums, which those of the kernels must equal."""
    given = (symbol_BTR, blank_BTR, boundary_B4, num_symbols, regular, start_BT)
    expected = lattice.sums(*given)
    on_device = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in given]
    actual = lattice_kernels.sums(*on_device, lattice.RAREST_ARC)
    for ours, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), reference, rtol=1e-12, atol=1e-12)
    return expected


@pytest.mark.parametrize("regular", [True, False])
@pytest.mark.parametrize("R", CELLS)
def test_all_cells(R, regular):
    torch.manual_seed(R)
    S = R - 1
    arcs_2BTR = -5 * torch.rand(2, B, T, R, dtype=torch.float64)
    arcs_2BTR[:, 0] = arcs_2BTR[:, 0].masked_fill(torch.rand(2, T, R) < 0.1, -torch.inf)
    symbol_BTR, blank_BTR = arcs_2BTR
    symbol_BTR[..., S] = -torch.inf
    blank_BTR[2, 0, 0] = -torch.inf
    most = S if regular else min(S, 2)
    boundary_B4 = torch.tensor([[0, 0, most, T], [most // 3, 1, most, 5], [0, 0, 0, 1], [most, 2, most, T - 1]])
    score_B, symbol_occupation_BTR, blank_occupation_BTR = compare(symbol_BTR, blank_BTR, boundary_B4, S, regular)
    assert score_B[1].isfinite()
    assert score_B[2] == -torch.inf
    assert not symbol_occupation_BTR[2].any() and not blank_occupation_BTR[2].any()
    assert blank_occupation_BTR[1].sum() > 1


@pytest.mark.parametrize("regular", [True, False])
@pytest.mark.parametrize("R", CELLS[1:])
def test_pruned(R, regular):
    torch.manual_seed(R)
    rise_BT = torch.randint(0, min(R, 5) if regular else 2, (B, T))
    start_BT = rise_BT.cumsum(1) - rise_BT[:, :1]
    start_BT[3] = 0
    S = int(start_BT.max()) + R - 1
    last_B = start_BT[:, -1] + R - 1
    if not regular:
        last_B = last_B.clamp(max=T)
    t_end_B = torch.tensor([T, T, T, 4])
    end_B = torch.stack([last_B[0], start_BT[1, -1], last_B[2], last_B[3].clamp(max=4)])
    boundary_B4 = torch.stack([torch.zeros_like(end_B), torch.zeros_like(end_B), end_B, t_end_B], 1)
    symbol_BTR, blank_BTR = -5 * torch.rand(2, B, T, R, dtype=torch.float64)
    symbol_BTR = symbol_BTR.masked_fill(start_BT[..., None] + torch.arange(R) >= S, -torch.inf)
    blank_BTR[2] = -torch.inf
    score_B, symbol_occupation_BTR, _ = compare(symbol_BTR, blank_BTR, boundary_B4, S, regular, start_BT)
    assert score_B[3].isfinite() and symbol_occupation_BTR[3].any()
    assert score_B[1 if regular else 3].isfinite()


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e5])
def test_range(scale):
    """Probabilities far below those of float64 count as well."""
    torch.manual_seed(1)
    symbol_BTR, blank_BTR = scale * torch.randn(2, B, T, 4, dtype=torch.float64)
    symbol_BTR[..., 3] = -torch.inf
    boundary_B4 = torch.tensor([[0, 0, 3, T], [0, 0, 2, 5], [0, 0, 0, 1], [1, 2, 3, T]])
    score_B, *_ = compare(symbol_BTR, blank_BTR, boundary_B4, 3, True)
    assert score_B.isfinite().all()


def test_single_precision_and_nan():
    torch.manual_seed(1)
    symbol_BTR, blank_BTR = -5 * torch.rand(2, B, T, 4)
    symbol_BTR[..., 3] = -torch.inf
    blank_BTR[1, 2, 1] = torch.nan
    given = (symbol_BTR, blank_BTR, torch.tensor([0, 0, 3, T]).expand(B, 4))
    on_device = [x.to(DEVICE) for x in given]
    actual = lattice_kernels.sums(*on_device, 3, True, None, lattice.RAREST_ARC)
    again = lattice_kernels.sums(*on_device, 3, True, None, lattice.RAREST_ARC)
    for ours, same, reference in zip(actual, again, lattice.sums(*given, 3, True, None), strict=True):
        assert ours.dtype == torch.float32
        assert ours[1].isnan().any() and reference[1].isnan().any()
        keep = torch.tensor([0, 2, 3])
        torch.testing.assert_close(ours.cpu()[keep], reference[keep], rtol=1e-6, atol=1e-7)
        assert torch.equal(ours[keep], same[keep])
