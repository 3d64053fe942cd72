"""`manage.py rebalancesessions`: sessions move to their servers after `SERVERS` has changed."""

from __future__ import annotations

from deferred_sessions.management.repair import RepairCommand


class Command(RepairCommand):
    """Moves what belongs to other servers now."""

    help = (
        "After DEFERRED_SESSIONS['SERVERS'] or ['COPIES'] has changed: empty the servers that are "
        "not named any more (leave them in DATABASES until then), and move the sessions that "
        "belong to other servers now, as the agents do by themselves. Visitors may use the site "
        "meanwhile. If it was interrupted, run it again: it goes on where it was."
    )
    empties_leaving = True
