"""What size does to the speed: the pieces of the part `scale`."""
