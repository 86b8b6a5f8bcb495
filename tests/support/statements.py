"""Defines parameters for the statements, as the processes pass them."""

import re
from typing import Any

from outbox.queries import sql_folder

IDS = list(range(1, 33))
MANY = list(range(1, 10_001))
OUTCOMES = {
    "statuses": ["done"] * 32,
    "delays": [0.0] * 32,
    "attempts": [1] * 32,
    "errors": [None] * 32,
    "unhandled": [1],
}
PENDING = {"queue": "default", "horizon": 60.0, "left_out": [1]}
CLOCK = {"clock_error": 60.0}
STATEMENTS: dict[str, dict[str, Any]] = {
    "window_room": {"queue": "default", "window": 10_000},
    "publish": {"room": None, "window": 10_000, "batch": 500, "payload_limit": 9, **PENDING},
    "first_pending": PENDING,
    "find_work": {"queues": ["critical", "default"], "horizon": 60.0, "grace": 2.0, **CLOCK, "impossible_lease": 300.0},
    "unclaimed_rows": {"grace": 2.0, **CLOCK},
    "sweep": {"ids": MANY, "deliveries": [1] * len(MANY)},
    "expired_leases": {"batch": 500, "impossible_lease": 300.0, "refused": [1]},
    "touch_leases": {"ids": IDS},
    "rescue": {"ids": IDS, "statuses": ["pending"] * 32, "delays": [0.0] * 32, "errors": ["why"] * 32},
    "rows_past_retention": {"retention": 86_400.0, "batch": 1000, "left_out": [1]},
    "delete_rows": {"ids": MANY[:1000]},
    "delete_expired_users": {"usernames": [f"user_{n}" for n in range(1000)]},
    "unserved_queues": {"queues": ["critical", "default"], "most": 10_000},
    "claim": {"ids": IDS, "deliveries": [1] * 32, "worker": "w", "lease": 15.0, "bytes": 10**6},
    "lock_available_rows": {"ids": IDS},
    "renew_leases": {"ids": IDS, "deliveries": [1] * 32, "lease": 15.0, "worker": "w"},
    "complete": {"ids": IDS, "deliveries": [1] * 32, "worker": "w", **OUTCOMES},
    "not_completed": {"ids": IDS, "deliveries": [1] * 32, "worker": "w"},
    "count_dead": {"task": "t"},
    "list_dead": {"task": "t", "limit": 50, "payload_limit": 101},
    "list_dead_json": {"task": None, "limit": 50},
    "show_row": {"id": 1},
    "dead_ids": {"task": None},
    "retry_dead": {"ids": MANY[:500]},
    "discard_dead": {"ids": MANY[:500]},
    "unhandled_ids": {"task": "t"},
    "give_up_unhandled": {"ids": MANY[:500]},
    "row_statuses": {"ids": MANY},
}
"""Every statement of relay, worker and `outbox dead` that uses the outbox, with typical parameters."""
TEXT = (sql_folder() / "queries.sql").read_text(encoding="utf-8")
NAMES = re.findall(r"^-- name: (\w+)$", TEXT, re.MULTILINE)
