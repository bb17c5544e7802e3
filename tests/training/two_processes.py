"""What test_distributed runs in two processes.

torchrun --nproc-per-node 2 two_processes.py DIRECTORY ARGUMENTS-OF-TRAIN
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssm_asr.cli import train
from ssm_asr.training import distributed
from ssm_asr.training.trainer import StepResult, Trainer

directory, arguments = Path(sys.argv[1]), sys.argv[2:]
place = distributed.join("cpu")


def gradients() -> dict[str, torch.Tensor]:
    """The averaged gradients of a model of which each process uses another part, on its half of a batch."""
    torch.manual_seed(place.rank)  # unlike weights, until they are shared
    model = nn.ModuleDict({"shared": nn.Linear(3, 4), "first": nn.Linear(4, 1), "second": nn.Linear(4, 1)})
    distributed.share_weights(model, place)
    x_BD = torch.arange(24.0).reshape(8, 3) / 24
    own_BD = x_BD[4 * place.rank :][:4]
    model["first" if place.rank == 0 else "second"](model["shared"](own_BD).tanh()).sum().backward()
    distributed.average_gradients(model, place)
    weights = {f"weight.{name}": p.detach() for name, p in model.named_parameters()}
    return weights | {f"grad.{name}": p.grad for name, p in model.named_parameters()}


def run_training(exp_dir: Path, *more: str) -> int:
    """Trains, and leaves the last weights of each process in the directory."""
    real_run = Trainer.run

    def run(self: Trainer) -> bool:
        finished = real_run(self)
        state = {"weights": self.model.state_dict(), "progress": self.state.progress.to_dict()}
        torch.save(state, directory / f"{exp_dir.name}-rank{place.rank}.pt")
        return finished

    Trainer.run = run
    status = train.main([*arguments, "--exp-dir", str(exp_dir), *more])
    Trainer.run = real_run
    return status


def stop_second_process_at(number: int) -> Any:
    """Only one process gets the signal; both must stop."""
    real = Trainer.step

    def step(self: Trainer, *args: Any) -> StepResult:
        if place.rank == 1 and self.state.progress.batch == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    Trainer.step = step
    return real


torch.save(gradients(), directory / f"gradients-rank{place.rank}.pt")
torch.save(
    {
        "total": distributed.total(torch.tensor([1.0, place.rank]), place),
        "gather": distributed.gather([place.rank == 0, True, place.rank == 1], place),
    },
    directory / f"sums-rank{place.rank}.pt",
)

# These two processes run several trainings, one after the other.
train.distributed.join = lambda device: place
train.distributed.leave = lambda place: None
assert run_training(directory / "straight") == 0
real = stop_second_process_at(3)
assert run_training(directory / "stopped") == 130
Trainer.step = real
assert run_training(directory / "stopped") == 0
torch.distributed.destroy_process_group()
