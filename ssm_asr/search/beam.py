"""Beam search with at most one symbol a frame, hypotheses of the same tokens merged.

Shapes: B streams, T output frames, J joiner dim, N hypotheses of all streams together, V vocabulary.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssm_asr.search.scorer import Scorer, context_of, context_tensor


class Hypothesis(NamedTuple):
    """A token sequence and its log-probability, summed over the alignments that were kept."""

    tokens: tuple[int, ...]
    log_prob: float


BeamState = tuple[Hypothesis, ...]


class BeamSearch:
    """Keeps the `beam` best hypotheses of each stream after every frame."""

    def __init__(self, scorer: Scorer, beam: int = 4) -> None:
        if beam < 1:
            raise ValueError(f"beam of {beam}: give a positive number")
        self._scorer, self._beam = scorer, beam
        self._predicted: dict[tuple[int, ...], Tensor] = {}

    def start(self) -> BeamState:
        """The state of a new stream."""
        return (Hypothesis((), 0.0),)

    def step(self, encoder_BTJ: Tensor, lens: list[int], states: list[BeamState]) -> list[BeamState]:
        """Takes each stream's first `lens` frames of projected encoder output."""
        self._predicted.clear()
        states = list(states)
        for t in range(max(lens, default=0)):
            active = [b for b, length in enumerate(lens) if t < length]
            owners = [b for b in active for _ in states[b]]
            hypotheses = [hypothesis for b in active for hypothesis in states[b]]
            decoder_NJ = self._predict([hypothesis.tokens for hypothesis in hypotheses])
            logits_NV = self._scorer.join(encoder_BTJ[owners, t], decoder_NJ)
            previous_N = torch.tensor([h.log_prob for h in hypotheses], dtype=torch.float64)
            scores_NV = (logits_NV.log_softmax(dim=-1).cpu().double() + previous_N[:, None]).numpy()
            first = 0
            for b in active:
                last = first + len(states[b])
                states[b] = self._extend(states[b], scores_NV[first:last])
                first = last
        return states

    def tokens(self, state: BeamState) -> tuple[int, ...]:
        """The tokens of the hypothesis with the best log-probability a token, the predictor's first context counted in.

        So do icefall and sherpa-onnx.
        """
        return max(state, key=lambda h: h.log_prob / (len(h.tokens) + self._scorer.context_size)).tokens

    def _extend(self, state: BeamState, scores_NV: np.ndarray) -> BeamState:
        """The best successors of one stream's hypotheses."""
        count = min(self._beam, scores_NV.size)
        flat = scores_NV.ravel()
        merged: dict[tuple[int, ...], float] = {}
        for index in np.argpartition(flat, -count)[-count:]:
            n, token = divmod(int(index), scores_NV.shape[1])
            silent = token in (self._scorer.blank_id, self._scorer.unk_id)
            tokens = state[n].tokens if silent else (*state[n].tokens, token)
            merged[tokens] = float(np.logaddexp(merged.get(tokens, -np.inf), flat[index]))
        return tuple(Hypothesis(tokens, log_prob) for tokens, log_prob in merged.items())

    def _predict(self, sequences: list[tuple[int, ...]]) -> Tensor:
        """Predictor output (N, J); contexts that occurred before in this step are not computed again."""
        contexts = [tuple(context_of(tokens, self._scorer)) for tokens in sequences]
        new = [context for context in dict.fromkeys(contexts) if context not in self._predicted]
        if new:
            rows = self._scorer.predict(context_tensor([list(context) for context in new]))
            self._predicted.update(zip(new, rows, strict=True))
        return torch.stack([self._predicted[context] for context in contexts])
