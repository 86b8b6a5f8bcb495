"""The parts of the bench: one module each, whose docstring says what is measured, from when to when."""
