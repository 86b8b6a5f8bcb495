"""The form in which an email address is taken, stored and compared."""

import re
import unicodedata

from outbox_service.letters import MAX_MARKS, check_visible

MAX_ADDRESS = 200
"""Characters."""

_LIKE_A_DOT = "\ua4f8\ua4fa\U0001d16d"
"""Letters and marks that cannot be told from dots (confusables.txt of UTS #39): Lisu tones, an augmentation dot."""

_SARA_AM = "\u0e33\u0eb3"
"""A vowel of Thai and one of Lao, as their keyboards type it: two characters in NFKC, which nobody types."""

_STRAY_MARK = re.compile(rf"(?:^|[^LMN])M|M{{{MAX_MARKS + 1}}}")
"""In the major categories of a text's characters, a letter each: a mark that has nothing to stand on, or too many."""


def canonical(email: object) -> object:
    """Returns an address with its part before the @ in one form; the validation that follows does so with the domain.

    Before the @, ASCII stays as it was typed: its case is for the receiving server to judge (RFC 5321, 2.4), and the
    unique index compares it without case. An address with other characters there is stored and written to in lower
    case and composed, as usernames are (RFC 8265: UsernameCaseMapped), because what Postgres knows of their case
    depends on the database's collation. These characters have to be letters, marks and digits that NFKC leaves alone
    (UTS #39, 3.3): another form of a letter, or a sign that looks like a dot, would be a second address that looks like
    the first. In a domain, IDNA turns such forms into the one that counts.

    Args:
        email: what a client sent, of any type.

    Raises:
        ValueError: it is not an address alone, or has characters that no address may have.
    """
    if not isinstance(email, str):
        return email
    if "<" in email:  # pydantic would take 'Alice <alice@example.com>' too, and drop the name
        raise ValueError("must be an address alone, as in alice@example.com")
    if email.isascii():
        return email
    address = email.strip()
    if len(address) > MAX_ADDRESS:
        raise ValueError(f"must have at most {MAX_ADDRESS} characters")
    local, at, domain = check_visible(address).rpartition("@")
    return f"{_canonical_local(local)}{at}{domain}"


def _canonical_local(local: str) -> str:
    local = unicodedata.normalize("NFC", local)
    if not local.isascii():
        local = unicodedata.normalize("NFC", local.lower())
    for character in local:
        if not _is_plain(character):
            raise ValueError(
                f"must not contain U+{ord(character):04X} before the @:"
                " outside ASCII, letters and digits in their plain form alone"
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
