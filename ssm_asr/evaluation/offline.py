"""Recognition of test sets by whole utterances, masked to chunks as streaming would be."""

import time

from lhotse import CutSet
from tqdm import tqdm

from ssm_asr.data.batches import eval_batches
from ssm_asr.data.filtering import text_of
from ssm_asr.evaluation.results import Decoded, Faults, settings_facts
from ssm_asr.evaluation.test_sets import workers_for
from ssm_asr.search.offline import OfflineRecognizer


def decode_cuts(recognizer: OfflineRecognizer, cuts: CutSet, max_duration_s: float) -> Decoded:
    """Decodes every cut, in batches of at most `max_duration_s` seconds of audio.

    On a GPU, other processes read the audio, and the GPU computes the features. A cut that cannot be read has no
    hypothesis, so that all its words count as deleted, and what is wrong with it goes to stderr and to the facts.

    Raises:
        CutError: if no cut can be read.
    """
    refs = {cut.id: text_of(cut) for cut in cuts}
    hyps: dict[str, str] = {}
    faults = Faults()
    begin = time.perf_counter()
    with tqdm(total=len(cuts), desc="decode", unit="utt") as bar:
        for batch in eval_batches(
            cuts,
            recognizer.tokenizer,
            max_duration_s=max_duration_s,
            num_workers=workers_for(recognizer.device),
            device=recognizer.device,
            on_fault=faults.add,
        ):
            results = recognizer.recognise(batch.features_BTF, batch.feature_lens_B)
            hyps |= {i: result.text for i, result in zip(batch.ids, results, strict=True)}
            bar.update(len(results))
    seconds, audio_s = time.perf_counter() - begin, sum(cut.duration for cut in cuts)
    faults.require_some(hyps)
    facts = {
        "mode": "chunk-masked" if recognizer.chunk > 0 else "whole utterance",
        **settings_facts(recognizer),
        "state_bytes": None,
        "audio_s": audio_s,
        "real_time_factor": seconds / audio_s,
        "faults": faults.found,
    }
    return Decoded(refs, hyps, facts)
