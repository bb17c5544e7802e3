"""Times training of the Zipformer and of Sammo beside the PyPI package zipformer, on one GPU or the CPU.

Rows: the encoder's forward and backward pass, the whole training step (loss and optimiser too), and the forward pass in
evaluation; over batches of one shape, and over a mix of lengths. Before anything is timed, outputs and gradients are
compared: ours with the peer's for the same weights, captured graphs with the plain path for the same random numbers.
Features and tokens are random; all regularisers are on. The peer needs nothing but its unpacked wheel (--peer).
"""

import argparse
import importlib
import importlib.util
import random
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from ssm_asr import units
from ssm_asr.encoder.graphs import EncoderGraphs
from ssm_asr.encoder.schedule import set_batch_count
from ssm_asr.encoder.zipformer import ZipformerConfig
from ssm_asr.optim import ScaledAdam
from ssm_asr.transducer.model import ModelConfig, Transducer

TINY: dict[str, Any] = dict(
    layers=(1, 1), downsampling=(1, 2), dim=(64, 64), unmasked_dim=(64, 64), feedforward_dim=(64, 64), heads=(4, 4),
    conv_kernel=(7, 7), query_head_dim=8,
)  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {"m": {}, "tiny": TINY}
VARIANTS: dict[str, dict[str, Any]] = {"zipformer": {}, "sammo": {"long_range": "mamba2"}}
# Batches of 600 s: how many utterances, and the seconds of the longest. The mix is what buckets of read speech give.
FIXED = [(40, 15.0)]
MIX = [(150, 4.0), (85, 7.0), (54, 11.0), (46, 13.0), (40, 15.0), (40, 15.0), (37, 16.0), (37, 16.0)]
BATCH_COUNT = 10000.0  # where the schedules stand
CHUNK = 32


@dataclass
class Data:
    """One batch."""

    features_BTF: Tensor
    lens_B: Tensor
    tokens_BU: Tensor
    token_lens_B: Tensor

    @property
    def audio_s(self) -> float:
        return self.features_BTF.shape[0] * self.features_BTF.shape[1] * units.FRAME_SHIFT_MS / 1000


def make_batches(shapes: list[tuple[int, float]], device: str, vocab_size: int, scale: float) -> list[Data]:
    """Random batches; the lengths of the utterances spread over the last tenth, and 4 tokens a second."""
    batches = []
    for count, seconds in shapes:
        count = max(2, round(count * scale))
        frames = round(seconds * 1000 / units.FRAME_SHIFT_MS)
        tokens = round(4 * seconds)
        lens_B = torch.linspace(0.9 * frames, frames, count).long()
        batches.append(
            Data(
                torch.randn(count, frames, units.NUM_MELS, device=device),
                lens_B.to(device),
                torch.randint(1, vocab_size, (count, tokens), device=device),
                torch.full((count,), tokens, device=device),
            )
        )
    return batches


class Side:
    """One of the compared: a transducer and its optimiser, of which `encode` is looked at by itself as well."""

    def __init__(self, name: str, model: Transducer, optimizer: torch.optim.Optimizer, options: argparse.Namespace):
        self.name, self.model, self.optimizer, self.options = name, model, optimizer, options
        self.device = options.device
        self.half = options.precision != "float32"
        self.left_context = 0 if options.variant == "sammo" else 128

    def autocast(self) -> Any:
        dtype = torch.bfloat16 if self.options.precision == "bf16" else torch.float16
        return torch.autocast(self.device, dtype, enabled=self.half)

    def encode(self, batch: Data) -> Tensor:
        with self.autocast():
            return self.model.encode(batch.features_BTF, batch.lens_B, CHUNK, self.left_context)[0]

    def encoder_step(self, batch: Data) -> None:
        out_BSD = self.encode(batch)
        out_BSD.backward(torch.full_like(out_BSD, 1e-3))
        self.model.zero_grad(set_to_none=True)

    def training_step(self, batch: Data) -> None:
        with self.autocast():
            losses = self.model(
                batch.features_BTF, batch.lens_B, batch.tokens_BU, batch.token_lens_B, CHUNK, self.left_context
            )
        (0.5 * losses.simple_B + losses.pruned_B).sum().backward()
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluation(self, batch: Data) -> None:
        self.encode(batch)


def peer_modules(folder: Path) -> types.ModuleType:
    """The peer's modules, without its front page, which imports what only its decoding needs."""
    for name in ("zipformer", "zipformer.modules", "zipformer.utils"):
        module: Any = types.ModuleType(name)
        module.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module
    module.torch_autocast = lambda device_type="cuda", **options: torch.autocast(device_type, **options)
    module.fix_random_seed = torch.manual_seed
    found = types.ModuleType("peer")
    for name in ("zipformer", "subsampling", "optim", "scaling"):
        setattr(found, name, importlib.import_module(f"zipformer.modules.{name}"))
    return found


