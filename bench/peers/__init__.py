"""The alternatives: programs that do the work of a part with another library and print their rate."""
