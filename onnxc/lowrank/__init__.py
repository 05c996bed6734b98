"""Layers in thinner pieces: which there are, what they cost, and how they are fitted."""
