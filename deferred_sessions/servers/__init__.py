"""The session servers: PostgreSQL, behind Django's connections. No memory wing."""
