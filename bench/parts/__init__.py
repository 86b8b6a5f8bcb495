"""The parts of the bench. The docstring of each module says what it measures, from when to when."""
