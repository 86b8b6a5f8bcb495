"""The service: the REST API that creates and verifies users. It never talks to Redis."""
