"""The programs: `ssm-asr VERB`, or `python -m ssm_asr VERB`, and for most also `python -m ssm_asr.VERB`.

Each is a module of this package with a function `main`, which reads the command line and starts what libraries do.
"""

import importlib
import io
import sys
from typing import NoReturn

VERBS = {
    "transcribe": "turn audio files or live audio into text",
    "prepare": "check a corpus, compute features, make tokens and noises",
    "train": "train a transducer, or go on with it",
    "average": "average the weights over the last epochs",
    "decode": "recognise cuts whole, masked to chunks, and score them",
    "stream": "recognise audio files or cuts chunk by chunk, with lag and real-time factor",
    "report": "tabulate what decode and stream found",
    "compare": "compare models over chunk widths and state bytes, with figures and one page",
    "describe": "parameters, streaming state, rates and look-ahead of a configuration",
    "export": "write ONNX for sherpa-onnx, TorchScript, or plain weights",
    "check-export": "run an export in stock sherpa-onnx and compare its tokens with the model's",
    "check-streaming": "measure how far streaming is from the masked pass",
    "long-form": "measure the error rate against the length of the audio",
    "import-icefall": "take over published Zipformer weights",
}

EXPORT_PACKAGES = ("onnx", "onnxruntime", "sherpa_onnx")  # the extra "export" of setup.py


def start(verb: str) -> NoReturn:
    """Runs a program with the arguments of this process, and ends the process with its exit status."""
    from ssm_asr.cli.program import run

    sys.argv[0] = f"ssm-asr {verb}"  # argparse calls the program so
    for stream in (sys.stdout, sys.stderr):  # names of files and texts may hold what a terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if verb == "train":  # which has workers; what they need is imported beside the program
        from ssm_asr.data.parallel import LOADING, start_server

        start_server(LOADING)
    try:
        program = importlib.import_module(f"ssm_asr.cli.{verb.replace('-', '_')}")
    except ModuleNotFoundError as error:
        if error.name not in EXPORT_PACKAGES:
            raise
        print(f"ssm-asr {verb}: needs the package {error.name}; pip install 'ssm-asr[export]'", file=sys.stderr)
        sys.exit(2)
    sys.exit(run(program.main))


def main() -> NoReturn:
    """Runs the command `ssm-asr`."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in VERBS:
        del sys.argv[1]
        start(verb)
    from ssm_asr.cli.program import run

    sys.exit(run(lambda: _answer(verb)))


def _answer(verb: str) -> int:
    """Prints the version, the verbs, or that there is no such verb; returns the exit status."""
    if verb == "--version":
        from ssm_asr import __version__

        print(f"ssm-asr {__version__}")
        return 0
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:{width}}  {text}" for name, text in VERBS.items())
    usage = f"usage: ssm-asr VERB [options]\n\n{verbs}\n\n`ssm-asr VERB --help` lists the options of one."
    if verb in ("-h", "--help"):
        print(usage)
        return 0
    print(f"ssm-asr: no verb {verb!r}\n{usage}", file=sys.stderr)
    return 2
