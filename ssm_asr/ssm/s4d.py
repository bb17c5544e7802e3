"""S4D is a diagonal state-space model for each channel. It runs as a recurrence, as a convolution, or chunk by chunk.

Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models" (arXiv 2206.11893), with
a zero-order hold between frames (table 1). For each channel, with a step Δ and poles A_n,

    x_t = exp(A_n·Δ)·x_{t-1} + B̄_n·u_t,   B̄_n = (exp(A_n·Δ) - 1) / A_n,   y_t = Σ_n C_n·x_t + D·u_t.

This is the convolution of u with K[l] = Σ_n C_n·B̄_n·exp(A_n·Δ)^l, plus D·u. Complex poles come in conjugate pairs. Only
one pole of a pair is computed, and it counts twice: K[l] = 2·Re Σ_n ….

All arithmetic is real. A mode is the part of the model that belongs to one pole. Quantities of modes are stored as N
reals per channel: one number for each real pole, or for pairs first N/2 real parts and then N/2 imaginary parts.

Shapes: B batch, T frames, D channels, N reals of a channel, M stored poles (N, or N/2 for pairs), L taps.
"""

import math

import torch
from torch import Tensor, nn

PARAMETERISATIONS = ("real", "lin")
# Convolutions with up to this many taps are computed directly. Chunks are this short, so streaming needs no complex
# numbers. Longer convolutions go through an FFT: in training (512 channels, one CPU core) it took half the time of the
# direct form with 64 taps, and a ninth with 512 taps.
DIRECT_TAPS = 64


def causal_convolution(x_BDT: Tensor, taps_DL: Tensor) -> Tensor:
    """Computes y_t = Σ_l taps_l·x_{t-l} for each channel, (B, D, T), with zeros before the first frame.

    Args:
        x_BDT: the sequences.
        taps_DL: the taps; tap l weighs the frame l frames before.
    """
    frames, taps = x_BDT.shape[2], taps_DL.shape[1]
    if taps <= DIRECT_TAPS or torch.jit.is_tracing():  # exported models have no FFT
        return convolve_inside(nn.functional.pad(x_BDT, (taps - 1, 0)), taps_DL)
    size = 1 << (frames + taps - 2).bit_length()  # a power of two that holds frames + taps - 1
    spectrum = torch.fft.rfft(x_BDT.to(taps_DL.dtype), size) * torch.fft.rfft(taps_DL, size)
    return torch.fft.irfft(spectrum, size)[..., :frames]


def convolve_inside(x_BDT: Tensor, taps_DL: Tensor) -> Tensor:
    """Computes `causal_convolution` directly, (B, D, T - L + 1). The first L - 1 frames only serve as past."""
    return nn.functional.conv1d(x_BDT, taps_DL.flip(1)[:, None], groups=taps_DL.shape[0])


def _times(a_DN: Tensor, b_DN: Tensor, pairs: bool) -> Tensor:
    """Returns the product, mode by mode."""
    if not pairs:
        return a_DN * b_DN
    a_re, a_im = a_DN.chunk(2, dim=-1)
    b_re, b_im = b_DN.chunk(2, dim=-1)
    return torch.cat([a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re], dim=-1)


@torch.jit.script_if_tracing
def _recurrence(
    u_BDT: Tensor, state_BDN: Tensor, decay_DN: Tensor, input_DN: Tensor, weights_DN: Tensor, D_D: Tensor, pairs: bool
) -> tuple[Tensor, Tensor]:
    """Computes the output (B, D, T) and the state after the last frame, frame by frame.

    It is scripted when a model is traced, so that an exported model takes any number of frames.
    """
    outputs = [u_BDT[..., :0]]
    for t in range(u_BDT.shape[2]):
        state_BDN = _times(decay_DN, state_BDN, pairs) + input_DN * u_BDT[:, :, t, None]
        outputs.append(((weights_DN * state_BDN).sum(2) + D_D * u_BDT[:, :, t])[..., None])
    return torch.cat(outputs, dim=2), state_BDN


