"""Draws texts for the made corpora: digit strings with command words, and everyday sentences from a small grammar.

A hash of a text assigns it to train, dev or test, so no text of one part can occur in another, however many processes
draw texts and in whatever order.
"""

import random
import zlib
from collections.abc import Callable


def _words(line: str) -> list[str]:
    return line.split()


DIGITS = _words("zero one two three four five six seven eight nine")
COMMANDS = _words("call open delete repeat")

TEENS = _words("ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen")
TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
ORDINALS = _words(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth "
    "fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth"
)
ORDINALS += [f"twenty {day}" for day in ORDINALS[:9]] + ["thirtieth", "thirty first"]

# A slot of a template becomes one of these words; sentence() has the slots whose values are computed.
SLOTS: dict[str, list[str]] = {
    "name": _words(
        "anna arthur barbara charles clara daniel david edward elena emma frank george grace hannah "
        "harold helen henry irene jacob james julia karen laura lucas maria martin michael nora oliver "
        "oscar paul peter rachel robert rosa samuel sarah simon sophie susan thomas victor walter "
        "william"
    ),
    "relative": _words("mother father sister brother aunt uncle cousin grandmother neighbor teacher doctor friend"),
    "city": _words(
        "boston chicago denver london paris rome berlin madrid vienna dublin oxford lisbon geneva tokyo toronto"
    ),
    "place": _words(
        "kitchen garden library station market office school bakery museum park hospital theater bridge "
        "river harbor village forest church hotel airport bank cellar"
    ),
    "thing": _words(
        "book letter lamp chair table window basket bottle ticket jacket camera guitar hammer ladder "
        "mirror picture wallet blanket candle clock coat cup key knife map pencil phone suitcase "
        "newspaper"
    ),
    "food": _words(
        "bread butter cheese coffee tea milk soup rice apples oranges pears honey chicken fish salad "
        "cake sugar pepper potatoes tomatoes carrots onions chocolate lemonade"
    ),
    "animal": _words("dog cat horse rabbit sheep goose fox bear cow donkey parrot turtle"),
    "adjective": _words(
        "old new small large red blue green yellow heavy light broken empty beautiful strange quiet "
        "wooden silver cheap expensive dusty narrow warm cold"
    ),
    "feeling": _words("happy tired hungry angry worried proud lonely surprised nervous cheerful"),
    "weather": _words("sunny cloudy rainy windy foggy stormy snowy dry freezing"),
    "time": _words("morning afternoon evening night weekend"),
    "when": _words("today tomorrow yesterday tonight now later soon again"),
    "day": _words("monday tuesday wednesday thursday friday saturday sunday"),
    "month": _words("january february march april may june july august september october november december"),
    "past": _words("bought sold found lost painted carried borrowed repaired dropped noticed wanted cleaned"),
    "verb": _words("buy sell find paint carry borrow repair bring clean move return hide"),
    "moved": _words("walked drove hurried traveled returned wandered moved"),
    "adverb": _words("slowly quickly quietly carefully suddenly often never always usually"),
    "unit": _words("dollars minutes hours days weeks miles pounds pages"),
}

TEMPLATES = """
{name} {past} the {adjective} {thing} in the {place}
please {verb} the {thing} before {day} {time}
my {relative} {moved} from {city} to {city} on {day}
the {animal} {adverb} slept behind the {adjective} {thing}
we need {number} {unit} and some {food} for the {place}
could you {verb} my {adjective} {thing} {when}
{name} and {name} will meet at the {place} at {clock}
it was {weather} in {city} on the {ordinal} of {month}
i would like some {food} with {food} and a cup of tea
her {relative} was {feeling} because the {thing} was {adjective}
there are {number} {adjective} chairs in the {place}
the train to {city} leaves at {clock} in the {time}
he {adverb} asked his {relative} about the {adjective} {thing}
was the {animal} {feeling} when it saw the {place}
{name} was born on the {ordinal} of {month} {year}
they paid {number} dollars for the {adjective} {thing}
don't forget to {verb} the {thing} on {day}
if it is {weather} {when} we can go to the {place}
the {place} near the {place} closes at {clock}
my telephone number is {digits}
where did {name} {verb} that {adjective} {thing}
in {year} the {relative} of {name} {moved} to {city}
you should {adverb} {verb} a {thing} without asking the {relative}
this {food} is better than the {food} we had on {day}
turn left after {number} miles and look for the {adjective} {place}
nobody {past} the {thing} until {month}
the {feeling} {animal} {moved} {adverb} through the {place}
what time does the {place} open on {day}
""".strip().splitlines()


def spell(number: int) -> str:
    """Returns the English words of a whole number from 0 to 999."""
    if number >= 100:
        rest = f" and {spell(number % 100)}" if number % 100 else ""
        return f"{DIGITS[number // 100]} hundred{rest}"
    if number >= 20:
        return TENS[number // 10 - 2] + (f" {DIGITS[number % 10]}" if number % 10 else "")
    return TEENS[number - 10] if number >= 10 else DIGITS[number]


def digit_string(rng: random.Random) -> str:
    """Returns three to seven digits, in two of five cases after a command word."""
    command = [rng.choice(COMMANDS)] if rng.random() < 0.4 else []
    return " ".join(command + rng.choices(DIGITS, k=rng.randint(3, 7)))


def sentence(rng: random.Random) -> str:
    """Returns an everyday sentence; numbers, times and years are written out in words."""
    computed: dict[str, Callable[[], str]] = {
        "number": lambda: spell(rng.randint(2, 30) if rng.random() < 0.6 else rng.randint(31, 999)),
        "ordinal": lambda: rng.choice(ORDINALS),
        "year": lambda: f"{rng.choice(['nineteen', 'eighteen'])} {spell(rng.randint(10, 99))}",
        "clock": lambda: f"{rng.choice(['', 'half past ', 'quarter to '])}{spell(rng.randint(1, 12))}",
        "digits": lambda: " ".join(rng.choices(DIGITS, k=rng.randint(4, 7))),
    }
    words = []
    for piece in rng.choice(TEMPLATES).split():
        slot = piece.strip("{}")
        if piece == slot:
            words.append(piece)
        else:
            words.append(computed[slot]() if slot in computed else rng.choice(SLOTS[slot]))
    return " ".join(words)


MAKERS: dict[str, Callable[[random.Random], str]] = {"digits": digit_string, "sentences": sentence}


def part_of(text: str) -> str:
    """Returns the part that this text may occur in: "train", "dev" or "test" (about 80, 5 and 15 % of all)."""
    bucket = zlib.crc32(text.encode()) % 20
    return "dev" if bucket == 0 else "test" if bucket <= 3 else "train"


def draw(size: str, part: str, rng: random.Random) -> str:
    """Draws a random text of the given size ("digits" or "sentences") that belongs to the given part."""
    while True:
        text = MAKERS[size](rng)
        if part_of(text) == part:
            return text
