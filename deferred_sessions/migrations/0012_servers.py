"""Remember on each session server how all of them stand."""

from __future__ import annotations

from importlib import import_module

from django.db import migrations

OnPostgreSQL = import_module("deferred_sessions.migrations.0002_layout").OnPostgreSQL

# The number counts the changes of a server, so that of two registers the newer is known. The
# last three are for whoever fills a server that has come back: one at a time, resumable.
TABLE = """
    CREATE TABLE deferred_sessions_server (
        server text COLLATE "C" PRIMARY KEY,
        number bigint NOT NULL,
        phase text NOT NULL,
        since timestamptz NOT NULL,
        repairer text NOT NULL DEFAULT '',
        seen_at timestamptz NOT NULL DEFAULT '-infinity',
        position text NOT NULL DEFAULT ''
    )
"""
DROP_TABLE = "DROP TABLE deferred_sessions_server"


class Migration(migrations.Migration):
    """Make the register of session servers."""

    dependencies = [("deferred_sessions", "0011_adopted")]

    operations = [OnPostgreSQL(TABLE, DROP_TABLE)]
