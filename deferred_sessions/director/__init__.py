"""Configurations for the director: the proxy that sends each visitor to one node."""
