"""Greedy search: it takes the best symbol of each frame, at most one a frame.

Shapes: B streams, T output frames, J joiner dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ssm_asr.search.scorer import Scorer, context_of, context_tensor


@dataclass(frozen=True)
class GreedyState:
    """What greedy search knows of one stream. It is never changed in place."""

    tokens: tuple[int, ...] = ()
    emitted_frames: tuple[int, ...] = ()  # the output frame of each token, counted from the start of the stream
    frames: int = 0  # output frames seen


class GreedySearch:
    """Emits the best symbol of each frame. Blank and `<unk>` emit nothing, as in common runtimes."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def start(self) -> GreedyState:
        """Returns the state of a new stream."""
        return GreedyState()

    def step(self, encoder_BTJ: Tensor, lens: list[int], states: list[GreedyState]) -> list[GreedyState]:
        """Searches the first `lens[b]` frames of each stream's projected encoder output, and returns the new states."""
        scorer = self._scorer
        tokens = [list(state.tokens) for state in states]
        emitted = [list(state.emitted_frames) for state in states]
        decoder_BJ = scorer.predict(context_tensor([context_of(row, scorer) for row in tokens]))
        for t in range(max(lens, default=0)):
            best = scorer.join(encoder_BTJ[:, t], decoder_BJ).argmax(dim=-1).tolist()
            emitting = [
                b for b, token in enumerate(best) if t < lens[b] and token not in (scorer.blank_id, scorer.unk_id)
            ]
            if not emitting:
                continue
            for b in emitting:
                tokens[b].append(best[b])
                emitted[b].append(states[b].frames + t)
            changed = scorer.predict(context_tensor([context_of(tokens[b], scorer) for b in emitting]))
            decoder_BJ = decoder_BJ.index_copy(0, torch.tensor(emitting, device=decoder_BJ.device), changed)
        return [
            GreedyState(tuple(row), tuple(frames), state.frames + n)
            for row, frames, state, n in zip(tokens, emitted, states, lens, strict=True)
        ]

    def tokens(self, state: GreedyState) -> tuple[int, ...]:
        """Returns the ids of the tokens found so far."""
        return state.tokens

    def emitted_frames(self, state: GreedyState) -> tuple[int, ...]:
        """Returns the output frame (40 ms) in which each token was emitted, counted from the start of the stream."""
        return state.emitted_frames

    def settled(self, state: GreedyState) -> int:
        """Returns the number of tokens, since greedy search takes none back."""
        return len(state.tokens)
