"""Times training of the Zipformer and of Sammo beside the PyPI package zipformer, on one GPU or the CPU.

    python benchmarks/bench_train.py                        Zipformer M on a GPU, or a tiny one on a CPU
    python benchmarks/bench_train.py --variant sammo        Sammo M beside the peer, which is a Zipformer

The rows are the encoder's forward and backward pass, the losses alone, the whole training step (losses and optimiser
too), and the forward pass in evaluation, each over batches of one shape and over a mix of lengths. Features and tokens
are random tensors; all regularisers are on. "ms a batch" is the median over rounds of all batches, "peak GiB" is the
memory that a side takes of the GPU, its captured graphs included, and "ratio" is how many times as fast as the first
side a side is.

Before anything is timed, the outputs and gradients of each side are compared with the plain path's: the peer's for
equal weights, captured graphs' for equal random numbers. The peer needs its unpacked wheel alone (--peer).
"""

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `benchmarks` is found when this file is run by its path

from benchmarks import peer
from ssm_asr import units
from ssm_asr.cli.program import positive, run
from ssm_asr.data.batches import shape_frames, shape_tokens
from ssm_asr.encoder.schedule import set_batch_count
from ssm_asr.encoder.zipformer import ZipformerConfig
from ssm_asr.ops.devices import find_device
from ssm_asr.training.fast import make_passes, resolve_fast
from ssm_asr.training.optim import ScaledAdam
from ssm_asr.transducer.model import ModelConfig, Passes, Transducer

TINY: dict[str, Any] = dict(
    layers=(1, 1), downsampling=(1, 2), dim=(64, 64), unmasked_dim=(64, 64), feedforward_dim=(64, 64), heads=(4, 4),
    conv_kernel=(7, 7), query_head_dim=8,
)  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {"m": {}, "tiny": TINY}
VARIANTS: dict[str, dict[str, Any]] = {"zipformer": {}, "sammo": {"long_range": "mamba2"}}
# A batch of 600 s of audio is given as its number of utterances and the seconds of the longest one. As in training,
# several batches are sent to the device before the host waits for it. The mix is like the buckets of read speech.
FIXED = [(40, 15.0)] * 4
MIX = [(150, 4.0), (85, 7.0), (54, 11.0), (46, 13.0), (40, 15.0), (40, 15.0), (37, 16.0), (37, 16.0)]
KINDS = ("encoder_step", "loss", "training_step", "evaluation")
# These are the defaults of each device. On a CPU, the peer runs in float32 only.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"size": "m", "precision": "bf16", "sides": "peer,plain,graphs", "batch_scale": 1.0},
    "cpu": {"size": "tiny", "precision": "float32", "sides": "peer,plain", "batch_scale": 0.02},
}
BATCH_COUNT = 10000.0  # the schedules of both sides stand at this batch
CHUNK = 32  # frames of 20 ms

Row = tuple[str, str, str, dict[str, float]]  # shape, what, side, figures


@dataclass
class Data:
    """A batch of features and tokens."""

    features_BTF: Tensor
    lens_B: Tensor
    tokens_BU: Tensor
    token_lens_B: Tensor

    @property
    def audio_s(self) -> float:
        """Is the seconds of audio in the batch, padding included."""
        return self.features_BTF.shape[0] * self.features_BTF.shape[1] * units.FRAME_SHIFT_MS / 1000


def make_batches(shapes: list[tuple[int, float]], device: str, vocab_size: int, scale: float) -> list[Data]:
    """Makes random batches of the trainer's fixed shapes.

    The lengths of the utterances go from 0.9 of the shape to all of it, with 4 tokens a second.
    """
    batches = []
    for count, seconds in shapes:
        count = max(2, round(count * scale))
        frames = shape_frames(seconds)
        tokens = round(4 * seconds)
        lens_B = torch.linspace(0.9 * frames, frames, count).long()
        batches.append(
            Data(
                torch.randn(count, frames, units.NUM_MELS, device=device),
                lens_B,
                torch.randint(1, vocab_size, (count, shape_tokens(tokens)), device=device),
                torch.full((count,), tokens),
            )
        )
    return batches


