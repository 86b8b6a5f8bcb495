"""What every process needs to run: settings, start and stop, logs, and connections to Postgres and Redis."""
