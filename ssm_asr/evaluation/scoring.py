"""Error rates of recognised text, with counts, confidence intervals, significance and readable alignments.

Shapes: U utterances, H characters of a hypothesis.
"""

import re
from dataclasses import dataclass

import kaldialign
import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Score:
    """The errors of a set of utterances, in words or characters.

    Attributes:
        unit: word or char.
        ids: the utterances.
        errors_U, totals_U: errors and reference length of each utterance, in the order of ids.
        insertions, deletions, substitutions: the errors of all utterances, by kind.
        missing: the utterances without a hypothesis, of which every unit counts as deleted.
    """

    unit: str
    ids: tuple[str, ...]
    errors_U: Counts
    totals_U: Counts
    insertions: int
    deletions: int
    substitutions: int
    missing: tuple[str, ...]

    @property
    def errors(self) -> int:
        """The number of errors of all utterances."""
        return self.insertions + self.deletions + self.substitutions

    @property
    def total(self) -> int:
        """The length of all references."""
        return int(self.totals_U.sum())

    @property
    def rate(self) -> float:
        """The errors relative to the length of the references: 0.05 is 5 %."""
        return self.errors / self.total


def split_units(text: str, unit: str) -> list[str]:
    """Splits a text into its words, or into its characters without the spaces.

    Raises:
        ValueError: if unit is neither "word" nor "char".
    """
    words = text.split()
    if unit == "word":
        return words
    if unit == "char":
        return list("".join(words))
    raise ValueError(f"unit {unit!r}: give word or char")


def score(refs: dict[str, str], hyps: dict[str, str], unit: str = "word") -> Score:
    """Counts the errors of hypotheses by their edit distance from the references.

    Args:
        refs: utterance id -> reference text.
        hyps: utterance id -> recognised text; an absent one counts as deletions and is listed as missing.
        unit: "word" for a word error rate, "char" for a character error rate, which ignores spaces.

    Raises:
        ValueError: if a hypothesis has no reference, or the references are empty.
    """
    unknown = sorted(hyps.keys() - refs.keys())
    if unknown:
        raise ValueError(f"{len(unknown)} hypotheses without a reference, such as {unknown[0]}: check the ids")
    counts = [
        kaldialign.edit_distance(split_units(r, unit), split_units(hyps.get(i, ""), unit)) for i, r in refs.items()
    ]
    totals_U = np.array([c["ref_len"] for c in counts], dtype=np.int64)
    if not totals_U.any():
        raise ValueError(f"the {len(refs)} references hold no {unit}: there is no error rate")
    return Score(
        unit=unit,
        ids=tuple(refs),
        errors_U=np.array([c["total"] for c in counts], dtype=np.int64),
        totals_U=totals_U,
        insertions=sum(int(c["ins"]) for c in counts),
        deletions=sum(int(c["del"]) for c in counts),
        substitutions=sum(int(c["sub"]) for c in counts),
        missing=tuple(i for i in refs if i not in hyps),
    )


def all_said(marked: str) -> str:
    """Returns a text with the disfluencies that it has in parentheses: "uh yes" for "(uh) yes"."""
    return re.sub("[()]", "", marked)


def only_meant(marked: str) -> str:
    """Returns a text without the disfluencies that it has in parentheses: " yes" for "(uh) yes"."""
    return re.sub(r"\([^()]*\)", "", marked)


def fluent_errors(marked_refs: dict[str, str], hyps: dict[str, str]) -> tuple[Counts, Counts]:
    """Counts errors in characters, where a hypothesis may hold the disfluencies or leave them out.

    Characters of a reference that are in parentheses are optionally deletable, as in NIST's sclite: a hypothesis is
    right with them and without them. They do not count for the length of the reference.

    Args:
        marked_refs: utterance id -> reference with its disfluencies in parentheses, "(えー)京都で(しゃ)写真を".
        hyps: utterance id -> recognised text; a missing one counts as empty.

    Returns:
        errors_U and totals_U, in the order of the references.
    """
    counts = [_fluent_errors(ref, hyps.get(i, "")) for i, ref in marked_refs.items()]
    totals = [len(split_units(only_meant(ref), "char")) for ref in marked_refs.values()]
    return np.array(counts, dtype=np.int64), np.array(totals, dtype=np.int64)


