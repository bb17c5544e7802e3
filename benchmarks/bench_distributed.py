"""Times the training step of one GPU and of all together, and checks that all together compute what one would.

    torchrun --nproc-per-node 2 benchmarks/bench_distributed.py
    torchrun --nproc-per-node 2 benchmarks/bench_distributed.py --device cpu --config FILE --seconds 2 --utterances 4

The batches are random tensors. Every process has a batch of its own, so N processes work on N times the audio in a
step. The efficiency is the time of one process, while the others wait, divided by the time of all together. Before
anything is timed, and with the regularisers off, a short training run of all processes is compared with a run of a
single one, whose batches are the batches of all processes joined.

Shapes: B utterances, T feature frames (10 ms), F mel bins, U tokens.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ssm_asr import units
from ssm_asr.cli.program import positive, run
from ssm_asr.config import Experiment, load_experiment
from ssm_asr.data.batches import shape_frames, shape_tokens
from ssm_asr.encoder.schedule import set_batch_count
from ssm_asr.training import distributed
from ssm_asr.training.fast import make_passes, resolve_fast
from ssm_asr.training.objective import PRECISIONS
from ssm_asr.training.optim import ScaledAdam
from ssm_asr.transducer.model import Transducer

BATCH_COUNT = 10000.0  # the schedules stand at this batch
TOLERANCES = {"float32": 1e-4, "bf16": 0.05, "fp16": 0.05}


class Data(NamedTuple):
    """Holds a batch of random features and tokens."""

    features_BTF: Tensor
    lens_B: Tensor
    tokens_BU: Tensor
    token_lens_B: Tensor


def make_batch(seed: int, options: argparse.Namespace) -> Data:
    """Makes the batch of one process, in one of the trainer's fixed shapes."""
    generator = torch.Generator().manual_seed(seed)
    frames = shape_frames(options.seconds)
    count, tokens = options.utterances, round(4 * options.seconds)
    return Data(
        torch.randn(count, frames, units.NUM_MELS, generator=generator),
        torch.linspace(0.9 * frames, frames, count).long(),
        torch.randint(1, options.vocab_size, (count, shape_tokens(tokens)), generator=generator),
        torch.full((count,), tokens),
    )


class Step:
    """Holds the model and its optimiser in one process, and trains them."""

    def __init__(self, experiment: Experiment, place: distributed.Place, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.place, self.precision = place, options.precision
        self.model = Transducer(experiment.model, options.vocab_size).to(place.device)
        self.chunk, self.left_context = experiment.decode.chunk_frames, experiment.decode.left_context_frames
        distributed.share_weights(self.model, place)
        set_batch_count(self.model, BATCH_COUNT)
        fast = resolve_fast("auto", place.device, fixed_shapes=True, loss_backend="torch")
        self.passes = make_passes(self.model, fast, "torch")
        self.optimizer = ScaledAdam(self.model.parameters(), lr=0.01)

    def backward(self, batch: Data) -> None:
        """Computes the gradients of a batch."""
        self.model.zero_grad(set_to_none=True)
        self.loss(batch).backward()

    def loss(self, batch: Data) -> Tensor:
        """Returns the weighted sum of both losses over the utterances."""
        device = self.place.device
        with torch.autocast(device.type, PRECISIONS[self.precision], enabled=self.precision != "float32"):
            losses = self.model(
                batch.features_BTF.to(device),
                batch.lens_B,
                batch.tokens_BU.to(device),
                batch.token_lens_B,
                self.chunk,
                self.left_context,
                self.passes,
            )
        return (0.5 * losses.simple_B + losses.pruned_B).sum()

    def alone(self, batch: Data) -> None:
        """Takes a training step without the other processes."""
        self.backward(batch)
        self.optimizer.step()

    def together(self, batch: Data) -> None:
        """Takes a training step together with all processes."""
        self.backward(batch)
        distributed.average_gradients(self.model, self.place)
        self.optimizer.step()

    def gradient(self) -> Tensor:
        """Returns all gradients end to end; a missing one is zero."""
        return torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.model.parameters()]
        )

    def weights(self) -> Tensor:
        """Returns all weights end to end."""
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


class Run(NamedTuple):
    """Holds what a short training run gives.

    Attributes:
        gradient: the gradient of the first step, averaged over the processes.
        change: the last weights less the first.
        loss: the loss of the last weights on the first batches, in nats per utterance.
    """

    gradient: Tensor
    change: Tensor
    loss: float


