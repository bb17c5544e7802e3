"""The convolutional front end, which turns 100 Hz features into 50 Hz encoder frames.

Source: Yao et al., "Zipformer" (arXiv 2310.11230), section 3.1.

Shapes: B batch, T feature frames, S = (T - 7) // 2 encoder frames, F = 80 mels, C channels, W = 19 remaining
frequencies, D channels of the output. Where a chunk is spoken of, C is its length in encoder frames.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from ssm_asr import units
from ssm_asr.encoder.modules import BiasNorm, Linear, SwooshL, SwooshR, scale_parameters_
from ssm_asr.encoder.regularize import Balancer, Dropout, ScaleGradient, Schedule, Scheduled, Value, Whiten
from ssm_asr.ops.depthwise import depthwise_image, first_conv
from ssm_asr.ops.linear import conv2d, linear_of_image, pointwise
from ssm_asr.ops.numbers import known_zero

# The 7 × 7 convolution of ConvNeXt sees 3 frames at 50 Hz on either side of each frame.
LOOK_AHEAD = 3
# A chunk of C encoder frames is computed from 2C + 13 feature frames; the next chunk starts 2C feature frames later.
CHUNK_OVERLAP = 13


class ConvNeXt(Scheduled):
    """Applies a 7 × 7 depthwise convolution and an inverted bottleneck, and adds the result to its input.

    Args:
        channels: C.
        hidden_ratio: channels of the bottleneck, as a multiple of C.
    """

    def __init__(self, channels: int, hidden_ratio: int = 3) -> None:
        super().__init__()
        self.depthwise_conv = nn.Conv2d(channels, channels, 7, groups=channels, padding=3)
        self.pointwise_conv1 = nn.Conv2d(channels, channels * hidden_ratio, 1)
        self.balance_hidden = Balancer(positive=(0.3, 1.0), abs=(0.75, 5.0), channel_dim=1)
        self.activation = SwooshL()
        self.pointwise_conv2 = nn.Conv2d(channels * hidden_ratio, channels, 1)
        scale_parameters_(self.pointwise_conv2, 0.01)
        self.balance_out = Balancer(positive=(0.4, 0.6), abs=(1.0, 6.0), channel_dim=1)
        self.whiten_out = Whiten(5.0)
        self.skip_rate = Schedule((0, 0.2), (20000, 0.015))

    def forward(self, x_BCTW: Tensor) -> Tensor:
        """Maps whole images (B, C, T, W) -> (B, C, T, W), with zeros before the first frame and after the last."""
        return self._finish(x_BCTW, depthwise_image(self.depthwise_conv, x_BCTW))

    def stream(self, x_BCTW: Tensor, cache_BCTW: Tensor) -> tuple[Tensor, Tensor]:
        """Maps a chunk of T frames; returns the output (B, C, T, W) and the new cache (B, C, 3, W).

        Args:
            x_BCTW: the chunk and the 3 frames after it, T + 3 frames.
            cache_BCTW: the 3 frames before the chunk.
        """
        frames = x_BCTW.shape[2] - LOOK_AHEAD
        padded = torch.cat([cache_BCTW, x_BCTW], dim=2)
        conv = self.depthwise_conv
        mixed = nn.functional.conv2d(padded, conv.weight, conv.bias, padding=(0, 3), groups=conv.groups)
        return self._finish(x_BCTW[:, :, :frames], mixed), padded[:, :, frames : frames + LOOK_AHEAD]

    def _finish(self, x_BCTW: Tensor, mixed_BCTW: Tensor) -> Tensor:
        hidden = self.activation(pointwise(self.pointwise_conv1, mixed_BCTW), self.balance_hidden)
        out_BCTW = pointwise(self.pointwise_conv2, hidden)
        skip_rate = self.now(self.skip_rate) if self.training else 0.0
        if known_zero(skip_rate):
            out_BCTW = x_BCTW + out_BCTW
        else:
            keep_B = torch.rand(x_BCTW.shape[0], 1, 1, 1, device=x_BCTW.device) > skip_rate
            out_BCTW = torch.addcmul(x_BCTW, out_BCTW, keep_B.to(out_BCTW.dtype))
        out_BCTW = self.balance_out(out_BCTW)
        if not self.training:
            return out_BCTW
        return self.whiten_out(out_BCTW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvSubsampling(nn.Module):
    """Applies three 3 × 3 convolutions, ConvNeXt and a projection to the encoder's width.

    Published checkpoints call it `encoder_embed`.

    Args:
        out_channels: D.
        channels: output channels of the three convolutions; all published models have (8, 32, 128).
        dropout: rate of dropout after the projection.
    """

    def __init__(self, out_channels: int, channels: tuple[int, int, int], dropout: Value) -> None:
        super().__init__()
        c1, c2, c3 = channels
        self.conv = nn.Sequential(
            nn.Conv2d(1, c1, 3, padding=(0, 1)),
            ScaleGradient(0.2),
            Balancer(abs=(0.2, 1.0), channel_dim=1),
            SwooshR(),
            nn.Conv2d(c1, c2, 3, stride=2),
            Balancer(abs=(0.2, 4.0), channel_dim=1),
            SwooshR(),
            nn.Conv2d(c2, c3, 3, stride=(1, 2)),
            Balancer(abs=(0.2, 4.0), channel_dim=1),
            SwooshR(),
        )
        self.convnext = ConvNeXt(c3)
        self.channels, self.frequencies = c3, ((units.NUM_MELS - 3) // 2 + 1 - 3) // 2 + 1
        self.out = Linear(c3 * self.frequencies, out_channels)
        self.out_whiten = Whiten(Schedule((0, 4.0), (20000, 8.0)), grad_scale=0.02)
        self.out_norm = BiasNorm(out_channels)
        self.dropout = Dropout(dropout, shared_dim=1)

    def forward(self, features_BTF: Tensor, lens_B: Tensor) -> tuple[Tensor, Tensor]:
        """Maps whole sequences (B, T, F) -> (B, S, D); returns them with their lengths (B,) in encoder frames.

        Args:
            features_BTF: log-mel features.
            lens_B: lengths in feature frames.
        """
        # Convolutions are faster in channels-last memory. PyTorch recognises it by the strides, which for one channel
        # must be made so by this permutation.
        x = self._convolve(features_BTF[..., None].permute(0, 3, 1, 2))
        return self._finish(self.convnext(x)), units.embed_frames(lens_B)

    def init_state(self, batch_size: int, device: torch.device | None = None) -> Tensor:
        """Returns the state at the start of streams, zeros (B, C, 3, W): ConvNeXt's input before the first chunk."""
        return torch.zeros(batch_size, self.channels, LOOK_AHEAD, self.frequencies, device=device)

    def stream(self, features_BTF: Tensor, cache_BCTW: Tensor) -> tuple[Tensor, Tensor]:
        """Maps one chunk of 2C + 13 feature frames to C encoder frames (B, C, D); returns them with the new cache."""
        x, cache_BCTW = self.convnext.stream(self._convolve(features_BTF[:, None]), cache_BCTW)
        return self._finish(x), cache_BCTW

    def _convolve(self, x_B1TF: Tensor) -> Tensor:
        """Applies `self.conv`, but hands its balancers to the activations, so that one GPU kernel computes both."""
        conv1, scale, balance1, swoosh1, *rest = cast(list[Any], list(self.conv))
        x = swoosh1(scale(first_conv(conv1, x_B1TF)), balance1)
        for conv, balance, swoosh in (rest[:3], rest[3:]):
            x = swoosh(conv2d(conv, x), balance)
        return x

    def _finish(self, x_BCTW: Tensor) -> Tensor:
        x_BTD = linear_of_image(x_BCTW, self.out.weight, self.out.bias)
        return self.dropout(self.out_norm(self.out_whiten(x_BTD)))
