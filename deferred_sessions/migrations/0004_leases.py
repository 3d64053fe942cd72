"""Leases: which node may change a session, who waits for it, and what was refused."""

from __future__ import annotations

from importlib import import_module

from django.db import migrations, models
from django.db.models.functions import Now

OnPostgreSQL = import_module("deferred_sessions.migrations.0002_layout").OnPostgreSQL

# One small row per node, rewritten with each heartbeat; and one per node that waits for a
# session. A waiter is alive as long as it looks again every now and then.
TABLES = """
    ALTER TABLE deferred_sessions_node SET (fillfactor = 50);

    CREATE TABLE deferred_sessions_waiter (
        id bigint GENERATED ALWAYS AS IDENTITY,
        session_key text COLLATE "C" NOT NULL,
        node text COLLATE "C" NOT NULL,
        seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        granted_at timestamptz,
        PRIMARY KEY (session_key, node)
    )
"""
DROP_TABLES = "DROP TABLE deferred_sessions_waiter"

# Each node listens on a channel of its own: 'r' says that somebody asks for a session that it
# has, 'g' that it was given one that it waits for. No key travels: keys are secrets.
TELL = """
    CREATE FUNCTION deferred_sessions_tell(p_node text, p_word text) RETURNS void LANGUAGE sql
        AS $$ SELECT pg_notify('deferred_sessions_' || left(md5(p_node), 16), p_word) $$
"""
DROP_TELL = "DROP FUNCTION deferred_sessions_tell(text, text)"

# Whoever is another incarnation of the same node has lost its memory: nobody else can have
# the same name. An owner that never registered is written down here, so that it can be
# watched and be found dead.
IS_FREE = """
    CREATE FUNCTION deferred_sessions_is_free(p_owner text, p_node text) RETURNS boolean
        LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
    DECLARE
        death timestamptz;
    BEGIN
        IF p_owner IS NULL OR split_part(p_owner, '#', 1) = split_part(p_node, '#', 1) THEN
            RETURN true;
        END IF;
        SELECT died_at INTO death FROM deferred_sessions_node WHERE node = p_owner;
        IF NOT FOUND THEN
            INSERT INTO deferred_sessions_node (node) VALUES (p_owner) ON CONFLICT DO NOTHING;
        END IF;
        RETURN death IS NOT NULL;
    END $$
"""
DROP_IS_FREE = "DROP FUNCTION deferred_sessions_is_free(text, text)"