class Side:
    """A side is one of the transducers that are compared, with how its passes run and its optimiser."""

    def __init__(
        self,
        name: str,
        model: Transducer,
        passes: Passes,
        optimizer: torch.optim.Optimizer,
        options: argparse.Namespace,
    ) -> None:
        self.name, self.model, self.passes, self.optimizer, self.options = name, model, passes, optimizer, options
        self.device = options.device
        self.half = options.precision != "float32"
        self.left_context = 0 if options.variant == "sammo" else 128

    def autocast(self) -> Any:
        """Returns the context of the precision that is asked for."""
        dtype = torch.bfloat16 if self.options.precision == "bf16" else torch.float16
        return torch.autocast(self.device, dtype, enabled=self.half)

    def encode(self, batch: Data) -> Tensor:
        """Returns the encoder's output frames (B, S, D)."""
        with self.autocast():
            return self.passes.encode(batch.features_BTF, batch.lens_B.to(self.device), CHUNK, self.left_context)[0]

    def encoder_step(self, batch: Data) -> None:
        """Runs the encoder forward and backward."""
        out_BSD = self.encode(batch)
        out_BSD.backward(torch.full_like(out_BSD, 1e-3))
        self.model.zero_grad(set_to_none=True)

    def loss(self, batch: Data) -> None:
        """Computes both losses and their gradients, with noise in place of the encoder's output."""
        shape = (len(batch.lens_B), self._frames(batch), self.model.encoder.out_channels)
        out_BSD = torch.randn(shape, device=self.device, requires_grad=True)
        self._losses(batch, self.passes._replace(encode=lambda *_: (out_BSD, batch.lens_B))).backward()
        self.model.zero_grad(set_to_none=True)

    def training_step(self, batch: Data) -> None:
        """Runs the model forward and backward, and the optimiser."""
        self._losses(batch, self.passes).backward()
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def _losses(self, batch: Data, passes: Passes) -> Tensor:
        data = (batch.features_BTF, batch.lens_B, batch.tokens_BU, batch.token_lens_B)
        with self.autocast():
            losses = self.model(*data, CHUNK, self.left_context, passes)
        return (0.5 * losses.simple_B + losses.pruned_B).sum()

    @staticmethod
    def _frames(batch: Data) -> int:
        return int(units.output_frames(batch.features_BTF.shape[1]))

    @torch.no_grad()
    def evaluation(self, batch: Data) -> None:
        """Runs the encoder forward without gradients."""
        self.encode(batch)


def make_peer(config: ZipformerConfig, options: argparse.Namespace) -> Side:
    """Makes our transducer with the peer's front end, encoder and optimiser."""
    model = Transducer(ModelConfig(config), options.vocab_size)
    model.encoder_embed, model.encoder = peer.make_encoder(config, CHUNK, 128)
    model.to(options.device)

    def encode(
        features_BTF: Tensor, lens_B: Tensor, chunk: int = -1, left_context: int | Tensor = -1
    ) -> tuple[Tensor, Tensor]:
        embedder: Any = model.encoder_embed
        encoder: Any = model.encoder
        x_BTD, lens_B = embedder(features_BTF, lens_B)
        padding_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device) >= lens_B[:, None]
        out_SBD, lens_B = encoder(x_BTD.transpose(0, 1), lens_B, padding_BT)
        return out_SBD.transpose(0, 1), lens_B

    for module in model.modules():
        if hasattr(module, "batch_count"):
            module.batch_count = BATCH_COUNT  # type: ignore[assignment]
    optimizer = peer.load("modules.optim").ScaledAdam(model.named_parameters(), lr=0.01, clipping_scale=2.0)
    return Side("peer", model, Passes(encode, model.transducer_losses), optimizer, options)


def make_ours(config: ZipformerConfig, options: argparse.Namespace, graphs: bool, weights: Any = None) -> Side:
    """Makes our transducer, plain or with captured graphs."""
    torch.manual_seed(0)
    model = Transducer(ModelConfig(config), options.vocab_size).to(options.device)
    if weights is not None:
        model.load_state_dict(weights)
    set_batch_count(model, BATCH_COUNT)
    fast = resolve_fast("auto", torch.device(options.device), fixed_shapes=graphs, loss_backend="torch")
    passes, optimizer = make_passes(model, fast, "torch"), ScaledAdam(model.parameters(), lr=0.01)
    return Side("graphs" if graphs else "plain", model, passes, optimizer, options)


