"""Assigns the talks of CSJ to sets: the evaluation sets of the corpus, lhotse's validation set, and training.

The ids come from `lhotse.recipes.csj`. Dialogues, whose ids begin with D, have one wav for each of two speakers.
"""

from lhotse.recipes import csj

SETS: dict[str, list[str]] = {
    "dev": csj._VALID,
    **{f"test-eval{number}": talks for number, talks in enumerate(csj._EVAL, start=1)},
    # These talks are neither trained nor tested on, since their speaker speaks in eval2.
    "excluded": csj._A01M0056,
}
_SET_OF = {talk: name for name, talks in SETS.items() for talk in talks}


def set_of(talk: str) -> str:
    """Returns the set of a talk: train, dev, test-eval1, test-eval2, test-eval3 or excluded."""
    return _SET_OF.get(talk, "train")


def channels_of(talk: str) -> list[str]:
    """Returns what the names of a talk's wavs add to its id: -L and -R for a dialogue, nothing for others."""
    return ["-L", "-R"] if talk.startswith("D") else [""]
