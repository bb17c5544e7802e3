"""Label-looping greedy search finds what a search frame by frame finds, for any batch, symbol rate and split."""

import pytest
import torch
from torch import Tensor

from ssm_asr.search.greedy import BLOCK_FRAMES, GreedySearch, GreedyState
from ssm_asr.search.scorer import TransducerScorer, context_of, context_tensor
from ssm_asr.transducer.model import ModelConfig, Transducer

UNK, BLANK, VOCABULARY, FRAMES = 2, 0, 12, 61
LENGTHS = [61, 0, 1, BLOCK_FRAMES, BLOCK_FRAMES + 1, 40, 61]


def make_scorer(blank_bias: float) -> TransducerScorer:
    """A scorer of random weights, whose best symbols depend on the frame and on the last two tokens."""
    torch.manual_seed(3)
    model = Transducer(ModelConfig(predictor_dim=16, joiner_dim=16), VOCABULARY).eval()
    with torch.no_grad():
        for p in (*model.decoder.parameters(), *model.joiner.parameters()):
            p.normal_()
        model.joiner.output_linear.bias[BLANK] += blank_bias
    return TransducerScorer(model, UNK, BLANK)


def frame_by_frame(scorer: TransducerScorer, encoder_TJ: Tensor) -> tuple[list[int], list[int]]:
    tokens: list[int] = []
    frames: list[int] = []
    for t, encoder_J in enumerate(encoder_TJ):
        decoder_NJ = scorer.predict(context_tensor([context_of(tuple(tokens), scorer)]))
        best = int(scorer.join(encoder_J[None], decoder_NJ).argmax())
        if best not in (BLANK, UNK):
            tokens.append(best)
            frames.append(t)
    return tokens, frames


@torch.inference_mode()
@pytest.mark.parametrize("blank_bias", [-1e9, 0.0, 4.0, 7.0, 1e9], ids="blank {:+g}".format)
def test_any_rate_of_tokens(blank_bias: float) -> None:
    scorer = make_scorer(blank_bias)
    encoder_BTJ = 3 * torch.randn(len(LENGTHS), FRAMES, 16, generator=torch.Generator().manual_seed(1))
    search = GreedySearch(scorer)
    states = search.step(encoder_BTJ, LENGTHS, [search.start() for _ in LENGTHS])
    count = 0
    for encoder_TJ, length, state in zip(encoder_BTJ, LENGTHS, states, strict=True):
        tokens, frames = frame_by_frame(scorer, encoder_TJ[:length])
        assert state == GreedyState(tuple(tokens), tuple(frames), length)
        count += len(tokens)
    rate = count / sum(LENGTHS)
    assert (rate == 0) if blank_bias == 1e9 else rate > 0.02
    assert rate > 0.7 if blank_bias < 0 else True


@torch.inference_mode()
def test_chunk_by_chunk_and_one_by_one() -> None:
    scorer = make_scorer(8.0)
    search = GreedySearch(scorer)
    encoder_BTJ = 3 * torch.randn(3, FRAMES, 16, generator=torch.Generator().manual_seed(2))
    whole = search.step(encoder_BTJ, [FRAMES] * 3, [search.start() for _ in range(3)])
    states = [search.start() for _ in range(3)]
    for start in range(0, FRAMES, 7):
        piece_BTJ = encoder_BTJ[:, start : start + 7]
        states = search.step(piece_BTJ, [piece_BTJ.shape[1]] * 3, states)
    assert states == whole and sum(len(state.tokens) for state in whole) > 10
    for b in range(3):
        assert search.step(encoder_BTJ[b : b + 1], [FRAMES], [search.start()]) == whole[b : b + 1]