def gradients(side: Side, batch: Data, training: bool) -> list[Tensor]:
    """Returns the output and the gradients of the encoder's parameters on the CPU, with fixed random numbers."""
    side.model.train(training)
    if side.name == "graphs" and training:
        side.encoder_step(batch)  # the first batch of a shape is not captured
    random.seed(1)
    torch.manual_seed(1)
    out_BSD = side.encode(batch)
    generator = torch.Generator().manual_seed(3)
    out_BSD.backward(torch.randn(out_BSD.shape, generator=generator).to(out_BSD))
    embed, encoder = side.model.encoder_embed, side.model.encoder
    parameters = dict([*embed.named_parameters("embed"), *encoder.named_parameters("encoder")])
    found = [p.grad.cpu().float() for _, p in sorted(parameters.items()) if p.grad is not None]
    side.model.zero_grad(set_to_none=True)
    return [out_BSD.detach().cpu().float(), *found]


def compare(side: Side, batch: Data, training: bool, plain: list[Tensor]) -> None:
    """Stops the program if a side does not compute what the plain path does."""
    # The peer keeps the derivative of its activations in 8 bits.
    tolerance = 0.05 if side.half else 0.01 if side.name == "peer" else 1e-3
    found = gradients(side, batch, training)
    if len(found) != len(plain):
        raise SystemExit(f"{side.name} has {len(found) - 1} gradients, plain {len(plain) - 1}")
    flat = [torch.cat([x.flatten() for x in tensors[1:]]) for tensors in (found, plain)]
    errors = [float((x - y).norm() / y.norm()) for x, y in ((found[0], plain[0]), flat)]
    mode = "training, same random numbers" if training else "regularisers off"
    print(f"{side.name} against plain ({mode}): outputs differ by {errors[0]:.1e}, gradients by {errors[1]:.1e}")
    if not max(errors) < tolerance:
        raise SystemExit(f"that is more than {tolerance:g}: nothing is timed")


def wait(device: str) -> None:
    """Waits until a GPU has done all that it was sent."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure(
    step: Callable[[Data], None], batches: list[Data], device: str, repeats: int
) -> tuple[dict[str, float], profile | None]:
    """Returns the figures of a step, timed over rounds of all batches; on a GPU, a profile of one batch too."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for batch in [*batches, *batches, batches[-1]]:  # the second batch of a shape is captured
        step(batch)
    wait(device)
    times_ms = []
    for _ in range(repeats):
        start = time.perf_counter()
        for batch in batches:
            step(batch)
        wait(device)
        times_ms.append((time.perf_counter() - start) * 1000 / len(batches))
    time_ms = statistics.median(times_ms)
    figures = {
        "ms a batch": time_ms,
        "audio s/s": sum(batch.audio_s for batch in batches) / len(batches) / time_ms * 1000,
    }
    if device != "cuda":
        return figures, None
    figures["peak GiB"] = torch.cuda.max_memory_reserved() / 2**30
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step(batches[0])
        wait(device)
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    figures["busy ms"] = sum(event.self_device_time_total for event in kernels) / 1000
    figures["kernels"] = len(kernels)
    return figures, profiler


def write_kernels(title: str, profiler: profile, out: Path) -> None:
    """Appends a table to a file that shows on which kernels the GPU spends its time."""
    table = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=110)
    with open(out, "a", encoding="utf-8") as file:
        file.write(f"\n== {title}\n{table}\n")


def time_side(side: Side, shapes: dict[str, list[Data]], options: argparse.Namespace) -> list[Row]:
    """Returns all rows of one side."""
    rows = []
    jobs = [(shape, kind) for shape in shapes for kind in KINDS if kind in options.kinds.split(",")]
    for shape, kind in tqdm(jobs, desc=side.name, leave=False, disable=None):
        if (kind == "evaluation" and side.name == "graphs") or (kind == "loss" and side.name == "peer"):
            continue
        side.model.train(kind != "evaluation")
        figures, profiler = measure(getattr(side, kind), shapes[shape], side.device, options.repeats)
        rows.append((shape, kind, side.name, figures))
        tqdm.write(f"{shape} {kind} {side.name}: {figures['ms a batch']:.1f} ms")
        if options.kernels and profiler and shape == "fixed":
            write_kernels(f"{options.variant} {kind} {side.name}", profiler, options.kernels)
    return rows


