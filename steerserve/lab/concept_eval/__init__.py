"""A concept pack's evaluation card: what its policy does, beside every simpler way to do the same."""
