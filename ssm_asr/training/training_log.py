"""What a run tells while it trains: figures for TensorBoard, and a progress bar."""

from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ssm_asr.training.state import Progress, TrainingState
from ssm_asr.transducer.model import Losses


class TrainingLog:
    """The progress bar and the TensorBoard file of a run, open within a `with` block.

    Args:
        exp_dir: experiment directory; the file goes into tensorboard/ in it.
        progress: where the run begins.
        audio_s: all audio that the run trains on, in seconds; the bar ends there.
        enabled: whether this process tells anything; only the first one does.
    """

    def __init__(self, exp_dir: Path, progress: Progress, audio_s: float, enabled: bool) -> None:
        # An interrupted run trains on the batches after its last checkpoint again: TensorBoard forgets the first time.
        purge_step = progress.batch + 1
        self._writer = SummaryWriter(exp_dir / "tensorboard", purge_step=purge_step) if enabled else None
        self._bar = tqdm(
            total=round(audio_s),
            initial=round(progress.audio_s),
            unit="s",
            unit_scale=True,
            desc="train (seconds of audio)",
            disable=not enabled,
            mininterval=1.0,
            smoothing=0.05,
        )

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        if self._writer:
            self._writer.close()

    def advance(self, audio_s: float) -> None:
        """Moves the bar by seconds of audio."""
        self._bar.update(round(audio_s))

    def show(self, text: str) -> None:
        """Writes a text at the end of the bar."""
        self._bar.set_postfix_str(text)

    def write(self, values: dict[str, float], batch: int) -> None:
        """Writes figures to TensorBoard, after so many batches."""
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, batch)


def step_values(losses: Losses, loss_B: Tensor, frames: float, state: TrainingState) -> dict[str, float]:
    """Returns the figures of a step for TensorBoard. The host waits for the device, so call it rarely.

    Args:
        losses: the losses of the batch.
        loss_B: their weighted sum.
        frames: feature frames of the batch; the figures are losses per frame, in nats.
    """
    named = {name.removesuffix("_B"): x_B for name, x_B in losses._asdict().items() if x_B is not None}
    values = {
        f"train/{name}": float(x_B.detach()[x_B.isfinite()].sum()) / frames
        for name, x_B in {**named, "loss": loss_B}.items()
    }
    values["optim/learning_rate"] = state.optimizer.param_groups[0]["lr"]
    values |= {f"optim/{name}": value for name, value in state.optimizer.statistics().items()}
    values["count/skipped_utterances"] = state.progress.skipped_utterances
    values["count/bad_batches"] = state.progress.bad_batches
    if state.scaler.is_enabled():
        values["optim/loss_scale"] = state.scaler.get_scale()
    return values
