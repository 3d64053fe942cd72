"""Record what others delete or change, so that every node hears of it."""

from __future__ import annotations

from importlib import import_module

from django.db import migrations

OnPostgreSQL = import_module("deferred_sessions.migrations.0002_layout").OnPostgreSQL

# `xid` tells in which transaction a revocation was made: identifiers are given out before
# the commit, so whoever reads only what is above the last one may miss some.
TABLE = """
    CREATE TABLE deferred_sessions_revocation (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
        session_key text COLLATE "C",
        node text NOT NULL DEFAULT '',
        made_at timestamptz NOT NULL DEFAULT now()
    );
    CREATE INDEX deferred_sessions_revocation_xid ON deferred_sessions_revocation (xid)
"""
DROP_TABLE = "DROP TABLE deferred_sessions_revocation"

# Our own statements say who deletes, in a setting that the first trigger takes away again;
# '-' is the deletion of what has expired, which nobody needs to hear of. A row is changed by
# others if no node's name comes with it (the model), or if neither version nor time moves. Its
# version makes a big step, past whatever nodes have in memory and have not flushed.
REVOKE = """
    CREATE FUNCTION deferred_sessions_deleted() RETURNS trigger LANGUAGE plpgsql
        SET search_path FROM CURRENT AS $$
    DECLARE
        deleter text := coalesce(current_setting('deferred_sessions.node', true), '');
    BEGIN
        PERFORM set_config('deferred_sessions.node', '', true);
        IF deleter = '-' THEN
            RETURN NULL;
        END IF;
        INSERT INTO deferred_sessions_revocation (session_key, node)
             SELECT session_key, deleter FROM gone;
        IF FOUND THEN
            PERFORM pg_notify('deferred_sessions', '');
        END IF;
        RETURN NULL;
    END $$;

    CREATE FUNCTION deferred_sessions_truncated() RETURNS trigger LANGUAGE plpgsql
        SET search_path FROM CURRENT AS $$
    BEGIN
        INSERT INTO deferred_sessions_revocation (session_key) VALUES (NULL);
        PERFORM pg_notify('deferred_sessions', '');
        RETURN NULL;
    END $$;

    CREATE FUNCTION deferred_sessions_changed() RETURNS trigger LANGUAGE plpgsql
        SET search_path FROM CURRENT AS $$
    BEGIN
        NEW.version := OLD.version + 4294967296;
        NEW.owner := NULL;
        INSERT INTO deferred_sessions_revocation (session_key)
             SELECT DISTINCT unnest(ARRAY[OLD.session_key, NEW.session_key]);
        PERFORM pg_notify('deferred_sessions', '');
        RETURN NEW;
    END $$;

    CREATE TRIGGER deferred_sessions_deleted AFTER DELETE ON deferred_sessions_session
        REFERENCING OLD TABLE AS gone
        FOR EACH STATEMENT EXECUTE FUNCTION deferred_sessions_deleted();

    CREATE TRIGGER deferred_sessions_truncated AFTER TRUNCATE ON deferred_sessions_session
        FOR EACH STATEMENT EXECUTE FUNCTION deferred_sessions_truncated();

    CREATE TRIGGER deferred_sessions_changed BEFORE UPDATE ON deferred_sessions_session
        FOR EACH ROW
        WHEN ((NEW.owner IS NULL
               OR (NEW.version = OLD.version AND NEW.written_at = OLD.written_at))
              AND (NEW.session_key, NEW.session_data, NEW.expire_date)
                  IS DISTINCT FROM (OLD.session_key, OLD.session_data, OLD.expire_date))
        EXECUTE FUNCTION deferred_sessions_changed()
"""
DROP_REVOKE = """
    DROP TRIGGER deferred_sessions_deleted ON deferred_sessions_session;
    DROP TRIGGER deferred_sessions_truncated ON deferred_sessions_session;
    DROP TRIGGER deferred_sessions_changed ON deferred_sessions_session;
    DROP FUNCTION deferred_sessions_deleted();
    DROP FUNCTION deferred_sessions_truncated();
    DROP FUNCTION deferred_sessions_changed()
"""


class Migration(migrations.Migration):
    """Make the table of revocations, and the triggers that fill it."""

    dependencies = [("deferred_sessions", "0002_layout")]

    operations = [
        OnPostgreSQL(TABLE, DROP_TABLE),
        OnPostgreSQL(REVOKE, DROP_REVOKE),
    ]
