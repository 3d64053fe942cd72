"""Several session servers: fences that grow over all of them, and repair that nobody hears of."""

from __future__ import annotations

from importlib import import_module

from django.db import migrations

OnPostgreSQL = import_module("deferred_sessions.migrations.0002_layout").OnPostgreSQL
before = import_module("deferred_sessions.migrations.0004_leases")

# A lease that changes hands without a write is known to one server alone. So when another one
# takes over, its fences begin above all that the one before may have given: each change of the
# servers makes room for a million. Where there is one server, the epoch is 0.
EPOCH = """
    CREATE FUNCTION deferred_sessions_epoch() RETURNS bigint LANGUAGE sql STABLE
        SET search_path FROM CURRENT AS $$
        SELECT coalesce(sum(number) - count(*), 0)::bigint << 20 FROM deferred_sessions_server
    $$
"""
DROP_EPOCH = "DROP FUNCTION deferred_sessions_epoch()"

# As 0004 has it, but for the epoch.
HAND_ON = """
    CREATE OR REPLACE FUNCTION deferred_sessions_pass_on(p_key text, p_node text) RETURNS text
        LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
    DECLARE
        heir text;
    BEGIN
        SELECT waiter.node INTO heir
          FROM deferred_sessions_waiter AS waiter
          LEFT JOIN deferred_sessions_node AS node USING (node)
         WHERE waiter.session_key = p_key
           AND waiter.granted_at IS NULL
           AND waiter.seen_at > clock_timestamp() - interval '3 s'
           AND node.died_at IS NULL
         ORDER BY waiter.id
         LIMIT 1;
        heir := coalesce(heir, p_node);
        UPDATE deferred_sessions_session
           SET owner = heir,
               fence = CASE WHEN heir IS NULL THEN fence
                            ELSE greatest(fence + 1, deferred_sessions_epoch()) END
         WHERE session_key = p_key;
        IF heir = p_node THEN
            DELETE FROM deferred_sessions_waiter WHERE session_key = p_key AND node = heir;
        ELSIF heir IS NOT NULL THEN
            UPDATE deferred_sessions_waiter SET granted_at = clock_timestamp()
             WHERE session_key = p_key AND node = heir;
            PERFORM deferred_sessions_tell(heir, 'g');
        END IF;
        RETURN heir;
    END $$
"""
HAND_ON_AS_BEFORE = before.HAND_ON.replace("CREATE", "CREATE OR REPLACE", 1)

# As 0004 has it, but for the epoch: also who has the lease, and knows nothing of the session,
# gets a new fence then, because the server before may have given it others since.
ACQUIRE = """
    CREATE FUNCTION deferred_sessions_acquire(
        p_key text, p_node text, p_waits boolean, p_limit int, p_is_unknown boolean
    ) RETURNS TABLE (status text, row_data deferred_sessions_session)
        LANGUAGE plpgsql SET search_path FROM CURRENT SET lock_timeout = '1s' AS $$
    DECLARE
        known text;
        is_news boolean;
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
                row_data.owner := deferred_sessions_pass_on(p_key, p_node);
                row_data.fence := greatest(row_data.fence + 1, deferred_sessions_epoch());
            END IF;
        END IF;
        IF row_data.owner = p_node THEN
            IF p_is_unknown AND row_data.fence < deferred_sessions_epoch() THEN
                UPDATE deferred_sessions_session SET fence = deferred_sessions_epoch()
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
DROP_ACQUIRE = "DROP FUNCTION deferred_sessions_acquire(text, text, boolean, int, boolean)"

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
        OnPostgreSQL(EPOCH, DROP_EPOCH),
        OnPostgreSQL(HAND_ON, HAND_ON_AS_BEFORE),
        OnPostgreSQL(before.DROP_ACQUIRE, before.ACQUIRE),
        OnPostgreSQL(ACQUIRE, DROP_ACQUIRE),
        OnPostgreSQL(CHANGED, AS_BEFORE),
    ]
