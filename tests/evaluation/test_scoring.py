"""Error counts by hand, and the statistics of the intervals."""

import itertools
import re

import kaldialign
import numpy as np
import pytest

from ssm_asr.evaluation.scoring import (
    align_text,
    all_said,
    bootstrap_interval,
    fluent_errors,
    only_meant,
    paired_bootstrap,
    score,
    split_units,
)

REFS = {"u1": "the cat sat on the mat", "u2": "one two three", "u3": "yes", "u4": ""}
HYPS = {"u1": "the bat sat the mat", "u2": "one two and three", "u4": "oh"}


def test_word_errors_by_hand() -> None:
    s = score(REFS, HYPS)
    assert (s.substitutions, s.deletions, s.insertions) == (
        1,
        1 + 1,
        1 + 1,
    )  # u3 is missing, u4 is all inserted
    assert (s.errors, s.total, s.rate) == (5, 10, 0.5)
    assert s.ids == ("u1", "u2", "u3", "u4")
    assert s.errors_U.tolist() == [2, 1, 1, 1]
    assert s.totals_U.tolist() == [6, 3, 1, 0]
    assert s.missing == ("u3",)


def test_perfect() -> None:
    s = score(REFS, REFS)
    assert (s.errors, s.rate, s.missing) == (0, 0.0, ())
    assert bootstrap_interval(s.errors_U, s.totals_U) == (0.0, 0.0)


def test_characters_ignore_spaces() -> None:
    s = score({"a": "日本 語です", "b": "ab c"}, {"a": "日 木語で", "b": "a bcd"}, unit="char")
    assert (s.substitutions, s.deletions, s.insertions, s.total) == (1, 1, 1, 8)
    assert s.errors_U.tolist() == [2, 1]


def test_errors() -> None:
    with pytest.raises(ValueError, match="2 hypotheses without a reference, such as x"):
        score({"a": "b"}, {"a": "b", "y": "", "x": ""})
    with pytest.raises(ValueError, match="hold no word"):
        score({"a": " "}, {})
    with pytest.raises(ValueError, match="unit 'phone'"):
        score({"a": "b"}, {}, unit="phone")


def test_align_text() -> None:
    assert align_text(REFS["u1"], HYPS["u1"]) == "the [cat->bat] sat [-on] the mat"
    assert align_text("one two three", "one two and three") == "one two [+and] three"
    assert align_text("", "") == ""
    assert align_text("日本 語", "日木", unit="char") == "日[本->木][-語]"


def test_texts_of_marked_disfluencies() -> None:
    marked = "(えー)京都で(しゃ)写真を"
    assert (all_said(marked), only_meant(marked)) == ("えー京都でしゃ写真を", "京都で写真を")


def test_disfluencies_count_for_nothing() -> None:
    ref = "(えー)京都(しゃ)写真"
    for hyp, errors in (
        ("京都写真", 0),
        ("えー京都しゃ写真", 0),
        ("ー京都し写真", 0),  # each character by itself
        ("えー京都しゃ写", 1),
        ("京都えー写真", 2),  # not where it was said
        ("まー京都写真", 1),  # ま is in excess, ー was said
        ("", 4),
    ):
        errors_U, totals_U = fluent_errors({"a": ref}, {"a": hyp})
        assert (errors_U.tolist(), totals_U.tolist()) == ([errors], [4]), hyp


def test_fluent_errors_of_a_set() -> None:
    """In the order of the references; one without a hypothesis is deleted, one without meant words can have errors."""
    errors_U, totals_U = fluent_errors({"b": "(えー)", "a": "京 都", "c": "猫"}, {"a": "東京", "b": "あー"})
    assert (errors_U.tolist(), totals_U.tolist()) == ([1, 2, 1], [0, 2, 1])


def test_fluent_errors_are_the_least_over_all_deletions() -> None:
    """Against brute force: the edit distance from every text that keeps some of the characters in parentheses."""
    rng = np.random.default_rng(1)
    for _ in range(300):
        pieces = ["".join(rng.choice(list("abc"), rng.integers(0, 4))) for _ in range(4)]
        marked = f"{pieces[0]}({pieces[1]}){pieces[2]}({pieces[3]})"
        hyp = "".join(rng.choice(list("abc"), rng.integers(0, 9)))
        choices = [[char, ""] if deletable else [char] for char, deletable in _characters(marked)]
        texts = {"".join(kept) for kept in itertools.product(*choices)}
        least = min(kaldialign.edit_distance(list(text), list(hyp))["total"] for text in texts)
        assert fluent_errors({"a": marked}, {"a": hyp})[0].tolist() == [least], (marked, hyp)


