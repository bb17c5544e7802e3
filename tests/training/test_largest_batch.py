"""The trial of the largest batch at the start of training."""

import pytest
import torch
import toy
from lhotse import CutSet

from ssm_asr.data.batches import Batch, TrainingJobs, shape_frames
from ssm_asr.data.config import DataConfig
from ssm_asr.data.loading import Loader
from ssm_asr.encoder.regularize import load_whitening_flags, whitening_flags
from ssm_asr.training import TrainingError
from ssm_asr.training.distributed import Place
from ssm_asr.training.largest_batch import try_largest_batch
from ssm_asr.training.objective import Objective
from ssm_asr.transducer.model import Losses, Transducer

PLACE = Place(0, 1, torch.device("cpu"))
EXPERIMENT = toy.experiment()


class RecordingObjective(Objective):
    """Notes the shapes of the batches that it sees; no batch of more than `most_frames` fits into its memory."""

    def __init__(self, vocab_size: int, most_frames: int) -> None:
        super().__init__(Transducer(EXPERIMENT.model, vocab_size), EXPERIMENT, PLACE.device)
        self.most_frames = most_frames
        self.shapes: list[tuple[int, ...]] = []

    def losses(self, batch: Batch, context: tuple[int, int] | None = None) -> Losses:
        self.shapes.append(tuple(batch.features_BTF.shape))
        if batch.features_BTF.shape[1] > self.most_frames:
            raise torch.OutOfMemoryError
        return super().losses(batch, context)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> toy.Corpus:
    return toy.Corpus(tmp_path_factory.mktemp("toy"))


def try_largest(objective: Objective, cuts: CutSet, corpus: toy.Corpus, config: DataConfig) -> None:
    jobs = TrainingJobs(cuts, config, 0, seed=1)
    try_largest_batch(objective, jobs, Loader(corpus.tokenizer, config, []), config, PLACE)


def test_the_longest_utterances_are_tried(corpus: toy.Corpus) -> None:
    cuts = CutSet.from_file(corpus.train_cuts).to_eager()
    objective = RecordingObjective(corpus.tokenizer.vocab_size, most_frames=10**6)
    flags = whitening_flags(objective.model)
    load_whitening_flags(objective.model, [False] * len(flags))
    try_largest(objective, cuts, corpus, EXPERIMENT.data)
    longest_s = max(cut.duration for cut in cuts)
    most = int(EXPERIMENT.data.max_duration_s / longest_s)
    assert most > 1 and objective.shapes == [(most, round(longest_s * 100), 80)]
    assert any(p.grad is not None for p in objective.model.parameters())
    assert flags and all(whitening_flags(objective.model))


def test_a_batch_that_does_not_fit_is_one_line(corpus: toy.Corpus) -> None:
    cuts = CutSet.from_file(corpus.train_cuts).to_eager()
    objective = RecordingObjective(corpus.tokenizer.vocab_size, most_frames=50)
    message = r"^the largest batch \(\d+×\d+×80 features\) does not fit .* of cpu; lower data.max_duration_s, now 4$"
    with pytest.raises(TrainingError, match=message):
        try_largest(objective, cuts, corpus, EXPERIMENT.data)


def test_joined_utterances_are_tried_joined(corpus: toy.Corpus) -> None:
    cuts = CutSet.from_file(corpus.train_cuts).to_eager()
    config = toy.experiment(data={"join_probability": 0.5, "join_most": 3}).data
    objective = RecordingObjective(corpus.tokenizer.vocab_size, most_frames=10**6)
    try_largest(objective, cuts, corpus, config)
    longest_s = max(cut.duration for cut in cuts)
    assert objective.shapes[0][1] >= 3 * round(longest_s * 100)


def test_of_fixed_shapes_the_largest_is_tried(corpus: toy.Corpus) -> None:
    cuts = CutSet.from_file(corpus.train_cuts).to_eager()
    config = toy.experiment(data={"fixed_shapes": True}).data
    objective = RecordingObjective(corpus.tokenizer.vocab_size, most_frames=10**6)
    try_largest(objective, cuts, corpus, config)
    longest_s = max(cut.duration for cut in cuts)
    assert objective.shapes == [(int(config.max_duration_s / longest_s), shape_frames(longest_s), 80)]
