"""The fast paths of training, chosen once when it starts: GPU kernels, and captured graphs of a step's two passes."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ssm_asr.ops import dispatch
from ssm_asr.training.graphs import Graphs
from ssm_asr.transducer.model import Passes, Transducer
from ssm_asr.transducer.pruned_loss import require_backend

MOST_GRAPHS = 256  # graphs of each pass; batches of further shapes run without a graph


@dataclass(frozen=True)
class Fast:
    """For each fast path the reason why it is off, in a few words; an empty text means that it is on.

    Attributes:
        kernels: about the Triton kernels of ssm_asr.ops.
        encoder_graphs: about CUDA graphs of the front end and the encoder.
        loss_graphs: about CUDA graphs of predictor, joiner and transducer losses.
    """

    kernels: str
    encoder_graphs: str
    loss_graphs: str

    def lines(self) -> Iterable[str]:
        """Yields lines for the user: which paths are on, and which are off for which reason."""
        names = {"kernels": self.kernels, "graphs of the encoder": self.encoder_graphs}
        names["graphs of the losses"] = self.loss_graphs
        on = [name for name, why_off in names.items() if not why_off]
        yield f"fast: {', '.join(on)}" if on else "fast: nothing"
        for why in dict.fromkeys(why for why in names.values() if why):
            off = [name for name, reason in names.items() if reason == why]
            yield f"  without {', '.join(off)}: {why}"


def resolve_fast(wanted: str, device: torch.device, *, fixed_shapes: bool, loss_backend: str) -> Fast:
    """Decides which fast paths a training run uses.

    Args:
        wanted: the setting train.fast, "auto" or "off".
        device: where the model is trained.
        fixed_shapes: the setting data.fixed_shapes. Without it nearly every batch would need a graph of its own, so
            that there are no graphs.
        loss_backend: the setting loss.backend, "torch" or "k2".
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
    """Makes the passes of a training step, as captured graphs if these are on. Turns kernels on or off in this process.

    Args:
        model: the model to train, on its device.
        fast: the fast paths, from `resolve_fast`.
        loss_backend: the setting loss.backend, "torch" or "k2".
        most_graphs: graphs of each pass; batches of further shapes run without a graph.
    """
    dispatch.set_kernels(not fast.kernels)
    passes = plain_passes(model, loss_backend)
    if not fast.encoder_graphs:
        parts: list[nn.Module] = [model.encoder_embed, model.encoder]
        passes = passes._replace(
            encode=Graphs(model.encode, parts, most_graphs, cast_together=True), context_on_device=True
        )
    if not fast.loss_graphs:
        parts = [model.decoder, model.joiner, model.simple_am_proj, model.simple_lm_proj]
        passes = passes._replace(
            losses=Graphs(passes.losses, parts, most_graphs, cast_together=False), every_frame=True
        )
    return passes
