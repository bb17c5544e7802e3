"""Prints the compilations of kernels that each further shape of a batch would ask for.

    python compilations.py FILE SHAPE ...

Launches are recorded, none is made, so that it runs on a CPU. FILE is a configuration, SHAPE seconds,tokens,utterances.
"""

import json
import sys
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from ssm_asr.config import load_experiment
from ssm_asr.data.batches import shape_frames, shape_tokens
from ssm_asr.encoder.schedule import Draws, set_batch_count
from ssm_asr.ops import dispatch
from ssm_asr.transducer.model import Transducer

VOCAB_SIZE = 64


def kind(value: Any, is_constant: bool, is_specialized: bool) -> str:
    """What of an argument a kernel is compiled for."""
    if is_constant or value is None:
        return str(value)
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {value.data_ptr() % 16 == 0 if is_specialized else ''}"
    if isinstance(value, int):
        return f"{value == 1} {value % 16 == 0}" if is_specialized else "int"
    return type(value).__name__


def main() -> None:
    config, *shapes = sys.argv[1:]
    asked: set[tuple[str, ...]] = set()

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        both = [p.name for p in self.params if p.is_constexpr and p.do_not_specialize]
        if both:  # what Triton says only when it compiles
            raise TypeError(f"{self.__name__} has constants that are not to be specialized: {', '.join(both)}")
        values = {**dict(zip(self.arg_names, args, strict=False)), **options}
        kinds = {p.name: kind(values.pop(p.name), p.is_constexpr, not p.do_not_specialize) for p in self.params}
        asked.add((f"{self.__module__}.{self.__name__}", *(f"{n}: {x}" for n, x in {**kinds, **values}.items())))

    JITFunction.run = record
    dispatch.use_kernels = lambda x: True
    torch.manual_seed(0)
    experiment = load_experiment(config)
    model = Transducer(experiment.model, VOCAB_SIZE)
    set_batch_count(model, 10000.0)
    draws = Draws(torch.device("cpu"))  # decisions lie on the device, as in a captured step
    for shape in shapes:
        before = set(asked)
        seconds, num_tokens, count = (int(x) for x in shape.split(","))
        frames = shape_frames(seconds)
        with torch.autocast("cpu", torch.bfloat16), draws.in_use():
            losses = model(
                torch.zeros(count, frames, 80),
                torch.full((count,), frames),
                torch.zeros(count, shape_tokens(num_tokens), dtype=torch.int64),
                torch.full((count,), num_tokens),
                experiment.decode.chunk_frames,
                experiment.decode.left_context_frames,
            )
        (losses.simple_B + losses.pruned_B).sum().backward()
        print(json.dumps(sorted(asked - before)))


if __name__ == "__main__":
    main()
