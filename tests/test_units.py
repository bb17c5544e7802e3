"""Times as users write them, and the frames that they are."""

import pytest

from ssm_asr import units


@pytest.mark.parametrize(
    ("written", "frames"),
    [
        *(("320ms", 16), ("0.32s", 16), ("16", 16), (16, 16), ("1.28s", 64), ("1.28 s", 64), (".02s", 1)),
        *(("20.0ms", 1), ("5.s", 250), ("0", 0), ("0ms", 0), ("-1", -1), (-1, -1), ("999999999s", 49999999950)),
    ],
)
def test_times(written: str | int, frames: int) -> None:
    assert units.parse_frames(written) == frames


@pytest.mark.parametrize(
    "written", ["", "ms", "320 MS", "-2", -2, "-320ms", "1,28s", "0.32", 0.32, "1e3ms", "inf", "x16"]
)
def test_what_is_no_time(written: str | int) -> None:
    with pytest.raises(ValueError, match=r"^time .*: give it with its unit, such as 320ms or 1.28s, or as a number of"):
        units.parse_frames(written)


@pytest.mark.parametrize(
    ("written", "below", "above"),
    [("330ms", 320, 340), ("0.33s", 320, 340), ("1ms", 0, 20), ("20.5ms", 20, 40), ("1.2799999s", 1260, 1280)],
)
def test_times_between_frames(written: str, below: int, above: int) -> None:
    with pytest.raises(ValueError) as caught:
        units.parse_frames(written)
    assert str(caught.value) == (f"time {written!r}: no whole number of frames of 20 ms; give {below}ms or {above}ms")
