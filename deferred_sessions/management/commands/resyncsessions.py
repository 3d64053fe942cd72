"""`manage.py resyncsessions`: a session server that missed something catches up, by hand."""

from __future__ import annotations

from deferred_sessions.management.repair import RepairCommand


class Command(RepairCommand):
    """Compares all session servers, and repairs."""

    help = (
        "Bring session servers up to date that have missed something, compare all copies, and "
        "remove sessions from where they do not belong. The agents do that by themselves when a "
        "server has come back; this does it now, and tells. Visitors may use the site meanwhile. "
        "If it was interrupted, the agents go on where it was."
    )
    empties_leaving = False
