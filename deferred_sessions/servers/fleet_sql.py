"""The statements that several session servers need, each with its purpose.

Used by `registry`, `copies` and `lookup`; what a single server needs is in `sql`. Invariant:
what is written here has been accepted by the authority of the session before, or is copied
from a row; so it may be an upsert, guarded by fence and version.
"""

from __future__ import annotations

from typing import Final, LiteralString

READ_REGISTRY: Final[LiteralString] = """
    SELECT server, number, phase, extract(epoch FROM since)::float8
      FROM deferred_sessions_server
"""
"""How all servers stand, as far as this one has heard."""

WRITE_REGISTRY: Final[LiteralString] = """
    INSERT INTO deferred_sessions_server AS known (server, number, phase, since)
    SELECT server, number, phase, to_timestamp(since)
      FROM unnest(%b::text[], %b::int8[], %b::text[], %b::float8[])
           AS new (server, number, phase, since)
     ORDER BY server
        ON CONFLICT (server) DO UPDATE
       SET number = excluded.number, phase = excluded.phase, since = excluded.since
     WHERE known.number < excluded.number
        OR (known.number = excluded.number
            AND (coalesce(array_position(ARRAY['gone', 'out', 'leaving', 'filling', 'in'],
                                         known.phase), 0), known.phase COLLATE "C")
                > (coalesce(array_position(ARRAY['gone', 'out', 'leaving', 'filling', 'in'],
                                           excluded.phase), 0), excluded.phase COLLATE "C"))
"""
"""Tell a server how others stand. What it knows of later stays; of two changes with one number
that which trusts less counts: see `standing`."""

HAS_SESSIONS: Final[LiteralString] = """
    SELECT EXISTS (SELECT 1 FROM deferred_sessions_session)
"""
"""Whether this server has been used before."""

COPY: Final[LiteralString] = """
    INSERT INTO deferred_sessions_session AS stored
           (session_key, session_data, expire_date, version, fence, user_id, created_at,
            owner, written_at)
    SELECT key, data, to_timestamp(expires_at), version, fence, nullif(user_id, ''),
           to_timestamp(created_at), owner, to_timestamp(written_at)
      FROM unnest(%b::text[], %b::text[], %b::float8[], %b::int8[], %b::int8[],
                  %b::text[], %b::float8[], %b::text[], %b::float8[])
           AS new (key, data, expires_at, version, fence, user_id, created_at, owner, written_at)
     WHERE (SELECT set_config('deferred_sessions.node', '-', true)) IS NOT NULL
     ORDER BY key
        ON CONFLICT (session_key) DO UPDATE
       SET session_data = excluded.session_data, expire_date = excluded.expire_date,
           version = excluded.version, fence = excluded.fence, user_id = excluded.user_id,
           owner = excluded.owner, written_at = excluded.written_at
     WHERE (stored.fence, stored.version, stored.expire_date)
           < (excluded.fence, excluded.version, excluded.expire_date)
"""
"""Make a further server have what the authority has, unless it has something later. Columns
are those of INSERT, then the owner and when it was written. A row without an owner is not
somebody else's change, see migration 0013."""

POSITIONS: Final[LiteralString] = """
    SELECT session_key, version, fence, extract(epoch FROM written_at)::float8
      FROM deferred_sessions_session
     WHERE session_key = ANY(%b::text[])
"""
"""What stands in the rows of many sessions, and since when."""

FIND: Final[LiteralString] = """
    SELECT session_data, extract(epoch FROM expire_date)::float8, version, fence,
           coalesce(user_id, ''), extract(epoch FROM created_at)::float8, owner,
           extract(epoch FROM written_at)::float8
      FROM deferred_sessions_session
     WHERE session_key = %b
"""
"""One session, to be copied to where it belongs."""

REVOKED: Final[LiteralString] = """
    SELECT coalesce(max(id), 0)::int8
      FROM deferred_sessions_revocation
     WHERE session_key = %b
"""
"""The number of the last time that somebody deleted or changed a session here."""

RECORD_DELETION: Final[LiteralString] = """
    WITH recorded AS (
         INSERT INTO deferred_sessions_revocation (session_key, node)
         SELECT key, %b FROM unnest(%b::text[]) AS key)
    SELECT pg_notify('deferred_sessions', '')
"""
"""Remember a deletion where there may be no row to delete: a node may yet come with one."""

REMOVE: Final[LiteralString] = """
    DELETE FROM deferred_sessions_session
     WHERE session_key = ANY(%b::text[])
       AND (SELECT set_config('deferred_sessions.node', '-', true)) IS NOT NULL
"""
"""Repair: remove rows that nobody needs to hear of."""
