"""The session table."""

from __future__ import annotations

from django.db import migrations, models
from django.db.models.functions import Now


class Migration(migrations.Migration):
    """Create the table of `deferred_sessions.models.Session`."""

    initial = True

    dependencies = []

    operations = [
        migrations.CreateModel(
            name="Session",
            fields=[
                (
                    "session_key",
                    models.CharField(
                        db_collation="C",
                        max_length=40,
                        primary_key=True,
                        serialize=False,
                        verbose_name="session key",
                    ),
                ),
                ("session_data", models.TextField(verbose_name="session data")),
                ("expire_date", models.DateTimeField(verbose_name="expire date")),
                (
                    "version",
                    models.BigIntegerField(
                        db_default=1,
                        default=1,
                        help_text="Grows with each change.",
                        verbose_name="version",
                    ),
                ),
                (
                    "fence",
                    models.BigIntegerField(
                        db_default=0,
                        default=0,
                        help_text="Grows when another node may write; older writers are refused.",
                        verbose_name="fence",
                    ),
                ),
                (
                    "owner",
                    models.TextField(
                        editable=False,
                        help_text="The node that may change it.",
                        null=True,
                        verbose_name="owner",
                    ),
                ),
                (
                    "user_id",
                    models.CharField(
                        help_text="Who is logged in, if anybody.",
                        max_length=255,
                        null=True,
                        verbose_name="user id",
                    ),
                ),
                (
                    "created_at",
                    models.DateTimeField(db_default=Now(), verbose_name="created at"),
                ),
                (
                    "written_at",
                    models.DateTimeField(db_default=Now(), verbose_name="written at"),
                ),
            ],
            options={
                "verbose_name": "session",
                "verbose_name_plural": "sessions",
                "db_table": "deferred_sessions_session",
                "required_db_vendor": "postgresql",
                "abstract": False,
            },
        ),
    ]
