"""The streaming Zipformer in the form that sherpa-onnx supports itself (`zipformer2`).

Its states are six tensors for each layer, the state of the front end, and the frame counter.

Shapes: N streams, T feature frames of a chunk, F mels, S output frames, J joiner channels; in states L left-context
frames, Q query channels, V value channels, H nonlin-attention channels, D channels, M frames that a convolution keeps,
W = 19 frequencies.
"""

import torch
from torch import Tensor, nn

from ssm_asr.encoder.state import leaves, rebuild
from ssm_asr.encoder.subsampling import LOOK_AHEAD
from ssm_asr.encoder.zipformer import ZipformerConfig
from ssm_asr.exporting.parts import Axes, Metadata, Part, chunk_facts, random_features
from ssm_asr.transducer.model import StreamState, Transducer

# sherpa-onnx always makes the front end's state for so many channels.
EMBED_CHANNELS = 128
LAYER_STATES = ("key", "nonlin_attn", "val1", "val2", "conv1", "conv2")


def batch_axis(kind: str) -> int:
    """Returns the axis of the streams in a state of this kind, in the runtime's layout."""
    return 0 if kind.startswith("conv") else 1


def to_runtime(kind: str, x: Tensor) -> Tensor:
    """Converts a state of a layer, which has the batch first, to the runtime's layout."""
    if kind == "nonlin_attn":
        return x[None]  # (1, N, L, H)
    return x if kind.startswith("conv") else x.transpose(0, 1)  # (N, D, M); (L, N, Q or V)


def from_runtime(kind: str, x: Tensor) -> Tensor:
    """Converts a state in the runtime's layout to the layout of a layer; it is the inverse of `to_runtime`."""
    if kind == "nonlin_attn":
        return x[0]
    return x if kind.startswith("conv") else x.transpose(0, 1)


class NativeEncoder(nn.Module):
    """A streaming step of the encoder whose states are single tensors, and the joiner's projection of its output."""

    def __init__(self, model: Transducer, left_context: int) -> None:
        super().__init__()
        self.model, self._start = model, model.init_state(1, left_context)

    def forward(self, x_NTF: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """Encodes one chunk; returns the projected output (N, S, J) and the new states.

        Args:
            x_NTF: features of the chunk.
            states: six tensors for each layer, in the order of LAYER_STATES; the state of the front end (N, 128, 3, W);
                and the frames at 50 Hz that each stream has had, (N,) int64.
        """
        *layers, embed, processed_N = states
        kinds = LAYER_STATES * (len(layers) // len(LAYER_STATES))
        ours = (from_runtime(kind, x) for kind, x in zip(kinds, layers, strict=True))
        channels = self._start.embed_BCTW.shape[1]
        state = StreamState(embed[:, :channels], rebuild(self._start.encoder, ours), (processed_N,))
        out_NSD, new = self.model.stream(x_NTF, state)
        theirs = (to_runtime(kind, x) for kind, (_, x) in zip(kinds, leaves(new.encoder), strict=True))
        embed = nn.functional.pad(new.embed_BCTW, (0, 0, 0, 0, 0, EMBED_CHANNELS - channels))
        return self.model.joiner.encoder_proj(out_NSD), *theirs, embed, new.processed[0]

    def start(self, N: int) -> tuple[Tensor, ...]:
        """Returns the states of N new streams."""
        layers = [x.expand(N, *x.shape[1:]) for _, x in leaves(self._start.encoder)]
        kinds = LAYER_STATES * (len(layers) // len(LAYER_STATES))
        theirs = (to_runtime(kind, x) for kind, x in zip(kinds, layers, strict=True))
        embed = torch.zeros(N, EMBED_CHANNELS, LOOK_AHEAD, self._start.embed_BCTW.shape[-1])
        return *theirs, embed, torch.zeros(N, dtype=torch.int64)


def native_encoder(model: Transducer, chunk: int, left_context: int) -> Part:
    """Makes the part that holds the encoder of a Zipformer with nonlin attention and left context.

    Args:
        model: the transducer.
        chunk: in frames of 20 ms.
        left_context: in frames of 20 ms.

    Raises:
        ValueError: if the encoder is not the Zipformer that sherpa-onnx knows; the packed carrier takes any encoder.
    """
    encoder = model.config.encoder
    for wrong, what in (
        (not isinstance(encoder, ZipformerConfig), "this encoder is no Zipformer"),
        (getattr(encoder, "long_range", "") != "nonlin_attention", "this Zipformer has no nonlin attention"),
        (left_context == 0, "this model has no left context"),
        (encoder.embed_channels[2] > EMBED_CHANNELS, f"this front end has more than {EMBED_CHANNELS} channels"),
    ):
        if wrong:
            raise ValueError(f"carrier zipformer2: {what}; use the packed carrier")
    assert isinstance(encoder, ZipformerConfig)
    module = NativeEncoder(model, left_context).eval()
    facts, layers = chunk_facts(chunk), sum(encoder.layers)

    def draw(N: int) -> tuple[Tensor, ...]:
        return random_features(N, int(facts["T"])), *module.start(N)

    states: Axes = {f"cached_{kind}_{i}": {batch_axis(kind): "N"} for i in range(layers) for kind in LAYER_STATES}
    states |= {"embed_states": {0: "N"}, "processed_lens": {0: "N"}}
    new_states: Axes = {f"new_{name}": axes for name, axes in states.items()}
    kind: Metadata = {"model_type": "zipformer2", "version": 1}
    return Part(
        "encoder",
        module,
        draw,
        {"x": {0: "N"}} | states,
        {"encoder_out": {0: "N"}} | new_states,
        kind | facts | _sizes(encoder, left_context),
        states=len(states),
    )


def _sizes(encoder: ZipformerConfig, left_context: int) -> Metadata:
    """Returns the sizes from which the runtime makes the states of new streams, one number for each stack."""
    stacks = len(encoder.layers)
    lists = {
        "num_encoder_layers": encoder.layers,
        "encoder_dims": encoder.dim,
        "cnn_module_kernels": encoder.conv_kernel,
        "num_heads": encoder.heads,
        "query_head_dims": [encoder.query_head_dim] * stacks,
        "value_head_dims": [encoder.value_head_dim] * stacks,
        "left_context_len": [left_context // factor for factor in encoder.downsampling],
    }
    return {name: ",".join(map(str, values)) for name, values in lists.items()}
