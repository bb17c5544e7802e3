"""Checks that an export, run by stock sherpa-onnx, finds the tokens that the model itself finds.

Shapes: S samples.
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sherpa_onnx
from tqdm import tqdm

from ssm_asr import units
from ssm_asr.data.features import cut_samples
from ssm_asr.data.filtering import text_of
from ssm_asr.evaluation.scoring import paired_bootstrap, score
from ssm_asr.exporting.onnx_files import file_name
from ssm_asr.search.recognizer import StreamingRecognizer

BLOCK_SAMPLES = units.SAMPLE_RATE_HZ // 10
PAUSE_S = 1.6  # a pause of 1.2 s ends a segment that has words
# An endpoint without words makes sherpa-onnx forget the last tokens and the encoder's state, so that what follows may
# differ. These endpoints, by default after 2.4 s, are put off for ever.
WORDLESS_ENDPOINT_S = 1e6
MOST_WORSE = 0.003  # how far the error rate of another precision may be above the one of the reference
MOST_GROWTH_MB = 8.0  # how much the resident memory may grow in the last two thirds of a long stream


def open_export(directory: Path, precision: str, endpoints: bool) -> sherpa_onnx.OnlineRecognizer:
    """Opens an export as any user of sherpa-onnx would.

    Args:
        precision: fp32, fp16 or int8.
        endpoints: whether pauses end a segment.

    Raises:
        ValueError: if a file is missing, for which sherpa-onnx would end the process.
    """
    files = {part: directory / file_name(part, precision) for part in ("encoder", "decoder", "joiner")}
    files["tokens"] = directory / "tokens.txt"
    for path in files.values():
        if not path.is_file():
            raise ValueError(f"{path}: no such file; export with --format sherpa --precision {precision}")
    names = {name: str(path) for name, path in files.items()}
    return sherpa_onnx.OnlineRecognizer.from_transducer(
        **names,
        num_threads=1,
        enable_endpoint_detection=endpoints,
        rule1_min_trailing_silence=WORDLESS_ENDPOINT_S,
        decoding_method="greedy_search",
    )


class Client:
    """A stream of sherpa-onnx.

    Attributes:
        chunks: the number of chunks decoded.
        endpoints: the number of segments that have ended.
    """

    def __init__(self, recognizer: sherpa_onnx.OnlineRecognizer) -> None:
        self.recognizer, self.stream = recognizer, recognizer.create_stream()
        self.chunks = self.endpoints = 0
        self._ended: list[str] = []  # tokens of segments that have ended

    @property
    def tokens(self) -> list[str]:
        """The tokens recognised so far, in all segments."""
        return [*self._ended, *self.recognizer.tokens(self.stream)]

    def accept(self, samples_S: np.ndarray) -> None:
        """Takes more audio, at 16 kHz."""
        self.stream.accept_waveform(units.SAMPLE_RATE_HZ, samples_S)

    def end_segment(self) -> None:
        """Begins a new segment if there was an endpoint, as applications do after every chunk."""
        if self.recognizer.is_endpoint(self.stream):
            self._ended += self.recognizer.tokens(self.stream)
            self.endpoints += 1
            self.recognizer.reset(self.stream)


def decode_ready(clients: list[Client]) -> None:
    """Decodes until no stream has a chunk left; the streams that have one are decoded together."""
    while ready := [client for client in clients if client.recognizer.is_ready(client.stream)]:
        ready[0].recognizer.decode_streams([client.stream for client in ready])
        for client in ready:
            client.chunks += 1
            client.end_segment()


def blocks(samples_S: np.ndarray, tail_S: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the audio and the silence after it, 100 ms at a time."""
    padded_S = np.concatenate([samples_S, tail_S])
    for start in range(0, len(padded_S), BLOCK_SAMPLES):
        yield padded_S[start : start + BLOCK_SAMPLES]


def decode_together(
    recognizer: sherpa_onnx.OnlineRecognizer, utterances: list[np.ndarray], tail_S: np.ndarray, streams: int
) -> list[Client]:
    """Decodes all utterances, `streams` of them at once; a new one starts as soon as another has ended."""
    clients = [Client(recognizer) for _ in utterances]
    waiting = list(zip(clients, (blocks(samples_S, tail_S) for samples_S in utterances), strict=True))
    active: list[tuple[Client, Iterator[np.ndarray]]] = []
    with tqdm(total=len(waiting), desc="sherpa-onnx", unit="utt") as bar:
        while waiting or active:
            if waiting and len(active) < streams:  # one in each round, so that streams are of different ages
                active.append(waiting.pop(0))
            for pair in list(active):
                block_S = next(pair[1], None)
                if block_S is None:
                    pair[0].stream.input_finished()
                    active.remove(pair)
                    decode_ready([pair[0]])
                    bar.update()
                else:
                    pair[0].accept(block_S)
            decode_ready([client for client, _ in active])
    return clients


def reference_tokens(
    recognizer: StreamingRecognizer, audio: Iterator[np.ndarray], symbols: list[str], chunks: int
) -> list[str]:
    """Recognises as many chunks of audio as the runtime has decoded, and spells the tokens as the runtime does."""
    stream = recognizer.open()
    remaining = chunks
    for block_S in audio:
        stream.accept(block_S)
        while remaining and recognizer.ready(stream):
            recognizer.decode([stream])
            remaining -= 1
    recognizer.finish(stream)
    for _ in range(remaining):
        recognizer.decode([stream])
    return [symbols[token].replace("▁", " ") for token in recognizer.tokens(stream)]


