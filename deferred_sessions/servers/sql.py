"""Every statement this package sends to PostgreSQL, each with its purpose.

Used by `server` alone. Invariant: a deferred write is an UPDATE guarded by version
and fence, never an upsert; a row that somebody deleted does not come back. All
statements are single and set-based, so that one row and a thousand cost one trip; the
writing ones return a count, because nearly always it says that all rows were taken.

`%b` asks psycopg for binary parameters, which halves the cost of long arrays
(Django's own cursor takes it as `%s`). Times travel as Unix seconds, so that neither
USE_TZ nor the connection's time zone matters.
"""

from __future__ import annotations

from typing import Final, LiteralString

READ: Final[LiteralString] = """
    SELECT session_data, extract(epoch FROM expire_date)::float8, version, fence,
           user_id, extract(epoch FROM created_at)::float8,
           extract(epoch FROM written_at)::float8, coalesce(owner, ''),
           (pg_current_xact_id_if_assigned() IS NULL
            OR age(xmin) > age(pg_current_xact_id_if_assigned()::xid))
           AND current_setting('transaction_isolation') = 'read committed'
      FROM deferred_sessions_session
     WHERE session_key = %b
"""
"""One session, expired or not: the caller knows what time it is. The last column tells
that the row is older than what the transaction has written, and the latest."""

EXISTS: Final[LiteralString] = """
    SELECT 1
      FROM deferred_sessions_session
     WHERE session_key = %b AND expire_date > to_timestamp(%b::float8)
"""
"""Whether a live session has this key."""

INSERT: Final[LiteralString] = """
    INSERT INTO deferred_sessions_session
           (session_key, session_data, expire_date, version, fence, user_id, created_at,
            owner, written_at)
    SELECT key, data, to_timestamp(expires_at), version, fence, nullif(user_id, ''),
           to_timestamp(created_at), %b, to_timestamp(%b::float8)
      FROM unnest(%b::text[], %b::text[], %b::float8[], %b::int8[], %b::int8[],
                  %b::text[], %b::float8[])
           AS new (key, data, expires_at, version, fence, user_id, created_at)
        ON CONFLICT (session_key) DO NOTHING
"""
"""Create sessions; a key that is taken is not changed and not counted."""

ADOPT: Final[LiteralString] = """
    WITH new AS (
         SELECT *
           FROM unnest(%b::text[], %b::text[], %b::float8[], %b::int8[], %b::int8[],
                       %b::text[], %b::float8[])
                AS new (key, data, expires_at, version, fence, user_id, created_at)),
    taken AS (
         INSERT INTO deferred_sessions_adopted (session_key, expires_at)
         SELECT key, to_timestamp(expires_at) FROM new ORDER BY key
             ON CONFLICT (session_key) DO NOTHING
         RETURNING session_key)
    INSERT INTO deferred_sessions_session
           (session_key, session_data, expire_date, version, fence, user_id, created_at,
            owner, written_at)
    SELECT key, data, to_timestamp(expires_at), version, fence, nullif(user_id, ''),
           to_timestamp(created_at), nullif(%b::text, ''), to_timestamp(%b::float8)
      FROM new JOIN taken ON taken.session_key = new.key
        ON CONFLICT (session_key) DO NOTHING
     RETURNING 1
"""
"""Create sessions that came from another engine, each once in its life."""

SPEND: Final[LiteralString] = """
    INSERT INTO deferred_sessions_adopted (session_key, expires_at)
    SELECT key, to_timestamp(%b::float8) FROM unnest(%b::text[]) AS key
        ON CONFLICT (session_key) DO NOTHING
"""
"""Have sessions that are being deleted not come from another engine any more."""

SPENT: Final[LiteralString] = """
    SELECT session_key
      FROM deferred_sessions_adopted
     WHERE session_key = ANY(%b::text[])
 UNION ALL
    SELECT session_key
      FROM deferred_sessions_session
     WHERE session_key = ANY(%b::text[])
"""
"""Which of these sessions are here, or were once."""

PRUNE_ADOPTED: Final[LiteralString] = """
    DELETE FROM deferred_sessions_adopted
     WHERE expires_at < to_timestamp(%b::float8)
"""
"""Forget which sessions were taken over, when the other engine cannot have them any more."""

