"""Rules for letters and combining marks that names and addresses share."""

import re

MAX_MARKS = 8
"""Consecutive combining marks. UTS #39 (5.4) advises against more than four nonspacing ones; spacing marks count here
too, and Burmese, Khmer and Tibetan letters have several of both."""

_INVISIBLE = re.compile(
    # The letters and marks of Default_Ignorable_Code_Point in the Unicode Character Database. Python has no table of
    # that property.
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef"
    # Fillers, blanks and controls of single scripts that do not have the property but have an empty glyph.
    "\U00013440-\U00013442\U00016fe4\U0001bc9d]"
)


def check_visible(text: str) -> str:
    """Returns the text unchanged.

    Raises:
        ValueError: it has a letter or mark that is displayed as nothing.
    """
    if not text.isascii() and (invisible := _INVISIBLE.search(text)):
        raise ValueError(f"must not contain invisible characters: U+{ord(invisible[0]):04X} is one")
    return text