def print_table(rows: list[Row]) -> None:
    """Prints the rows, and how many times as fast as the first side each one is."""
    print(f"{'shape':<7}{'what':<15}{'side':<8}" + "".join(f"{key:>12}" for key in rows[0][3]) + f"{'ratio':>12}")
    for shape, kind, name, figures in rows:
        first = next(row[3]["ms a batch"] for row in rows if row[:2] == (shape, kind))
        ratio = first / figures["ms a batch"]
        print(f"{shape:<7}{kind:<15}{name:<8}" + "".join(f"{x:12.1f}" for x in figures.values()) + f"{ratio:12.2f}")


def parse_arguments() -> argparse.Namespace:
    """Returns the options of the command line, with the defaults of the device filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", default="auto", choices=("auto", *DEFAULTS), help="where to compute (default: auto)"
    )
    parser.add_argument("--size", choices=SIZES, help="size of the encoder (default: m; on a CPU tiny)")
    parser.add_argument(
        "--variant",
        default="zipformer",
        choices=VARIANTS,
        help="our encoder; the peer is always a zipformer (default: zipformer)",
    )
    parser.add_argument(
        "--precision", choices=("float32", "bf16", "fp16"), help="of autocast (default: bf16; on a CPU float32)"
    )
    parser.add_argument("--vocab-size", type=positive, default=500, help="tokens (default: 500)")
    parser.add_argument("--sides", help="of peer, plain and graphs, which to time (default: all; on a CPU not graphs)")
    parser.add_argument("--peer", type=Path, help="folder of the package zipformer (default: where it is installed)")
    parser.add_argument("--batch-scale", type=float, help="share of the 600 s a batch (default: 1; on a CPU 0.02)")
    parser.add_argument("--repeats", type=positive, default=5, help="rounds to time, whose median counts (default: 5)")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"what to time, of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--shapes", default="fixed,mix", help="fixed and mix, or one of them (default: both)")
    parser.add_argument("--kernels", type=Path, help="write here where the GPU's time goes, kernel by kernel")
    options = parser.parse_args()
    try:
        options.device = find_device(options.device).type
    except ValueError as error:
        parser.error(str(error))
    for name, value in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.device == "cpu" and options.precision != "float32" and "peer" in options.sides.split(","):
        parser.error(f"--precision {options.precision}: on a CPU the peer takes float32 alone; leave it out of --sides")

    options.sides = options.sides.split(",")
    if not set(options.sides) <= {"peer", "plain", "graphs"}:
        parser.error(
            f"--sides {','.join(options.sides)}: give some of peer, plain and graphs, with commas between them"
        )
    if "peer" in options.sides:
        try:
            peer.register(options.peer)
        except peer.PeerMissing as error:
            parser.error(f"{'--peer ' if options.peer else ''}{error}, or leave peer out of --sides")
    return options


def main() -> None:
    """Runs the program."""
    options = parse_arguments()
    config = ZipformerConfig(**SIZES[options.size], **VARIANTS[options.variant])
    fixed, mix = (make_batches(s, options.device, options.vocab_size, options.batch_scale) for s in (FIXED, MIX))
    shapes = {name: batches for name, batches in (("fixed", fixed), ("mix", mix)) if name in options.shapes}

    plain = make_ours(config, options, graphs=False)
    weights = {name: value.cpu().clone() for name, value in plain.model.state_dict().items()}
    expected = {training: gradients(plain, fixed[0], training) for training in (True, False)}
    del plain
    rows: list[Row] = []
    for name in options.sides:
        if name == "plain":
            side = make_ours(config, options, False, weights)
        elif name == "graphs":
            side = make_ours(config, options, True, weights)
            compare(side, fixed[0], True, expected[True])
        else:
            side = make_peer(ZipformerConfig(**SIZES[options.size]), options)
            if options.variant == "zipformer":
                side.model.load_state_dict(weights)
                compare(side, fixed[0], False, expected[False])
        rows += time_side(side, shapes, options)
        del side
        gc.collect()
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    what = f"{options.variant} {options.size}, {options.precision}, vocabulary of {options.vocab_size}"
    print(f"{device}, torch {torch.__version__}, {what}")
    print_table(sorted(rows, key=lambda row: (row[0], KINDS.index(row[1]), options.sides.index(row[2]))))


if __name__ == "__main__":
    sys.exit(run(main))
