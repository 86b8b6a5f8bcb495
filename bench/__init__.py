"""`python -m bench`: how fast this project is beside what people would use instead, measured in one run."""
