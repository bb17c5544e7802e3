"""The Zipformer encoder: stacks of layers at several frame rates, for whole utterances, chunk-masked and streaming.

Its parameters have the names that published checkpoints give them.

Source: Yao et al., "Zipformer: A faster and better encoder for automatic speech recognition" (arXiv 2310.11230).

Shapes: B batch, T frames at 50 Hz or at the rate of the stack, D channels, L left-context frames kept from earlier
chunks, K = L + T keys, P = K + T - 1 relative positions, E channels of a position encoding, Q query and V value
channels of all heads, M frames that a convolution keeps.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ssm_asr.encoder.attention import AttentionWeights, RelativePositions, SelfAttention
from ssm_asr.encoder.contract import MOST_CHANNELS, MOST_HEADS, MOST_LAYERS, MOST_TAPS, Encoder, EncoderConfig
from ssm_asr.encoder.convolution import ConvolutionModule
from ssm_asr.encoder.long_range import LONG_RANGE, LongRange
from ssm_asr.encoder.modules import BiasNorm, Bypass, Downsample, FeedForward, set_channels
from ssm_asr.encoder.regularize import Balancer, Schedule, Scheduled, Whiten, sequence_masks
from ssm_asr.fields import setting
from ssm_asr.ops.attention import Context, context_of_chunk, context_of_sequences
from ssm_asr.ops.numbers import Count
from ssm_asr.ops.residual import add_masked, fork

DROPOUT = Schedule((0, 0.3), (20000, 0.1))


@dataclass
class ZipformerConfig(EncoderConfig):
    """These settings give the size and shape of a Zipformer. Lists have one entry a stack; the defaults are size M."""

    kind: str = "zipformer"
    layers: tuple[int, ...] = setting((2, 2, 3, 4, 3, 2), least=1, most=MOST_LAYERS)
    # Each stack runs at 50 Hz divided by its factor.
    downsampling: tuple[int, ...] = setting((1, 2, 4, 8, 4, 2), least=1, most=64)
    dim: tuple[int, ...] = setting((192, 256, 384, 512, 384, 256), least=1, most=MOST_CHANNELS)
    # Training never masks the first so many channels.
    unmasked_dim: tuple[int, ...] = setting((192, 192, 256, 256, 256, 192), least=1, most=MOST_CHANNELS)
    feedforward_dim: tuple[int, ...] = setting((512, 768, 1024, 1536, 1024, 768), least=1, most=MOST_CHANNELS)
    heads: tuple[int, ...] = setting((4, 4, 4, 8, 4, 4), least=1, most=MOST_HEADS)
    conv_kernel: tuple[int, ...] = setting((31, 31, 15, 15, 15, 31), least=1, most=MOST_TAPS)
    query_head_dim: int = setting(32, least=1, most=MOST_CHANNELS)
    value_head_dim: int = setting(12, least=1, most=MOST_CHANNELS)
    pos_head_dim: int = setting(4, least=1, most=MOST_CHANNELS)
    pos_dim: int = setting(48, least=2, most=MOST_CHANNELS, multiple_of=2)
    # This module carries information over long stretches of time, beside self-attention.
    long_range: str = setting("nonlin_attention", choices=tuple(LONG_RANGE))
    mamba_heads: int = setting(16, least=1, most=MOST_HEADS)
    mamba_groups: int = setting(8, least=1, most=MOST_HEADS)
    # With N states a channel, a layer's state holds ¾·dim·N floats.
    mamba_states: int = setting(16, least=1, most=MOST_CHANNELS)
    causal: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        stacks = len(self.layers)
        self.require(stacks > 0, "layers", "one entry for each stack")
        for name in ("downsampling", "dim", "unmasked_dim", "feedforward_dim", "heads", "conv_kernel"):
            remedy = f"{stacks} entries, as many as model.encoder.layers has"
            self.require(len(getattr(self, name)) == stacks, name, remedy)
        unmasked = all(unmasked <= dim for unmasked, dim in zip(self.unmasked_dim, self.dim, strict=True))
        self.require(unmasked, "unmasked_dim", "at most model.encoder.dim each")
        self.require(all(kernel % 2 for kernel in self.conv_kernel), "conv_kernel", "odd numbers")
        if self.long_range == "mamba2":
            heads, groups = self.mamba_heads, self.mamba_groups
            divides = all(dim * 3 // 4 % heads == 0 and dim * 3 // 4 % groups == 0 for dim in self.dim)
            remedy = f"numbers ¾ of which divides by mamba_heads ({heads}) and by mamba_groups ({groups})"
            self.require(divides, "dim", remedy)
            self.require(heads % groups == 0, "mamba_heads", f"a multiple of mamba_groups, {groups}")

    @property
    def embed_dim(self) -> int:
        """Gives the width of the 50 Hz frames that the front end makes: the first stack's."""
        return self.dim[0]