# Gives a lease, whose row the caller has locked, to whoever waits for it and came first;
# p_node counts as the last of them. A waiter that was not seen for three seconds has gone.
HAND_ON = """
    CREATE FUNCTION deferred_sessions_pass_on(p_key text, p_node text) RETURNS text
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
           SET owner = heir, fence = fence + (heir IS NOT NULL)::int
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
DROP_HAND_ON = "DROP FUNCTION deferred_sessions_pass_on(text, text)"

# Says 'granted' with the row; 'queued' with the owner; 'full'; or 'again', because the lease
# changed hands while this looked. Nothing at all if there is no such session. A lease that
# this node has already costs a read. The share lock makes whoever releases the lease look
# again when this waiter can be seen; it does not hold up the owner's flushes. It comes before
# the queue's row, as everywhere, or the two could wait for each other.
ACQUIRE = """
    CREATE FUNCTION deferred_sessions_acquire(
        p_key text, p_node text, p_waits boolean, p_limit int
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
                row_data.fence := row_data.fence + 1;
            END IF;
        END IF;
        IF row_data.owner = p_node THEN
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
DROP_ACQUIRE = "DROP FUNCTION deferred_sessions_acquire(text, text, boolean, int)"

# What was asked for goes to who asked first; the rest is free. Returns the leases that this
# node has not (any more), and whether it gave them up now; what somebody else holds in this
# moment is left for the next time.
RELEASE = """
    CREATE FUNCTION deferred_sessions_release(p_node text, p_keys text[], p_fences bigint[])
        RETURNS TABLE (key text, was_ours boolean) LANGUAGE plpgsql
        SET search_path FROM CURRENT AS $$
    DECLARE
        lease record;
        released text[] := '{}';
    BEGIN
        FOR lease IN
            SELECT stored.session_key
              FROM deferred_sessions_session AS stored
              JOIN unnest(p_keys, p_fences) AS given (key, fence)
                ON stored.session_key = given.key AND stored.fence = given.fence
             WHERE stored.owner = p_node
             ORDER BY stored.session_key
               FOR UPDATE OF stored SKIP LOCKED
        LOOP
            PERFORM deferred_sessions_pass_on(lease.session_key, NULL);
            released := released || lease.session_key::text;
        END LOOP;
        RETURN QUERY
            SELECT given.key, given.key = ANY (released)
              FROM unnest(p_keys, p_fences) AS given (key, fence)
             WHERE NOT EXISTS (
                   SELECT 1 FROM deferred_sessions_session AS stored
                    WHERE stored.session_key = given.key AND stored.fence = given.fence
                      AND stored.owner = p_node);
    END $$
"""
DROP_RELEASE = "DROP FUNCTION deferred_sessions_release(text, text[], bigint[])"

# Who joins ends the earlier incarnations of the same name. A node that was declared dead
# stays so until it has heard of it, and revives itself.
BEAT = """
    CREATE FUNCTION deferred_sessions_beat(p_node text, p_traits jsonb, p_word text)
        RETURNS SETOF deferred_sessions_node LANGUAGE plpgsql
        SET search_path FROM CURRENT AS $$
    BEGIN
        UPDATE deferred_sessions_node
           SET beat = beat + 1, beat_at = clock_timestamp(), traits = p_traits,
               died_at = CASE WHEN p_word = 'revive' THEN NULL ELSE died_at END
         WHERE node = p_node AND (died_at IS NULL OR p_word = 'revive');
        IF NOT FOUND THEN
            INSERT INTO deferred_sessions_node (node, traits) VALUES (p_node, p_traits)
                ON CONFLICT DO NOTHING;
        END IF;
        IF p_word = 'join' THEN
            UPDATE deferred_sessions_node SET died_at = clock_timestamp()
             WHERE split_part(node, '#', 1) = split_part(p_node, '#', 1)
               AND node <> p_node AND died_at IS NULL;
        END IF;
        DELETE FROM deferred_sessions_waiter
         WHERE seen_at < clock_timestamp() - interval '1 min';
        RETURN QUERY SELECT * FROM deferred_sessions_node
                      WHERE died_at IS NULL OR node = p_node;
    END $$
"""
DROP_BEAT = "DROP FUNCTION deferred_sessions_beat(text, jsonb, text)"

# A heartbeat that comes at the same time keeps the node alive.
DECLARE_DEAD = """
    CREATE FUNCTION deferred_sessions_declare_dead(p_node text, p_beat bigint) RETURNS boolean
        LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
    BEGIN
        UPDATE deferred_sessions_node SET died_at = clock_timestamp()
         WHERE node = p_node AND beat = p_beat AND died_at IS NULL;
        IF NOT FOUND THEN
            RETURN false;
        END IF;
        DELETE FROM deferred_sessions_waiter WHERE node = p_node;
        PERFORM deferred_sessions_tell(node, 'g')
           FROM (SELECT DISTINCT node FROM deferred_sessions_waiter) AS waiting;
        DELETE FROM deferred_sessions_node WHERE died_at < now() - interval '30 days';
        RETURN true;
    END $$
"""
DROP_DECLARE_DEAD = "DROP FUNCTION deferred_sessions_declare_dead(text, bigint)"


class Migration(migrations.Migration):
    """Make the tables of nodes, waiters and refused writes, and what works on them."""

    dependencies = [("deferred_sessions", "0003_revocations")]

    operations = [
        migrations.CreateModel(
            name="Node",
            fields=[
                (
                    "node",
                    models.TextField(
                        db_collation="C", primary_key=True, serialize=False, verbose_name="node"
                    ),
                ),
                ("beat", models.BigIntegerField(db_default=0, verbose_name="heartbeats")),
                ("started_at", models.DateTimeField(db_default=Now(), verbose_name="started at")),
                ("beat_at", models.DateTimeField(db_default=Now(), verbose_name="last heartbeat")),
                ("died_at", models.DateTimeField(null=True, verbose_name="found dead at")),
                ("traits", models.JSONField(db_default={}, verbose_name="traits")),
            ],
            options={
                "verbose_name": "node",
                "verbose_name_plural": "nodes",
                "db_table": "deferred_sessions_node",
                "required_db_vendor": "postgresql",
            },
        ),
        migrations.CreateModel(
            name="RefusedWrite",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("session_key", models.CharField(max_length=40, verbose_name="session key")),
                ("node", models.TextField(verbose_name="node")),
                ("fence", models.BigIntegerField(verbose_name="fence")),
                ("version", models.BigIntegerField(verbose_name="version")),
                ("changed_keys", models.JSONField(verbose_name="changed keys")),
                ("session_data", models.TextField(verbose_name="session data")),
                ("owner", models.TextField(verbose_name="owner")),
                ("owner_fence", models.BigIntegerField(verbose_name="fence of the owner")),
                (
                    "refused_at",
                    models.DateTimeField(db_default=Now(), verbose_name="refused at"),
                ),
            ],
            options={
                "verbose_name": "refused write",
                "verbose_name_plural": "refused writes",
                "db_table": "deferred_sessions_refused_write",
                "required_db_vendor": "postgresql",
            },
        ),
        OnPostgreSQL(TABLES, DROP_TABLES),
        OnPostgreSQL(TELL, DROP_TELL),
        OnPostgreSQL(IS_FREE, DROP_IS_FREE),
        OnPostgreSQL(HAND_ON, DROP_HAND_ON),
        OnPostgreSQL(ACQUIRE, DROP_ACQUIRE),
        OnPostgreSQL(RELEASE, DROP_RELEASE),
        OnPostgreSQL(BEAT, DROP_BEAT),
        OnPostgreSQL(DECLARE_DEAD, DROP_DECLARE_DEAD),
    ]
