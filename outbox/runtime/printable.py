"""Escapes control characters in foreign text, which a terminal would obey, and keeps the printable ones."""

import json
import re


def printable(text: str, keep: str = "") -> str:
    """Escapes every unprintable character as Python does, except those in `keep`."""
    return "".join(
        character if character.isprintable() or character in keep else ascii(character)[1:-1] for character in text
    )


def printable_json(text: str) -> str:
    """Escapes every unprintable character of a JSON text as JSON does, except line breaks."""
    return "".join(
        character if character.isprintable() or character == "\n" else json.dumps(character)[1:-1] for character in text
    )


def ascii_json(text: str) -> str:
    """Escapes all but ASCII in a JSON text, so that its value does not depend on the output's encoding."""
    return re.sub(r"[^\n -~]", lambda match: json.dumps(match[0])[1:-1], text)
