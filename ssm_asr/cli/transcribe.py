"""Turn speech into text: ssm-asr transcribe --checkpoint FILE AUDIO …

Prints the name and the text of each file, with a tab between them. Files have one channel and any rate (wav, flac, ogg,
mp3). A file that cannot be read is reported, and the others go on; the exit status is then 2.

With --stdin, live audio is recognised and its text appears as it comes, until the audio or Ctrl-C ends it. It is raw
(16 bits, little-endian, one channel) or wav; a microphone is

  arecord -q -f S16_LE -r 16000 -c 1 | ssm-asr transcribe --checkpoint averaged.pt --stdin

With --json, each result is a JSON object in a line of its own, with "file", "text", "tokens" and "times": the seconds
from the start of the audio to the output frame (40 ms) in which each token was emitted. Live audio has a line whenever
its text has changed, of which the last is final.
"""

import argparse
import json
import sys
from pathlib import Path

from ssm_asr import api
from ssm_asr.cli.arguments import decoding_arguments
from ssm_asr.cli.program import positive
from ssm_asr.data.features import AudioError
from ssm_asr.data.pipe import read_blocks


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audio", nargs="*", type=Path, metavar="AUDIO", help="audio files")
    decoding_arguments(parser)
    parser.add_argument("--stdin", action="store_true", help="recognise live audio from standard input")
    parser.add_argument(
        "--rate", type=positive, default=16000, metavar="HZ", help="sample rate of raw audio with --stdin (16000)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    options = parser.parse_args(arguments)
    if options.stdin == bool(options.audio):
        parser.error("give audio files, or --stdin")
    try:
        if options.stdin and sys.stdin is None:
            raise ValueError("--stdin: standard input is closed; pipe audio into it, as --help shows")
        if options.stdin and sys.stdin.isatty():
            raise ValueError("--stdin: standard input is a terminal; pipe audio into it, as --help shows")
        model = api.load(options.checkpoint, options.device)
        return _live(model, options) if options.stdin else _files(model, options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def _settings(options: argparse.Namespace) -> dict:
    """The options that are given, as arguments of the library: without them, it takes the checkpoint's."""
    given = {"chunk": options.chunk, "left": options.left, "method": options.method, "beam": options.beam}
    return {name: value for name, value in given.items() if value is not None}


def _files(model: api.Model, options: argparse.Namespace) -> int:
    """Transcribes files; the exit status is 2 if one of them cannot be read."""
    status = 0
    results = model.transcribe_each(options.audio, **_settings(options))
    for path, result in zip(options.audio, results, strict=True):
        if isinstance(result, AudioError):
            print(result, file=sys.stderr)
            status = 2
        elif options.json:
            _print_json(str(path), result)
        else:
            print(f"{path}\t{result.text}", flush=True)
    return status


def _live(model: api.Model, options: argparse.Namespace) -> int:
    """Recognises standard input, and prints text as it comes."""
    stream = model.stream(**_settings(options))
    shown = ""
    try:
        for samples_S in read_blocks(sys.stdin.buffer, options.rate):
            stream.push(samples_S)
            shown = _show_new(stream, shown, options.json)
    except KeyboardInterrupt:
        pass  # the usual end of a microphone: what was heard until then is still recognised
    except AudioError:
        if shown and not options.json:
            print(flush=True)  # the text so far ends its line before the error
        raise
    result = stream.finish()
    if options.json:
        _print_json("-", result)
    else:
        print(result.text[len(shown) :])
    return 0


def _show_new(stream: api.Stream, shown: str, as_json: bool) -> str:
    """Prints what is new since `shown`, and returns what is shown now; of text, only what stays as it is."""
    text = stream.result.text if as_json else stream.settled_text
    if text != shown and as_json:
        _print_json("-", stream.result)
    elif text != shown:
        print(text[len(shown) :], end="", flush=True)
    return text


def _print_json(file: str, result: api.Result) -> None:
    """Prints a result as a JSON object in a line."""
    fields = {"file": file, "text": result.text, "tokens": result.tokens, "times": result.times}
    print(json.dumps(fields, ensure_ascii=False), flush=True)
