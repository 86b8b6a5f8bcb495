"""The worker: claims what Redis announces, does it, and marks it in Postgres."""
