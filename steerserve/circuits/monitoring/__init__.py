"""From circuits to what a server watches: which heads, what is read of them, and how well that tells a behaviour."""