def long_audio(cuts: list, hours: float, what: str) -> Iterator[np.ndarray]:
    """Yields utterances with pauses between them, 100 ms at a time, and shows a progress bar.

    Args:
        hours: the utterances are repeated for so long; 0 takes each once.
        what: the name of the progress bar.
    """
    pause_S = np.zeros(int(PAUSE_S * units.SAMPLE_RATE_HZ), dtype=np.float32)
    total_s = 3600 * hours or sum(cut.duration + PAUSE_S for cut in cuts)
    given_s = 0.0
    with tqdm(total=round(total_s), desc=what, unit="s") as bar:
        for cut in itertools.cycle(cuts) if hours else cuts:
            yield from blocks(cut_samples(cut), pause_S)
            given_s += cut.duration + PAUSE_S
            bar.update(min(round(given_s), bar.total or 0) - bar.n)
            if hours and given_s >= total_s:
                return


def resident_mb() -> float:
    """Returns the memory of this process that is in RAM, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def decode_long(recognizer: sherpa_onnx.OnlineRecognizer, audio: Iterator[np.ndarray]) -> tuple[Client, list[float]]:
    """Decodes audio in one stream; returns it, and the resident memory in MB after every minute of audio."""
    client, resident = Client(recognizer), []
    for count, block_S in enumerate(audio, start=1):
        client.accept(block_S)
        decode_ready([client])
        if count % (60 * units.SAMPLE_RATE_HZ // BLOCK_SAMPLES) == 0:
            resident.append(resident_mb())
    return client, resident


def check_utterances(
    export: Path, precision: str, reference: StreamingRecognizer, cuts: list, streams: int, unit: str
) -> bool:
    """Checks every utterance by itself, several at once, and prints what came out.

    Args:
        streams: the number of streams at once.
        unit: word or char.

    Returns:
        Whether all tokens are equal (fp32), or the error rate is not significantly above the reference's by more than
        MOST_WORSE (other precisions).
    """
    utterances = [cut_samples(cut) for cut in cuts]
    # A chunk is decoded when one frame more than it takes is there.
    tail_S = np.zeros((reference.frames_needed + 1) * units.FRAME_SHIFT_SAMPLES, dtype=np.float32)
    clients = decode_together(open_export(export, precision, False), utterances, tail_S, streams)
    symbols = reference.tokenizer.symbols
    pairs = {}
    for cut, samples_S, client in zip(cuts, utterances, tqdm(clients, desc="reference", unit="utt"), strict=True):
        pairs[cut.id] = client.tokens, reference_tokens(reference, blocks(samples_S, tail_S), symbols, client.chunks)
    differ = [i for i, (actual, expected) in pairs.items() if actual != expected]
    print(f"{precision}: {len(pairs) - len(differ)} of {len(pairs)} token sequences equal, {streams} streams at once")
    for i in differ[:3]:
        print(f"  {i}: sherpa-onnx {''.join(pairs[i][0])!r}, reference {''.join(pairs[i][1])!r}")
    refs = {cut.id: text_of(cut) for cut in cuts}
    actual, expected = (
        score(refs, {i: "".join(pair[side]).strip() for i, pair in pairs.items()}, unit) for side in (0, 1)
    )
    difference, (low, high), _ = paired_bootstrap(expected.errors_U, actual.errors_U, actual.totals_U)
    print(
        f"{precision}: {unit} error rate {100 * actual.rate:.2f} %, reference {100 * expected.rate:.2f} %, "
        f"difference {100 * difference:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
    )
    if precision == "fp32":
        return not differ
    return difference <= MOST_WORSE or low <= MOST_WORSE  # the interval of a single utterance is not a number


def check_long(export: Path, reference: StreamingRecognizer, cuts: list, hours: float) -> bool:
    """Checks all utterances in one stream with endpoints, in fp32, and prints what came out.

    Returns:
        Whether all tokens are equal, endpoints were found, and the memory did not grow.
    """
    client, resident = decode_long(open_export(export, "fp32", True), long_audio(cuts, hours, "one stream"))
    audio = long_audio(cuts, hours, "reference")
    expected = reference_tokens(reference, audio, reference.tokenizer.symbols, client.chunks)
    equal = client.tokens == expected
    grown = resident[-1] - resident[len(resident) // 3] if resident else 0.0
    print(
        f"one stream of {len(resident)} min: {len(client.tokens)} tokens {'equal' if equal else 'DIFFER'}, "
        f"{client.endpoints} endpoints\n  resident MB by minute: {' '.join(f'{mb:.0f}' for mb in resident)}"
    )
    wrong = []
    if not equal:
        wrong.append("other tokens")
    if client.tokens and not client.endpoints:
        wrong.append("no endpoint")
    if grown > MOST_GROWTH_MB:
        wrong.append(f"memory has grown by {grown:.0f} MB")
    if wrong:
        print(f"one stream: {', '.join(wrong)}")
    return not wrong