COUNT_WRITTEN: Final[LiteralString] = """
    SELECT count(*)
      FROM deferred_sessions_session
     WHERE expire_date > to_timestamp(%b::float8) AND written_at >= to_timestamp(%b::float8)
"""
"""How many sessions are to be copied to another table."""

WRITTEN: Final[LiteralString] = """
    SELECT session_key, session_data, extract(epoch FROM expire_date)::float8
      FROM deferred_sessions_session
     WHERE session_key > %b
       AND expire_date > to_timestamp(%b::float8) AND written_at >= to_timestamp(%b::float8)
     ORDER BY session_key
     LIMIT %b::int8
"""
"""The next of these, to be copied to another database."""

EXPORT: Final[LiteralString] = """
    WITH page AS MATERIALIZED (
         SELECT session_key, session_data, expire_date
           FROM deferred_sessions_session
          WHERE session_key > %b
            AND expire_date > to_timestamp(%b::float8) AND written_at >= to_timestamp(%b::float8)
          ORDER BY session_key
          LIMIT %b::int8),
    written AS (
         INSERT INTO django_session AS theirs (session_key, session_data, expire_date)
         SELECT session_key, session_data, expire_date FROM page ORDER BY session_key
             ON CONFLICT (session_key) DO UPDATE
            SET session_data = excluded.session_data, expire_date = excluded.expire_date
          WHERE (theirs.session_data, theirs.expire_date)
                IS DISTINCT FROM (excluded.session_data, excluded.expire_date)
         RETURNING session_key)
    SELECT page.session_key, written.session_key IS NOT NULL
      FROM page LEFT JOIN written ON written.session_key COLLATE "C" = page.session_key
     ORDER BY page.session_key
"""
"""Copy the next of these to a table of Django's (its name is put in), and tell which differed."""

GONE: Final[LiteralString] = """
    SELECT DISTINCT session_key
      FROM deferred_sessions_revocation AS revocation
     WHERE session_key IS NOT NULL
       AND NOT EXISTS (SELECT 1
                         FROM deferred_sessions_session AS stored
                        WHERE stored.session_key = revocation.session_key)
"""
"""What was deleted here, as far as is remembered."""

UPDATE: Final[LiteralString] = """
    UPDATE deferred_sessions_session AS stored
       SET session_data = new.data, expire_date = to_timestamp(new.expires_at),
           version = new.version, fence = new.fence, user_id = nullif(new.user_id, ''),
           owner = %b, written_at = to_timestamp(%b::float8)
      FROM unnest(%b::text[], %b::text[], %b::float8[], %b::int8[], %b::int8[], %b::text[])
           AS new (key, data, expires_at, version, fence, user_id)
     WHERE stored.session_key = ANY(ARRAY[new.key])
       AND (stored.version < new.version
            OR (stored.version = new.version AND stored.fence < new.fence))
       AND (stored.fence < new.fence
            OR (stored.fence = new.fence
                AND (stored.owner IS NULL OR starts_with(stored.owner, %b))))
"""
"""Write changed sessions. Not counted: deleted, newer, or fenced; ask STATES. A fence is given
to one node; a failover that forgets some grants may make PostgreSQL give it again: then to
have the name of the row's owner decides. The same version under a later fence is news, too: of
who has the lease, to a server that did not give it.

`= ANY(ARRAY[...])` is `=` for which there is no hash join: each row is found by its key, in the
order of the keys, which is that in which all lock. For a batch that is some percent of the table
PostgreSQL would read the whole table otherwise, again and again."""

UPDATE_ALONE: Final[LiteralString] = (
    UPDATE + "       AND (SELECT set_config('lock_timeout', '1s', true)) IS NOT NULL"
)
"""UPDATE as a transaction of its own, which gives up on rows that others hold."""

TOUCH: Final[LiteralString] = """
    UPDATE deferred_sessions_session AS stored
       SET expire_date = greatest(stored.expire_date, to_timestamp(new.expires_at)),
           fence = new.fence, owner = %b, written_at = to_timestamp(%b::float8)
      FROM unnest(%b::text[], %b::float8[], %b::int8[], %b::int8[])
           AS new (key, expires_at, version, fence)
     WHERE stored.session_key = ANY(ARRAY[new.key])
       AND stored.version = ANY(ARRAY[new.version])
       AND (stored.fence < new.fence
            OR (stored.fence = new.fence
                AND (stored.owner IS NULL OR starts_with(stored.owner, %b))))
"""
"""Write a later expiry of sessions whose data PostgreSQL has already; each found by its key, and
not joined by version, which many have in common."""

