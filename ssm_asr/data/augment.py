"""Augments the features of utterances; all randomness comes from the generator that is passed in.

Shapes: T frames, F mel bins.
"""

import math

import numpy as np
import torch

from ssm_asr.data.config import SpecAugmentConfig


def spec_augment(features_TF: torch.Tensor, config: SpecAugmentConfig, rng: np.random.Generator) -> torch.Tensor:
    """Warps and masks log-mel features (SpecAugment); masked cells get the utterance's mean.

    Returns:
        A new features_TF, or the given one if the draw leaves this utterance as it is.
    """
    if rng.random() >= config.probability:
        return features_TF
    features_TF = _time_warp(features_TF, config.time_warp_frames, rng).clone()
    num_frames, num_bins = features_TF.shape
    mean = features_TF.mean()
    for _ in range(config.num_freq_masks):
        features_TF[:, _mask(num_bins, min(config.freq_mask_bins, num_bins), rng)] = mean
    # The masks share a budget, so that short utterances get fewer and shorter ones.
    budget_frames = int(config.max_time_masked * num_frames)
    num_masks = min(config.num_time_masks, math.ceil(budget_frames / config.time_mask_frames))
    for _ in range(num_masks):
        longest = min(config.time_mask_frames, budget_frames // num_masks)
        features_TF[_mask(num_frames, longest, rng)] = mean
    return features_TF


def _mask(size: int, widest: int, rng: np.random.Generator) -> slice:
    """Returns a random range of at most `widest` of `size` places."""
    width = int(rng.integers(widest + 1))
    start = int(rng.integers(size - width + 1))
    return slice(start, start + width)


def _time_warp(features_TF: torch.Tensor, max_shift: int, rng: np.random.Generator) -> torch.Tensor:
    """Moves a random frame by up to `max_shift` frames, which stretches one side and squeezes the other."""
    num_frames = len(features_TF)
    if max_shift <= 0 or num_frames <= 2 * max_shift + 2:
        return features_TF
    centre = int(rng.integers(max_shift + 1, num_frames - max_shift))
    moved = centre + int(rng.integers(-max_shift, max_shift + 1))
    sides = [(features_TF[:centre], moved), (features_TF[centre:], num_frames - moved)]
    warped = [
        torch.nn.functional.interpolate(side_TF.T[None], size=size, mode="linear")[0].T for side_TF, size in sides
    ]
    return torch.cat(warped)


def join_utterances(features: list[torch.Tensor], longest_pause: int, rng: np.random.Generator) -> torch.Tensor:
    """Joins utterances (T, F) end to end.

    Between two of them is a pause of up to `longest_pause` frames, at the level of the first one's quietest sounds.
    """
    floor_F = features[0].amin(dim=0)
    parts = [features[0]]
    for features_TF in features[1:]:
        pause = int(rng.integers(longest_pause + 1))
        # The noise floor of a recording varies, so the pause does.
        ripple = torch.from_numpy(rng.normal(0.0, 0.5, (pause, len(floor_F))).astype(np.float32))
        parts += [floor_F + ripple, features_TF]
    return torch.cat(parts)


def draw_groups(count: int, most: int, rng: np.random.Generator) -> list[list[int]]:
    """Cuts the numbers 0 … count - 1, in order, into groups of random sizes from 1 to `most`."""
    groups, start = [], 0
    while start < count:
        end = min(count, start + int(rng.integers(1, most + 1)))
        groups.append(list(range(start, end)))
        start = end
    return groups


def add_noise(
    features_TF: torch.Tensor, noise_TF: torch.Tensor, snr_db: float, rng: np.random.Generator
) -> torch.Tensor:
    """Mixes noise into one utterance in the domain of mel powers.

    A random part of the noise, repeated where it is too short, is scaled so that the ratio of the mean mel
    powers is `snr_db`. Powers add, which is exact on average if noise and speech are uncorrelated.

    Returns:
        features_TF of the mixture; log-mel, like both inputs.
    """
    num_frames = len(features_TF)
    start = int(rng.integers(max(0, len(noise_TF) - num_frames) + 1))
    noise_TF = noise_TF[start : start + num_frames]
    noise_TF = noise_TF.repeat(math.ceil(num_frames / len(noise_TF)), 1)[:num_frames]
    ratio = torch.logsumexp(features_TF.flatten(), 0) - torch.logsumexp(noise_TF.flatten(), 0)
    return torch.logaddexp(features_TF, noise_TF + (ratio - snr_db * math.log(10) / 10))
