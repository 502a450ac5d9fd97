"""The append-only record of every exchange, and what proves that nobody changed it."""
