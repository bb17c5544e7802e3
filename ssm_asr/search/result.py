"""What recognition gives: text, tokens, and when each token was emitted."""

from collections.abc import Sequence
from dataclasses import dataclass

from ssm_asr import units
from ssm_asr.data.tokens import Tokenizer


@dataclass(frozen=True)
class Result:
    """What was recognised in a recording, or so far in a stream.

    Attributes:
        text: the text of the tokens.
        tokens: the tokens as in tokens.txt; a token that starts a word begins with "▁".
        times: for each token, the start in seconds of the output frame in which the search emitted it, counted from
            the first sample. Output frames are 40 ms long, so times are multiples of 0.04 s; sherpa-onnx computes its
            timestamps so, too. A transducer learns by itself in which frame to emit a token: the frame lies
            within or near the spoken token, but marks neither its start nor its end.
    """

    text: str = ""
    tokens: tuple[str, ...] = ()
    times: tuple[float, ...] = ()


def make_result(tokenizer: Tokenizer, token_ids: Sequence[int], emitted_frames: Sequence[int]) -> Result:
    """Makes a result of token ids and the output frame (40 ms) in which each was emitted."""
    return Result(
        tokenizer.decode(token_ids),
        tuple(tokenizer.symbols[i] for i in token_ids),
        tuple(frame * units.OUTPUT_FRAME_MS / 1000 for frame in emitted_frames),
    )