DELETE: Final[LiteralString] = """
    DELETE FROM deferred_sessions_session
     WHERE session_key = ANY(%b::text[])
       AND (SELECT set_config('deferred_sessions.node', %b, true)) IS NOT NULL
"""
"""Delete sessions; those that are not there are fine. The trigger learns who does it."""

STATES: Final[LiteralString] = """
    SELECT session_key, version, fence, coalesce(owner, ''),
           extract(epoch FROM expire_date)::float8, session_data
      FROM deferred_sessions_session
     WHERE session_key = ANY(%b::text[])
"""
"""Why a guarded write did not take these keys."""

UNLOCKED: Final[LiteralString] = """
    SELECT session_key
      FROM deferred_sessions_session
     WHERE session_key = ANY(%b::text[])
       FOR NO KEY UPDATE SKIP LOCKED
"""
"""Which of these rows no transaction holds."""

CLEAR_EXPIRED: Final[LiteralString] = """
    DELETE FROM deferred_sessions_session
     WHERE session_key IN (
           SELECT session_key
             FROM deferred_sessions_session AS stored
            WHERE expire_day <= (to_timestamp(%b::float8) AT TIME ZONE 'UTC')::date
              AND expire_date < to_timestamp(%b::float8)
              AND (expire_date < to_timestamp(%b::float8)
                   OR owner IS NULL
                   OR starts_with(owner, %b)
                   OR EXISTS (SELECT 1
                                FROM deferred_sessions_node AS node
                               WHERE node.node = stored.owner AND died_at IS NOT NULL))
              AND session_key <> ALL(%b::text[])
            LIMIT %b::int8
              FOR UPDATE OF stored SKIP LOCKED)
       AND (SELECT set_config('deferred_sessions.node', '-', true)) IS NOT NULL
"""
"""Delete a batch of expired sessions: the coarse day is indexed, the exact time is not.
What another node has a lease of, and may have extended in its memory, has until the second
time. Nobody needs to hear of it."""

REVOCATIONS: Final[LiteralString] = """
    SELECT id, xid::text::int8, session_key, node, extract(epoch FROM made_at)::float8,
           pg_snapshot_xmin(pg_current_snapshot())::text::int8, pg_postmaster_start_time()::text
      FROM (SELECT 1) AS one
      LEFT JOIN deferred_sessions_revocation ON xid >= (%b::int8)::text::xid8
     ORDER BY id
"""
"""What others did since a transaction, the oldest one that is still open, and which server
process says so: another one may lack what this one had (failover, recovery)."""

REVOKED: Final[LiteralString] = """
    SELECT key
      FROM unnest(%b::text[]) AS key
     WHERE key IN (SELECT session_key
                     FROM deferred_sessions_revocation
                    WHERE session_key = ANY(%b::text[]))
        OR EXISTS (SELECT 1
                     FROM deferred_sessions_revocation
                    WHERE session_key IS NULL)
"""
"""Which of these keys somebody deleted or changed, as far as is remembered."""

REVOKED_SINCE: Final[LiteralString] = """
    SELECT session.key
      FROM unnest(%b::text[], %b::float8[]) AS session (key, created)
     WHERE session.key IN (SELECT session_key
                             FROM deferred_sessions_revocation
                            WHERE session_key = ANY(%b::text[]))
        OR to_timestamp(session.created) < (SELECT max(made_at)
                                              FROM deferred_sessions_revocation
                                             WHERE session_key IS NULL)
"""
"""The same, but an end of all sessions is one of those alone that were there."""

VERSIONS: Final[LiteralString] = """
    SELECT session_key, version
      FROM deferred_sessions_session
     WHERE session_key = ANY(%b::text[])
"""
"""What stands in the rows of many sessions, without their data."""

PRUNE_REVOCATIONS: Final[LiteralString] = """
    DELETE FROM deferred_sessions_revocation
     WHERE made_at < to_timestamp(%b::float8)
"""
"""Remove what every node has had time to read."""

