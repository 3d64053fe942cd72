"""What operators need: an index by user, and a permission to see what is in sessions."""

from __future__ import annotations

from django.db import migrations, models


class Migration(migrations.Migration):
    """Index the sessions of users; one permission more."""

    dependencies = [("deferred_sessions", "0004_leases")]

    operations = [
        migrations.AlterModelOptions(
            name="session",
            options={
                "permissions": (("view_session_data", "Can view what is in sessions"),),
                "required_db_vendor": "postgresql",
                "verbose_name": "session",
                "verbose_name_plural": "sessions",
            },
        ),
        migrations.AddIndex(
            model_name="session",
            index=models.Index(
                condition=models.Q(("user_id__isnull", False)),
                fields=["user_id"],
                name="deferred_sessions_user",
            ),
        ),
    ]
