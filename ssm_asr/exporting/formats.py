"""The formats to which a model is exported: which parts each format has, and what its README says."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ssm_asr.checkpoint import Loaded
from ssm_asr.config import to_yaml
from ssm_asr.exporting import ctc, readme
from ssm_asr.exporting.directory import Written, write_onnx_files, write_torchscript
from ssm_asr.exporting.offline import offline_encoder
from ssm_asr.exporting.parts import decoder, joiner, packed_encoder
from ssm_asr.exporting.weights import export_weights
from ssm_asr.exporting.zipformer2 import native_encoder

CARRIERS = {"packed": packed_encoder, "zipformer2": native_encoder}


class Settings(NamedTuple):
    """The settings of an export.

    Attributes:
        chunk: in frames of 20 ms.
        left_context: in frames of 20 ms.
        carrier: a name from CARRIERS, which says how sherpa-onnx carries the states.
        precisions: names from `onnx_files.PRECISIONS`.
    """

    chunk: int
    left_context: int
    carrier: str
    precisions: list[str]


class Content(NamedTuple):
    """The files that a format has written, and two texts for its README: facts about them, and how to use them."""

    files: list[Written]
    facts: str
    usage: str


def export_sherpa(loaded: Loaded, settings: Settings, directory: Path) -> Content:
    """Writes a streaming transducer for sherpa-onnx."""
    model, chunk, left_context = loaded.model, settings.chunk, settings.left_context
    parts = [CARRIERS[settings.carrier](model, chunk, left_context), decoder(model), joiner(model)]
    files = write_onnx_files(parts, settings.precisions, directory)
    call = readme.transducer_call("from_transducer", settings.precisions[0])
    return Content(files, readme.streaming_facts(chunk, left_context), readme.streaming_usage(call, chunk))


def export_sherpa_offline(loaded: Loaded, settings: Settings, directory: Path) -> Content:
    """Writes a transducer that sherpa-onnx runs on whole utterances."""
    model = loaded.model
    files = write_onnx_files([offline_encoder(model), decoder(model), joiner(model)], settings.precisions, directory)
    call = readme.transducer_call("from_transducer", settings.precisions[0])
    return Content(files, "Whole utterances, no streaming.", readme.OFFLINE.format(constructor=call))


def export_sherpa_ctc(loaded: Loaded, settings: Settings, directory: Path) -> Content:
    """Writes a streaming encoder with its CTC head for sherpa-onnx."""
    chunk, left_context = settings.chunk, settings.left_context
    files = write_onnx_files([ctc.ctc_model(loaded.model, chunk, left_context)], settings.precisions, directory)
    call = f'from_zipformer2_ctc(tokens="tokens.txt", model="{files[0].name}", num_threads=1)'
    return Content(files, readme.streaming_facts(chunk, left_context), readme.streaming_usage(call, chunk))


def export_torchscript(loaded: Loaded, settings: Settings, directory: Path) -> Content:
    """Writes the streaming step of the encoder, the predictor and the joiner as TorchScript."""
    model, chunk, left_context = loaded.model, settings.chunk, settings.left_context
    encoder = packed_encoder(model, chunk, left_context)
    files = write_torchscript([encoder, decoder(model), joiner(model)], directory)
    usage = readme.torchscript_usage(chunk, int(encoder.metadata["d_model"]), model.config.context_size)
    return Content(files, readme.streaming_facts(chunk, left_context), usage)


def export_weight_files(loaded: Loaded, settings: Settings, directory: Path) -> Content:
    """Writes the weights for other programs."""
    export_weights(loaded, directory)
    return Content([], "Weights under icefall's names.", readme.weights_usage(loaded.experiment.model))


FORMATS: dict[str, Callable[[Loaded, Settings, Path], Content]] = {
    "sherpa": export_sherpa,
    "sherpa-offline": export_sherpa_offline,
    "sherpa-ctc": export_sherpa_ctc,
    "torchscript": export_torchscript,
    "weights": export_weight_files,
}
# The formats that are made for one chunk and one left context.
STREAMING = ("sherpa", "sherpa-ctc", "torchscript")


def write_export(loaded: Loaded, format_name: str, settings: Settings, directory: Path) -> list[Written]:
    """Writes the files of a format, tokens.txt, config.yaml and README.md into a directory.

    config.yaml is the configuration of the checkpoint, with the chunk and the left context of the export in `decode`.

    Args:
        loaded: an opened checkpoint.
        format_name: a name from FORMATS.
        settings: of the export.
        directory: an existing directory.

    Returns:
        The files that were compared with the model.

    Raises:
        ExportError: if a file does not compute what the model computes.
        ValueError: if the format does not have these settings, or cannot hold this model.
    """
    if settings.precisions != ["fp32"] and not format_name.startswith("sherpa"):
        raise ValueError(f"--precision {' '.join(settings.precisions)}: format {format_name} is in fp32; leave it out")
    if settings.carrier != "packed" and format_name != "sherpa":
        raise ValueError(f"--carrier {settings.carrier}: only format sherpa has it, not {format_name}; leave it out")
    loaded.tokenizer.save(directory)
    content = FORMATS[format_name](loaded, settings, directory)
    decode = dataclasses.replace(
        loaded.experiment.decode, chunk_frames=settings.chunk, left_context_frames=settings.left_context
    )
    experiment = dataclasses.replace(loaded.experiment, decode=decode)
    (directory / "config.yaml").write_text(to_yaml(experiment), encoding="utf-8")
    text = readme.readme(format_name, content.facts, content.usage, content.files)
    (directory / "README.md").write_text(text, encoding="utf-8")
    return content.files
