"""Offline work: activations, SAE training, concept discovery and their evaluation."""
