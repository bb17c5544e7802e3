"""Recognition of test sets by whole utterances, masked to chunks as streaming would be."""

import time

from lhotse import CutSet
from tqdm import tqdm

from ssm_asr.data.batches import eval_batches
from ssm_asr.evaluation.results import Decoded, settings_facts
from ssm_asr.evaluation.test_sets import workers_for
from ssm_asr.search.offline import OfflineRecognizer


def decode_cuts(recognizer: OfflineRecognizer, cuts: CutSet, max_duration_s: float) -> Decoded:
    """Decodes every cut, in batches of at most `max_duration_s` seconds of audio.

    On a GPU, other processes read the audio, and the GPU computes the features.

    Raises:
        CutError: if the audio or features of a cut cannot be read.
    """
    refs: dict[str, str] = {}
    hyps: dict[str, str] = {}
    begin = time.perf_counter()
    with tqdm(total=len(cuts), desc="decode", unit="utt") as bar:
        for batch in eval_batches(
            cuts,
            recognizer.tokenizer,
            max_duration_s=max_duration_s,
            num_workers=workers_for(recognizer.device),
            device=recognizer.device,
        ):
            results = recognizer.recognise(batch.features_BTF, batch.feature_lens_B)
            for i, text, result in zip(batch.ids, batch.texts, results, strict=True):
                refs[i], hyps[i] = text, result.text
            bar.update(len(results))
    seconds, audio_s = time.perf_counter() - begin, sum(cut.duration for cut in cuts)
    facts = {
        "mode": "chunk-masked" if recognizer.chunk > 0 else "whole utterance",
        **settings_facts(recognizer),
        "state_bytes": None,
        "audio_s": audio_s,
        "real_time_factor": seconds / audio_s,
    }
    return Decoded(refs, hyps, facts)
