"""Build a concept pack from labelled texts: what to edit, how far, and what reads the concept."""
