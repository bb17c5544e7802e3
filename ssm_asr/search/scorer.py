"""What a search needs of a transducer, so that PyTorch and exported models serve the same search.

Shapes: N hypotheses, B streams, T output frames, D encoder width, J joiner dim, V vocabulary, C context size.
"""

from typing import Protocol

import torch
from torch import Tensor

from ssm_asr.transducer.model import Transducer


class Scorer(Protocol):
    """Predictor and joiner, with both projections to the joiner's dimension made before."""

    context_size: int
    blank_id: int
    unk_id: int

    def predict(self, tokens_NC: Tensor) -> Tensor:
        """The last C tokens of each hypothesis, as `context_of` gives them -> (N, J)."""

    def join(self, encoder_NJ: Tensor, decoder_NJ: Tensor) -> Tensor:
        """Logits (N, V)."""


class TransducerScorer:
    """The scorer of a model in PyTorch."""

    def __init__(self, model: Transducer, unk_id: int, blank_id: int = 0) -> None:
        self._model = model
        self.context_size = model.config.context_size
        self.unk_id, self.blank_id = unk_id, blank_id

    def project(self, encoder_out_BTD: Tensor) -> Tensor:
        """Encoder output -> (B, T, J), as `join` takes it."""
        return self._model.joiner.encoder_proj(encoder_out_BTD)

    def predict(self, tokens_NC: Tensor) -> Tensor:
        """See Scorer."""
        tokens_NC = tokens_NC.to(self._model.joiner.decoder_proj.weight.device)
        return self._model.joiner.decoder_proj(self._model.decoder(tokens_NC, pad=False)[:, 0])

    def join(self, encoder_NJ: Tensor, decoder_NJ: Tensor) -> Tensor:
        """See Scorer."""
        return self._model.joiner(encoder_NJ, decoder_NJ, project_input=False).float()


def context_of(tokens: list[int] | tuple[int, ...], scorer: Scorer) -> list[int]:
    """The last C tokens; before the first come, as in training, a blank and before it nothing (-1)."""
    start = [-1] * (scorer.context_size - 1) + [scorer.blank_id]
    return [*start, *tokens[-scorer.context_size :]][-scorer.context_size :]


def context_tensor(contexts: list[list[int]]) -> Tensor:
    """(N, C) int64."""
    return torch.tensor(contexts, dtype=torch.int64)
