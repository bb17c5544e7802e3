"""The training loop: one run, from its first batch or its newest checkpoint to the end of its last epoch."""

import gc
import math
import random
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
from lhotse import CutSet

from ssm_asr import units
from ssm_asr.config import Experiment
from ssm_asr.data.batches import Batch, TrainingJobs
from ssm_asr.data.feed import Event, Feed, Position
from ssm_asr.data.loading import Loader
from ssm_asr.data.tokens import Tokenizer
from ssm_asr.encoder.schedule import scheduled_modules, set_batch_count
from ssm_asr.ops.devices import to_host
from ssm_asr.ssm.parameters import parameter_groups
from ssm_asr.training import distributed
from ssm_asr.training.averaging import RunningAverage
from ssm_asr.training.compile_ahead import compile_ahead
from ssm_asr.training.fast import make_passes, resolve_fast
from ssm_asr.training.guard import Guard
from ssm_asr.training.largest_batch import try_largest_batch
from ssm_asr.training.lr import Eden
from ssm_asr.training.objective import Objective
from ssm_asr.training.optim import ScaledAdam
from ssm_asr.training.resume import Checkpoints, data_fingerprint
from ssm_asr.training.state import TrainingState
from ssm_asr.training.stopping import StopOnSignal
from ssm_asr.training.training_log import TrainingLog, step_values
from ssm_asr.training.validation import validation_loss
from ssm_asr.training.weight_noise import noisy_weights, variational_noise
from ssm_asr.transducer.model import Losses, Transducer

REFERENCE_BATCH_S = 600.0  # The schedules of the regularisers count batches of this much audio.


class StepResult(NamedTuple):
    """What came of one step."""

    losses: Losses  # This process's batch had these losses.
    audio_s: float  # The batches of all processes together held this much audio.
    stop_asked: bool  # Some process has received a signal to stop.


