"""Recognition chunk by chunk, as in production, with the time that it takes."""

import time
from dataclasses import dataclass, field

import numpy as np
from lhotse import CutSet
from tqdm import tqdm

from ssm_asr import units
from ssm_asr.data.features import cut_samples
from ssm_asr.data.filtering import text_of
from ssm_asr.encoder.subsampling import CHUNK_OVERLAP
from ssm_asr.search.recognizer import Stream, StreamingRecognizer

BLOCK_SAMPLES = units.SAMPLE_RATE_HZ // 10


@dataclass
class Timing:
    """Computation of every chunk and of the features, and the audio that it was for."""

    chunk_ms: list[float] = field(default_factory=list)
    features_ms: float = 0.0
    audio_s: float = 0.0

    def facts(self, chunk_frames: int) -> dict[str, float]:
        """Milliseconds a chunk, real-time factor, and lag: how long after the first sound of a chunk its text is there.

        The lag takes a slow chunk, the 95 % quantile.
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

    def text(self, chunk_frames: int) -> str:
        """`facts` for a reader."""
        facts = self.facts(chunk_frames)
        return (
            f"{facts['chunk_compute_ms_median']:.1f} ms a chunk (95 % below {facts['chunk_compute_ms_p95']:.1f}), "
            f"lag {facts['lag_ms']:.0f} ms, real-time factor {facts['real_time_factor']:.3f}"
        )


def recognise(recognizer: StreamingRecognizer, samples_S: np.ndarray, timing: Timing, show: bool) -> str:
    """Streams one recording; with `show`, prints every partial result that differs from the last."""
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
    recognizer: StreamingRecognizer, stream: Stream, timing: Timing, shown: str, print_at_s: float | None
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


def stream_cuts(recognizer: StreamingRecognizer, cuts: CutSet) -> tuple[dict[str, str], dict[str, str], Timing]:
    """Recognises cuts one after the other: references and hypotheses by cut id, and the timing."""
    timing = Timing()
    refs: dict[str, str] = {}
    hyps: dict[str, str] = {}
    for cut in tqdm(cuts, total=len(cuts), desc="stream", unit="utt"):
        refs[cut.id] = text_of(cut)
        hyps[cut.id] = recognise(recognizer, cut_samples(cut), timing, show=False)
    return refs, hyps, timing
