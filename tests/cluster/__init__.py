"""Several nodes of one site, each with a store and processes of its own."""