def make_peer(folder: Path, config: ZipformerConfig, options: argparse.Namespace) -> Side:
    """Our transducer with the peer's front end, encoder and optimiser."""
    modules = peer_modules(folder)
    dropout = modules.scaling.ScheduledFloat((0.0, 0.3), (20000.0, 0.1))
    model = Transducer(ModelConfig(config), options.vocab_size)
    model.encoder_embed = modules.subsampling.Conv2dSubsampling(units.NUM_MELS, config.embed_dim, dropout=dropout)
    model.encoder = modules.zipformer.Zipformer(
        output_downsampling_factor=2,
        downsampling_factor=config.downsampling,
        encoder_dim=config.dim,
        num_encoder_layers=config.layers,
        encoder_unmasked_dim=config.unmasked_dim,
        query_head_dim=(config.query_head_dim,),
        pos_head_dim=(config.pos_head_dim,),
        value_head_dim=(config.value_head_dim,),
        num_heads=config.heads,
        feedforward_dim=config.feedforward_dim,
        cnn_module_kernel=config.conv_kernel,
        pos_dim=config.pos_dim,
        dropout=dropout,
        causal=config.causal,
        chunk_size=(CHUNK,),
        left_context_frames=(128,),
    )
    model.to(options.device)

    def encode(features_BTF: Tensor, lens_B: Tensor, chunk: int = -1, left_context: int = -1) -> tuple[Tensor, Tensor]:
        embedder: Any = model.encoder_embed
        encoder: Any = model.encoder
        x_BTD, lens_B = embedder(features_BTF, lens_B)
        padding_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device) >= lens_B[:, None]
        out_SBD, lens_B = encoder(x_BTD.transpose(0, 1), lens_B, padding_BT)
        return out_SBD.transpose(0, 1), lens_B

    model.encode = encode  # type: ignore[method-assign]
    for module in model.modules():
        if hasattr(module, "batch_count"):
            module.batch_count = BATCH_COUNT  # type: ignore[assignment]
    optimizer = modules.optim.ScaledAdam(model.named_parameters(), lr=0.01, clipping_scale=2.0)
    return Side("peer", model, optimizer, options)


def make_ours(config: ZipformerConfig, options: argparse.Namespace, graphs: bool, weights: Any = None) -> Side:
    """Our transducer, plain or with captured graphs."""
    torch.manual_seed(0)
    model = Transducer(ModelConfig(config), options.vocab_size).to(options.device)
    if weights is not None:
        model.load_state_dict(weights)
    set_batch_count(model, BATCH_COUNT)
    if graphs:
        model.encode = EncoderGraphs(model.encode, [model.encoder_embed, model.encoder])  # type: ignore[method-assign]
    return Side("graphs" if graphs else "plain", model, ScaledAdam(model.parameters(), lr=0.01), options)


@contextmanager
def seeded() -> Iterator[None]:
    random.seed(1)
    torch.manual_seed(1)
    yield


def gradients(side: Side, batch: Data, training: bool) -> list[Tensor]:
    """The output and the gradients of the encoder's parameters, with fixed random numbers."""
    side.model.train(training)
    with seeded():
        out_BSD = side.encode(batch)
        generator = torch.Generator().manual_seed(3)
        out_BSD.backward(torch.randn(out_BSD.shape, generator=generator).to(out_BSD))
    embed, encoder = side.model.encoder_embed, side.model.encoder
    parameters = dict([*embed.named_parameters("embed"), *encoder.named_parameters("encoder")])
    found = [p.grad.clone().float() for _, p in sorted(parameters.items()) if p.grad is not None]
    side.model.zero_grad(set_to_none=True)
    return [out_BSD.detach().float(), *found]


