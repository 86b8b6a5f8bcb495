"""Foreign text for an operator's eyes: what a terminal would obey is escaped, what a person can read is not."""

import json
import re


def printable(text: str, keep: str = "") -> str:
    """Escapes every character that is not printable, as Python would write it, but for those in `keep`."""
    return "".join(
        character if character.isprintable() or character in keep else ascii(character)[1:-1] for character in text
    )


def printable_json(text: str) -> str:
    """Escapes every character of a JSON text that is not printable, but for line breaks, as JSON would write it."""
    return "".join(
        character if character.isprintable() or character == "\n" else json.dumps(character)[1:-1] for character in text
    )


def ascii_json(text: str) -> str:
    """Escapes all but ASCII in a JSON text: the same value for a program, whatever the encoding of the output."""
    return re.sub(r"[^\n -~]", lambda found: json.dumps(found[0])[1:-1], text)
