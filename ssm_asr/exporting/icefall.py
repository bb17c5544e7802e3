"""Imports published Zipformer weights.

The file is read without running code from it, and the configuration is inferred from the shapes of the weights.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path, PosixPath
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ssm_asr.checkpoint import wrong_checksum
from ssm_asr.config import Experiment, TokensConfig
from ssm_asr.data.tokens import Tokenizer
from ssm_asr.encoder.zipformer import ZipformerConfig
from ssm_asr.transducer.model import ModelConfig, Transducer

# Width of a stack -> how many of its channels training never masks, in the published sizes S, M and L.
UNMASKED_DIM = {256: 192, 384: 256, 512: 256, 768: 320}
LAYER = re.compile(r"encoder\.encoders\.(\d+)\.(?:encoder\.)?layers\.(\d+)\.")
SAME_IN_ALL_STACKS = ("query_head_dim", "value_head_dim", "pos_dim", "causal")
MOST_NAMED = 5  # an error message names so many weights at most


def read_weights(path: Path, last: bool = False) -> tuple[dict[str, Tensor], str]:
    """Reads the state dict of a file; all tensors are returned in float32 on the CPU.

    Args:
        path: a .safetensors file, or a file of PyTorch that holds a state dict, plain, or under `model_avg` or `model`.
        last: whether to take `model`, the last weights, where there is `model_avg`, their running mean.

    Returns:
        The weights, and the name of the entry that holds them; the name is empty where they are all that there is.

    Raises:
        ValueError: if there is no state dict, the file is damaged or holds more than tensors and plain values, or
            weights are not finite.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the pretrained.pt or .safetensors of a published model")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            # icefall's checkpoints hold a path, the name of their directory. Making a path object touches no file.
            # Whatever torch warns about is refused, and reported below.
            if zipfile.is_zipfile(path):
                damaged = wrong_checksum(path)
                if damaged:
                    raise ValueError(f"the checksum of {damaged} is wrong, so the file is damaged; fetch it again")
            with torch.serialization.safe_globals([PosixPath]), warnings.catch_warnings(action="ignore"):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        reason = "damaged, or holds more than tensors and plain values, which may be code"
        raise ValueError(f"{path}: refused: {reason}; save the state dict alone where it was made") from None
    except Exception as error:  # torch and safetensors raise exceptions of many kinds
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: no weights that can be read ({reason}); give a state dict") from None
    names = ("model",) if last else ("model_avg", "model")
    name = next((name for name in names if isinstance(content, dict) and isinstance(content.get(name), dict)), "")
    weights = content[name] if name else content
    if not isinstance(weights, dict) or not weights or not all(isinstance(w, Tensor) for w in weights.values()):
        raise ValueError(f"{path}: holds no state dict, neither plain nor under 'model'; give one of a Zipformer")
    infinite = next((key for key, value in weights.items() if not value.isfinite().all()), None)
    if infinite:
        raise ValueError(f"{path}: {infinite} has weights that are NaN or infinite; give weights before it broke")
    return {key: value.float() for key, value in weights.items()}, name


def infer_config(weights: dict[str, Tensor], pos_head_dim: int) -> ModelConfig:
    """Infers the configuration of the model from the shapes of its weights.

    Settings that only training reads (unmasked_dim, chunks, left contexts, losses) cannot be inferred. They get the
    values of the published recipes; for a width without a published unmasked_dim no channel is masked.

    Args:
        weights: the state dict of a Zipformer transducer.
        pos_head_dim: channels of a head's position query. The number of heads follows from it, because the weights of
            all heads lie side by side in one matrix.

    Raises:
        KeyError: if a weight is missing that every Zipformer transducer has; the argument is its name.
        ValueError: if the shapes do not fit heads of this width, or differ between stacks where they must not.
    """
    layers = {0: 0}
    for match in filter(None, map(LAYER.match, weights)):
        stack, layer = map(int, match.groups())
        layers[stack] = max(layers.get(stack, 0), layer + 1)
    stacks = [_infer_stack(weights, stack, pos_head_dim) for stack in sorted(layers)]
    for name in SAME_IN_ALL_STACKS:
        if len(values := {stack[name] for stack in stacks}) > 1:
            raise ValueError(f"{name} is {sorted(values)} in different stacks, but must be the same in all")
    fields: dict[str, Any] = {
        name: stacks[0][name] if name in SAME_IN_ALL_STACKS else tuple(stack[name] for stack in stacks)
        for name in stacks[0]
    }
    fields["embed_channels"] = tuple(len(weights[f"encoder_embed.conv.{i}.weight"]) for i in (0, 4, 7))
    encoder = ZipformerConfig(
        layers=tuple(layers[stack] for stack in sorted(layers)),
        pos_head_dim=pos_head_dim,
        **fields,
    )
    return ModelConfig(
        encoder,
        predictor_dim=weights["decoder.embedding.weight"].shape[1],
        joiner_dim=weights["joiner.output_linear.weight"].shape[1],
        context_size=weights["decoder.conv.weight"].shape[2],
        ctc="ctc_output.1.weight" in weights,
    )


