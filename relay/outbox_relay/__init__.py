"""The relay: hands outbox rows to Redis Queue, and takes back what got lost on the way."""
