"""Several session servers, each a PostgreSQL of its own, and several nodes; any of them may die."""
