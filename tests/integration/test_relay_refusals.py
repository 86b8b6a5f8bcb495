"""If Postgres refuses a duty of a relay, that duty pauses and is logged; the others go on."""

from collections.abc import Iterator
from threading import Thread
from typing import Any, LiteralString

import psycopg
import pytest
import redis
from structlog.testing import capture_logs

from outbox.runtime import postgres
from outbox.runtime.settings import RelaySettings
from outbox.runtime.stop import Stop
from outbox_relay.loop import Relay
from tests.conftest import Connection
from tests.support.rows import add_row
from tests.support.waiting import eventually

REFUSING = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not this one'; END $$;
"""
AT_ONCE = "CREATE TRIGGER refusing BEFORE UPDATE ON outbox FOR EACH ROW WHEN (NEW.id = 3) EXECUTE FUNCTION refuse()"
AT_THE_COMMIT = """
CREATE CONSTRAINT TRIGGER refusing AFTER UPDATE ON outbox DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW WHEN (NEW.id = 3) EXECUTE FUNCTION refuse()
"""


@pytest.fixture
def settings(relay_settings: RelaySettings, request: pytest.FixtureRequest) -> RelaySettings:
    """Settings of a relay; with a true parameter, as behind a pooler, where the role's limits hold."""
    pooled = {"transaction_pooling": getattr(request, "param", False)}
    return relay_settings.model_copy(update={"poll_interval": 0.2, "sweep_interval": 0.5, "batch": 32, **pooled})


@pytest.fixture
def lines(settings: RelaySettings, redis_client: redis.Redis) -> Iterator[list[Any]]:
    """The log lines of a relay that runs in a thread until the test ends and never loses Postgres."""
    stop = Stop()
    with capture_logs() as captured:
        thread = Thread(target=Relay(settings, stop).run, name="relay", daemon=True)
        thread.start()
        try:
            yield captured
            assert thread.is_alive(), captured
        finally:
            stop.request()
            thread.join(10)


def statuses(connection: Connection) -> list[str]:
    """Returns the rows' statuses, in order."""
    return [row["status"] for row in connection.execute("SELECT status FROM outbox ORDER BY id")]


def named(lines: list[Any], event: str) -> list[Any]:
    """Returns the rows that the lines of an event list."""
    return [line["rows"] for line in lines if line["event"] == event]


def is_handed_over(connection: Connection, status: str = "enqueued") -> bool:
    """Adds a row, and returns whether it is handed over within seconds."""
    row = add_row(connection, status="pending", delivery=0)
    found = "SELECT status FROM outbox WHERE id = %s"
    return bool(eventually(lambda: connection.execute(found, [row.row_id]).fetchone() == {"status": status}, 5))


