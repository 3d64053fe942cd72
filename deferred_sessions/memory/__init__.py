"""One host: the mapped store, the process cache, the counters. No Django, no SQL."""
