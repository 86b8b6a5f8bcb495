-- verifications that outlive their outbox row's id
-- depends: 0003_earlier_vacuum

-- Ids of outbox rows repeat, for example after a restore that does not restore the sequence. A verification of another
-- user, or for an address that was changed, then gives up its outbox_id to the new row's; its link stays valid.
ALTER TABLE verify_emails ALTER COLUMN outbox_id DROP NOT NULL;

COMMENT ON COLUMN verify_emails.outbox_id IS
    'The outbox row that sends the mail, so that every attempt finds the same verification and sends the same link; null once another verification has taken its place.';
