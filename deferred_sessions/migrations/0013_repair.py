"""Several session servers: fences that grow over all of them, and repair that nobody hears of."""

from __future__ import annotations

from importlib import import_module

from django.db import migrations

OnPostgreSQL = import_module("deferred_sessions.migrations.0002_layout").OnPostgreSQL
before = import_module("deferred_sessions.migrations.0004_leases")

# A lease that changes hands without a write is known to one server alone. So when another one
# takes over, its fences begin above all that the one before may have given: each change of the
# servers makes room for a million. The node that gives up a lease, or asks for one, says which
# epoch it goes by: so the fences of an epoch are all given by the one server that decides about
# the session then. Where there is one server, the epoch is 0; else `written_at` tells that the
# row was given to a node since, and is not left over from an earlier epoch.
HAND_ON = before.HAND_ON.replace("p_node text)", "p_node text, p_epoch bigint)", 1).replace(
    "fence = fence + (heir IS NOT NULL)::int",
    "fence = CASE WHEN heir IS NULL THEN fence ELSE greatest(fence + 1, p_epoch) END,"
    " written_at = CASE WHEN p_epoch > 0 THEN clock_timestamp() ELSE written_at END",
    1,
)
DROP_HAND_ON = "DROP FUNCTION deferred_sessions_pass_on(text, text, bigint)"
RELEASE = before.RELEASE.replace(
    "p_fences bigint[])", "p_fences bigint[], p_epoch bigint)", 1
).replace("(lease.session_key, NULL)", "(lease.session_key, NULL, p_epoch)", 1)
DROP_RELEASE = "DROP FUNCTION deferred_sessions_release(text, text[], bigint[], bigint)"

# As 0004 has it, but for the epoch. Who has the lease already, and knows nothing of the session,
# gets a later fence, too, because the server before may have given it others since: above all of
# those, below what is given to others in this epoch.
ACQUIRE = """
    CREATE FUNCTION deferred_sessions_acquire(
        p_key text, p_node text, p_waits boolean, p_limit int, p_is_unknown boolean, p_epoch bigint
    ) RETURNS TABLE (status text, row_data deferred_sessions_session)
        LANGUAGE plpgsql SET search_path FROM CURRENT SET lock_timeout = '1s' AS $$
    DECLARE
        known text;
    BEGIN
        SELECT * INTO row_data FROM deferred_sessions_session WHERE session_key = p_key;
        IF NOT FOUND THEN
            DELETE FROM deferred_sessions_waiter WHERE session_key = p_key AND p_waits;
            RETURN;
        END IF;
        IF row_data.owner IS DISTINCT FROM p_node
           AND deferred_sessions_is_free(row_data.owner, p_node) THEN
            SELECT * INTO row_data FROM deferred_sessions_session
             WHERE session_key = p_key FOR NO KEY UPDATE;
            IF NOT FOUND THEN
                RETURN;
            END IF;
            IF row_data.owner IS DISTINCT FROM p_node THEN
                IF NOT deferred_sessions_is_free(row_data.owner, p_node) THEN
                    status := 'again';
                    RETURN NEXT;
                    RETURN;
                END IF;
                row_data.owner := deferred_sessions_pass_on(p_key, p_node, p_epoch);
                row_data.fence := greatest(row_data.fence + 1, p_epoch);
            END IF;
        END IF;
        IF row_data.owner = p_node THEN
            IF p_is_unknown AND row_data.fence < p_epoch - 1 THEN
                UPDATE deferred_sessions_session
                   SET fence = p_epoch - 1, written_at = clock_timestamp()
                 WHERE session_key = p_key AND owner = p_node AND fence = row_data.fence
                RETURNING fence INTO row_data.fence;
                IF NOT FOUND THEN
                    status := 'again';
                    RETURN NEXT;
                    RETURN;
                END IF;
            END IF;
            IF p_waits THEN
                DELETE FROM deferred_sessions_waiter WHERE session_key = p_key AND node = p_node;
            END IF;
            status := 'granted';
            RETURN NEXT;
            RETURN;
        END IF;
        IF NOT p_waits AND (SELECT count(*) >= p_limit FROM deferred_sessions_waiter
                             WHERE session_key = p_key) THEN
            status := 'full';
            RETURN NEXT;
            RETURN;
        END IF;
        known := row_data.owner;
        SELECT owner INTO row_data.owner FROM deferred_sessions_session
         WHERE session_key = p_key FOR KEY SHARE;
        IF row_data.owner IS DISTINCT FROM known THEN
            status := 'again';
            RETURN NEXT;
            RETURN;
        END IF;
        DELETE FROM deferred_sessions_waiter
         WHERE session_key = p_key AND node = p_node AND granted_at IS NOT NULL;
        INSERT INTO deferred_sessions_waiter (session_key, node) VALUES (p_key, p_node)
            ON CONFLICT (session_key, node) DO UPDATE SET seen_at = clock_timestamp();
        PERFORM deferred_sessions_tell(known, 'r');
        status := 'queued';
        RETURN NEXT;
    END $$
"""
DROP_ACQUIRE = """
    DROP FUNCTION deferred_sessions_acquire(text, text, boolean, int, boolean, bigint)
"""

# As 0003 has it, but for the first condition: a row whose lease is free has no owner, and is
# still not somebody else's change when it arrives as a copy of what another server has.
CHANGED = """
    CREATE OR REPLACE FUNCTION deferred_sessions_changed() RETURNS trigger LANGUAGE plpgsql
        SET search_path FROM CURRENT AS $$
    BEGIN
        IF current_setting('deferred_sessions.node', true) = '-' THEN
            RETURN NEW;
        END IF;
        NEW.version := OLD.version + 4294967296;
        NEW.owner := NULL;
        INSERT INTO deferred_sessions_revocation (session_key)
             SELECT DISTINCT unnest(ARRAY[OLD.session_key, NEW.session_key]);
        PERFORM pg_notify('deferred_sessions', '');
        RETURN NEW;
    END $$
"""
AS_BEFORE = """
    CREATE OR REPLACE FUNCTION deferred_sessions_changed() RETURNS trigger LANGUAGE plpgsql
        SET search_path FROM CURRENT AS $$
    BEGIN
        NEW.version := OLD.version + 4294967296;
        NEW.owner := NULL;
        INSERT INTO deferred_sessions_revocation (session_key)
             SELECT DISTINCT unnest(ARRAY[OLD.session_key, NEW.session_key]);
        PERFORM pg_notify('deferred_sessions', '');
        RETURN NEW;
    END $$
"""


class Migration(migrations.Migration):
    """Give fences an epoch, and have the trigger of changes keep quiet about repair."""

    dependencies = [("deferred_sessions", "0012_servers")]

    operations = [
        OnPostgreSQL(before.DROP_ACQUIRE, before.ACQUIRE),
        OnPostgreSQL(before.DROP_RELEASE, before.RELEASE),
        OnPostgreSQL(before.DROP_HAND_ON, before.HAND_ON),
        OnPostgreSQL(HAND_ON, DROP_HAND_ON),
        OnPostgreSQL(RELEASE, DROP_RELEASE),
        OnPostgreSQL(ACQUIRE, DROP_ACQUIRE),
        OnPostgreSQL(CHANGED, AS_BEFORE),
    ]
