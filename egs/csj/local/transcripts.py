"""Makes transcripts of CSJ in four modes from the tagged text that lhotse reads.

- disfluent has all that was said;
- fluent leaves out fillers (F), fragments of words (D) and particles that were corrected at once (D2);
- number is fluent, with numbers in digits where the corpus gives them;
- symbol has # for every filler and @ for every fragment or particle.

A text with disfluencies also exists marked, with parentheses around each of them, "(えー)京都で(しゃ)写真を", so that
`ssm_asr.evaluation.scoring.fluent_errors` can score recognised text by what was meant.
"""

from itertools import groupby

from lhotse.recipes.csj import DECISIONS, CSJSDBParser

from ssm_asr.data.japanese import normalise
from ssm_asr.evaluation.scoring import all_said, only_meant

MODES = ("disfluent", "fluent", "number", "symbol")
SYMBOLS = {"F": "#", "D": "@", "D2": "@"}
_PARSER = CSJSDBParser(DECISIONS)
_NUMBER_PARSER = CSJSDBParser({**DECISIONS, "A_num": 1})


def transcribe(raw: str) -> dict[str, str]:
    """Returns a tagged text in all modes, normalised, and the marked forms disfluent_marked and symbol_marked.

    Args:
        raw: lhotse's custom["raw"]: words "surface+morphology+pronunciation", separated by spaces.
    """
    pieces = _pieces(_PARSER, raw)
    marked = _mark(pieces)
    symbols = _mark([(SYMBOLS.get(tag, text), tag) for text, tag in pieces])
    number = only_meant(_mark(_pieces(_NUMBER_PARSER, raw)))
    return {
        **{"disfluent": all_said(marked), "fluent": only_meant(marked), "number": number, "symbol": all_said(symbols)},
        **{"disfluent_marked": marked, "symbol_marked": symbols},
    }


def _pieces(parser: CSJSDBParser, raw: str) -> list[tuple[str, str]]:
    """Returns the text in pieces with their tags: F, D, D2, or "" for what was meant. Spaces keep neighbours apart."""
    tagged = [(char, _disfluency(tags)) for char, tags in parser.parse(raw, sep=" ", with_tags=True)]
    stretches = groupby(tagged, key=lambda item: item[1])
    return [("".join(char for char, _ in stretch), tag) for tag, stretch in stretches]


def _disfluency(tags: str) -> str:
    """Returns the outermost tag of a path such as "M/F/?" that makes a disfluency; "" if none does."""
    return next((tag for tag in tags.split("/") if tag in SYMBOLS), "")


def _mark(pieces: list[tuple[str, str]]) -> str:
    """Returns the normalised text with parentheses around disfluencies."""
    normal = [(normalise(text), tag) for text, tag in pieces]
    return "".join(f"({text})" if tag and text else text for text, tag in normal)