class S4D(nn.Module):
    """Computes D independent systems with one input and one output each.

    It computes in the precision of its parameters, even under autocast.

    Args:
        channels: D.
        states: N, the number of reals in the state of a channel: N real poles, or N/2 conjugate pairs.
        parameterisation: "real" starts from A_n = -(n + 1), "lin" from A_n = -1/2 + iπn for n = 0 … N/2 - 1.

    Raises:
        ValueError: if the parameterisation is neither of these, the number of states is below 1, or is odd with "lin".
    """

    # These are few numbers with a large effect, so they need a learning rate of their own and no weight decay.
    ssm_parameter_names = ("log_dt", "A_log", "A_imag", "C", "D")

    def __init__(self, channels: int, states: int, parameterisation: str) -> None:
        super().__init__()
        if parameterisation not in PARAMETERISATIONS:
            raise ValueError(f"parameterisation {parameterisation!r} of S4D: give {' or '.join(PARAMETERISATIONS)}")
        self.pairs = parameterisation == "lin"
        if states < 1 or (self.pairs and states % 2):
            kind = "an even" if self.pairs else "a positive"
            raise ValueError(f"{states} states of S4D {parameterisation}: give {kind} number")
        self.channels, self.states = channels, states
        n_M = torch.arange(states // 2 if self.pairs else states, dtype=torch.float32)
        decay_M = torch.full_like(n_M, 0.5) if self.pairs else n_M + 1
        # The real part of a pole is -exp(A_log), so that no step of training can make it unstable.
        self.A_log = nn.Parameter(decay_M.log().repeat(channels, 1))
        self.A_imag = nn.Parameter((math.pi * n_M).repeat(channels, 1)) if self.pairs else None
        self.C = nn.Parameter(torch.randn(channels, states) * (math.sqrt(0.5) if self.pairs else 1.0))
        self.D = nn.Parameter(torch.ones(channels))
        self.log_dt = nn.Parameter(torch.empty(channels).uniform_(math.log(1e-3), math.log(1e-1)))

    def init_state(self, batch_size: int, device: torch.device | None = None) -> Tensor:
        """Returns the state before the first frame: zeros (B, D, N)."""
        return torch.zeros(batch_size, self.channels, self.states, dtype=self.log_dt.dtype, device=device)

    def recurrence(self, u_BDT: Tensor, state_BDN: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the output (B, D, T) and the state after it, frame by frame. Other forms are tested against this."""
        decay_DN, weights_DN = self._powers(1)[..., 1], self._weights(self.C)
        return _recurrence(u_BDT, state_BDN, decay_DN, self._input(), weights_DN, self.D, self.pairs)

    def kernel(self, frames: int) -> Tensor:
        """Returns K[0 … L-1], (D, L), for L = `frames`. It does not include D."""
        with self._full_precision():
            return self._kernel(self._powers(frames))

    def impulse_response(self, frames: int) -> Tensor:
        """Returns the response to an impulse, (D, L) for L = `frames`: K and D·u together."""
        kernel_DL = self.kernel(frames)
        return torch.cat([kernel_DL[:, :1] + self.D[:, None], kernel_DL[:, 1:]], dim=1)

    def forward(self, u_BDT: Tensor) -> Tensor:
        """Computes the output (B, D, T) of whole sequences from a state of zeros, as a convolution."""
        with self._full_precision():
            u_BDT = u_BDT.to(self.log_dt.dtype)
            if torch.jit.is_tracing():  # a convolution needs a tap for each frame, and a trace would fix their number
                return self.recurrence(u_BDT, self.init_state(u_BDT.shape[0], u_BDT.device))[0]
            return causal_convolution(u_BDT, self._kernel(self._powers(u_BDT.shape[2]))) + self.D[:, None] * u_BDT

    def stream(self, u_BDT: Tensor, state_BDN: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the output (B, D, T) of a chunk of any length, and the new state.

        The output is the sum of the convolution inside the chunk and of what the state at its start contributes.
        """
        with self._full_precision():
            frames = int(u_BDT.shape[2])  # a constant in an exported model
            u_BDT = u_BDT.to(self.log_dt.dtype)
            powers_DNT = self._powers(frames)
            inside_BDT = causal_convolution(u_BDT, self._kernel(powers_DNT)) + self.D[:, None] * u_BDT
            seen_BDN = self._weights(self._times(self.C, state_BDN))
            carried_BDT = torch.einsum("bdn,dnt->bdt", seen_BDN, powers_DNT[..., 1:])
            summed_BDN = torch.einsum("bdt,dnt->bdn", u_BDT, powers_DNT[..., :frames].flip(2))
            new_BDN = self._times(powers_DNT[..., frames], state_BDN) + self._times(self._input(), summed_BDN)
            return inside_BDT + carried_BDT, new_BDN

    def _full_precision(self) -> torch.autocast:
        return torch.autocast(self.log_dt.device.type, enabled=False)

    def _times(self, a_DN: Tensor, b_DN: Tensor) -> Tensor:
        return _times(a_DN, b_DN, self.pairs)

    def _weights(self, modes_DN: Tensor) -> Tensor:
        """Returns w with Σ_N w·z = Σ_M modes·z, or 2·Re Σ_M modes·z for pairs, for any z that is stored as N reals."""
        if not self.pairs:
            return modes_DN
        re, im = modes_DN.chunk(2, dim=-1)
        return torch.cat([2 * re, -2 * im], dim=-1)

    def _powers(self, frames: int) -> Tensor:
        """Returns exp(A·Δ·l) for l = 0 … frames, (D, N, frames + 1)."""
        l_T = torch.arange(frames + 1, dtype=self.log_dt.dtype, device=self.log_dt.device)
        dt_D1 = self.log_dt.exp()[:, None]
        size_DMT = torch.exp((-self.A_log.exp() * dt_D1)[..., None] * l_T)
        if self.A_imag is None:
            return size_DMT
        angle_DMT = (self.A_imag * dt_D1)[..., None] * l_T
        return torch.cat([size_DMT * angle_DMT.cos(), size_DMT * angle_DMT.sin()], dim=1)

    def _input(self) -> Tensor:
        """Returns B̄ = (exp(A·Δ) - 1) / A, (D, N), without cancellation where A·Δ is small."""
        A_re_DM, dt_D1 = -self.A_log.exp(), self.log_dt.exp()[:, None]
        size_DM = torch.exp(A_re_DM * dt_D1)
        # exp(a) - 1 = tanh(a/2)·(exp(a) + 1). Unlike expm1, this can be exported to ONNX.
        grown_DM = torch.tanh(A_re_DM * dt_D1 / 2) * (size_DM + 1)
        if self.A_imag is None:
            return grown_DM / A_re_DM
        angle_DM = self.A_imag * dt_D1
        # exp(a + ib) - 1 = (exp(a) - 1)·cos b - (1 - cos b) + i·exp(a)·sin b, and 1 - cos b = 2·sin²(b/2).
        re_DM = grown_DM * angle_DM.cos() - 2 * (angle_DM / 2).sin().square()
        im_DM = size_DM * angle_DM.sin()
        inverse_DN = torch.cat([A_re_DM, -self.A_imag], dim=1) / (A_re_DM**2 + self.A_imag**2).repeat(1, 2)
        return self._times(torch.cat([re_DM, im_DM], dim=1), inverse_DN)

    def _kernel(self, powers_DNT: Tensor) -> Tensor:
        """Returns K, (D, T), from the powers 0 … T of `_powers`. The last power is not used."""
        weights_DN = self._weights(self._times(self.C, self._input()))
        return (weights_DN[:, None] @ powers_DNT[..., :-1]).squeeze(1)
