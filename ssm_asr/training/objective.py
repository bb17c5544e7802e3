"""The loss that training minimises: a weighted sum of the transducer's losses, one value for each utterance.

Shapes: B utterances.
"""

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from ssm_asr.config import Experiment
from ssm_asr.data.batches import Batch
from ssm_asr.training.fast import plain_passes
from ssm_asr.training.graphs import Graphs
from ssm_asr.transducer.model import Losses, Passes, Transducer

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Objective:
    """Computes the losses of a model in the precision of an experiment, and weights them as it says.

    Args:
        model: the model on the device.
        experiment: the configuration.
        device: where batches go.
        passes: how the model runs, as `ssm_asr.training.fast` makes it; None runs it as it is.
    """

    def __init__(
        self, model: Transducer, experiment: Experiment, device: torch.device, passes: Passes | None = None
    ) -> None:
        self.model = model
        self._experiment = experiment
        self._device = device
        self.precision = experiment.train.precision
        self._passes = passes or plain_passes(model, experiment.loss.backend)

    def graphs(self) -> list[Graphs]:
        """Returns the passes that are captured as graphs."""
        return [graphs for graphs in (self._passes.encode, self._passes.losses) if isinstance(graphs, Graphs)]

    def losses(self, batch: Batch, context: tuple[int, int] | None = None) -> Losses:
        """Returns the losses of a batch in nats; an utterance whose transcript no alignment fits has infinite ones.

        Args:
            batch: on any device.
            context: chunk width and left context, in frames of 20 ms. By default a model in training mode draws them
                from Python's random numbers, and a model in evaluation mode has those of decoding.
        """
        if context is not None:
            chunk_frames, left_context_frames = context
        elif self.model.training:
            chunk_frames, left_context_frames = self._experiment.model.encoder.draw_context()
        else:
            decode = self._experiment.decode
            chunk_frames, left_context_frames = decode.chunk_frames, decode.left_context_frames
        batch = batch.to(self._device)
        precision = PRECISIONS[self.precision]
        lower = precision != torch.float32
        with torch.autocast(self._device.type, precision) if lower else nullcontext():
            return self.model(
                batch.features_BTF,
                batch.feature_lens_B,
                batch.tokens_BU,
                batch.token_lens_B,
                chunk_frames,
                left_context_frames,
                self._passes,
            )

    def weighted(self, losses: Losses, batches_trained: float = math.inf) -> Tensor:
        """Returns the weighted sum of the losses: (B,), in nats.

        During the first `train.loss_warmup_batches` batches the simple loss counts for more and the pruned loss for
        less. By default the weights are the final ones, with which losses of different times can be compared.
        """
        settings = self._experiment.train
        warm = min(1.0, batches_trained / max(1, settings.loss_warmup_batches))
        simple_scale = 1.0 + (settings.simple_scale - 1.0) * warm
        loss_B = simple_scale * losses.simple_B + (0.1 + 0.9 * warm) * losses.pruned_B
        return loss_B if losses.ctc_B is None else loss_B + settings.ctc_scale * losses.ctc_B
