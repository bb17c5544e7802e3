"""Searches over a transducer's output, and the recognisers that are built on them."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from ssm_asr.search.beam import BeamSearch
from ssm_asr.search.greedy import GreedySearch
from ssm_asr.search.scorer import Scorer


class Search(Protocol):
    """What every search offers.

    The state of a stream is opaque to its users, small, and never changed in place.

    Shapes: B streams, T output frames, J joiner dim.
    """

    def start(self) -> Any:
        """Returns the state of a new stream."""

    def step(self, encoder_BTJ: Tensor, lens: list[int], states: list[Any]) -> list[Any]:
        """Searches the first `lens[b]` frames of each stream's projected encoder output, and returns the new states."""

    def tokens(self, state: Any) -> tuple[int, ...]:
        """Returns the ids of the tokens found so far."""

    def emitted_frames(self, state: Any) -> tuple[int, ...]:
        """Returns the output frame (40 ms) in which each of `tokens` was emitted, counted from the stream's start."""

    def settled(self, state: Any) -> int:
        """Returns how many of the first `tokens` no later audio can change."""


# Name in the configuration (decode.method, whose choices these are) -> what makes the search, given the beam.
SEARCHES: dict[str, Callable[[Scorer, int], Search]] = {
    "greedy": lambda scorer, beam: GreedySearch(scorer),
    "beam": BeamSearch,
}


def make_search(method: str, scorer: Scorer, beam: int = 4) -> Search:
    """Makes the search that a method names.

    Args:
        beam: the number of hypotheses that beam search keeps.

    Raises:
        ValueError: if the method has another name, or the beam is below 1.
    """
    if method not in SEARCHES:
        raise ValueError(f"search method {method!r}: give {' or '.join(SEARCHES)}")
    return SEARCHES[method](scorer, beam)
