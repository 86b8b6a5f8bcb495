"""`outbox up`: runs all processes and servers on one machine, for development. Production never imports it."""
