"""What an SAE is worth: fidelity, feature statistics, probes, polysemanticity, agreement between seeds."""
