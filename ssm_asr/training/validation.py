"""The loss on the validation cuts."""

import math
from collections.abc import Iterable

import torch

from ssm_asr.data.batches import Batch
from ssm_asr.training import distributed
from ssm_asr.training.objective import Objective


@torch.no_grad()
def validation_loss(objective: Objective, batches: Iterable[Batch], place: distributed.Place) -> float:
    """Returns the loss in nats per feature frame, with the final weights of the losses; leaves the model in eval mode.

    Utterances whose transcript no alignment fits are left out. Any other loss that is not finite makes the result NaN
    or infinite, so that it is noticed; so does a lack of utterances.

    Args:
        batches: this process's part of the validation cuts; the result covers the cuts of all processes.
    """
    objective.model.eval()
    sums = torch.zeros(2, device=place.device, dtype=torch.float64)
    for batch in batches:
        loss_B = objective.weighted(objective.losses(batch))
        alignable_B = ~loss_B.isposinf()
        sums[0] += loss_B[alignable_B].sum()
        sums[1] += batch.feature_lens_B[alignable_B.cpu()].sum()
    total, frames = distributed.total(sums, place).tolist()
    return total / frames if frames else math.nan
