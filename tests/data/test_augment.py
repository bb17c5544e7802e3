"""Augmentation of whole batches does to each utterance what was drawn for it, as a plain computation of one does."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ssm_asr.data.augment import Drawer, augment
from ssm_asr.data.config import DataConfig, SpecAugmentConfig

LENGTHS = [400, 30, 163, 5, 399, 250]
PLAIN = DataConfig(spec_augment=SpecAugmentConfig(probability=0.0))


def _features(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, 80, generator=generator).cumsum(0) * 0.1 for length in LENGTHS]


def _augmented(
    features: list[Tensor], config: DataConfig, seed: int, noises: list[tuple[Tensor, float] | None] | None = None
) -> tuple[list[Tensor], list[list[int]]]:
    """Returns the utterances, or groups, after augmentation as one batch, and the groups."""
    frames = [len(features_TF) for features_TF in features]
    drawer = Drawer(config, np.random.default_rng(seed), max(frames))
    for count, noise in zip(frames, noises or [None] * len(frames), strict=True):
        drawer.utterance(count, noise)
    drawn = drawer.finish()
    features_BTF = pad_sequence(features, batch_first=True, padding_value=50.0)  # padding must have no influence
    out_BTF, lens_B = augment(features_BTF, torch.tensor(frames), drawn)
    groups = drawn.joining.groups if drawn.joining else [[row] for row in range(len(frames))]
    return [out_TF[:count] for out_TF, count in zip(out_BTF, lens_B, strict=True)], groups


def _masks(config: SpecAugmentConfig, **changes: float) -> DataConfig:
    return replace(PLAIN, spec_augment=replace(config, probability=1.0, **changes))


def test_masked_cells_get_the_mean_of_their_utterance() -> None:
    features = _features(0)
    shares = []
    for seed in range(30):
        out, _ = _augmented(features, _masks(SpecAugmentConfig(), time_warp_frames=0), seed)
        for before_TF, after_TF in zip(features, out, strict=True):
            changed = after_TF != before_TF
            assert torch.allclose(after_TF[changed], before_TF.mean(), atol=1e-6)
            assert changed.all(1).sum() <= 0.15 * len(before_TF)
        shares.append((out[0] != features[0]).float().mean())
    assert 0.2 < np.mean(shares) < 0.5


def test_warping_is_a_linear_stretch_of_both_sides() -> None:
    features = _features(1)
    warped = 0
    for seed in range(20):
        config = _masks(SpecAugmentConfig(), time_warp_frames=80, num_freq_masks=0, num_time_masks=0)
        out, _ = _augmented(features, config, seed)
        rng = np.random.default_rng(seed)
        for before_TF, after_TF in zip(features, out, strict=True):
            rng.random()  # whether this utterance is augmented
            if len(before_TF) <= 2 * 80 + 2:
                assert torch.equal(after_TF, before_TF)
                continue
            centre = int(rng.integers(81, len(before_TF) - 80))
            moved = centre + int(rng.integers(-80, 81))
            sides = [(before_TF[:centre], moved), (before_TF[centre:], len(before_TF) - moved)]
            expected_TF = torch.cat(
                [torch.nn.functional.interpolate(side.T[None], size=size, mode="linear")[0].T for side, size in sides]
            )
            assert torch.allclose(after_TF, expected_TF, atol=1e-4)
            warped += moved != centre
    assert warped > 50


def test_nothing_is_done_where_nothing_is_drawn() -> None:
    features = _features(2)
    out, _ = _augmented(features, PLAIN, 0)
    assert all(torch.equal(a, b) for a, b in zip(features, out, strict=True))
    seldom = replace(PLAIN, spec_augment=SpecAugmentConfig(probability=0.5))
    unchanged = sum(
        torch.equal(a, b) for s in range(20) for a, b in zip(features, _augmented(features, seldom, s)[0], strict=True)
    )
    assert 30 < unchanged < 100  # of 120


@pytest.mark.parametrize("noise_frames", [3, 100, 1000])
def test_noise_has_the_ratio_asked_for(noise_frames: int) -> None:
    features = _features(3)
    noise_TF = torch.randn(noise_frames, 80, generator=torch.Generator().manual_seed(1)) - 7
    noises = [(noise_TF, 5.0), None, (noise_TF, 20.0), (noise_TF, -3.0), None, (noise_TF, 5.0)]
    out, _ = _augmented(features, PLAIN, 0, noises)
    for before_TF, after_TF, noise in zip(features, out, noises, strict=True):
        if noise is None:
            assert torch.equal(before_TF, after_TF)
            continue
        speech, mixed = before_TF.double().exp().sum(), after_TF.double().exp().sum()
        snr_db = 10 * torch.log10(speech / (mixed - speech))
        assert snr_db.item() == pytest.approx(noise[1], abs=1e-3)


def test_joined_utterances_have_pauses_of_their_noise_floor() -> None:
    features = _features(4)
    config = replace(PLAIN, join_probability=1.0, join_most=4, join_pause_s=0.5)
    pauses = []
    for seed in range(20):
        out, groups = _augmented(features, config, seed)
        assert [row for group in groups for row in group] == list(range(len(features)))
        for group, joined_TF in zip(groups, out, strict=True):
            assert torch.equal(joined_TF[: len(features[group[0]])], features[group[0]])
            assert torch.equal(joined_TF[len(joined_TF) - len(features[group[-1]]) :], features[group[-1]])
            if len(group) == 2:
                pause_TF = joined_TF[len(features[group[0]]) : len(joined_TF) - len(features[group[1]])]
                pauses.append(len(pause_TF))
                if len(pause_TF) > 20:
                    floor_F = features[group[0]].amin(0)
                    assert abs(float((pause_TF - floor_F).mean())) < 0.1
                    assert float((pause_TF - floor_F).std()) == pytest.approx(0.5, abs=0.1)
    assert max(pauses) <= 50 and math.isclose(np.mean(pauses), 25, abs_tol=12)


def test_a_batch_does_to_an_utterance_what_its_own_draw_says() -> None:
    """Everything at once, on a batch and on its utterances one by one, from one generator."""
    features = _features(5)
    config = replace(DataConfig(), spec_augment=SpecAugmentConfig(probability=0.7))
    noise_TF = torch.randn(120, 80, generator=torch.Generator().manual_seed(2)) - 5
    noises = [(noise_TF, 10.0) if row % 2 else None for row in range(len(features))]
    together, _ = _augmented(features, config, 9, noises)
    rng = np.random.default_rng(9)
    for features_TF, noise, out_TF in zip(features, noises, together, strict=True):
        drawer = Drawer(config, rng, len(features_TF))
        drawer.utterance(len(features_TF), noise)
        state = rng.bit_generator.state
        expected_BTF, _ = augment(features_TF[None], torch.tensor([len(features_TF)]), drawer.finish())
        rng.bit_generator.state = state  # what concerns the batch as a whole is drawn once
        assert torch.allclose(out_TF, expected_BTF[0], atol=1e-5)
