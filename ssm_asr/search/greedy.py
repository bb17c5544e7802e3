"""Greedy search: it takes the best symbol of each frame, at most one a frame.

The search is label-looping: a step does not look at one frame of all streams, but takes every stream to its next token,
over all the blanks before it. A step scores a block of frames for each stream with the predictor's present output and
takes the first frame in the block whose best symbol is a token. The frames after it are scored again in the next step.
So the number of steps depends on the tokens more than on the frames. Nothing in a step waits for the device; the host
asks a GPU only after several steps whether a stream has frames left.

Source: Bataev et al. 2024, "Label-looping: highly efficient decoding for transducers".

Shapes: B streams, T output frames, K frames of a block, J joiner dim, C context size, N steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ssm_asr.ops.capture import Captured
from ssm_asr.search.scorer import Scorer, context_of, context_tensor

BLOCK_FRAMES = 8  # a token comes every 6 to 8 frames
CPU_ROWS = 64  # on a CPU, frames that are scored in vain cost time, so blocks of many streams are shorter
STEPS_BETWEEN_QUESTIONS = {"cuda": 16, "cpu": 1}  # the host asks a GPU rarely whether a stream has frames left


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
        self._captured_steps = Captured(self._steps)

    def start(self) -> GreedyState:
        """Returns the state of a new stream."""
        return GreedyState()

    def step(self, encoder_BTJ: Tensor, lens: list[int], states: list[GreedyState]) -> list[GreedyState]:
        """Searches the first `lens[b]` frames of each stream's projected encoder output, and returns the new states."""
        device = encoder_BTJ.device
        steps = min(STEPS_BETWEEN_QUESTIONS[device.type], max([1, *lens]))
        contexts = context_tensor([context_of(state.tokens, self._scorer) for state in states])
        position_B, end_B = torch.tensor([[0] * len(lens), lens]).to(device)
        context_BC = contexts.to(device)
        symbols, frames = [], []
        for _ in range(0, max(lens, default=0), steps):  # a step takes each stream at least one frame ahead
            position_B, context_BC, symbols_NB, frames_NB, busy = self._captured_steps(
                encoder_BTJ, end_B, position_B, context_BC, steps
            )
            symbols.append(symbols_NB)
            frames.append(frames_NB)
            if not busy:
                break
        tokens = [list(state.tokens) for state in states]
        emitted = [list(state.emitted_frames) for state in states]
        if symbols:
            rows_NB, columns_NB = torch.stack([torch.cat(symbols), torch.cat(frames)]).tolist()
            for row, column in zip(rows_NB, columns_NB, strict=True):
                for b, (symbol, frame) in enumerate(zip(row, column, strict=True)):
                    if symbol != self._scorer.blank_id:
                        tokens[b].append(symbol)
                        emitted[b].append(states[b].frames + frame)
        return [
            GreedyState(tuple(row), tuple(column), state.frames + n)
            for row, column, state, n in zip(tokens, emitted, states, lens, strict=True)
        ]

    def _steps(
        self, encoder_BTJ: Tensor, end_B: Tensor, position_B: Tensor, context_BC: Tensor, steps: int
    ) -> tuple[Tensor, ...]:
        """Takes each stream over up to `steps` tokens.

        Args:
            end_B: the number of frames of each stream.
            position_B: the frame of each stream that is looked at next.
            context_BC: the last tokens of each stream.

        Returns:
            The new positions and contexts, the symbols (N, B) that the steps emitted, blank for none, the frames (N, B)
            of these symbols, and whether a stream has frames left.
        """
        scorer, (B, T, J) = self._scorer, encoder_BTJ.shape
        block = min(BLOCK_FRAMES if encoder_BTJ.is_cuda else min(BLOCK_FRAMES, max(2, CPU_ROWS // B)), T)
        offset_K = torch.arange(block, device=encoder_BTJ.device)
        row_B1 = torch.arange(B, device=encoder_BTJ.device)[:, None]
        symbols, frames = [], []
        for _ in range(steps):
            decoder_BJ = scorer.predict(context_BC)
            frame_BK = position_B[:, None] + offset_K
            encoder_BKJ = encoder_BTJ[row_B1, frame_BK.clamp(max=T - 1)]
            decoder_BKJ = decoder_BJ[:, None].expand(B, block, J)
            logits_NV = scorer.join(encoder_BKJ.reshape(-1, J), decoder_BKJ.reshape(-1, J))
            best_BK = logits_NV.argmax(dim=-1).view(B, block)
            emits_BK = (best_BK != scorer.blank_id) & (best_BK != scorer.unk_id) & (frame_BK < end_B[:, None])
            # The first frame that emits has the largest weight.
            weight_B, first_B = (emits_BK * (block - offset_K)).max(dim=1)
            found_B = weight_B > 0
            token_B = best_BK.gather(1, first_B[:, None])[:, 0]
            symbols.append(torch.where(found_B, token_B, scorer.blank_id))
            frames.append(position_B + first_B)
            position_B = torch.minimum(position_B + torch.where(found_B, first_B + 1, block), end_B)
            context_BC = torch.where(
                found_B[:, None], torch.cat([context_BC[:, 1:], token_B[:, None]], dim=1), context_BC
            )
        return position_B, context_BC, torch.stack(symbols), torch.stack(frames), (position_B < end_B).any()

    def tokens(self, state: GreedyState) -> tuple[int, ...]:
        """Returns the ids of the tokens found so far."""
        return state.tokens

    def emitted_frames(self, state: GreedyState) -> tuple[int, ...]:
        """Returns the output frame (40 ms) in which each token was emitted, counted from the start of the stream."""
        return state.emitted_frames

    def settled(self, state: GreedyState) -> int:
        """Returns the number of tokens, since greedy search takes none back."""
        return len(state.tokens)
