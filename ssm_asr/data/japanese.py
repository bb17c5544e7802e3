"""Writes Japanese in one way, for transcripts and for the texts that are compared with them.

Two users need it: a recipe's transcripts, whose characters become tokens, and programs that score a text of another
origin (another model, another keyboard) against a transcript. Error rates of characters ignore spaces, so the result
has none.
"""

import re
import unicodedata

_LONG_MARK = "ー"
_DASHES = "-‐‑‒–—―−─~〜∼"  # after kana they mean a long vowel
_LONG_VOWEL = re.compile(f"(?<=[ぁ-ゖァ-ヺ])[{re.escape(_DASHES)}{_LONG_MARK}]+")
_NUMERALS = "一二三四五六七八九十百千万億兆〇"
_ZERO = re.compile(f"(?<=[{_NUMERALS}])[○◯]|[○◯](?=[{_NUMERALS}])")  # a circle beside a numeral is a zero
_IN_NUMBER = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SIGNS = "#%&@"  # Unicode counts them as punctuation, but they are spoken, or stand for something spoken


def normalise(text: str) -> str:
    """Returns a text with one form for each character.

    - Half-width kana and full-width letters and digits become the usual ones (Unicode's NFKC, which also takes ⑤ for 5
      and ㌔ for キロ); letters are capitals.
    - A number in digits has no commas between them and keeps its point. Numbers in kanji stay, with one zero, 〇.
    - Any dash or wave after kana is a long vowel; one mark stands for several.
    - All other punctuation goes, and all spaces.

    >>> normalise("ＣＤ－Ｒ を、２，０００ 枚〜。 ﾃﾞｰﾀーー")
    'CDRを2000枚データー'
    """
    text = unicodedata.normalize("NFKC", text).upper()
    text = _LONG_VOWEL.sub(_LONG_MARK, "".join(text.split()))
    text = _ZERO.sub("〇", _IN_NUMBER.sub("", text))
    return "".join(char for i, char in enumerate(text) if not _is_dropped(text, i))


def _is_dropped(text: str, i: int) -> bool:
    """Tells whether the character at i is punctuation that nobody says."""
    char = text[i]
    if char == "." and text[i - 1 : i].isdecimal() and text[i + 1 : i + 2].isdecimal():
        return False
    return char in _DASHES or (unicodedata.category(char).startswith("P") and char not in _SIGNS)
