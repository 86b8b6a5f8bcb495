-- Records every transition of an outbox row, in the transaction that makes it, so that the table holds what was
-- committed. Rows are locked until the commit: for one row, `seq` is the order of the commits.
CREATE UNLOGGED TABLE transition (
    seq          bigint      GENERATED ALWAYS AS IDENTITY,
    xid          xid8        NOT NULL DEFAULT pg_current_xact_id(),
    actor        text        NOT NULL DEFAULT current_setting('schedules.actor'),
    at           float8      NOT NULL DEFAULT extract(epoch FROM clock_timestamp()),
    old          jsonb,
    new          jsonb,
    run_at       float8,
    was_due      boolean,
    lease_passed boolean,
    was_kept     boolean
);

CREATE FUNCTION record_transition() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO transition (old, new, run_at, was_due, lease_passed, was_kept)
    VALUES (
        CASE WHEN TG_OP <> 'INSERT' THEN to_jsonb(OLD) END,
        CASE WHEN TG_OP <> 'DELETE' THEN to_jsonb(NEW) END,
        CASE WHEN TG_OP <> 'DELETE' THEN extract(epoch FROM NEW.run_at) END,
        CASE WHEN TG_OP <> 'INSERT' THEN OLD.run_at <= clock_timestamp() END,
        CASE WHEN TG_OP <> 'INSERT' THEN OLD.lease_until NOT BETWEEN clock_timestamp()
                                         AND clock_timestamp() + interval '299 s' END,
        CASE WHEN TG_OP <> 'INSERT' THEN OLD.done_at >= clock_timestamp() - interval '86399 s' END
    );
    RETURN NULL;
END
$$;

CREATE TRIGGER record_transition AFTER INSERT OR UPDATE OR DELETE ON outbox
    FOR EACH ROW EXECUTE FUNCTION record_transition();

-- A copy of the table, as in a dump.
CREATE UNLOGGED TABLE copy (LIKE outbox);
