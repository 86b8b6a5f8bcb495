"""Tests, by level: unit (no server), integration (real Postgres and Redis), acceptance (the three processes)."""
