"""The canonical form of an email address: the form that is stored and compared."""

import re
import unicodedata

from outbox_service.unicode_rules import MAX_MARKS, check_visible

MAX_ADDRESS = 200
"""Characters."""

_LIKE_A_DOT = "\ua4f8\ua4fa\U0001d16d"
"""Letters and marks that look like dots (confusables.txt of UTS #39): two Lisu tones and an augmentation dot."""

_SARA_AM = "\u0e33\u0eb3"
"""A vowel of Thai and one of Lao, as keyboards type them. NFKC splits each into two that keyboards do not type."""

_STRAY_MARK = re.compile(rf"(?:^|[^LMN])M|M{{{MAX_MARKS + 1}}}")
"""Finds a mark without a base character, or too many marks, in a string of major categories, one letter a character."""


def canonicalize(email: object) -> object:
    """Returns an address with the part before the @ in canonical form; the validation that follows does the domain.

    Before the @, ASCII stays as typed: its case is for the receiving server to judge (RFC 5321, 2.4), and the unique
    index ignores case. With other characters there, an address is stored and used in lower case and composed, as
    usernames are (RFC 8265: UsernameCaseMapped), because Postgres' case mapping of them depends on the database's
    collation. These characters must be letters, marks and digits that NFKC leaves unchanged (UTS #39, 3.3): another
    form of a letter, or a sign that looks like a dot, would make a second address that looks like the first. In a
    domain, IDNA maps such forms to the canonical one.

    Args:
        email: the value that a client sent, of any type.

    Raises:
        ValueError: it is more than an address, or has characters that no address may have.
    """
    if not isinstance(email, str):
        return email
    if "<" in email:  # pydantic would accept 'Alice <alice@example.com>' too, and drop the name
        raise ValueError("must be an address only, as in alice@example.com")
    if email.isascii():
        return email
    address = email.strip()
    if len(address) > MAX_ADDRESS:
        raise ValueError(f"must have at most {MAX_ADDRESS} characters")
    local, at, domain = check_visible(address).rpartition("@")
    return f"{_canonicalize_local(local)}{at}{domain}"


def _canonicalize_local(local: str) -> str:
    local = unicodedata.normalize("NFC", local)
    if not local.isascii():
        local = unicodedata.normalize("NFC", local.lower())
    for character in local:
        if not _is_plain(character):
            raise ValueError(
                f"must not contain U+{ord(character):04X} before the @:"
                " outside ASCII, only letters and digits in their plain form"
            )
    if _STRAY_MARK.search("".join(unicodedata.category(character)[0] for character in local)):
        raise ValueError(f"must have a letter for every {MAX_MARKS} combining marks before the @")
    return local


def _is_plain(character: str) -> bool:
    return character.isascii() or (
        unicodedata.category(character)[0] in "LMN"
        and character not in _LIKE_A_DOT
        and (unicodedata.normalize("NFKC", character) == character or character in _SARA_AM)
    )
