"""Which project a host store belongs to.

Called by `runtime`, and by `apps` when Django starts. Invariant: neither a release nor a change
of keys or session servers parts a project from its unflushed sessions.
"""

from __future__ import annotations

import functools

from django.conf import settings as django_settings
from django.db import DEFAULT_DB_ALIAS, connections

from deferred_sessions.conf import get_settings

PLACE = ("HOST", "PORT", "NAME")


def store_identity() -> str:
    """Return the project and its database: the default one, or that of the sessions.

    The default one stays when SERVERS change. If it is not PostgreSQL, it may be a file, whose
    path may change with each release; then it is the first of SERVERS. Nor is it the secret
    key, which may be rotated.
    """
    has_default = connections[DEFAULT_DB_ALIAS].vendor == "postgresql"
    alias = DEFAULT_DB_ALIAS if has_default else get_settings().server
    database = connections[alias].settings_dict
    place = "/".join(str(database.get(part) or "") for part in PLACE)
    return f"{project()}@{place}"


@functools.cache
def project() -> str:
    """Return the name of the project: its ROOT_URLCONF when Django started.

    Tests change that setting, but are still the same project.
    """
    return str(django_settings.ROOT_URLCONF)
