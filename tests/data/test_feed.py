"""A feed gives a run its batches, validations and ends of epochs in order, from any position, loaded ahead."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from lhotse import CutSet
from tones import WORDS

from ssm_asr.data.batches import CPU, TrainingJobs, eval_batches, train_batches
from ssm_asr.data.config import DataConfig
from ssm_asr.data.feed import Event, Feed, Position
from ssm_asr.data.loading import Loader
from ssm_asr.data.tokens import Tokenizer, train_tokenizer

CONFIG = DataConfig(max_duration_s=6.0, num_buckets=3, num_workers=0)
START = Position(0, 1, 0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(WORDS, "word")


def make_feed(cuts: CutSet, tokenizer: Tokenizer, start: Position = START, **options: Any) -> Feed:
    config = replace(CONFIG, num_workers=options.pop("num_workers", 0))
    options = {"num_epochs": 2, "validate_every": 3, **options}
    jobs = TrainingJobs(cuts, config, 0, seed=1)
    return Feed(jobs, cuts.subset(first=9), Loader(tokenizer, config, []), config, start=start, device=CPU, **options)


def follow(feed: Feed, ahead: bool = False) -> list[Any]:
    """Returns what a run would do: batches, lists of batches to validate on, and "end" for the ends of epochs."""
    done: list[Any] = []
    for event, batch in feed:
        if ahead:
            feed.fetch_next()
        done.append(batch if event is Event.TRAIN else list(feed.validation()) if event is Event.VALIDATE else "end")
    feed.close()
    return done


def assert_same(first: Any, second: Any) -> None:
    if isinstance(first, str) or isinstance(second, str):
        assert first == second
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first.ids == second.ids and torch.equal(first.features_BTF, second.features_BTF)


def test_events_come_in_order(stored: CutSet, tokenizer: Tokenizer) -> None:
    validation = list(eval_batches(stored.subset(first=9), tokenizer, max_duration_s=CONFIG.max_duration_s))
    expected: list[Any] = []
    batch = 0
    for epoch in (1, 2):
        for one in train_batches(stored, CONFIG, tokenizer, epoch=epoch, seed=1):
            expected.append(one)
            batch += 1
            if batch % 3 == 0:
                expected.append(validation)
        expected += ["end"] if isinstance(expected[-1], list) else [validation, "end"]
    assert len(validation) > 1 and batch > 9
    assert_same(follow(make_feed(stored, tokenizer)), expected)
    assert_same(follow(make_feed(stored, tokenizer), ahead=True), expected)
    assert_same(follow(make_feed(stored, tokenizer, num_workers=2), ahead=True), expected)


def test_a_feed_goes_on_from_any_position(stored: CutSet, tokenizer: Tokenizer) -> None:
    whole = follow(make_feed(stored, tokenizer))
    in_first = sum(not isinstance(item, (list, str)) for item in whole[: whole.index("end")])
    for batch, position in ((2, Position(2, 1, 2)), (in_first, Position(in_first, 2, 0))):
        trained = [k for k, item in enumerate(whole) if not isinstance(item, (list, str))]
        rest = whole[trained[batch] :]
        assert_same(follow(make_feed(stored, tokenizer, position)), rest)


def test_an_epoch_without_further_batches_ends(stored: CutSet, tokenizer: Tokenizer) -> None:
    batches = len(list(train_batches(stored, CONFIG, tokenizer, epoch=2, seed=1)))
    rest = follow(make_feed(stored, tokenizer, Position(50, 2, batches)))
    assert len(rest) == 2 and isinstance(rest[0], list) and rest[1] == "end"
    assert follow(make_feed(stored, tokenizer, Position(50, 3, 0))) == []


def test_without_validation_cuts_a_run_still_validates(stored: CutSet, tokenizer: Tokenizer) -> None:
    jobs = TrainingJobs(stored, CONFIG, 0, seed=1)
    nothing = CutSet.from_cuts([])
    options = {"start": START, "num_epochs": 1, "validate_every": 1000, "device": CPU}
    done = follow(Feed(jobs, nothing, Loader(tokenizer, CONFIG, []), CONFIG, **options))
    assert done[-2:] == [[], "end"]
