"""Training: it learns, resumes exactly, survives bad batches, and says what it does."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
from lhotse import CutSet

from ssm_asr import checkpoint
from ssm_asr.cli import average, train
from ssm_asr.data.batches import Batch, eval_batches
from ssm_asr.training import distributed
from ssm_asr.training.experiment_dir import claim, resumable
from ssm_asr.training.trainer import StepResult, Trainer

BATCHES_AN_EPOCH = 7  # of the toy corpus
CONFORMER = {
    **{"kind": "conformer", "layers": 1, "dim": 32, "heads": 2, "feedforward_dim": 32, "conv_kernel": 7},
    **{"embed_dim": 32, "embed_channels": [4, 4, 8], "chunk_frames": [16, -1]},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> toy.Corpus:
    return toy.Corpus(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def straight(corpus: toy.Corpus) -> Path:
    """The directory of an uninterrupted run of two epochs."""
    exp_dir = corpus.directory / "straight"
    assert train.main(corpus.arguments(exp_dir)) == 0
    return exp_dir


def before_batch(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> None:
    """Does something once, when so many batches have been trained."""
    real = Trainer.step

    def step(self: Trainer, *args: Any) -> StepResult:
        if self.state.progress.batch == number:
            action()
        return real(self, *args)

    monkeypatch.setattr(Trainer, "step", step)


def crash() -> None:
    raise RuntimeError("power failure")


def test_files_of_a_run(straight: Path) -> None:
    # The last 5 of those after 4, 7 (the epoch's end), 8, 12, 14 batches.
    assert list(resumable(straight)) == [4, 7, 8, 12, 14]
    names = {path.name for path in straight.iterdir() if not path.name.startswith("checkpoint-")}
    assert names == {".run", "best.pt", "config.yaml", "epoch-1.pt", "epoch-2.pt", "tensorboard", "trained.json"}
    progress = checkpoint.load(straight / "checkpoint-14.pt")["progress"]
    assert (progress["batch"], progress["epoch"], progress["batch_in_epoch"]) == (14, 3, 0)
    assert progress == json.loads((straight / "trained.json").read_text())
    best = checkpoint.load(straight / "best.pt")["progress"]
    assert best["valid_loss"] == best["best_valid_loss"] == progress["best_valid_loss"] <= progress["valid_loss"]


@pytest.mark.parametrize("after", [2, 6, 9], ids="stopped after {} batches".format)
def test_a_stopped_run_resumes_exactly(
    corpus: toy.Corpus, straight: Path, tmp_path: Path, after: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Amid an epoch, before the last batch of one (so nothing is left of it), and in the second one."""
    arguments = corpus.arguments(tmp_path / "exp")
    with pytest.MonkeyPatch.context() as patch:
        before_batch(patch, after, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train.main(arguments) == 130
    # The batch that had begun was finished.
    assert list(resumable(tmp_path / "exp"))[-1] == after + 1
    assert not (tmp_path / "exp" / "trained.json").exists()
    assert "the same command goes on" in capsys.readouterr().out
    torch.manual_seed(after), np.random.seed(after)  # the state of the generators must not matter
    assert train.main(arguments) == 0
    for name in ("checkpoint-14.pt", "epoch-1.pt", "epoch-2.pt", "best.pt"):
        assert toy.differing(checkpoint.load(tmp_path / "exp" / name), checkpoint.load(straight / name)) == []


def test_a_crashed_run_resumes_exactly(corpus: toy.Corpus, straight: Path, tmp_path: Path) -> None:
    """From its last checkpoint, or, when that is damaged, from the one before."""
    arguments = corpus.arguments(tmp_path / "exp")
    for after, damaged in ((6, None), (10, "checkpoint-8.pt")):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="power failure"):
            before_batch(patch, after, crash)
            train.main(arguments)
        if damaged:
            os.truncate(tmp_path / "exp" / damaged, 5000)
    assert train.main(arguments) == 0
    assert (tmp_path / "exp" / "checkpoint-8.pt.damaged").exists()
    for name in ("checkpoint-14.pt", "epoch-2.pt"):
        assert toy.differing(checkpoint.load(tmp_path / "exp" / name), checkpoint.load(straight / name)) == []


