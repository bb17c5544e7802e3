"""Recognition of recordings chunk by chunk, as in production, with the time that it takes.

Shapes: S samples, T feature frames.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lhotse import CutSet
from torch import Tensor

from ssm_asr import units
from ssm_asr.data.batches import eval_batches
from ssm_asr.data.errors import CutError
from ssm_asr.data.features import cut_samples
from ssm_asr.data.filtering import text_of
from ssm_asr.encoder.subsampling import CHUNK_OVERLAP
from ssm_asr.evaluation.describe import state_bytes
from ssm_asr.evaluation.results import Decoded, Faults, settings_facts
from ssm_asr.evaluation.test_sets import workers_for
from ssm_asr.search.audio_stream import AudioStream
from ssm_asr.search.recognizer import StreamingRecognizer

BLOCK_SAMPLES = units.SAMPLE_RATE_HZ // 10  # audio comes 100 ms at a time
STREAMS = {"cpu": 1, "cuda": 128}  # that are recognised at once; a GPU takes as long for one
BATCH_S = 200.0  # audio that a process computes the features of at once, where many streams are recognised


@dataclass
class Timing:
    """The time that the chunks and the features of some audio took to compute.

    Attributes:
        chunk_ms: the computation of every chunk.
        features_ms: the computation of all features, where they are computed as the audio comes.
        audio_s: the duration of the audio.
    """

    chunk_ms: list[float] = field(default_factory=list)
    features_ms: float = 0.0
    audio_s: float = 0.0

    def facts(self, chunk_frames: int) -> dict[str, float]:
        """Returns milliseconds a chunk, real-time factor, and lag.

        The lag is the time from the first sound of a chunk until its text is there, if its computation takes as long
        as the 95 % quantile of all.
        """
        times_ms = np.array(self.chunk_ms or [0.0])
        wait_ms = units.chunk_ms(chunk_frames) + CHUNK_OVERLAP * units.FRAME_SHIFT_MS
        return {
            "chunk_compute_ms_median": float(np.median(times_ms)),
            "chunk_compute_ms_p95": float(np.quantile(times_ms, 0.95)),
            "lag_ms": wait_ms + float(np.quantile(times_ms, 0.95)),
            "real_time_factor": float((times_ms.sum() + self.features_ms) / 1000 / max(self.audio_s, 1e-9)),
            "audio_s": self.audio_s,
        }


def timing_text(facts: dict[str, Any]) -> str:
    """Says for a reader what `Timing.facts` holds."""
    return (
        f"{facts['chunk_compute_ms_median']:.1f} ms a chunk (95 % below {facts['chunk_compute_ms_p95']:.1f}), "
        f"lag {facts['lag_ms']:.0f} ms, real-time factor {facts['real_time_factor']:.3f}"
    )


def recognise(recognizer: StreamingRecognizer, samples_S: np.ndarray, timing: Timing, show: bool) -> str:
    """Streams one recording in blocks of 100 ms, and returns its text.

    Args:
        timing: the times of this recording are added to it.
        show: whether to print every partial result that differs from the last.
    """
    stream = recognizer.open()
    shown = ""
    for start in range(0, len(samples_S), BLOCK_SAMPLES):
        begin = time.perf_counter()
        stream.accept(samples_S[start : start + BLOCK_SAMPLES])
        timing.features_ms += 1000 * (time.perf_counter() - begin)
        end_s = min(len(samples_S), start + BLOCK_SAMPLES) / units.SAMPLE_RATE_HZ
        shown = _decode_ready(recognizer, stream, timing, shown, end_s if show else None)
    recognizer.finish(stream)
    _decode_ready(recognizer, stream, timing, shown, len(samples_S) / units.SAMPLE_RATE_HZ if show else None)
    timing.audio_s += len(samples_S) / units.SAMPLE_RATE_HZ
    return recognizer.text(stream)


def _decode_ready(
    recognizer: StreamingRecognizer, stream: AudioStream, timing: Timing, shown: str, print_at_s: float | None
) -> str:
    while recognizer.ready(stream):
        begin = time.perf_counter()
        recognizer.decode([stream])
        timing.chunk_ms.append(1000 * (time.perf_counter() - begin))
        text = recognizer.text(stream)
        if print_at_s is not None and text != shown:
            print(f"  {print_at_s:7.2f} s  {text}", flush=True)
            shown = text
    return shown


def stream_cuts(
    recognizer: StreamingRecognizer, cuts: CutSet, advance: Callable[[], Any], streams: int | None = None
) -> Decoded:
    """Streams cuts, one after the other or many at once. What else is recognised makes no difference but for rounding.

    A cut that cannot be read has no hypothesis, so that all its words count as deleted, and what is wrong with it goes
    to stderr and to the facts.

    Args:
        advance: is called after every cut.
        streams: how many cuts are recognised at once, by default one on a CPU and 128 on a GPU. One gets its audio in
            blocks of 100 ms; many get their features from other processes, and a chunk's time is that of all streams.

    Raises:
        CutError: if no cut can be read.
    """
    streams = STREAMS[recognizer.device.type] if streams is None else streams
    timing = Timing()
    refs = {cut.id: text_of(cut) for cut in cuts}
    hyps: dict[str, str] = {}
    faults = Faults()
    if streams == 1:
        for cut in cuts:
            try:
                hyps[cut.id] = recognise(recognizer, cut_samples(cut), timing, show=False)
            except CutError as error:
                faults.add(str(error))
            advance()
    else:
        for name, text in _recognise_together(recognizer, _features(recognizer, cuts, faults), timing, streams):
            hyps[name] = text
            advance()
        timing.audio_s = sum(cut.duration for cut in cuts if cut.id in hyps)
    faults.require_some(hyps)
    facts = {
        "mode": "streaming",
        "streams": streams,
        **settings_facts(recognizer),
        "state_bytes": state_bytes(recognizer.open().state.batch),
        **timing.facts(recognizer.chunk),
        "faults": faults.found,
    }
    return Decoded(refs, hyps, facts)


def _features(recognizer: StreamingRecognizer, cuts: CutSet, faults: Faults) -> Iterator[tuple[str, Tensor]]:
    """Yields the id and the features (T, F) of every cut's audio, long ones first, which other processes compute."""
    workers = workers_for(recognizer.device)
    options: dict[str, Any] = {"max_duration_s": BATCH_S, "num_workers": workers, "on_fault": faults.add}
    for batch in eval_batches(cuts.drop_features(), recognizer.tokenizer, **options):
        for name, features_TF, length in zip(batch.ids, batch.features_BTF, batch.feature_lens_B.tolist(), strict=True):
            yield name, features_TF[:length]


def _recognise_together(
    recognizer: StreamingRecognizer, features: Iterable[tuple[str, Tensor]], timing: Timing, streams: int
) -> Iterator[tuple[str, str]]:
    """Streams recordings, so many at once, and yields the id and the text of each when it ends."""
    waiting = iter(features)
    active: dict[str, AudioStream] = {}
    while True:
        while len(active) < streams and (new := next(waiting, None)):
            name, features_TF = new
            active[name] = recognizer.open()
            active[name].accept_features(features_TF)
            recognizer.finish(active[name])
        if not active:
            return
        begin = time.perf_counter()
        recognizer.decode([stream for stream in active.values() if recognizer.ready(stream)])
        timing.chunk_ms.append(1000 * (time.perf_counter() - begin))
        for name, stream in list(active.items()):
            if not recognizer.ready(stream):
                yield name, recognizer.text(active.pop(name))
