"""Beam search with at most one symbol a frame; hypotheses with equal tokens are merged.

Shapes: B streams, T output frames, J joiner dim, N hypotheses of all streams together, V vocabulary.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssm_asr.search.scorer import Scorer, context_of, context_tensor


class Hypothesis(NamedTuple):
    """A token sequence and its log-probability, summed over the alignments that were kept.

    Attributes:
        emitted_frames: the output frame of each token, counted from the start of the stream. Where hypotheses merged,
            it is the alignment of the more probable one.
    """

    tokens: tuple[int, ...]
    emitted_frames: tuple[int, ...]
    log_prob: float


class BeamState(NamedTuple):
    """What beam search knows of one stream. It is never changed in place."""

    hypotheses: tuple[Hypothesis, ...]
    frames: int  # output frames seen


class BeamSearch:
    """Keeps the `beam` best hypotheses of each stream after every frame. Blank and `<unk>` emit nothing."""

    def __init__(self, scorer: Scorer, beam: int = 4) -> None:
        if beam < 1:
            raise ValueError(f"beam of {beam}: give a positive number")
        self._scorer, self._beam = scorer, beam
        self._predicted: dict[tuple[int, ...], Tensor] = {}

    def start(self) -> BeamState:
        """Returns the state of a new stream."""
        return BeamState((Hypothesis((), (), 0.0),), 0)

    def step(self, encoder_BTJ: Tensor, lens: list[int], states: list[BeamState]) -> list[BeamState]:
        """Searches the first `lens[b]` frames of each stream's projected encoder output, and returns the new states."""
        self._predicted.clear()
        states = list(states)
        for t in range(max(lens, default=0)):
            active = [b for b, length in enumerate(lens) if t < length]
            owners = [b for b in active for _ in states[b].hypotheses]
            hypotheses = [hypothesis for b in active for hypothesis in states[b].hypotheses]
            decoder_NJ = self._predict([hypothesis.tokens for hypothesis in hypotheses])
            logits_NV = self._scorer.join(encoder_BTJ[owners, t], decoder_NJ)
            previous_N = torch.tensor([h.log_prob for h in hypotheses], dtype=torch.float64)
            scores_NV = (logits_NV.log_softmax(dim=-1).cpu().double() + previous_N[:, None]).numpy()
            first = 0
            for b in active:
                last = first + len(states[b].hypotheses)
                states[b] = self._extend(states[b], scores_NV[first:last])
                first = last
        return states

    def tokens(self, state: BeamState) -> tuple[int, ...]:
        """Returns the ids of the best hypothesis's tokens."""
        return self._best(state).tokens

    def emitted_frames(self, state: BeamState) -> tuple[int, ...]:
        """Returns the output frame (40 ms) in which each token was emitted, counted from the start of the stream."""
        return self._best(state).emitted_frames

    def settled(self, state: BeamState) -> int:
        """Returns how many tokens all hypotheses begin with: whatever comes will be appended to one of them."""
        sequences = [hypothesis.tokens for hypothesis in state.hypotheses]
        first, last = min(sequences), max(sequences)  # what these two share, those between them share as well
        return next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))

    def _best(self, state: BeamState) -> Hypothesis:
        """The hypothesis with the highest log-probability per token.

        The predictor's first context counts as tokens, too, as in icefall and sherpa-onnx.
        """
        return max(state.hypotheses, key=lambda h: h.log_prob / (len(h.tokens) + self._scorer.context_size))

    def _extend(self, state: BeamState, scores_NV: np.ndarray) -> BeamState:
        """The best successors of one stream's hypotheses."""
        count = min(self._beam, scores_NV.size)
        flat = scores_NV.ravel()
        log_probs: dict[tuple[int, ...], float] = {}
        paths: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}  # the most probable way to each
        for index in np.argpartition(flat, -count)[-count:]:
            n, token = divmod(int(index), scores_NV.shape[1])
            tokens, frames, _ = state.hypotheses[n]
            if token not in (self._scorer.blank_id, self._scorer.unk_id):
                tokens, frames = (*tokens, token), (*frames, state.frames)
            log_probs[tokens] = float(np.logaddexp(log_probs.get(tokens, -np.inf), flat[index]))
            paths[tokens] = max(paths.get(tokens, (-np.inf, ())), (float(flat[index]), frames))
        hypotheses = (Hypothesis(tokens, paths[tokens][1], log_prob) for tokens, log_prob in log_probs.items())
        return BeamState(tuple(hypotheses), state.frames + 1)

    def _predict(self, sequences: list[tuple[int, ...]]) -> Tensor:
        """Predictor output (N, J); contexts that occurred before in this step are not computed again."""
        contexts = [tuple(context_of(tokens, self._scorer)) for tokens in sequences]
        new = [context for context in dict.fromkeys(contexts) if context not in self._predicted]
        if new:
            rows = self._scorer.predict(context_tensor([list(context) for context in new]))
            self._predicted.update(zip(new, rows, strict=True))
        return torch.stack([self._predicted[context] for context in contexts])