def test_a_second_run_in_a_directory_is_refused(
    corpus: toy.Corpus, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(straight, tmp_path / "exp")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "exp").iterdir()}
    with claim(tmp_path / "exp"):
        before[".run"] = (tmp_path / "exp" / ".run").stat().st_mtime_ns
        assert train.main(corpus.arguments(tmp_path / "exp")) == 2
        assert f"process {os.getpid()} on" in capsys.readouterr().err
        assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "exp").iterdir()} == before
    assert train.main(corpus.arguments(tmp_path / "exp")) == 0


def test_training_from_audio_is_training_from_stored_features(
    corpus: toy.Corpus, straight: Path, tmp_path: Path
) -> None:
    """Features that are computed for a batch differ from stored ones by rounding, and so do the trained weights."""
    arguments = corpus.arguments(tmp_path / "exp")
    for option in ("--train-cuts", "--valid-cuts"):
        place = arguments.index(option) + 1
        stored = Path(arguments[place])
        arguments[place] = str(stored.parent / "audio" / stored.name)
        assert not any(cut.has_features for cut in CutSet.from_file(arguments[place]))
    assert train.main(arguments) == 0
    audio, expected = (checkpoint.load(path / "checkpoint-14.pt") for path in (tmp_path / "exp", straight))
    assert audio["progress"]["valid_loss"] == pytest.approx(expected["progress"]["valid_loss"], rel=1e-3)
    start = checkpoint.load(straight / "epoch-1.pt")["model"]
    for name, weight in expected["model"].items():
        if weight.is_floating_point() and weight.numel() > 100:
            difference, change = audio["model"][name] - weight, weight - start[name]
            assert difference.norm() < 0.01 * change.norm(), name


