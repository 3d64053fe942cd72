"""Measurements beside Django's engines; `python -m benchmarks` runs them all."""
