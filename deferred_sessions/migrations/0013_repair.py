"""Let repair copy rows from server to server without anybody hearing of a change."""

from __future__ import annotations

from importlib import import_module

from django.db import migrations

OnPostgreSQL = import_module("deferred_sessions.migrations.0002_layout").OnPostgreSQL

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
    """Have the trigger of changes keep quiet about repair."""

    dependencies = [("deferred_sessions", "0012_servers")]

    operations = [OnPostgreSQL(CHANGED, AS_BEFORE)]
