"""The Eden learning-rate schedule of the Zipformer (Yao et al., ICLR 2024, arXiv 2310.11230, section 3.5)."""

import torch


class Eden:
    """Lowers the learning rate as the batch count and the epoch count grow, after a linear warm-up.

        lr = base · ((b² + B²) / B²)^-¼ · ((e² + E²) / E²)^-¼ · w

    Here b counts batches and e epochs, both from 0, B is lr_batches and E is lr_epochs; w rises from warmup_start to 1
    over warmup_batches. The schedule keeps no state of its own. The base rate of a parameter group is the rate that
    the group has when it is first scheduled; it is stored in the group as initial_lr, and so in the optimiser's state.

    Args:
        optimizer: its parameter groups are scheduled.
        lr_batches: number of batches after which the rate clearly falls.
        lr_epochs: number of epochs after which the rate clearly falls.
        warmup_batches: length of the warm-up in batches.
        warmup_start: the factor w at its beginning.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        lr_batches: float,
        lr_epochs: float,
        warmup_batches: int = 500,
        warmup_start: float = 0.1,
    ) -> None:
        self._optimizer = optimizer
        self._lr_batches = lr_batches
        self._lr_epochs = lr_epochs
        self._warmup_batches = warmup_batches
        self._warmup_start = warmup_start
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def factor(self, batch: int, epoch: float) -> float:
        """Returns the learning rate relative to the base rate, after `batch` batches and `epoch` epochs."""
        warmup = 1.0
        if batch < self._warmup_batches:
            warmup = self._warmup_start + (1 - self._warmup_start) * batch / self._warmup_batches
        decay = (1 + (batch / self._lr_batches) ** 2) * (1 + (epoch / self._lr_epochs) ** 2)
        return decay**-0.25 * warmup

    def step(self, batch: int, epoch: float) -> float:
        """Sets the learning rate for the batch that follows `batch` batches and `epoch` epochs, and returns it."""
        factor = self.factor(batch, epoch)
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        return float(self._optimizer.param_groups[0]["lr"])
