"""`python -m bench`: benchmarks of this project and its alternatives, measured side by side in one run."""
