"""Which letters and marks a name or an address may be made of."""

import re

MAX_MARKS = 8
"""Combining marks in a row. UTS #39 (5.4) advises against more than four nonspacing ones; here spacing marks count too,
and Burmese, Khmer and Tibetan letters have several of both."""

_INVISIBLE = re.compile(
    # Default_Ignorable_Code_Point of the Unicode Character Database, as far as it is letters and marks: Python has no
    # table of it.
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef"
    # Fillers, blanks and controls of single scripts whose glyph is empty all the same.
    "\U00013440-\U00013442\U00016fe4\U0001bc9d]"
)


def check_visible(text: str) -> str:
    """Returns a text as it is.

    Raises:
        ValueError: it has a letter or mark that is displayed as nothing.
    """
    if not text.isascii() and (found := _INVISIBLE.search(text)):
        raise ValueError(f"must not contain invisible characters: U+{ord(found[0]):04X} is one")
    return text
