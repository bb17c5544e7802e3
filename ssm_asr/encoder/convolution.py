"""The convolution module of the Zipformer, whole-utterance, chunk-causal and streaming.

Source: Yao et al. (arXiv 2310.11230), section 3.1.

Shapes: B batch, T time, D channels, E = 2D, C chunk, N chunks, K kernel size, M = K // 2 cached frames.
"""

import torch
from torch import Tensor, nn

from ssm_asr.encoder.modules import Linear, SwooshR, scaled_linear
from ssm_asr.encoder.regularize import Balancer, Schedule, Whiten
from ssm_asr.ops import dispatch
from ssm_asr.ops.depthwise import depthwise


class ChunkCausalConv(nn.Module):
    """A depthwise convolution that looks ahead only to the end of its chunk.

    The sum of a causal convolution with the left half of the kernel, and one with the whole kernel inside the chunk,
    whose output near the chunk's edges is scaled by 1 + learned terms.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"convolution kernel of {kernel} frames: give an odd number")
        self.kernel, self.cached = kernel, kernel // 2
        self.causal_conv = nn.Conv1d(channels, channels, self.cached + 1, groups=channels)
        self.chunkwise_conv = nn.Conv1d(channels, channels, kernel, padding=self.cached, groups=channels)
        self.chunkwise_conv_scale = nn.Parameter(torch.zeros(2, channels, kernel))

    def forward(self, x_BDT: Tensor, chunk: int) -> Tensor:
        """(B, D, T) -> (B, D, T); chunk is in frames, -1 for the whole sequence."""
        B, D, T = x_BDT.shape
        chunk = T if chunk < 0 else chunk
        if dispatch.usable(x_BDT):
            return self._by_kernel(x_BDT.transpose(1, 2), chunk).transpose(1, 2)
        causal_BDT = self.causal_conv(nn.functional.pad(x_BDT, (self.cached, 0)))
        n = -(-T // chunk)
        chunks = nn.functional.pad(x_BDT, (0, n * chunk - T)).reshape(B, D, n, chunk)
        inside = self._inside(chunks.transpose(1, 2).reshape(B * n, D, chunk))
        inside_BDT = inside.reshape(B, n, D, chunk).transpose(1, 2).reshape(B, D, n * chunk)[..., :T]
        return causal_BDT + inside_BDT

    def stream(self, x_BDC: Tensor, cache_BDM: Tensor) -> tuple[Tensor, Tensor]:
        """One chunk, with the last M frames before it: output (B, D, C) and the new cache."""
        x_padded = torch.cat([cache_BDM, x_BDC], dim=2)
        out_BDC = depthwise(self.causal_conv, x_padded) + self._inside(x_BDC)
        return out_BDC, x_padded[..., x_padded.shape[2] - self.cached :]

    def _by_kernel(self, x_BTD: Tensor, chunk: int) -> Tensor:
        from ssm_asr.ops.depthwise_kernel import chunk_causal_conv  # only where Triton is installed

        causal, inside = self.causal_conv, self.chunkwise_conv
        assert causal.bias is not None and inside.bias is not None
        weights = (self.chunkwise_conv_scale, causal.weight, causal.bias, inside.weight, inside.bias)
        return chunk_causal_conv(x_BTD, chunk, *weights)

    def _inside(self, x_NDC: Tensor) -> Tensor:
        return depthwise(self.chunkwise_conv, x_NDC) * (1.0 + self._edge_scale(x_NDC.shape[2])).to(x_NDC.dtype)

    def _edge_scale(self, chunk: int) -> Tensor:
        left_DK, right_DK = self.chunkwise_conv_scale
        if chunk < self.kernel:
            return left_DK[:, :chunk] + right_DK[:, self.kernel - chunk :]
        rest = chunk - self.kernel
        return nn.functional.pad(left_DK, (0, rest)) + nn.functional.pad(right_DK, (rest, 0))


class ConvolutionModule(nn.Module):
    """Linear to 2D, GLU, depthwise convolution, SwooshR, Linear."""

    def __init__(self, channels: int, kernel: int, causal: bool) -> None:
        super().__init__()
        self.causal, self.cached = causal, kernel // 2
        self.in_proj = Linear(channels, 2 * channels)
        self.balance_gate = Balancer(
            positive=(Schedule((0, 0.05), (8000, 0.025)), 1.0), abs=(1.5, Schedule((0, 5.0), (8000, 10.0)))
        )
        self.depthwise_conv = (
            ChunkCausalConv(channels, kernel)
            if causal
            else nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        )
        self.balance_conv = Balancer(
            positive=(Schedule((0, 0.1), (8000, 0.05)), 1.0),
            abs=(Schedule((0, 0.2), (20000, 0.5)), 10.0),
            channel_dim=1,
        )
        self.whiten = Whiten(Schedule((0, 7.5), (20000, 15.0)))
        self.activation = SwooshR()
        self.out_proj = scaled_linear(channels, channels, 0.05)

    def forward(self, x_BTD: Tensor, padding_mask_BT: Tensor | None, chunk: int = -1) -> Tensor:
        """(B, T, D) -> (B, T, D). Padded frames (True) are zeroed before the convolution."""
        gated_BDT = self._gated(x_BTD, padding_mask_BT)
        if self.causal:
            return self._finish(self.depthwise_conv(gated_BDT, chunk))
        return self._finish(self.depthwise_conv(gated_BDT))

    def stream(self, x_BTD: Tensor, cache_BDM: Tensor) -> tuple[Tensor, Tensor]:
        """One chunk and the cache of the last M gated frames -> output and new cache."""
        assert isinstance(self.depthwise_conv, ChunkCausalConv), "only a causal module streams"
        out_BDT, cache_BDM = self.depthwise_conv.stream(self._gated(x_BTD), cache_BDM)
        return self._finish(out_BDT), cache_BDM

    def _gated(self, x_BTD: Tensor, padding_mask_BT: Tensor | None = None) -> Tensor:
        both_BTE = self.in_proj(x_BTD)
        x_BTD, gate_BTD = both_BTE.chunk(2, dim=-1)
        settings = self.balance_gate.settings(gate_BTD)
        if settings is not None:
            from ssm_asr.ops.gates_kernel import gated  # only where Triton is installed

            return gated(both_BTE, "sigmoid", padding_mask_BT, settings, self.balance_gate.grad_scale).transpose(1, 2)
        gated_BDT = (x_BTD * self.balance_gate(gate_BTD).sigmoid()).transpose(1, 2)
        return gated_BDT if padding_mask_BT is None else gated_BDT.masked_fill(padding_mask_BT[:, None], 0.0)

    def _finish(self, x_BDT: Tensor) -> Tensor:
        x_BTD = self.whiten(self.balance_conv(x_BDT).transpose(1, 2))
        return self.out_proj(self.activation(x_BTD))
