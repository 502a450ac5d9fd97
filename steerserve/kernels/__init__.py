"""Native operators: for each one its wrapper, torch registration and torch reference, together in one module."""
