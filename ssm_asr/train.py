"""Train a transducer.

python -m ssm_asr.train --config FILE --train-cuts FILE --valid-cuts FILE --tokens DIR --exp-dir DIR

Several GPUs: torchrun --nproc-per-node N -m ssm_asr.train … . A run that was stopped goes on from its last checkpoint,
exactly: weights, optimiser, running mean and position in the data are in the checkpoint, and the random numbers of a
batch depend on the seed and the batch's number alone.
"""

import argparse
import hashlib
import json
import math
import random
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lhotse import CutSet, load_manifest
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ssm_asr import checkpoint, distributed, units
from ssm_asr.averaging import RunningAverage
from ssm_asr.config import ConfigError, Experiment, from_dict, load_experiment, to_yaml
from ssm_asr.data.batches import Batch, eval_batches, train_batches
from ssm_asr.data.filtering import filter_cuts
from ssm_asr.data.tokens import Tokenizer
from ssm_asr.encoder.regularize import load_whitening_flags, set_batch_count, whitening_flags
from ssm_asr.optim import Eden, ScaledAdam
from ssm_asr.transducer.model import Losses, Transducer

REFERENCE_BATCH_S = 600.0
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_BAD_BATCHES = 20  # in a row, after which training has diverged


class Trainer:
    """One training run in one experiment directory.

    Files in it: config.yaml, checkpoint-N.pt (after N batches; the last few, to resume from), epoch-N.pt and best.pt
    (weights and their running mean), tensorboard/, bad_batches.jsonl if there were any.
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
        self.train_cuts, self.valid_cuts, self.noise_cuts = train_cuts, valid_cuts, noise_cuts
        self.epoch_audio_s = sum(cut.duration for cut in train_cuts)
        settings, optim = experiment.train, experiment.optim
        torch.manual_seed(settings.seed)
        self.model = Transducer(experiment.model, tokenizer.vocab_size).to(place.device)
        distributed.share_weights(self.model, place)
        self.average = RunningAverage(settings.average_period)
        self.optimizer = ScaledAdam(self.model.parameters(), lr=optim.base_lr, clipping_scale=optim.clipping_scale)
        self.scheduler = Eden(self.optimizer, optim.lr_batches, optim.lr_epochs, warmup_batches=optim.warmup_batches)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=settings.precision == "fp16")
        # Everything that says where the run is; saved and restored as it stands.
        self.progress: dict[str, Any] = {
            "batch": 0,
            "epoch": 1,
            "batch_in_epoch": 0,
            "audio_s": 0.0,
            "best_valid_loss": math.inf,
            "skipped_utterances": 0,
            "bad_batches": 0,
        }
        self.data = _fingerprint(train_cuts, tokenizer)
        self.bad_in_a_row = 0
        self.writer = SummaryWriter(exp_dir / "tensorboard") if place.rank == 0 else None

    def run(self) -> bool:
        """Trains to the last epoch; False if a signal asked to stop before, after saving a checkpoint."""
        settings = self.experiment.train
        self._resume()
        stop = _StopOnSignal()
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
        while self.progress["epoch"] <= settings.num_epochs:
            for batch in self._batches():
                self._train_batch(batch, bar)
                if stop.asked:
                    self._save_to_resume()
                    bar.close()
                    return False
            self._end_epoch()
        bar.close()
        return True

    def _batches(self) -> Any:
        return train_batches(
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

    def _train_batch(self, batch: Batch, bar: tqdm) -> None:
        settings, progress = self.experiment.train, self.progress
        self._prepare_batch()
        losses = self._losses(batch.to(self.place.device))
        loss = self._total(losses, batch)
        if loss is not None:
            self.scaler.scale(loss).backward()
        if loss is not None or self.place.world_size > 1:
            distributed.average_gradients(self.model, self.place)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

        seconds = float(batch.feature_lens_B.sum()) * units.FRAME_SHIFT_MS / 1000 * self.place.world_size
        progress["batch"] += 1
        progress["batch_in_epoch"] += 1
        progress["audio_s"] += seconds
        bar.update(round(seconds))
        if self.place.rank == 0:
            self.average.update(self.model, progress["batch"])
        if progress["batch"] % settings.log_every == 0:
            self._log(losses, batch, bar)
        if progress["batch"] % settings.validate_every == 0:
            self._validate()
        if progress["batch"] % settings.checkpoint_every == 0:
            self._save_to_resume()

    def _prepare_batch(self) -> None:
        """Moves all schedules to this batch, and seeds its random numbers, so that a resumed run draws the same."""
        progress, settings = self.progress, self.experiment.train
        seed = f"{settings.seed} {progress['batch']} {self.place.rank}"
        random.seed(seed)
        torch.manual_seed(random.getrandbits(63))
        self.scheduler.step(progress["batch"], progress["epoch"] - 1)
        batch_s = self.experiment.data.max_duration_s * self.place.world_size
        set_batch_count(self.model, progress["batch"] * batch_s / REFERENCE_BATCH_S * settings.schedule_speed)
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

    def _weighted(self, losses: Losses) -> Tensor:
        settings = self.experiment.train
        warm = min(1.0, self.progress["batch"] / max(1, settings.loss_warmup_batches))
        simple_scale = 1.0 + (settings.simple_scale - 1.0) * warm
        total_B = simple_scale * losses.simple_B + (0.1 + 0.9 * warm) * losses.pruned_B
        return total_B if losses.ctc_B is None else total_B + settings.ctc_scale * losses.ctc_B

    def _total(self, losses: Losses, batch: Batch) -> Tensor | None:
        """The loss to differentiate, without utterances that no alignment fits; None if the batch is to be skipped."""
        total_B = self._weighted(losses)
        infeasible = int(torch.isposinf(total_B).sum())
        self.progress["skipped_utterances"] += infeasible
        total = torch.where(torch.isposinf(total_B), 0.0, total_B).sum()
        if infeasible < len(batch.ids) and bool(torch.isfinite(total)):
            self.bad_in_a_row = 0
            return total
        self.bad_in_a_row += 1
        self.progress["bad_batches"] += 1
        record = {"batch": self.progress["batch"], "losses": total_B.tolist(), "ids": list(batch.ids)}
        with open(self.exp_dir / "bad_batches.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record).replace("NaN", '"nan"').replace("Infinity", '"inf"') + "\n")
        if self.bad_in_a_row >= MAX_BAD_BATCHES:
            raise SystemExit(
                f"{self.exp_dir}: {MAX_BAD_BATCHES} batches in a row had no finite loss (see bad_batches.jsonl); "
                "lower optim.base_lr, or use train.precision=float32"
            )
        return None

    def _log(self, losses: Losses, batch: Batch, bar: tqdm) -> None:
        """Losses in nats a feature frame, rates and gradient norms, to TensorBoard and the progress bar."""
        frames = float(batch.feature_lens_B.sum())
        values = {f"train/{name[:-2]}": float(x.sum()) / frames for name, x in _named(losses)}
        values["train/loss"] = float(self._weighted(losses).sum()) / frames
        values["optim/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        values |= {f"optim/{name}": value for name, value in self.optimizer.statistics().items()}
        values |= {f"count/{name}": self.progress[name] for name in ("skipped_utterances", "bad_batches")}
        bar.set_postfix_str(f"epoch {self.progress['epoch']}, loss {values['train/loss']:.3f}")
        self._write(values)

    def _write(self, values: dict[str, float]) -> None:
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, self.progress["batch"])

    @torch.no_grad()
    def _validate(self) -> None:
        """The loss on the validation cuts, shared out among the processes; keeps the best model."""
        self.model.eval()
        sums = torch.zeros(2, device=self.place.device, dtype=torch.float64)
        batches = eval_batches(self.valid_cuts, self.tokenizer, max_duration_s=self.experiment.data.max_duration_s)
        for i, batch in enumerate(batches):
            if i % self.place.world_size == self.place.rank:
                loss_B = self._weighted(self._losses(batch.to(self.place.device)))
                sums[0] += loss_B[torch.isfinite(loss_B)].sum()
                sums[1] += batch.feature_lens_B.sum()
        loss, frames = distributed.total(sums, self.place).tolist()
        self._write({"valid/loss": loss / frames})
        self.progress["valid_loss"] = loss / frames
        if loss / frames < self.progress["best_valid_loss"]:
            self.progress["best_valid_loss"] = loss / frames
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
            "whitening": whitening_flags(self.model),
            "world_size": self.place.world_size,
            "data": self.data,
        }
        self._save(f"checkpoint-{self.progress['batch']}.pt", training=training)
        if self.place.rank == 0:
            for old in resumable(self.exp_dir)[: -self.experiment.train.keep_checkpoints]:
                old.unlink()

    def _resume(self) -> None:
        """Takes up the last checkpoint that can be read; without one, looks whether the largest batch fits."""
        files = resumable(self.exp_dir)
        if not files:
            self._try_largest_batch()
            return
        saved = checkpoint.load(files[-1])
        if saved["training"]["world_size"] != self.place.world_size:
            raise SystemExit(
                f"{files[-1]}: was trained by {saved['training']['world_size']} processes, now there are "
                f"{self.place.world_size}; use as many, or another --exp-dir"
            )
        self.model.load_state_dict(saved["model"])
        self.average.load_state_dict(saved["average"])
        self.optimizer.load_state_dict(saved["training"]["optimizer"])
        self.scaler.load_state_dict(saved["training"]["scaler"])
        load_whitening_flags(self.model, saved["training"]["whitening"])
        self.progress = saved["progress"]
        if self.place.rank == 0:
            print(f"resumed from {files[-1]}: epoch {self.progress['epoch']}, batch {self.progress['batch']}")

    def _try_largest_batch(self) -> None:
        """One forward and backward pass of the largest batch, without a step, to run out of memory now if ever."""
        batch_s = self.experiment.data.max_duration_s
        longest = sorted(self.train_cuts, key=lambda cut: cut.duration)[-math.ceil(batch_s) :]
        batch = next(eval_batches(CutSet.from_cuts(longest), self.tokenizer, max_duration_s=batch_s))
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


class _StopOnSignal:
    """Turns the first interrupt or termination into a request to stop after the current batch."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this batch; interrupt again to stop at once", file=sys.stderr)


