"""Remember which sessions of another engine were taken over, so that none comes back."""

from __future__ import annotations

from importlib import import_module

from django.db import migrations

OnPostgreSQL = import_module("deferred_sessions.migrations.0002_layout").OnPostgreSQL

# Nothing but the key and until when the other engine may have the session: it is not to
# come back however it ended here.
TABLE = """
    CREATE TABLE deferred_sessions_adopted (
        session_key text COLLATE "C" PRIMARY KEY,
        expires_at timestamptz NOT NULL
    )
"""
DROP_TABLE = "DROP TABLE deferred_sessions_adopted"


class Migration(migrations.Migration):
    """Make the table of sessions that were taken over."""

    dependencies = [("deferred_sessions", "0010_operating")]

    operations = [OnPostgreSQL(TABLE, DROP_TABLE)]
