"""Sessions in memory that all workers of a host share; PostgreSQL hears of them later.

    INSTALLED_APPS += ["deferred_sessions"]
    SESSION_ENGINE = "deferred_sessions.backend"

The package is used through that one path, the settings, the commands and the tasks;
see README.md. Nothing is imported here, so that settings modules may import `schedule`.
"""