class Trainer:
    """One training run in one experiment directory, whose files `experiment_dir` describes.

    Every process of a run makes one and calls `run`.

    Args:
        experiment: the configuration.
        tokenizer: makes the tokens.
        exp_dir: experiment directory, as `resume.make_ready` left it.
        train_cuts: cuts to train on, best after `filter_cuts`; every process gets all of them.
        valid_cuts: cuts to validate on; every process gets all of them.
        noise_cuts: noises to mix in; None means no noise.
        place: this process.
    """

    def __init__(
        self,
        experiment: Experiment,
        tokenizer: Tokenizer,
        exp_dir: Path,
        train_cuts: CutSet,
        valid_cuts: CutSet,
        noise_cuts: CutSet | None,
        place: distributed.Place,
    ) -> None:
        self.experiment, self.tokenizer, self.exp_dir, self.place = experiment, tokenizer, exp_dir, place
        self.train_cuts, self.noise_cuts = train_cuts, noise_cuts
        self.valid_cuts = CutSet.from_cuts(list(valid_cuts)[place.rank :: place.world_size])
        settings, optim = experiment.train, experiment.optim
        torch.manual_seed(settings.seed)
        self.model = Transducer(experiment.model, tokenizer.vocab_size).to(place.device)
        distributed.share_weights(self.model, place)
        self.scheduled = scheduled_modules(self.model)
        self.fast = resolve_fast(
            settings.fast,
            place.device,
            fixed_shapes=experiment.data.fixed_shapes,
            loss_backend=experiment.loss.backend,
        )
        passes = make_passes(self.model, self.fast, experiment.loss.backend)
        self.noisy_weights = noisy_weights(self.model, settings.weight_noise.parts)
        self.objective = Objective(self.model, experiment, place.device, passes)
        optimizer = ScaledAdam(
            parameter_groups(self.model, optim.ssm_lr_scale), lr=optim.base_lr, clipping_scale=optim.clipping_scale
        )
        self.scheduler = Eden(optimizer, optim.lr_batches, optim.lr_epochs, warmup_batches=optim.warmup_batches)
        scaler = torch.amp.GradScaler(place.device.type, enabled=settings.precision == "fp16")
        self.state = TrainingState(self.model, optimizer, scaler, RunningAverage(settings.average_period))
        self.guard = Guard(exp_dir, place.world_size)
        self.fingerprint = data_fingerprint(train_cuts, tokenizer, noise_cuts)
        self.checkpoints = Checkpoints(exp_dir, experiment, tokenizer, self.fingerprint, place)
        self.stop = StopOnSignal()

    def run(self) -> bool:
        """Trains to the end of the last epoch, from the newest checkpoint if there is one.

        Returns:
            False if a signal asked to stop before the end; a checkpoint has been saved then.

        Raises:
            TrainingError: if training cannot go on.
            CheckpointError: if a checkpoint cannot be read or written.
        """
        resumed = self.checkpoints.load_newest_into(self.state)
        noises = list(self.noise_cuts or ())
        place, data = self.place, self.experiment.data
        jobs = TrainingJobs(
            self.train_cuts,
            data,
            len(noises),
            seed=self.experiment.train.seed,
            rank=place.rank,
            world_size=place.world_size,
        )
        loader = Loader(self.tokenizer, data, noises)
        gc.freeze()  # the cuts stay to the end, so Python's collector need not look at them again and again
        with closing(self._make_feed(jobs, loader)) as feed:  # workers load the first batches meanwhile
            self._prepare_step()
            if not self.fast.encoder_graphs and place.rank == 0:
                print(compile_ahead(self.objective, self.state.optimizer, jobs, place.device), flush=True)
            distributed.wait(place)
            if not resumed:
                self._prepare_step()
                try_largest_batch(self.objective, jobs, loader, data, place)
                self.state.optimizer.zero_grad(set_to_none=True)
            audio_s = self.experiment.train.num_epochs * sum(cut.duration for cut in self.train_cuts)
            with (
                TrainingLog(self.exp_dir, self.state.progress, audio_s, enabled=self.place.rank == 0) as log,
                self.stop,
            ):
                finished = self._follow(feed, log)
        self.checkpoints.finish()
        return finished

    def _make_feed(self, jobs: TrainingJobs, loader: Loader) -> Feed:
        settings, progress = self.experiment.train, self.state.progress
        return Feed(
            jobs,
            self.valid_cuts,
            loader,
            self.experiment.data,
            start=Position(progress.batch, progress.epoch, progress.batch_in_epoch),
            num_epochs=settings.num_epochs,
            validate_every=settings.validate_every,
            device=self.place.device,
        )

    def _follow(self, feed: Feed, log: TrainingLog) -> bool:
        """Does what the feed says to its end; returns False if asked to stop before."""
        progress, checkpoint_every = self.state.progress, self.experiment.train.checkpoint_every
        for event, batch in feed:
            if batch is not None:
                stop_asked = self._train_batch(batch, feed.fetch_next, log)
                if stop_asked or progress.batch % checkpoint_every == 0:
                    self.checkpoints.save_to_resume(self.state)
                if stop_asked:
                    return False
            elif event is Event.VALIDATE:
                self._validate(feed.validation(), log)
            else:
                self._end_epoch()
        return True

    def _train_batch(self, batch: Batch, fetch_next: Callable[[], None], log: TrainingLog) -> bool:
        """Makes one step, and logs it when it is time; returns whether it was asked to stop."""
        result = self.step(batch, fetch_next)
        log.advance(result.audio_s)
        if self.state.progress.batch % self.experiment.train.log_every == 0:
            self._log_step(result.losses, batch, log)
        return result.stop_asked

    def step(self, batch: Batch, fetch_next: Callable[[], None] = lambda: None) -> StepResult:
        """Trains on one batch.

        Args:
            batch: this process's batch.
            fetch_next: loads the next batch; called while the device is busy with the backward pass.

        Raises:
            TrainingError: if too many batches in a row had no finite loss.
        """
        progress, optimizer, scaler = self.state.progress, self.state.optimizer, self.state.scaler
        self._prepare_step()
        losses, loss_values = self._compute_gradients(batch)
        fetch_next()
        # The host waits for the device only here, where the device still has the backward pass to do.
        check = self.guard.check_losses(loss_values(), batch.ids, progress.batch)
        if check.bad:
            optimizer.zero_grad(set_to_none=True)
        audio_s = float(batch.feature_lens_B.sum()) * units.FRAME_SHIFT_MS / 1000
        # All processes get equal sums, so that they stop, and give up, after one and the same step.
        counts = torch.tensor([audio_s, check.unalignable, check.bad, self.stop.asked], dtype=torch.float64)
        audio_s, unalignable, bad_batches, stops = distributed.total(counts, self.place).tolist()
        if bad_batches < self.place.world_size:
            distributed.average_gradients(self.model, self.place)
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)

        progress.batch += 1
        progress.batch_in_epoch += 1
        progress.audio_s += audio_s
        progress.skipped_utterances += int(unalignable)
        progress.bad_batches += int(bad_batches)
        self.guard.check_step(int(bad_batches))
        if self.place.rank == 0:
            self.state.average.update(self.model, progress.batch)
        return StepResult(losses, audio_s, stops > 0)

    def _prepare_step(self) -> None:
        """Moves all schedules to the present batch, and seeds random numbers by it, so that resuming is exact."""
        progress, settings = self.state.progress, self.experiment.train
        seed = f"{settings.seed} {progress.batch} {self.place.rank}"
        random.seed(seed)
        torch.manual_seed(random.getrandbits(63))
        self.scheduler.step(progress.batch, progress.epoch - 1)
        batch_s = self.experiment.data.max_duration_s * self.place.world_size
        set_batch_count(self.scheduled, progress.batch * batch_s / REFERENCE_BATCH_S * settings.schedule_speed)
        if not self.model.training:
            self.model.train()

    def _compute_gradients(self, batch: Batch) -> tuple[Losses, Callable[[], list[float]]]:
        """Runs the forward and backward passes, on noisy weights if the configuration says so.

        Returns:
            The losses, and a function that waits for their weighted sums and returns them, one for each utterance.
        """
        batches_trained = self.state.progress.batch
        deviation = self.experiment.train.weight_noise.deviation_at(batches_trained)
        with variational_noise(self.noisy_weights, deviation):
            losses = self.objective.losses(batch)
            loss_B = self.objective.weighted(losses, batches_trained)
            loss_values = to_host(loss_B)
            self.state.scaler.scale(loss_B.masked_fill(loss_B.isposinf(), 0.0).sum()).backward()
        return losses, loss_values

    def _log_step(self, losses: Losses, batch: Batch, log: TrainingLog) -> None:
        """Writes the figures of a step, and gives up if the optimiser makes no steps any more."""
        if self.place.rank != 0:
            return
        progress = self.state.progress
        loss_B = self.objective.weighted(losses, progress.batch)
        values = step_values(losses, loss_B, float(batch.feature_lens_B.sum()), self.state)
        nonfinite_steps, loss_scale = values.get("optim/nonfinite_steps", 0), values.get("optim/loss_scale", 1.0)
        self.guard.check_gradients(progress.batch, int(nonfinite_steps), loss_scale)
        log.show(f"epoch {progress.epoch}, loss {values['train/loss']:.3f}")
        log.write(values, progress.batch)

    def _validate(self, batches: Iterable[Batch], log: TrainingLog) -> None:
        """Computes the loss on the validation cuts; saves the model if it is the best so far."""
        progress = self.state.progress
        loss = validation_loss(self.objective, batches, self.place)
        log.write({"valid/loss": loss}, progress.batch)
        progress.valid_loss = loss
        if not math.isfinite(loss) and self.place.rank == 0:
            print(f"after {progress.batch} batches the validation loss is {loss}", file=sys.stderr)
        if loss < progress.best_valid_loss:
            progress.best_valid_loss = loss
            self.checkpoints.save(self.state, "best.pt")

    def _end_epoch(self) -> None:
        progress = self.state.progress
        self.checkpoints.save(self.state, f"epoch-{progress.epoch}.pt")
        progress.epoch += 1
        progress.batch_in_epoch = 0
        self.checkpoints.save_to_resume(self.state)
