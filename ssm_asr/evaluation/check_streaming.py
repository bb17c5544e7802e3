"""How far the encoder's output from streaming is from its output in one pass that is masked to chunks."""

import torch
from tqdm import tqdm

from ssm_asr.search.encoding import encode_as_streamed, encode_by_chunks
from ssm_asr.transducer.model import Transducer

TOLERANCE = 1e-4


@torch.inference_mode()
def worst_difference(
    model: Transducer, utterances: list[torch.Tensor], chunk: int, left_context: int
) -> tuple[float, float]:
    """Returns the largest absolute difference over all utterances and frames, and the largest absolute output.

    Args:
        utterances: the features (T, F) of each.
        chunk, left_context: in frames of 20 ms.
    """
    worst = largest = 0.0
    for features_TF in tqdm(utterances, desc=f"chunk {chunk}", unit="utt", leave=False):
        streamed_SD = encode_by_chunks(model, features_TF, chunk, left_context)
        lens_B = torch.tensor([len(features_TF)], device=features_TF.device)
        whole_BSD, (valid,) = encode_as_streamed(model, features_TF[None], lens_B, chunk, left_context)
        if valid:
            worst = max(worst, float((streamed_SD - whole_BSD[0, :valid]).abs().max()))
            largest = max(largest, float(streamed_SD.abs().max()))
    return worst, largest
