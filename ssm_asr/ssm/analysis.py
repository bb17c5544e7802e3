"""These functions analyse state-space models and convolutions as systems: poles, Hankel singular values and fits.

Shapes: D channels, L lags, M poles (both of each pair), N states of a fit, S starting points of a fit.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import trange

from ssm_asr.ssm.s4d import S4D

Array = NDArray[Any]

# The starting points of fits: the shortest and the longest time constant of a pole, in frames.
SPREADS_FRAMES = ((0.2, 2.0), (0.5, 8.0), (2.0, 30.0), (0.3, 100.0))
FIT_STEPS = 400
# Limits on decay rates, per frame. A faster decay would weigh so much at lag 0 that float32 could not cancel it.
RATES = (1e-4, 4.5)
RIDGE = 1e-6  # relative; keeps the weights of poles that move close together small enough for float32 to cancel


def modes(ssm: S4D) -> tuple[Array, Array]:
    """Returns the poles and weights, (D, M) each, with which K[l] = Σ_m weight_m·pole_m^l.

    They are in double precision, and contain both poles of each pair.
    """
    with torch.no_grad():
        dt_D1 = ssm.log_dt.double().exp()[:, None]
        A_DM = torch.complex(-ssm.A_log.double().exp(), torch.zeros_like(ssm.A_log, dtype=torch.float64))
        C_DM = ssm.C.double().to(torch.complex128)
        if ssm.A_imag is not None:
            A_DM, C_DM = A_DM + 1j * ssm.A_imag.double(), torch.complex(*ssm.C.double().chunk(2, dim=1))
        poles_DM = (A_DM * dt_D1).exp()
        weights_DM = C_DM * (A_DM * dt_D1).expm1() / A_DM
        if ssm.A_imag is not None:
            poles_DM, weights_DM = (torch.cat([x, x.conj()], dim=1) for x in (poles_DM, weights_DM))
    return poles_DM.numpy(), weights_DM.numpy()


def hankel_of_modes(poles_DM: Array, weights_DM: Array) -> Array:
    """Returns the Hankel singular values of K[1], K[2], …, the largest first: (D, M).

    They are the roots of the eigenvalues of the product of the controllability and the observability Gramian.

    Args:
        poles_DM, weights_DM: as `modes` returns them.
    """
    b_DM = np.sqrt(np.abs(weights_DM)) + 0j
    c_DM = np.divide(weights_DM, b_DM, out=np.zeros_like(b_DM), where=b_DM != 0) * poles_DM
    reach_DMM = b_DM[:, :, None] * b_DM[:, None].conj() / (1 - poles_DM[:, :, None] * poles_DM[:, None].conj())
    seen_DMM = c_DM[:, :, None].conj() * c_DM[:, None] / (1 - poles_DM[:, :, None].conj() * poles_DM[:, None])
    values_DM = np.linalg.eigvals(reach_DMM @ seen_DMM).real.clip(min=0)
    return np.sort(np.sqrt(values_DM), axis=1)[:, ::-1]


def hankel_of_taps(taps_DL: Array) -> Array:
    """Returns the Hankel singular values of the taps 1 … L-1 with zeros after them, the largest first: (D, L-1)."""
    lag = np.add.outer(range(taps_DL.shape[1] - 1), range(taps_DL.shape[1] - 1)) + 1
    padded_DL = np.pad(taps_DL.astype(np.float64), ((0, 0), (0, taps_DL.shape[1])))
    return np.linalg.svd(padded_DL[:, lag], compute_uv=False)


def effective_rank(values_DM: Array) -> Array:
    """Returns exp of the entropy of the normalised singular values, (D,): M if all are equal, 1 for a single one."""
    share_DM = values_DM / values_DM.sum(axis=1, keepdims=True)
    return np.exp(-(share_DM * np.log(np.where(share_DM > 0, share_DM, 1.0))).sum(axis=1))


def sign_changes(kernel_DL: Array, scale_DL: Array | float = 0.0) -> Array:
    """Counts how often each impulse response changes its sign, (D,).

    Args:
        kernel_DL: the impulse responses.
        scale_DL: size of the terms that were summed up. Numbers as small as the rounding errors of these sums are left
            out.
    """
    counts = []
    for row_L in np.where(np.abs(kernel_DL) > 1e-10 * np.asarray(scale_DL), kernel_DL, 0.0):
        signs = np.sign(row_L[row_L != 0])
        counts.append(int((signs[1:] != signs[:-1]).sum()))
    return np.array(counts)


def fit_real_poles(taps_DL: Tensor, states: int) -> tuple[Tensor, Tensor]:
    """Fits Σ_n weight_n·pole_n^l with real poles to the taps at l = 1 … L-1 and to zeros after them.

    The fit minimises the squared error over all l > 0. Its modes are u_n[l] = √(1 - pole_n²)·pole_n^(l-1), which have a
    norm of 1 over l = 1, 2, …, and whose inner products have closed forms.

    Args:
        taps_DL: the impulse responses; lag 0 is not used.
        states: N.

    Returns:
        The poles, which lie in (0, 1), and the weights, (D, N) each.
    """
    target_DL = taps_DL[:, 1:].double()
    target_SDL = (target_DL / target_DL.norm(dim=1, keepdim=True).clamp(min=1e-12)).expand(len(SPREADS_FRAMES), -1, -1)
    place_N = torch.linspace(0.0, 1.0, states + 2, dtype=torch.float64)[1:-1]
    low_S, high_S = torch.tensor(SPREADS_FRAMES, dtype=torch.float64).log().T
    log_rate_SN = -(low_S[:, None] + (high_S - low_S)[:, None] * place_N)
    log_rate_SDN = log_rate_SN[:, None].repeat(1, len(taps_DL), 1).requires_grad_()
    optimizer = torch.optim.Adam([log_rate_SDN], lr=0.05)
    for _ in trange(FIT_STEPS, desc=f"fit of {states} poles", unit="step", leave=False):
        optimizer.zero_grad()
        (-_explained(log_rate_SDN, target_SDL)[0].sum()).backward()
        optimizer.step()
        with torch.no_grad():
            log_rate_SDN.clamp_(*np.log(RATES))
    with torch.no_grad():
        explained_SD, coefficients_SDN = _explained(log_rate_SDN, target_SDL)
        best_D = explained_SD.argmax(dim=0)
        each_D = torch.arange(len(taps_DL))
        poles_DN = (-log_rate_SDN.exp()).exp()[best_D, each_D]
        scaled_DN = coefficients_SDN[best_D, each_D] * (1 - poles_DN**2).sqrt() / poles_DN
        return poles_DN, scaled_DN * target_DL.norm(dim=1, keepdim=True)


def _explained(log_rate_SDN: Tensor, target_SDL: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the part of the target's energy in the best sums of the modes, (S, D), and the coefficients (S, D, N)."""
    rate_SDN = log_rate_SDN.exp()
    poles_SDN, norms_SDN = (-rate_SDN).exp(), (-torch.expm1(-2 * rate_SDN)).sqrt()
    lag_L = torch.arange(target_SDL.shape[-1], dtype=torch.float64)
    match_SDN = norms_SDN * (target_SDL[..., None, :] * (-rate_SDN[..., None] * lag_L).exp()).sum(-1)
    gram_SDNN = norms_SDN[..., None] * norms_SDN[..., None, :] / (1 - poles_SDN[..., None] * poles_SDN[..., None, :])
    gram_SDNN = gram_SDNN + RIDGE * torch.eye(poles_SDN.shape[-1], dtype=torch.float64)
    coefficients_SDN = torch.linalg.solve(gram_SDNN, match_SDN)
    return (coefficients_SDN * match_SDN).sum(-1), coefficients_SDN


def set_modes(ssm: S4D, poles_DN: Tensor, weights_DN: Tensor, first_D: Tensor) -> None:
    """Sets an S4D with real poles to given modes.

    The step becomes one frame, so that A = log(pole).

    Args:
        ssm: the model, which is changed.
        poles_DN: poles in (0, 1).
        weights_DN: weights of the modes.
        first_D: the impulse response at lag 0, including D.
    """
    A_DN = poles_DN.log()
    with torch.no_grad():
        ssm.log_dt.zero_()
        ssm.A_log.copy_((-A_DN).log())
        ssm.C.copy_(weights_DN * A_DN / (poles_DN - 1))
        ssm.D.copy_(first_D - weights_DN.sum(dim=1))