ACQUIRE: Final[LiteralString] = """
    SELECT status, (found).owner,
           CASE status WHEN 'granted' THEN (found).session_data END,
           extract(epoch FROM (found).expire_date)::float8, (found).version, (found).fence,
           (found).user_id, extract(epoch FROM (found).created_at)::float8,
           extract(epoch FROM (found).written_at)::float8
      FROM deferred_sessions_acquire(%b, %b, %b, %b, %b, %b) AS acquired (status, found)
"""
"""Ask for the lease of a session: the row if this node has it now, else a place in the queue.
Nothing if there is no such session."""

WITHDRAW: Final[LiteralString] = """
    DELETE FROM deferred_sessions_waiter
     WHERE session_key = %b AND node = %b AND granted_at IS NULL
"""
"""Leave the queue."""

REQUESTED: Final[LiteralString] = """
    SELECT session_key, fence
      FROM deferred_sessions_session AS stored
     WHERE owner = %b
       AND session_key = ANY (ARRAY(
           SELECT session_key
             FROM deferred_sessions_waiter AS waiter
            WHERE waiter.node <> %b
              AND waiter.granted_at IS NULL
              AND waiter.seen_at > clock_timestamp() - interval '3 s'))
       AND NOT EXISTS (
           SELECT 1
             FROM deferred_sessions_waiter AS granted
            WHERE granted.session_key = stored.session_key
              AND granted.node = %b
              AND granted.granted_at > clock_timestamp() - interval '2 s')
"""
"""The leases of this node that others wait for, but for those that were given to it a moment
ago and which it has not fetched yet. The node is a parameter each time, or the keys could not
be looked up in the index."""

RELEASE: Final[LiteralString] = """
    SELECT * FROM deferred_sessions_release(%b, %b::text[], %b::int8[], %b)
"""
"""Give leases to those who wait for them, or to nobody."""

HELD: Final[LiteralString] = """
    SELECT session_key, fence
      FROM deferred_sessions_session
     WHERE owner = %b AND session_key > %b
     ORDER BY session_key
     LIMIT %b
"""
"""The leases of a node, in order of keys; reads the whole table."""

BEAT: Final[LiteralString] = """
    SELECT node, beat, died_at IS NOT NULL, traits::text
      FROM deferred_sessions_beat(%b, %b::jsonb, %b)
"""
"""Say that this node lives; who else does, and whether somebody found it dead."""

DECLARE_DEAD: Final[LiteralString] = "SELECT deferred_sessions_declare_dead(%b, %b::int8)"
"""A node has not been heard of for too long; its leases are free, unless it beats just now."""

NAMESAKES: Final[LiteralString] = """
    SELECT DISTINCT split_part(earlier.node, '#', 1)
      FROM deferred_sessions_node AS earlier
      JOIN deferred_sessions_node AS later
        ON split_part(later.node, '#', 1) = split_part(earlier.node, '#', 1)
       AND later.node <> earlier.node
       AND earlier.started_at <= later.started_at AND later.started_at < earlier.beat_at
       AND later.beat > 0
     WHERE least(earlier.beat_at, later.beat_at) > now() - interval '1 hour'
     ORDER BY 1
"""
"""Names under which one incarnation was heard of after the next one had begun: a host that is
started anew never is."""

REFUSE: Final[LiteralString] = """
    INSERT INTO deferred_sessions_refused_write
           (session_key, node, fence, version, changed_keys, session_data, owner, owner_fence)
    SELECT key, %b, fence, version, changed_keys::jsonb, data, owner, owner_fence
      FROM unnest(%b::text[], %b::int8[], %b::int8[], %b::text[], %b::text[], %b::text[],
                  %b::int8[])
           AS refused (key, fence, version, changed_keys, data, owner, owner_fence)
"""
"""Keep for inspection what was refused because the session had passed to another node."""

LOCK_TIMEOUT: Final[LiteralString] = "SELECT set_config('lock_timeout', %b, true)"
"""Give up on rows an application transaction holds, for this transaction only."""

SAVEPOINT: Final[LiteralString] = "SAVEPOINT deferred_sessions"
ROLLBACK_TO_SAVEPOINT: Final[LiteralString] = "ROLLBACK TO SAVEPOINT deferred_sessions"
RELEASE_SAVEPOINT: Final[LiteralString] = "RELEASE SAVEPOINT deferred_sessions"
"""Around a write in the application's transaction whose failure it shall survive."""
