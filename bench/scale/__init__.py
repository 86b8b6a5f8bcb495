"""The measurements of the part `scale`."""
