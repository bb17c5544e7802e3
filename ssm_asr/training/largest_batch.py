"""A trial of the largest batch, so that a run that needs too much memory fails at its start, not hours later."""

import torch

from ssm_asr.data.batches import TrainingJobs, finish, largest_joined
from ssm_asr.data.config import DataConfig
from ssm_asr.data.loading import Loader
from ssm_asr.encoder.regularize import load_whitening_flags, whitening_flags
from ssm_asr.training import TrainingError
from ssm_asr.training.distributed import Place
from ssm_asr.training.objective import Objective


def try_largest_batch(
    objective: Objective, jobs: TrainingJobs, loader: Loader, config: DataConfig, place: Place
) -> None:
    """Runs one forward and backward pass on a batch that hardly any batch of training exceeds.

    It leaves gradients behind, and sets the whitening flags to what they are at the start of training.

    Raises:
        TrainingError: if the batch does not fit into the memory of the device.
    """
    on_gpu = place.device.type == "cuda"
    batch = finish(loader.load(jobs.largest()), place.device)
    if config.join_probability:
        batch = largest_joined(batch, config)
    try:
        objective.weighted(objective.losses(batch)).nan_to_num(posinf=0.0).sum().backward()
    except torch.OutOfMemoryError:
        size = "×".join(str(n) for n in batch.features_BTF.shape)
        raise TrainingError(
            f"the largest batch ({size} features) does not fit into the memory of {place.device}; "
            f"lower data.max_duration_s, now {config.max_duration_s:g}"
        ) from None
    model = objective.model
    load_whitening_flags(model, [True] * len(whitening_flags(model)))
    if on_gpu:
        peak_gib = torch.cuda.max_memory_allocated(place.device) / 2**30
        print(f"the largest batch takes {peak_gib:.1f} GiB on {place.device}")
