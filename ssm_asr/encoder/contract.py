"""Every encoder and its configuration must provide what is written here; registry.py lists the encoders that there are.

The front end (subsampling.py) stands before every encoder and makes its frames, at 50 Hz. An encoder halves their rate
once more, so that output comes at 25 Hz. Chunks and left contexts are counted in frames at 50 Hz, of 20 ms each.

Shapes: B batch, T frames at 50 Hz, E width of the front end's frames (`embed_dim`), S = (T + 1) // 2 output frames,
D output channels (`out_channels`).
"""

import math
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssm_asr import units
from ssm_asr.fields import Section, setting
from ssm_asr.ops.numbers import Count

# The largest sizes that a configuration may ask for: far above any model, and far below what hangs a machine.
MOST_LAYERS = 1000
MOST_CHANNELS = 65536
MOST_HEADS = 1024
MOST_TAPS = 4096
MOST_CHUNK_FRAMES = 100_000
MOST_LEFT_CONTEXT_FRAMES = 1_000_000


@dataclass
class EncoderConfig(Section, ABC, name="model.encoder"):
    """All encoders have these settings, and each has its own beside them.

    A subclass gives `kind` its name as the default, which is how a configuration file chooses it. It provides the
    abstract properties as properties or as fields of the same names, as it sees fit.
    """

    kind: str = ""
    # The front end's three convolutions have so many channels.
    embed_channels: tuple[int, int, int] = setting((8, 32, 128), least=1, most=MOST_CHANNELS)
    # Each training batch draws one chunk and one left context from these, in frames of 20 ms. -1 stands for all frames
    # there are. With a left context of 0, attention sees its own chunk only, and no keys and values are kept.
    chunk_frames: tuple[int, ...] = setting((16, 32, 64, -1), least=1, most=MOST_CHUNK_FRAMES, unlimited=-1)
    left_context_frames: tuple[int, ...] = setting(
        (64, 128, 256, -1), least=0, most=MOST_LEFT_CONTEXT_FRAMES, unlimited=-1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.kind == type(self).kind, "kind", f"{type(self).kind}, the kind of {type(self).__name__}")
        multiple = self.chunk_multiple if self.causal else 1
        fits = [chunk == -1 or chunk % multiple == 0 for chunk in self.chunk_frames]
        self.require(fits != [] and all(fits), "chunk_frames", f"multiples of {multiple}, or -1 for all")
        self.require(len(self.left_context_frames) > 0, "left_context_frames", "0 or more, or -1 for all")

    @property
    @abstractmethod
    def causal(self) -> bool:
        """Tells whether the encoder can stream. If not, it sees whole utterances, and `stream` is never called."""

    @property
    @abstractmethod
    def downsampling(self) -> tuple[int, ...]:
        """Gives the factors by which parts of the encoder run at lower rates than 50 Hz."""

    @property
    @abstractmethod
    def embed_dim(self) -> int:
        """Gives the width E of the frames that the front end makes for this encoder."""

    @property
    def chunk_multiple(self) -> int:
        """Gives the least chunk in frames of 20 ms, which has whole frames at every rate. Others are its multiples."""
        return math.lcm(units.OUTPUT_SUBSAMPLING, *self.downsampling)

    def draw_context(self) -> tuple[int, int]:
        """Draws a chunk and a left context for one training batch from Python's `random`, in frames of 20 ms."""
        if not self.causal:
            return -1, -1
        return random.choice(self.chunk_frames), random.choice(self.left_context_frames)


class Encoder(nn.Module, ABC):
    """Turns the front end's frames at 50 Hz into output at 25 Hz, whole utterances at once or chunk by chunk.

    What must hold: `stream`, called on one chunk after the other from the state of `init_state`, gives the output of
    `forward` on the whole utterance with this chunk and left context. The output of an utterance does not depend on
    what else is in the batch. Nothing that a stream remembers is kept in the module.

    Attributes:
        config: The configuration that the encoder was made of; it is the only argument of the constructor.
        out_channels: The width D of the output.
    """

    config: EncoderConfig
    out_channels: int

    @abstractmethod
    def forward(self, x_BTD: Tensor, lens_B: Tensor, chunk: Count, left_context: Count) -> tuple[Tensor, Tensor]:
        """Encodes whole utterances, each frame of which sees as much as it would in streaming.

        Args:
            x_BTD: The front end's frames at 50 Hz, (B, T, E).
            lens_B: How many frames of each utterance are not padding, int64.
            chunk: Frames at 50 Hz of a chunk; -1 makes one chunk of the whole utterance.
            left_context: Frames at 50 Hz before a chunk that it sees; -1 stands for all of them. Either both
                are integers, or both are numbers on the device, from `attention.context_on_device`.

        Returns:
            The output (B, S, D), and how many of its frames are not padding, (lens_B + 1) // 2.
        """

    @abstractmethod
    def init_state(self, batch_size: int, left_context: int, device: torch.device | None = None) -> Any:
        """Makes the state at the start of `batch_size` streams.

        A state is a tensor or a (named) tuple of states. All tensors are zero, and their first dimension counts the
        streams. The names of the fields (without their shapes) are those of tables that show what a state holds.

        Args:
            left_context: Frames at 50 Hz, a multiple of the chunk; 0 keeps none.
        """

    @abstractmethod
    def stream(self, x_BTD: Tensor, state: Any, processed_B: Tensor | None) -> tuple[Tensor, Any]:
        """Encodes the next chunk of each stream.

        Args:
            x_BTD: The front end's frames of one chunk, (B, T, E); T is a multiple of `config.chunk_multiple`.
            state: What `init_state` or the last call gave; it is not changed.
            processed_B: How many frames at 50 Hz each stream has had before this chunk, int64. It may be None where
                the left context is 0.

        Returns:
            The output (B, T / 2, D) and the new state.
        """