def _fluent_errors(marked: str, hyp: str) -> int:
    """The edit distance in which the deletion of characters within parentheses is no error."""
    hyp_H = np.array(split_units(hyp, "char"), dtype=str)
    columns = np.arange(len(hyp_H) + 1)
    costs = columns.copy()  # of every prefix of the hypothesis, against the prefix of the reference seen so far
    deletion = 1
    for char in split_units(marked, "char"):
        if char in "()":
            deletion = int(char == ")")
            continue
        best = costs + deletion
        best[1:] = np.minimum(best[1:], costs[:-1] + (hyp_H != char))
        costs = np.minimum.accumulate(best - columns) + columns  # and insertions after that
    return int(costs[-1])


def _resampled_rates(errors_U: Counts, totals_U: Counts, resamples: int, seed: int) -> NDArray[np.float64]:
    """Error rates of `resamples` sets of U utterances drawn with replacement; sets without a word are left out."""
    rng = np.random.default_rng(seed)
    block = max(1, 4_000_000 // len(errors_U))  # sets drawn at a time, to bound the memory to some 100 MB
    rates = []
    for start in range(0, resamples, block):
        drawn_BU = rng.integers(len(errors_U), size=(min(block, resamples - start), len(errors_U)))
        totals_B = totals_U[drawn_BU].sum(axis=1)
        rates.append(errors_U[drawn_BU].sum(axis=1)[totals_B > 0] / totals_B[totals_B > 0])
    return np.concatenate(rates)


def bootstrap_interval(
    errors_U: Counts, totals_U: Counts, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Computes the confidence interval of an error rate, by drawing utterances with replacement.

    This is the percentile bootstrap of Bisani and Ney (ICASSP 2004): utterances, not words, are drawn independently.

    Args:
        errors_U: the errors of each utterance.
        totals_U: the reference length of each utterance.
        confidence: the probability that the interval covers.
        resamples: the number of sets drawn.
        seed: seeds the draws.

    Returns:
        The lower and upper bound of the rate; NaN for fewer than two utterances, which say nothing about the spread.
    """
    if len(errors_U) < 2:
        return float("nan"), float("nan")
    rates = _resampled_rates(errors_U, totals_U, resamples, seed)
    low, high = np.quantile(rates, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_bootstrap(
    errors_a_U: Counts, errors_b_U: Counts, totals_U: Counts, resamples: int = 10_000, seed: int = 0
) -> tuple[float, tuple[float, float], float]:
    """Tests whether two systems, a and b, differ on a set of utterances.

    Both systems are scored on each drawn set (Bisani and Ney, ICASSP 2004), so that what is hard for both cancels.

    Args:
        errors_a_U, errors_b_U: the errors of each utterance of the two systems.
        totals_U: the reference length of each utterance.
        resamples: the number of sets drawn.
        seed: seeds the draws.

    Returns:
        The error rate of b minus the error rate of a; its 95 % interval; the two-sided p-value of no difference, at
        least 2 / (resamples + 1). Interval and p-value are NaN for fewer than two utterances.
    """
    differences_U = errors_b_U - errors_a_U
    difference = float(differences_U.sum() / totals_U.sum())
    if len(totals_U) < 2:
        return difference, (float("nan"), float("nan")), float("nan")
    drawn = _resampled_rates(differences_U, totals_U, resamples, seed)
    low, high = np.quantile(drawn, [0.025, 0.975])
    tail = min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0))
    p_value = min(1.0, 2 * (tail + 1) / (len(drawn) + 1))
    return difference, (float(low), float(high)), p_value


def align_text(ref: str, hyp: str, unit: str = "word") -> str:
    """Shows in one line where a hypothesis departs from its reference.

    A substitution is [right->wrong], a deletion [-word], an insertion [+word].
    """
    gap = ""  # splitting never yields it, so it cannot be mistaken for a word
    marked = []
    for right, said in kaldialign.align(split_units(ref, unit), split_units(hyp, unit), gap):
        if right == said:
            marked.append(right)
        elif said == gap:
            marked.append(f"[-{right}]")
        elif right == gap:
            marked.append(f"[+{said}]")
        else:
            marked.append(f"[{right}->{said}]")
    return (" " if unit == "word" else "").join(marked)
