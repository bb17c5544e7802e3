"""One training run, from the first batch or the last checkpoint to the last epoch."""

import json
import math
import random
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lhotse import CutSet
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ssm_asr import checkpoint, units
from ssm_asr.config import Experiment, from_dict
from ssm_asr.data.batches import Batch, eval_batches, largest_joined, train_batches
from ssm_asr.data.tokens import Tokenizer
from ssm_asr.encoder.regularize import load_whitening_flags, set_batch_count, whitening_flags
from ssm_asr.ops.devices import to_host
from ssm_asr.ssm.parameters import parameter_groups
from ssm_asr.training import distributed
from ssm_asr.training.averaging import RunningAverage
from ssm_asr.training.experiment_dir import fingerprint, resumable
from ssm_asr.training.optim import Eden, ScaledAdam
from ssm_asr.training.stopping import StopOnSignal
from ssm_asr.training.weight_noise import noisy_weights, variational_noise
from ssm_asr.transducer.model import Losses, Transducer

REFERENCE_BATCH_S = 600.0
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_BAD_BATCHES = 20  # in a row, after which training has diverged
LEAST_LOSS_SCALE = 1e-5  # of fp16


class Trainer:
    """One training run in one experiment directory, whose files experiment_dir describes."""

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
        self.epoch_audio_s = sum(cut.duration for cut in train_cuts)
        settings, optim = experiment.train, experiment.optim
        torch.manual_seed(settings.seed)
        self.model = Transducer(experiment.model, tokenizer.vocab_size).to(place.device)
        distributed.share_weights(self.model, place)
        if settings.fast == "auto" and experiment.data.fixed_shapes and place.device.type == "cuda":
            self.model.capture_graphs()
        self.noisy_weights = noisy_weights(self.model, settings.weight_noise.parts)
        self.average = RunningAverage(settings.average_period)
        self.optimizer = ScaledAdam(
            parameter_groups(self.model, optim.ssm_lr_scale), lr=optim.base_lr, clipping_scale=optim.clipping_scale
        )
        self.scheduler = Eden(self.optimizer, optim.lr_batches, optim.lr_epochs, warmup_batches=optim.warmup_batches)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=settings.precision == "fp16")
        # Everything that says where the run is, the same in all processes; saved and restored as it stands.
        self.progress: dict[str, Any] = {
            "batch": 0,
            "epoch": 1,
            "batch_in_epoch": 0,
            "audio_s": 0.0,
            "best_valid_loss": math.inf,
            "skipped_utterances": 0,
            "bad_batches": 0,
        }
        self.data = fingerprint(train_cuts, tokenizer, noise_cuts)
        self.bad_in_a_row = 0
        self.last_steps = -1, 0  # steps made, and the batch at which that was seen
        self.writer: SummaryWriter | None = None

    def run(self) -> bool:
        """Trains to the last epoch; False if a signal asked to stop before, after saving a checkpoint.

        Raises:
            SystemExit: if training cannot go on; the message says why and what to do.
        """
        settings = self.experiment.train
        self._resume()
        if self.place.rank == 0:
            # What an interrupted run logged after its last checkpoint happens again.
            self.writer = SummaryWriter(self.exp_dir / "tensorboard", purge_step=self.progress["batch"] + 1)
        bar = tqdm(
            total=round(self.epoch_audio_s * settings.num_epochs),
            initial=round(self.progress["audio_s"]),
            unit="s",
            unit_scale=True,
            desc="train (seconds of audio)",
            disable=self.place.rank != 0,
            mininterval=1.0,
            smoothing=0.05,
        )
        try:
            with bar, StopOnSignal() as stop:
                while self.progress["epoch"] <= settings.num_epochs:
                    if self._train_epoch(bar, stop):
                        self._save_to_resume()
                        return False
                    self._end_epoch()
        finally:
            if self.writer:
                self.writer.close()
        return True

    def _train_epoch(self, bar: tqdm, stop: StopOnSignal) -> bool:
        """What is left of an epoch; whether any process has been asked to stop."""
        batches = train_batches(
            self.train_cuts,
            self.experiment.data,
            self.tokenizer,
            epoch=self.progress["epoch"],
            seed=self.experiment.train.seed,
            start_batch=self.progress["batch_in_epoch"],
            rank=self.place.rank,
            world_size=self.place.world_size,
            noise_cuts=self.noise_cuts,
        )
        coming = [next(batches, None)]
        while (batch := coming.pop()) is not None:
            if self._train_batch(batch, bar, stop, lambda: coming.append(next(batches, None))):
                return True
        return False

    def _train_batch(
        self, batch: Batch, bar: tqdm, stop: StopOnSignal, meanwhile: Callable[[], None] = lambda: None
    ) -> bool:
        """One step; whether any process has been asked to stop. Does something meanwhile, before it needs results."""
        settings, progress = self.experiment.train, self.progress
        self._prepare_batch()
        with variational_noise(self.noisy_weights, settings.weight_noise.deviation_at(progress["batch"])):
            losses = self._losses(batch.to(self.place.device))
            total_B = self._weighted(losses, progress["batch"])
            numbers = to_host(total_B)
            self.scaler.scale(total_B.masked_fill(total_B.isposinf(), 0.0).sum()).backward()
        meanwhile()
        # The only time in a step that the host waits for the device, which has the backward pass to do meanwhile.
        infeasible, bad = self._look_at(numbers(), batch)
        if bad:
            self.optimizer.zero_grad(set_to_none=True)
        seconds = float(batch.feature_lens_B.sum()) * units.FRAME_SHIFT_MS / 1000
        # All processes see the same counts, so that they stop, and give up, after the same batch.
        counts = torch.tensor([seconds, infeasible, bad, stop.asked], dtype=torch.float64)
        seconds, infeasible, all_bad, asked = distributed.total(counts, self.place).tolist()
        if all_bad < self.place.world_size:
            distributed.average_gradients(self.model, self.place)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._count_bad(int(all_bad))

        progress["batch"] += 1
        progress["batch_in_epoch"] += 1
        progress["audio_s"] += seconds
        progress["skipped_utterances"] += int(infeasible)
        bar.update(round(seconds))
        if self.place.rank == 0:
            self.average.update(self.model, progress["batch"])
        if progress["batch"] % settings.log_every == 0:
            self._log(losses, batch, bar)
        if progress["batch"] % settings.validate_every == 0:
            self._validate()
        if progress["batch"] % settings.checkpoint_every == 0:
            self._save_to_resume()
        return asked > 0

    def _prepare_batch(self) -> None:
        """Moves all schedules to this batch, and seeds its random numbers, so that a resumed run draws the same."""
        progress, settings = self.progress, self.experiment.train
        seed = f"{settings.seed} {progress['batch']} {self.place.rank}"
        random.seed(seed)
        torch.manual_seed(random.getrandbits(63))
        self.scheduler.step(progress["batch"], progress["epoch"] - 1)
        batch_s = self.experiment.data.max_duration_s * self.place.world_size
        set_batch_count(self.model, progress["batch"] * batch_s / REFERENCE_BATCH_S * settings.schedule_speed)
        if not self.model.training:
            self.model.train()

    def _losses(self, batch: Batch) -> Losses:
        """The losses of a batch; with chunks drawn at random in training, those of decoding in evaluation."""
        if self.model.training:
            chunk, left_context = self.experiment.model.encoder.draw_context()
        else:
            chunk, left_context = (
                self.experiment.decode.chunk_frames,
                self.experiment.decode.left_context_frames,
            )
        precision = PRECISIONS[self.experiment.train.precision]
        half = precision != torch.float32
        with torch.autocast(self.place.device.type, precision) if half else nullcontext():
            return self.model(
                batch.features_BTF,
                batch.feature_lens_B,
                batch.tokens_BU,
                batch.token_lens_B,
                chunk,
                left_context,
            )

    def _weighted(self, losses: Losses, batch: float = math.inf) -> Tensor:
        """The loss of each utterance as it is weighted after so many batches; at last, unless said."""
        settings = self.experiment.train
        warm = min(1.0, batch / max(1, settings.loss_warmup_batches))
        simple_scale = 1.0 + (settings.simple_scale - 1.0) * warm
        total_B = simple_scale * losses.simple_B + (0.1 + 0.9 * warm) * losses.pruned_B
        return total_B if losses.ctc_B is None else total_B + settings.ctc_scale * losses.ctc_B

    def _look_at(self, losses: list[float], batch: Batch) -> tuple[int, bool]:
        """How many utterances no alignment fits; whether to skip the batch, which is recorded in bad_batches.jsonl."""
        infeasible = losses.count(math.inf)
        bad = infeasible == len(losses) or not all(math.isfinite(loss) or loss == math.inf for loss in losses)
        if bad:
            values = [loss if math.isfinite(loss) else str(loss) for loss in losses]
            record = {"batch": self.progress["batch"], "losses": values, "ids": list(batch.ids)}
            with open(self.exp_dir / "bad_batches.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        return infeasible, bad

    def _count_bad(self, bad: int) -> None:
        """Counts the batches skipped in this step, of all processes; gives up when nothing else comes."""
        self.progress["bad_batches"] += bad
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad == self.place.world_size else 0
        if self.bad_in_a_row >= MAX_BAD_BATCHES:
            raise SystemExit(
                f"{self.exp_dir}: {MAX_BAD_BATCHES} batches in a row had no finite loss (see bad_batches.jsonl); "
                "lower optim.base_lr, or use train.precision=float32"
            )

    def _log(self, losses: Losses, batch: Batch, bar: tqdm) -> None:
        """Losses in nats a feature frame, rates and gradient norms, to TensorBoard and the progress bar."""
        if self.place.rank != 0:
            return
        frames = float(batch.feature_lens_B.sum())
        total_B = self._weighted(losses, self.progress["batch"])
        values = {
            f"train/{name}": float(x_B.detach()[x_B.isfinite()].sum()) / frames
            for name, x_B in [*_named(losses), ("loss", total_B)]
        }
        values["optim/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        values |= {f"optim/{name}": value for name, value in self.optimizer.statistics().items()}
        values |= {f"count/{name}": self.progress[name] for name in ("skipped_utterances", "bad_batches")}
        if self.scaler.is_enabled():
            values["optim/loss_scale"] = self.scaler.get_scale()
        self._look_at_gradients(int(values.get("optim/nonfinite_steps", 0)), values.get("optim/loss_scale", 1.0))
        bar.set_postfix_str(f"epoch {self.progress['epoch']}, loss {values['train/loss']:.3f}")
        self._write(values)

    def _look_at_gradients(self, skipped: int, loss_scale: float) -> None:
        """Gives up when no step has been made for long, for want of a finite gradient; `skipped` of all steps.

        In fp16 such steps do not come to the optimiser, which counts them, but halve the scale of the losses.
        """
        if loss_scale < LEAST_LOSS_SCALE:
            raise SystemExit(
                f"{self.exp_dir}: gradients overflow fp16, of losses multiplied by {LEAST_LOSS_SCALE:g}, too; "
                "use train.precision=bf16, or lower optim.base_lr"
            )
        batch, (steps, since) = self.progress["batch"], self.last_steps
        if batch - skipped > steps:
            self.last_steps = batch - skipped, batch
        elif batch - since >= MAX_BAD_BATCHES:
            raise SystemExit(
                f"{self.exp_dir}: none of the last {batch - since} batches had a finite gradient; "
                "lower optim.base_lr, or use train.precision=float32"
            )

    def _write(self, values: dict[str, float]) -> None:
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, self.progress["batch"])

    @torch.no_grad()
    def _validate(self) -> None:
        """The loss on the validation cuts, weighted as at the end so that all are comparable; keeps the best model."""
        self.model.eval()
        sums = torch.zeros(2, device=self.place.device, dtype=torch.float64)
        batches = eval_batches(self.valid_cuts, self.tokenizer, max_duration_s=self.experiment.data.max_duration_s)
        for batch in batches:
            loss_B = self._weighted(self._losses(batch.to(self.place.device)))
            possible_B = ~loss_B.isposinf()  # those with an alignment; a loss that is no number is to be seen
            sums[0] += loss_B[possible_B].sum()
            sums[1] += batch.feature_lens_B[possible_B.cpu()].sum()
        total, frames = distributed.total(sums, self.place).tolist()
        loss = total / frames if frames else math.nan
        self._write({"valid/loss": loss})
        self.progress["valid_loss"] = loss
        if not math.isfinite(loss) and self.place.rank == 0:
            print(f"after {self.progress['batch']} batches the validation loss is {loss}", file=sys.stderr)
        if loss < self.progress["best_valid_loss"]:
            self.progress["best_valid_loss"] = loss
            self._save("best.pt")

    def _end_epoch(self) -> None:
        self._validate()
        self._save(f"epoch-{self.progress['epoch']}.pt")
        self.progress["epoch"] += 1
        self.progress["batch_in_epoch"] = 0
        self._save_to_resume()

    def _save(self, name: str, **parts: Any) -> None:
        if self.place.rank == 0:
            state = self.model.state_dict()
            average = self.average.state_dict()
            packed = checkpoint.pack(
                self.experiment, self.tokenizer, state, dict(self.progress), average=average, **parts
            )
            checkpoint.save(packed, self.exp_dir / name)

    def _save_to_resume(self) -> None:
        """Writes checkpoint-N.pt and removes the oldest, beyond the number to keep."""
        training = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "whitening": distributed.gather(whitening_flags(self.model), self.place),  # of each process
            "world_size": self.place.world_size,
            "data": self.data,
        }
        self._save(f"checkpoint-{self.progress['batch']}.pt", training=training)
        if self.place.rank == 0:
            for old in list(resumable(self.exp_dir).values())[: -self.experiment.train.keep_checkpoints]:
                old.unlink()

    def _resume(self) -> None:
        """Takes up the last checkpoint; without one, looks whether the largest batch fits."""
        files = list(resumable(self.exp_dir).values())
        if not files:
            self._try_largest_batch()
            return
        saved = checkpoint.load(files[-1])
        finished = saved["progress"]["epoch"] > self.experiment.train.num_epochs
        if saved["training"]["world_size"] != self.place.world_size and not finished:
            raise SystemExit(
                f"{files[-1]}: was trained by {saved['training']['world_size']} processes, now there are "
                f"{self.place.world_size}; use as many, or another --exp-dir"
            )
        self.progress = saved["progress"]
        if self.place.rank == 0:
            print(f"resumed from {files[-1]}: epoch {self.progress['epoch']}, batch {self.progress['batch']}")
        if finished:
            return
        self.model.load_state_dict(saved["model"])
        self.average.load_state_dict(saved["average"])
        # The settings of now count, not those of the checkpoint, which the groups of an optimiser have with them.
        rates = [{name: group[name] for name in ("initial_lr", "lr_scale")} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved["training"]["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group.update(rate)
        if saved["training"]["scaler"]:  # empty if it was not of fp16
            self.scaler.load_state_dict(saved["training"]["scaler"])
        load_whitening_flags(self.model, saved["training"]["whitening"][self.place.rank])
        if self.progress["batch_in_epoch"] and _batching(from_dict(saved["config"])) != _batching(self.experiment):
            self.progress["batch_in_epoch"] = 0
            if self.place.rank == 0:
                print(f"epoch {self.progress['epoch']} begins anew, since its batches are others now")

    def _try_largest_batch(self) -> None:
        """One forward and backward pass of the largest batch, without a step, to run out of memory now if ever."""
        data = self.experiment.data
        batch_s = data.max_duration_s
        longest = sorted(self.train_cuts, key=lambda cut: cut.duration)[-math.ceil(batch_s) :]
        batch = next(eval_batches(CutSet.from_cuts(longest), self.tokenizer, max_duration_s=batch_s))
        if data.join_probability:
            batch = largest_joined(batch, data)
        if self.place.device.type == "cuda" and self.place.rank == 0:
            print("trying the largest batch; kernels not used before are compiled, which may take a minute", flush=True)
        self._prepare_batch()
        try:
            self._weighted(self._losses(batch.to(self.place.device))).nan_to_num(posinf=0.0).sum().backward()
        except torch.OutOfMemoryError:
            size = "×".join(str(n) for n in batch.features_BTF.shape)
            raise SystemExit(
                f"the largest batch ({size} features) does not fit into the memory of {self.place.device}; "
                f"lower data.max_duration_s, now {batch_s:g}"
            ) from None
        self.optimizer.zero_grad(set_to_none=True)
        load_whitening_flags(self.model, [True] * len(whitening_flags(self.model)))
        if self.place.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.place.device) / 2**30
            print(f"the largest batch takes {peak:.1f} GiB on {self.place.device}")


def _batching(experiment: Experiment) -> tuple[Any, ...]:
    """What decides which utterances are in which batch of an epoch."""
    data = experiment.data
    return experiment.train.seed, data.max_duration_s, data.num_buckets, data.fixed_shapes


def _named(losses: Losses) -> list[tuple[str, Tensor]]:
    return [(name.removesuffix("_B"), value) for name, value in losses._asdict().items() if value is not None]
