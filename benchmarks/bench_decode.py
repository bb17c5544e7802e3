"""Times recognition of your cuts on a GPU or a CPU, part by part, beside a plain path.

    python benchmarks/bench_decode.py --cuts FILE --checkpoint FILE
    python benchmarks/bench_decode.py --cuts FILE --config FILE --tokens DIR

Without a checkpoint the model has random weights, and a bias for blank with which it finds 3.5 tokens a second. The
plain path launches kernel by kernel and asks the device at every frame for the symbols; its tokens are compared with
those of the recogniser, which replays captured graphs and asks rarely. Encoder and search get features that lie on the
device. "decode" is all that `ssm-asr decode` does after loading the model, from audio files to results, and "stream" is
`ssm-asr stream`, with many streams at once; both are timed when they run for the first time in this process and for the
second. A ratio is how many times as fast as the plain path.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lhotse import CutSet
from torch import Tensor

from ssm_asr.checkpoint import Loaded, load_model
from ssm_asr.cli.arguments import frames, frames_list
from ssm_asr.cli.program import positive, run
from ssm_asr.config import load_experiment
from ssm_asr.data.batches import Batch, eval_batches
from ssm_asr.data.tokens import Tokenizer
from ssm_asr.evaluation.offline import decode_cuts
from ssm_asr.evaluation.streaming import stream_cuts
from ssm_asr.evaluation.test_sets import read_test_cuts, workers_for
from ssm_asr.ops.devices import find_device
from ssm_asr.search.encoding import encode_as_streamed
from ssm_asr.search.offline import OfflineRecognizer
from ssm_asr.search.recognizer import StreamingRecognizer
from ssm_asr.search.scorer import TransducerScorer, context_of, context_tensor
from ssm_asr.transducer.model import Transducer

TOKENS_A_SECOND = 3.5
ROUNDS = 3


@torch.inference_mode()
def random_model(config: Path, tokens: Path, device: torch.device, batch: Batch) -> Loaded:
    """Makes a model with random weights that finds a natural number of tokens in the first utterances of a batch."""
    torch.manual_seed(0)
    experiment, tokenizer = load_experiment(config), Tokenizer.load(tokens)
    model = Transducer(experiment.model, tokenizer.vocab_size).to(device).eval()
    output = model.joiner.output_linear
    output.weight.mul_(20)
    low, high = 0.0, 200.0
    recognizer = OfflineRecognizer(Loaded(model, experiment, tokenizer, {}))
    lens_B = batch.feature_lens_B[:8]
    for _ in range(12):
        output.bias.zero_()
        output.bias[0] = bias = (low + high) / 2
        found = sum(len(result.tokens) for result in recognizer.recognise(batch.features_BTF[:8], lens_B))
        too_many = found > TOKENS_A_SECOND * float(lens_B.sum()) / 100
        low, high = (bias, high) if too_many else (low, bias)
    return Loaded(model, experiment, tokenizer, {})


def plain_search(scorer: TransducerScorer, encoder_BTJ: Tensor, lens: list[int]) -> list[list[int]]:
    """Searches frame by frame, the host asking for the best symbols of every frame."""
    found: list[list[int]] = [[] for _ in lens]
    for t in range(max(lens)):
        decoder_BJ = scorer.predict(context_tensor([context_of(tokens, scorer) for tokens in found]))
        best = scorer.join(encoder_BTJ[:, t], decoder_BJ).argmax(dim=-1).tolist()
        for b, symbol in enumerate(best):
            if t < lens[b] and symbol not in (scorer.blank_id, scorer.unk_id):
                found[b].append(symbol)
    return found


def median_ms(call: Callable[[], object], device: torch.device) -> float:
    """Returns the median time of a call, after two that are not counted."""
    times = []
    for round_ in range(ROUNDS + 2):
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if round_ >= 2:
            times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


@torch.inference_mode()
def time_parts(recognizer: OfflineRecognizer, batches: list[Batch]) -> None:
    """Prints the times of encoder and search over all batches, and how many utterances have other tokens."""
    scorer, model, device = recognizer._scorer, recognizer.model, recognizer.device
    audio_s = sum(float(batch.feature_lens_B.sum()) for batch in batches) / 100
    settings = recognizer.chunk, recognizer.left_context

    def plain(batch: Batch) -> tuple[Tensor, list[int]]:
        encoded_BSD, lens = encode_as_streamed(model, batch.features_BTF, batch.feature_lens_B, *settings)
        return scorer.project(encoded_BSD), lens

    encoded = [plain(batch) for batch in batches]
    starts = [[recognizer._search.start() for _ in lens] for _, lens in encoded]
    differing = 0
    for batch, pair, start in zip(batches, encoded, starts, strict=True):
        encoder_BTJ, lens = recognizer._encode(batch.features_BTF, batch.feature_lens_B)
        states = recognizer._search.step(encoder_BTJ, lens, start)
        found = [list(recognizer._search.tokens(state)) for state in states]
        differing += sum(a != b for a, b in zip(plain_search(scorer, *pair), found, strict=True))
    total = sum(len(lens) for _, lens in encoded)
    print(f"{differing} of {total} utterances have other tokens than on the plain path")
    parts: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "encoder": (
            lambda: [plain(batch) for batch in batches],
            lambda: [recognizer._encode(batch.features_BTF, batch.feature_lens_B) for batch in batches],
        ),
        "search": (
            lambda: [plain_search(scorer, *pair) for pair in encoded],
            lambda: [recognizer._search.step(*pair, start) for pair, start in zip(encoded, starts, strict=True)],
        ),
        "both": (
            lambda: [plain_search(scorer, *plain(batch)) for batch in batches],
            lambda: [recognizer.recognise(batch.features_BTF, batch.feature_lens_B) for batch in batches],
        ),
    }
    print("| part | plain ms | ms | ratio | audio s/s |\n|---|---|---|---|---|")
    for name, sides in parts.items():
        plain_ms, ms = (median_ms(call, device) for call in sides)
        print(f"| {name} | {plain_ms:.1f} | {ms:.1f} | {plain_ms / ms:.2f} | {1000 * audio_s / ms:.0f} |", flush=True)


def time_programs(
    recognizer: OfflineRecognizer, loaded: Loaded, cuts: CutSet, chunks: list[int], batch_s: float
) -> None:
    """Prints how fast `decode` and `stream` are, from audio files to texts."""
    audio_s = sum(cut.duration for cut in cuts)
    decoded = {}
    for which in ("first", "second"):
        begin = time.perf_counter()
        decoded = decode_cuts(recognizer, cuts, batch_s).hyps
        print(f"decode, {which} time: {audio_s / (time.perf_counter() - begin):.0f} s/s", flush=True)
    for chunk in chunks:
        streaming = StreamingRecognizer(loaded, chunk, recognizer.left_context)
        for which in ("first", "second"):
            begin = time.perf_counter()
            hyps, facts = stream_cuts(streaming, cuts, lambda: None)[1:]
            took_s = time.perf_counter() - begin
            line = f"stream at {20 * chunk} ms, {facts['streams']} at once, {which} time: {audio_s / took_s:.0f} s/s"
            print(f"{line}; {facts['chunk_compute_ms_median']:.1f} ms a chunk of all", flush=True)
        if chunk == recognizer.chunk:
            print(f"  {sum(hyps[i] != decoded[i] for i in hyps)} of {len(hyps)} texts differ from decode's")


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=Path, required=True, help="lhotse cuts with transcripts and audio")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint")
    parser.add_argument("--config", type=Path, help="a configuration, for random weights")
    parser.add_argument("--tokens", type=Path, help="directory of tokens, for random weights")
    parser.add_argument("--chunk", type=frames, help="chunk of decode (default: the configuration's)")
    parser.add_argument("--left", type=frames, help="left context (default: the configuration's)")
    parser.add_argument("--stream-chunks", type=frames_list, default="320ms", help="of stream (default: 320ms)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--max-duration-s", type=positive, default=600, help="audio a batch (default: 600)")
    parser.add_argument("--programs", action="store_true", help="time decode and stream only, not their parts")
    parser.add_argument("--limit", type=int, default=0, help="utterances to take; 0 is all (default: 0)")
    options = parser.parse_args()
    if (options.checkpoint is None) == (options.config is None or options.tokens is None):
        raise ValueError("give --checkpoint, or --config and --tokens")
    device = find_device(options.device)
    cuts = read_test_cuts(options.cuts, from_audio=True, limit=options.limit)
    tokenizer = load_model(options.checkpoint).tokenizer if options.checkpoint else Tokenizer.load(options.tokens)
    workers = workers_for(device)
    batches = list(
        eval_batches(cuts, tokenizer, max_duration_s=options.max_duration_s, num_workers=workers, device=device)
    )
    if options.checkpoint:
        loaded = load_model(options.checkpoint, device)
    else:
        loaded = random_model(options.config, options.tokens, device, batches[-1])
    recognizer = OfflineRecognizer(loaded, options.chunk, options.left, "greedy")
    if not options.programs:
        time_parts(recognizer, batches)
    time_programs(recognizer, loaded, cuts, options.stream_chunks, options.max_duration_s)


if __name__ == "__main__":
    sys.exit(run(main))
