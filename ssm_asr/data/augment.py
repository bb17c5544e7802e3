"""Augments batches of features: a worker draws what is done to each utterance, and the device does it to all at once.

All randomness comes from the generator that is passed in, so a batch is the same on every device but for rounding.

Shapes: B utterances, N of them with noise, G groups of joined utterances, P frames of pauses, T frames, F mel bins.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ssm_asr.data.config import DataConfig
from ssm_asr.units import FRAME_SHIFT_MS, NUM_MELS


class Noise(NamedTuple):
    """The noise that is mixed into some utterances of a batch.

    Attributes:
        rows_N: int64, the numbers of these utterances.
        noise_NTF: the log-mel noise of each, as long as the utterance; what follows has no meaning.
        snr_db_N: the ratio of mean mel powers.
    """

    rows_N: Tensor
    noise_NTF: Tensor
    snr_db_N: Tensor


class SpecAugment(NamedTuple):
    """Warping and masking of a batch (Park et al. 2019, arXiv 1904.08779).

    Attributes:
        low_BT, weight_BT: warped frame t is (1 - weight) times frame `low` and weight times the one after it.
        bins_BF, frames_BT: true where the mean of the utterance replaces a bin, or a frame.
    """

    low_BT: Tensor
    weight_BT: Tensor
    bins_BF: Tensor
    frames_BT: Tensor


class Joining(NamedTuple):
    """Which utterances are joined end to end, with pauses between them.

    Attributes:
        groups: the numbers of the utterances of each group, in order.
        first_G: int64, the first of them.
        source_GT: int64; frame t of a group is frame `source` of all utterances, padded and put end to end.
        frames_G: int64, the number of frames of each group.
        pauses_P: int64, the frames of `source_GT`, put end to end, that are pauses.
        ripple_PF: what is added to the noise floor of a group to make these.
    """

    groups: list[list[int]]
    first_G: Tensor
    source_GT: Tensor
    frames_G: Tensor
    pauses_P: Tensor
    ripple_PF: Tensor


class Augmentation(NamedTuple):
    """All that is done to the features of a batch, in this order; None is left out."""

    noise: Noise | None
    spec_augment: SpecAugment | None
    joining: Joining | None


class Drawer:
    """Draws the augmentation of one batch, utterance by utterance.

    Args:
        config: the configuration of the data.
        rng: the only source of randomness.
        longest: frames of the longest utterance.
    """

    def __init__(self, config: DataConfig, rng: np.random.Generator, longest: int) -> None:
        self._config, self._rng, self._longest = config, rng, longest
        self._frames: list[int] = []
        self._noises: list[tuple[int, Tensor, float]] = []
        self._warps: list[tuple[np.ndarray, np.ndarray]] = []
        self._masks: list[tuple[np.ndarray, np.ndarray]] = []

    def utterance(self, frames: int, noise: tuple[Tensor, float] | None = None) -> None:
        """Draws what is done to the next utterance.

        Args:
            frames: the length of the utterance.
            noise: noise_TF of any length, and at how many dB below the speech it is mixed in; None mixes in nothing.
        """
        if noise is not None:
            noise_TF, snr_db = noise
            start = int(self._rng.integers(max(0, len(noise_TF) - frames) + 1))
            noise_TF = noise_TF[start : start + frames]
            repeats = math.ceil(frames / len(noise_TF))
            noise_TF = noise_TF.repeat(repeats, 1)[:frames] if repeats > 1 else noise_TF
            self._noises.append((len(self._frames), noise_TF, snr_db))
        self._frames.append(frames)
        augmented = self._rng.random() < self._config.spec_augment.probability
        self._warps.append(self._warp(frames if augmented else 0))
        self._masks.append(self._mask(frames if augmented else 0))

    def finish(self) -> Augmentation:
        """Draws what concerns the batch as a whole, and returns everything."""
        joined = self._rng.random() < self._config.join_probability
        return Augmentation(self._noise(), self._spec_augment(), self._join() if joined else None)

    def _noise(self) -> Noise | None:
        if not self._noises:
            return None
        rows, noises, snrs_db = zip(*self._noises, strict=True)
        return Noise(torch.tensor(rows), pad_sequence(list(noises), batch_first=True), torch.tensor(snrs_db))

    def _spec_augment(self) -> SpecAugment | None:
        if self._config.spec_augment.probability == 0:
            return None
        arrays = [*zip(*self._warps, strict=True), *zip(*self._masks, strict=True)]
        return SpecAugment(*(torch.from_numpy(np.stack(rows)) for rows in arrays))

    def _warp(self, frames: int) -> tuple[np.ndarray, np.ndarray]:
        """Moves a random frame by up to the largest shift, which stretches one side and squeezes the other."""
        low, weight = np.arange(self._longest, dtype=np.int32), np.zeros(self._longest, np.float32)
        most = self._config.spec_augment.time_warp_frames
        if most > 0 and frames > 2 * most + 2:
            centre = int(self._rng.integers(most + 1, frames - most))
            moved = centre + int(self._rng.integers(-most, most + 1))
            for old, new in ((slice(0, centre), slice(0, moved)), (slice(centre, frames), slice(moved, frames))):
                position = _stretched(old.stop - old.start, new.stop - new.start)
                low[new] = old.start + position.astype(np.int32)
                weight[new] = position % 1
        return low, weight

    def _mask(self, frames: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws masks of bins and of frames; the latter share a budget, so that short utterances get fewer."""
        masked_F, masked_T = np.zeros(NUM_MELS, bool), np.zeros(self._longest, bool)
        config = self._config.spec_augment
        if frames:
            for _ in range(config.num_freq_masks):
                masked_F[self._range(NUM_MELS, min(config.freq_mask_bins, NUM_MELS))] = True
            budget_frames = int(config.max_time_masked * frames)
            num_masks = min(config.num_time_masks, math.ceil(budget_frames / config.time_mask_frames))
            for _ in range(num_masks):
                masked_T[self._range(frames, min(config.time_mask_frames, budget_frames // num_masks))] = True
        return masked_F, masked_T

    def _range(self, size: int, widest: int) -> slice:
        """Returns a random range of at most `widest` of `size` places."""
        width = int(self._rng.integers(widest + 1))
        start = int(self._rng.integers(size - width + 1))
        return slice(start, start + width)

    def _join(self) -> Joining:
        """Cuts the utterances, in order, into groups of random sizes, with pauses of random lengths in each."""
        longest_pause = round(self._config.join_pause_s * 1000 / FRAME_SHIFT_MS)
        groups = self._groups(len(self._frames), self._config.join_most)
        sources, ripples = [], [np.empty((0, NUM_MELS), np.float32)]
        for group in groups:
            parts: list[np.ndarray] = []
            for row in group:
                if parts:
                    pause = int(self._rng.integers(longest_pause + 1))
                    parts.append(np.full(pause, -1))
                    # The noise floor of a recording varies, so the pause does.
                    ripples.append(self._rng.normal(0.0, 0.5, (pause, NUM_MELS)).astype(np.float32))
                parts.append(row * self._longest + np.arange(self._frames[row]))
            sources.append(torch.from_numpy(np.concatenate(parts)))
        source_GT = pad_sequence(sources, batch_first=True)
        pauses_P = (source_GT.flatten() == -1).nonzero()[:, 0]
        frames_G = torch.tensor([len(source_T) for source_T in sources])
        first_G = torch.tensor([group[0] for group in groups])
        ripple_PF = torch.from_numpy(np.concatenate(ripples))
        return Joining(groups, first_G, source_GT.clamp(min=0), frames_G, pauses_P, ripple_PF)

    def _groups(self, count: int, most: int) -> list[list[int]]:
        """Cuts the numbers 0 … count - 1, in order, into groups of random sizes from 1 to `most`."""
        groups, start = [], 0
        while start < count:
            end = min(count, start + int(self._rng.integers(1, most + 1)))
            groups.append(list(range(start, end)))
            start = end
        return groups


def _stretched(size: int, new_size: int) -> np.ndarray:
    """Returns where each of `new_size` places lies among `size`, if both fill one stretch of time."""
    return np.clip((np.arange(new_size) + 0.5) * (size / new_size) - 0.5, 0, size - 1)


def augment(features_BTF: Tensor, frames_B: Tensor, augmentation: Augmentation) -> tuple[Tensor, Tensor]:
    """Does what was drawn.

    Args:
        features_BTF: log-mel features, of which what follows the end of an utterance has no meaning.
        frames_B: int64, the lengths of the utterances.
        augmentation: what is done; on the device of the features.

    Returns:
        features_GTF and frames_G: of the groups if utterances are joined, of the utterances otherwise.
    """
    if augmentation.noise is not None:
        features_BTF = _mixed(features_BTF, frames_B, augmentation.noise)
    if augmentation.spec_augment is not None:
        features_BTF = _warped_and_masked(features_BTF, frames_B, augmentation.spec_augment)
    if augmentation.joining is not None:
        return _joined(features_BTF, frames_B, augmentation.joining), augmentation.joining.frames_G
    return features_BTF, frames_B


def within(frames_B: Tensor, longest: int) -> Tensor:
    """Returns mask_BT, true for the frames of each utterance and false for what follows them."""
    return torch.arange(longest, device=frames_B.device) < frames_B[:, None]


def _mixed(features_BTF: Tensor, frames_B: Tensor, noise: Noise) -> Tensor:
    """Mixes in noise in the domain of mel powers, where powers add: exact on average if the two are uncorrelated."""
    speech_NTF = features_BTF[noise.rows_N]
    noise_NTF = torch.nn.functional.pad(noise.noise_NTF, (0, 0, 0, speech_NTF.shape[1] - noise.noise_NTF.shape[1]))
    outside_NT1 = ~within(frames_B[noise.rows_N], speech_NTF.shape[1])[:, :, None]
    level_N, noise_level_N = (
        torch.logsumexp(x_NTF.masked_fill(outside_NT1, -math.inf).flatten(1), 1) for x_NTF in (speech_NTF, noise_NTF)
    )
    gain_N = level_N - noise_level_N - noise.snr_db_N * (math.log(10) / 10)
    mixed_NTF = torch.logaddexp(speech_NTF, noise_NTF + gain_N[:, None, None])
    return features_BTF.index_copy(0, noise.rows_N, mixed_NTF)


def _warped_and_masked(features_BTF: Tensor, frames_B: Tensor, draw: SpecAugment) -> Tensor:
    num_bins = features_BTF.shape[2]
    low_BT = draw.low_BT.long()
    high_BT = (low_BT + 1).clamp(max=features_BTF.shape[1] - 1)
    low_BTF, high_BTF = (
        features_BTF.gather(1, index_BT[:, :, None].expand(-1, -1, num_bins)) for index_BT in (low_BT, high_BT)
    )
    features_BTF = torch.lerp(low_BTF, high_BTF, draw.weight_BT[:, :, None])
    outside_BT1 = ~within(frames_B, features_BTF.shape[1])[:, :, None]
    mean_B = features_BTF.masked_fill(outside_BT1, 0.0).sum(dim=(1, 2)) / (frames_B * num_bins)
    masked_BTF = draw.bins_BF[:, None, :] | draw.frames_BT[:, :, None]
    return torch.where(masked_BTF, mean_B[:, None, None], features_BTF)


def _joined(features_BTF: Tensor, frames_B: Tensor, joining: Joining) -> Tensor:
    """Joins utterances; the pauses are at the level of the quietest sounds of the first utterance of their group."""
    outside_GT1 = ~within(frames_B[joining.first_G], features_BTF.shape[1])[:, :, None]
    floor_GF = features_BTF[joining.first_G].masked_fill(outside_GT1, math.inf).amin(dim=1)
    joined_GTF = features_BTF.flatten(0, 1)[joining.source_GT]
    pauses_PF = floor_GF[joining.pauses_P // joining.source_GT.shape[1]] + joining.ripple_PF
    joined_GTF.view(-1, features_BTF.shape[2])[joining.pauses_P] = pauses_PF
    return joined_GTF
