"""`outbox up`: the whole thing on a machine with Python alone. For development; production never imports it."""