def _named(losses: Losses) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in losses._asdict().items() if value is not None]


def resumable(exp_dir: Path) -> list[Path]:
    """checkpoint-N.pt files of an experiment directory, oldest first."""
    return sorted(exp_dir.glob("checkpoint-*.pt"), key=lambda path: int(path.stem.split("-")[1]))


def _set_aside_other_run(exp_dir: Path, experiment: Experiment, data: str) -> None:
    """Moves what another run left in the directory into its superseded-N, unless that run can go on as this one.

    It can if model and data are the same; other settings may change on the way.
    """
    files = resumable(exp_dir)
    if not files:
        return
    saved = checkpoint.load(files[-1])
    before = from_dict(saved["config"])
    if (before.model, before.tokens, saved["training"]["data"]) == (
        experiment.model,
        experiment.tokens,
        data,
    ):
        return
    number = 1 + len(list(exp_dir.glob("superseded-*")))
    kept = exp_dir / f"superseded-{number}"
    kept.mkdir()
    for path in list(exp_dir.iterdir()):
        if not path.name.startswith(("superseded-", ".stages")):
            path.rename(kept / path.name)
    print(f"{exp_dir}: held a run of another model or other data, which is now in {kept}; training starts anew")


def _fingerprint(cuts: CutSet, tokenizer: Tokenizer) -> str:
    """A short name for what a model is trained on: which cuts, how long, in which order, and the tokens."""
    digest = hashlib.sha256(repr(tokenizer.symbols).encode())
    for cut in cuts:
        digest.update(f"{cut.id} {cut.duration}".encode())
    return digest.hexdigest()[:16]


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the experiment")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="change one field")
    parser.add_argument("--train-cuts", required=True, type=Path, help="lhotse cuts to train on")
    parser.add_argument("--valid-cuts", required=True, type=Path, help="lhotse cuts to validate on")
    parser.add_argument("--noise-cuts", type=Path, help="lhotse cuts of noise to mix in (default: none)")
    parser.add_argument("--tokens", required=True, type=Path, help="directory that 'prepare tokens' wrote")
    parser.add_argument("--exp-dir", required=True, type=Path, help="where everything of this run goes")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    options = parser.parse_args(arguments)
    try:
        experiment = load_experiment(options.config, options.set)
        tokenizer = Tokenizer.load(options.tokens)
    except (ConfigError, checkpoint.CheckpointError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    place = distributed.join(options.device)
    cuts, report = filter_cuts(load_manifest(options.train_cuts), tokenizer, experiment.data)
    if place.rank == 0:
        print(report.summary())
        options.exp_dir.mkdir(parents=True, exist_ok=True)
        _set_aside_other_run(options.exp_dir, experiment, _fingerprint(cuts, tokenizer))
        (options.exp_dir / "config.yaml").write_text(to_yaml(experiment), encoding="utf-8")
    valid_cuts = load_manifest(options.valid_cuts)
    noise_cuts = load_manifest(options.noise_cuts) if options.noise_cuts else None
    distributed.wait(place)
    trainer = Trainer(experiment, tokenizer, options.exp_dir, cuts, valid_cuts, noise_cuts, place)
    finished = trainer.run()
    if place.rank == 0:
        _say_what_next(trainer, finished)
    distributed.leave(place)
    return 0 if finished else 130


def _say_what_next(trainer: Trainer, finished: bool) -> None:
    progress, exp_dir, epochs = trainer.progress, trainer.exp_dir, trainer.experiment.train.num_epochs
    if not finished:
        print(f"stopped after {progress['batch']} batches; the same command goes on from there")
        return
    last = min(trainer.experiment.decode.average_epochs, epochs)
    (exp_dir / "trained.json").write_text(json.dumps(progress, indent=2) + "\n", encoding="utf-8")
    print(
        f"trained {progress['batch']} batches, {progress['audio_s'] / 3600:.2f} h of audio; "
        f"best validation loss {progress['best_valid_loss']:.4f}; "
        f"{progress['skipped_utterances']} utterances and {progress['bad_batches']} batches skipped\n"
        f"next: python -m ssm_asr.average --exp-dir {exp_dir} --epoch {epochs} --last {last}\n"
        f"then: python -m ssm_asr.decode --checkpoint {exp_dir}/averaged.pt --cuts CUTS"
    )


if __name__ == "__main__":
    sys.exit(main())
