"""Search over a transducer's output."""

from typing import Any, Protocol

from torch import Tensor

from ssm_asr.search.beam import BeamSearch
from ssm_asr.search.greedy import GreedySearch
from ssm_asr.search.scorer import Scorer


class Search(Protocol):
    """What all searches share. A stream's state is opaque, small, and never changed in place."""

    def start(self) -> Any:
        """The state of a new stream."""

    def step(self, encoder_BTJ: Tensor, lens: list[int], states: list[Any]) -> list[Any]:
        """New states after each stream's first `lens` frames of projected encoder output."""

    def tokens(self, state: Any) -> tuple[int, ...]:
        """The tokens found so far."""


def make_search(method: str, scorer: Scorer, beam: int = 4) -> Search:
    """The search of a name: greedy or beam.

    Raises:
        ValueError: for any other name.
    """
    if method == "greedy":
        return GreedySearch(scorer)
    if method == "beam":
        return BeamSearch(scorer, beam)
    raise ValueError(f"search method {method!r}: give greedy or beam")