def test_weight_noise_begins_when_told_and_resumes_exactly(corpus: toy.Corpus, straight: Path, tmp_path: Path) -> None:
    noise = {"deviation": 0.05, "from_batch": 4, "parts": ["encoder", "joiner"]}
    for name, stopped in (("noisy", False), ("resumed", True)):
        arguments = corpus.arguments(tmp_path / name, train={"num_epochs": 1, "weight_noise": noise})
        if stopped:
            with pytest.MonkeyPatch.context() as patch:
                before_batch(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
                assert train.main(arguments) == 130
        assert train.main(arguments) == 0
    noisy, resumed = (checkpoint.load(tmp_path / name / "checkpoint-7.pt") for name in ("noisy", "resumed"))
    assert toy.differing(noisy, resumed) == []
    for batch, same in ((4, True), (7, False)):
        one, other = (checkpoint.load(path / f"checkpoint-{batch}.pt") for path in (tmp_path / "noisy", straight))
        assert (toy.differing(one["model"], other["model"]) == []) is same


def test_tensorboard_has_every_batch_once(corpus: toy.Corpus, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = corpus.arguments(tmp_path / "exp", train={"log_every": 1})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        before_batch(patch, 6, crash)  # batches 5 and 6 are logged, but not in a checkpoint
        train.main(arguments)
    assert train.main(arguments) == 0
    events = EventAccumulator(str(tmp_path / "exp" / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {"train/loss", "train/simple", "train/pruned", "train/ctc", "optim/learning_rate", "optim/grad_norm"}
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 15))
    assert [event.step for event in events.Scalars("valid/loss")] == [3, 6, 7, 9, 12, 14]


def test_interrupt_from_the_terminal(corpus: toy.Corpus, tmp_path: Path) -> None:
    """Ctrl-C reaches all processes, loaders too; what is saved is what an uninterrupted run has at that batch."""
    # Many batches an epoch, so that the signal does not come while the loaders of another one start.
    data = {"max_duration_s": 1.2, "num_buckets": 1}
    arguments = corpus.arguments(tmp_path / "exp", train={"num_epochs": 100}, data={**data, "num_workers": 1})
    process = subprocess.Popen(
        [sys.executable, "-m", "ssm_asr.train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "exp" / "checkpoint-4.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 130, out
    assert "stopping after this batch; interrupt again to stop at once" in out and "Traceback" not in out
    last = max(resumable(tmp_path / "exp"))
    assert last > 4
    with pytest.MonkeyPatch.context() as patch:
        before_batch(patch, last - 1, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert train.main(corpus.arguments(tmp_path / "again", train={"num_epochs": 100}, data=data)) == 130
    one, other = (checkpoint.load(tmp_path / name / f"checkpoint-{last}.pt") for name in ("exp", "again"))
    assert toy.differing(one, other) == [".config.data.num_workers"]


def test_a_second_interrupt_stops_at_once(
    corpus: toy.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGINT)

    def interrupt_twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before_batch(monkeypatch, 5, interrupt_twice)
    assert train.main(corpus.arguments(tmp_path / "exp")) == 130
    assert list(resumable(tmp_path / "exp")) == [4]
    assert "stopped at once; the same command goes on from the last checkpoint" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler


def make_trainer(corpus: toy.Corpus, exp_dir: Path, cuts: CutSet, **sections: dict) -> Trainer:
    exp_dir.mkdir(exist_ok=True)
    place = distributed.join("cpu")
    return Trainer(toy.experiment(**sections), corpus.tokenizer, exp_dir, cuts, cuts, None, place)


def loss_per_frame(trainer: Trainer, batch: Batch) -> float:
    trainer.model.eval()
    with torch.no_grad():
        losses = trainer.objective.losses(batch)
        return float(trainer.objective.weighted(losses).sum() / batch.feature_lens_B.sum())


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_four_utterances_are_learnt(corpus: toy.Corpus, tmp_path: Path, precision: str) -> None:
    cuts = CutSet.from_file(corpus.train_cuts).to_eager().subset(first=4)
    batch = next(eval_batches(cuts, corpus.tokenizer, max_duration_s=10.0))
    trainer = make_trainer(corpus, tmp_path, cuts, train={"precision": precision})
    assert trainer.state.scaler.is_enabled() == (precision == "fp16")
    before = loss_per_frame(trainer, batch)
    for _ in range(50 if precision == "float32" else 25):
        trainer.step(batch)
    after = loss_per_frame(trainer, batch)
    assert after < before * (0.15 if precision == "float32" else 0.5), (before, after)


def test_batches_without_a_finite_loss(corpus: toy.Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cuts = toy.write_cuts(tmp_path / "data", "NaN-Infinity", 12)
    toy.spoil(cuts, ["NaN-Infinity07"])
    arguments = [*corpus.arguments(tmp_path / "exp"), "--train-cuts", str(cuts)]
    assert train.main(arguments) == 0
    records = [json.loads(line) for line in (tmp_path / "exp" / "bad_batches.jsonl").read_text().splitlines()]
    assert len(records) == 2  # one an epoch
    for record in records:
        k = record["ids"].index("NaN-Infinity07")
        assert record["losses"][k] == "nan" and len(record["losses"]) == len(record["ids"])
        assert 0 <= record["batch"] < 14
    saved = checkpoint.load(tmp_path / "exp" / "epoch-2.pt")
    assert saved["progress"]["bad_batches"] == 2
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())
    assert "2 batches without a finite loss" in capsys.readouterr().out


def test_a_batch_without_a_finite_loss_changes_nothing(corpus: toy.Corpus, tmp_path: Path) -> None:
    cuts = CutSet.from_file(corpus.train_cuts).to_eager().subset(first=4)
    trainer = make_trainer(corpus, tmp_path, cuts)
    batch = next(eval_batches(cuts, corpus.tokenizer, max_duration_s=10.0))
    trainer.step(batch)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    batch.features_BTF[0, 3] = float("nan")
    trainer.step(batch)
    assert trainer.state.progress.batch == 2 and trainer.state.progress.bad_batches == 1
    assert toy.differing(before, trainer.model.state_dict()) == []
    trainer.step(batch._replace(features_BTF=batch.features_BTF.nan_to_num()))
    assert len(toy.differing(before, trainer.model.state_dict())) > 50


def test_statistics_of_a_conformer_survive_a_bad_batch(corpus: toy.Corpus, tmp_path: Path) -> None:
    cuts = toy.write_cuts(tmp_path / "data", "train", 12)
    toy.spoil(cuts, ["train07"])
    arguments = corpus.arguments(tmp_path / "exp", model={"encoder": CONFORMER}, train={"num_epochs": 1})
    assert train.main([*arguments, "--train-cuts", str(cuts)]) == 0
    saved = checkpoint.load(tmp_path / "exp" / "epoch-1.pt")
    assert saved["progress"]["bad_batches"] == 1 and np.isfinite(saved["progress"]["valid_loss"])
    buffers = {name: tensor for name, tensor in saved["model"].items() if "running" in name}
    assert buffers and all(tensor.isfinite().all() and tensor.std() > 0 for tensor in buffers.values())


def test_a_validation_loss_that_is_no_number_is_not_the_best(
    corpus: toy.Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    valid = toy.write_cuts(tmp_path / "data", "valid", 4)
    toy.spoil(valid, ["valid01"])
    arguments = [*corpus.arguments(tmp_path / "exp", train={"num_epochs": 1}), "--valid-cuts", str(valid)]
    assert train.main(arguments) == 0
    assert not (tmp_path / "exp" / "best.pt").exists()
    assert "after 7 batches the validation loss is nan" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_a_crash_ends_the_program_and_its_workers(corpus: toy.Corpus, tmp_path: Path, workers: int) -> None:
    """Workers ignore the signal by which Python would end them, and then waits for them."""
    code = "import sys, test_train; test_train.Trainer.step = lambda *_: test_train.crash()"
    arguments = corpus.arguments(tmp_path / "exp", data={"num_workers": workers})
    command = [sys.executable, "-c", f"{code}; test_train.train.main(sys.argv[1:])", *arguments]
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: power failure\n")


@pytest.mark.parametrize("workers", [0, 1])
def test_missing_features_are_one_line(corpus: toy.Corpus, tmp_path: Path, workers: int) -> None:
    cuts = toy.write_cuts(tmp_path / "data", "train", 6)
    gone = sorted((tmp_path / "data").rglob("*.npy"))[-1]
    gone.unlink()
    arguments = corpus.arguments(tmp_path / "exp", data={"num_workers": workers})
    command = [sys.executable, "-m", "ssm_asr.train", *arguments, "--train-cuts", str(cuts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert last.startswith("cut train") and f"No such file or directory: '{gone}'; if files were moved" in last


def test_what_was_changed_counts_when_a_run_goes_on(
    corpus: toy.Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exp_dir = tmp_path / "exp"
    with pytest.MonkeyPatch.context() as patch:
        before_batch(patch, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train.main(corpus.arguments(exp_dir)) == 130
    capsys.readouterr()
    optim, batches = {"base_lr": 0.001, "warmup_batches": 10}, {"max_duration_s": 2.0}
    assert train.main(corpus.arguments(exp_dir, optim=optim, data=batches, train={"precision": "fp16"})) == 0
    out = capsys.readouterr().out
    assert "optim.base_lr 0.045 -> 0.001" in out and "epoch 2 begins anew, since its batches are others now" in out
    saved = checkpoint.load(list(resumable(exp_dir).values())[-1])
    assert {group["initial_lr"] for group in saved["training"]["optimizer"]["param_groups"]} == {0.001}
    assert saved["progress"]["batch"] > 10 + 2 * 5  # 3 of the second epoch's 7, and then all of it in smaller batches


def test_a_finished_run_is_left_alone_by_more_processes(
    corpus: toy.Corpus, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exp_dir = shutil.copytree(straight, tmp_path / "straight")
    newest = exp_dir / "checkpoint-14.pt"
    saved = checkpoint.load(newest)
    saved["training"]["world_size"] = 2
    checkpoint.save(saved, newest)
    assert train.main(corpus.arguments(exp_dir)) == 0
    assert train.main(corpus.arguments(exp_dir, train={"num_epochs": 3})) == 1
    assert f"{newest}: was trained by 2 processes, now there are 1; use as many, or" in capsys.readouterr().err


def test_other_texts_noises_and_tokens_are_another_run(
    corpus: toy.Corpus, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cuts = CutSet.from_file(corpus.train_cuts).to_eager()
    for cut in cuts:
        cut.supervisions[0].text = "LOW"
    cuts.to_file(tmp_path / "cuts.jsonl.gz")
    for option, other in (("--train-cuts", tmp_path / "cuts.jsonl.gz"), ("--noise-cuts", corpus.valid_cuts)):
        exp_dir = shutil.copytree(straight, tmp_path / option / "straight")
        assert train.main([*corpus.arguments(exp_dir), option, str(other)]) == 0
        assert "held a run of another model or other data" in capsys.readouterr().out
    arguments = [*corpus.arguments(straight), "--set", "tokens.kind=char"]
    assert train.main(arguments) == 2
    assert capsys.readouterr().err == f"{corpus.tokens}: word tokens, but tokens.kind is char\n"


def test_initial_weights_are_taken_once(corpus: toy.Corpus, straight: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = [*corpus.arguments(tmp_path / "exp", train={"num_epochs": 1}), "--init-from", str(straight / "best.pt")]
    assert train.main(arguments) == 0
    assert "best.pt: copied " in capsys.readouterr().out
    assert train.main(arguments) == 0
    out = capsys.readouterr().out
    assert "best.pt: not used again, since training goes on" in out and "copied" not in out


def test_many_bad_batches_in_a_row_end_the_run(
    corpus: toy.Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cuts = toy.write_cuts(tmp_path / "data", "train", 9)
    toy.spoil(cuts, [cut.id for cut in CutSet.from_file(cuts)])
    arguments = corpus.arguments(tmp_path / "exp", train={"num_epochs": 20, "validate_every": 1000})
    assert train.main([*arguments, "--train-cuts", str(cuts)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"{tmp_path / 'exp'}: 20 batches in a row had no finite loss (see bad_batches.jsonl); "
        "lower optim.base_lr, or use train.precision=float32"
    )
    assert len((tmp_path / "exp" / "bad_batches.jsonl").read_text().splitlines()) == 20


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("float32", "none of the last 20 batches had a fin"),
        ("fp16", "losses multiplied by 1e-05, too; use train.prec"),
    ],
)
def test_gradients_that_are_never_finite_end_the_run(
    corpus: toy.Corpus, tmp_path: Path, precision: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make = Trainer.__init__

    def spoilt(self: Trainer, *args: Any) -> None:
        make(self, *args)
        self.model.joiner.output_linear.weight.register_hook(lambda grad: grad * torch.nan)

    settings = {"num_epochs": 20, "validate_every": 1000, "precision": precision}
    arguments = corpus.arguments(tmp_path / "exp", train=settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "__init__", spoilt)
        assert train.main(arguments) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_utterances_without_an_alignment_are_counted(
    corpus: toy.Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many frames as tokens, but equal tokens need a blank between them under CTC: filtering cannot see that."""
    cuts = CutSet.from_file(toy.write_cuts(tmp_path / "data", "train", 12)).to_eager()
    longest = max(cuts, key=lambda cut: cut.duration)
    longest.supervisions[0].text = "LOW " * 26
    cuts.to_file(tmp_path / "cuts.jsonl.gz")
    arguments = corpus.arguments(tmp_path / "exp", data={"num_buckets": 1})
    assert train.main([*arguments, "--train-cuts", str(tmp_path / "cuts.jsonl.gz")]) == 0
    progress = json.loads((tmp_path / "exp" / "trained.json").read_text())
    assert (progress["skipped_utterances"], progress["bad_batches"]) == (2, 0)
    out = capsys.readouterr().out
    assert "kept 12, left out 0" in out
    # The rest of the batch is trained on.
    assert "2 utterances without an alignment" in out and "0 steps without finite gradients" in out


def test_what_is_filtered_is_printed(corpus: toy.Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cuts = CutSet.from_file(corpus.train_cuts).to_eager()
    for k, text in ((0, ""), (1, "TEN"), (2, "LOW " * 30)):
        cuts[k].supervisions[0].text = text
    cuts.to_file(tmp_path / "cuts.jsonl.gz")
    arguments = [*corpus.arguments(tmp_path / "exp"), "--train-cuts", str(tmp_path / "cuts.jsonl.gz")]
    arguments += ["--set", "train.num_epochs=1"]
    assert train.main([*arguments, "--set", "data.max_utterance_s=1.1"]) == 0
    first_line = capsys.readouterr().out.splitlines()[0]
    assert first_line.startswith("utterances to train on: kept 14, left out 10: ")
    for part in ("too long", "1 empty transcript (e.g. train00)", "1 token outside the vocabulary (e.g. train01)"):
        assert part in first_line
    assert train.main([*arguments, "--set", "data.max_utterance_s=0.1", "--set", "data.min_utterance_s=0"]) == 2
    assert capsys.readouterr().err.startswith("no utterance left for training: kept 0, left out 24: ")


def test_what_to_do_next(corpus: toy.Corpus, straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(corpus.arguments(straight)) == 0  # finished before: nothing is trained
    out = capsys.readouterr().out
    assert "trained 14 batches" in out
    command = next(line for line in out.splitlines() if line.startswith("next: "))
    words = shlex.split(command)
    assert words[:3] == ["next:", "ssm-asr", "average"]
    assert average.main(words[3:]) == 0
    assert f"then: ssm-asr decode --checkpoint {straight}/averaged.pt --cuts" in out
    assert (straight / "averaged.pt").exists()


def test_more_epochs_go_on_and_another_model_begins_anew(
    corpus: toy.Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exp_dir = tmp_path / "exp"
    one_epoch = {"num_epochs": 1, "keep_checkpoints": 2}
    assert train.main(corpus.arguments(exp_dir, train=one_epoch)) == 0
    assert list(resumable(exp_dir)) == [4, 7]
    assert train.main(corpus.arguments(exp_dir, train={**one_epoch, "num_epochs": 2})) == 0
    assert list(resumable(exp_dir)) == [12, 14]
    assert f"resumed from {exp_dir}/checkpoint-7.pt: epoch 2, batch 7" in capsys.readouterr().out
    old = {path.name: path.stat().st_ino for path in exp_dir.iterdir() if path.name != ".run"}
    assert train.main(corpus.arguments(exp_dir, train=one_epoch, model={"ctc": False})) == 0
    assert list(resumable(exp_dir)) == [4, 7]
    assert {path.name: path.stat().st_ino for path in (exp_dir / "superseded-1").iterdir()} == old
    assert "training starts anew" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--config", "no such configuration file"),
        ("--tokens", "no tokens.txt and no bpe/unigram/word.model; make them with ssm-asr prepare tokens"),
        ("--train-cuts", "no cut manifest"),
        ("--valid-cuts", "no cut manifest"),
        ("--noise-cuts", "no cut manifest"),
        ("--device", "give auto, cpu or cuda"),
    ],
)
def test_what_is_missing_is_one_line(
    corpus: toy.Corpus, tmp_path: Path, option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing.jsonl.gz"
    assert train.main([*corpus.arguments(tmp_path / "exp"), option, str(missing)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and str(missing) in error
    assert not (tmp_path / "exp").exists()
