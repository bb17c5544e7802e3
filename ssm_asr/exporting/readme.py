"""Writes the README of an export, which says what the export holds and gives the commands that use it."""

from ssm_asr import units
from ssm_asr.encoder.subsampling import CHUNK_OVERLAP
from ssm_asr.exporting import check
from ssm_asr.exporting.directory import MARK, Written
from ssm_asr.exporting.weights import icefall_options
from ssm_asr.transducer.model import ModelConfig

# A test runs each of these commands as it stands, with an audio file in place of audio.wav.
STREAMING = """```bash
pip install sherpa-onnx soundfile
python - audio.wav <<'EOF'
import sys
import numpy as np
import sherpa_onnx
import soundfile

recognizer = sherpa_onnx.OnlineRecognizer.{constructor}
samples, rate_hz = soundfile.read(sys.argv[1], dtype="float32")
stream = recognizer.create_stream()
stream.accept_waveform(rate_hz, samples)
# Without {tail_ms} ms of silence at the end the last words are lost.
stream.accept_waveform(rate_hz, np.zeros(rate_hz * {tail_ms} // 1000, dtype=np.float32))
stream.input_finished()
while recognizer.is_ready(stream):
    recognizer.decode_stream(stream)
print(recognizer.get_result(stream))
EOF
```
"""

OFFLINE = """```bash
pip install sherpa-onnx soundfile
python - audio.wav <<'EOF'
import sys
import sherpa_onnx
import soundfile

recognizer = sherpa_onnx.OfflineRecognizer.{constructor}
samples, rate_hz = soundfile.read(sys.argv[1], dtype="float32")
stream = recognizer.create_stream()
stream.accept_waveform(rate_hz, samples)
recognizer.decode_stream(stream)
print(stream.result.text)
EOF
```
"""

TORCHSCRIPT = """```bash
python - <<'EOF'
import torch

encoder, decoder, joiner = (torch.jit.load(f"{{name}}.pt") for name in ("encoder", "decoder", "joiner"))
features = torch.zeros(1, {frames}, {mels})  # (streams, feature frames, mels); the next chunk starts {hop} frames later
state0, state1 = torch.zeros(1, 1, {size}), torch.zeros(1, 1, 1)
with torch.inference_mode():
    encoder_out, state0, state1 = encoder(features, state0, state1)  # (streams, output frames, joiner)
    decoder_out = decoder(torch.tensor([[{context}]]))  # the last tokens of each stream; blank is 0, -1 is nothing
    logit = joiner(encoder_out[:, 0], decoder_out)
print(logit.argmax(dim=-1))
EOF
```
"""

WEIGHTS = """```bash
python - <<'EOF'
from safetensors.torch import load_file

weights = load_file("model.safetensors")
print(sum(tensor.numel() for tensor in weights.values()), "numbers in", len(weights), "tensors")
EOF
```
"""

ICEFALL = """
In icefall, `egs/librispeech/ASR/zipformer` builds the same model with these options (`load_state_dict` then takes the
weights as they are):

```
{options}
```
"""


def transducer_call(constructor: str, precision: str) -> str:
    """Returns the call of a constructor with which sherpa-onnx opens a transducer of this precision."""
    suffix = "" if precision == "fp32" else f".{precision}"
    files = [f'    {name}="{name}{suffix}.onnx",' for name in ("encoder", "decoder", "joiner")]
    return "\n".join([f"{constructor}(", '    tokens="tokens.txt",', *files, "    num_threads=1,", ")"])


def streaming_usage(constructor: str, chunk: int) -> str:
    """Returns the commands that recognise a file chunk by chunk; `chunk` is in frames of 20 ms."""
    tail_ms = (2 * chunk + CHUNK_OVERLAP + 1) * units.FRAME_SHIFT_MS
    return STREAMING.format(constructor=constructor, tail_ms=tail_ms)


def torchscript_usage(chunk: int, state_floats: int, context_size: int) -> str:
    """Returns the commands that compute one chunk; `chunk` is in frames of 20 ms."""
    context = ", ".join(["-1"] * (context_size - 1) + ["0"])
    frames, hop = 2 * chunk + CHUNK_OVERLAP, 2 * chunk
    return TORCHSCRIPT.format(frames=frames, hop=hop, mels=units.NUM_MELS, size=state_floats, context=context)


def streaming_facts(chunk: int, left_context: int) -> str:
    """Describes chunk and left context, both in frames of 20 ms, in a sentence with ms."""
    return (
        f"Streaming, in chunks of {units.chunk_ms(chunk)} ms with {CHUNK_OVERLAP * units.FRAME_SHIFT_MS} ms of "
        f"look-ahead and {units.chunk_ms(left_context)} ms of left context."
    )


def weights_usage(config: ModelConfig) -> str:
    """Returns the commands that load the weights, and the options for icefall if icefall has this kind of model."""
    try:
        options = icefall_options(config)
    except ValueError:
        return WEIGHTS
    pairs = [f"{name} {value}" for name, value in zip(options[::2], options[1::2], strict=True)]
    return WEIGHTS + ICEFALL.format(options=" \\\n".join(pairs))


def readme(format_name: str, facts: str, usage: str, written: list[Written]) -> str:
    """Returns the text of README.md.

    Args:
        format_name: the format of the export.
        facts: sentences about the export.
        usage: the commands that use it.
        written: the files that were compared with the model.
    """
    lines = [
        MARK,
        "",
        f"Format `{format_name}`. {facts} Audio is 16 kHz, mono. `config.yaml` is the model's configuration, "
        "`tokens.txt` its tokens.",
        "",
        "In this directory:",
        "",
        usage,
    ]
    if written:
        lines += ["| file | bytes | largest difference from PyTorch |", "|---|---|---|"]
        lines += [f"| {file.name} | {file.size_bytes:,} | {file.difference:.1e} |" for file in written]
        sizes = " and ".join(map(str, check.BATCH_SIZES))
        lines += [
            "",
            f"Compared on random features, over {check.CHUNKS} chunks and batches of {sizes}, states included; "
            "differences of values above 1 are relative, those of states to their largest value.",
            "",
        ]
    return "\n".join(lines)
