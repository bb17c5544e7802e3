"""The stateless predictor and the joiner of the transducer.

Shapes: N sequences, U tokens, C context size, V vocabulary, D channels, G channels of a group, J joiner channels.
"""

import torch
from torch import Tensor, nn

from ssm_asr.encoder.modules import scaled_linear
from ssm_asr.encoder.regularize import Balancer
from ssm_asr.ops.linear import grouped_conv

PREDICTOR_GROUP = 4  # channels of a group; the predictor's convolution mixes only channels of one group


class Predictor(nn.Module):
    """The stateless predictor: an embedding, a convolution over the last `context_size` tokens, and ReLU.

    Checkpoints call it `decoder`.

    Source: Ghodsi et al. 2020, "RNN-transducer with stateless prediction network".

    Args:
        vocab_size: number of tokens, with the blank.
        dim: D, a multiple of PREDICTOR_GROUP.
        context_size: tokens that the output depends on.
    """

    def __init__(self, vocab_size: int, dim: int, context_size: int) -> None:
        super().__init__()
        self.context_size = context_size
        self.embedding = nn.Embedding(vocab_size, dim)
        self.balance_embedding = Balancer(positive=None, abs=(0.5, 1.0), prob=0.05)
        self.conv = nn.Conv1d(dim, dim, context_size, groups=dim // PREDICTOR_GROUP, bias=False)
        self.balance_out = Balancer(positive=None, abs=(0.5, 1.0), prob=0.05)

    def forward(self, tokens_NU: Tensor, pad: bool = True) -> Tensor:
        """Maps token ids to (N, U, D), or to (N, U - context_size + 1, D) without padding.

        Args:
            tokens_NU: token ids; a negative id means that there is no token yet, and its embedding is zero.
            pad: whether to put context_size - 1 zero vectors before the first token.
        """
        known = (tokens_NU >= 0)[..., None]
        embedded = self.balance_embedding(self.embedding(tokens_NU.clamp(min=0)) * known)
        x_NDU = embedded.transpose(1, 2)
        if pad:
            x_NDU = nn.functional.pad(x_NDU, (self.context_size - 1, 0))
        return self.balance_out(grouped_conv(self.conv, x_NDU).relu().transpose(1, 2))

    @torch.no_grad()
    def table(self) -> Tensor:
        """Returns what each token adds to the output before the ReLU, (C, 1 + V, D), by its place c in the context.

        The first row of each place is zero and stands for the id -1. Searches look up terms, since a convolution of
        C tokens at a time is slow.
        """
        embedded_DV = nn.functional.pad(self.embedding.weight.T, (1, 0))
        terms = (
            nn.functional.conv1d(embedded_DV[None], weight_DG[..., None], groups=self.conv.groups)[0].T
            for weight_DG in self.conv.weight.unbind(dim=2)
        )
        return torch.stack(list(terms))


class Joiner(nn.Module):
    """The joiner: output_linear(tanh(encoder_proj(e) + decoder_proj(d))) for encoder output e and predictor output d.

    Args:
        encoder_dim: channels of the encoder's output.
        decoder_dim: channels of the predictor's output.
        joiner_dim: J.
        vocab_size: number of tokens, with the blank.
    """

    def __init__(self, encoder_dim: int, decoder_dim: int, joiner_dim: int, vocab_size: int) -> None:
        super().__init__()
        self.encoder_proj = scaled_linear(encoder_dim, joiner_dim, 0.25)
        self.decoder_proj = scaled_linear(decoder_dim, joiner_dim, 0.25)
        self.output_linear = nn.Linear(joiner_dim, vocab_size)

    def forward(self, encoder_out: Tensor, decoder_out: Tensor, project_input: bool = True) -> Tensor:
        """Returns the logits (…, vocab_size).

        Args:
            encoder_out: output of the encoder, (…, encoder_dim).
            decoder_out: output of the predictor, (…, decoder_dim), of a shape that broadcasts with it.
            project_input: False if both inputs are projected already, to (…, J).
        """
        if project_input:
            encoder_out, decoder_out = self.encoder_proj(encoder_out), self.decoder_proj(decoder_out)
        return self.output_linear(torch.tanh(encoder_out + decoder_out))
