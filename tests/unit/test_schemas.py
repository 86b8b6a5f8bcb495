"""The rules for a new user, at their boundaries."""

import sys
import unicodedata
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter, ValidationError

from outbox_service.schemas import CreateUser, User

VALID = {
    "username": "alice",
    "password": "correct horse",
    "full_name": "Alice Liddell",
    "email": "alice@example.com",
}


def invalid_fields(changes: Mapping[str, object]) -> set[object]:
    """Returns the fields for which a user with these changes is refused; empty if it is accepted."""
    try:
        CreateUser.model_validate({**VALID, **changes})
    except ValidationError as error:
        return {violation["loc"][0] for violation in error.errors()}
    return set()


def email_of_length(length: int) -> str:
    """Returns an address with this many characters; a label of a domain has at most 63."""
    domain = ".".join(["d" * 60] * 3) + ".com"
    return "a" * (length - len(domain) - 1) + "@" + domain


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("username", "abc"),
        ("username", "a" * 100),
        ("username", "0_9"),
        ("username", "___"),
        ("password", "sixsix"),
        ("password", "p" * 100),
        ("password", "ключ🔑ы"),
        ("password", "      "),
        ("full_name", "Ann"),
        ("full_name", "N" * 100),
        ("full_name", "A B"),
        ("full_name", "नरेन्द्र मोदी"),
        ("full_name", "محمد علي"),
        ("full_name", "王小明"),
        ("full_name", "Zoe\u0308 B"),
        ("full_name", "𐌰𐌱𐌲"),
        ("full_name", unicodedata.normalize("NFD", "Nguyễn Thị Ánh")),
        ("full_name", "น้ำทิพย์ ศรีสุข"),
        ("full_name", "مُحَمَّدٌ ٱلرَّحْمَٰن"),
        ("full_name", "שָׁ֑לוֹם בְּרֵאשִׁ֖ית"),
        ("full_name", "ज़ाकिर हुसैन"),
        ("full_name", "བསྟན འཛིན རྒྱ མཚོ ཧཱུྃ"),
        ("full_name", "ဖြိုးကျော် ညွှန့်မြွှေး"),
        ("full_name", "ព្រះបាទ នរោត្ដម"),
        ("full_name", "한가을 김"),
        ("full_name", unicodedata.normalize("NFD", "한가을")),
        ("full_name", "Zoe" + "\u0308" * 8),
        ("email", "a@b.co"),
        ("email", email_of_length(200)),
        ("email", "first.last+tag@example.com"),
        ("email", "a@exämple.com"),
        ("email", "a@例え.jp"),
        ("email", "élodie.müller+tag@exämple.com"),
        ("email", "用户@例え.jp"),
        ("email", "उपयोगकर्ता@example.com"),
        ("email", "น้ำทิพย์@example.com"),
        ("email", "بريد٣@example.com"),
    ],
)
def test_a_valid_field_is_accepted(field: str, value: str) -> None:
    """The shortest and longest value of each field, and every kind of character that it may have."""
    assert invalid_fields({field: value}) == set()
    assert getattr(CreateUser.model_validate({**VALID, field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("username", ""),
        ("username", "ab"),
        ("username", "a" * 101),
        ("username", "Alice"),
        ("username", "alice bob"),
        ("username", "alice-bob"),
        ("username", "alice\n"),
        ("username", "alice\0"),
        ("username", "аlice"),  # noqa: RUF001 - the first letter is Cyrillic
        ("username", "ali٣"),
        ("username", 12345),
        ("username", None),
        ("password", ""),
        ("password", "five5"),
        ("password", "p" * 101),
        ("password", "nul\0nul"),
        ("password", "sur\ud800gate"),
        ("password", 1234567),
        ("password", ["correct horse"]),
        ("full_name", "Al"),
        ("full_name", "N" * 101),
        ("full_name", "   "),
        ("full_name", "\u0308\u0308\u0308"),
        ("full_name", "R2D2"),
        ("full_name", "Alice\tLiddell"),
        ("full_name", "Alice\nBcc: x"),
        ("full_name", "O'Brien"),
        ("full_name", "Smith, J"),
        ("full_name", "<b>Al</b>"),
        ("full_name", "Alice\0"),
        ("full_name", "Alice\u202egnp"),
        ("full_name", "Ali٣ce"),
        ("full_name", "😀😀😀"),
        ("full_name", "\u2800\u2800\u2800"),
        ("full_name", "Zoe" + "\u0308" * 9),
        ("full_name", "e" + "\u0301" * 99),
        ("full_name", "Zoe \u0308"),
        ("full_name", "\u0308Zoe"),
        ("email", ""),
        ("email", "alice"),
        ("email", "alice@"),
        ("email", "@example.com"),
        ("email", "alice@localhost"),
        ("email", "alice@[127.0.0.1]"),
        ("email", "a b@example.com"),
        ("email", "a..b@example.com"),
        ("email", "alice@example.com\nBcc: x@example.com"),
        ("email", "alice@example.com\0"),
        ("email", "Alice <alice@example.com>"),
        ("email", '"Alice" <alice@example.com>'),
        ("email", "<alice@example.com>"),
        ("email", email_of_length(201)),
        ("email", "a" * 10_000 + "@example.com"),
        ("email", "a\u0301" + "\u0301" * 9 + "@example.com"),
        ("email", "a.\u0301b@example.com"),
        ("email", "İ" * 188 + "@example.com"),
        ("email", "a\u2062b@example.com"),
        ("email", "a😀b@example.com"),
        ("email", "a¼b@example.com"),
        ("email", 5),
        ("id", 1),
        ("is_email_verified", True),
        ("hashed_password", "x"),
        ("", "x"),
    ],
)
def test_an_invalid_field_is_refused(field: str, value: object) -> None:
    """Too short, too long, a character that is not allowed, another type, an unknown field."""
    assert invalid_fields({field: value}) == {field}


def invisible_characters() -> list[str]:
    """Returns the letters and marks that are Default_Ignorable_Code_Point, as pydantic's regex engine has them."""
    pattern = r"^[\p{Default_Ignorable_Code_Point}&&[\p{L}\p{M}]]$"
    invisible = TypeAdapter(Annotated[str, Field(pattern=pattern)])
    characters: list[str] = []
    for character in map(chr, range(sys.maxunicode + 1)):
        if unicodedata.category(character)[0] in "LM":
            with suppress(ValidationError):
                characters.append(invisible.validate_python(character))
    return characters


BLANK = ["\U00013440", "\U00013441", "\U00013442", "\U00016fe4", "\U0001bc9d"]
"""Letters and marks with an empty glyph that are not Default_Ignorable_Code_Point."""


def test_an_invisible_character_is_no_part_of_a_name_or_an_address() -> None:
    """Neither alone nor next to letters."""
    invisible = invisible_characters()
    assert {"\u3164", "\u115f", "\u1160", "\uffa0", "\ufe0f", "\u034f", "\U000e0100"} <= set(invisible)
    for character in [*invisible, *BLANK]:
        for changes in (
            {"full_name": character * 3},
            {"full_name": f"Alice{character} Liddell"},
            {"full_name": f"{character}Alice"},
            {"email": f"al{character}ice@example.com"},
            {"email": f"alice@exa{character}mple.com"},
        ):
            assert invalid_fields(changes) == set(changes), f"U+{ord(character):04X} in {changes.keys()}"


def test_all_violations_are_reported_at_once() -> None:
    """Each invalid field is named, and each missing one."""
    assert invalid_fields({"username": "A", "password": "", "full_name": "1", "email": "x", "role": "admin"}) == {
        *VALID,
        "role",
    }
    with pytest.raises(ValidationError) as caught:
        CreateUser.model_validate({})
    assert [violation["loc"] for violation in caught.value.errors()] == [(field,) for field in VALID]


def test_an_error_does_not_repeat_the_password() -> None:
    """The error of an invalid body does not contain the password."""
    with pytest.raises(ValidationError) as caught:
        CreateUser.model_validate({**VALID, "password": "hunter2" * 20, "username": "A"})
    assert "hunter2" not in str(caught.value)


def test_a_domain_is_stored_in_lower_case() -> None:
    """The domain of an address is stored in lower case, an ASCII local part as typed."""
    assert CreateUser.model_validate({**VALID, "email": "Alice@EXAMPLE.com"}).email == "Alice@example.com"


IDNA_DOTS = "\uff0e\u3002\uff61"
"""Characters that IDNA maps to a dot between labels (UTS #46), because East Asian keyboards type them."""
DOTS = IDNA_DOTS + "\u2024\u2025\u2026\ufe52\u00b7\u06d4\u0701\u0702\ua4f8\ua4fa\ua60e\U00010a50\U0001d16d\u2e3c\u22c5"
"""Characters that look like one dot or several."""


@pytest.mark.parametrize("dot", DOTS, ids=ascii)
def test_a_dot_is_a_dot(dot: str) -> None:
    """Before the @, a character that looks like a dot is refused; in a domain, IDNA's dots become a dot."""
    assert invalid_fields({"email": f"alice{dot}b@example.com"}) == {"email"}
    assert invalid_fields({"email": f"élodie{dot}@example.com"}) == {"email"}
    if dot in IDNA_DOTS:
        assert CreateUser.model_validate({**VALID, "email": f"alice@example{dot}com"}).email == "alice@example.com"
    else:
        assert invalid_fields({"email": f"alice@example{dot}com"}) == {"email"}


@pytest.mark.parametrize(
    "local",
    [
        "\uff41lice",
        "\ufb01n",
        "ma\u017f\u017f",
        "a\u00b2",
        "\U0001d41alice",
        "a\uff3fb",
        "a\uff0bb",
        "\ufe8e",
        "\uff71",
    ],
    ids=ascii,
)
def test_a_second_form_of_a_letter_is_refused(local: str) -> None:
    """Full-width letters, ligatures, superscripts and the like would make a second address that looks the same."""
    with pytest.raises(ValidationError, match=r"must not contain U\+[0-9A-F]{4,5} before the @"):
        CreateUser.model_validate({**VALID, "email": f"{local}@example.com"})


@pytest.mark.parametrize(
    ("typed", "stored"),
    [
        ("alice@\uff25\uff38ample.com", "alice@example.com"),
        ("alice@xn--exmple-cua.com", "alice@exämple.com"),
        ("alice@EXÄMPLE.com", "alice@exämple.com"),
        ("e\u0301lodie@example.com", "élodie@example.com"),
        ("E\u0301LODIE.B@example.com", "élodie.b@example.com"),
        ("Alice.É@example.com", "alice.é@example.com"),
        ("ΔΗΜΉΤΡΗΣ@example.com", "δημήτρης@example.com"),
        ("\u0130lker@example.com", "i\u0307lker@example.com"),
        ("\u212aate@example.com", "Kate@example.com"),
        ("  alice@example.com\u3000", "alice@example.com"),
    ],
)
def test_an_address_is_stored_in_one_form(typed: str, stored: str) -> None:
    """The domain as IDNA displays it; a non-ASCII part before the @ composed and in lower case."""
    assert CreateUser.model_validate({**VALID, "email": typed}).email == stored


# Few characters, so that many of them combine.
_PIECES = st.sampled_from("aAbéÉiİ\u0131s\u017fßẞ\u03c3ςΣǅЖж.+-@\u0301\u0307\u212a\u0e33\u0640한\u1112")


@given(st.lists(_PIECES | st.characters(), max_size=12).map("".join))
@settings(max_examples=300, deadline=None, database=None)
def test_the_stored_form_is_a_fixed_point(local: str) -> None:
    """The stored form is accepted and stored unchanged: composed, and in lower case unless it is ASCII."""
    with suppress(ValidationError):
        stored = CreateUser.model_validate({**VALID, "email": f"{local}@example.com"}).email
        assert CreateUser.model_validate({**VALID, "email": stored}).email == stored
        assert unicodedata.is_normalized("NFC", stored)
        assert stored.isascii() or stored == stored.lower()


def test_a_user_in_an_answer_has_no_hash() -> None:
    """The answer's schema has no field for a hash or a password."""
    assert not {name for name in User.model_fields if "hash" in name or name == "password"}
