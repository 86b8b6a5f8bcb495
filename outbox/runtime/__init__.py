"""The runtime of every process: settings, start and stop, logs, and connections to Postgres and Redis."""