def _characters(marked: str) -> list[tuple[str, bool]]:
    """Characters, and whether they are in parentheses."""
    parts = re.findall(r"\(([^)]*)\)|([^(]+)", marked)
    return [(char, not meant) for said, meant in parts for char in split_units(said or meant, "char")]


def draw_corpus(rng: np.random.Generator, rate: float, utterances: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Errors and lengths of utterances whose own error rates vary around `rate`, speaker by speaker."""
    totals_U = rng.integers(5, 30, utterances)
    rates_U = rate * rng.gamma(2.0, 0.5, utterances)
    return rng.binomial(totals_U, np.minimum(rates_U, 1.0)), totals_U


def test_interval_covers_the_truth() -> None:
    """About 95 % of the intervals of independent corpora hold the true rate: 300 draws, 92 % to 98 %."""
    rng = np.random.default_rng(1)
    covered = 0
    for i in range(300):
        low, high = bootstrap_interval(*draw_corpus(rng, 0.1), resamples=500, seed=i)
        covered += low <= 0.1 <= high
    assert 0.92 * 300 <= covered <= 0.98 * 300


def test_interval_matches_the_normal_one() -> None:
    """For many utterances of one length, the interval is that of a mean."""
    errors_U = np.random.default_rng(0).binomial(20, 0.1, 3000)
    totals_U = np.full(3000, 20)
    low, high = bootstrap_interval(errors_U, totals_U)
    half = 1.96 * errors_U.std() / 20 / np.sqrt(3000)
    mean = errors_U.sum() / totals_U.sum()
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.05 * half)


def test_interval_is_seeded_and_single_utterance_has_none() -> None:
    errors_U, totals_U = draw_corpus(np.random.default_rng(0), 0.1)
    assert bootstrap_interval(errors_U, totals_U, seed=3) == bootstrap_interval(errors_U, totals_U, seed=3)
    assert bootstrap_interval(errors_U, totals_U, seed=3) != bootstrap_interval(errors_U, totals_U, seed=4)
    assert np.isnan(bootstrap_interval(errors_U[:1], totals_U[:1])).all()


def test_paired_bootstrap_finds_a_small_but_steady_difference() -> None:
    """b corrects one error in 30 utterances: far less than either interval is wide, yet sure."""
    errors_a_U, totals_U = draw_corpus(np.random.default_rng(0), 0.2)
    errors_b_U = errors_a_U.copy()
    errors_b_U[np.flatnonzero(errors_a_U)[:30]] -= 1
    difference, (low, high), p_value = paired_bootstrap(errors_a_U, errors_b_U, totals_U)
    assert difference == pytest.approx(-30 / totals_U.sum())
    assert low < difference < high < 0
    assert p_value < 0.001
    a_low, a_high = bootstrap_interval(errors_a_U, totals_U)
    assert a_high - a_low > -difference


def test_paired_bootstrap_p_value_is_uniform_without_a_difference() -> None:
    rng = np.random.default_rng(2)
    p_values = []
    for i in range(300):
        errors_a_U, totals_U = draw_corpus(rng, 0.2)
        swap_U = rng.random(len(totals_U)) < 0.5
        other_U = rng.permutation(errors_a_U)
        a_U, b_U = np.where(swap_U, other_U, errors_a_U), np.where(swap_U, errors_a_U, other_U)
        p_values.append(paired_bootstrap(a_U, b_U, totals_U, resamples=500, seed=i)[2])
    assert 0.02 < np.mean(np.array(p_values) < 0.05) < 0.08
    assert 0.42 < np.mean(np.array(p_values) < 0.5) < 0.58


def test_paired_bootstrap_of_equal_systems() -> None:
    errors_U, totals_U = draw_corpus(np.random.default_rng(0), 0.2)
    assert paired_bootstrap(errors_U, errors_U, totals_U) == (0.0, (0.0, 0.0), 1.0)
