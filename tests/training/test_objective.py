"""How the losses are weighted, and which context the model sees."""

from pathlib import Path

import torch
import toy
from lhotse import CutSet

from ssm_asr.config import Experiment
from ssm_asr.data.batches import eval_batches
from ssm_asr.data.tokens import train_tokenizer
from ssm_asr.training.objective import Objective
from ssm_asr.transducer.model import Losses, Transducer

TOKENIZER = train_tokenizer(list(toy.PITCH_HZ), "word")


def make_objective(experiment: Experiment) -> Objective:
    torch.manual_seed(3)
    return Objective(Transducer(experiment.model, TOKENIZER.vocab_size), experiment, torch.device("cpu"))


def test_weights_go_from_the_simple_loss_to_the_pruned_one() -> None:
    experiment = toy.experiment(train={"loss_warmup_batches": 10, "simple_scale": 0.5, "ctc_scale": 0.25})
    objective = make_objective(experiment)
    losses = Losses(*torch.tensor([[1.0], [100.0], [10000.0]]))
    for batches, wanted in ((0, 1 + 10), (5, 0.75 + 55), (10, 0.5 + 100), (1000, 0.5 + 100)):
        torch.testing.assert_close(objective.weighted(losses, batches), torch.tensor([wanted + 2500.0]))
    torch.testing.assert_close(objective.weighted(losses), torch.tensor([0.5 + 100 + 2500]))
    torch.testing.assert_close(objective.weighted(losses._replace(ctc_B=None)), torch.tensor([0.5 + 100]))


def test_without_a_warm_up_the_weights_are_final_at_once() -> None:
    objective = make_objective(toy.experiment(train={"loss_warmup_batches": 0, "simple_scale": 0.5}))
    losses = Losses(torch.tensor([1.0]), torch.tensor([100.0]), None)
    # Before the first batch is trained, even then the simple loss counts whole.
    torch.testing.assert_close(objective.weighted(losses, 0), torch.tensor([1.0 + 10]))
    torch.testing.assert_close(objective.weighted(losses, 1), torch.tensor([0.5 + 100]))


def test_evaluation_sees_the_context_of_decoding(tmp_path: Path) -> None:
    cuts = CutSet.from_file(toy.write_cuts(tmp_path, "train", 3))
    batch = next(eval_batches(cuts, TOKENIZER, max_duration_s=10.0))
    pruned = []
    for chunk in (16, 64):
        objective = make_objective(toy.experiment(decode={"chunk_frames": chunk, "left_context_frames": 64}))
        objective.model.eval()
        arguments = (batch.features_BTF, batch.feature_lens_B, batch.tokens_BU, batch.token_lens_B, chunk, 64)
        with torch.no_grad():
            losses, expected = objective.losses(batch), objective.model(*arguments)
        assert toy.differing(losses._asdict(), expected._asdict()) == []
        pruned.append(losses.pruned_B)
    assert not torch.equal(*pruned)
