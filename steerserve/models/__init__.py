"""Model loading, family adapters that say where sites are, and the hooks that splice into them."""
