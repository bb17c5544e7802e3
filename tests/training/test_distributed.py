"""Two processes on the CPU: gradients are averaged, weights stay equal, and a stopped run resumes exactly."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy
from torch import nn

from ssm_asr import checkpoint
from ssm_asr.cli import train
from ssm_asr.ops.devices import find_device
from ssm_asr.training import distributed
from ssm_asr.training.experiment_dir import resumable
from ssm_asr.transducer.model import Transducer


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which two_processes.py has worked."""
    directory = tmp_path_factory.mktemp("two")
    corpus = toy.Corpus(directory / "data")
    # One utterance has a NaN in its features, so that one process has nothing to add to a step.
    toy.spoil(corpus.train_cuts, ["train05"])
    arguments = corpus.arguments(directory / "straight", train={"checkpoint_every": 100})
    script = Path(__file__).with_name("two_processes.py")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(directory)]
    done = subprocess.run([sys.executable, *command, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (directory / "out").write_text(done.stdout)
    return directory


def both(results: Path, name: str) -> list[dict]:
    return [torch.load(results / f"{name}-rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_averaged_gradients_are_those_of_the_whole_batch(results: Path) -> None:
    first, second = both(results, "gradients")
    assert toy.differing(first, second) == []
    model = nn.ModuleDict({"shared": nn.Linear(3, 4), "first": nn.Linear(4, 1), "second": nn.Linear(4, 1)})
    model.load_state_dict({name.removeprefix("weight."): p for name, p in first.items() if name.startswith("weight.")})
    hidden_BD = model["shared"](torch.arange(24.0).reshape(8, 3) / 24).tanh()
    (0.5 * (model["first"](hidden_BD[:4]).sum() + model["second"](hidden_BD[4:]).sum())).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(first[f"grad.{name}"], p.grad, rtol=1e-6, atol=1e-7)


def test_sums(results: Path) -> None:
    for sums in both(results, "sums"):
        assert sums["total"].tolist() == [2.0, 1.0]
        assert sums["gather"] == [[True, True, False], [False, True, True]]
    alone = distributed.Place(0, 1, torch.device("cpu"))
    assert distributed.total(torch.tensor([3.0]), alone).tolist() == [3.0]
    assert distributed.gather([True, False], alone) == [[True, False]]


def test_both_processes_have_the_same_weights(results: Path) -> None:
    first, second = both(results, "straight")
    assert toy.differing(first, second) == []
    assert first["progress"]["bad_batches"] == 2  # of one process in each epoch, and known to both
    assert first["progress"]["batch"] == 8
    torch.manual_seed(toy.experiment().train.seed)
    untrained = Transducer(toy.experiment().model, toy.write_tokens(results / "tokens").vocab_size).state_dict()
    assert len(toy.differing(first["weights"], untrained)) > 100


def test_a_stop_of_one_process_stops_both_and_resumes_exactly(results: Path) -> None:
    assert "stopped after 4 batches" in (results / "out").read_text()
    last = [max(resumable(results / name)) for name in ("straight", "stopped")]
    one, other = (checkpoint.load(results / name / f"checkpoint-{last[0]}.pt") for name in ("straight", "stopped"))
    assert last[0] == last[1] and toy.differing(one, other) == []
    assert len(one["training"]["whitening"]) == 2


def test_another_number_of_processes_is_refused(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = results / "data"
    arguments = ["--config", str(data / "straight.yaml"), "--tokens", str(data / "tokens")]
    for name in ("train", "valid"):
        arguments += [f"--{name}-cuts", str(data / f"cuts_{name}.jsonl.gz")]
    arguments += ["--exp-dir", str(results / "straight"), "--device", "cpu", "--set", "train.num_epochs=9"]
    assert train.main(arguments) == 1
    error = capsys.readouterr().err
    assert "was trained by 2 processes, now there are 1; use as many, or another" in error and error.count("\n") == 1


def test_devices() -> None:
    assert find_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="device 'gpu': give auto, cpu or cuda"):
        find_device("gpu")
    count = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"this machine has {count} GPUs that PyTorch can use"):
        find_device(f"cuda:{count}")
