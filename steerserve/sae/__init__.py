"""Sparse autoencoders: their equations and their files."""
