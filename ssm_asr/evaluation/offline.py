"""Recognition of whole utterances, masked to chunks as streaming would be."""

import time

import torch
from lhotse import CutSet
from tqdm import tqdm

from ssm_asr.checkpoint import Loaded
from ssm_asr.data.batches import eval_batches
from ssm_asr.search import Search
from ssm_asr.search.recognizer import encode_as_streamed


@torch.inference_mode()
def decode_cuts(
    loaded: Loaded,
    cuts: CutSet,
    chunk: int,
    left_context: int,
    search: Search,
    max_duration_s: float,
) -> tuple[dict[str, str], dict[str, str], float]:
    """Decodes every cut.

    Args:
        chunk, left_context: in frames of 20 ms; chunk -1 for whole utterances.

    Returns:
        References and hypotheses by cut id, and the seconds of computation.
    """
    device = next(loaded.model.parameters()).device
    refs: dict[str, str] = {}
    hyps: dict[str, str] = {}
    begin = time.perf_counter()
    with tqdm(total=len(cuts), desc="decode", unit="utt") as bar:
        for batch in eval_batches(cuts, loaded.tokenizer, max_duration_s=max_duration_s):
            batch = batch.to(device)
            encoder_out, lens = encode_as_streamed(
                loaded.model, batch.features_BTF, batch.feature_lens_B, chunk, left_context
            )
            states = search.step(loaded.model.joiner.encoder_proj(encoder_out), lens, [search.start() for _ in lens])
            for i, text, state in zip(batch.ids, batch.texts, states, strict=True):
                refs[i] = text
                hyps[i] = loaded.tokenizer.decode(search.tokens(state))
            bar.update(len(lens))
    return refs, hyps, time.perf_counter() - begin
