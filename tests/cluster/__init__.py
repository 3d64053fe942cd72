"""Several nodes: each with a directory and processes of its own, on one PostgreSQL."""
