"""Encoding of whole utterances, so that every frame comes out as it would from streaming.

Shapes: B utterances, T feature frames, F mels, S output frames, D encoder width, C chunk in encoder frames (20 ms).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ssm_asr import units
from ssm_asr.encoder.contract import MOST_CHUNK_FRAMES
from ssm_asr.encoder.subsampling import CHUNK_OVERLAP
from ssm_asr.ops import dispatch
from ssm_asr.ops.attention import context_on_device, visible_left_context
from ssm_asr.ops.capture import Outputs
from ssm_asr.ops.devices import to_device
from ssm_asr.ops.numbers import Count
from ssm_asr.transducer.model import EncoderConfig, Transducer

GPU_FRAMES = 256  # on a GPU, batches have a multiple of this many feature frames, and the overlap


def streaming_context(encoder: EncoderConfig, chunk: int, left_context: int) -> int:
    """Returns the left context that chunks really see, which is made of whole chunks, in frames of 20 ms.

    Args:
        chunk, left_context: in frames of 20 ms.

    Raises:
        ValueError: if the model cannot stream, or not with this chunk or left context.
    """
    factor = encoder.chunk_multiple
    if not encoder.causal:
        raise ValueError(
            "this model was trained without chunks (encoder.causal is false), so it recognises whole utterances only: "
            "give no chunk, and do not stream"
        )
    if chunk == -1:
        raise ValueError("chunk of -1, which is the whole utterance: streaming needs a chunk, such as 320ms")
    if chunk <= 0 or chunk % factor:
        raise ValueError(
            f"chunk of {chunk} frames ({units.chunk_ms(chunk)} ms): give a multiple of {factor} frames "
            f"({units.chunk_ms(factor)} ms)"
        )
    if chunk > MOST_CHUNK_FRAMES:
        raise ValueError(
            f"chunk of {chunk} frames ({units.chunk_ms(chunk)} ms): give at most {MOST_CHUNK_FRAMES} frames, or -1 for "
            "whole utterances"
        )
    if left_context < 0:
        raise ValueError(f"left context of {left_context} frames: with chunks, give 0 or more (frames of 20 ms)")
    return visible_left_context(chunk, left_context)


def padded_frames(frames: int, chunk: int) -> int:
    """Returns the 2·C·n + 13 feature frames that n whole chunks take, for an utterance of this many frames."""
    chunks = -(-max(1, units.embed_frames(frames)) // chunk)
    return 2 * chunk * chunks + CHUNK_OVERLAP


def pad_to_chunks(features_TF: Tensor, chunk: int) -> Tensor:
    """Pads the features of a whole utterance with silence to whole chunks."""
    missing = padded_frames(features_TF.shape[0], chunk) - features_TF.shape[0]
    return torch.nn.functional.pad(features_TF, (0, 0, 0, missing), value=units.LOG_MEL_SILENCE)


def _pad_batch(features_BTF: Tensor, lens_B: Tensor, frames: int) -> Tensor:
    """Pads or cuts a batch to this many frames. Silence replaces all that is beyond the lengths."""
    features_BTF = torch.nn.functional.pad(features_BTF, (0, 0, 0, frames - features_BTF.shape[1]))
    beyond_BT = torch.arange(frames, device=lens_B.device) >= lens_B[:, None]
    return features_BTF.masked_fill(beyond_BT[..., None], units.LOG_MEL_SILENCE)


def encode_as_streamed(
    model: Transducer,
    features_BTF: Tensor,
    lens_B: Tensor,
    chunk: int,
    left_context: int,
    encode: Callable[..., Outputs] | None = None,
) -> tuple[Tensor, list[int]]:
    """Encodes whole utterances in one pass, so that each frame comes out as it would from streaming.

    What else is in the batch makes no difference. Streaming pads an utterance to whole chunks, so this function does,
    too, and leaves the frames of that padding out of the count. Without chunks, an utterance is padded to the end of
    the last frame of the coarsest stack, which would else be filled from the batch.

    Args:
        chunk, left_context: in frames of 20 ms; chunk -1 stands for the whole utterance.
        encode: is called in place of `model.encode`, with chunk and left context as numbers on the device where there
            are kernels, and may transform the output. None is `model.encode`.

    Returns:
        Encoder output (B, S, D) and the number of valid frames of each utterance.
    """
    lens = lens_B.tolist()
    unit = chunk if chunk > 0 else model.config.encoder.chunk_multiple
    padded = [padded_frames(length, unit) for length in lens]
    # Without chunks, what is beyond the last of these frames counts as padding, as it would in a longer batch.
    beyond = 0 if chunk > 0 else CHUNK_OVERLAP - units.feature_frames(0)
    counts = torch.tensor([lens, [frames - beyond for frames in padded]])
    valid_B, counted_B = to_device(counts, features_BTF.device)
    most = max(padded)
    context: tuple[Count, Count] = chunk, left_context
    if features_BTF.is_cuda:  # so that one captured graph serves batches of like lengths
        most = -(-(most - CHUNK_OVERLAP) // GPU_FRAMES) * GPU_FRAMES + CHUNK_OVERLAP
    if dispatch.use_kernels(features_BTF):  # and all chunks, which the plain convolution would have to ask for
        context = context_on_device(chunk, left_context, features_BTF.device)
    features_BTF = _pad_batch(features_BTF, valid_B, most)
    encoder_out = (encode or model.encode)(features_BTF, counted_B, *context)[0]
    return encoder_out, [units.output_frames(length) for length in lens]


def encode_by_chunks(model: Transducer, features_TF: Tensor, chunk: int, left_context: int) -> Tensor:
    """Encodes one whole utterance as streaming does, chunk after chunk with explicit state.

    Args:
        chunk, left_context: in frames of 20 ms, the latter as `streaming_context` gives it.

    Returns:
        Encoder output (S, D), the frames of the last chunk's padding cut off.
    """
    padded_TF = pad_to_chunks(features_TF, chunk)
    state = model.init_state(1, left_context, features_TF.device)
    parts = []
    for start in range(0, len(padded_TF) - CHUNK_OVERLAP, 2 * chunk):
        out_BSD, state = model.stream(padded_TF[None, start : start + 2 * chunk + CHUNK_OVERLAP], state)
        parts.append(out_BSD[0])
    return torch.cat(parts)[: units.output_frames(len(features_TF))]
