"""The parts of an export: graphs, each with what a runtime must be told about it.

Shapes: N streams or hypotheses, C frames of 20 ms of a chunk, T = 2C + 13 feature frames of a chunk, F mels, S = C/2
output frames, J joiner channels, V vocabulary, K context size, D floats of a stream's packed state.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ssm_asr import units
from ssm_asr.encoder.subsampling import CHUNK_OVERLAP
from ssm_asr.exporting.state import PackedState
from ssm_asr.transducer.model import Transducer

Axes = dict[str, dict[int, str]]
Metadata = dict[str, str | int]


@dataclass(frozen=True)
class Part:
    """A graph to export: a module, its inputs and outputs in the order in which runtimes bind them, and its metadata.

    Attributes:
        name: name of the file up to its first dot.
        module: the module, in evaluation mode.
        draw: makes the inputs for N streams, given N: random features or tokens, and states of zeros.
        inputs: name of each input -> its axes that may have any size, with their names.
        outputs: name of each output -> its axes that may have any size, with their names.
        metadata: what the runtime reads from the file.
        states: number of states; they are the last inputs, and the new states are the last outputs.
    """

    name: str
    module: nn.Module
    draw: Callable[[int], tuple[Tensor, ...]]
    inputs: Axes
    outputs: Axes
    metadata: Metadata = field(default_factory=dict)
    states: int = 0


def random_features(streams: int, frames: int) -> Tensor:
    """Draws features (N, T, F) in the range of log-mels of speech."""
    return torch.randn(streams, frames, units.NUM_MELS) * 4 - 8


def chunk_facts(chunk: int) -> Metadata:
    """Returns metadata about chunks: the feature frames of a chunk (T), and after how many the next chunk starts.

    Args:
        chunk: in frames of 20 ms.
    """
    return {"T": 2 * chunk + CHUNK_OVERLAP, "decode_chunk_len": 2 * chunk}


class PackedEncoder(nn.Module):
    """A streaming step of the encoder with all states in one vector, and the joiner's projection of its output."""

    def __init__(self, model: Transducer, left_context: int) -> None:
        super().__init__()
        self.model, self.state = model, PackedState(model, left_context)

    def forward(self, x_NTF: Tensor, state0_1ND: Tensor, state1_1N1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encodes one chunk; returns the projected output (N, S, J) and the two new states.

        Args:
            x_NTF: features of the chunk.
            state0_1ND: the packed state.
            state1_1N1: a second state, which the runtime insists on; it passes through unchanged.
        """
        out_NSD, state = self.model.stream(x_NTF, self.state.unpack(state0_1ND[0]))
        return self.model.joiner.encoder_proj(out_NSD), self.state.pack(state)[None], state1_1N1 * 1.0


class Decoder(nn.Module):
    """The predictor for the last K tokens of hypotheses, and the joiner's projection of its output."""

    def __init__(self, model: Transducer) -> None:
        super().__init__()
        self.model = model

    def forward(self, y_NK: Tensor) -> Tensor:
        """Maps tokens (N, K) -> (N, J); a token of -1 means that the hypothesis has no token there yet."""
        return self.model.joiner.decoder_proj(self.model.decoder(y_NK, pad=False)[:, 0])


class Joiner(nn.Module):
    """The joiner without its two input projections."""

    def __init__(self, model: Transducer) -> None:
        super().__init__()
        self.model = model

    def forward(self, encoder_NJ: Tensor, decoder_NJ: Tensor) -> Tensor:
        """Returns the logits (N, V) of projected outputs of encoder and predictor."""
        return self.model.joiner(encoder_NJ, decoder_NJ, project_input=False)


def packed_encoder(model: Transducer, chunk: int, left_context: int) -> Part:
    """Makes the part of a streaming encoder for runtimes of LSTMs, which carry two states (`lstm` of sherpa-onnx).

    Any encoder fits, because all its states are packed into the first of the two.

    Args:
        model: the transducer.
        chunk: in frames of 20 ms.
        left_context: in frames of 20 ms.
    """
    module = PackedEncoder(model, left_context).eval()
    size, facts = module.state.size, chunk_facts(chunk)

    def draw(N: int) -> tuple[Tensor, ...]:
        return random_features(N, int(facts["T"])), torch.zeros(1, N, size), torch.zeros(1, N, 1)

    inputs: Axes = {"x": {0: "N"}, "state0": {1: "N"}, "state1": {1: "N"}}
    outputs: Axes = {"encoder_out": {0: "N"}, "new_state0": {1: "N"}, "new_state1": {1: "N"}}
    kind: Metadata = {"model_type": "lstm", "version": 1}
    states: Metadata = {"num_encoder_layers": 1, "d_model": size, "rnn_hidden_size": 1}
    return Part("encoder", module, draw, inputs, outputs, kind | facts | states, states=2)


def decoder(model: Transducer) -> Part:
    """Makes the part of the predictor."""
    context = model.config.context_size

    def draw(N: int) -> tuple[Tensor, ...]:
        return (torch.randint(-1, model.vocab_size, (N, context)),)

    metadata: Metadata = {"vocab_size": model.vocab_size, "context_size": context}
    return Part("decoder", Decoder(model).eval(), draw, {"y": {0: "N"}}, {"decoder_out": {0: "N"}}, metadata)


def joiner(model: Transducer) -> Part:
    """Makes the part of the joiner."""
    dim = model.config.joiner_dim

    def draw(N: int) -> tuple[Tensor, ...]:
        return torch.randn(N, dim), torch.randn(N, dim)

    inputs: Axes = {"encoder_out": {0: "N"}, "decoder_out": {0: "N"}}
    return Part("joiner", Joiner(model).eval(), draw, inputs, {"logit": {0: "N"}}, {"joiner_dim": dim})