def _infer_stack(weights: dict[str, Tensor], index: int, pos_head_dim: int) -> dict[str, Any]:
    """Infers the fields of ZipformerConfig for one stack, from its first layer."""
    stack = f"encoder.encoders.{index}."
    downsampling = weights.get(f"{stack}downsample.bias")  # one number a frame of a group; not at 50 Hz
    first = f"{stack}layers.0." if downsampling is None else f"{stack}encoder.layers.0."
    causal = f"{first}conv_module1.depthwise_conv.causal_conv.weight" in weights
    kernel = weights[f"{first}conv_module1.depthwise_conv.{'chunkwise_conv.' if causal else ''}weight"].shape[2]
    queries_and_keys, dim = weights[f"{first}self_attn_weights.in_proj.weight"].shape
    position_queries, pos_dim = weights[f"{first}self_attn_weights.linear_pos.weight"].shape
    queries = (queries_and_keys - position_queries) // 2
    values = len(weights[f"{first}self_attn1.in_proj.weight"])
    heads, rest = divmod(position_queries, pos_head_dim)
    if not heads or rest or queries % heads or values % heads:
        raise ValueError(
            f"stack {index} has position queries, queries and values of {position_queries}, {queries} and {values} in "
            f"all, which are no heads with position queries of {pos_head_dim}; give another --pos-head-dim"
        )
    return {
        "downsampling": 1 if downsampling is None else len(downsampling),
        "dim": dim,
        "unmasked_dim": UNMASKED_DIM.get(dim, dim),
        "feedforward_dim": len(weights[f"{first}feed_forward2.in_proj.weight"]),
        "heads": heads,
        "conv_kernel": kernel,
        "query_head_dim": queries // heads,
        "value_head_dim": values // heads,
        "pos_dim": pos_dim,
        "causal": causal,
    }


def check_fit(config: ModelConfig, vocab_size: int, weights: dict[str, Tensor]) -> None:
    """Checks that a model of this configuration has exactly these weights.

    Raises:
        ValueError: with one line for weights that are missing, one for unknown weights, and one for other shapes.
    """
    with torch.device("meta"):
        expected = Transducer(config, vocab_size).state_dict()
    missing = [name for name in expected if name not in weights]
    unknown = [name for name in weights if name not in expected]
    other = [name for name in expected if name in weights and weights[name].shape != expected[name].shape]
    shapes = [f"{name} {tuple(weights[name].shape)}, not {tuple(expected[name].shape)}" for name in other]
    problems = (
        ("lacks", missing, "is it the whole state dict of a Zipformer transducer?"),
        ("has what this program does not know:", unknown, "leave it out with --drop PREFIX"),
        ("has weights of other shapes than the rest implies:", shapes, "this is no Zipformer of the published form"),
    )
    lines = [f"{what} {_shortened(names)}; {remedy}" for what, names, remedy in problems if names]
    if lines:
        raise ValueError("\n".join(lines))


def _shortened(names: list[str]) -> str:
    """Joins the first names, and says how many more there are."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def import_weights(
    path: Path,
    tokens: Path,
    pos_head_dim: int = ZipformerConfig.pos_head_dim,
    drop: Sequence[str] = (),
    last: bool = False,
) -> tuple[Experiment, Tokenizer, dict[str, Tensor], str]:
    """Reads a published model.

    Returns:
        The configuration, the tokenizer and the weights of a checkpoint, and the entry of the file that they are from.

    Args:
        path: the weights, see `read_weights`.
        tokens: a directory with tokens.txt or a sentencepiece model, or one of these files.
        pos_head_dim: see `infer_config`.
        drop: prefixes of names; weights with one of them are left out.
        last: see `read_weights`.

    Raises:
        ValueError: with one line for each thing that is wrong, which names the file and a remedy.
        FileNotFoundError: if there are no tokens.
    """
    everything, entry = read_weights(path, last)
    weights = {name: value for name, value in everything.items() if not name.startswith(tuple(drop))}
    tokenizer = Tokenizer.load(tokens, to_encode=False)
    try:
        config = infer_config(weights, pos_head_dim)
        vocab_size = len(weights["joiner.output_linear.weight"])
        check_fit(config, vocab_size, weights)
    except KeyError as error:
        raise ValueError(f"{path}: lacks {error.args[0]}; give the state dict of a Zipformer transducer") from None
    except ValueError as error:
        raise ValueError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"{tokens}: {tokenizer.vocab_size} tokens, but {path} tells {vocab_size} apart; "
            "give those that it was trained with"
        )
    return Experiment(config, TokensConfig(tokenizer.kind, vocab_size)), tokenizer, weights, entry