class LayerState(NamedTuple):
    """The state of a layer between chunks, in frames of its stack.

    It holds keys and values of the left context, the inputs that the two convolutions still need, and the state of the
    long-range module.
    """

    key_BLQ: Tensor
    long_range: Any  # each long-range module has a type of its own; () without a module
    value1_BLV: Tensor
    value2_BLV: Tensor
    conv1_BDM: Tensor
    conv2_BDM: Tensor


class ZipformerLayer(Scheduled):
    """A Zipformer layer (figure 2).

    It computes attention weights once and uses them in two self-attention modules and, if there is one, in the
    long-range module; it has three feed-forward modules, two convolution modules and two bypasses. In training a
    sequence skips the layer with the probability `bypass_skip_rate`.
    """

    def __init__(self, config: ZipformerConfig, stack: int, bypass_skip_rate: Schedule) -> None:
        super().__init__()
        dim, heads = config.dim[stack], config.heads[stack]
        feedforward, kernel = config.feedforward_dim[stack], config.conv_kernel[stack]
        self.long_range = config.long_range
        # This parameter is not used. It exists because published checkpoints have it.
        self.bypass_scale = nn.Parameter(torch.full((dim,), 0.5))
        self.bypass = Bypass(dim)
        self.bypass_mid = Bypass(dim)
        self.self_attn_weights = AttentionWeights(
            dim, config.pos_dim, heads, config.query_head_dim, config.pos_head_dim
        )
        self.self_attn1 = SelfAttention(dim, heads, config.value_head_dim)
        self.self_attn2 = SelfAttention(dim, heads, config.value_head_dim)
        self.feed_forward1 = FeedForward(dim, feedforward * 3 // 4, DROPOUT)
        self.feed_forward2 = FeedForward(dim, feedforward, DROPOUT)
        self.feed_forward3 = FeedForward(dim, feedforward * 5 // 4, DROPOUT)
        make_long_range = LONG_RANGE[config.long_range]
        if make_long_range is not None:
            self.add_module(config.long_range, make_long_range(config, dim))
        self.conv_module1 = ConvolutionModule(dim, kernel, config.causal)
        self.conv_module2 = ConvolutionModule(dim, kernel, config.causal)
        self.norm = BiasNorm(dim)

        self.balance_long_range = Balancer((0.3, 0.7), abs=(Schedule((0, 0.004), (4000, 0.02)), 100.0), prob=0.05)
        self.balance_ff2 = Balancer((0.3, 0.7), abs=(Schedule((0, 0.0), (4000, 0.1)), 2.0), prob=0.05)
        self.balance_ff3 = Balancer((0.3, 0.7), abs=(Schedule((0, 0.0), (4000, 0.2)), 4.0), prob=0.05)
        self.balance_norm = Balancer((0.45, 0.55), abs=(0.2, 4.0))
        self.balance_out = Balancer((0.45, 0.55), abs=(0.1, 4.0))
        self.whiten_out = Whiten(Schedule((0, 4.0), (20000, 12.0)))
        self.attention_skip_rate = Schedule((0, 0.2), (4000, 0.05), (16000, 0.0))
        self.conv_skip_rate = Schedule((0, 0.2), (4000, 0.05), (16000, 0.0))
        self.ff_skip_rate = Schedule((0, 0.1), (4000, 0.01), (50000, 0.0))
        self.bypass_skip_rate = bypass_skip_rate

    def init_state(self, batch_size: int, left_context: int, device: torch.device | None = None) -> LayerState:
        """Returns the state at the start of `batch_size` streams; left_context is in frames of this stack."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch_size, *shape, device=device)

        dim, value_dim = self.bypass_scale.shape[0], self.self_attn1.value_dim
        module = self._long_range_module()
        return LayerState(
            key_BLQ=zeros(left_context, self.self_attn_weights.query_dim),
            long_range=() if module is None else module.init_long_range(batch_size, left_context, device),
            value1_BLV=zeros(left_context, value_dim),
            value2_BLV=zeros(left_context, value_dim),
            conv1_BDM=zeros(dim, self.conv_module1.cached),
            conv2_BDM=zeros(dim, self.conv_module2.cached),
        )

    def forward(self, x_BTD: Tensor, pos_PE: Tensor, context: Context, chunk: Count) -> Tensor:
        """Maps whole sequences (B, T, D) -> (B, T, D).

        Args:
            x_BTD: frames at the rate of the stack.
            pos_PE: encodings from `RelativePositions`.
            context: which keys attention sees, and which frames are padding.
            chunk: frames of a chunk, beyond whose end convolutions do not see; -1 is the whole sequence.
        """
        return self._run(x_BTD, pos_PE, context, chunk, None)[0]

    def stream(self, x_BTD: Tensor, pos_PE: Tensor, context: Context, state: LayerState) -> tuple[Tensor, LayerState]:
        """Maps one chunk (B, T, D) -> (B, T, D), and returns it with the new state."""
        y_BTD, new_state = self._run(x_BTD, pos_PE, context, -1, state)
        assert new_state is not None
        return y_BTD, new_state

    def _run(
        self, x: Tensor, pos_PE: Tensor, context: Context, chunk: Count, state: LayerState | None
    ) -> tuple[Tensor, LayerState | None]:
        """Maps whole sequences if there is no state, else one chunk; returns the output and the new state."""
        left_context = 0 if state is None else state.key_BLQ.shape[1]
        past = state if left_context else None  # without left context attention sees nothing of earlier chunks

        def keep(cache_BKD: Tensor) -> Tensor:
            return cache_BKD[:, cache_BKD.shape[1] - left_context :]

        x, for_weights, for_feed_forward, orig, orig_at_end = fork(x, 5)
        attention_mask, conv1_mask, ff2_mask, conv2_mask, ff3_mask, bypass_mask = sequence_masks(
            self, x, self.attention_skip_rate, self.conv_skip_rate, self.ff_skip_rate, self.conv_skip_rate,
            self.ff_skip_rate, self.bypass_skip_rate,
        )  # fmt: skip
        weights, key = self.self_attn_weights(for_weights, pos_PE, context, past and past.key_BLQ)
        weights1, weights2, first_head = weights
        x = x + self.feed_forward1(for_feed_forward)

        x, long_range = self._mix_long_range(x, first_head, context, attention_mask, state)
        mixed, value1 = self.self_attn1(x, weights1, context, past and past.value1_BLV)
        x = add_masked(x, mixed, attention_mask)
        mixed, conv1 = self._convolve(self.conv_module1, x, context, chunk, state and state.conv1_BDM)
        x = add_masked(x, mixed, conv1_mask)
        x = add_masked(x, self.balance_ff2(self.feed_forward2(x)), ff2_mask)
        x = self.bypass_mid(orig, x)

        mixed, value2 = self.self_attn2(x, weights2, context, past and past.value2_BLV)
        x = add_masked(x, mixed, attention_mask)
        mixed, conv2 = self._convolve(self.conv_module2, x, context, chunk, state and state.conv2_BDM)
        x = add_masked(x, mixed, conv2_mask)
        x = add_masked(x, self.balance_ff3(self.feed_forward3(x)), ff3_mask)
        x = self.bypass(orig_at_end, self.norm(self.balance_norm(x)), bypass_mask)
        x = self.whiten_out(self.balance_out(x))
        if state is None:
            return x, None
        assert conv1 is not None and conv2 is not None
        return x, LayerState(keep(key), long_range, keep(value1), keep(value2), conv1, conv2)

    def _mix_long_range(
        self, x: Tensor, weights: Tensor, context: Context, mask: Tensor | None, state: LayerState | None
    ) -> tuple[Tensor, Any]:
        """Adds the output of the long-range module, if there is one; returns x and, in streaming, the new state."""
        module, new_state = self._long_range_module(), ()
        if module is None:
            return x, new_state
        if state is None:
            mixed = module.mix(x, weights, context)
        else:
            mixed, new_state = module.mix_stream(x, weights, state.long_range)
        return add_masked(x, self.balance_long_range(mixed), mask), new_state

    def _long_range_module(self) -> LongRange | None:
        return cast(LongRange | None, self._modules.get(self.long_range))

    def _convolve(
        self, module: ConvolutionModule, x: Tensor, context: Context, chunk: Count, cache: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Runs a convolution module on one chunk if there is a cache, else on whole sequences."""
        if cache is not None:
            return module.stream(x, cache)
        return module(x, context.padding_mask_BK, chunk), None


class Stack(nn.Module):
    """A stack: layers that follow each other at one frame rate."""

    def __init__(self, config: ZipformerConfig, index: int) -> None:
        super().__init__()
        self.positions = RelativePositions(config.pos_dim)
        # Early in training a layer is skipped by half of the sequences. Layer by layer, each in its own share of the
        # first 4000 batches of 600 s, the rate falls to its last value.
        stacks, count = len(config.layers), config.layers[index]
        begin, end = (4000 * (index + i) / (stacks + 1) for i in (1, 2))
        share = (end - begin) / count
        last_rate = 0.035 * math.sqrt(config.downsampling[index])
        self.layers = nn.ModuleList(
            ZipformerLayer(
                config,
                index,
                Schedule((begin + i * share, 0.5), (begin + (i + 1) * share, last_rate)),
            )
            for i in range(count)
        )

    def init_state(
        self, batch_size: int, left_context: int, device: torch.device | None = None
    ) -> tuple[LayerState, ...]:
        """Returns the states of all layers at the start of streams; left_context is in frames of this stack."""
        return tuple(layer.init_state(batch_size, left_context, device) for layer in self._layers())

    def forward(self, x_BTD: Tensor, context: Context, chunk: Count, channel_mask: Tensor | None) -> Tensor:
        """Maps whole sequences (B, T, D) -> (B, T, D).

        Args:
            x_BTD: frames at the rate of the stack.
            context: which keys attention sees, and which frames are padding.
            chunk: in frames of the stack; -1 is the whole sequence.
            channel_mask: (B, 1, D), 0 for channels that training hides in some sequences; None hides nothing.
        """
        pos_PE = self.positions(x_BTD)
        x_BTD = add_masked(None, x_BTD, channel_mask)
        for layer in self.layers:
            x_BTD = add_masked(None, layer(x_BTD, pos_PE, context, chunk), channel_mask)
        return x_BTD

    def stream(
        self, x_BTD: Tensor, state: tuple[LayerState, ...], processed_B: Tensor | None
    ) -> tuple[Tensor, tuple[LayerState, ...]]:
        """Maps one chunk (B, T, D) -> (B, T, D), and returns it with the new state.

        Args:
            x_BTD: frames at the rate of the stack.
            state: the state that the previous chunk returned; it is not changed.
            processed_B: frames of the stack that each stream has had before, int64; may be None without left context.
        """
        left_context = state[0].key_BLQ.shape[1]
        pos_PE = self.positions(x_BTD, left_context)
        context = context_of_chunk(x_BTD.shape[1], left_context, processed_B)
        new_states = []
        for layer, layer_state in zip(self._layers(), state, strict=True):
            x_BTD, layer_state = layer.stream(x_BTD, pos_PE, context, layer_state)
            new_states.append(layer_state)
        return x_BTD, tuple(new_states)

    def _layers(self) -> list[ZipformerLayer]:
        return cast(list[ZipformerLayer], self.layers)


class DownsampledStack(nn.Module):
    """Runs a stack at a lower frame rate (section 3.1).

    It downsamples its input, runs the stack, upsamples the result, and combines it with the input by a bypass.
    """

    def __init__(self, config: ZipformerConfig, index: int) -> None:
        super().__init__()
        self.factor = config.downsampling[index]
        self.downsample = Downsample(self.factor)
        self.encoder = Stack(config, index)
        self.out_combiner = Bypass(config.dim[index], self.factor)

    def init_state(
        self, batch_size: int, left_context: int, device: torch.device | None = None
    ) -> tuple[LayerState, ...]:
        """See `Stack.init_state`; left_context is in frames at 50 Hz."""
        return self.encoder.init_state(batch_size, left_context // self.factor, device)

    def forward(self, x_BTD: Tensor, context: Context, chunk: Count, channel_mask: Tensor | None) -> Tensor:
        """See `Stack.forward`; x, context and chunk are in frames at 50 Hz."""
        few = context.every(self.factor)
        y_BTD = self.encoder(self.downsample(x_BTD), few, chunk // self.factor, channel_mask)  # -1 stays -1
        return self.out_combiner(x_BTD, y_BTD)

    def stream(
        self, x_BTD: Tensor, state: tuple[LayerState, ...], processed_B: Tensor | None
    ) -> tuple[Tensor, tuple[LayerState, ...]]:
        """See `Stack.stream`; x and processed_B are in frames at 50 Hz."""
        processed_B = None if processed_B is None else processed_B // self.factor
        y_BTD, state = self.encoder.stream(self.downsample(x_BTD), state, processed_B)
        return self.out_combiner(x_BTD, y_BTD), state


class Zipformer(Scheduled, Encoder):
    """The encoder: it maps 50 Hz frames of dim[0] channels to 25 Hz frames of max(dim) channels.

    Attributes:
        out_channels: max(dim), the width of the output.
    """

    config: ZipformerConfig

    def __init__(self, config: ZipformerConfig) -> None:
        super().__init__()
        self.config = config
        self.out_channels = max(config.dim)
        self.encoders = nn.ModuleList(
            Stack(config, i) if factor == 1 else DownsampledStack(config, i)
            for i, factor in enumerate(config.downsampling)
        )
        self.downsample_output = Downsample(2)

    def init_state(
        self, batch_size: int, left_context: int, device: torch.device | None = None
    ) -> tuple[tuple[LayerState, ...], ...]:
        """Returns the state of every layer at the start of `batch_size` streams; left_context is in frames at 50 Hz."""
        return tuple(stack.init_state(batch_size, left_context, device) for stack in self._stacks())

    def forward(self, x_BTD: Tensor, lens_B: Tensor, chunk: Count, left_context: Count) -> tuple[Tensor, Tensor]:
        """Encodes whole sequences, masked to what streaming sees.

        Args:
            x_BTD: T frames at 50 Hz.
            lens_B: how many frames of each sequence are not padding.
            chunk: in frames at 50 Hz, -1 for the whole sequence; an encoder that is not causal ignores it.
            left_context: in frames at 50 Hz, -1 for all. Both may be tensors, as `context_of_sequences` takes them.

        Returns:
            The output (B, (T+1)//2, max(dim)), and the lengths (B,) in frames at 25 Hz.
        """
        context = context_of_sequences(x_BTD, lens_B, chunk if self.config.causal else -1, left_context)
        outputs: list[Tensor] = []
        for i, (stack, mask) in enumerate(zip(self.encoders, self._channel_masks(x_BTD), strict=True)):
            x_BTD = stack(self._input_of(i, x_BTD, outputs), context, chunk, mask)
        return self._finish([*outputs, x_BTD]), (lens_B + 1) // 2

    def stream(
        self, x_BTD: Tensor, state: tuple[tuple[LayerState, ...], ...], processed_B: Tensor | None
    ) -> tuple[Tensor, tuple[tuple[LayerState, ...], ...]]:
        """Encodes one chunk; returns half as many frames (B, T/2, max(dim)), and the new state.

        Args:
            x_BTD: T frames at 50 Hz, where T is a multiple of the configuration's `chunk_multiple`.
            state: the state that the previous chunk returned; it is not changed.
            processed_B: frames at 50 Hz that each stream has had before, int64; may be None without left context.
        """
        outputs: list[Tensor] = []
        new_state = []
        for i, (stack, stack_state) in enumerate(zip(self._stacks(), state, strict=True)):
            x_BTD, stack_state = stack.stream(self._input_of(i, x_BTD, outputs), stack_state, processed_B)
            new_state.append(stack_state)
        return self._finish([*outputs, x_BTD]), tuple(new_state)

    def _stacks(self) -> list[Stack | DownsampledStack]:
        return cast(list[Stack | DownsampledStack], self.encoders)

    def _input_of(self, i: int, x_BTD: Tensor, outputs: list[Tensor]) -> Tensor:
        """Returns the input of stack i, the output of the stack before with as many channels as stack i has.

        Channels that neither stack i nor a later one has are appended to `outputs`.
        """
        dims = self.config.dim
        widest = max(dims[i:])
        if i and dims[i - 1] > widest:
            x_BTD, last_BTD = x_BTD.split([widest, dims[i - 1] - widest], dim=-1)
            outputs.append(last_BTD)
        return set_channels(x_BTD, dims[i])

    def _finish(self, outputs: list[Tensor]) -> Tensor:
        """Puts the channels side by side, each taken from the last stack that has it, and halves the frame rate."""
        return self.downsample_output(torch.cat(outputs[::-1], dim=-1))

    def _channel_masks(self, x_BTD: Tensor) -> list[Tensor | None]:
        """Draws a mask (B, 1, D) for each stack, or None for a stack whose channels are never masked.

        With probability 0.125 a sequence loses all channels above unmasked_dim. A second draw of this probability takes
        only the upper half of these channels, which are lost about twice as often as the lower half.
        """
        if not self.training:
            return [None] * len(self.config.dim)
        keep_B2 = (torch.rand(x_BTD.shape[0], 2, device=x_BTD.device) > 0.125).to(x_BTD.dtype)
        lower, both = keep_B2[:, :1], keep_B2.amin(dim=1, keepdim=True)
        always = torch.ones_like(lower)
        parts = []
        for dim, unmasked in zip(self.config.dim, self.config.unmasked_dim, strict=True):
            middle = unmasked + (dim - unmasked) // 2
            parts += [always.expand(-1, unmasked), lower.expand(-1, middle - unmasked), both.expand(-1, dim - middle)]
        masks = torch.cat(parts, dim=1)[:, None].split(self.config.dim, dim=2)
        return [
            None if unmasked == mask.shape[2] else mask
            for mask, unmasked in zip(masks, self.config.unmasked_dim, strict=True)
        ]
