"""Assertions about the answers to verification links."""

from typing import Any

import httpx

from tests.conftest import Connection

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}

UNVERIFIED = [{"username": "alice", "is_email_verified": False, "is_used": False}]
VERIFIED = [{"username": "alice", "is_email_verified": True, "is_used": True}]


def verification_state(connection: Connection) -> list[dict[str, Any]]:
    """Returns which users are verified and which links are used."""
    return connection.execute(
        "SELECT username, is_email_verified, is_used FROM users JOIN verify_emails USING (username) ORDER BY username"
    ).fetchall()


def is_page(response: httpx.Response, status: int) -> bool:
    """Returns whether a response is a page that keeps the code secret and can only post to this service."""
    headers = response.headers
    return bool(
        response.status_code == status
        and headers["content-type"] == "text/html; charset=utf-8"
        and headers["cache-control"] == "no-store"
        and headers["referrer-policy"] == "no-referrer"
        and headers["x-robots-tag"] == "noindex"
        and "default-src 'none'" in headers["content-security-policy"]
        and "form-action 'self'" in headers["content-security-policy"]
        and "frame-ancestors 'none'" in headers["content-security-policy"]
        and "<h1>" in response.text
        and "<script" not in response.text
    )


def has_sentence(response: httpx.Response, sentence: str) -> bool:
    """Returns whether a page has this sentence as its paragraph."""
    return f"<p>{sentence}</p>" in response.text
