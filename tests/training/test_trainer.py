"""The order in which the loop fetches batches."""

from collections.abc import Iterator

from ssm_asr.training.trainer import _FetchedAhead


def test_every_batch_is_fetched_once_and_at_most_one_ahead() -> None:
    events: list[str] = []

    def load() -> Iterator[str]:
        for name in ("a", "b", "c"):
            events.append(f"load {name}")
            yield name

    batches = _FetchedAhead(load())
    for name in batches:
        events.append(f"begin {name}")
        if name != "b":  # After "b" nothing is fetched ahead; the next batch comes nevertheless.
            batches.fetch_next()
            batches.fetch_next()
        events.append(f"end {name}")
    a_and_b = ["load a", "begin a", "load b", "end a", "begin b", "end b"]
    assert events == [*a_and_b, "load c", "begin c", "end c"]
    assert list(batches) == []
