"""Compares greedy and beam search with brute force on random logits.

Shapes: B streams, T output frames, J joiner channels, V vocabulary, N hypotheses, C context size.
"""

import itertools
import math

import pytest
import torch
import toy
from torch import Tensor

from ssm_asr.config import ConfigError, from_dict
from ssm_asr.search import SEARCHES, greedy, make_search
from ssm_asr.search.scorer import TransducerScorer, context_of
from ssm_asr.transducer.model import Transducer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB, JOINER_DIM = 6, 5
BLANK, UNK = 0, 2


class RandomScorer:
    """A scorer with a random predictor and joiner; `asked` records the contexts that it was called with."""

    blank_id, unk_id = BLANK, UNK

    def __init__(
        self,
        context_size: int = 2,
        seed: int = 0,
        sharpness: float = 3.0,
        blank_bias: float = 0.0,
        unk_bias: float = 0.0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.context_size = context_size
        self.embedding_CVJ = torch.randn(context_size, VOCAB + 1, JOINER_DIM, generator=generator)
        self.output_JV = sharpness * torch.randn(JOINER_DIM, VOCAB, generator=generator)
        self.bias_V = torch.zeros(VOCAB)
        self.bias_V[BLANK], self.bias_V[UNK] = blank_bias, unk_bias
        self.asked: list[list[int]] = []

    def to(self, device: str) -> "RandomScorer":
        """Moves the tensors to a device."""
        self.embedding_CVJ, self.output_JV = self.embedding_CVJ.to(device), self.output_JV.to(device)
        self.bias_V = self.bias_V.to(device)
        return self

    def predict(self, tokens_NC: Tensor) -> Tensor:
        self.asked += tokens_NC.tolist()
        rows = [self.embedding_CVJ[c, tokens_NC[:, c] + 1] for c in range(self.context_size)]
        return torch.stack(rows).sum(dim=0)

    def join(self, encoder_NJ: Tensor, decoder_NJ: Tensor) -> Tensor:
        return torch.tanh(encoder_NJ + decoder_NJ) @ self.output_JV + self.bias_V

    def log_probs_V(self, encoder_J: Tensor, tokens: tuple[int, ...]) -> list[float]:
        """Computes the log-probabilities of the next symbol after these tokens, independently of the searches."""
        context = ([-1] * (self.context_size - 1) + [BLANK] + list(tokens))[-self.context_size :]
        decoder_J = sum(self.embedding_CVJ[c, token + 1] for c, token in enumerate(context))
        return (torch.tanh(encoder_J + decoder_J) @ self.output_JV + self.bias_V).double().log_softmax(-1).tolist()


def encoder_out(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, JOINER_DIM, generator=torch.Generator().manual_seed(seed))


def emits(symbol: int) -> tuple[int, ...]:
    """Returns the tokens that a symbol puts out: none for blank and unknown."""
    return () if symbol in (BLANK, UNK) else (symbol,)


def brute_force_greedy(scorer: RandomScorer, encoder_TJ: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Takes the best symbol of each frame; returns the tokens and the frames at which they are emitted."""
    tokens: tuple[int, ...] = ()
    frames: tuple[int, ...] = ()
    for t, encoder_J in enumerate(encoder_TJ):
        log_probs = scorer.log_probs_V(encoder_J, tokens)
        new = emits(log_probs.index(max(log_probs)))
        tokens, frames = tokens + new, frames + (t,) * len(new)
    return tokens, frames


def all_sequences(scorer: RandomScorer, encoder_TJ: Tensor) -> dict[tuple[int, ...], float]:
    """Returns the log-probability of every token sequence, summed over alignments with at most one symbol per frame."""
    total: dict[tuple[int, ...], float] = {}
    for symbols in itertools.product(range(VOCAB), repeat=len(encoder_TJ)):
        tokens: tuple[int, ...] = ()
        log_prob = 0.0
        for encoder_J, symbol in zip(encoder_TJ, symbols, strict=True):
            log_prob += scorer.log_probs_V(encoder_J, tokens)[symbol]
            tokens += emits(symbol)
        total[tokens] = total.get(tokens, 0.0) + math.exp(log_prob)
    return {tokens: math.log(probability) for tokens, probability in total.items()}


@pytest.mark.parametrize("context_size", [1, 2, 3])
def test_greedy_is_the_best_symbol_of_each_frame(context_size: int) -> None:
    emitted = 0
    for seed in range(10):
        scorer = RandomScorer(context_size, seed)
        search = make_search("greedy", scorer)
        encoder_BTJ = encoder_out(1, 30, seed=seed + 100)
        (state,) = search.step(encoder_BTJ, [30], [search.start()])
        assert (search.tokens(state), state.emitted_frames) == brute_force_greedy(scorer, encoder_BTJ[0])
        emitted += len(state.tokens)
    assert 50 < emitted < 250  # of 300 frames, so that blanks and symbols are tested


@pytest.mark.parametrize("steps", [1, 16])
@pytest.mark.parametrize(("blank_bias", "least", "most"), [(-100, 1, 1), (0, 0.5, 0.99), (10, 0.05, 0.5), (100, 0, 0)])
def test_greedy_steps_over_blanks_of_any_number(
    monkeypatch: pytest.MonkeyPatch, blank_bias: float, least: float, most: float, steps: int
) -> None:
    """From no blank to nothing but blanks, for lengths around those of blocks and for streams that end early."""
    monkeypatch.setitem(greedy.STEPS_BETWEEN_QUESTIONS, DEVICE, steps)
    lens = [0, 1, 7, 8, 9, 16, 17, 61, 0, 40]
    count = 0
    for seed in range(3):
        scorer = RandomScorer(seed=seed, blank_bias=blank_bias, unk_bias=-100.0)
        search = make_search("greedy", scorer.to(DEVICE))
        encoder_BTJ = encoder_out(len(lens), 61, seed=seed)
        states = search.step(encoder_BTJ.to(DEVICE), lens, [search.start() for _ in lens])
        scorer.to("cpu")
        expected = [brute_force_greedy(scorer, row[:length]) for row, length in zip(encoder_BTJ, lens, strict=True)]
        assert [(search.tokens(state), search.emitted_frames(state)) for state in states] == expected
        assert [state.frames for state in states] == lens
        count += sum(len(tokens) for tokens, _ in expected)
    assert least <= count / (3 * sum(lens)) <= most


def test_greedy_looks_at_few_blocks() -> None:
    """The number of steps goes with the tokens, not with the frames."""
    scorer = RandomScorer(blank_bias=100.0)
    search = make_search("greedy", scorer)
    search.step(encoder_out(1, 800), [800], [search.start()])
    assert len(scorer.asked) == 800 // greedy.BLOCK_FRAMES


@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_finds_the_sum_over_all_alignments(seed: int) -> None:
    scorer = RandomScorer(seed=seed, sharpness=1.0)
    encoder_BTJ = encoder_out(1, 4, seed=seed)
    expected = all_sequences(scorer, encoder_BTJ[0])
    assert sum(map(math.exp, expected.values())) == pytest.approx(1.0)
    search = make_search("beam", scorer, beam=VOCAB**4)
    (state,) = search.step(encoder_BTJ, [4], [search.start()])
    found = {hypothesis.tokens: hypothesis.log_prob for hypothesis in state.hypotheses}
    assert found.keys() == expected.keys()
    for tokens, log_prob in expected.items():
        assert found[tokens] == pytest.approx(log_prob, abs=1e-5)
    best = max(expected, key=lambda tokens: expected[tokens] / (len(tokens) + scorer.context_size))
    assert search.tokens(state) == best


def frames_of_the_more_probable(scorer: RandomScorer, encoder_TJ: Tensor) -> dict[tuple[int, ...], tuple[int, ...]]:
    """For every token sequence, its emission frames if nothing is pruned: of merging hypotheses, the likelier's."""
    found: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {(): (1.0, ())}
    for t, encoder_J in enumerate(encoder_TJ):
        ways: dict[tuple[int, ...], list[tuple[float, tuple[int, ...]]]] = {}
        for tokens, (probability, frames) in found.items():
            for symbol, log_prob in enumerate(scorer.log_probs_V(encoder_J, tokens)):
                way = probability * math.exp(log_prob), frames + (t,) * len(emits(symbol))
                ways.setdefault(tokens + emits(symbol), []).append(way)
        found = {tokens: (sum(p for p, _ in those), max(those)[1]) for tokens, those in ways.items()}
    return {tokens: frames for tokens, (_, frames) in found.items()}


@pytest.mark.parametrize("seed", range(3))
def test_emission_frames_are_those_of_the_more_probable_hypothesis(seed: int) -> None:
    scorer = RandomScorer(seed=seed, sharpness=1.0)
    encoder_BTJ = encoder_out(1, 4, seed=seed)
    search = make_search("beam", scorer, beam=VOCAB**4)
    (state,) = search.step(encoder_BTJ, [4], [search.start()])
    expected = frames_of_the_more_probable(scorer, encoder_BTJ[0])
    assert {hypothesis.tokens: hypothesis.emitted_frames for hypothesis in state.hypotheses} == expected
    assert search.emitted_frames(state) == expected[search.tokens(state)]
    assert len({frames for tokens, frames in expected.items() if len(tokens) == 2}) > 2  # not all are alike


def test_a_beam_of_one_emits_where_greedy_search_does() -> None:
    scorer = RandomScorer()
    encoder_BTJ = encoder_out(1, 30)
    (greedy,), (beam,) = (
        search.step(encoder_BTJ, [30], [search.start()])
        for search in (make_search("greedy", scorer), make_search("beam", scorer, 1))
    )
    assert beam.hypotheses[0].emitted_frames == greedy.emitted_frames and len(greedy.emitted_frames) > 3


def test_a_wider_beam_is_no_worse() -> None:
    """A beam of 1 equals greedy search; wider beams come closer to the best sequence, and the widest finds it."""
    gaps = {beam: 0.0 for beam in (1, 2, 4, 64, 1296)}
    for seed in range(10):
        scorer = RandomScorer(seed=seed, sharpness=1.0)
        encoder_BTJ = encoder_out(1, 4, seed=seed)
        expected = all_sequences(scorer, encoder_BTJ[0])
        score = {tokens: log_prob / (len(tokens) + scorer.context_size) for tokens, log_prob in expected.items()}
        for beam in gaps:
            search = make_search("beam", scorer, beam)
            (state,) = search.step(encoder_BTJ, [4], [search.start()])
            assert len(state.hypotheses) <= beam
            if beam == 1:
                assert search.tokens(state) == brute_force_greedy(scorer, encoder_BTJ[0])[0]
            gaps[beam] += max(score.values()) - score[search.tokens(state)]
    assert gaps[1296] == 0.0
    assert gaps[1] > gaps[4] > 0.0 and gaps[64] <= gaps[4]


@pytest.mark.parametrize("method", ["greedy", "beam"])
class TestBothSearches:
    def test_batched_equals_single(self, method: str) -> None:
        scorer = RandomScorer()
        search = make_search(method, scorer)
        encoder_BTJ, lens = encoder_out(5, 20), [20, 0, 13, 20, 1]
        states = search.step(encoder_BTJ, lens, [search.start() for _ in lens])
        for b, length in enumerate(lens):
            (alone,) = search.step(encoder_BTJ[b : b + 1], [length], [search.start()])
            assert search.tokens(states[b]) == search.tokens(alone)
            assert search.emitted_frames(states[b]) == search.emitted_frames(alone)
        assert search.tokens(states[1]) == ()

    def test_chunked_equals_whole(self, method: str) -> None:
        scorer = RandomScorer()
        search = make_search(method, scorer)
        encoder_BTJ, lens = encoder_out(2, 24), [24, 17]
        whole = search.step(encoder_BTJ, lens, [search.start(), search.start()])
        states = [search.start(), search.start()]
        for start in range(0, 24, 5):
            part = [max(0, min(5, length - start)) for length in lens]
            before = list(states)
            copies = [repr(state) for state in states]
            states = search.step(encoder_BTJ[:, start : start + 5], part, states)
            assert [repr(state) for state in before] == copies  # states are never changed in place
        assert [search.tokens(state) for state in states] == [search.tokens(state) for state in whole]
        assert len(search.tokens(whole[0])) > 3
        for state, other in zip(states, whole, strict=True):
            assert search.emitted_frames(state) == search.emitted_frames(other)
            assert len(search.emitted_frames(state)) == len(search.tokens(state)) and state.frames == other.frames

    def test_what_is_settled_stays(self, method: str) -> None:
        unsettled = 0
        for seed in range(5):
            search = make_search(method, RandomScorer(seed=seed))
            encoder_BTJ, state, settled = encoder_out(1, 40, seed=seed), search.start(), ()
            for t in range(40):
                (state,) = search.step(encoder_BTJ[:, t : t + 1], [1], [state])
                tokens = search.tokens(state)
                assert tokens[: len(settled)] == settled and search.settled(state) >= len(settled)
                settled = tokens[: search.settled(state)]
                unsettled += len(tokens) > len(settled)
            assert len(settled) > 3
        assert (unsettled > 0) == (method == "beam")

    def test_blank_and_unk_emit_nothing(self, method: str) -> None:
        for symbol in (BLANK, UNK, 4):
            scorer = RandomScorer()
            scorer.join = lambda encoder_NJ, decoder_NJ, symbol=symbol: (
                20.0 * torch.nn.functional.one_hot(torch.full((len(encoder_NJ),), symbol), VOCAB).float()
            )
            search = make_search(method, scorer)
            (state,) = search.step(encoder_out(1, 3), [3], [search.start()])
            assert search.tokens(state) == (() if symbol != 4 else (4, 4, 4))

    @pytest.mark.parametrize(("context_size", "start"), [(1, [0]), (2, [-1, 0]), (3, [-1, -1, 0])])
    def test_the_context_at_the_start(self, method: str, context_size: int, start: list[int]) -> None:
        scorer = RandomScorer(context_size)
        search = make_search(method, scorer)
        search.step(encoder_out(1, 20), [20], [search.start()])
        assert scorer.asked[0] == start
        assert all(UNK not in context for context in scorer.asked)
        # In a context, blank stands only for the start, before all tokens.
        assert all(BLANK not in context[1:] or context == start for context in scorer.asked if context[0] > 0)


def test_contexts() -> None:
    scorer = RandomScorer(2)
    assert [context_of(tokens, scorer) for tokens in ((), (5,), (5, 4), (5, 4, 3))] == [[-1, 0], [0, 5], [5, 4], [4, 3]]


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="search method 'best': give greedy or beam"):
        make_search("best", RandomScorer())
    with pytest.raises(ValueError, match="beam of 0: give a positive number"):
        make_search("beam", RandomScorer(), 0)


def test_the_scorer_of_a_model_predicts_as_training_does() -> None:
    torch.manual_seed(0)
    model = Transducer(toy.experiment().model, VOCAB).eval()
    scorer = TransducerScorer(model, UNK)
    tokens = [5, 3, 4, 4]
    with torch.no_grad():
        trained_UJ = model.joiner.decoder_proj(model.decoder(torch.tensor([[0, *tokens]])))[0]
        contexts = [context_of(tokens[:n], scorer) for n in range(len(tokens) + 1)]
        torch.testing.assert_close(scorer.predict(torch.tensor(contexts)), trained_UJ)
        encoder_BTD = torch.randn(1, 5, 32)
        expected = model.joiner(encoder_BTD[0], model.decoder(torch.tensor([[0, *tokens]]))[0])
        torch.testing.assert_close(scorer.join(scorer.project(encoder_BTD)[0], trained_UJ), expected)


def test_configurations_know_every_search() -> None:
    with pytest.raises(ConfigError, match="decode.method is 'none'; give one of " + ", ".join(SEARCHES)):
        from_dict({"decode": {"method": "none"}})
    for method in SEARCHES:
        assert from_dict({"decode": {"method": method}}).decode.method == method
