"""Verification links for tests."""

from dataclasses import dataclass

from outbox.signup.secret_code import secret_code
from tests.conftest import Connection
from tests.support.processes import SECRET_KEY

PATH = "/v1/verify_email"
JSON = {"Accept": "application/json"}


@dataclass(frozen=True)
class Link:
    """The parameters of a link."""

    email_id: int
    code: str

    @property
    def query(self) -> dict[str, str | int]:
        """The query string, as a mapping."""
        return {"email_id": self.email_id, "secret_code": self.code}


def mailed(connection: Connection, name: str = "alice", lifetime: int = 900) -> Link:
    """Writes a user and a verification, as if its mail was sent, and returns the link."""
    email = f"{name}@example.com"
    connection.execute(
        "INSERT INTO users (username, hashed_password, full_name, email) VALUES (%s, 'hash', 'A User', %s)",
        [name, email],
    )
    row = connection.execute(
        """
        INSERT INTO verify_emails (outbox_id, username, email, expired_at)
        VALUES ((SELECT count(*) FROM verify_emails), %s, %s, now() + make_interval(secs => %s)) RETURNING id
        """,
        [name, email, lifetime],
    ).fetchone()
    assert row is not None
    return Link(row["id"], secret_code(SECRET_KEY, row["id"], name, email))