@pytest.mark.parametrize("trigger", [AT_ONCE, AT_THE_COMMIT], ids=["at once", "at the commit"])
def test_a_row_that_cannot_be_handed_over_keeps_no_other_from_it(
    connection: Connection, trigger: LiteralString, request: pytest.FixtureRequest
) -> None:
    """A row that a trigger refuses is logged, and handed over once the trigger allows it."""
    connection.execute(REFUSING)
    connection.execute(trigger)
    for _ in range(8):
        add_row(connection, status="pending", delivery=0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("outbox_relay.hand_over.LEFT_OUT", 2.0)
        lines: list[Any] = request.getfixturevalue("lines")
    eventually(lambda: statuses(connection) == ["enqueued"] * 2 + ["pending"] + ["enqueued"] * 5, 10)
    assert is_handed_over(connection)
    assert named(lines, "rows cannot be handed over")[0] == [3]
    connection.execute("DROP TRIGGER refusing ON outbox")
    eventually(lambda: set(statuses(connection)) == {"enqueued"}, 10)
    assert not [line for line in lines if line["event"] == "Postgres is away"]


def test_a_row_that_cannot_be_swept_keeps_no_other_from_it(
    connection: Connection, request: pytest.FixtureRequest
) -> None:
    """A trigger refuses one row: the others are taken back and handed over again."""
    connection.execute(REFUSING)
    connection.execute(AT_ONCE)
    for _ in range(5):
        add_row(connection)
    connection.execute("UPDATE outbox SET enqueued_at = now() - interval '1 minute' WHERE id <> 3")
    connection.execute("ALTER TABLE outbox DISABLE TRIGGER refusing")
    connection.execute("UPDATE outbox SET enqueued_at = now() - interval '1 minute' WHERE id = 3")
    connection.execute("ALTER TABLE outbox ENABLE TRIGGER refusing")
    lines: list[Any] = request.getfixturevalue("lines")
    handed = "SELECT count(*) AS rows FROM outbox WHERE delivery = 2 AND status = 'enqueued'"
    eventually(lambda: connection.execute(handed).fetchone() == {"rows": 4}, 10)
    assert named(lines, "rows cannot be swept") == [[3]]
    assert not [line for line in lines if line["event"] == "Postgres is away"]


DONE = """
INSERT INTO outbox (task, payload, status, done_at)
SELECT 't', '{}', 'done', now() - interval '1 year' FROM generate_series(1, 10);
"""


def test_a_locked_child_row_holds_up_nobody(
    connection: Connection, database_url: str, request: pytest.FixtureRequest
) -> None:
    """A locked row would be deleted with an old one: the other old rows go, and that one when the lock is released."""
    connection.execute(DONE)
    connection.execute("CREATE TABLE audit (outbox_id bigint REFERENCES outbox ON DELETE CASCADE)")
    connection.execute("INSERT INTO audit SELECT id FROM outbox")
    with postgres.connect(database_url, "test") as other, pytest.MonkeyPatch.context() as patched:
        patched.setattr("outbox_relay.retention.LEFT_OUT", 1.0)
        patched.setattr("outbox_relay.retention.INTERVAL", 0.5)
        with other.transaction():
            other.execute("SELECT FROM audit WHERE outbox_id = 1 FOR UPDATE")
            lines: list[Any] = request.getfixturevalue("lines")
            eventually(lambda: statuses(connection) == ["done"], 10, "the others are deleted")
            assert is_handed_over(connection)
        eventually(lambda: statuses(connection) == ["enqueued"], 10, "the last one is deleted")
    assert {"LockNotAvailable"} == {
        line["error"].partition(":")[0] for line in lines if line["event"] == "done rows cannot be deleted"
    }
    assert not [line for line in lines if line["event"] in {"Postgres is away", "rescue paused"}]


def test_a_foreign_key_keeps_its_own_row_alone(connection: Connection, request: pytest.FixtureRequest) -> None:
    """Without ON DELETE, the row that it refers to stays and is logged, and the others are deleted."""
    connection.execute(DONE)
    connection.execute("CREATE TABLE audit (outbox_id bigint REFERENCES outbox)")
    connection.execute("INSERT INTO audit VALUES (1)")
    lines: list[Any] = request.getfixturevalue("lines")
    eventually(lambda: statuses(connection) == ["done"], 10, "the others are deleted")
    assert named(lines, "done rows cannot be deleted") == [[1]]


FULL = """
CREATE FUNCTION fill_the_disk() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE 'No space left on device' USING ERRCODE = 'disk_full'; END $$;
CREATE TRIGGER full_disk BEFORE DELETE ON outbox FOR EACH STATEMENT EXECUTE FUNCTION fill_the_disk();
"""


def test_a_duty_that_is_refused_is_one_line(connection: Connection, request: pytest.FixtureRequest) -> None:
    """It is tried again and again; the other duties are done, and in the end this one too."""
    connection.execute(DONE)
    connection.execute(FULL)
    lines: list[Any] = request.getfixturevalue("lines")
    eventually(lambda: [line for line in lines if line["event"] == "duty refused"], 10)
    for _ in range(3):
        assert is_handed_over(connection)
    connection.execute("DROP TRIGGER full_disk ON outbox")
    eventually(lambda: "done" not in statuses(connection), 10)
    assert [line["duty"] for line in lines if line["event"] == "duty refused"] == ["retention"]
    assert not [line for line in lines if line["event"] == "Postgres is away"]


SLOW = """
CREATE FUNCTION take_long() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.05); RETURN NEW; END $$;
CREATE TRIGGER slow BEFORE UPDATE ON outbox FOR EACH ROW EXECUTE FUNCTION take_long();
"""


@pytest.mark.parametrize(
    ("settings", "limited_by"), [(True, "the server"), (False, "the relay")], indirect=["settings"]
)
@pytest.mark.usefixtures("settings")
def test_a_batch_that_was_cut_is_tried_smaller(
    connection: Connection, limited_by: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is a `statement_timeout`, or the relay's own wait for an answer, which closes the connection."""
    connection.execute(SLOW)
    connection.execute("INSERT INTO outbox (task, payload) SELECT 't', '{}' FROM generate_series(1, 32)")
    if limited_by == "the server":
        name = psycopg.sql.Identifier(connection.info.dbname)
        connection.execute(psycopg.sql.SQL("ALTER DATABASE {} SET statement_timeout = '500ms'").format(name))
    else:
        monkeypatch.setattr(postgres, "ANSWER_LIMIT", 0.5)
    request.getfixturevalue("lines")
    eventually(lambda: set(statuses(connection)) == {"enqueued"}, 20)
    batches = connection.execute("SELECT DISTINCT enqueued_at FROM outbox").fetchall()
    assert len(batches) > 1, "all in one take 1.6 s"
