"""The convolution module of the Zipformer, for whole utterances, chunk-causal and streaming.

Source: Yao et al., "Zipformer" (arXiv 2310.11230), section 3.1.

Shapes: B batch, T frames, D channels, E = 2D, C frames of a chunk, M = kernel // 2 cached frames.
"""

import torch
from torch import Tensor, nn

from ssm_asr.encoder.modules import Linear, SwooshR, scaled_linear
from ssm_asr.encoder.regularize import Balancer, Schedule, Whiten
from ssm_asr.ops.depthwise import ChunkCausalWeights, chunk_causal_conv, chunk_causal_step
from ssm_asr.ops.gates import gated
from ssm_asr.ops.numbers import Count


class ChunkCausalConv(nn.Module):
    """A depthwise convolution that looks ahead only to the end of its chunk.

    It is the sum of two convolutions: a causal one with the left half of the kernel, and one with the whole kernel that
    sees only its own chunk. Near the edges of a chunk the output of the second is scaled by 1 + learned terms.

    Args:
        channels: D.
        kernel: taps of the whole kernel.

    Raises:
        ValueError: if `kernel` is even.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"convolution kernel of {kernel} frames: give an odd number")
        self.kernel, self.cached = kernel, kernel // 2
        self.causal_conv = nn.Conv1d(channels, channels, self.cached + 1, groups=channels)
        self.chunkwise_conv = nn.Conv1d(channels, channels, kernel, padding=self.cached, groups=channels)
        self.chunkwise_conv_scale = nn.Parameter(torch.zeros(2, channels, kernel))

    def forward(self, x_BDT: Tensor, chunk: Count) -> Tensor:
        """Convolves whole sequences (B, D, T) -> (B, D, T); `chunk` is in frames, and -1 is the whole sequence."""
        return chunk_causal_conv(x_BDT, chunk, self._weights())

    def stream(self, x_BDC: Tensor, cache_BDM: Tensor) -> tuple[Tensor, Tensor]:
        """Convolves one chunk; returns the output (B, D, C) and the new cache.

        Args:
            x_BDC: the chunk.
            cache_BDM: the last M input frames before the chunk.
        """
        return chunk_causal_step(x_BDC, cache_BDM, self._weights())

    def _weights(self) -> ChunkCausalWeights:
        return ChunkCausalWeights(self.chunkwise_conv_scale, self.causal_conv, self.chunkwise_conv)


class ConvolutionModule(nn.Module):
    """Applies a linear layer to 2D channels, a GLU, a depthwise convolution, SwooshR and a second linear layer.

    Args:
        channels: D.
        kernel: taps of the depthwise convolution, an odd number.
        causal: whether the convolution is a `ChunkCausalConv`, as streaming needs, or sees both sides.
    """

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

    def forward(self, x_BTD: Tensor, padding_mask_BT: Tensor | None, chunk: Count = -1) -> Tensor:
        """Maps whole sequences (B, T, D) -> (B, T, D).

        Args:
            x_BTD: the frames.
            padding_mask_BT: True at padding, which is set to 0 before the convolution.
            chunk: in frames, -1 for the whole sequence; only a causal module uses it.
        """
        gated_BDT = self._gated(x_BTD, padding_mask_BT)
        if self.causal:
            return self._finish(self.depthwise_conv(gated_BDT, chunk))
        return self._finish(self.depthwise_conv(gated_BDT))

    def stream(self, x_BTD: Tensor, cache_BDM: Tensor) -> tuple[Tensor, Tensor]:
        """Maps one chunk, given the last M gated frames before it; returns the output (B, T, D) and the new cache."""
        assert isinstance(self.depthwise_conv, ChunkCausalConv), "only a causal module streams"
        out_BDT, cache_BDM = self.depthwise_conv.stream(self._gated(x_BTD), cache_BDM)
        return self._finish(out_BDT), cache_BDM

    def _gated(self, x_BTD: Tensor, padding_mask_BT: Tensor | None = None) -> Tensor:
        both_BTE = self.in_proj(x_BTD)
        by = self.balance_gate.settings(both_BTE.chunk(2, dim=-1)[1])
        return gated(both_BTE, "sigmoid", padding_mask_BT, by).transpose(1, 2)

    def _finish(self, x_BDT: Tensor) -> Tensor:
        x_BTD = self.whiten(self.balance_conv(x_BDT).transpose(1, 2))
        return self.out_proj(self.activation(x_BTD))
