"""What single SAE features fire on, what they write, and what clamping them does: ``steerserve lab features``."""
