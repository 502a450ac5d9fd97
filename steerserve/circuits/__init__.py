"""Circuits: which edges of a model a behaviour needs, and what can be read along the way."""
