"""Poles, Hankel singular values, sign changes and fits, against kernels that are known."""

import numpy as np
import pytest
import torch

from ssm_asr.ssm.analysis import (
    effective_rank,
    fit_real_poles,
    hankel_of_modes,
    hankel_of_taps,
    modes,
    set_modes,
    sign_changes,
)
from ssm_asr.ssm.s4d import S4D


@pytest.fixture(params=["real", "lin"])
def ssm(request):
    torch.manual_seed(3)
    model = S4D(5, 4, request.param)
    with torch.no_grad():
        model.log_dt.uniform_(-3.0, -1.0)
        model.A_log.add_(0.3 * torch.randn_like(model.A_log))
    return model


def kernels(poles_DM, weights_DM, frames):
    return (weights_DM[..., None] * poles_DM[..., None] ** np.arange(frames)).sum(1).real


def test_modes_sum_to_the_kernel(ssm):
    np.testing.assert_allclose(kernels(*modes(ssm), 200), ssm.kernel(200).detach().numpy(), atol=2e-6)


def test_hankel_singular_values_are_those_of_the_matrix(ssm):
    poles_DM, weights_DM = modes(ssm)
    kernel_DL = kernels(poles_DM, weights_DM, 1601)
    lag = np.add.outer(np.arange(800), np.arange(800)) + 1
    for row_L, values_M in zip(kernel_DL, hankel_of_modes(poles_DM, weights_DM), strict=True):
        matrix = np.linalg.svd(row_L[lag], compute_uv=False)
        np.testing.assert_allclose(values_M, matrix[:4], rtol=1e-6, atol=1e-7 * matrix[0])
        assert matrix[4] < 1e-9 * matrix[0], "rank N"


def test_hankel_singular_values_in_closed_form():
    poles, weights = np.array([[0.6, 0.9, 0.8]]) + 0j, np.array([[-2.0, 0.0, 0.0]]) + 0j
    expected = 2.0 * 0.6 / (1 - 0.6**2)
    np.testing.assert_allclose(hankel_of_modes(poles, weights), [[expected, 0, 0]], atol=1e-12)
    # A delay by 5 frames keeps 5 of them, all alike.
    delay = np.array([[0.0, 0, 0, 0, 0, 1]])
    np.testing.assert_allclose(hankel_of_taps(delay), np.ones((1, 5)))
    np.testing.assert_allclose(effective_rank(hankel_of_taps(delay)), 5)
    # Taps that are long past the end of a kernel are as good as the kernel without end.
    taps = kernels(np.array([[0.5, 0.7]]), np.array([[1.0, -3.0]]), 80)
    np.testing.assert_allclose(
        hankel_of_taps(taps)[:, :2],
        hankel_of_modes(np.array([[0.5, 0.7]]) + 0j, np.array([[1.0, -3.0]]) + 0j),
        rtol=1e-6,
    )
    assert hankel_of_taps(taps)[0, 2] < 1e-9


def test_effective_rank():
    np.testing.assert_allclose(effective_rank(np.array([[3.0, 3, 3], [5, 0, 0]])), [3, 1])
    assert 1 < effective_rank(np.array([[1.0, 0.1, 0.01]]))[0] < 2


def test_real_poles_change_sign_so_often_and_no_more():
    poles_N = np.array([0.5, 0.7, 0.85, 0.95])
    zeros = np.array([1.5, 4.5, 9.5])  # that can be chosen: N - 1 of them
    weights_N = np.linalg.svd(poles_N ** zeros[:, None])[2][-1]  # the one direction that vanishes there
    kernel = kernels(poles_N[None], weights_N[None], 400)
    scale = kernels(poles_N[None], np.abs(weights_N)[None], 400)
    assert sign_changes(kernel, scale).tolist() == [3]
    assert np.flatnonzero(np.diff(np.sign(kernel[0]))).tolist() == [1, 4, 9]
    rng = np.random.default_rng(0)
    for _ in range(50):
        poles, weights = rng.uniform(0, 1, (1, 6)), rng.normal(size=(1, 6))
        assert sign_changes(kernels(poles, weights, 300), kernels(poles, abs(weights), 300))[0] <= 5
    assert sign_changes(np.array([[1.0, 0, -1, 0, 0, -2, 3], [0, 0, 1, 2, 0, 0, 1]])).tolist() == [2, 0]


def test_a_kernel_of_known_poles_is_found_again():
    poles_D2, weights_D2 = np.array([[0.2, 0.8], [0.6, 0.75]]), np.array([[3.0, -1.0], [1.0, 0.5]])
    taps = torch.from_numpy(kernels(poles_D2, weights_D2, 120)) + torch.tensor([[0.7], [0.0]]) * torch.eye(1, 120)
    poles_DN, weights_DN = fit_real_poles(taps, 2)
    # Weight by weight the second is hard to tell: its poles are close to each other.
    assert np.allclose(np.sort(poles_DN[0]), poles_D2[0], atol=1e-3)
    ssm = S4D(2, 2, "real")
    set_modes(ssm, poles_DN, weights_DN, taps[:, 0])
    error_D = (ssm.impulse_response(120) - taps).norm(dim=1) / taps.norm(dim=1)
    assert (error_D < 2e-3).all()


def test_a_fit_is_the_best_there_is():
    """One pole against all that there are; with more poles, never worse; and alternating taps have no real fit."""
    torch.manual_seed(0)
    taps = torch.cat([torch.randn(6, 12), torch.tensor([1.0, -1.0]).repeat(6)[None]]).double()
    errors = []
    for states in (1, 2, 4):
        poles_DN, weights_DN = fit_real_poles(taps, states)
        residual = torch.from_numpy(kernels(poles_DN.numpy(), weights_DN.numpy(), 1000))
        residual[:, :12] -= taps
        errors.append(residual[:, 1:].norm(dim=1) / taps[:, 1:].norm(dim=1))
    lag = torch.arange(1, 1000)
    basis_GL = torch.linspace(0.012, 0.999, 3000, dtype=torch.float64)[:, None] ** lag
    basis_GL = basis_GL / basis_GL.norm(dim=1, keepdim=True)
    target_DL = torch.nn.functional.pad(taps[:, 1:], (0, 988))
    explained_D = (target_DL @ basis_GL.T).square().amax(dim=1) / target_DL.square().sum(dim=1)
    assert (errors[0] < (1 - explained_D).sqrt() + 1e-4).all()
    assert (errors[1] <= errors[0] + 1e-4).all() and (errors[2] <= errors[1] + 1e-4).all()
    assert errors[2][-1] > 0.7