def compare(one: Side, other: Side, batch: Data, training: bool, tolerance: float) -> None:
    """Stops the program where two sides do not compute the same."""
    a, b = gradients(one, batch, training), gradients(other, batch, training)
    if len(a) != len(b):
        raise SystemExit(f"{one.name} has {len(a) - 1} gradients, {other.name} {len(b) - 1}")
    flat = [torch.cat([x.flatten() for x in side]) for side in (a[1:], b[1:])]
    errors = [float((x - y).norm() / y.norm()) for x, y in ((a[0], b[0]), flat)]
    mode = "training, same random numbers" if training else "regularisers off"
    print(f"{one.name} against {other.name} ({mode}): outputs differ by {errors[0]:.1e}, gradients by {errors[1]:.1e}")
    if not max(errors) < tolerance:
        raise SystemExit(f"that is more than {tolerance:g}: nothing is timed")


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(step: Callable[[Data], None], batches: list[Data], device: str, repeats: int) -> dict[str, float]:
    """Figures of a step, a round of the batches as the unit of time."""
    for batch in batches + batches[-1:]:
        step(batch)
    wait(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
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
        return figures
    figures["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step(batches[0])
        wait(device)
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    figures["busy ms"] = sum(event.self_device_time_total for event in kernels) / 1000
    figures["kernels"] = len(kernels)
    measure.last = profiler  # type: ignore[attr-defined]
    return figures


def print_kernels(title: str, out: Path) -> None:
    """Where the GPU's time went in the last measurement, to a file."""
    table = measure.last.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=110)  # type: ignore[attr-defined]
    with open(out, "a", encoding="utf-8") as file:
        file.write(f"\n== {title}\n{table}\n")


def check(sides: list[Side], batch: Data, options: argparse.Namespace) -> None:
    """All sides against the plain one."""
    plain = next(side for side in sides if side.name == "plain")
    tolerance = 0.05 if plain.half else 1e-3
    for side in sides:
        if side.name == "peer":  # which keeps the derivative of its activations in 8 bits
            compare(side, plain, batch, False, max(tolerance, 0.01))
        if side.name == "graphs":
            compare(side, plain, batch, True, tolerance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", default="m", choices=SIZES)
    parser.add_argument("--variant", default="zipformer", choices=VARIANTS, help="the peer has only zipformer")
    parser.add_argument("--precision", default="bf16", choices=("float32", "bf16", "fp16"))
    parser.add_argument("--vocab-size", type=int, default=500)
    parser.add_argument("--sides", default="peer,plain,graphs", help="which to time (default: all)")
    parser.add_argument("--peer", type=Path, help="folder of the package zipformer (default: where it is installed)")
    parser.add_argument("--batch-scale", type=float, default=1.0, help="share of the 600 s a batch (default: 1)")
    parser.add_argument("--repeats", type=int, default=5, help="the median counts (default: 5)")
    parser.add_argument("--no-mix", action="store_true", help="leave out the mix of lengths")
    parser.add_argument("--kernels", type=Path, help="write here where the GPU's time goes, kernel by kernel")
    options = parser.parse_args()

    config = ZipformerConfig(**SIZES[options.size], **VARIANTS[options.variant])
    wanted = options.sides.split(",")
    sides = [make_ours(config, options, graphs=False)]
    weights = sides[0].model.state_dict()
    if "graphs" in wanted:
        sides.append(make_ours(config, options, True, weights))
    if "peer" in wanted and options.variant == "zipformer":
        spec = None if options.peer else importlib.util.find_spec("zipformer")
        folder = options.peer or (spec and spec.origin and Path(spec.origin).parent)
        if not folder or not Path(folder).is_dir():
            raise SystemExit(f"--peer {folder}: give the folder of the package zipformer, or leave peer out of --sides")
        peer = make_peer(Path(folder), config, options)
        peer.model.load_state_dict(weights)
        sides.insert(0, peer)
    fixed, mix = (make_batches(s, options.device, options.vocab_size, options.batch_scale) for s in (FIXED, MIX))
    check(sides, fixed[0], options)

    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {options.variant} {options.size}, {options.precision}")
    rows: list[tuple[str, str, str, dict[str, float]]] = []
    shapes = {"fixed": fixed} if options.no_mix else {"fixed": fixed, "mix": mix}
    jobs = [(s, b, k) for s in shapes for k in ("encoder_step", "training_step", "evaluation") for b in sides]
    for shape, side, kind in tqdm(jobs, leave=False, disable=None):
        if side.name not in wanted or (side.name == "graphs" and kind == "evaluation"):
            continue
        side.model.train(kind != "evaluation")
        figures = measure(getattr(side, kind), shapes[shape], options.device, options.repeats)
        rows.append((shape, kind, side.name, figures))
        if options.kernels and options.device == "cuda" and shape == "fixed":
            print_kernels(f"{options.variant} {kind} {side.name}", options.kernels)
    print(f"{'shape':<7}{'what':<15}{'side':<8}" + "".join(f"{key:>12}" for key in rows[0][3]))
    for shape, kind, side_name, figures in rows:
        print(f"{shape:<7}{kind:<15}{side_name:<8}" + "".join(f"{value:12.1f}" for value in figures.values()))


if __name__ == "__main__":
    main()