def train(step: Step, together: bool, options: argparse.Namespace) -> Run:
    """Trains on the batches of all processes: on all of them in this one, or on its own, together with the others."""
    place = step.place
    step.model.eval()  # which turns the regularisers off
    start, gradient = step.weights(), torch.empty(0)
    what = "together" if together else "one process"
    for number in tqdm(range(options.steps), f"train, {what}", leave=False, disable=place.rank > 0 or None):
        own = [make_batch(number * place.world_size + rank, options) for rank in range(place.world_size)]
        joined = Data(*(torch.cat(parts) for parts in zip(*own, strict=True)))
        if number == 0:
            first = joined
        if together:
            step.together(own[place.rank])
        else:
            step.alone(joined)
        if number == 0:
            gradient = step.gradient() / (1 if together else place.world_size)
    with torch.no_grad():
        loss = float(step.loss(first)) / len(first.lens_B)
    return Run(gradient, step.weights() - start, loss)


def difference(one: Tensor, other: Tensor) -> float:
    """Returns the norm of the difference, relative to the norm of the first tensor."""
    return float((other - one).norm() / one.norm())


def time_ms(step: Callable[[Data], None], batch: Data, place: distributed.Place, repeats: int) -> float:
    """Returns the median time of a step, after three steps in which graphs are captured."""
    times_ms = []
    for _ in tqdm(range(repeats + 3), "time", leave=False, disable=place.rank > 0 or None):
        start = time.perf_counter()
        step(batch)
        if place.device.type == "cuda":
            torch.cuda.synchronize()
        times_ms.append((time.perf_counter() - start) * 1000)
    return statistics.median(times_ms[3:])


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="configuration of the experiment (default: Zipformer M)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--precision", default="bf16", choices=PRECISIONS, help="default: bf16")
    parser.add_argument(
        "--utterances", type=positive, default=40, help="utterances in the batch of a process (default: 40)"
    )
    parser.add_argument("--seconds", type=float, default=15.0, help="length of the longest utterance (default: 15)")
    parser.add_argument("--vocab-size", type=positive, default=500, help="tokens (default: 500)")
    parser.add_argument("--steps", type=positive, default=20, help="steps of the runs that are compared (default: 20)")
    parser.add_argument("--repeats", type=positive, default=10, help="steps to time, whose median counts (default: 10)")
    options = parser.parse_args()
    try:
        place = distributed.join(options.device)
    except ValueError as error:
        parser.error(str(error))
    if place.world_size == 1:
        parser.error("one process has none to be compared with; start it by torchrun, as above")
    experiment = load_experiment(options.config) if options.config else Experiment()
    one, all_ = (train(Step(experiment, place, options), together, options) for together in (False, True))
    apart = difference(one.gradient, all_.gradient)
    if not apart < TOLERANCES[options.precision]:
        raise SystemExit(f"the gradients differ by {apart:.1e} of their norm: nothing is timed")

    step = Step(experiment, place, options)
    step.model.train()
    batch = make_batch(place.rank, options)
    one_ms = 0.0
    for rank in range(place.world_size):
        if rank == place.rank:
            one_ms = time_ms(step.alone, batch, place, options.repeats)
        distributed.wait(place)
    distributed.share_weights(step.model, place)
    all_ms = time_ms(step.together, batch, place, options.repeats)
    if place.rank == 0:
        name = torch.cuda.get_device_name() if place.device.type == "cuda" else "CPU"
        print(
            f"{name}, torch {torch.__version__}, {options.precision}, {options.utterances} × {options.seconds:g} s each"
        )
        print(f"gradients of {place.world_size} processes differ from those of one by {apart:.1e} of their norm")
        print(f"after {options.steps} steps the weights have gone ways that differ by", end=" ")
        print(f"{difference(one.change, all_.change):.1e} of their length; loss {one.loss:.4f} and {all_.loss:.4f}")
        print(f"one process {one_ms:.1f} ms a step, {place.world_size} together {all_ms:.1f} ms", end="; ")
        print(f"efficiency {100 * one_ms / all_ms:.1f} %")
    distributed.leave(place)


if __name__ == "__main__":
    sys.exit(run(main))
