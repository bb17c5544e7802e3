"""The encoder for whole utterances, as sherpa-onnx's OfflineRecognizer runs it. Any encoder fits, causal or not.

Shapes: N utterances, T feature frames, F mels, S output frames, J joiner dim.
"""

import torch
from torch import Tensor, nn

from ssm_asr import units
from ssm_asr.exporting.parts import Part, random_features
from ssm_asr.transducer.model import Transducer


class OfflineEncoder(nn.Module):
    """The front end and the encoder without chunks, and the joiner's projection of their output."""

    def __init__(self, model: Transducer) -> None:
        super().__init__()
        self.model = model
        # The graph is traced with several frames, for which attention takes another branch than for a single frame.
        # Therefore even the stack with the lowest frame rate must get two frames.
        frames = max(model.config.encoder.downsampling) + 1
        self.least_frames = next(n for n in range(100) if units.embed_frames(n) >= frames)

    def forward(self, x_NTF: Tensor, lens_N: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the projected output (N, S, J) and the lengths (N,) in output frames.

        Args:
            x_NTF: features, padded to the longest utterance.
            lens_N: lengths in feature frames.
        """
        silence_NTF = torch.full_like(x_NTF[:, :1], units.LOG_MEL_SILENCE).expand(-1, self.least_frames, -1)
        frames = lens_N.max().clamp(min=self.least_frames)
        x_NTF = torch.cat([x_NTF, silence_NTF], dim=1)[:, :frames]
        out_NSD, lens_N = self.model.encode(x_NTF, lens_N)
        return self.model.joiner.encoder_proj(out_NSD), lens_N.clamp(min=0)


def offline_encoder(model: Transducer) -> Part:
    """Makes the part that holds the encoder for whole utterances."""
    module, factor = OfflineEncoder(model).eval(), model.config.encoder.chunk_multiple
    # The graph is traced with a length for which every stack must fill up its last frame. Tracing records no branches.
    # Therefore the graph does so for all lengths, if need be with no frames. Inputs for other N have other lengths.
    traced_frames = 2 * (100 // factor * factor + 1) + 7

    def draw(N: int) -> tuple[Tensor, ...]:
        frames = traced_frames + 30 * (N - 2)
        return random_features(N, frames), torch.tensor([frames - 17 * n for n in range(N)])

    return Part(
        "encoder",
        module,
        draw,
        {"x": {0: "N", 1: "T"}, "x_lens": {0: "N"}},
        {"encoder_out": {0: "N", 1: "S"}, "encoder_out_lens": {0: "N"}},
        {"model_type": "zipformer2", "version": 1},
    )
