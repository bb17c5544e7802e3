"""The graphs of an export, each with what a runtime must be told about it.

Shapes: N streams or hypotheses, T = 2C + 13 feature frames of a chunk, F mels, S = C/2 output frames, J joiner dim,
V vocabulary, K context size, D floats of a stream's packed state.
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
    """One graph: a module, its inputs and outputs in the order in which runtimes bind them, and its metadata.

    Attributes:
        name: of the file, without what follows the first dot.
        module: in evaluation mode.
        draw: random inputs for so many streams, states at zero.
        inputs, outputs: names, and which of their axes are of any size.
        metadata: what the runtime reads from the file.
        states: how many of the last inputs are states, which come back as the last outputs.
    """

    name: str
    module: nn.Module
    draw: Callable[[int], tuple[Tensor, ...]]
    inputs: Axes
    outputs: Axes
    metadata: Metadata = field(default_factory=dict)
    states: int = 0


def random_features(streams: int, frames: int) -> Tensor:
    """(N, T, F) in the range of log-mels of speech."""
    return torch.randn(streams, frames, units.NUM_MELS) * 4 - 8


def chunk_facts(chunk: int) -> Metadata:
    """Feature frames that a chunk takes (T), and after how many the next one starts; `chunk` in frames of 20 ms."""
    return {"T": 2 * chunk + CHUNK_OVERLAP, "decode_chunk_len": 2 * chunk}


class PackedEncoder(nn.Module):
    """A streaming step with all states in one vector, and the joiner's projection of its output."""

    def __init__(self, model: Transducer, left_context: int) -> None:
        super().__init__()
        self.model, self.state = model, PackedState(model, left_context)

    def forward(self, x_NTF: Tensor, state0_1ND: Tensor, state1_1N1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output (N, S, J) and the new states; the second state is the carrier's, and stays as it is."""
        out_NSD, state = self.model.stream(x_NTF, self.state.unpack(state0_1ND[0]))
        return self.model.joiner.encoder_proj(out_NSD), self.state.pack(state)[None], state1_1N1 * 1.0


class Decoder(nn.Module):
    """The predictor for hypotheses given by their last tokens, and the joiner's projection of its output."""

    def __init__(self, model: Transducer) -> None:
        super().__init__()
        self.model = model

    def forward(self, y_NK: Tensor) -> Tensor:
        """(N, J); tokens of -1 stand for nothing before the start."""
        return self.model.joiner.decoder_proj(self.model.decoder(y_NK, pad=False)[:, 0])


class Joiner(nn.Module):
    """The joiner without its two projections."""

    def __init__(self, model: Transducer) -> None:
        super().__init__()
        self.model = model

    def forward(self, encoder_NJ: Tensor, decoder_NJ: Tensor) -> Tensor:
        """Logits (N, V)."""
        return self.model.joiner(encoder_NJ, decoder_NJ, project_input=False)


def packed_encoder(model: Transducer, chunk: int, left_context: int) -> Part:
    """The encoder for runtimes that know recurrent networks of two states (`lstm` of sherpa-onnx): any encoder.

    Args:
        chunk, left_context: in frames of 20 ms.
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
    """The predictor."""
    context = model.config.context_size

    def draw(N: int) -> tuple[Tensor, ...]:
        return (torch.randint(-1, model.vocab_size, (N, context)),)

    metadata: Metadata = {"vocab_size": model.vocab_size, "context_size": context}
    return Part("decoder", Decoder(model).eval(), draw, {"y": {0: "N"}}, {"decoder_out": {0: "N"}}, metadata)


def joiner(model: Transducer) -> Part:
    """The joiner."""
    dim = model.config.joiner_dim

    def draw(N: int) -> tuple[Tensor, ...]:
        return torch.randn(N, dim), torch.randn(N, dim)

    inputs: Axes = {"encoder_out": {0: "N"}, "decoder_out": {0: "N"}}
    return Part("joiner", Joiner(model).eval(), draw, inputs, {"logit": {0: "N"}}, {"joiner_dim": dim})
