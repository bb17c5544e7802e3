"""Take over a published Zipformer: ssm-asr import-icefall --in pretrained.pt --tokens PATH --out DIR

Reads the weights of a Zipformer transducer trained with icefall or with the PyPI package zipformer: a state dict, or a
checkpoint with one under `model`, in PyTorch's format or as .safetensors. No code in the file is run. The size of the
model is inferred from the shapes of its weights.

Writes a checkpoint to decode, stream, export and fine-tune (model.pt), its configuration (config.yaml) and its tokens
(tokens/).
"""

import argparse
import shlex
import sys
from pathlib import Path

from torch import Tensor

from ssm_asr import checkpoint
from ssm_asr.config import Experiment, to_yaml
from ssm_asr.data.tokens import Tokenizer
from ssm_asr.encoder.zipformer import ZipformerConfig
from ssm_asr.exporting.icefall import import_weights


def summary(experiment: Experiment, tokenizer: Tokenizer, weights: dict[str, Tensor], out: Path) -> str:
    """Says what was found, what was taken for granted, and what can be done next."""
    encoder = experiment.model.encoder
    assert isinstance(encoder, ZipformerConfig)
    directory = shlex.quote(str(out))
    causal = "streaming" if encoder.causal else "whole utterances only"
    lines = [
        f"{out}/model.pt: Zipformer, {sum(value.numel() for value in weights.values()):,} parameters, {causal}, "
        f"{tokenizer.vocab_size} tokens, {'with' if experiment.model.ctc else 'without'} CTC head",
        f"  layers {encoder.layers}, downsampling {encoder.downsampling}, dim {encoder.dim}, "
        f"feed-forward {encoder.feedforward_dim}, kernels {encoder.conv_kernel}",
        f"  taken for granted: heads with position queries of {encoder.pos_head_dim} (--pos-head-dim), that is "
        f"{encoder.heads} heads with queries of {encoder.query_head_dim} and values of {encoder.value_head_dim}",
        f"  taken for granted, for training alone: unmasked_dim {encoder.unmasked_dim}, chunk_frames "
        f"{encoder.chunk_frames}, left_context_frames {encoder.left_context_frames} (change them in config.yaml)",
        f"decode: ssm-asr decode --checkpoint {directory}/model.pt --cuts CUTS",
    ]
    if tokenizer.can_encode:
        lines.append(
            f"fine-tune: ssm-asr train --config {directory}/config.yaml --tokens {directory}/tokens "
            f"--init-from {directory}/model.pt --train-cuts CUTS --valid-cuts CUTS --exp-dir DIR"
        )
    else:
        lines.append("fine-tune: needs the sentencepiece model of the tokens; import with --tokens bpe.model")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--in", required=True, type=Path, dest="path", metavar="FILE", help="weights, .pt or .safetensors"
    )
    parser.add_argument(
        "--tokens",
        required=True,
        type=Path,
        metavar="PATH",
        help="lang directory, bpe.model or tokens.txt of the model; the last is not enough to fine-tune word pieces",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--pos-head-dim",
        type=int,
        choices=range(1, 33),
        default=ZipformerConfig.pos_head_dim,
        metavar="N",
        help="width of a head's position query; the number of heads follows from it (default: %(default)s)",
    )
    parser.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="PREFIX",
        help="leave out weights whose names begin so, such as attention_decoder; repeatable",
    )
    parser.add_argument(
        "--last-weights",
        action="store_true",
        help="take the last weights, not their mean, where both are there",
    )
    options = parser.parse_args(arguments)
    try:
        experiment, tokenizer, weights, entry = import_weights(
            options.path, options.tokens, options.pos_head_dim, options.drop, options.last_weights
        )
        packed = checkpoint.pack(experiment, tokenizer, weights, {"imported_from": options.path.name})
        checkpoint.save(packed, options.out / "model.pt")
        tokenizer.save(options.out / "tokens")
        (options.out / "config.yaml").write_text(to_yaml(experiment), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if entry == "model_avg":
        print(f"{options.path}: takes model_avg, the running mean of the weights; --last-weights takes the last ones")
    print(summary(experiment, tokenizer, weights, options.out))
    return 0
