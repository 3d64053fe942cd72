"""Several nodes of one site behind a director."""
