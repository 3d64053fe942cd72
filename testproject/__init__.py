"""A small shop that runs on deferred_sessions: for the demonstration and the tests."""
