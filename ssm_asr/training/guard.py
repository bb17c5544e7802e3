"""What a run does about losses and gradients that are not finite.

A batch without a finite loss is skipped and recorded. A run in which all batches are skipped, or no gradient is finite,
for too long has diverged, and ends with an error.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

from ssm_asr.training import TrainingError

MAX_BAD_BATCHES = 20  # A run has diverged when this many batches in a row were of no use.
LEAST_LOSS_SCALE = 1e-5  # Gradients that overflow fp16 at a smaller scale of the losses will always overflow.


class LossCheck(NamedTuple):
    """What the losses of a batch say about it."""

    unalignable: int  # No alignment fits the transcripts of this many utterances, so that their loss is infinite.
    bad: bool  # The batch must be skipped.


class Guard:
    """Watches the losses and gradients of one run.

    Args:
        exp_dir: experiment directory; the records go to bad_batches.jsonl in it.
        world_size: number of processes.
    """

    def __init__(self, exp_dir: Path, world_size: int) -> None:
        self._exp_dir, self._world_size = exp_dir, world_size
        self._bad_steps_in_a_row = 0
        # When check_gradients last found new steps, the optimiser had made so many steps, in so many batches.
        self._steps_made, self._batch_at_last_step = -1, 0

    def check_losses(self, losses: list[float], ids: list[str], batch: int) -> LossCheck:
        """Decides whether a batch is skipped, and records it if so.

        An utterance that no alignment fits has a loss of +inf and is left out; the rest of its batch is trained on.
        Any other loss that is not finite spoils the batch.

        Args:
            losses: one loss for each utterance.
            ids: one id for each utterance.
            batch: the number of batches trained before this one.
        """
        unalignable = losses.count(math.inf)
        spoilt = any(not math.isfinite(loss) and loss != math.inf for loss in losses)
        bad = spoilt or unalignable == len(losses)
        if bad:
            values = [loss if math.isfinite(loss) else str(loss) for loss in losses]
            record = {"batch": batch, "losses": values, "ids": ids}
            with open(self._exp_dir / "bad_batches.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        return LossCheck(unalignable, bad)

    def check_step(self, bad_batches: int) -> None:
        """Counts the steps in a row in which no process had a good batch.

        Args:
            bad_batches: how many processes skipped their batch of this step.

        Raises:
            TrainingError: if there have been too many.
        """
        self._bad_steps_in_a_row = self._bad_steps_in_a_row + 1 if bad_batches == self._world_size else 0
        if self._bad_steps_in_a_row >= MAX_BAD_BATCHES:
            raise TrainingError(
                f"{self._exp_dir}: {MAX_BAD_BATCHES} batches in a row had no finite loss (see bad_batches.jsonl); "
                "lower optim.base_lr, or use train.precision=float32"
            )

    def check_gradients(self, batch: int, nonfinite_steps: int, loss_scale: float = 1.0) -> None:
        """Finds out whether the optimiser still makes steps. It takes figures of the device, so call it rarely.

        In fp16, gradients that are not finite do not reach the optimiser, and so are not in its count; they halve the
        scale of the losses instead.

        Args:
            batch: number of batches trained.
            nonfinite_steps: number of steps that the optimiser has left out.
            loss_scale: the factor on the losses in fp16.

        Raises:
            TrainingError: if no gradient has been finite for too long.
        """
        if loss_scale < LEAST_LOSS_SCALE:
            raise TrainingError(
                f"{self._exp_dir}: gradients overflow fp16, of losses multiplied by {LEAST_LOSS_SCALE:g}, too; "
                "use train.precision=bf16, or lower optim.base_lr"
            )
        steps_made = batch - nonfinite_steps
        batches_without_step = batch - self._batch_at_last_step
        if steps_made > self._steps_made:
            self._steps_made, self._batch_at_last_step = steps_made, batch
        elif batches_without_step >= MAX_BAD_BATCHES:
            raise TrainingError(
                f"{self._exp_dir}: none of the last {batches_without_step} batches had a finite gradient; "
                "lower optim.base_lr, or use train.precision=float32"
            )
