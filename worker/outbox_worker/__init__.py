"""The worker: claims the rows that Redis announces, handles them, and completes them in Postgres."""
