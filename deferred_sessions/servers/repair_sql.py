"""The statements that bring session servers into line with each other, each with its purpose.

Used by `shelf` alone. Invariant: a row is replaced only by a newer one, and removed only as
it was when it was judged; what repair does is nobody's deletion and nobody's change, so no
node hears of it (the setting `deferred_sessions.node` is '-', see migration 0013).
"""

from __future__ import annotations

from typing import Final, LiteralString

PAGE: Final[LiteralString] = """
    SELECT session_key::text, fence, version, date_part('epoch', expire_date),
           date_part('epoch', written_at)
      FROM deferred_sessions_session
     WHERE session_key > %b
     ORDER BY session_key
     LIMIT %b::int8
"""
"""How the next rows stand, in order of keys."""

STAMPS: Final[LiteralString] = """
    SELECT session_key::text, fence, version, date_part('epoch', expire_date),
           date_part('epoch', written_at)
      FROM deferred_sessions_session
     WHERE session_key = ANY(%b::text[])
"""
"""How these rows stand."""

MISSING: Final[LiteralString] = """
    SELECT key
      FROM unnest(%b::text[]) AS key
     WHERE NOT EXISTS (SELECT 1 FROM deferred_sessions_session WHERE session_key = key)
"""
"""Which of these have no row here."""

COUNT: Final[LiteralString] = "SELECT count(*) FROM deferred_sessions_session"
"""How many rows there are, for a bar of progress."""

DELETIONS: Final[LiteralString] = """
    SELECT id, session_key::text, date_part('epoch', made_at)
      FROM deferred_sessions_revocation
     WHERE id > %b AND made_at >= to_timestamp(%b::float8)
     ORDER BY id
     LIMIT %b::int8
"""
"""What was deleted or changed by others, or truncated (no key), since then."""

SEND: Final[LiteralString] = """
    SELECT array_agg(session_key::text), array_agg(session_data), array_agg(expire_date),
           array_agg(version), array_agg(fence), array_agg(owner), array_agg(user_id::text),
           array_agg(created_at), array_agg(written_at)
      FROM (SELECT * FROM deferred_sessions_session
             WHERE session_key = ANY(%b::text[]) ORDER BY session_key) AS sent
"""
"""Whole rows, column by column."""

PUT: Final[LiteralString] = """
    INSERT INTO deferred_sessions_session AS stored
           (session_key, session_data, expire_date, version, fence, owner, user_id, created_at,
            written_at)
    SELECT *
      FROM unnest(%b::text[], %b::text[], %b::timestamptz[], %b::int8[], %b::int8[], %b::text[],
                  %b::text[], %b::timestamptz[], %b::timestamptz[])
     WHERE (SELECT set_config('deferred_sessions.node', '-', true)) IS NOT NULL
       AND (SELECT set_config('lock_timeout', '1s', true)) IS NOT NULL
        ON CONFLICT (session_key) DO UPDATE
       SET session_data = excluded.session_data, expire_date = excluded.expire_date,
           version = excluded.version, fence = excluded.fence, owner = excluded.owner,
           user_id = excluded.user_id, created_at = excluded.created_at,
           written_at = excluded.written_at
     WHERE (stored.fence, stored.version, stored.expire_date)
           < (excluded.fence, excluded.version, excluded.expire_date)
"""
"""Put them in their places, where there is none or an older one."""

REMOVE: Final[LiteralString] = """
    DELETE FROM deferred_sessions_session AS stored
     USING unnest(%b::text[], %b::int8[], %b::int8[]) AS seen (key, fence, version)
     WHERE stored.session_key = seen.key
       AND stored.fence = seen.fence
       AND stored.version = seen.version
       AND (SELECT set_config('deferred_sessions.node', '-', true)) IS NOT NULL
"""
"""Delete rows that do not belong here, unless they have changed since they were looked at."""

ENDED: Final[LiteralString] = """
    SELECT key
      FROM unnest(%b::text[], %b::float8[]) AS asked (key, written_at)
     WHERE key IN (SELECT session_key
                     FROM deferred_sessions_revocation
                    WHERE session_key = ANY(%b::text[]))
        OR to_timestamp(written_at) < (SELECT max(made_at)
                                         FROM deferred_sessions_revocation
                                        WHERE session_key IS NULL
                                          AND made_at > to_timestamp(%b::float8))
"""
"""Which of these sessions, that have no row here, somebody ended; with when they were written,
because who empties the table does not mean what comes later; nor what was elsewhere before that
time."""

ENDED_SINCE: Final[LiteralString] = """
    SELECT DISTINCT key
      FROM unnest(%b::text[], %b::float8[]) AS asked (key, written_at)
      JOIN deferred_sessions_revocation AS revocation
        ON revocation.session_key = key
       AND revocation.made_at > to_timestamp(written_at)
"""
"""Which of these, that have no row here, somebody ended after they were written as they are."""

CLAIM: Final[LiteralString] = """
    UPDATE deferred_sessions_server
       SET repairer = %b, seen_at = clock_timestamp()
     WHERE server = %b AND number = %b
       AND (repairer IN ('', %b) OR seen_at < clock_timestamp() - interval '10 s')
 RETURNING position
"""
"""Be the one who repairs this server, unless another is at it; how far that was."""

NOTE: Final[LiteralString] = """
    UPDATE deferred_sessions_server
       SET position = %b, seen_at = clock_timestamp()
     WHERE server = %b AND number = %b AND repairer = %b
"""
"""How far it is."""

BEGIN: Final[LiteralString] = """
    UPDATE deferred_sessions_server SET position = %b WHERE server = %b AND position = ''
"""
"""Have somebody begin."""

LEAVE: Final[LiteralString] = """
    UPDATE deferred_sessions_server
       SET position = %b, repairer = ''
     WHERE server = %b AND number = %b AND repairer = %b
"""
"""That is done; nobody repairs it now."""

PENDING: Final[LiteralString] = """
    SELECT number, position, repairer
      FROM deferred_sessions_server
     WHERE server = %b AND position <> ''
"""
"""How far the repair of this server is, if it is not finished."""
