"""What makes a training step fast, decided once at the start: the kernels, and captured graphs of its two passes."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ssm_asr.ops import dispatch
from ssm_asr.training.graphs import Graphs
from ssm_asr.transducer.model import Passes, Transducer
from ssm_asr.transducer.pruned_loss import require_backend

MOST_GRAPHS = 256  # shapes of batches, beyond which batches run without a graph


@dataclass(frozen=True)
class Fast:
    """Which fast paths are off and why, in a few words each; an empty text is on.

    Attributes:
        kernels: the Triton kernels of ssm_asr.ops.
        encoder_graphs: CUDA graphs of the front end and the encoder.
        loss_graphs: CUDA graphs of predictor, joiner and transducer losses.
    """

    kernels: str
    encoder_graphs: str
    loss_graphs: str

    def lines(self) -> Iterable[str]:
        """What is on and what is not, for a reader."""
        names = {"kernels": self.kernels, "graphs of the encoder": self.encoder_graphs}
        names["graphs of the losses"] = self.loss_graphs
        on = [name for name, why_off in names.items() if not why_off]
        yield f"fast: {', '.join(on)}" if on else "fast: nothing"
        for why in dict.fromkeys(why for why in names.values() if why):
            off = [name for name, reason in names.items() if reason == why]
            yield f"  without {', '.join(off)}: {why}"


def resolve_fast(wanted: str, device: torch.device, *, fixed_shapes: bool, loss_backend: str) -> Fast:
    """What of the fast paths is used.

    Args:
        wanted: train.fast, "auto" or "off".
        device: which trains.
        fixed_shapes: data.fixed_shapes, without which nearly every batch would want a graph of its own.
        loss_backend: loss.backend.
    """
    if wanted == "off":
        return Fast(*["train.fast is off"] * 3)
    if device.type != "cuda":
        return Fast(*[f"training runs on {device.type}"] * 3)
    graphs = dispatch.missing() or ("" if fixed_shapes else "data.fixed_shapes is false")
    loss_graphs = graphs or ("" if loss_backend == "torch" else f"loss.backend is {loss_backend}")
    return Fast(dispatch.missing(), graphs, loss_graphs)


def plain_passes(model: Transducer, loss_backend: str) -> Passes:
    """The passes as the model's own methods, with the losses by a backend.

    Raises:
        ValueError: as `pruned_loss.require_backend`.
    """
    require_backend(loss_backend)
    return Passes(model.encode, partial(model.transducer_losses, backend=loss_backend))


def make_passes(model: Transducer, fast: Fast, loss_backend: str, most_graphs: int = MOST_GRAPHS) -> Passes:
    """The passes of a training step, captured where that is on. Turns kernels on or off for the process."""
    dispatch.set_kernels(not fast.kernels)
    passes = plain_passes(model, loss_backend)
    if not fast.encoder_graphs:
        parts: list[nn.Module] = [model.encoder_embed, model.encoder]
        passes = passes._replace(
            encode=Graphs(model.encode, parts, most_graphs, cast_together=True), left_on_device=True
        )
    if not fast.loss_graphs:
        parts = [model.decoder, model.joiner, model.simple_am_proj, model.simple_lm_proj]
        passes = passes._replace(
            losses=Graphs(passes.losses, parts, most_graphs, cast_together=False), every_frame=True
        )
    return passes
