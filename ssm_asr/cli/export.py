"""Export a model: ssm-asr export --checkpoint FILE --format FORMAT --out DIR [--chunk TIME] [--left TIME]

Formats:
  sherpa          streaming transducer for sherpa-onnx: encoder, decoder and joiner in ONNX, tokens.txt
  sherpa-offline  transducer for whole utterances, without chunks
  sherpa-ctc      streaming CTC head for sherpa-onnx: model.onnx, tokens.txt
  torchscript     streaming step, predictor and joiner in TorchScript
  weights         safetensors under icefall's names, and the configuration

Every file is compared with the model before the directory appears; its README.md has the commands that use it.
"""

import argparse
import sys
from pathlib import Path

from ssm_asr.checkpoint import load_model
from ssm_asr.cli.arguments import chunk_arguments
from ssm_asr.exporting.directory import whole_directory
from ssm_asr.exporting.formats import CARRIERS, FORMATS, STREAMING, Settings, write_export
from ssm_asr.exporting.onnx_files import PRECISIONS
from ssm_asr.search.encoding import streaming_context


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="checkpoint, best from average")
    parser.add_argument("--format", required=True, choices=list(FORMATS), help="see above")
    parser.add_argument("--out", required=True, type=Path, help="directory to make; an earlier export is replaced")
    chunk_arguments(parser)
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=["fp32"],
        help="of ONNX files, several at once if you like: fp16 stores half the bytes and computes in fp32; "
        "int8 is dynamic quantisation (default: fp32)",
    )
    parser.add_argument(
        "--carrier",
        choices=list(CARRIERS),
        default="packed",
        help="how sherpa-onnx carries the states of --format sherpa: packed in one vector, for every encoder, or "
        "as a zipformer2 has them, for a Zipformer with left context (default: packed)",
    )
    options = parser.parse_args(arguments)
    try:
        loaded = load_model(options.checkpoint)
        decode = loaded.experiment.decode
        chunk = decode.chunk_frames if options.chunk is None else options.chunk
        left_context = decode.left_context_frames if options.left is None else options.left
        if options.format not in STREAMING and (options.chunk, options.left) != (None, None):
            raise ValueError(f"--chunk, --left: format {options.format} is for any; leave them out")
        if options.format in STREAMING:
            left_context = streaming_context(loaded.experiment.model.encoder, chunk, left_context)
        settings = Settings(chunk, left_context, options.carrier, options.precision)
        with whole_directory(options.out) as path:
            written = write_export(loaded, options.format, settings, path)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for file in written:
        print(f"{options.out / file.name}: {file.size_bytes:,} bytes, differs from PyTorch by {file.difference:.1e}")
    print(f"{options.out / 'README.md'} says how to use it")
    return 0
