"""Lay the session table out for frequent small updates."""

from __future__ import annotations

from typing import Any

from django.db import migrations

# A flush rewrites rows in place (a HOT update) if their page has room for the new
# version and no indexed column changed; vacuum must then come early and not dawdle.
LAY_OUT = """
    ALTER TABLE deferred_sessions_session SET (
        fillfactor = 70,
        autovacuum_vacuum_scale_factor = 0.02,
        autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0,
        toast.autovacuum_vacuum_scale_factor = 0.02,
        toast.autovacuum_vacuum_threshold = 1000,
        toast.autovacuum_vacuum_cost_delay = 0
    )
"""
RESET = """
    ALTER TABLE deferred_sessions_session RESET (
        fillfactor,
        autovacuum_vacuum_scale_factor,
        autovacuum_vacuum_threshold,
        autovacuum_vacuum_cost_delay,
        toast.autovacuum_vacuum_scale_factor,
        toast.autovacuum_vacuum_threshold,
        toast.autovacuum_vacuum_cost_delay
    )
"""

# Django makes a second index on a text key, for LIKE. With the collation "C" the primary
# key serves that, too. It is made at the end of the migration that makes the table.
DROP_LIKE_INDEX = """
    DROP INDEX IF EXISTS deferred_sessions_session_session_key_bc49c915_like
"""


# What cleans expired sessions up needs an index, and one on `expire_date` itself would make
# every flush an update of that index. The day changes once a day.
ADD_DAY = """
    ALTER TABLE deferred_sessions_session ADD COLUMN expire_day date NOT NULL
        GENERATED ALWAYS AS ((expire_date AT TIME ZONE 'UTC')::date) STORED
"""
DROP_DAY = """
    ALTER TABLE deferred_sessions_session DROP COLUMN expire_day
"""
INDEX_DAY = """
    CREATE INDEX deferred_sessions_session_expire_day ON deferred_sessions_session (expire_day)
"""


class OnPostgreSQL(migrations.RunSQL):
    """Runs where the table is: not in a project's other databases, if they are others."""

    def __init__(self, sql: str, reverse_sql: str) -> None:
        super().__init__(sql, reverse_sql, hints={"model_name": "session"})

    def database_forwards(self, app_label: str, schema_editor: Any, *states: Any) -> None:
        """Do what RunSQL does, on PostgreSQL only."""
        if schema_editor.connection.vendor == "postgresql":
            super().database_forwards(app_label, schema_editor, *states)

    def database_backwards(self, app_label: str, schema_editor: Any, *states: Any) -> None:
        """Do what RunSQL does, on PostgreSQL only."""
        if schema_editor.connection.vendor == "postgresql":
            super().database_backwards(app_label, schema_editor, *states)


class Migration(migrations.Migration):
    """Set the storage parameters; give the table the indexes it needs, and no others."""

    dependencies = [("deferred_sessions", "0001_initial")]

    operations = [
        OnPostgreSQL(LAY_OUT, RESET),
        OnPostgreSQL(ADD_DAY, DROP_DAY),
        OnPostgreSQL(INDEX_DAY, migrations.RunSQL.noop),
        OnPostgreSQL(DROP_LIKE_INDEX, migrations.RunSQL.noop),
    ]
