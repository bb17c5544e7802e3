"""What a search needs of a transducer, so that one search serves models in PyTorch and exported models.

Shapes: N hypotheses, B streams, T output frames, D encoder width, J joiner dim, V vocabulary, C context size.
"""

from typing import Protocol

import torch
from torch import Tensor

from ssm_asr.transducer.model import Transducer


class Scorer(Protocol):
    """A predictor and a joiner, each after its projection to the joiner's dimension.

    Attributes:
        context_size: the number of tokens that the predictor sees.
        blank_id, unk_id: the ids of the tokens that emit nothing.
    """

    context_size: int
    blank_id: int
    unk_id: int

    def predict(self, tokens_NC: Tensor) -> Tensor:
        """Returns the predictor's output (N, J) after the last C tokens of each hypothesis, given by `context_of`."""

    def join(self, encoder_NJ: Tensor, decoder_NJ: Tensor) -> Tensor:
        """Returns the logits (N, V) of the next symbol."""


class TransducerScorer:
    """The scorer of a model in PyTorch, whose predictor's weights must not change any more."""

    def __init__(self, model: Transducer, unk_id: int, blank_id: int = 0) -> None:
        self._model = model
        self.context_size = model.config.context_size
        self.unk_id, self.blank_id = unk_id, blank_id
        self._table_CVD = model.decoder.table()

    def project(self, encoder_out_BTD: Tensor) -> Tensor:
        """Projects encoder output to (B, T, J), as `join` takes it."""
        return self._model.joiner.encoder_proj(encoder_out_BTD)

    def predict(self, tokens_NC: Tensor) -> Tensor:
        """Returns the predictor's output (N, J) after the last C tokens of each hypothesis, given by `context_of`."""
        places_C = torch.arange(self.context_size, device=self._table_CVD.device)
        terms_NCD = self._table_CVD[places_C, tokens_NC.to(places_C.device) + 1]
        return self._model.joiner.decoder_proj(terms_NCD.sum(dim=1).relu())

    def join(self, encoder_NJ: Tensor, decoder_NJ: Tensor) -> Tensor:
        """Returns the logits (N, V) of the next symbol, in float32."""
        return self._model.joiner(encoder_NJ, decoder_NJ, project_input=False).float()


def context_of(tokens: list[int] | tuple[int, ...], scorer: Scorer) -> list[int]:
    """Returns the last C of the tokens.

    As in training, a blank stands before the first token, and nothing (-1) before that.
    """
    start = [-1] * (scorer.context_size - 1) + [scorer.blank_id]
    return [*start, *tokens[-scorer.context_size :]][-scorer.context_size :]


def context_tensor(contexts: list[list[int]]) -> Tensor:
    """Returns contexts as a tensor (N, C) of int64."""
    return torch.tensor(contexts, dtype=torch.int64)
