"""Tests of the level acceptance."""
