"""Which talks of CSJ belong to which set: the evaluation sets of the corpus, and lhotse's validation set.

The ids are those of `lhotse.recipes.csj`. Dialogues, whose ids begin with D, have one wav for each of two speakers.
"""

from lhotse.recipes import csj

SETS: dict[str, list[str]] = {
    "dev": csj._VALID,
    **{f"test-eval{number}": talks for number, talks in enumerate(csj._EVAL, start=1)},
    # Of the speaker of a talk in eval2: neither trained nor tested on.
    "excluded": csj._A01M0056,
}
_SET_OF = {talk: name for name, talks in SETS.items() for talk in talks}


def set_of(talk: str) -> str:
    """The set of a talk: train, dev, test-eval1, test-eval2, test-eval3 or excluded."""
    return _SET_OF.get(talk, "train")


def channels_of(talk: str) -> list[str]:
    """What the names of a talk's wavs add to its id: -L and -R for a dialogue, else nothing."""
    return ["-L", "-R"] if talk.startswith("D") else [""]
