"""A streaming CTC model for sherpa-onnx, for any encoder, behind the interface of its `zipformer2_ctc`.

For this interface sherpa-onnx carries the states of a Zipformer, whose sizes it reads from the metadata. The metadata
here describe one layer whose attention values are as large as half the packed state, so that its two value states hold
everything. The other states are as small as possible and pass through unchanged. (The interface of sherpa-onnx for CTC
models of NeMo also takes states of any size, but it computes NeMo's features.)

Shapes: N streams, T feature frames of a chunk, F mels, S output frames, V vocabulary, D floats of a packed state,
H = D / 2 rounded up.
"""

import torch
from torch import Tensor, nn

from ssm_asr.encoder.subsampling import LOOK_AHEAD
from ssm_asr.exporting.parts import Axes, Metadata, Part, chunk_facts, random_features
from ssm_asr.exporting.state import PackedState
from ssm_asr.exporting.zipformer2 import EMBED_CHANNELS, LAYER_STATES, batch_axis
from ssm_asr.transducer.model import Transducer

# Channels and convolution kernel (in frames) of the layer that the metadata describe.
CHANNELS, KERNEL = 4, 3


class CtcEncoder(nn.Module):
    """A streaming step of the encoder, and the CTC head."""

    def __init__(self, model: Transducer, left_context: int) -> None:
        super().__init__()
        self.model, self.state = model, PackedState(model, left_context)
        self.half_size = -(-self.state.size // 2)

    def forward(self, x_NTF: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """Encodes one chunk; returns the log-probabilities (N, S, V) and the new states.

        Args:
            x_NTF: features of the chunk.
            states: as `start` makes them; the two value states (1, N, H) hold the packed state.
        """
        key, nonlin, val1_1NH, val2_1NH, *others = states
        packed_ND = torch.cat([val1_1NH[0], val2_1NH[0, :, : self.state.size - self.half_size]], dim=1)
        out_NSD, state = self.model.stream(x_NTF, self.state.unpack(packed_ND))
        first_NH, second = self.state.pack(state).split([self.half_size, self.state.size - self.half_size], dim=1)
        second_NH = nn.functional.pad(second, (0, 2 * self.half_size - self.state.size))
        # Adding 0 makes these outputs tensors of their own, so that no input is an output itself.
        unchanged = [x + 0 for x in (key, nonlin, *others)]
        return self.model.ctc_output(out_NSD), *unchanged[:2], first_NH[None], second_NH[None], *unchanged[2:]

    def start(self, N: int) -> tuple[Tensor, ...]:
        """Returns the states of N new streams, as sherpa-onnx makes them from the metadata."""
        values, convs = torch.zeros(1, N, self.half_size), torch.zeros(N, CHANNELS, KERNEL // 2)
        embed = torch.zeros(N, EMBED_CHANNELS, LOOK_AHEAD, self.model.encoder_embed.frequencies)
        key, nonlin = torch.zeros(1, N, 1), torch.zeros(1, N, 1, 3 * CHANNELS // 4)
        return key, nonlin, values, values, convs, convs, embed, torch.zeros(N, dtype=torch.int64)


def ctc_model(model: Transducer, chunk: int, left_context: int) -> Part:
    """Makes the part that holds the encoder and its CTC head.

    Args:
        model: a transducer with a CTC head.
        chunk: in frames of 20 ms.
        left_context: in frames of 20 ms.

    Raises:
        ValueError: if the model has no CTC head.
    """
    if not model.config.ctc:
        raise ValueError("this model has no CTC head (model.ctc is false); use --format sherpa")
    module = CtcEncoder(model, left_context).eval()
    facts = chunk_facts(chunk)

    def draw(N: int) -> tuple[Tensor, ...]:
        return random_features(N, int(facts["T"])), *module.start(N)

    states: Axes = {f"cached_{kind}": {batch_axis(kind): "N"} for kind in LAYER_STATES}
    states |= {"embed_states": {0: "N"}, "processed_lens": {0: "N"}}
    new_states: Axes = {f"new_{name}": axes for name, axes in states.items()}
    layer: Metadata = {
        "model_type": "zipformer2_ctc",
        "version": 1,
        "num_encoder_layers": 1,
        "encoder_dims": CHANNELS,
        "cnn_module_kernels": KERNEL,
        "num_heads": 1,
        "query_head_dims": 1,
        "value_head_dims": module.half_size,
        "left_context_len": 1,
    }
    inputs, outputs = {"x": {0: "N"}} | states, {"log_probs": {0: "N"}} | new_states
    return Part("model", module, draw, inputs, outputs, layer | facts, states=len(states))
